"""Rows are checked strictly, and what is written is read back equal."""

from __future__ import annotations

import json
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casehard.data.formats import MAX_LINE_BYTES, RESERVED, parse_line, parse_row, to_row
from casehard.errors import DataError
from casehard.types import Example, Message

WHERE = "rows.jsonl:7"


def read(text: str | bytes) -> Example:
    raw = text.encode() if isinstance(text, str) else text
    return parse_row(parse_line(raw, WHERE), WHERE)


def test_prompt_completion_row() -> None:
    got = read('{"id": "a", "prompt": "p", "response": "r", "kind": "benign", "slots": ["x"]}')
    assert got == Example.pair("p", "r", id="a", kind="benign", slots=["x"])


def test_prompt_without_response_and_numeric_id() -> None:
    assert read('{"id": 3, "prompt": "p"}') == Example.pair("p", id="3")


def test_null_response_is_an_absent_one() -> None:
    assert read('{"prompt": "p", "response": null}') == Example.pair("p")


def test_messages_row() -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    got = read(json.dumps({"messages": [*turns, {"role": "assistant", "content": "a"}], "t": 1}))
    assert got.messages == (Message("system", "s"), Message("user", "u"), Message("assistant", "a"))
    assert got.tags == {"t": 1}


HOSTILE = "<script>alert(1)</script> {{ 7 * 7 }} {% raw %} <|im_end|></s>\u202e\x1b[31m"


def test_markup_and_template_syntax_are_just_text() -> None:
    got = read(json.dumps({"prompt": HOSTILE, "response": HOSTILE}))
    assert got.prompt == got.response == HOSTILE


BAD = {
    "not json": ("{", "not valid JSON"),
    "not an object": ("[1]", "must be a JSON object"),
    "trailing text": ('{"prompt": "p"} x', "not valid JSON"),
    "duplicate key": ('{"prompt": "p", "prompt": "q"}', "duplicate key 'prompt'"),
    "duplicate key inside": ('{"prompt": "p", "m": {"k": 1, "k": 2}}', "duplicate key 'k'"),
    "NaN": ('{"prompt": "p", "x": NaN}', "NaN"),
    "Infinity": ('{"prompt": "p", "x": -Infinity}', "-Infinity"),
    "overflow": ('{"prompt": "p", "x": 1e999}', "too large"),
    "huge integer": ('{"prompt": "p", "x": ' + "9" * 5000 + "}", "not valid JSON"),
    "depth": ('{"prompt": "p", "x": ' + "[" * 40 + "]" * 40 + "}", "deeper than 32"),
    "absurd depth": ('{"prompt": "p", "x": ' + "[" * 100_000 + "]" * 100_000 + "}", "deeper than 32"),
    "surrogate": ('{"prompt": "\\ud800"}', "surrogate"),
    "empty prompt": ('{"prompt": "  "}', "'prompt' is empty"),
    "empty response": ('{"prompt": "p", "response": ""}', "'response' is empty"),
    "null prompt": ('{"prompt": null}', "must be text, got NoneType"),
    "number as prompt": ('{"prompt": 4}', "must be text, got int"),
    "both forms": ('{"prompt": "p", "messages": []}', "both 'messages' and 'prompt'"),
    "neither form": ('{"instruction": "p", "output": "r"}', "neither 'prompt' nor 'messages'"),
    "no messages": ('{"messages": []}', "non-empty list"),
    "wrong role": ('{"messages": [{"role": "human", "content": "x"}]}', "unknown role 'human'"),
    "role of wrong type": ('{"messages": [{"role": ["user"], "content": "x"}]}', "unknown role"),
    "starts with assistant": ('{"messages": [{"role": "assistant", "content": "x"}]}', "'user' was due"),
    "late system": (
        '{"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}',
        "message 2: role 'system' where 'assistant' was due",
    ),
    "only system": ('{"messages": [{"role": "system", "content": "x"}]}', "no user turn"),
    "two users": (
        '{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}',
        "'assistant' was due",
    ),
    "extra message key": ('{"messages": [{"role": "user", "content": "x", "name": "n"}]}', "exactly the keys"),
    "empty content": ('{"messages": [{"role": "user", "content": "\\n"}]}', "content is empty"),
    "boolean id": ('{"id": true, "prompt": "p"}', "'id' must be text"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_name_the_place_and_the_problem(case: str) -> None:
    text, wanted = BAD[case]
    with pytest.raises(DataError) as caught:
        read(text)
    assert str(caught.value).startswith(WHERE)
    assert wanted in str(caught.value)
    assert caught.value.exit_code == 3


def test_meant_column_is_named() -> None:
    with pytest.raises(DataError, match="rename 'instruction' to 'prompt'"):
        read('{"instruction": "p"}')


def test_values_of_the_file_are_shown_cut() -> None:
    long = "x" * 100_000
    messages = [[{"role": long, "content": "a"}], [{"role": "user", "content": "a", long: 1}]]
    messages += [[{"role": "user", "content": [{"type": long}]}], [{"role": "user", "content": [{long: 1}]}]]
    rows = [{"prompt": "p", "id": [long]}, {long: "p"}, *({"messages": turns} for turns in messages)]
    for text in [*map(json.dumps, rows), f'{{"{long}": 1, "{long}": 2}}']:
        with pytest.raises(DataError) as caught:
            read(text)
        assert "xxx" in str(caught.value) and len(str(caught.value)) < 400


def test_depth_limit_is_exact() -> None:
    def nested(levels: int) -> str:
        return '{"prompt": "p", "x": ' + "[" * levels + "]" * levels + "}"

    assert read(nested(31)).prompt == "p"
    with pytest.raises(DataError):
        read(nested(32))


def test_line_limit_and_encoding() -> None:
    with pytest.raises(DataError, match="longer than 1,000,000 bytes"):
        read(b'{"prompt": "' + b"x" * MAX_LINE_BYTES + b'"}')
    with pytest.raises(DataError, match=r"not UTF-8 \(byte 12: 0xff\)"):
        read(b'{"prompt": "\xff"}')


def test_required_response() -> None:
    with pytest.raises(DataError, match="no response to learn from"):
        parse_row({"prompt": "p"}, WHERE, require_response=True)


TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(str.strip)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
TAGS = st.dictionaries(
    st.text(string.ascii_lowercase, min_size=1).filter(lambda k: k not in RESERVED), VALUES, max_size=3
)


@st.composite
def examples(draw: st.DrawFn) -> Example:
    turns = [Message("system", draw(TEXT))] if draw(st.booleans()) else []
    for number in range(draw(st.integers(1, 4))):
        turns.append(Message(("user", "assistant")[number % 2], draw(TEXT)))
    return Example(tuple(turns), draw(TEXT | st.just("")), draw(TAGS))


@given(examples())
@settings(max_examples=200, deadline=None)
def test_written_rows_are_read_back_equal(example: Example) -> None:
    assert read(json.dumps(to_row(example), ensure_ascii=False)) == example


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_bytes_give_a_row_or_a_data_error(raw: bytes) -> None:
    try:
        assert read(raw).prompt
    except DataError as error:
        assert WHERE in str(error)


def test_a_tag_with_the_name_of_a_row_key_is_refused() -> None:
    with pytest.raises(DataError, match="'response'"):
        to_row(Example((Message("user", "p"),), tags={"response": "x"}))
