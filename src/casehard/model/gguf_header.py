"""What stands before the tensors of a GGUF file, read within the bounds of the file.

The reader of the package ``gguf`` believes every count: a damaged one keeps it reading for hours, or until the memory
is full. So the header is walked here first, and a file that promises more than it holds is refused.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

from casehard.errors import Corrupt, Unsupported

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEPTH, _DIMENSIONS = 4, 4
_VERSIONS = (2, 3)
_HINT = "fetch it again"

Value = str | int | float | bool | None


class Tensor(NamedTuple):
    """A tensor as the header describes it."""

    name: str
    kind: int
    """Number of the way it is stored."""
    size: int
    """Numbers it holds."""
    offset: int


class Header(NamedTuple):
    """The header of a GGUF file."""

    values: dict[str, Value]
    """Settings that are single values; None for lists."""
    tensors: list[Tensor]
    start: int
    """Where the tensors begin, in bytes."""


class _Cursor:
    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self._stream, self._path, self._size = stream, path, path.stat().st_size

    def at(self) -> int:
        return self._stream.tell()

    def need(self, count: int) -> int:
        """Return a number of bytes, which must still be there."""
        if count > self._size - self._stream.tell():
            raise Corrupt(f"{self._path}: damaged or cut short: promises more than the file holds", hint=_HINT)
        return count

    def number(self, code: str) -> int | float | bool:
        found: int | float | bool = struct.unpack(f"<{code}", self._stream.read(self.need(struct.calcsize(code))))[0]
        return found

    def count(self, code: str = "Q") -> int:
        return int(self.number(code))

    def text(self) -> str:
        return self._stream.read(self.need(self.count())).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Value:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or depth >= _DEPTH:
            raise Corrupt(f"{self._path}: damaged: a setting of an unknown kind ({kind})", hint=_HINT)
        inner, count = self.count("I"), self.count()
        each = struct.calcsize(_SCALARS[inner]) if inner in _SCALARS else 8
        self.need(each * count)
        if inner in _SCALARS:
            self._stream.seek(each * count, 1)
        else:
            for _ in range(count):
                self.value(inner, depth + 1)
        return None


def read_header(path: Path) -> Header:
    """Read the header of a GGUF file.

    Raises:
        Corrupt: not a GGUF file, or one that promises more than it holds.
        Unsupported: a version of the format that is not read.
    """
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise Corrupt(f"{path}: not a GGUF file, whatever its name", hint=_HINT)
        cursor = _Cursor(stream, path)
        if (version := cursor.count("I")) not in _VERSIONS:
            raise Unsupported(
                f"{path}: version {version} of GGUF, in this byte order", hint="versions 2 and 3 are read"
            )
        tensors, settings = cursor.count(), cursor.count()
        cursor.need(24 * tensors + 12 * settings)
        values = {cursor.text(): cursor.value(cursor.count("I")) for _ in range(settings)}
        found = [_tensor(cursor, path) for _ in range(tensors)]
        step = values.get("general.alignment", 32)
        if not isinstance(step, int) or not 0 < step <= 1 << 20:
            raise Corrupt(f"{path}: damaged: an alignment of {step!r}", hint=_HINT)
        return Header(values, found, -(-cursor.at() // step) * step)


def _tensor(cursor: _Cursor, path: Path) -> Tensor:
    name, dimensions = cursor.text(), cursor.count("I")
    if dimensions > _DIMENSIONS:
        raise Corrupt(f"{path}: damaged: a tensor of {dimensions} dimensions", hint=_HINT)
    size = math.prod(cursor.count() for _ in range(dimensions))
    return Tensor(name, cursor.count("I"), size, cursor.count())


def check_tensors(path: Path, header: Header, layouts: Mapping[int, tuple[int, int]]) -> None:
    """Check that every tensor lies within the file.

    Args:
        layouts: number of a way of storing -> numbers in a block, and bytes of it.

    Raises:
        Corrupt: one does not, or is stored in an unknown way.
    """
    end = path.stat().st_size
    for tensor in header.tensors:
        if tensor.kind not in layouts:
            raise Corrupt(f"{path}: {tensor.name[:80]} is stored in an unknown way ({tensor.kind})", hint=_HINT)
        block, width = layouts[tensor.kind]
        if header.start + tensor.offset + -(-tensor.size // block) * width > end:
            raise Corrupt(f"{path}: damaged or cut short: {tensor.name[:80]} ends beyond the file", hint=_HINT)
