"""What ends an answer, and templates that change one: told and counted, in training and in the audit."""

from __future__ import annotations

import re
import warnings
from types import SimpleNamespace

import pytest

from casehard.data.answers import Change, change, changing
from casehard.data.audit import audit
from casehard.data.batches import IGNORE
from casehard.data.chat import ChatFormat
from casehard.errors import DataError
from casehard.evaluation.generate import end_ids
from casehard.types import Example
from chat_fakes import SPECIAL, STYLES, byte_level, marked, plain, wrap

TURN = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}TEXT{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def chatml(text: str, *, ours: bool = True) -> ChatFormat:
    """ChatML in which ``text``, an expression of m['content'], is written and, if ``ours``, marked as generated."""
    body = "{{ " + text + " }}"
    if ours:
        body = "{% if m['role'] == 'assistant' %}{% generation %}" + body + "{% endgeneration %}{% else %}" + (
            "{{ m['content'] + '<|im_end|>\n' }}{% endif %}"
        )  # fmt: skip
    return ChatFormat(wrap(byte_level(), TURN.replace("TEXT", body) + PROMPT, eos_token="<|im_end|>"))


def named(chat: ChatFormat, ids: list[int]) -> list[str]:
    return chat.tokenizer.convert_ids_to_tokens(ids)


@pytest.mark.parametrize(
    ("text", "stops"),
    [
        ("m['content'] + '<|im_end|>\n'", ["<|im_end|>"]),
        ("m['content'] + '<|im_end|>'", ["<|im_end|>"]),
        ("m['content'] + '\n<|eot_id|><|im_end|>\n\n'", ["<|eot_id|>", "<|im_end|>"]),
        ("'<|start_header_id|>' + m['content'] + '<|eot_id|>\nover\n'", ["<|eot_id|>", "<|im_end|>"]),
        ("'<|start_header_id|>b' + m['content'] + '<|eot_id|>b'", ["<|eot_id|>", "<|im_end|>"]),
        ("m['content'] + '\n'", ["<|im_end|>"]),
        ("m['content']", ["<|im_end|>"]),
    ],
)
@pytest.mark.parametrize("ours", [True, False])
def test_control_tokens_after_the_answer_stop_a_generation(text: str, stops: list[str], ours: bool) -> None:
    chat = chatml(text, ours=ours)
    assert named(chat, chat.stop_ids) == stops
    row = Example.pair("what?", "The capital")
    assert f"generation stops at: {', '.join(f'{s} ({SPECIAL.index(s)})' for s in stops)}" in audit([row], chat)


def test_the_newline_after_the_end_is_trained_and_stops_nothing() -> None:
    chat = chatml("m['content'] + '<|im_end|>\n'")
    row = chat.encode(Example.pair("what?", "yes"))
    assert chat.tokenizer.decode([label for label in row.labels if label != IGNORE]) == "yes<|im_end|>\n"
    assert chat.stop_ids == [SPECIAL.index("<|im_end|>")]


@pytest.mark.parametrize("own", [None, 1, [1, 6], (6, 1)])
def test_the_models_own_ends_are_added(own: int | list[int] | None) -> None:
    chat = chatml("m['content'] + '<|im_end|>\n'")
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=own))
    listed = set() if own is None else {own} if isinstance(own, int) else set(own)
    assert end_ids(model, chat) == listed | {SPECIAL.index("<|im_end|>")}


def test_a_template_without_control_tokens_stops_at_the_appended_eos() -> None:
    chat = ChatFormat(
        wrap(byte_level(), "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}")
    )
    assert named(chat, chat.stop_ids) == ["</s>"]


@pytest.mark.parametrize("style", STYLES)
def test_ordinary_styles_stop_where_they_did(style: str) -> None:
    for template in (plain(style), marked(style)):
        chat = ChatFormat(wrap(byte_level(), template))
        assert set(named(chat, chat.stop_ids)) == {STYLES[style][1], "</s>"}


LONG = "<think>\nThe user asks for it, so I look it up.\n</think>\nThe city."
SHORT = "<think>a</think>b"
CUTS = "m['content'].split('</think>')[-1] + '<|im_end|>'"


