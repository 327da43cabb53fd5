"""Walk the rows of text files: JSONL, a JSON array, CSV and TSV, each also packed with gzip; standard library only.

Every row is read by itself under the limits of :mod:`casehard.data.formats`, so that neither a huge row nor a small
file that unpacks to a huge one is held in memory.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

from casehard.data.formats import DECODER, MAX_DEPTH, MAX_LINE_BYTES, parse_line, shown
from casehard.errors import DataError

SMALL = 512 * 2**20
"""What any packed file may unpack to, in bytes."""
RATIO = 64
"""What a larger one may unpack to, in bytes for each byte on disk; text comes to 3..10."""
ROW_COST = 256
"""Bytes that a row costs in memory besides its text."""
_TOO_LONG = "one row may hold at most 1 MB"
_BLANK = re.compile(r"[ \t\r\n]*")
_BRACKET = re.compile(r'"(?>[^"\\]+|\\.)*+(?:"|\Z)|[\[\]{}]', re.DOTALL)


class Row(NamedTuple):
    """A parsed row and where it stood."""

    where: str
    value: Any


class Allowance:
    """What may come out of a packed file: enough for any honest one, and never the memory of the machine."""

    def __init__(self, path: Path, limit: int = 0) -> None:
        self.path, self.spent = path, 0
        self.limit = limit or max(SMALL, RATIO * path.stat().st_size)

    def spend(self, size: int) -> None:
        """Count bytes that came out, or will.

        Raises:
            DataError: more than the file may unpack to.
        """
        self.spent += size
        self.check(self.spent)

    def check(self, size: int) -> None:
        """Raise DataError where the whole file would unpack to so many bytes and may not."""
        if size > self.limit:
            raise DataError(
                f"{self.path}: unpacks to more than {self.limit // 2**20:,} MB",
                hint="a file that small does not hold so many rows honestly; unpack it yourself, or split it",
            )


class _Bytes(Protocol):
    def read(self, size: int, /) -> bytes: ...
    def readline(self, size: int, /) -> bytes: ...


class _Unpacked:
    """What a gzip file holds, counted against its allowance."""

    def __init__(self, file: gzip.GzipFile, allowance: Allowance) -> None:
        self._file, self._allowance = file, allowance

    def read(self, size: int, /) -> bytes:
        raw = self._file.read(size)
        self._allowance.spend(len(raw))
        return raw

    def readline(self, size: int, /) -> bytes:
        raw = self._file.readline(size)
        self._allowance.spend(len(raw) + ROW_COST)
        return raw


@contextmanager
def _opened(path: Path, allowance: Allowance | None) -> Iterator[_Bytes]:
    """Open a file, one with an allowance as gzip."""
    if allowance is None:
        with path.open("rb") as file:
            yield file
        return
    try:
        with gzip.open(path, "rb") as packed:
            yield _Unpacked(packed, allowance)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not readable as gzip: {error}") from None


def _jsonl(path: Path, allowance: Allowance | None) -> Iterator[Row]:
    """Yield one row a line; empty lines are passed over."""
    with _opened(path, allowance) as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 2):
            number += 1
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            raw = raw.rstrip(b"\r\n")
            if raw.strip():
                where = f"{path}:{number}"
                yield Row(where, parse_line(raw, where))


class _Window:
    """The part of a UTF-8 file that is being read; ``at`` is the next character of ``text``."""

    NEEDED = MAX_LINE_BYTES + 2  # characters: a value that does not end within them is too long

    def __init__(self, file: _Bytes, path: Path) -> None:
        self._file, self._path = file, path
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._bytes = self._counted = 0
        self.text, self.at, self.line, self.ended = "", 0, 1, False
        self._fill()
        self.at = +self.text.startswith("\ufeff")

    def _fill(self) -> None:
        """Drop what is read, and read on until a row fits in what follows."""
        self.here()
        pieces, self.at, self._counted = [self.text[self.at :]], 0, 0
        size = len(pieces[0])
        while size < 2 * self.NEEDED and not self.ended:
            pending = len(self._decoder.getstate()[0])
            raw = self._file.read(2**18)
            self.ended = not raw
            try:
                pieces.append(self._decoder.decode(raw, final=self.ended))
            except UnicodeDecodeError as error:
                at = self._bytes - pending + error.start
                raise DataError(f"{self._path}: not UTF-8 (byte {at})") from None
            self._bytes += len(raw)
            size += len(pieces[-1])
        self.text = "".join(pieces)

    def here(self) -> str:
        """Return file and line of the next character."""
        self.line, self._counted = self.line + self.text.count("\n", self._counted, self.at), self.at
        return f"{self._path}:{self.line}"

    def skip(self) -> str:
        """Go to the next character that is no blank and return it, "" at the end."""
        while True:
            self.at = cast(re.Match[str], _BLANK.match(self.text, self.at)).end()
            if not self.ended and len(self.text) - self.at < self.NEEDED:
                self._fill()
            elif self.at == len(self.text) or self.text[self.at] not in " \t\r\n":
                return self.text[self.at : self.at + 1]

    def value(self) -> Any:
        """Return the JSON value that begins here, and go past it."""
        where = self.here()
        try:
            value, end = DECODER.raw_decode(self.text, self.at)
        except RecursionError:
            raise DataError(f"{where}: nested deeper than {MAX_DEPTH} levels") from None
        except ValueError as error:
            if not self.ended and not self._closes():
                raise DataError(f"{where}: longer than {MAX_LINE_BYTES:,} bytes", hint=_TOO_LONG) from None
            raise DataError(f"{where}: not valid JSON: {getattr(error, 'msg', error)}") from None
        if len(self.text[self.at : end].encode(errors="replace")) > MAX_LINE_BYTES:
            raise DataError(f"{where}: longer than {MAX_LINE_BYTES:,} bytes", hint=_TOO_LONG)
        self.at = end
        return value

    def _closes(self) -> bool:
        """Return whether the value that begins here ends within the window."""
        depth = 0
        for found in _BRACKET.finditer(self.text, self.at):
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found.group(), 0)
            if depth == 0:
                return found.end() < len(self.text)
        return False


def _json_array(path: Path, allowance: Allowance | None) -> Iterator[Row]:
    """Yield the rows of one array, each under the limits of a line and with the line it begins on."""
    with _opened(path, allowance) as file:
        window = _Window(file, path)
        if (first := window.skip()) != "[":
            hint = "one object per line is .jsonl"
            if first == "{" and re.match(r'\{\s*"[^"\\]{1,40}"\s*:\s*\[\s*\{', window.text[window.at :]):
                hint += "; rows that stand under a key: write the array itself to the file"
            raise DataError(f"{path}: a .json file must hold one array of rows", hint=hint)
        window.at += 1
        closed = window.skip() == "]"
        window.at += closed
        while not closed:
            if allowance is not None:
                allowance.spend(ROW_COST)
            where = window.here()
            yield Row(where, window.value())
            mark = window.skip()
            window.at += 1
            closed = mark == "]"
            if mark not in ("]", ","):
                raise DataError(f"{where}: expected ',' or ']' after the row, got {mark!r}")
            window.skip()
        if window.skip():
            raise DataError(f"{path}: text after the array: {window.text[window.at :][:40]!r}")


class _Lines:
    """The lines of a table as text, counted from the start of each record."""

    def __init__(self, file: _Bytes, path: Path) -> None:
        self._file, self._path = file, path
        self.number = self.size = 0

    def __iter__(self) -> Iterator[str]:
        while raw := self._file.readline(MAX_LINE_BYTES + 2):
            self.number += 1
            self.size += len(raw)
            if self.number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if self.size > MAX_LINE_BYTES:
                raise DataError(
                    f"{self._path}:{self.number}: a row longer than {MAX_LINE_BYTES:,} bytes",
                    hint=f"{_TOO_LONG}; is a quote never closed?",
                )
            try:
                yield raw.decode("utf-8")
            except UnicodeDecodeError as error:
                where = f"{self._path}:{self.number}"
                raise DataError(f"{where}: not UTF-8 (byte {error.start}: 0x{raw[error.start]:02x})") from None


def _records(lines: _Lines, path: Path, mark: str) -> Iterator[tuple[str, list[str]]]:
    reader = csv.reader(iter(lines), delimiter=mark, strict=True)
    while True:
        where, lines.size = f"{path}:{lines.number + 1}", 0
        known = csv.field_size_limit(MAX_LINE_BYTES)  # of the whole process: not left changed
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{where}: not a readable table: {error}") from None
        finally:
            csv.field_size_limit(known)
        if cells is None:
            return
        if cells:
            yield where, cells


def _header(where: str, cells: list[str]) -> list[str]:
    names = [cell.strip() or "unnamed" for cell in cells]  # what pandas writes its index under
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{where}: two columns are called {shown(twice)}", hint="rename one of them")
    if len(names) == 1 and ";" in names[0]:
        raise DataError(
            f"{where}: one column {shown(names[0])}", hint="columns are separated by commas, in .tsv by tabs"
        )
    return names


def _table(path: Path, allowance: Allowance | None, mark: str) -> Iterator[Row]:
    """Yield the rows of CSV or TSV, named by the first line; an empty cell is an absent one, all others are text.

    Args:
        mark: what stands between two cells.
    """
    with _opened(path, allowance) as file:
        names: list[str] | None = None
        for where, cells in _records(_Lines(file, path), path, mark):
            if names is None:
                names = _header(where, cells)
                continue
            if len(cells) != len(names):
                raise DataError(f"{where}: {len(cells)} cells in a table of {len(names)} columns")
            yield Row(where, {name: cell or None for name, cell in zip(names, cells, strict=True)})


def known(path: Path) -> bool:
    """Return whether the name of a file says that it is of a kind read here."""
    return _kind(path) in (".jsonl", ".json", ".csv", ".tsv")


def is_table(path: Path) -> bool:
    """Return whether the rows of a file have every column, absent values as null."""
    return _kind(path) in (".csv", ".tsv")


def _kind(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def walk(path: Path) -> Iterator[Row]:
    """Return the rows of a file of a known kind.

    Raises:
        DataError: a row that cannot be read, with file and line.
    """
    kind = _kind(path)
    allowance = Allowance(path) if path.suffix.lower() == ".gz" else None
    if kind in (".csv", ".tsv"):
        return _table(path, allowance, "," if kind == ".csv" else "\t")
    return _jsonl(path, allowance) if kind == ".jsonl" else _json_array(path, allowance)
