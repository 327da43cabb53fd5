"""Files of every kind give the same rows; errors carry file and line; filters keep what was asked for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from casehard.data import sources
from casehard.errors import DataError, MissingExtra
from casehard.types import Example, Message

ROWS = [
    Example.pair("p1", "r1", id="1", label="refuse", source="a", n=1),
    Example.pair("p2", "r2", id="2", label="soft", source="b", n=2),
    Example.pair("p3", "r3", id="3", label="refuse", source="c", flag=True),
]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    sources.save(tmp_path / "rows.jsonl", ROWS)
    return tmp_path / "rows.jsonl"


ODD = [
    Example.pair("p1", "r1", id="1", source="Smith, J."),
    Example.pair("p2", "r2", id="2", source="Salt & Co"),
    Example.pair("p3", "r3", id="3", source="Smith"),
    Example.pair("p4", "r4", id="4", source=r"a\b", topics=["tea", "jam"]),
    Example.pair("p5", "r5", id="5", source=r"a\,b", **{"made, by": "x"}),
]


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        (r"source=Smith\, J.", "1"),
        (r"source=Smith\, J.,Smith", "13"),
        (r"source=Salt \& Co", "2"),
        (r"source=Salt \& Co,Smith&source=Smith", "3"),
        (r"source=a\b", "4"),
        (r"source=a\\b", "4"),
        (r"source=a\\\,b", "5"),
        (r'topics=["tea"\, "jam"]', "4"),
        (r"made\, by=x", "5"),
    ],
)
def test_a_filter_can_name_any_value(tmp_path: Path, query: str, ids: str) -> None:
    sources.save(tmp_path / "odd.jsonl", ODD)
    assert "".join(e.id or "" for e in sources.load(f"{tmp_path / 'odd.jsonl'}?{query}")) == ids


def test_a_value_cut_at_its_comma_is_told_how_to_write_it(tmp_path: Path) -> None:
    sources.save(tmp_path / "odd.jsonl", ODD[:2])
    with pytest.raises(DataError) as caught:
        sources.load(f"{tmp_path / 'odd.jsonl'}?source=Smith, J.")
    assert caught.value.message.endswith("no row has source=Smith")
    # As they have to be written: what the hint shows can be pasted.
    assert caught.value.hint.startswith(r"values of 'source': Salt \& Co, Smith\, J.")


def test_save_and_load(file: Path) -> None:
    assert sources.load(file) == ROWS
    assert not [p for p in file.parent.iterdir() if p != file]


def test_json_array(tmp_path: Path, file: Path) -> None:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert sources.load(write(tmp_path / "rows.json", json.dumps(rows, indent=2))) == ROWS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"prompt": "a"},\n {"prompt": "b"},\n\n {"prompt": ""}]', "rows.json:4: 'prompt' is empty"),
        ('[{"prompt": "a"},\n {"prompt": "a", "prompt": "b"}]', "rows.json:2: not valid JSON: duplicate key"),
        ('[{"prompt": "a"}\n {"prompt": "b"}]', "expected ',' or ']'"),
        ('[{"prompt": "a"},', "not valid JSON"),
        ('[{"prompt": "a"}] x', "text after the array"),
        ('{"prompt": "a"}', "one array of rows"),
        ("[]", "no rows"),
        ("[" * 5000, "deeper than 32"),
    ],
)
def test_bad_json_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        sources.load(write(tmp_path / "rows.json", text))
    assert message in str(caught.value)


def test_jsonl_errors_name_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '{"prompt": "a"}\n\n{"prompt": 5}\n')
    with pytest.raises(DataError) as caught:
        sources.load(path)
    assert str(caught.value).startswith(f"{path}:3: ")


def test_huge_line_is_refused_without_being_read_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '{"prompt": "a"}\n{"prompt": "' + "x" * 3_000_000 + '"}\n')
    with pytest.raises(DataError, match=r":2: longer than 1,000,000 bytes"):
        sources.load(path)


def test_a_line_of_exactly_the_limit_is_read(tmp_path: Path) -> None:
    frame = len('{"prompt": ""}')
    path = write(tmp_path / "rows.jsonl", '{"prompt": "' + "x" * (1_000_000 - frame) + '"}\r\n')
    assert len(sources.load(path)[0].prompt) == 1_000_000 - frame


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n')
    assert [e.prompt for e in sources.load(path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("query", "ids"),
    [("label=refuse", "13"), ("label=refuse&source=a,b", "1"), ("source=b,c", "23"), ("n=2", "2"), ("flag=true", "3")],
)
def test_filter(file: Path, query: str, ids: str) -> None:
    assert "".join(e.id for e in sources.load(f"{file}?{query}")) == ids


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("label", "not of the form key=value"),
        ("colour=red", "tags: flag, label, n, source"),
        ("label=refused", "values of 'label': refuse, soft"),
        ("label=soft&source=a", "leaves none of 3 rows"),
    ],
)
def test_bad_filter(file: Path, query: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        sources.load(f"{file}?{query}")
    assert message in str(caught.value)


def test_required_response_counts_after_the_filter(tmp_path: Path) -> None:
    text = '{"prompt": "a", "k": "x"}\n{"prompt": "b", "response": "r", "k": "y"}\n'
    path = write(tmp_path / "rows.jsonl", text)
    assert len(sources.load(f"{path}?k=y", require_response=True)) == 1
    with pytest.raises(DataError, match=r"rows.jsonl:1: no response"):
        sources.load(path, require_response=True)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("absent.jsonl", "no such data file"),
        ("rows.xlsx", "unknown kind of data file"),
        ("rows.parquet.gz", "unknown kind of data file"),
        ("rows\0.jsonl", "NUL"),
        ("x" * 5000 + ".jsonl", "x.jsonl"),
        ("hub:oops", "not of the form hub:org/name:split"),
        ("hub:../../etc:train", "not of the form"),
    ],
)
def test_bad_specs(spec: str, message: str) -> None:
    if "x" * 100 in spec:
        message = "too long"
    with pytest.raises(DataError) as caught:
        sources.load(spec)
    assert message in str(caught.value)


def test_load_many_keeps_order(file: Path) -> None:
    assert [e.id for e in sources.load_many([f"{file}?n=2", file])] == ["2", "1", "2", "3"]


def test_save_refuses_what_could_not_be_read_back(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for rows in (
        [],
        [Example((Message("user", "p"),), tags={"id": "x"})],
        [Example.pair(" ")],
        [Example.pair("p", x=float("nan"))],
    ):
        with pytest.raises(DataError):
            sources.save(path, rows)
    assert not path.exists()


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    table = [{"prompt": "p", "response": None, "n": 1}, {"messages": turns, "n": None}]
    columns = {k: [row.get(k) for row in table] for k in ("prompt", "response", "messages", "n")}
    parquet.write_table(pyarrow.table(columns), path)
    first, second = sources.load(path)
    assert first == Example.pair("p", n=1)
    assert second.messages == (Message("user", "u"), Message("assistant", "a"))
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match="not readable as parquet"):
        sources.load(path)


def test_missing_extras_give_the_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    path = write(tmp_path / "rows.parquet", "x")
    for spec in (str(path), "hub:org/name:train"):
        with pytest.raises(MissingExtra, match=r"casehard\[data\]"):
            sources.load(spec)


def test_hub_rows_come_through_the_same_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[tuple[object, ...]] = []

    def fake(name: str, config: str | None, *, split: str) -> list[dict[str, object]]:
        asked.append((name, config, split))
        return [{"prompt": "p", "response": None}, {"prompt": ""}]

    monkeypatch.setattr(datasets, "load_dataset", fake)
    with pytest.raises(DataError, match=r"hub:org/name/small:train\[:2\], row 2: 'prompt' is empty"):
        sources.load("hub:org/name/small:train[:2]")
    assert asked == [("org/name", "small", "train[:2]")]

    def wild(value: object) -> None:
        rows = [{"prompt": "p", "response": "r", "tag": value}]
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)

    wild("x" * 1_000_001)
    with pytest.raises(DataError, match=r"hub:org/name:train, row 1: longer than 1,000,000 bytes"):
        sources.load("hub:org/name:train")
    wild(b"picture")
    with pytest.raises(DataError, match=r"row 1: a bytes is not a JSON value"):
        sources.load("hub:org/name:train")

    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"cannot be fetched \(ConnectionError: no network\)"):
        sources.load("hub:org/name:train")


DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.mark.skipif(not DATA.is_dir(), reason="real-data fixtures not present")
def test_every_real_file_loads() -> None:
    files = sorted(DATA.rglob("*.jsonl"))
    listed = {k["path"]: k for k in json.loads((DATA / "MANIFEST.json").read_text()).get("files", []) if "path" in k}
    for file in files:
        rows = sources.load(file)
        assert len(rows) == sum(1 for line in file.open("rb") if line.strip()), file
        entry = listed.get(str(file.relative_to(DATA)), {})
        assert len(rows) == entry.get("rows", len(rows))
    strict = sources.load(f"{DATA}/refusals/dev.jsonl?label=refuse", require_response=True)
    assert 0 < len(strict) < 200
    assert {e.tags["label"] for e in strict} == {"refuse"}
