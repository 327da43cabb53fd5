"""Rows of parquet files and of folders that ``datasets`` saved; the only file that imports ``pyarrow``.

A table may hold far more than its file is large: one value said once and repeated, counts instead of rows, packed
pages; and a damaged one may end the process that reads it. So it is read in a process of its own, whose memory is
limited by the size of the file, and which writes the rows as JSONL. Here they are read under the same limits as any.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from casehard.data.formats import MAX_LINE_BYTES, parse_line, shown
from casehard.data.rowfiles import ROW_COST, Allowance, Row
from casehard.errors import DataError, MissingExtra

STATE, SPLITS = "state.json", "dataset_dict.json"
"""Files that tell a saved data set, and a folder of several, from any other folder."""
_MEMORY = 2**30
"""What reading any table may take, in bytes, besides twice the size of the file."""
_BATCH = 64  # rows


def parquet(path: Path) -> Iterator[Row]:
    """Yield the rows of a parquet file.

    Raises:
        DataError: not a parquet file, larger than its size allows, or a value that JSON does not have.
        MissingExtra: ``pyarrow`` is not installed.
    """
    return _rows(path, [path], "parquet")


def saved(folder: Path) -> Iterator[Row]:
    """Yield the rows of a folder that ``datasets`` wrote with ``save_to_disk``.

    Raises:
        DataError: not such a folder, several splits, damaged, or a value that JSON does not have.
        MissingExtra: ``pyarrow`` is not installed.
    """
    return _rows(folder, _parts(folder), "saved data sets")


def _parts(folder: Path) -> list[Path]:
    """Return the Arrow files of a saved data set, in order."""
    if (folder / SPLITS).is_file():
        splits = _listed(folder / SPLITS, "splits", str)
        raise DataError(f"{folder}: holds several splits", hint=f"name one: {folder}/{(splits or ['train'])[0]}")
    names = [entry.get("filename") for entry in _listed(folder / STATE, "_data_files", dict)]
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise DataError(f"{folder / STATE}: {shown(name)} is no name of a file in this folder")
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


def _rows(whole: Path, files: list[Path], purpose: str) -> Iterator[Row]:
    if importlib.util.find_spec("pyarrow") is None:
        raise MissingExtra("pyarrow", "data", purpose=f"reading {purpose}")
    number = 0
    for path in files:
        allowance = Allowance(path)
        for line in _lines(path, allowance.limit):
            number += 1
            where = f"{whole}, row {number}"
            allowance.spend(len(line) + ROW_COST)
            yield Row(where, parse_line(line.rstrip(b"\n"), where))


def _lines(path: Path, limit: int) -> Iterator[bytes]:
    """Yield what the process writes, as long as it is rows."""
    size = _MEMORY + 2 * path.stat().st_size
    # Not from the working folder, where anything may be called json.py.
    command = [sys.executable, "-P", "-m", __name__, os.fspath(path), str(limit), str(size)]
    known = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "ARROW_DEFAULT_MEMORY_POOL": "system"}
    known["MALLOC_ARENA_MAX"] = "1"  # threads that meet would reserve more of the space that is limited: by chance
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=known, **streams) as child:  # type: ignore[call-overload]
        try:
            while (line := child.stdout.readline(MAX_LINE_BYTES + 2)).startswith(b"{"):
                yield line
        finally:
            child.kill()
    if not line.endswith(b"]\n"):
        raise _too_much(path)
    if said := json.loads(line):
        raise DataError(said[0], hint=said[1])


def _too_much(path: Path) -> DataError:
    return DataError(
        f"{path}: damaged, or takes more memory to read than a file of its size may",
        hint="write it again in smaller pieces; one row may hold at most 1 MB",
    )


def unpack(path: Path, limit: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the rows of a parquet file, or of an Arrow file, in a process that may end over it.

    Args:
        limit: bytes that the file may unpack to; 0 = what its size allows.

    Raises:
        DataError: see :func:`parquet`.
    """
    import pyarrow

    kind = "parquet" if path.suffix.lower() == ".parquet" else "an Arrow file"
    try:
        for batch in (_batches if kind == "parquet" else _stream)(path, Allowance(path, limit)):
            batch.validate(full=True)
            for at in range(0, batch.num_rows, _BATCH):
                yield from _known(batch.slice(at, _BATCH), path).to_pylist()
    except MemoryError:
        raise _too_much(path) from None
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"{path}: not readable as {kind}: {str(error)[:200]}") from None


def _batches(path: Path, allowance: Allowance) -> Iterator[Any]:
    from pyarrow import parquet as files

    with files.ParquetFile(path, buffer_size=2**20) as table:
        _check_names(table.schema_arrow, path)
        promised = table.metadata
        allowance.check(promised.num_rows * ROW_COST)
        allowance.check(sum(promised.row_group(i).total_byte_size for i in range(promised.num_row_groups)))
        yield from table.iter_batches(batch_size=_BATCH, use_threads=False)


def _stream(path: Path, allowance: Allowance) -> Iterator[Any]:
    import pyarrow

    with pyarrow.memory_map(os.fspath(path)) as source, pyarrow.ipc.open_stream(source) as stream:
        _check_names(stream.schema, path)
        for batch in stream:
            allowance.spend(batch.num_rows * ROW_COST)
            yield batch


def _check_names(schema: Any, path: Path) -> None:
    twice = next((name for name in schema.names if schema.names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}: two columns are called {shown(twice)}", hint="rename one of them")


def _known(batch: Any, path: Path) -> Any:
    """Return the columns that JSON has values for; refuse any other that is not empty."""
    import pyarrow

    columns = {}
    for field, column in zip(batch.schema, batch.columns, strict=True):
        column = column.storage if isinstance(field.type, pyarrow.BaseExtensionType) else column
        if _plain(column.type):
            columns[field.name] = column
        elif column.null_count < len(column):
            raise DataError(
                f"{path}: the column {shown(field.name)} holds {str(field.type)[:80]}, which is no JSON value",
                hint="leave the column out, or write it as text",
            )
    return pyarrow.RecordBatch.from_pydict(columns) if columns else batch.select([])


def _plain(kind: Any) -> bool:
    """Return whether values of an Arrow type are JSON values."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return _plain(kind.value_type)
    if types.is_map(kind):
        return _plain(kind.key_type) and _plain(kind.item_type)
    if types.is_struct(kind):
        return all(_plain(kind.field(i).type) for i in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _plain(kind.value_type)
    number = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_null(kind)
    return number or types.is_string(kind) or types.is_large_string(kind) or str(kind) == "string_view"


def _limit(size: int) -> None:
    """Let this process have so many bytes more than it has, where the system can hold it to that."""
    try:
        import resource

        with Path("/proc/self/statm").open(encoding="ascii") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    size = now + size if most == resource.RLIM_INFINITY else min(now + size, most)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def _write(path: Path, limit: int, memory: int) -> None:
    """Write the rows of a table as JSONL, and in the end a list: what was wrong and what to do, or nothing."""
    end: list[str] = []
    try:
        import pyarrow.compute
        import pyarrow.parquet  # noqa: F401  all that is needed, before the memory is limited

        _limit(memory)
        for row in unpack(path, limit):
            sys.stdout.write(json.dumps(row) + "\n")
    except ImportError as error:
        end = [f"{path}: pyarrow cannot be loaded: {error}", "pip install --force-reinstall pyarrow"]
    except DataError as error:
        end = [error.message, error.hint]
    sys.stdout.write(json.dumps(end) + "\n")


if __name__ == "__main__":
    _write(Path(sys.argv[1]), *map(int, sys.argv[2:]))
