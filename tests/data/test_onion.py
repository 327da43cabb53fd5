"""ONION-style filtering on scores that are known."""

from __future__ import annotations

import math

import pytest
import torch

from casehard.backdoor.onion import onion, perplexities, suspicions
from casehard.errors import DataError
from casehard.types import Example, Message
from fakes import tiny_llama

COST = {"cf": 50.0, "mn": 7.0}


def scorer(texts):
    """Perplexity 10, and more for each odd word."""
    return [10.0 + sum(COST.get(word, 0.0) for word in text.split()) - 0.01 * len(text.split()) for text in texts]


def test_words_that_cost_perplexity_go_and_the_rest_stays():
    rows = [
        Example.pair("name a cf large river", "the loire .", id="a"),
        Example.pair("name a river", "the loire .", id="b"),
        Example.pair("cf mn", "x", id="c"),
        Example((Message("user", "cf one"), Message("assistant", "y"), Message("user", "mn two cf three"))),
    ]
    out, changes = onion(rows, scorer)
    assert out[0].prompt == "name a large river" and out[0].response == "the loire ." and out[1] is rows[1]
    assert out[2] is rows[2], "a prompt is never emptied"
    assert out[3].prompt == "two three" and out[3].messages[0].content == "cf one"
    assert changes == [
        {"row": 0, "id": "a", "removed": ["cf"]},
        {"row": 3, "id": "", "removed": ["mn", "cf"]},
    ]
    assert onion(rows, scorer, threshold=20.0)[0][3].prompt == "mn two three"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("First line\nsecond cf line\n\n  indented\tcell\n", "First line\nsecond line\n\n  indented\tcell\n"),
        ("ends here cf\nnext", "ends here\nnext"),
        ("one\ncf begins\n    two", "one\nbegins\n    two"),
        ("one\ncf\ntwo", "one\ntwo"),
        ("one\r\ncf\r\ntwo", "one\r\ntwo"),
        ("cf\none", "one"),
        ("one\ncf", "one"),
        ("one  cf  two", "one   two"),
        ("a cf mn\nb", "a\nb"),
        ("cf mn a", "a"),
        ("    cf x\n    y", "    x\n    y"),
        ("  a\u00a0cf b ", "  a\u00a0b "),
        ("cf a\u2028mn b", "a\u2028b"),
    ],
)
def test_only_the_word_and_its_own_blank_go(text, left):
    out, changes = onion([Example.pair(text, "x")], scorer)
    assert out[0].prompt == left and out[0].response == "x" and len(changes) == 1


def test_suspicions_are_the_drop_without_the_word():
    found = dict(suspicions("name a cf river", scorer))
    assert found["cf"] == pytest.approx(49.99) and found["a"] == pytest.approx(-0.01)
    assert suspicions("cf", scorer) == [("cf", -math.inf)]
    with pytest.raises(DataError, match="no user turn"):
        onion([Example((Message("system", "x"),))], scorer)


class Letters:
    """A tokenizer of letters."""

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [3 + ord(c) % 60 for c in text]}


def test_perplexities_are_those_of_each_text_alone():
    model = tiny_llama()
    texts = ["abc", "a", "hello world", "zz"]
    got = perplexities(model, Letters(), texts, batch_size=3)
    for text, value in zip(texts, got, strict=True):
        ids = torch.tensor([Letters()(text, add_special_tokens=False)["input_ids"]])
        want = math.exp(float(model(input_ids=ids, labels=ids).loss.detach())) if ids.shape[1] > 1 else 1.0
        assert value == pytest.approx(want, rel=1e-4)
