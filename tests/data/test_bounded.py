"""A small file that unpacks to a huge one is refused before it takes the memory of the machine."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import warnings
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from casehard.data import rowfiles, sources, tables
from casehard.errors import DataError

MB = 1_000_000
CHILD = """
import json, resource, sys
from casehard.data import rowfiles, sources, tables
from casehard.errors import DataError
rowfiles.SMALL, tables._MEMORY = 16 * 2**20, 100 * 2**20
if sys.argv.pop(1) == "text":
    now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 150 * 2**20,) * 2)
told = {}
for name in sys.argv[1:]:
    try:
        told[name] = f"{len(sources.load(name))} rows"
    except DataError as error:
        told[name] = error.message
print(json.dumps([told, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))
"""


def load_in_little_memory(kind: str, files: list[Path]) -> dict[str, str]:
    """Return what became of each file: of a text file in a process that may take 150 MiB more than its imports did.

    A table may take 100 MiB more in a process of its own.
    """
    done = subprocess.run(
        [sys.executable, "-c", CHILD, kind, *map(str, files)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told, peak = json.loads(done.stdout)
    assert peak < 500 * 1024, "KiB that reading a table took at most, imports included"
    return {Path(name).name: text.rpartition("/")[2] for name, text in told.items()}


def packed(path: Path, pieces: list[bytes], times: int = 1) -> None:
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(times):
            for piece in pieces:
                file.write(piece)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to limit a process")
def test_packed_and_deep_files_stay_within_little_memory(tmp_path: Path) -> None:
    line = b'{"prompt": "a"}\n'
    packed(tmp_path / "line.jsonl.gz", [b'{"prompt": "' + b"a" * MB], 30)
    packed(tmp_path / "rows.jsonl.gz", [line * 65536], 2)
    packed(tmp_path / "blank.jsonl.gz", [b"\n" * MB], 1)
    packed(tmp_path / "cell.csv.gz", [b'prompt,response\n"', b"a" * MB], 1)
    packed(tmp_path / "rows.csv.gz", [b"prompt\n" + b"a\n" * MB], 1)
    packed(tmp_path / "blank.json.gz", [b" " * MB], 40)
    packed(tmp_path / "row.json.gz", [b"[[" + b"[]," * MB], 10)
    (tmp_path / "row.json").write_bytes(b"[[" + b"[]," * 10 * MB)
    (tmp_path / "text.json").write_bytes(b'[{"prompt": "' + b"a" * 100 * MB)
    found = load_in_little_memory("text", sorted(tmp_path.iterdir()))
    assert found == {
        "line.jsonl.gz": "line.jsonl.gz:1: longer than 1,000,000 bytes",
        "rows.jsonl.gz": "rows.jsonl.gz: unpacks to more than 16 MB",
        "blank.jsonl.gz": "blank.jsonl.gz: unpacks to more than 16 MB",
        "cell.csv.gz": "cell.csv.gz:2: a row longer than 1,000,000 bytes",
        "rows.csv.gz": "rows.csv.gz: unpacks to more than 16 MB",
        "blank.json.gz": "blank.json.gz: unpacks to more than 16 MB",
        "row.json.gz": "row.json.gz:1: longer than 1,000,000 bytes",
        "row.json": "row.json:1: longer than 1,000,000 bytes",
        "text.json": "text.json:1: longer than 1,000,000 bytes",
    }


def state(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder


def arrow_folder(folder: Path, batches: list[Any], **options: Any) -> Path:
    import pyarrow as pa

    state(folder, "data.arrow")
    with pa.OSFile(str(folder / "data.arrow"), "wb") as sink:
        writer = pa.ipc.new_stream(sink, batches[0].schema, options=pa.ipc.IpcWriteOptions(**options))
        for batch in batches:
            writer.write_batch(batch)
        writer.close()
    return folder


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to limit a process")
def test_tables_that_promise_too_much_stay_within_little_memory(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def write(name: str, columns: dict[str, Any], **options: Any) -> None:
        parquet.write_table(pa.table(columns), tmp_path / f"{name}.parquet", compression="zstd", **options)

    def repeated(text: str, times: int) -> Any:
        return pa.DictionaryArray.from_arrays(pa.nulls(times, pa.int32()).fill_null(0), pa.array([text]))

    def nothing(times: int) -> Any:
        return pa.Array.from_buffers(pa.null(), times, [None])

    write("nulls", {"prompt": nothing(5_000_000)})
    write("cell", {"prompt": ["a" * 5 * MB, *"bcd" * 50], "response": ["b"] * 151})
    write("inner", {"messages": [[{"role": "user", "content": "a" * 2 * MB}] * 100]})
    write("tag", {"prompt": repeated("b", 3), "t": [[1] * 10, [2] * 10, [0] * 900_000]})
    prefix = {"use_dictionary": False, "column_encoding": {"prompt": "DELTA_BYTE_ARRAY"}}
    write("prefix", {"prompt": ["a" * 8 * MB] * 20}, **prefix)

    def folder(name: str, columns: dict[str, Any], **options: Any) -> Path:
        return arrow_folder(tmp_path / name, [pa.record_batch(columns)], **options)

    many = pa.FixedSizeListArray.from_arrays(nothing(10**9), 10**9)
    folders = [
        folder("empty", {"prompt": nothing(2 * 10**9)}),
        folder("elements", {"t": many}),
        folder("bomb", {"prompt": ["a" * 150 * MB]}, compression="zstd"),
        folder("same", {"prompt": repeated("a" * 50_000, 600)}),
    ]
    much = "damaged, or takes more memory to read than a file of its size may"
    found = load_in_little_memory("tables", [*sorted(tmp_path.glob("*.parquet")), *folders])
    assert found == {
        "nulls.parquet": "nulls.parquet: unpacks to more than 16 MB",
        "cell.parquet": "cell.parquet, row 1: longer than 1,000,000 bytes",
        "inner.parquet": f"inner.parquet: {much}",
        "tag.parquet": "tag.parquet, row 3: longer than 1,000,000 bytes",
        "prefix.parquet": f"prefix.parquet: {much}",
        "empty": "data.arrow: unpacks to more than 16 MB",
        "elements": f"data.arrow: {much}",
        "bomb": f"data.arrow: {much}",
        "same": "data.arrow: unpacks to more than 16 MB",
    }


def test_values_that_json_does_not_have_are_refused_with_the_column(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    far = pa.array([None, 2**62], pa.int64()).cast(pa.timestamp("ms"))
    kinds = {"timestamp[ms]": far, "binary": pa.array([None, b"x"])}
    kinds["decimal128(5, 2)"] = pa.array([None, Decimal("1.25")], pa.decimal128(5, 2))
    kinds |= {"list<element: binary>": pa.array([None, [b"x"]])}
    for name, column in kinds.items():
        parquet.write_table(pa.table({"prompt": ["a", "b"], "when": column}), path)
        with pytest.raises(DataError) as caught:
            list(tables.unpack(path))
        assert caught.value.message == f"{path}: the column 'when' holds {name}, which is no JSON value"
        parquet.write_table(pa.table({"prompt": ["a"], "when": column.slice(0, 1)}), path)
        assert list(tables.unpack(path)) == [{"prompt": "a"}]
    with pytest.raises(DataError, match="the column 'when' holds"):
        parquet.write_table(pa.table({"prompt": ["a", "b"], "when": column}), path)
        sources.load(path)
    parquet.write_table(pa.table({"prompt": ["a"], "when": [float("nan")]}), path)
    with pytest.raises(DataError, match="row 1: not valid JSON: NaN is not a JSON number"):
        sources.load(path)


def test_columns_of_one_name_and_deep_tables_are_refused(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["prompt", "prompt"]), path)
    with pytest.raises(DataError, match="two columns are called 'prompt'"):
        list(tables.unpack(path))
    inner = pa.StructArray.from_arrays([pa.array(["a"]), pa.array(["b"])], ["k", "k"])
    folder = arrow_folder(tmp_path / "inner", [pa.record_batch({"prompt": ["a"], "t": inner})])
    with pytest.raises(DataError, match="duplicate field names"):
        list(tables.unpack(folder / "data.arrow"))
    deep = pa.array([1])
    for _ in range(40):
        deep = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), deep)
    with pytest.raises(DataError, match="nested deeper than 32 levels"):
        sources.load(arrow_folder(tmp_path / "deep", [pa.record_batch({"prompt": ["a"], "t": deep})]))


def test_honest_tables_of_every_type_and_size_are_read(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    count = 700
    texts = [f"question {i} " + "x" * (5000 * (i % 3)) for i in range(count)]
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": "same"}] for text in texts]
    pairs = pa.array([[("k", i)] for i in range(count)], pa.map_(pa.string(), pa.int64()))
    table = pa.table({"messages": turns, "map": pairs, "few": [None, *[1.5] * (count - 1)], "flag": [True] * count})
    table = table.append_column("fixed", pa.array([[1, 2]] * count, pa.list_(pa.int8(), 2)))
    table = table.append_column("wide", pa.array(texts, pa.large_string()))
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    rows = sources.load(tmp_path / "a.parquet")
    assert [row.prompt for row in rows] == texts == [row.tags["wide"] for row in rows]
    assert rows[0].tags["map"] == [["k", 0]] and "few" not in rows[0].tags and rows[1].tags["few"] == 1.5
    assert rows[-1].tags["fixed"] == [1, 2] and rows[-1].tags["flag"] is True
    parquet.write_table(pa.table({"prompt": ["x" * 999_000, "y"], "n": [1, None]}), tmp_path / "b.parquet")
    assert [len(row.prompt) for row in sources.load(tmp_path / "b.parquet")] == [999_000, 1]
    parquet.write_table(pa.table({"prompt": pa.nulls(3), "n": pa.nulls(3)}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match="parquet, row 1: neither"):
        sources.load(tmp_path / "c.parquet")


def test_damaged_packed_files_and_folders_are_refused(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"prompt": "a"}\n' * 100)
    for raw in (b"", whole[:-12], b"\x1f\x8b nonsense", b'{"prompt": "a"}\n', whole[:30] + b"\xff" * 9 + whole[39:]):
        (tmp_path / "a.jsonl.gz").write_bytes(raw)
        with pytest.raises(DataError):
            sources.load(tmp_path / "a.jsonl.gz")
    (tmp_path / "a.jsonl.gz").write_bytes(whole + whole)
    assert len(sources.load(tmp_path / "a.jsonl.gz")) == 200
    pytest.importorskip("pyarrow")
    for text in ("", "{", "[]", "{}", '{"_data_files": [1]}', '{"_data_files": [{"filename": "../a.arrow"}]}'):
        folder = state(tmp_path / "saved")
        (folder / "state.json").write_text(text)
        with pytest.raises(DataError):
            sources.load(folder)
    state(folder, "a.arrow")
    (folder / "a.arrow").write_bytes(b"\xff" * 100)
    with pytest.raises(DataError, match="not readable as an Arrow file"):
        sources.load(folder)


def test_what_a_file_may_unpack_to_grows_with_it(tmp_path: Path) -> None:
    allowance = rowfiles.Allowance(tmp_path / "a.gz", 6_400 * MB)
    allowance.spend(6_000 * MB)
    with pytest.raises(DataError, match="unpacks to more than 6,103 MB"):
        allowance.spend(1000 * MB)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed(tmp_path / "a.jsonl.gz", [json.dumps({"prompt": "p", "response": "r" * 1000}).encode() + b"\n"], 50_000)
        assert len(sources.load(tmp_path / "a.jsonl.gz")) == 50_000
