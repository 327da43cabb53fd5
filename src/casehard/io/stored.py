"""What runs write and read back: JSON checked against the shape its reader relies on, times kept apart from results.

A shape is a dataclass with the keys that are read, and nothing else: further keys are nobody's business, and a key with
a default may be missing. What is returned is the plain JSON value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from casehard.errors import Corrupt
from casehard.io.files import read_json

TOOK = frozenset({"seconds", "peak_bytes", "workers", "ratio_to_sft", "seconds_ratio"})
"""Keys of what a run took, on this machine and this day: another run with the same result has other values there."""
_DIGITS = re.compile(rb"[0-9]{38}")
"""A whole number beyond any count has as many."""
_HINT = "it was changed or damaged; take another copy, or make it again"


@cache
def _adapter(shape: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(shape)


def checked(value: Any, shape: Any, where: Path | str) -> Any:
    """Return a JSON value that has a shape.

    Args:
        shape: a dataclass, or any type that pydantic can check; no value is converted to fit.
        where: file, and place in it, for the error.

    Raises:
        Corrupt: names the file, the key and what was found there.
    """
    from pydantic import ValidationError

    # As text, because only there strict means "as JSON types it"; what is no Unicode is none of a shape's business.
    text = json.dumps(value, ensure_ascii=False).encode(errors="replace")
    if _DIGITS.search(text) and _beyond(value):
        raise Corrupt(f"{where}: a whole number beyond any count", hint=_HINT)
    try:
        _adapter(shape).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        found = "" if first["type"] in ("missing", "json_invalid") else f", got {_short(first['input'])}"
        said = first["msg"][:1].lower() + first["msg"][1:]
        raise Corrupt(f"{where}: {f'{key}: ' if key else ''}{said}{found}", hint=_HINT) from None
    return value


def _beyond(value: Any) -> bool:
    """Return whether a number is so large that arithmetic with it fails."""
    if isinstance(value, dict | list):
        return any(map(_beyond, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int) and abs(value) >> 127 > 0


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read(path: Path, shape: Any) -> dict[str, Any]:
    """Read a JSON file that has a shape.

    Raises:
        UserError: the file is missing.
        Corrupt: it is not JSON, or has another shape.
    """
    return dict(checked(read_json(path), shape, path))


def read_lines(path: Path, shape: Any = dict) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSONL file, each of which has a shape.

    Raises:
        Corrupt: a line is not JSON, or has another shape; the message names it.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}, line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise Corrupt(f"{where}: not JSON: {error}", hint=_HINT) from None
            # The line itself is checked where it can be: it need not be written once more for that.
            if _DIGITS.search(line) or not _has(line, shape):
                checked(value, shape, where)
            yield value


def _has(line: bytes, shape: Any) -> bool:
    """Return whether a line of JSON is known to have a shape."""
    from pydantic import ValidationError

    try:
        _adapter(shape).validate_json(line, strict=True)
    except ValidationError:
        return False
    return True


def apart(value: Any) -> tuple[Any, Any]:
    """Return (a JSON value without what it took, what it took in the same places); the second None for nothing."""
    if isinstance(value, Mapping):
        kept, took = {}, {}
        for key, item in value.items():
            if key in TOOK:
                took[key] = item
                continue
            kept[key], rest = apart(item)
            if rest is not None:
                took[key] = rest
        return kept, took or None
    if isinstance(value, list | tuple):
        pairs = [apart(item) for item in value]
        return [k for k, _ in pairs], [t for _, t in pairs] if any(t is not None for _, t in pairs) else None
    return value, None


def together(kept: Any, took: Any, where: Path | str) -> Any:
    """Undo :func:`apart`.

    Raises:
        Corrupt: the two are not of one value.
    """
    if took is None:
        return kept
    if isinstance(kept, dict) and isinstance(took, dict) and all(key in kept or key in TOOK for key in took):
        return kept | {k: together(kept[k], v, where) if k in kept else v for k, v in took.items()}
    if isinstance(kept, list) and isinstance(took, list) and len(kept) == len(took):
        return [together(k, t, where) for k, t in zip(kept, took, strict=True)]
    raise Corrupt(f"{where}: what the run took does not fit its result", hint=_HINT)
