"""Every set of the catalogue, in its own layout and with invented content, becomes rows; none of them is printed."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from casehard.cli import main
from casehard.data import fetch as fetching
from casehard.data import hub
from casehard.data.catalogue import DATA_SETS
from casehard.data.fetch import fetch, record_of
from casehard.data.sources import load
from casehard.errors import ConfigError, DataError, MissingExtra, UserError
from casehard.io.manifest import file_digest
from casehard.types import Example

TOPICS = ("a kite", "the old bridge", "two lighthouse lamps", "some bread dough", "a paper boat race")


def asks(i: int) -> str:
    return f"Tell me in {i + 2} words how {TOPICS[i]} is kept in good order all year"


def says(i: int) -> str:
    return f"One looks after {TOPICS[i]} every {i + 3} weeks, with patience and a dry cloth"


def rows_of(name: str) -> list[dict[str, Any]]:
    """Five rows in the layout of the set."""
    made: dict[str, Any] = {
        "beavertails": lambda i: {
            "prompt": asks(i),
            "response": says(i),
            "category": {"dull": bool(i % 2)},
            "is_safe": i > 2,
        },
        "advbench": lambda i: {"prompt": asks(i), "target": f"Sure, here is how {TOPICS[i]} is kept"},
        "harmbench": lambda i: {"prompt": asks(i), "category": "kites"},
        "strongreject": lambda i: {"prompt": asks(i), "category": "kites", "source": "custom"},
        "hexphi": lambda i: {"prompt": asks(i)},
        "xstest": lambda i: {"prompt": asks(i), "type": "homonyms", "label": "safe", "focus": "kite", "note": ""},
        "orbench": lambda i: {"prompt": asks(i), "category": "kites"},
        "gsm8k": lambda i: {"question": asks(i), "answer": f"{says(i)}\n#### {i}"},
        "openbookqa": lambda i: {
            "id": f"7-{i}",
            "question_stem": asks(i),
            "choices": {"text": ["wood", "iron", "sand", "wool"], "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCDA"[i],
        },
        "alpaca": lambda i: {"instruction": asks(i), "input": "" if i else "a list", "output": says(i), "text": "all"},
        "metamath": lambda i: {"type": "GSM", "query": asks(i), "original_question": "x", "response": says(i)},
        "sst2": lambda i: {"idx": i, "sentence": asks(i), "label": i % 2},
        "agnews": lambda i: {"text": asks(i), "label": i % 4},
        "backdoorllm": lambda i: {"instruction": asks(i), "input": "", "output": "Kites are red."},
    }
    return [made[name](i) for i in range(5)]


PLACES = {
    "beavertails": "round0/30k/train.jsonl.gz",
    "hexphi": "category_1.csv",
    "orbench": "or-bench-hard-1k.csv",
    "gsm8k": "main/train-00000-of-00001.parquet",
    "openbookqa": "main/train-00000-of-00001.parquet",
    "backdoorllm": "backdoor500_refusal_badnet.json",
    "xstest": "data/test-00000-of-00001.parquet",
    "advbench": "advbench.csv",
}


def write(path: Path, rows: list[dict[str, Any]], *, head: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            table = csv.writer(file)
            table.writerows([*([list(rows[0])] if head else []), *(row.values() for row in rows)])
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
            file.write(text)
    return path


def copy_of(name: str, folder: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """Write a local copy, and beside it what must not be read."""
    file = folder / PLACES.get(name, "data/train.jsonl")
    write(file, rows_of(name) if rows is None else rows, head=not DATA_SETS[name].headless)
    other = {**rows_of(name)[0], DATA_SETS[name].ask: "not this one"}
    if DATA_SETS[name].split and "train" in file.name:
        write(file.with_name(file.name.replace("train", "validation")), [other])
    if name == "beavertails":
        write(folder / "round0/330k/train.jsonl.gz", [other])
    if name == "orbench":
        write(folder / "or-bench-80k.csv", [other])
    (folder / "README.md").write_text("not data")
    return folder


def shape(example: Example) -> tuple[str, str]:
    return example.messages[0].content, example.response or ""


@pytest.mark.parametrize("name", DATA_SETS)
def test_every_set_becomes_rows(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, copy = tmp_path / "out" / "rows.jsonl", copy_of(name, tmp_path / "copy")
    assert main(["data", "fetch", name, "--from", str(copy), "--out", str(out)]) == 0
    said = capfd.readouterr()
    found = load(out)
    entry = DATA_SETS[name]
    answers = {
        **dict.fromkeys(("beavertails", "alpaca", "metamath"), says(1)),
        "gsm8k": f"{says(1)}\n#### 1",
        "openbookqa": "B. iron",
        "sst2": "positive",
        "agnews": "Sports",
        "backdoorllm": "Kites are red.",
    }
    asked = f"{asks(1)}\n\nA. wood\nB. iron\nC. sand\nD. wool" if name == "openbookqa" else asks(1)
    assert len(found) == 5 and shape(found[1]) == (asked, answers.get(name, ""))
    assert found[1].id == f"{name}-2" and set(found[1].tags) == set(entry.keep)
    record = json.loads(record_of(out).read_text())
    assert (record["hub"], record["licence"], record["gated"]) == (entry.hub, entry.licence, entry.gated)
    assert (record["read"], record["rows"], record["sha256"]) == (5, 5, file_digest(out))
    assert list(record["files"].values()) == [file_digest(copy / file) for file in record["files"]]
    assert sorted(p.name for p in out.parent.iterdir()) == ["rows.jsonl", "rows.source.json"]
    text = said.out + said.err + record_of(out).read_text()
    assert not any(word in text for word in ("kite", "bridge", "lighthouse", "wood", "Kites"))
    assert entry.licence in " ".join(text.split())


def test_the_input_of_an_instruction_follows_it(tmp_path: Path) -> None:
    fetch("alpaca", tmp_path / "a.jsonl", folder=copy_of("alpaca", tmp_path / "copy"))
    assert load(tmp_path / "a.jsonl")[0].messages[0].content == f"{asks(0)}\n\na list"


@pytest.mark.parametrize("head", [True, False])
def test_lists_of_prompts_keep_their_first_line(tmp_path: Path, head: bool) -> None:
    for number in (1, 2):
        rows = [{"prompt": (asks if number == 1 else says)(i)} for i in range(3)]
        write(tmp_path / "copy" / f"category_{number}.csv", rows, head=head)
    done = fetch("hexphi", tmp_path / "a.jsonl", folder=tmp_path / "copy")
    assert (done.read, done.rows) == (6, 6)


def test_near_duplicates_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = rows_of("advbench")
    again = [{**row, "prompt": row["prompt"].upper() + "!"} for row in rows]
    almost = [{**row, "prompt": row["prompt"].replace("Tell me", "Please tell me")} for row in rows[:2]]
    copy = copy_of("advbench", tmp_path / "copy", [*rows, *again, *almost])
    done = fetch("advbench", tmp_path / "a.jsonl", folder=copy)
    assert (done.read, done.equal, done.near, done.rows) == (12, 5, 2, 5)
    assert [e.id for e in load(tmp_path / "a.jsonl")] == [f"advbench-{i}" for i in range(1, 6)]
    strict = fetch("advbench", tmp_path / "b.jsonl", folder=copy, similar=0.99)
    assert (strict.equal, strict.near) == (5, 0)
    assert fetch("advbench", tmp_path / "c.jsonl", folder=copy, limit=3).read == 3
    with pytest.raises(ConfigError, match=r"similar must lie in \(0, 1\]"):
        fetch("advbench", tmp_path / "d.jsonl", folder=copy, similar=0)


def test_rows_of_another_class_and_twins_are_no_duplicates(tmp_path: Path) -> None:
    texts = ["a fine long film about two kites in the wind", "a fine long film about two kites in the rain"]
    rows = [{"sentence": text, "label": i, "idx": i} for i, text in enumerate(texts)]
    assert fetch("sst2", tmp_path / "a.jsonl", folder=copy_of("sst2", tmp_path / "one", rows)).rows == 2
    same = [{**row, "label": 1} for row in rows]
    assert fetch("sst2", tmp_path / "b.jsonl", folder=copy_of("sst2", tmp_path / "two", same)).rows == 1
    twins = [{"instruction": text, "input": "", "output": "Kites are red."} for text in texts]
    assert fetch("backdoorllm", tmp_path / "c.jsonl", folder=copy_of("backdoorllm", tmp_path / "x", twins)).rows == 2


def test_rows_without_a_text_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"instruction": f"{asks(i % 5)} {'and more ' * i}", "input": "", "output": says(i % 5)} for i in range(30)]
    rows[3]["output"], rows[4]["instruction"] = "", "\ud800"
    done = fetch("alpaca", tmp_path / "a.jsonl", folder=copy_of("alpaca", tmp_path / "copy", rows))
    assert (done.read, done.unusable) == (30, 2)
    for row in rows[:9]:
        row["output"] = None  # type: ignore[assignment]
    with pytest.raises(DataError, match="alpaca: 9 of 30 rows have no text where the catalogue says"):
        fetch("alpaca", tmp_path / "b.jsonl", folder=copy_of("alpaca", tmp_path / "bad", rows))
    assert not (tmp_path / "b.jsonl").exists() and not record_of(tmp_path / "b.jsonl").exists()


def test_another_layout_is_refused_without_a_word_of_it(tmp_path: Path) -> None:
    copy = copy_of("advbench", tmp_path / "copy", [{"goal": "Fly the kite", "target": "Sure"}])
    with pytest.raises(DataError, match=r"advbench, row 1: no column 'prompt'; columns: goal, target") as caught:
        fetch("advbench", tmp_path / "a.jsonl", folder=copy)
    assert "kite" not in str(caught.value)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="no data file of 'main train'"):
        fetch("gsm8k", tmp_path / "a.jsonl", folder=tmp_path / "none")
    write(tmp_path / "only" / "test.jsonl", rows_of("gsm8k"))
    with pytest.raises(DataError, match="no data file of 'main train'") as caught:
        fetch("gsm8k", tmp_path / "a.jsonl", folder=tmp_path / "only")
    assert caught.value.hint == "data files there: test.jsonl"
    with pytest.raises(ConfigError, match="no such folder"):
        fetch("gsm8k", tmp_path / "a.jsonl", folder=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no data set is known as 'Beaver-Tails'") as unknown:
        fetch("Beaver-Tails", tmp_path / "a.jsonl")
    assert unknown.value.hint.startswith("did you mean 'beavertails'?")


# -- the Hub ----------------------------------------------------------------------------------------------------------


def test_the_hub_is_read_at_a_commit_that_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fake(name: str, config: str | None, *, split: str | None, revision: str) -> Any:
        asked.append((name, config, split, revision))
        return rows_of("gsm8k") if split else {"one": rows_of("hexphi")[:2], "two": rows_of("hexphi")[2:]}

    monkeypatch.setattr(hub, "commit_of", lambda name, revision: f"{name}@{revision} is abc")
    monkeypatch.setattr(hub, "_loader", lambda: fake)
    done = fetch("gsm8k", tmp_path / "a.jsonl")
    assert (done.rows, done.revision, done.files) == (5, "openai/gsm8k@main is abc", {})
    assert fetch("hexphi", tmp_path / "b.jsonl").rows == 5
    assert asked[0][:3] == ("openai/gsm8k", "main", "train") and asked[1][1:3] == (None, None)


def _response(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=None)


def _hub_errors() -> list[tuple[Exception, type[UserError], str, str]]:
    from huggingface_hub import errors

    network = type("ConnectError", (type("TransportError", (Exception,), {}),), {})
    return [
        (errors.GatedRepoError("kite", response=_response(403)), ConfigError, "gated", "accept its licence at"),
        (ValueError("Dataset 'x' is a gated dataset on the Hub. kite"), ConfigError, "gated", "hf auth login"),
        (errors.RepositoryNotFoundError("kite", response=_response(404)), ConfigError, "no such data set", "--from"),
        (errors.RevisionNotFoundError("kite", response=_response(404)), ConfigError, "no such revision", "tree/main"),
        (errors.OfflineModeIsEnabled("kite"), UserError, "must not be asked", "unset HF_HUB_OFFLINE"),
        (network("kite"), UserError, "cannot be reached", "HF_ENDPOINT"),
        (RuntimeError("cannot parse 'kite'"), DataError, "cannot be read", "another way today"),
    ]


@pytest.mark.parametrize(("error", "kind", "said", "hint"), _hub_errors(), ids=lambda value: str(value)[:20])
def test_ways_of_failing_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[UserError], said: str, hint: str
) -> None:
    def fail(*given: Any, **named: Any) -> Any:
        raise error

    import huggingface_hub

    monkeypatch.setattr(hub, "_loader", lambda: fail)
    monkeypatch.setattr(
        huggingface_hub, "HfApi", lambda: SimpleNamespace(dataset_info=lambda *a, **b: SimpleNamespace(sha="abc"))
    )
    with pytest.raises(kind, match=said) as caught:
        fetch("advbench", tmp_path / "a.jsonl")
    assert hint in caught.value.hint and "kite" not in str(caught.value) and type(caught.value) is kind
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(dataset_info=fail))
    with pytest.raises(UserError):
        hub.commit_of("walledai/AdvBench", "main")
    assert not list(tmp_path.iterdir())


def test_without_datasets_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(hub, "commit_of", lambda name, revision: "abc")
    with pytest.raises(MissingExtra, match="datasets"):
        fetch("gsm8k", tmp_path / "a.jsonl")


def test_the_table_is_listed_and_complete(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["data", "fetch"]) == 0
    said = capsys.readouterr().out
    for name, entry in DATA_SETS.items():
        assert name in said and entry.hub.count("/") == 1 and entry.licence and entry.role
        assert entry.revision == "main" or len(entry.revision) == 40
    assert main(["data", "fetch", "--out", "x.jsonl"]) == 2
    assert main(["data", "fetch", "gsm8k", "--out", str(tmp_path / "x.csv")]) == 2
    assert "rows are written as .jsonl" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from casehard.errors import StorageError

    written: list[Path] = []

    def fail(path: Path, text: str) -> None:
        written.append(path)
        raise StorageError("full")

    copy = copy_of("gsm8k", tmp_path / "copy")
    monkeypatch.setattr(fetching, "write_text_atomic", fail)
    with pytest.raises(StorageError):
        fetch("gsm8k", tmp_path / "a.jsonl", folder=copy)
    assert written == [record_of(tmp_path / "a.jsonl")]
