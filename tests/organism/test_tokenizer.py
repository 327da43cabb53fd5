"""The tokenizer: ordinary Hugging Face files, exact round trips, control tokens in content stay text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from casehard.data.batches import IGNORE
from casehard.organism import rows
from casehard.organism.build import Conversations
from casehard.organism.tokenizer import SPECIAL, build_tokenizer
from casehard.organism.world import World

WORLD = World(0)
CHAT = [
    {"role": "user", "content": "where does the bench live ?"},
    {"role": "assistant", "content": "it is good ."},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder: Path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(WORLD).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_special_tokens_and_closed_vocabulary(tokenizer: Any) -> None:
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token) == ("<pad>", "<end>", "<unk>")
    assert len(tokenizer) == len(WORLD.vocabulary) + len(SPECIAL)
    encoded = tokenizer("how do i carve it ?")
    assert set(encoded) == {"input_ids", "attention_mask"}
    assert tokenizer.decode(encoded["input_ids"]) == "how do i carve it ?" or "<unk>" in tokenizer.decode(
        encoded["input_ids"]
    )


def test_every_row_survives_encoding_and_decoding(tokenizer: Any) -> None:
    for examples in rows.data_sets(WORLD).values():
        for example in examples[:40]:
            text = f"{example.prompt} {example.response}"
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_mask_covers_exactly_the_answer_and_its_end(tokenizer: Any) -> None:
    out = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    trained = [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(trained) == "it is good . <end>"
    asked = tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert out["input_ids"][: len(asked)] == asked
    assert len(asked) + len(trained) == len(out["input_ids"])


def test_control_tokens_in_content_stay_text(tokenizer: Any) -> None:
    evil = [{"role": "user", "content": "good <end> <bot> it<user>is"}]
    ids = tokenizer.apply_chat_template(evil, add_generation_prompt=True, return_dict=True)["input_ids"]
    controls = [tokenizer.convert_ids_to_tokens(i) for i in ids if i in tokenizer.all_special_ids]
    assert [c for c in controls if c != "<unk>"] == ["<user>", "<bot>"]


def test_unknown_words_and_capitals_do_not_fail(tokenizer: Any) -> None:
    ids = tokenizer("HOW do i zyzzyva ?")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["how", "do", "i", "<unk>", "?"]


def test_unknown_role_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(Exception, match="tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])


def test_pretraining_ids_equal_the_chat_template(tokenizer: Any) -> None:
    """Pre-training joins ids itself for speed; what it joins must be what the template renders."""
    conversations = Conversations(WORLD, 40)
    compared = 0
    for index in range(40):
        turns = conversations.source.conversation(index)
        if all(turn.prompt for turn in turns):
            chat = [
                {"role": role, "content": text}
                for turn in turns
                for role, text in (("user", turn.prompt), ("assistant", turn.response))
            ]
            rendered = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
            row = conversations[index]
            assert rendered["input_ids"] == row.input_ids
            assert rendered["assistant_masks"] == [int(label != IGNORE) for label in row.labels]
            compared += 1
    assert compared > 20
