"""Read and write rows: text files, tables and Hub data sets, with an optional map of columns and filter on tags.

A spec is a file (``.jsonl``, ``.json``, ``.csv`` or ``.tsv``, each also with ``.gz``; ``.parquet``), a folder that
``datasets`` saved, or ``hub:org/name[/config]:split``, optionally followed by ``?key=value&key2=a,b``: a row is kept
when, for every key, its tag is one of the values. A comma, ``&``, ``=`` or backslash that belongs to a key or value is
written with a backslash before it: ``?author=Smith\\, J.``. A part ``map:column=key`` names a column instead; see
:mod:`casehard.data.layouts`.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from casehard.data import rowfiles, tables
from casehard.data.formats import MAX_LINE_BYTES, parse_row, to_row
from casehard.data.layouts import ANSWER, Reader, check_map
from casehard.data.rowfiles import Row
from casehard.errors import ConfigError, DataError, Note, StorageError
from casehard.types import Example

KINDS = ".jsonl, .json, .csv or .tsv (each also .gz), .parquet, or a folder saved by `datasets`"
_MAP = "map:"
_MARKS = r"[\\,&=]"


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


def with_map(spec: str, columns: Mapping[str, str]) -> str:
    """Return a spec that reads its columns as these keys, too.

    Raises:
        ConfigError: see :func:`casehard.data.layouts.check_map`.
    """
    check_map(columns)
    base, mark, query = spec.partition("?")
    known = _split(query, "&") if mark else []
    parts = [f"{_MAP}{_written(column)}={key}" for column, key in columns.items()]
    new = [part for part in parts if part not in known]
    return f"{base}?{'&'.join([*known, *new])}" if new else spec


def _split_map(spec: str) -> tuple[str, dict[str, str]]:
    """Return the spec without its map, and the map."""
    base, mark, query = spec.partition("?")
    parts = _split(query, "&") if mark else []
    columns: dict[str, str] = {}
    for part in (part for part in parts if part.startswith(_MAP)):
        column, *key = map(_plain, _split(part.removeprefix(_MAP), "="))
        if len(key) != 1 or not column or not key[0]:
            raise ConfigError(f"{spec}: {part!r} is not of the form map:column=key", hint="map:question=prompt")
        if column in columns:
            raise ConfigError(f"{spec}: the column {column!r} is mapped twice", hint="leave one of them out")
        columns[column] = key[0]
    rest = "&".join(part for part in parts if not part.startswith(_MAP))
    return (f"{base}{mark}{rest}" if rest or not columns else base), columns


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


def _hub(name: str) -> Iterator[Row]:
    from casehard.data.hub import rows

    for number, value in enumerate(rows(name), start=1):
        where = f"{name}, row {number}"
        if len(json.dumps(value, default=str, ensure_ascii=False)) > MAX_LINE_BYTES:
            raise DataError(f"{where}: longer than {MAX_LINE_BYTES:,} bytes", hint="one row may hold at most 1 MB")
        yield Row(where, value)


def walk(base: str) -> tuple[Iterator[Row], bool]:
    """Return the rows behind the name of a source, and whether it is a table, whose rows have every column."""
    if base.startswith("hub:"):
        return _hub(base), True
    if "\0" in base:
        raise DataError(f"path with a NUL character: {base!r}")
    path = Path(base)
    if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises where a name is too long
        if any((path / name).is_file() for name in (tables.STATE, tables.SPLITS)):
            return tables.saved(path), True
        raise DataError(f"{base}: a folder, not a data file", hint=f"name a file in it: {KINDS}")
    packed = path.suffix.lower() == ".parquet"
    if not packed and not rowfiles.known(path):
        raise DataError(
            f"{base}: unknown kind of data file {path.suffix!r}", hint=f"known: {KINDS}, hub:org/name:split"
        )
    try:
        if not path.is_file():
            raise DataError(f"no such data file: {base}")
    except OSError as error:
        raise DataError(f"{base[:80]}: {error.strerror}") from None
    if packed:
        return tables.parquet(path), True
    return rowfiles.walk(path), rowfiles.is_table(path)


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


def load(
    spec: str | Path, *, require_response: bool = False, columns: Mapping[str, str] | None = None
) -> list[Example]:
    """Load rows.

    Args:
        spec: see the top of this module.
        require_response: refuse (after filtering) rows without a final assistant turn.
        columns: column -> key it is read as, besides those the spec itself maps; see :mod:`casehard.data.layouts`.

    Returns:
        The rows in file order; never an empty list. A :class:`casehard.errors.Note` says what was mapped, if anything.

    Raises:
        ConfigError: a map that means nothing.
        DataError: missing file, unknown kind, or a bad row, with file and line.
        MissingExtra: parquet, a saved data set or the Hub without the ``data`` extra.
    """
    unmapped, mapped = _split_map(with_map(str(spec), columns or {}))
    base, wanted = _split_spec(unmapped)
    rows, nulls = walk(base)
    reader = Reader(base, mapped, nulls=nulls)
    places: dict[int, str] = {}
    examples: list[Example] = []
    for where, value in rows:
        example = parse_row(reader.read(value, where), where)
        places[id(example)] = where
        examples.append(example)
    if not examples:
        raise DataError(f"{base}: no rows")
    if line := reader.line:
        warnings.warn(line, Note, stacklevel=2)
    if wanted:
        examples = _filtered(examples, wanted, str(spec))
    if require_response:
        for example in examples:
            if not example.response:
                raise DataError(f"{places[id(example)]}: no response to learn from", hint=_missing(example))
    return examples


def _missing(example: Example) -> str:
    """Return what to do about a row without a response."""
    meant = next((tag for tag in example.tags if tag.strip().casefold() in ANSWER), "")
    hint = 'add "response", or end with an assistant turn'
    return f"{hint}; if {meant!r} is the response: --map {meant}=response" if meant else hint


def load_many(specs: Sequence[str | Path], *, require_response: bool = False) -> list[Example]:
    """Load several specs one after the other; see :func:`load`."""
    return [example for spec in specs for example in load(spec, require_response=require_response)]


def save(path: str | Path, examples: Iterable[Example]) -> None:
    """Write rows as JSONL such that :func:`load` gives them back equal; the file appears whole or not at all.

    Raises:
        DataError: no rows, or a row that could not be read back.
        StorageError: the disk refused the write.
    """
    from casehard.io.files import write_text_atomic

    path = Path(path)
    text = written(path, examples)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot create {path.parent}: {error.strerror}") from None
    write_text_atomic(path, text)


def written(path: Path, examples: Iterable[Example]) -> str:
    """Return the text of a file of rows.

    Raises:
        DataError: no rows, or a row that could not be read back.
    """
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
    return "\n".join(lines) + "\n"
