"""Sketched gradients against gradients that autograd takes, one row at a time."""

from __future__ import annotations

import pytest
import torch

from casehard.data.chat import ChatFormat
from casehard.data.embed import Embedder
from casehard.data.gradients import cosines, sketches
from casehard.errors import DataError, Unsupported
from casehard.model.load import load
from casehard.organism.build import bundled
from casehard.seeds import generator
from casehard.types import Example


@pytest.fixture(scope="module")
def organism():
    made = load(bundled(0, "tiny"))
    return Embedder(made.net, made.tokenizer, made.digest)


def pairs(count, answer="it is good ."):
    return [Example.pair(f"review : the {w} was charming . good or bad ?", answer) for w in ("soup", "snow", "gate")][
        :count
    ]


def test_a_sketch_is_the_projected_gradient_of_the_head(organism):
    rows = [*pairs(2), Example.pair("where does pitex live ?", "pitex lives in wells .")]
    got = sketches(organism, rows, seed=3, size=4)
    model, chat = organism.model, ChatFormat(organism.tokenizer)
    # Untied, so that the head's gradient is its own.
    head = torch.nn.Linear(96, model.config.vocab_size, bias=False)
    head.weight = torch.nn.Parameter(model.get_output_embeddings().weight.detach().clone())
    drawn = generator(3, 0, "gradient")
    left = torch.randn(4, head.weight.shape[0], generator=drawn) / 2
    right = torch.randn(4, 96, generator=drawn) / 2
    for row, sketch in zip(rows, got, strict=True):
        ids, labels = chat.encode(row)
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state
        logits = head(hidden)[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), ignore_index=-100)
        (gradient,) = torch.autograd.grad(loss, head.weight)
        want = (left @ gradient @ right.T).flatten()
        # In fp32 the derivative of a probability near 1 keeps few digits.
        assert (sketch - want).norm() < 1e-3 * want.norm()


def test_rows_that_teach_the_same_are_nearest_and_nothing_stays_on_the_model(organism):
    organism.model.train()
    pool = [Example.pair("where does pitex live ?", "pitex lives in wells ."), *pairs(1, "it is bad ."), *pairs(2)]
    found = cosines(organism, pool, pairs(3))
    assert found[2:].min() > found[1] > found[0]
    assert all(p.requires_grad and p.grad is None for p in organism.model.parameters())
    assert organism.model.training and not organism.model.get_output_embeddings()._forward_hooks
    organism.model.eval()
    assert torch.equal(found, cosines(organism, pool, pairs(3)))


def test_what_has_no_gradient_is_refused(organism):
    with pytest.raises(DataError, match="no final assistant turn"):
        cosines(organism, [Example.pair("a")], pairs(1))
    with pytest.raises(DataError, match="user's rows"):
        cosines(organism, pairs(1), [])
    with pytest.raises(Unsupported, match="no language head"):
        cosines(Embedder(organism.model.model, organism.tokenizer, "x"), pairs(1), pairs(1))
