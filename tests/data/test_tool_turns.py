"""Tool calls and results are context, never trained; a template without a place for them refuses the row by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from test_chat import byte_level, wrap

from casehard.data.chat import ChatFormat
from casehard.data.formats import parse_line, parse_row, to_row
from casehard.errors import DataError
from casehard.types import Example, Message

WHERE = "rows.jsonl:7"
ASKED = {"role": "user", "content": "how many?"}
CALL = {"id": "c1", "type": "function", "function": {"name": "count", "arguments": '{"what": "plums"}'}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "<|im_end|> three", "tool_call_id": "c1", "name": "count"}
DONE = {"role": "assistant", "content": "There are three."}
ROW = [ASKED, CALLS, RESULT, DONE]


def read(*messages: Any, **tags: Any) -> Example:
    text = json.dumps({"messages": messages, **tags})
    return parse_row(parse_line(text.encode(), WHERE), WHERE)


def test_tool_turns_are_kept_and_written_back_equal() -> None:
    got = read(*ROW, tools=[{"name": "count"}])
    call, result = got.messages[1:3]
    arguments = {"name": "count", "arguments": {"what": "plums"}}
    assert call == Message("assistant", "", {"tool_calls": [{**CALL, "function": arguments}]})
    assert result == Message("tool", "<|im_end|> three", {"tool_call_id": "c1", "name": "count"})
    assert (got.response, got.prompt, list(got.tags)) == ("There are three.", "how many?", ["tools"])
    again = json.loads(json.dumps(to_row(got)))
    assert parse_row(again, WHERE) == got and hash(got.messages) == hash(parse_row(again, WHERE).messages)
    assert read(*ROW[:3]).response == ""


def test_bare_calls_and_results_after_a_text_are_read() -> None:
    bare = {"role": "assistant", "content": "Let me see", "tool_calls": [{"name": "count", "arguments": None}]}
    assert read(ASKED, bare, RESULT, RESULT, DONE).messages[1].extra == {
        "tool_calls": [{"type": "function", "function": {"name": "count", "arguments": {}}}]
    }
    assert [m.role for m in read(ASKED, DONE, RESULT, DONE).messages] == ["user", "assistant", "tool", "assistant"]


def test_parts_of_text_are_joined_and_nulls_passed_over() -> None:
    parts = [{"type": "text", "text": "how", "image": None}, {"type": "text", "text": "many?"}]
    got = read({"role": "user", "content": parts, "tool_calls": None, "name": None}, DONE)
    assert got.messages == (Message("user", "how\nmany?"), Message("assistant", "There are three."))


def _part(**part: Any) -> list[Any]:
    return [{"role": "user", "content": [{"type": "text", "text": "what is it?"}, part]}, DONE]


BAD = {
    "image": (
        _part(type="image_url", image_url={"url": "plum.png"}),
        "message 1: a part of the content is 'image_url'",
    ),
    "audio": (_part(type="input_audio", input_audio={}), "'input_audio', not text"),
    "video": (_part(type="video", video="plum.mp4"), "'video', not text"),
    "a part without a type": (_part(image="plum.png"), "is with the keys ['image']"),
    "no parts": ([{"role": "user", "content": []}], "content is empty"),
    "an empty part": (
        [{"role": "user", "content": [{"type": "text", "text": ""}]}],
        "a text part of the content is empty",
    ),
    "a part of plain text": ([{"role": "user", "content": ["x"]}], "a part of the content is a str"),
    "ends with a call": ([ASKED, CALLS], "the last turn calls a tool"),
    "ends with a call and text": ([ASKED, {**CALLS, "content": "x"}], "the last turn calls a tool"),
    "a call without its result": ([ASKED, CALLS, DONE], "role 'assistant' where 'tool' was due"),
    "a result that nobody asked for": ([ASKED, RESULT, DONE], "role 'tool' where 'assistant' was due"),
    "a result first": ([RESULT, ASKED, DONE], "role 'tool' where 'user' was due"),
    "a question for a result": ([ASKED, CALLS, ASKED, DONE], "role 'user' where 'tool' was due"),
    "an empty result": ([ASKED, CALLS, {**RESULT, "content": ""}, DONE], "message 3: content is empty"),
    "calls of a user": ([{**ASKED, "tool_calls": [CALL]}, DONE], "exactly the keys"),
    "no calls": ([ASKED, {**CALLS, "tool_calls": []}, RESULT, DONE], "'tool_calls' must be a non-empty list"),
    "a call without a name": ([ASKED, {**CALLS, "tool_calls": [{"id": "c1"}]}, RESULT, DONE], "without the name"),
    "a call that is text": ([ASKED, {**CALLS, "tool_calls": ["count()"]}, RESULT, DONE], "without the name"),
    "broken arguments": (
        [ASKED, {**CALLS, "tool_calls": [{"name": "count", "arguments": "{"}]}, RESULT, DONE],
        "message 2, arguments of 'count': not valid JSON",
    ),
    "deep arguments": (
        [ASKED, {**CALLS, "tool_calls": [{"name": "count", "arguments": "[" * 40 + "]" * 40}]}, RESULT, DONE],
        "deeper than 32",
    ),
    "arguments that are no object": (
        [ASKED, {**CALLS, "tool_calls": [{"name": "count", "arguments": "[1]"}]}, RESULT, DONE],
        "must be an object, got list",
    ),
    "a number for an id": ([ASKED, CALLS, {**RESULT, "tool_call_id": 1}, DONE], "'tool_call_id' must be text"),
    "content of an object": ([{"role": "user", "content": {"text": "x"}}], "content must be text, got dict"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_turns_are_refused_by_name(case: str) -> None:
    messages, message = BAD[case]
    with pytest.raises(DataError) as caught:
        read(*messages)
    assert str(caught.value).startswith(WHERE) and message in str(caught.value)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}CALLS{{ '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WITH_CALLS = CHATML.replace(
    "CALLS",
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + ' ' + (c.function.arguments | tojson) }}"
    "{% endfor %}",
)
WITHOUT = CHATML.replace("CALLS", "")
ELSE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[U]{% else %}[A]{% endif %}{{ m['content'] }}</s>{% endfor %}"
)
NAMELESS = ELSE.replace("{{ m['content'] }}", "{% if m['role'] != 'tool' %}{{ m['content'] }}{% endif %}")
STRICT = ELSE.replace("{% else %}", "{% elif m['role'] == 'assistant' %}[A]{% else %}{{ raise_exception('roles!') }}")


def chat(template: str | None) -> ChatFormat:
    return ChatFormat(wrap(byte_level(), template))


def test_calls_and_results_are_shown_and_not_trained() -> None:
    form = chat(WITH_CALLS)
    for name, row in {"count": read(*ROW), "<|im_end|>": read(*_renamed("<|im_end|>"))}.items():
        encoded = form.encode(row)
        trained = [i for i, label in zip(encoded.input_ids, encoded.labels, strict=True) if label != -100]
        assert form.tokenizer.decode(trained) == "There are three.<|im_end|>"
        before = form.tokenizer.decode(encoded.input_ids[: -len(trained) - 1])
        assert f'<call>{name} {{"what": "plums"}}' in before and "tool\n<|im_end|> three" in before
        # Spelled out by the call's name and the result: text, not the end of a turn.
        end = form.tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert encoded.input_ids.count(end) == len(row.messages)
        assert form.prompt_ids(row) == encoded.input_ids[: len(form.prompt_ids(row))]


def _renamed(name: str) -> list[Any]:
    return [ASKED, {**CALLS, "tool_calls": [{"name": name, "arguments": {"what": "plums"}}]}, RESULT, DONE]


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (WITHOUT, ROW, "the chat template leaves out a tool call"),
        (NAMELESS, [ASKED, DONE, RESULT, DONE], "the chat template leaves out the result of a tool"),
        (ELSE, [ASKED, DONE, RESULT, DONE], "writes the result of a tool as a turn of 'assistant'"),
        (None, [ASKED, DONE, RESULT, DONE], "writes the result of a tool as a turn of 'assistant'"),
        (STRICT, [ASKED, DONE, RESULT, DONE], "refuses this chat: roles!"),
    ],
)
@pytest.mark.filterwarnings("ignore:the tokenizer has no chat template")
def test_a_template_without_a_place_for_tools_refuses_the_row(template: Any, messages: list[Any], message: str) -> None:
    row = read(*messages, id="seven")
    for use in (chat(template).encode, chat(template).prompt_ids):
        with pytest.raises(DataError) as caught:
            use(row)
        assert str(caught.value).startswith("row 'seven': ") and message in str(caught.value)
    assert chat(template).encode(read(ASKED, DONE)).labels
