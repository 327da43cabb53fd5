"""Read and write rows: JSONL, JSON, parquet and Hub data sets, with an optional filter on tags.

A spec is ``path.jsonl``, ``path.json``, ``path.parquet`` or ``hub:org/name[/config]:split``, optionally followed by
``?key=value&key2=a,b``: a row is kept when, for every key, its tag is one of the values. A comma, ``&``, ``=`` or
backslash that belongs to a key or value is written with a backslash before it: ``?author=Smith\\, J.``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from casehard.data.formats import DECODER, MAX_DEPTH, MAX_LINE_BYTES, parse_line, parse_row, to_row
from casehard.errors import DataError, MissingExtra, StorageError
from casehard.types import Example

SUFFIXES = (".jsonl", ".json", ".parquet")
_MARKS = r"[\\,&=]"


class Row(NamedTuple):
    """A parsed row and where it stood."""

    where: str
    value: Any


def _split(text: str, mark: str) -> list[str]:
    """Split at every ``mark`` that no backslash makes part of a key or value; backslashes stay."""
    parts = [""]
    for piece in re.findall(rf"\\{_MARKS}|.", text, re.DOTALL):
        if piece == mark:
            parts.append("")
        else:
            parts[-1] += piece
    return parts


def _plain(text: str) -> str:
    return re.sub(rf"\\({_MARKS})", r"\1", text)


def _written(text: str) -> str:
    return re.sub(rf"({_MARKS})", r"\\\1", text)


def _split_spec(spec: str) -> tuple[str, dict[str, list[str]]]:
    base, mark, query = spec.partition("?")
    wanted: dict[str, list[str]] = {}
    for part in _split(query, "&") if mark else []:
        key, *rest = _split(part, "=")
        values = "=".join(rest)
        if not key or not values:
            raise DataError(
                f"{spec}: filter {part!r} is not of the form key=value", hint="example: data.jsonl?label=a,b"
            )
        wanted[_plain(key)] = [_plain(value) for value in _split(values, ",")]
    return base, wanted


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 2):
            number += 1
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            raw = raw.rstrip(b"\r\n")
            if raw.strip():
                where = f"{path}:{number}"
                yield Row(where, parse_line(raw, where))


def _json(path: Path) -> Iterator[Row]:
    """Walk the array row by row, so that errors carry line numbers and the limits hold for each row."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start})") from None
    blank = " \t\r\n"

    def skip(at: int) -> int:
        while at < len(text) and text[at] in blank:
            at += 1
        return at

    at = skip(0)
    if text[at : at + 1] != "[":
        raise DataError(f"{path}: a .json file must hold one array of rows", hint="one object per line is .jsonl")
    at, line, counted = skip(at + 1), 1, 0
    if text[at : at + 1] == "]":
        at += 1
    else:
        while True:
            line, counted = line + text.count("\n", counted, at), at
            where = f"{path}:{line}"
            try:
                value, end = DECODER.raw_decode(text, at)
            except RecursionError:
                raise DataError(f"{where}: nested deeper than {MAX_DEPTH} levels") from None
            except ValueError as error:
                raise DataError(f"{where}: not valid JSON: {error}") from None
            if len(text[at:end].encode(errors="replace")) > MAX_LINE_BYTES:
                raise DataError(f"{where}: longer than {MAX_LINE_BYTES:,} bytes", hint="one row may hold at most 1 MB")
            yield Row(where, value)
            at = skip(end)
            mark = text[at : at + 1]
            at = skip(at + 1)
            if mark == "]":
                break
            if mark != ",":
                raise DataError(f"{where}: expected ',' or ']' after the row, got {mark!r}")
    if skip(at) != len(text):
        raise DataError(f"{path}: text after the array: {text[skip(at) :][:40]!r}")


def _without_nulls(rows: Iterable[Row]) -> Iterator[Row]:
    """Drop null columns: a table has every column in every row."""
    for where, value in rows:
        yield Row(where, {key: item for key, item in value.items() if item is not None})


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingExtra("pyarrow", "data", purpose="reading parquet") from None
    try:
        number = 0
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}, row {number}", value)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as parquet: {error}") from None


def _hub(name: str) -> Iterator[Row]:
    from casehard.data.hub import rows

    for number, value in enumerate(rows(name), start=1):
        yield Row(f"{name}, row {number}", value)


