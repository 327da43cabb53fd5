"""Files as people have them: read as what they are, told in one line, and refused where two readings are possible."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from casehard.data import sources
from casehard.data.mix import content_hash
from casehard.errors import ConfigError, DataError, Note
from casehard.types import Example, Message

PLUM = Example.pair("What is a plum?", "A fruit.")


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(spec: Any, **options: Any) -> tuple[list[Example], list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = sources.load(spec, **options)
    assert all(entry.category is Note for entry in caught)
    return rows, [str(entry.message) for entry in caught]


def turns(*texts: str) -> tuple[Message, ...]:
    return tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts))


SHARED = [{"from": "human", "value": "What is a plum?"}, {"from": "gpt", "value": "A fruit."}]
CHAT = [{"role": "user", "content": "What is a plum?"}, {"role": "assistant", "content": "A fruit."}]
KNOWN: dict[str, tuple[dict[str, Any], tuple[Message, ...], str]] = {
    "alpaca": (
        {"instruction": "Name it.", "input": "A purple fruit", "output": "A plum."},
        turns("Name it.\n\nA purple fruit", "A plum."),
        "Alpaca: instruction + input -> prompt, output -> response",
    ),
    "alpaca without input": (
        {"instruction": "What is a plum?", "input": "", "output": "A fruit."},
        PLUM.messages,
        "Alpaca: instruction -> prompt, output -> response",
    ),
    "alpaca, null input": (
        {"instruction": "What is a plum?", "input": None, "output": "A fruit."},
        PLUM.messages,
        "Alpaca: instruction -> prompt, output -> response",
    ),
    "alpaca, null output": (
        {"instruction": "What is a plum?", "output": None},
        PLUM.messages[:1],
        "Alpaca: instruction -> prompt, output -> response",
    ),
    "upper case": (
        {"Instruction": "Name it.", "INPUT": "A purple fruit", " Output ": "A plum."},
        turns("Name it.\n\nA purple fruit", "A plum."),
        "Alpaca: Instruction + INPUT -> prompt,  Output  -> response",
    ),
    "dolly": (
        {"instruction": "Name it.", "context": "A purple fruit", "response": "A plum."},
        turns("Name it.\n\nA purple fruit", "A plum."),
        "Dolly: instruction + context -> prompt, response -> response",
    ),
    "question": (
        {"question": "What is a plum?", "answer": "A fruit."},
        PLUM.messages,
        "question and answer: question -> prompt, answer -> response",
    ),
    "query": (
        {"query": "What is a plum?", "response": "A fruit."},
        PLUM.messages,
        "query and response: query -> prompt, response -> response",
    ),
    "system prompt": (
        {"system_prompt": "Be brief.", "question": "What is a plum?", "response": "A fruit."},
        (Message("system", "Be brief."), *PLUM.messages),
        "question and answer: question -> prompt, response -> response, system_prompt -> system message",
    ),
    "empty system prompt": (
        {"system_prompt": "", "question": "What is a plum?", "response": "A fruit."},
        PLUM.messages,
        "question and answer: question -> prompt, response -> response",
    ),
    "capital": (
        {"Prompt": "What is a plum?", "Response": "A fruit."},
        PLUM.messages,
        "prompt and response: Prompt -> prompt, Response -> response",
    ),
    "trl": (
        {"prompt": "What is a plum?", "completion": "A fruit."},
        PLUM.messages,
        "prompt and completion: prompt -> prompt, completion -> response",
    ),
    "trl chat": (
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        PLUM.messages,
        "prompt and completion: prompt -> prompt, completion -> response",
    ),
    "trl prompt": ({"prompt": CHAT[:1]}, PLUM.messages[:1], "prompt and response: prompt -> prompt"),
    "chosen": (
        {"prompt": "What is a plum?", "chosen": "A fruit.", "rejected": "A tool."},
        PLUM.messages,
        "preference pairs: prompt -> prompt, chosen -> response",
    ),
    "chosen chat": (
        {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[:1]},
        PLUM.messages,
        "preference pairs: prompt -> prompt, chosen -> response",
    ),
    "chosen whole": (
        {"prompt": "What is a plum?", "chosen": CHAT, "rejected": CHAT},
        PLUM.messages,
        "preference pairs: prompt -> prompt, chosen -> response",
    ),
    "sharegpt": ({"conversations": SHARED}, PLUM.messages, "ShareGPT: conversations -> messages"),
    "sharegpt with system": (
        {"system": "Be brief.", "conversations": SHARED},
        (Message("system", "Be brief."), *PLUM.messages),
        "ShareGPT: conversations -> messages, system -> system message",
    ),
    "sharegpt, system turn": (
        {"conversations": [{"from": "System", "value": "Be brief.", "weight": None}, *SHARED]},
        (Message("system", "Be brief."), *PLUM.messages),
        "ShareGPT: conversations -> messages",
    ),
    "sharegpt with tools": (
        {"conversations": [*SHARED, {"from": "tool", "value": "3 plums"}, {"from": "gpt", "value": "Three."}]},
        (*PLUM.messages, Message("tool", "3 plums"), Message("assistant", "Three.")),
        "ShareGPT: conversations -> messages",
    ),
    "conversation of roles": ({"conversation": CHAT}, PLUM.messages, "ShareGPT: conversation -> messages"),
}


@pytest.mark.parametrize("case", KNOWN)
def test_known_layouts_are_read_and_told_once(tmp_path: Path, case: str) -> None:
    row, expected, told = KNOWN[case]
    path = jsonl(tmp_path / "h.jsonl", {**row, "source": "x"}, {"id": 4, **row})
    rows, lines = read(path)
    assert [example.messages for example in rows] == [expected, expected]
    assert [example.id for example in rows] == ["", "4"]
    assert lines == [f"{path}: read as {told}"]
    assert rows[0].tags == {"source": "x", **{key: row[key] for key in ("rejected",) if key in row}}


def test_known_layouts_of_every_kind_of_file_give_the_same_rows(tmp_path: Path) -> None:
    wanted = [
        {"instruction": "Name it.\nNow", "input": 'A "purple", round', "output": "A plum.", "n": "1"},
        {"instruction": "What is a plum?", "input": None, "output": "A fruit.", "n": "2"},
    ]
    lines = "\r\n".join(json.dumps(row) for row in wanted) + "\r\n\r\n"
    table = io.StringIO()
    writer = csv.DictWriter(table, list(wanted[0]))
    writer.writeheader()
    writer.writerows(wanted)
    text = "\ufeff" + table.getvalue() + "\r\n"
    files = {
        "a.jsonl": "\ufeff" + lines,
        "a.json": json.dumps(wanted, indent=1),
        "a.csv": text,
        "A.CSV": text,
        "a.tsv": text.replace(",", "\t").replace("\t round", ", round"),
    }
    first, _ = read(jsonl(tmp_path / "first.jsonl", *wanted))
    assert first[0].prompt == 'Name it.\nNow\n\nA "purple", round'
    for name, content in files.items():
        plain, packed = tmp_path / name, tmp_path / f"{name}.gz"
        plain.write_bytes(content.encode())
        packed.write_bytes(gzip.compress(content.encode()))
        for path in (plain, packed):
            rows, told = read(path)
            assert [(e.messages, e.tags["n"]) for e in rows] == [(e.messages, e.tags["n"]) for e in first], path
            assert told == [f"{path}: read as Alpaca: instruction + input -> prompt, output -> response"]


def test_parquet_and_saved_folders_give_the_same_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    wanted = [{"id": i, "conversations": SHARED if i else SHARED[:1], "topic": None} for i in range(700)]
    parquet.write_table(pyarrow.Table.from_pylist(wanted), tmp_path / "a.parquet")
    expected = [Example(PLUM.messages if i else PLUM.messages[:1], str(i)) for i in range(700)]
    rows, told = read(tmp_path / "a.parquet")
    assert rows == expected and told[0].endswith("read as ShareGPT: conversations -> messages")
    datasets = pytest.importorskip("datasets")
    split = datasets.Dataset.from_list(wanted)
    split.save_to_disk(tmp_path / "saved", num_shards=3)
    assert read(tmp_path / "saved")[0] == expected
    assert [e.id for e in read(f"{tmp_path / 'saved'}?map:topic=system")[0]] == [e.id for e in expected]
    split.filter(lambda row: row["id"] % 2).save_to_disk(tmp_path / "odd")
    assert [e.id for e in read(tmp_path / "odd")[0]] == [str(i) for i in range(1, 700, 2)]
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match="both/train"):
        sources.load(tmp_path / "both")
    assert len(read(tmp_path / "both" / "test")[0]) == 700
    next((tmp_path / "saved").glob("*.arrow")).unlink()
    with pytest.raises(DataError, match="is missing"):
        sources.load(tmp_path / "saved")


AMBIGUOUS = {
    "two questions": ({"instruction": "a", "question": "b", "output": "c"}, ["'instruction'", "'question'"]),
    "two answers": ({"instruction": "a", "output": "b", "answer": "c"}, ["'output'", "'answer'"]),
    "a chat and a pair": ({"conversations": SHARED, "question": "a", "answer": "b"}, ["'conversations'", "'question'"]),
    "two chats": ({"conversations": SHARED, "conversation": SHARED}, ["'conversations'", "'conversation'"]),
    "completion and chosen": ({"prompt": "a", "completion": "b", "chosen": "c"}, ["'completion'", "'chosen'"]),
    "a question about something": (
        {"question": "a", "context": "b", "answer": "c"},
        ["'question'", "'context'", "--map question=instruction --map context=input"],
    ),
    "two contexts": ({"instruction": "a", "input": "b", "context": "c", "output": "d"}, ["'input'", "'context'"]),
    "two cases": ({"Question": "a", "QUESTION": "b", "answer": "c"}, ["'Question'", "'QUESTION'"]),
    "a leftover": ({"conversations": SHARED, "response": "a"}, ["'response'", "'conversations'"]),
    "two systems": ({"system": "a", "system_prompt": "b", "conversations": SHARED}, ["'system'", "'system_prompt'"]),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_ambiguous_layouts_are_refused_with_the_candidates(tmp_path: Path, case: str) -> None:
    row, named = AMBIGUOUS[case]
    path = jsonl(tmp_path / "h.jsonl", row)
    with pytest.raises(DataError) as caught:
        sources.load(path)
    assert str(caught.value).startswith(f"{path}:1: can be read in more than one way")
    assert all(part in str(caught.value) for part in named) and "--map" in caught.value.hint


REFUSED = {
    "no answer column": ({"question": "a"}, "--map question=prompt --map COLUMN=response"),
    "foreign names": ({"Frage": "a", "Antwort": "b"}, "keys: 'Frage', 'Antwort'"),
    "input and output": ({"input": "a", "output": "b"}, "--map input=prompt --map output=response"),
    "rows under a key": ({"data": {"prompt": "a"}}, "keys: 'data'"),
    "history": ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "'history'"),
    "images": ({"conversations": SHARED, "images": ["plum.png"]}, "'images'"),
    "number": ({"question": 5, "answer": "b"}, "'question' must be text, got int"),
    "empty answer": ({"question": "a", "answer": " "}, "'response' is empty"),
    "empty list": ({"instruction": "a", "output": []}, "'output' is an empty list"),
    "prompt ends with an answer": ({"prompt": CHAT}, "ends with an assistant turn"),
    "chosen answers something else": (
        {"prompt": "b", "chosen": CHAT},
        "'chosen' neither answers the prompt nor begins with it",
    ),
    "foreign turn": ({"conversations": [{"from": "narrator", "value": "a"}]}, "unknown role 'narrator'"),
    "turn with a weight": ({"conversations": [{**SHARED[0], "weight": 0}]}, "exactly the keys"),
    "turns as text": ({"conversations": "human: hello"}, "'conversations' must be a non-empty list"),
    "no turns": ({"conversations": [], "question": None}, "neither 'prompt' nor 'messages'"),
    "gpt first": ({"conversations": SHARED[1:]}, "'user' was due"),
    "system twice": (
        {"system": "a", "conversations": [{"from": "system", "value": "b"}, *SHARED]},
        "a system column and a system turn",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_known_layout_is_refused_with_the_row(tmp_path: Path, case: str) -> None:
    row, message = REFUSED[case]
    path = jsonl(tmp_path / "h.jsonl", row)
    with pytest.raises(DataError) as caught:
        sources.load(path)
    assert str(caught.value).startswith(f"{path}:1") and message in str(caught.value)


@pytest.mark.parametrize(
    "second",
    [
        {"question": "a", "answer": "b"},
        {"instruction": "a", "response": "b"},
        {"prompt": "a", "response": "b"},
        {"conversations": SHARED},
        {"messages": CHAT},
    ],
)
def test_mixed_layouts_are_refused_with_the_row(tmp_path: Path, second: dict[str, Any]) -> None:
    path = jsonl(
        tmp_path / "h.jsonl", {"instruction": "a", "output": "b"}, {"instruction": "a", "output": None}, second
    )
    with pytest.raises(DataError, match=r"h.jsonl:3: reads as .* the rows before as Alpaca \(instruction, output\)"):
        sources.load(path)
    jsonl(path, second, {"instruction": "a", "output": "b"})
    with pytest.raises(DataError, match=r"h.jsonl:2: reads as Alpaca"):
        sources.load(path)


MAPPED: dict[str, tuple[dict[str, Any], str, tuple[Message, ...], str]] = {
    "foreign names": (
        {"Frage": "What is a plum?", "Antwort": "A fruit."},
        "map:Frage=prompt&map:Antwort=response",
        PLUM.messages,
        "prompt and response: Frage -> prompt, Antwort -> response",
    ),
    "marks in names": (
        {"a=b&c": "What is a plum?", "d,\\": "A fruit."},
        r"map:a\=b\&c=prompt&map:d\,\\=response",
        PLUM.messages,
        "prompt and response: a=b&c -> prompt, d,\\ -> response",
    ),
    "one of two questions": (
        {"instruction": "x", "question": "What is a plum?", "output": "A fruit."},
        "map:question=prompt&map:output=response",
        PLUM.messages,
        "prompt and response: question -> prompt, output -> response",
    ),
    "said as it is": (
        {"prompt": "long text", "instruction": "Name it.", "input": "A purple fruit", "output": "A plum."},
        "map:instruction=instruction",
        turns("Name it.\n\nA purple fruit", "A plum."),
        "Alpaca: instruction + input -> prompt, output -> response, left out: prompt",
    ),
    "over a column of that name": (
        {"text": "What is a plum?", "prompt": "other", "response": "A fruit."},
        "map:text=prompt",
        PLUM.messages,
        "prompt and response: text -> prompt, response -> response, left out: prompt",
    ),
    "swapped": (
        {"prompt": "A fruit.", "response": "What is a plum?"},
        "map:prompt=response&map:response=prompt",
        PLUM.messages,
        "prompt and response: response -> prompt, prompt -> response",
    ),
    "context": (
        {"question": "Name it.", "context": "A purple fruit", "answer": "A plum."},
        "map:question=instruction&map:context=input",
        turns("Name it.\n\nA purple fruit", "A plum."),
        "Alpaca: question + context -> prompt, answer -> response",
    ),
    "turns": ({"dialog": SHARED}, "map:dialog=conversations", PLUM.messages, "ShareGPT: dialog -> messages"),
    "chat, not pair": (
        {"conversations": SHARED, "question": "a", "answer": "b"},
        "map:conversations=conversations",
        PLUM.messages,
        "ShareGPT: conversations -> messages",
    ),
    "persona": (
        {"persona": "Be brief.", "prompt": "What is a plum?", "response": "A fruit."},
        "map:persona=system",
        (Message("system", "Be brief."), *PLUM.messages),
        "prompt and response: prompt -> prompt, response -> response, persona -> system message",
    ),
    "answer": (
        {"prompt": "What is a plum?", "answer": "A fruit."},
        "map:answer=response",
        PLUM.messages,
        "prompt and response: prompt -> prompt, answer -> response",
    ),
}


@pytest.mark.parametrize("case", MAPPED)
def test_columns_can_be_named(tmp_path: Path, case: str) -> None:
    row, query, expected, told = MAPPED[case]
    path = jsonl(tmp_path / "h.jsonl", {**row, "kind": "x"}, {**row, "kind": "y"})
    rows, lines = read(f"{path}?{query}&kind=x")
    assert [(e.messages, e.tags["kind"]) for e in rows] == [(expected, "x")]
    assert lines == [f"{path}: read as {told}"]
    columns = sources._split_map(f"{path}?{query}")[1]
    assert read(path, columns=columns)[0][0] == rows[0]
    assert sources._split_map(sources.with_map(f"{path}?kind=x", columns)) == (f"{path}?kind=x", columns)
    assert sources.with_map(f"{path}?{query}", columns) == f"{path}?{query}"


def test_the_id_can_be_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "h.jsonl", {"uid": 7, "id": "old", "prompt": "a", "response": "b"})
    rows, lines = read(f"{path}?map:uid=id")
    assert rows == [Example.pair("a", "b", id="7")]
    assert lines == [f"{path}: read as rows of the two forms: uid -> id, left out: id"]


@pytest.mark.parametrize(
    ("query", "kind", "message"),
    [
        ("map:Frage=promt", ConfigError, "did you mean 'prompt'"),
        ("map:Frage=kind", ConfigError, "cannot be read as 'kind'"),
        ("map:Frage=prompt&map:Antwort=prompt", ConfigError, "'Frage' and 'Antwort' are both read as 'prompt'"),
        ("map:Frage=prompt&map:Frage=response", ConfigError, "'Frage' is mapped twice"),
        ("map:Frage", ConfigError, "not of the form map:column=key"),
        ("map:=prompt", ConfigError, "not of the form map:column=key"),
        ("map:Frage=prompt&map:Antword=response", DataError, "no row has the column 'Antword'"),
        ("", DataError, "not of the form key=value"),
    ],
)
def test_a_map_that_means_nothing_is_refused(tmp_path: Path, query: str, kind: type, message: str) -> None:
    path = jsonl(tmp_path / "h.jsonl", {"Frage": "a", "Antwort": "b"})
    with pytest.raises(kind) as caught:
        sources.load(f"{path}?{query}")
    assert message in str(caught.value)


def test_a_missing_response_names_the_column_that_may_hold_it(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "h.jsonl", {"prompt": "a", "answer": "b"})
    assert read(path) == ([Example.pair("a", answer="b")], [])
    with pytest.raises(DataError, match="--map answer=response"):
        sources.load(path, require_response=True)


TABLES = {
    "same name twice": ("prompt,response,prompt\na,b,c\n", "a.csv:1: two columns are called 'prompt'"),
    "too many cells": ("prompt,response\na,b\nc,d,e\n", "a.csv:3: 3 cells in a table of 2 columns"),
    "too few cells": ("prompt,response\n\na\n", "a.csv:3: 1 cells in a table of 2 columns"),
    "open quote": ('prompt,response\na,b\n"c,d\n', "a.csv:3: not a readable table"),
    "text after a quote": ('prompt,response\n"a"b,c\n', "a.csv:2: not a readable table"),
    "semicolons": ("prompt;response\na;b\n", "separated by commas"),
    "an open quote swallows the rest": ('prompt,response\n"a,b\n' + "c,d\n" * 300_000, "longer than 1,000,000 bytes"),
    "a huge cell": ("prompt,response\na," + "b" * 1_000_001 + "\n", "a.csv:2: a row longer than 1,000,000 bytes"),
    "no rows": ("prompt,response\n\n", "no rows"),
    "nothing": ("", "no rows"),
    "no prompt": ("prompt,response\n,b\n", "a.csv:2: neither 'prompt' nor 'messages'"),
    "old Mac": ("prompt,response\ra,b\r", "not a readable table"),
}


@pytest.mark.parametrize("case", TABLES)
def test_bad_tables_name_file_and_line(tmp_path: Path, case: str) -> None:
    text, message = TABLES[case]
    path = tmp_path / "a.csv"
    path.write_bytes(text.encode())
    limit = csv.field_size_limit()
    with pytest.raises(DataError) as caught:
        sources.load(path)
    assert message in str(caught.value)
    assert csv.field_size_limit() == limit


def test_a_cell_of_the_limit_and_a_nameless_column_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(",prompt , response\n0," + "x" * 900_000 + ",b\n1,c,\n", encoding="utf-8")
    first, second = sources.load(path)
    assert (len(first.prompt), first.response, first.tags) == (900_000, "b", {"unnamed": "0"})
    assert second == Example.pair("c", unnamed="1")


def test_tables_in_another_encoding_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("prompt,response\npr\xfcfe,b\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a.csv:2: not UTF-8 \(byte 2: 0xfc\)"):
        sources.load(path)
    path.write_text("prompt,response\na,b\n", encoding="utf-16")
    with pytest.raises(DataError, match="not UTF-8"):
        sources.load(path)


def test_rows_of_today_keep_order_ids_tags_and_hashes(tmp_path: Path) -> None:
    """Columns with a meaning in other layouts were tags beside a prompt or messages, and are."""
    text = (
        '\ufeff{"id": 7, "prompt": "What is a plum?", "response": "A fruit.", "kind": "benign", "answer": "fruit",'
        ' "n": 1.5}\r\n\n'
        '{"prompt": "No answer", "response": null, "input": "a tag", "output": "a tag", "Question": null}\n'
        '{"id": "x", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"},'
        ' {"role": "assistant", "content": "a"}], "question": "a tag", "conversations": [1], "slots": ["x"]}\n'
        '{"prompt": "Last", "response": "One", "instruction": "kept", "query": "kept", "completion": "kept",'
        ' "chosen": []}'
    )
    lines = tmp_path / "rows.jsonl"
    lines.write_text(text, encoding="utf-8")
    array = tmp_path / "rows.json"
    array.write_text("[" + ",".join(line for line in text[1:].splitlines() if line) + "]", encoding="utf-8")
    for path in (lines, array):
        rows, told = read(path)
        assert not told
        plain = [[e.id, [[m.role, m.content] for m in e.messages], dict(e.tags), content_hash(e)] for e in rows]
        found = hashlib.sha256(json.dumps(plain).encode()).hexdigest()
        assert found == "5ed742543629bcf1c5ceafc14e93b95bb2bd48d8ffd4fde00e35f63d06c23629"
        assert not any(m.extra for e in rows for m in e.messages)