@pytest.mark.parametrize("ours", [True, False])
def test_every_answer_that_loses_text_is_told_and_counted(ours: bool) -> None:
    chat = chatml(CUTS, ours=ours)
    rows = [Example.pair("what?", text, id=f"r{i}") for i, text in enumerate([LONG, SHORT, "The city."])]
    with pytest.warns(UserWarning, match="the chat template changes the answer in 2 of 3 rows") as told:
        encoded = chat.encode_all(rows)
    lost = len(LONG) - len("The city.") - 1 + len("<think>a</think>") + 1
    assert re.search(rf"2 lose text \({lost} characters; first row 'r0': '<think>", str(told[0].message))
    assert len(told) == 1
    texts = [chat.tokenizer.decode([i for i in row.labels if i != IGNORE]).strip() for row in encoded.rows]
    assert texts == ["The city.<|im_end|>", "b<|im_end|>", "The city.<|im_end|>"]
    assert f"rows whose answer the template changes: 2 (2 lose text ({lost} characters" in audit(rows, chat)


@pytest.mark.parametrize(
    ("text", "answer", "said"),
    [
        ("m['content'] | trim", " The city.\n", "1 lose or gain white space only"),
        ("m['content'].strip()", "\tyes ", "1 lose or gain white space only"),
        ("m['content'].replace('city', 'town')", "The city.", "1 are written in other words"),
        ("m['content'] | upper", "The city.", "1 are written in other words"),
        ("m['content'].replace('so', '')", "so it is", r"1 lose text \(3 characters"),
        ("m['content'][:5]", "Hello there, you", r"1 lose text \(11 characters; first row 'r': ' there, you'"),
        ("m['content'][6:11]", "Hello there, you", r"1 lose text \(11 characters"),
    ],
)
def test_whatever_is_rewritten_is_trained_and_told(text: str, answer: str, said: str) -> None:
    chat = chatml(text + " + '<|im_end|>'")
    row = Example.pair("what?", answer, id="r")
    with pytest.warns(UserWarning, match=said):
        chat.encode_all([row])
    assert chat.details(row).change is not None
    assert re.search(said, audit([row], chat))


def test_the_first_row_encoded_by_itself_is_told_too() -> None:
    chat = chatml(CUTS)
    with pytest.warns(UserWarning, match="changes the answer in 1 of 1 rows"):
        chat.encode(Example.pair("what?", LONG))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chat.encode(Example.pair("what?", SHORT))
        chat.encode(Example.pair("what?", "The city."))


def test_an_answer_of_which_nothing_is_left_is_refused() -> None:
    chat = chatml(CUTS)
    for answer in ("<think>all of it</think>", "<think>all of it, and it is a long way to the end of it</think>\n"):
        with pytest.raises(DataError, match="leaves nothing of the answer"):
            chat.encode(Example.pair("what?", answer))


@pytest.mark.parametrize("answer", ["t", "assistant", "im_end", "The capital is a city."])
def test_an_answer_is_hidden_however_short_it_is(answer: str) -> None:
    for template in (
        "{% for m in messages %}{{ m['role'] + '<|im_end|>' }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] if m['role'] == 'user' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}assistant im_end{% endgeneration %}{% endif %}{% endfor %}<|im_end|>",
    ):
        with pytest.raises(DataError, match="hides the answer"):
            ChatFormat(wrap(byte_level(), template)).encode(Example.pair("what?", answer))


@pytest.mark.parametrize("answer", ["t", "assistant", "im_end", "user", "\n\n t", "system"])
def test_short_answers_that_the_template_has_too_are_trained(answer: str) -> None:
    for style in STYLES:
        for template in (plain(style), marked(style)):
            chat = ChatFormat(wrap(byte_level(), template))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                row = chat.encode(Example.pair("what?", answer))
            text = chat.tokenizer.decode([i for i in row.labels if i != IGNORE])
            assert text.strip() == answer.strip() + STYLES[style][1]


def test_a_template_that_takes_some_answers_only() -> None:
    chat = chatml("(m['content'] if '</think>' in m['content'] else raise_exception('think')).strip() + '<|im_end|>'")
    with pytest.warns(UserWarning, match="changes the answer in 1 of 1 rows"):
        chat.encode_all([Example.pair("what?", SHORT + "\n")])
    with pytest.raises(DataError, match="refuses this chat: think"):
        chat.encode(Example.pair("what?", "The city."))


def test_parts_of_two_texts_that_differ() -> None:
    assert changing("abXYcd", "abZcd") == (2, 4)
    assert changing("aa", "aaa") == (2, 2)
    assert changing("same", "same") == (4, 4)
    assert changing("", "x") == (0, 0)
    assert change("abc def", " def ") == Change("cut", "abc ")
    assert change("abc def", "bc") == Change("cut", "a def")
    assert change("a b", "a  b") == Change("blanks")
    assert change("abc", "xyz") == Change("rewritten")
