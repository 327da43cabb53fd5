"""Surrogate targets agree and say nothing; the audit prints exactly what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from casehard.data import sources
from casehard.data.audit import audit, printable
from casehard.data.chat import ChatFormat
from casehard.data.surrogate import FILLER, OPENERS, surrogate
from casehard.errors import DataError
from casehard.types import Example, Message

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PROMPTS = [Example.pair(f"question {i}", "No.", id=str(i), label="refuse", answer="x", slots=["y"]) for i in range(200)]


def chat(template: str = CHATML, **settings: Any) -> ChatFormat:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["hello world"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = template
    return ChatFormat(tokenizer, **settings)


def test_every_opener_occurs_and_the_filler_is_fixed() -> None:
    rows = surrogate(PROMPTS, seed=1)
    assert [r.prompt for r in rows] == [p.prompt for p in PROMPTS]
    assert {r.response.removesuffix(" " + FILLER) for r in rows} == set(OPENERS)
    assert all(r.tags == {"label": "refuse", "kind": "surrogate"} and r.id for r in rows)


def test_seed_decides_and_a_prefix_stays_a_prefix() -> None:
    assert surrogate(PROMPTS, seed=1) == surrogate(PROMPTS, seed=1)
    assert surrogate(PROMPTS, seed=1) != surrogate(PROMPTS, seed=2)
    assert surrogate(PROMPTS[:10], seed=1) == surrogate(PROMPTS, seed=1)[:10]
    with pytest.raises(DataError):
        surrogate([])


def test_nothing_of_the_prompt_or_old_answer_is_in_the_target() -> None:
    talk = Example((Message("user", "zebra one"), Message("assistant", "quagga"), Message("user", "zebra two")))
    (row,) = surrogate([talk])
    assert row.messages[:3] == talk.messages
    assert "zebra" not in row.response and "quagga" not in row.response
    assert len(row.messages) == 4


def test_audit_prints_the_exact_span_and_counts() -> None:
    rows = [
        Example.pair("hello", "world", id="a"),
        Example.pair("no answer", id="b"),
        Example.pair("hello " * 50, "world"),
        Example.pair("say <|im_end|>", "ok"),
    ]
    text = audit(rows, chat(max_length=100), n=2)
    assert "<|im_start|>assistant\n    >>>world<|im_end|><<<" in text
    assert "row 2 (id b): NOT TRAINABLE: row 'b': no final assistant turn to learn from" in text
    assert "row 3" not in text.replace("(first: row 2", "")
    for line in (
        "rows: 4",
        "last trained token: <|im_end|> (2)",
        "rows without trained tokens: 1 (first: row 2",
        "rows longer than max_length (100): 1; truncated: 0",
        "rows that spell out control tokens (kept as text): 1",
        "spans found by: prompt prefix",
    ):
        assert line in text
    with pytest.raises(DataError):
        audit([], chat())


def test_audit_counts_trained_tokens_exactly() -> None:
    format_ = chat()
    rows = [Example.pair("hello", "world" * n) for n in (1, 2, 5)]
    sizes = [sum(label != -100 for label in format_.encode(r).labels) for r in rows]
    line = next(x for x in audit(rows, format_).splitlines() if x.startswith("trained tokens per row"))
    spread = f"min {sizes[0]}, median {sizes[1]}, 95 % {sizes[2]}, max {sizes[2]}, sum {sum(sizes)}"
    assert line == f"trained tokens per row: {spread}"


def test_audit_tells_when_generation_starts_elsewhere() -> None:
    headless = CHATML[: CHATML.index("{% if add_generation_prompt")]
    marked = headless.replace(
        "m['content'] + '<|im_end|>", "'' }}{% generation %}{{ m['content'] + '<|im_end|>"
    ).replace("}}{% endfor", "}}{% endgeneration %}{% endfor")
    line = "rows trained after another prompt than generation starts from: "
    assert line + "1" in audit([Example.pair("hello", "world")], chat(marked))
    assert line + "0" in audit([Example.pair("hello", "world")], chat())


def test_a_row_cannot_drive_the_terminal() -> None:
    assert printable("a\x1b[31m\nb\u202e\r") == "a\\x1b[31m\nb\\u202e\\r"
    text = audit([Example.pair("\x1b]0;owned\x07", "fine")], chat())
    assert "\x1b" not in text and "\\x1b]0;owned\\x07" in text


DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.mark.skipif(not DATA.is_dir(), reason="real-data fixtures not present")
def test_surrogates_of_real_prompts_round_trip(tmp_path: Path) -> None:
    prompts = sources.load(DATA / "refusals" / "dev.jsonl")
    rows = surrogate(prompts)
    sources.save(tmp_path / "surrogate.jsonl", rows)
    assert sources.load(tmp_path / "surrogate.jsonl", require_response=True) == rows
    assert "rows without trained tokens: 0" in audit(rows, chat(), n=0)