def _rows(base: str) -> Iterator[Row]:
    if base.startswith("hub:"):
        return _without_nulls(_hub(base))
    if "\0" in base:
        raise DataError(f"path with a NUL character: {base!r}")
    path = Path(base)
    if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises where a name is too long
        raise DataError(f"{base}: a folder, not a data file", hint=f"name a file in it: {', '.join(SUFFIXES)}")
    if path.suffix not in SUFFIXES:
        raise DataError(
            f"{base}: unknown kind of data file {path.suffix!r}",
            hint=f"known: {', '.join(SUFFIXES)}, hub:org/name:split",
        )
    try:
        if not path.is_file():
            raise DataError(f"no such data file: {base}")
    except OSError as error:
        raise DataError(f"{base[:80]}: {error.strerror}") from None
    if path.suffix == ".parquet":
        return _without_nulls(_parquet(path))
    return _jsonl(path) if path.suffix == ".jsonl" else _json(path)


def _tag_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _filtered(examples: list[Example], wanted: dict[str, list[str]], spec: str) -> list[Example]:
    for key, values in wanted.items():
        present = {_tag_text(e.tags[key]) for e in examples if key in e.tags}
        if not present:
            known = sorted({tag for e in examples for tag in e.tags})
            raise DataError(
                f"{spec}: no row has the tag {key!r}", hint=f"tags: {', '.join(map(_written, known)) or 'none'}"
            )
        missing = [value for value in values if value not in present]
        if missing:
            shown = ", ".join(_written(value) for value in sorted(present)[:12])
            cut = r" (\, is a comma of a value)" if "\\" in shown else ""
            raise DataError(f"{spec}: no row has {key}={missing[0]}", hint=f"values of {key!r}: {shown}{cut}")
    kept = [
        example
        for example in examples
        if all(k in example.tags and _tag_text(example.tags[k]) in v for k, v in wanted.items())
    ]
    if not kept:
        raise DataError(f"{spec}: the filter leaves none of {len(examples)} rows")
    return kept


def load(spec: str | Path, *, require_response: bool = False) -> list[Example]:
    """Load rows.

    Args:
        spec: see the top of this module.
        require_response: refuse (after filtering) rows without a final assistant turn.

    Returns:
        The rows in file order; never an empty list.

    Raises:
        DataError: missing file, unknown kind, or a bad row, with file and line.
        MissingExtra: parquet or Hub without the ``data`` extra.
    """
    base, wanted = _split_spec(str(spec))
    places: dict[int, str] = {}
    examples: list[Example] = []
    for where, value in _rows(base):
        example = parse_row(value, where)
        places[id(example)] = where
        examples.append(example)
    if not examples:
        raise DataError(f"{base}: no rows")
    if wanted:
        examples = _filtered(examples, wanted, str(spec))
    if require_response:
        for example in examples:
            if not example.response:
                raise DataError(
                    f"{places[id(example)]}: no response to learn from",
                    hint='add "response", or end with an assistant turn',
                )
    return examples


def load_many(specs: Sequence[str | Path], *, require_response: bool = False) -> list[Example]:
    """Load several specs one after the other; see :func:`load`."""
    return [example for spec in specs for example in load(spec, require_response=require_response)]


def save(path: str | Path, examples: Iterable[Example]) -> None:
    """Write rows as JSONL such that :func:`load` gives them back equal; the file appears whole or not at all.

    Raises:
        DataError: no rows, or a row that could not be read back.
        StorageError: the disk refused the write.
    """
    from casehard.files import write_text_atomic

    path = Path(path)
    if path.suffix != ".jsonl":
        raise DataError(f"{path}: rows are written as .jsonl, not {path.suffix!r}")
    lines: list[str] = []
    for number, example in enumerate(examples, start=1):
        row = to_row(example)
        where = f"{path}, row {number}"
        parse_row(row, where)
        line = json.dumps(row, ensure_ascii=False, allow_nan=False)
        if len(line.encode()) > MAX_LINE_BYTES:
            raise DataError(f"{where}: longer than {MAX_LINE_BYTES:,} bytes")
        lines.append(line)
    if not lines:
        raise DataError(f"{path}: no rows to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot create {path.parent}: {error.strerror}") from None
    write_text_atomic(path, "\n".join(lines) + "\n")
