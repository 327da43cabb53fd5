"""Residuals and safety gradients: property 14, and the scores against dense gradients."""

from __future__ import annotations

import pytest
import torch

from buffer_fakes import random_pairs
from casehard.data.chat import ChatFormat
from casehard.defences.buffer_reinforce.frozen_lora import FrozenLora
from casehard.defences.buffer_reinforce.saturation import (
    Residual,
    ZeroGated,
    frobenius,
    left_beside,
    residual,
    row_loss,
    safety_scores,
)
from casehard.errors import ConfigError, DataError
from casehard.maths.merge import LoraPair
from casehard.types import Example
from fakes import tiny_llama, tiny_rows, weights

PAIRS = {name: pair._replace(scale=1.7) for name, pair in random_pairs(seed=4).items()}
ROWS = tiny_rows(6)


def test_the_gates_derivative_is_the_inner_product_with_the_dense_gradient():
    model = tiny_llama().double().eval()
    pairs = {name: LoraPair(p.a.double(), p.b.double(), p.scale) for name, p in PAIRS.items()}
    batch = ROWS.batch_at(6, seed=0, step=0, purpose="x")
    plain = row_loss(model, batch)
    plain.backward()
    dense = {name: model.get_submodule(name).weight.grad.clone() for name in pairs}
    with ZeroGated(model, pairs) as gated:
        loss = row_loss(model, batch)
        assert float(loss) == pytest.approx(float(plain), abs=1e-12)  # at zero the model computes what it did
        found = gated.gradients(loss)
    expected = torch.stack([(dense[name] * (p.scale * p.b @ p.a)).sum() for name, p in pairs.items()])
    assert torch.allclose(found, expected, atol=1e-10, rtol=0)
    assert float(row_loss(model, batch)) == float(plain)


def test_scores_are_the_mean_over_rows_and_signed_by_the_update():
    model = tiny_llama()
    before = weights(model)
    found = safety_scores(model, ROWS, PAIRS, batch_size=4)
    assert found.layers == tuple(PAIRS) and found.rows == 6 and found.scores.shape == (8,)
    total = torch.zeros(8, dtype=torch.float64)
    for i in range(6):  # row by row, as the paper defines it
        model.zero_grad()
        row = ROWS.rows[i]
        model.eval()(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss.backward()
        for k, (name, p) in enumerate(PAIRS.items()):
            v = p.scale * p.b @ p.a
            total[k] -= float((model.get_submodule(name).weight.grad * v).sum() / v.norm())
    assert torch.allclose(found.scores, total / 6, atol=1e-6)
    # A step along an adapter that lowers the loss works with it: positive.
    layer = "model.layers.0.mlp.up_proj"
    gradient = model.get_submodule(layer).weight.grad
    u, s, v = torch.linalg.svd(gradient, full_matrices=False)
    descent = LoraPair(v[:4], -u[:, :4] * s[:4], 1.0)
    one = tiny_rows(6).rows[5:]
    assert float(safety_scores(model, type(ROWS)(one, 0), {layer: descent}).scores[0]) > 0
    model.zero_grad()
    assert all(after.equal(before[name]) for name, after in weights(model).items())


def test_the_score_is_the_same_beside_a_buffer_attached_by_the_caller():
    model = tiny_llama().eval()
    alone = safety_scores(model, ROWS, PAIRS).scores
    frozen = FrozenLora(random_pairs(seed=1)).attach(model)
    beside = safety_scores(model, ROWS, PAIRS).scores
    frozen.detach()
    assert not beside.equal(alone) and safety_scores(model, ROWS, PAIRS).scores.equal(alone)


def test_the_norm_needs_no_dense_update():
    for pair in PAIRS.values():
        assert frobenius(pair) == pytest.approx(float((pair.scale * pair.b @ pair.a).norm()), rel=1e-6)
    assert frobenius(LoraPair(torch.randn(2, 5), torch.zeros(3, 2))) == 0.0


def test_a_layer_the_model_lacks_is_refused():
    with pytest.raises(ConfigError, match="no layer"):
        safety_scores(tiny_llama(), ROWS, {"model.layers.9.mlp.up_proj": next(iter(PAIRS.values()))})


class _Tokens:
    """Stands for a chat format: every example becomes the row it is numbered with."""

    def encode(self, example):
        return ROWS.rows[int(example.id)]


def test_residuals_match_the_probabilities_of_the_answer():
    model = tiny_llama()
    examples = [Example.pair("q", "a", id=str(i)) for i in range(6)]
    found = residual(model, _Tokens(), examples, batch_size=4)
    for i in range(6):
        row = ROWS.rows[i]
        with torch.no_grad():
            p = model.eval()(input_ids=torch.tensor([row.input_ids])).logits[0].softmax(-1)
        kept = [t for t in range(1, len(row.labels)) if row.labels[t] != -100]
        own = torch.stack([p[t - 1, row.labels[t]] for t in kept])
        assert found.tokens[i] == len(kept)
        assert found.residual[i] == pytest.approx(float((1 - own).mean()), abs=1e-6)
        assert found.nll[i] == pytest.approx(float(-own.log().mean()), abs=1e-5)
    assert Residual([0.0, 1.0], [1.0, 3.0], [3, 1]).mean_residual == 0.25
    assert Residual([0.0, 1.0], [1.0, 3.0], [3, 1]).mean_nll == 1.5
    with pytest.raises(DataError):
        residual(model, ChatFormat, [])


def test_what_is_left_beside_a_buffer_is_a_share_of_what_is_there_without():
    model = tiny_llama()
    nothing = {name: p._replace(scale=0.0) for name, p in PAIRS.items()}
    assert left_beside(model, ROWS, nothing, PAIRS) == pytest.approx(1.0)
    buffer = random_pairs(seed=9)
    alone = safety_scores(model, ROWS, PAIRS).scores
    frozen = FrozenLora(buffer).attach(model)
    beside = safety_scores(model, ROWS, PAIRS).scores
    frozen.detach()
    found = left_beside(model, ROWS, buffer, PAIRS)
    assert found == pytest.approx(float(beside.abs().sum() / alone.abs().sum()))
    assert torch.equal(safety_scores(model, ROWS, PAIRS).scores, alone), "the model is what it was"
