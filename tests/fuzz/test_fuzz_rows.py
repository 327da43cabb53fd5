"""Row files of every kind, half right or damaged: valid examples or an error of casehard, never anything else.

A few seconds by default; CASEHARD_FUZZ_SECONDS=600 gives every target that many.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from casehard.data import layouts, sources, tables
from casehard.data.formats import ROLES, parse_row, to_row
from casehard.errors import DataError, UserError

SECONDS = float(os.environ.get("CASEHARD_FUZZ_SECONDS", "0"))
PATIENCE = 10.0
"""Seconds of computing that no small file may take."""

COLUMNS = [
    *layouts.KEYS,
    "id",
    "rejected",
    "history",
    "images",
    "kind",
    "Frage",
    "Prompt",
    " OUTPUT",
    "",
    "tools",
    "data",
]
TEXTS = st.one_of(
    st.sampled_from(["a plum", "", " ", "\x00", "\ud800", "\u202e\x1b[31m", "<|im_end|>", "a,b", 'a "b"', "a\nb\r\nc"]),
    st.sampled_from(["1", "null", "[]", "{}", "[{}]", "nan", "\ufeff", "\\", "x" * 3000]),
    st.text(max_size=6),
)
NUMBERS = st.one_of(st.integers(-9, 9), st.sampled_from([2**64, 1e308, float("nan"), float("inf"), 0.5, -(2**70)]))
PLAIN = st.one_of(TEXTS, NUMBERS, st.none(), st.booleans())
WORDS = ["user", "assistant", "system", "tool", "human", "gpt", "User", "narrator", "observation"]
CALLS = st.lists(
    st.one_of(
        st.fixed_dictionaries({"name": TEXTS, "arguments": st.one_of(TEXTS, st.just({"a": 1}), st.just('{"a": 1}'))}),
        st.fixed_dictionaries({"id": TEXTS, "function": st.fixed_dictionaries({"name": TEXTS, "arguments": PLAIN})}),
    ),
    max_size=2,
)
PARTS = st.lists(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "image_url", "text"])}, optional={"text": TEXTS, "image": PLAIN}
    ),
    max_size=2,
)
TURNS = st.one_of(
    st.fixed_dictionaries(
        {"role": st.sampled_from(WORDS), "content": st.one_of(TEXTS, TEXTS, PARTS, st.none())},
        optional={"tool_calls": CALLS, "name": PLAIN, "tool_call_id": TEXTS},
    ),
    st.fixed_dictionaries({"from": st.sampled_from(WORDS), "value": TEXTS}, optional={"weight": PLAIN}),
)
VALUES = st.one_of(
    PLAIN,
    TEXTS,
    st.lists(TURNS, max_size=4),
    st.recursive(
        PLAIN, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2), max_leaves=4
    ),
    st.sampled_from([40, 5000]).map(lambda depth: json.loads("[" * 40 + "]" * 40) if depth == 40 else "[" * depth),
)
LIKELY = st.sampled_from(
    [
        {"prompt": "p", "response": "r"},
        {"instruction": "i", "input": "", "output": "o"},
        {"question": "q", "answer": "a"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        {"Frage": "f", "Antwort": "a"},
    ]
)
CHANGES = st.dictionaries(st.sampled_from(COLUMNS), VALUES, max_size=2)
ROWS = st.lists(st.builds(lambda row, more: {**row, **more}, LIKELY | st.just({}), CHANGES), min_size=1, max_size=3)
SAME = st.builds(
    lambda row, changes: [{**row, **c} for c in changes], LIKELY, st.lists(CHANGES, min_size=1, max_size=3)
)
MAPS = st.dictionaries(
    st.sampled_from([*COLUMNS, "Antwort", "a=b&c\\"]), st.sampled_from([*layouts.KEYS, "promt"]), max_size=2
)
QUERIES = st.sampled_from(
    ["", "", "", "?", "?kind=a", "?map:", "?map:a", "?map:Frage=prompt", "?kind=\\", "?map:\\==id", "?&"]
)
CUTS = st.lists(
    st.tuples(
        st.integers(0, 10**6), st.sampled_from(["flip", "cut", "drop", "twice", "insert"]), st.binary(max_size=4)
    ),
    max_size=3,
)


def fuzzed(examples: int, **strategies: Any) -> Callable[[Any], Any]:
    """Run a property so many times; again and again with other draws for CASEHARD_FUZZ_SECONDS."""
    healthy = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

    def wrap(test: Any) -> Any:
        def run(tmp_path: Path) -> None:
            end, rounds = time.monotonic() + SECONDS, 0
            while not rounds or time.monotonic() < end:
                once = given(**strategies)(lambda **drawn: test(tmp_path, **drawn))
                limits = settings(max_examples=examples, deadline=None, suppress_health_check=healthy, database=None)
                seed(rounds)(limits(once))()
                rounds += 1

        return run

    return wrap


def damaged(raw: bytes, cuts: list[tuple[int, str, bytes]]) -> bytes:
    """Return the bytes with a few of them changed, removed, repeated or added."""
    for place, how, more in cuts:
        at = place % (len(raw) + 1)
        if how == "flip":
            raw = raw[:at] + bytes(b ^ (more[0] if more else 1) for b in raw[at : at + 1]) + raw[at + 1 :]
        elif how == "cut":
            raw = raw[:at]
        elif how == "drop":
            raw = raw[:at] + raw[at + 1 + len(more) * 20 :]
        elif how == "twice":
            raw = raw[:at] + raw[max(0, at - 30) :]
        else:
            raw = raw[:at] + more + raw[at:]
    return raw


def checked(spec: str | Path, columns: dict[str, str] | None = None) -> None:
    """Load a file: examples that can be written and read back equal, or an error of casehard; and soon."""
    begun = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = sources.load(spec, columns=columns)
    except UserError as error:
        assert error.message and len(error.message) < 3000
    else:
        assert found
        for example in found:
            assert parse_row(json.loads(json.dumps(to_row(example))), "again") == example
            assert all(m.role in ROLES for m in example.messages) and (
                example.messages[-1].role != "assistant" or example.response
            )
    assert time.process_time() - begun < PATIENCE


def text_of(kind: str, rows: list[dict[str, Any]], ends: str) -> bytes:
    """Return the rows as a file of some kind."""
    if kind in (".csv", ".tsv"):
        names = list(dict.fromkeys(key for row in rows for key in row))
        out = io.StringIO()
        writer = csv.writer(out, delimiter="," if kind == ".csv" else "\t", lineterminator=ends)
        cell = lambda value: value if isinstance(value, str | None) else json.dumps(value)  # noqa: E731
        writer.writerows([names, *[[cell(row.get(name)) for name in names] for row in rows]])
        text = out.getvalue()
    else:
        lines = [json.dumps(row, ensure_ascii=index % 2 == 0) for index, row in enumerate(rows)]
        text = ends.join(lines) if kind == ".jsonl" else "[" + f",{ends}".join(lines) + "]"
    return text.encode("utf-8", errors="surrogatepass")


@fuzzed(
    200,
    rows=SAME | ROWS,
    kind=st.sampled_from([".jsonl", ".json", ".csv", ".tsv"]),
    ends=st.sampled_from(["\n", "\r\n", "\n\n", "\r"]),
    mark=st.sampled_from([b"", b"", b"\xef\xbb\xbf", b"\xff\xfe"]),
    cuts=st.just([]) | CUTS,
    packed=st.sampled_from(["", "", "inside", "outside"]),
    columns=st.just({}) | MAPS,
    query=QUERIES,
)
def test_text_files(folder: Path, rows, kind, ends, mark, cuts, packed, columns, query) -> None:
    raw = mark + text_of(kind, rows, ends)
    if packed != "outside":
        raw = damaged(raw, cuts)
    if packed:
        raw = gzip.compress(raw, mtime=0)
    if packed == "outside":
        raw = damaged(raw, cuts)
    path = folder / f"a{kind}{'.gz' if packed else ''}"
    path.write_bytes(raw)
    checked(f"{path}{query}", columns)


@fuzzed(150, raw=st.binary(max_size=60), kind=st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz"]))
def test_any_bytes(folder: Path, raw, kind) -> None:
    path = folder / f"b{kind}"
    path.write_bytes(raw)
    checked(path)


def table_of(rows: list[dict[str, Any]]) -> Any:
    """Return an Arrow table of the rows, columns that Arrow cannot hold as text."""
    import pyarrow as pa

    columns = {}
    for name in dict.fromkeys(key for row in rows for key in row):
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowException, OverflowError, UnicodeEncodeError, TypeError):
            columns[name] = pa.array([json.dumps(value) for value in values])
    return pa.table(columns)


@fuzzed(25, rows=SAME | ROWS, wild=st.sampled_from(["", "duration", "binary", "time", "dictionary", "view"]))
def test_values_of_tables(folder: Path, rows, wild) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = table_of([{**row, "n": i} for i, row in enumerate(rows)])
    more = {
        "duration": pa.array([2**62] * len(rows), pa.duration("ns")),
        "binary": pa.array([b"\xff"] * len(rows)),
        "time": pa.array([2**62] * len(rows), pa.timestamp("us")),
        "dictionary": pa.array(["x"] * len(rows)).dictionary_encode(),
        "view": pa.array(["x"] * len(rows)).cast(pa.string_view()),
    }
    if wild:
        table = table.append_column(wild, more[wild])
    try:
        parquet.write_table(table, folder / "c.parquet")
    except (pa.ArrowException, UnicodeEncodeError):
        return
    try:
        found = list(tables.unpack(folder / "c.parquet"))
        assert len(found) == len(rows) and json.dumps(found)
    except DataError as error:
        assert error.message


@fuzzed(4, rows=SAME, cuts=CUTS.filter(len), kind=st.sampled_from(["parquet", "arrow", "state"]))
def test_damaged_tables(folder: Path, rows, cuts, kind) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = table_of([{**row, "n": i} for i, row in enumerate(rows * 20)])
    path, saved = folder / "d.parquet", folder / "saved"
    saved.mkdir(exist_ok=True)
    state = json.dumps({"_data_files": [{"filename": "d.arrow"}]}).encode()
    (saved / "state.json").write_bytes(damaged(state, cuts) if kind == "state" else state)
    parquet.write_table(table, path)
    with pa.ipc.new_stream(str(saved / "d.arrow"), table.schema) as writer:
        writer.write_table(table)
    for file in (path, saved / "d.arrow"):
        if kind != "state":
            file.write_bytes(damaged(file.read_bytes(), cuts))
    checked(path if kind == "parquet" else saved)
