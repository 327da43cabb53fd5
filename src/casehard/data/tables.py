"""Rows of parquet files and of saved ``datasets`` folders; the only file that imports ``pyarrow``.

A table may hold far more than its file is large: a value said once and repeated, a count instead of rows, packed
pages. So what the metadata promises is checked before anything is read, texts are read as dictionaries (a repeated
text is held once), and a row is turned into Python values only once its size is known.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from casehard.data.formats import MAX_DEPTH, MAX_LINE_BYTES, parse_line
from casehard.data.rowfiles import ROW_COST, Allowance, Row
from casehard.errors import DataError, MissingExtra

STATE, SPLITS = "state.json", "dataset_dict.json"
"""Files that tell a saved data set, and a folder of several, from any other folder."""
_BATCH = 256  # rows
_BATCH_BYTES = 64 * 2**20
_VALUE_COST = 8  # bytes of a number, or of a reference to anything


def _arrow(purpose: str) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise MissingExtra("pyarrow", "data", purpose=purpose) from None
    return pyarrow


def parquet(path: Path) -> Iterator[Row]:
    """Yield the rows of a parquet file.

    Raises:
        DataError: not a parquet file, larger than its size allows, or a value that JSON does not have.
        MissingExtra: ``pyarrow`` is not installed.
    """
    arrow = _arrow("reading parquet")
    from pyarrow import parquet as files

    allowance = Allowance(path, path.stat().st_size)
    try:
        with files.ParquetFile(path) as table:
            _check_names(arrow, table.schema_arrow, path)
            size = _check_promises(table.metadata, path, allowance)
            texts = [
                c.path for c in map(table.schema.column, range(len(table.schema))) if c.physical_type == "BYTE_ARRAY"
            ]
            metadata = table.metadata
        with files.ParquetFile(path, metadata=metadata, read_dictionary=texts) as table:
            yield from _rows(arrow, table.iter_batches(batch_size=size, use_threads=False), path, allowance)
    except _failures(arrow) as error:
        raise DataError(f"{path}: not readable as parquet: {str(error)[:200]}") from None


def saved(folder: Path) -> Iterator[Row]:
    """Yield the rows of a folder that ``datasets`` wrote with ``save_to_disk``.

    Raises:
        DataError: not such a folder, several splits, damaged, or a value that JSON does not have.
        MissingExtra: ``pyarrow`` is not installed.
    """
    arrow = _arrow("reading saved data sets")
    for path in _parts(folder):
        allowance = Allowance(path, path.stat().st_size)
        try:
            with arrow.memory_map(str(path)) as source:
                _refuse_packed(arrow, source, path)
            with arrow.memory_map(str(path)) as source, arrow.ipc.open_stream(source) as stream:
                _check_names(arrow, stream.schema, path)
                yield from _rows(arrow, stream, path, allowance)
        except _failures(arrow) as error:
            raise DataError(f"{path}: not readable as an Arrow file: {str(error)[:200]}") from None


def _failures(arrow: Any) -> tuple[type[Exception], ...]:
    return (arrow.ArrowException, OSError, ValueError, OverflowError, MemoryError, struct.error)


def _parts(folder: Path) -> list[Path]:
    """Return the Arrow files of a saved data set, in order."""
    if (folder / SPLITS).is_file():
        splits = _listed(folder / SPLITS, "splits", str)
        raise DataError(
            f"{folder}: holds several splits", hint=f"name one: {folder}/{splits[0] if splits else 'train'}"
        )
    found = _listed(folder / STATE, "_data_files", dict)
    names = [entry.get("filename") for entry in found]
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise DataError(f"{folder / STATE}: {name!r} is no name of a file in this folder")
        if not (folder / name).is_file():
            raise DataError(f"{folder}: the file {name!r} is missing")
    return [folder / str(name) for name in names]


def _listed(path: Path, key: str, kind: type) -> list[Any]:
    with path.open("rb") as file:
        state = parse_line(file.read(MAX_LINE_BYTES + 2), str(path))
    values = state.get(key) if isinstance(state, dict) else None
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise DataError(f"{path}: no list {key!r}", hint="save the data set again with `datasets`")
    if state.get("_indices_data_files"):
        raise DataError(f"{path}: rows of an index, as old versions wrote", hint="save the data set again")
    return values


def _check_promises(metadata: Any, path: Path, allowance: Allowance) -> int:
    """Check what a parquet file says it holds; return how many rows to read at a time."""
    allowance.check(metadata.num_rows * ROW_COST)
    held = values = 0
    rows = _BATCH
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        for column in map(group.column, range(group.num_columns)):
            size = column.total_uncompressed_size
            held, values = held + size, values + column.num_values
            if size > (group.num_rows + 1) * MAX_LINE_BYTES:
                raise DataError(
                    f"{path}: {group.num_rows} rows with {size:,} bytes of {column.path_in_schema!r}",
                    hint="one row may hold at most 1 MB",
                )
            if "DELTA_BYTE_ARRAY" in column.encodings:  # each value may repeat the one before, at no cost
                rows = min(rows, max(1, _BATCH_BYTES // max(1, size)))
    allowance.check(max(held, values * _VALUE_COST))
    return rows


def _refuse_packed(arrow: Any, source: Any, path: Path) -> None:
    """Refuse packed record batches, which Arrow unpacks whole; ``datasets`` writes none."""
    for message in arrow.ipc.MessageReader.open_stream(source):
        if message.type == "record batch" and _is_packed(message.metadata):
            raise DataError(f"{path}: packed record batches are not read", hint="save the data set again")


def _is_packed(metadata: Any) -> bool:
    """Return whether a record batch has the field ``compression`` (Arrow's Message.fbs, a flatbuffer)."""
    raw = memoryview(metadata)

    def field(table: int, number: int) -> int:
        offsets = table - struct.unpack_from("<i", raw, table)[0]
        if 4 + 2 * number >= struct.unpack_from("<H", raw, offsets)[0]:
            return 0
        return int(struct.unpack_from("<H", raw, offsets + 4 + 2 * number)[0])

    message = struct.unpack_from("<I", raw, 0)[0]
    at = message + field(message, 2)  # header
    return field(at + struct.unpack_from("<I", raw, at)[0], 3) != 0


def _inner(arrow: Any, kind: Any) -> list[Any]:
    """Return the fields of a nested type."""
    if arrow.types.is_struct(kind):
        return [kind.field(i) for i in range(kind.num_fields)]
    if arrow.types.is_map(kind):
        return [kind.key_field, kind.item_field]
    types = arrow.types
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return [kind.value_field]
    return []


def _check_names(arrow: Any, schema: Any, path: Path) -> None:
    pending: list[tuple[list[Any], int]] = [(list(schema), 1)]
    while pending:
        fields, depth = pending.pop()
        names = [field.name for field in fields]
        twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
        if twice is not None:
            raise DataError(f"{path}: two columns are called {twice!r}", hint="rename one of them")
        if depth > MAX_DEPTH:
            raise DataError(f"{path}: nested deeper than {MAX_DEPTH} levels")
        pending.extend((_inner(arrow, field.type), depth + 1) for field in fields)


def _rows(arrow: Any, batches: Iterable[Any], path: Path, allowance: Allowance) -> Iterator[Row]:
    number = 0
    for whole in batches:
        allowance.spend(whole.num_rows * ROW_COST)
        whole.validate(full=True)
        for at in range(0, whole.num_rows, _BATCH):
            batch = _known(arrow, whole.slice(at, _BATCH), path)
            size = sum(_size(arrow, column) for column in batch.columns)
            together = size <= MAX_LINE_BYTES
            allowance.spend(size if together else 0)
            for i in range(1 if together else batch.num_rows):
                part = batch if together else batch.slice(i, 1)
                if not together:
                    _check_row(arrow, part, f"{path}, row {number + 1}", allowance)
                for value in part.to_pylist():
                    number += 1
                    yield Row(f"{path}, row {number}", value)


def _check_row(arrow: Any, row: Any, where: str, allowance: Allowance) -> None:
    size = sum(_size(arrow, column) for column in row.columns)
    if size > MAX_LINE_BYTES:
        raise DataError(f"{where}: longer than {MAX_LINE_BYTES:,} bytes", hint="one row may hold at most 1 MB")
    allowance.spend(size)


def _known(arrow: Any, batch: Any, path: Path) -> Any:
    """Return the columns that JSON has values for; refuse any other that is not empty."""
    names, columns = [], []
    for field, column in zip(batch.schema, batch.columns, strict=True):
        if isinstance(field.type, arrow.BaseExtensionType):
            column = column.storage
        if not _plain(arrow, column.type):
            if column.null_count == len(column):
                continue
            raise DataError(
                f"{path}: the column {field.name!r} holds {field.type}, which is no JSON value",
                hint="leave the column out, or write it as text",
            )
        names.append(field.name)
        columns.append(column)
    # Of no columns at all, Arrow would make a batch of no rows.
    return arrow.RecordBatch.from_arrays(columns, names=names) if columns else batch.select([])


def _plain(arrow: Any, kind: Any) -> bool:
    """Return whether values of an Arrow type are JSON values, and their size can be told."""
    types = arrow.types
    if types.is_dictionary(kind):
        return _text(types, kind.value_type) or types.is_integer(kind.value_type)
    if inner := _inner(arrow, kind):
        return all(_plain(arrow, field.type) for field in inner)
    number = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_null(kind)
    return bool(number or types.is_struct(kind) or _text(types, kind))


def _text(types: Any, kind: Any) -> bool:
    return bool(types.is_string(kind) or types.is_large_string(kind))


def _size(arrow: Any, column: Any) -> int:
    """Return about how many bytes a column takes as Python values, more rather than less, without making them."""
    from pyarrow import compute

    types, kind, count = arrow.types, column.type, _VALUE_COST * len(column)
    if types.is_dictionary(kind) and _text(types, kind.value_type):
        return count + _sum(compute, compute.take(compute.binary_length(column.dictionary), column.indices))
    if _text(types, kind):
        return count + _sum(compute, compute.binary_length(column))
    if types.is_map(kind):
        column = column.cast(arrow.list_(arrow.struct([kind.key_field, kind.item_field])))
        return count + _size(arrow, column)
    if types.is_struct(kind):
        return count + sum(_size(arrow, part) for part in column.flatten())
    return count + _size(arrow, column.flatten()) if _inner(arrow, kind) else count


def _sum(compute: Any, lengths: Any) -> int:
    return int(compute.sum(lengths).as_py() or 0)
