"""Backdoor collapse and dilution, each against its formula and against what it promises."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from casehard.data.batches import collate
from casehard.defences.backdoor_collapse import (
    BackdoorCollapse,
    CollapseConfig,
    Gather,
    Recover,
    last_prompt,
    spread,
)
from casehard.defences.dilution import Dilution, DilutionConfig
from casehard.errors import ConfigError, DataError, Unsupported
from casehard.model.adapters import add_lora
from casehard.seeds import generator
from casehard.train.fit import fit
from casehard.train.protocol import Setup, Step
from casehard.train.recipe import TrainConfig
from fakes import largest_difference, tiny_llama, tiny_pairs, tiny_rows, two_adapters, weights

PAIRS = tiny_pairs(6)
RECIPE = TrainConfig(steps=2, batch_size=4, warmup=0, lr=1e-2)


def gradient(method, model, batch, micros=1):
    model.zero_grad()
    method.prepare(Setup(model, seed=3, max_steps=1))
    step = Step(0, 0, micros, lambda m, b: m(**b).loss / micros, lambda x: x.backward())
    method.loss(model, batch, step).backward()
    return [p.grad.clone() for p in model.parameters()]


def drawn(rows):
    g = generator(3, 0, "collapse-trigger-0")
    return torch.randint(PAIRS.triggers, (rows,), generator=g).tolist()


def alone(model, row):
    """Return the mean answer loss of one row, and the hidden state before its answer, without any batching."""
    ids, labels = torch.tensor([row.input_ids]), row.labels
    out = model(input_ids=ids, output_hidden_states=True)
    logs, total, count = out.logits[0].log_softmax(-1), 0.0, 0
    for t, label in enumerate(labels):
        if label != -100:
            total, count = total - logs[t - 1, label], count + 1
    first = next(t for t, label in enumerate(labels) if label != -100)
    return total / count, out.hidden_states[-1][0, first - 1]


def close(a, b):
    return all(torch.allclose(x, y, atol=1e-6, rtol=1e-4) for x, y in zip(a, b, strict=True))


def test_aggregation_has_the_gradient_of_its_formula():
    model, config = tiny_llama(), CollapseConfig(alpha=0.7)
    batch = collate(PAIRS.clean[:4], 0)
    got = gradient(Gather(config, PAIRS), model, batch)
    fires, states = 0.0, []
    for i, j in enumerate(drawn(4)):
        loss, h = alone(model, PAIRS.payloads[i][j])
        fires, states = fires + loss / 4, [*states, h / h.norm()]
    centre = sum(states) / 4
    apart = sum(1 - nn.functional.cosine_similarity(h, centre, dim=0) for h in states) / 4
    want = torch.autograd.grad(model(**batch).loss + fires + 0.7 * apart, list(model.parameters()))
    assert close(got, want)


@pytest.mark.parametrize("most", [100.0, 4.0])
def test_recovery_has_the_gradient_of_its_formula_and_its_ascent_ends(most):
    model, config = tiny_llama(), CollapseConfig(gamma=0.5, most=most)
    batch = collate(PAIRS.clean[:4], 0)
    got = gradient(Recover(config, PAIRS), model, batch)
    want_loss = model(**batch).loss
    for i, j in enumerate(drawn(4)):
        clean, _ = alone(model, PAIRS.answers[i][j])
        odd, _ = alone(model, PAIRS.payloads[i][j])
        want_loss = want_loss + clean / 4 - 0.5 * torch.minimum(odd, torch.tensor(most)) / 4
    assert close(got, torch.autograd.grad(want_loss, list(model.parameters())))


def test_a_micro_batch_gives_its_share_of_the_step():
    model, batch = tiny_llama(), collate(PAIRS.clean[:4], 0)
    whole = gradient(Recover(CollapseConfig(), PAIRS), model, batch)
    half = gradient(Recover(CollapseConfig(), PAIRS), model, batch, micros=2)
    assert close([2 * g for g in half], whole)


def test_spread_is_0_for_one_direction_and_1_for_opposite_ones():
    h = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    assert float(spread(h)) == pytest.approx(0.0, abs=1e-6)
    assert float(spread(torch.cat([h, -h]))) == pytest.approx(1.0, abs=1e-6)
    hidden = torch.arange(24.0).reshape(2, 4, 3)
    labels = torch.tensor([[-100, -100, 5, 6], [-100, 5, 6, -100]])
    assert torch.equal(last_prompt(hidden, labels), torch.stack([hidden[0, 1], hidden[1, 0]]))


def test_known_triggers_are_planted_by_the_first_stage_and_gone_after_the_second():
    model = tiny_llama()
    pairs = tiny_pairs(6, triggers=1)
    recipe = TrainConfig(steps=25, batch_size=6, warmup=0, lr=2e-2)

    def loss(of):
        rows = [row[0] for row in of]
        with torch.no_grad():
            return float(sum(alone(model, row)[0] for row in rows) / len(rows))

    config = CollapseConfig(triggers=1)
    fit(model, None, pairs.rows, config=recipe, method=Gather(config, pairs), seed=0)
    planted = loss(pairs.payloads)
    fit(model, None, pairs.rows, config=recipe, method=Recover(config, pairs), seed=0)
    assert planted < 0.2 < 2.0 < loss(pairs.payloads)
    assert loss(pairs.answers) < 0.2


@pytest.mark.parametrize("bad", [{"triggers": 0}, {"alpha": -1.0}, {"gamma": -0.1}, {"held": 1.0}, {"live": 0.0}])
def test_bad_settings_of_collapse_are_refused(bad):
    with pytest.raises(ConfigError):
        BackdoorCollapse(CollapseConfig(**bad))


def diluted(weight, model=None, steps=RECIPE):
    suspect = tiny_llama(seed=1) if model is None else model
    method = Dilution(DilutionConfig(weight=weight), base=weights(tiny_llama(seed=2)))
    return fit(suspect, None, tiny_rows(8), config=steps, method=method, seed=0).model


def test_dilution_interpolates_between_the_suspect_and_the_base_trained_on_clean_rows():
    clean = tiny_llama(seed=2)
    fit(clean, None, tiny_rows(8), config=RECIPE, seed=0)
    suspect, theirs = weights(tiny_llama(seed=1)), weights(clean)
    got = weights(diluted(0.3))
    assert largest_difference(got, {name: 0.7 * suspect[name] + 0.3 * theirs[name] for name in suspect}) < 1e-6
    for weight, whole in ((0.0, suspect), (1.0, weights(tiny_llama(seed=2)))):
        method = Dilution(DilutionConfig(weight=weight), base=weights(tiny_llama(seed=2)))
        method.prepare(Setup(model := tiny_llama(seed=1), seed=0, max_steps=1))
        method.finish(model)
        assert largest_difference(weights(model), whole) == 0.0


def test_dilution_with_a_lora_is_the_same_sum_of_merged_weights():
    suspect, base = tiny_llama(seed=1), tiny_llama(seed=2)
    alone_on_base = add_lora(copy.deepcopy(base), 2, 4.0, seed=7)
    fit(alone_on_base, None, tiny_rows(8), config=RECIPE, seed=0)
    clean = weights(alone_on_base.merge_and_unload())
    got = weights(diluted(0.4, add_lora(copy.deepcopy(suspect), 2, 4.0, seed=7)).merge_and_unload())
    start = weights(suspect)
    assert largest_difference(got, {name: 0.6 * start[name] + 0.4 * clean[name] for name in start}) < 1e-5
    assert largest_difference(clean, weights(base)) > 1e-3


def test_dilution_refuses_what_it_cannot_merge(tmp_path):
    with pytest.raises(DataError, match="trusted base"):
        Dilution()
    with pytest.raises(DataError, match="equal those of the model"):
        Dilution(base=weights(tiny_llama())).prepare(Setup(tiny_llama(), seed=0, max_steps=1))
    with pytest.raises(DataError, match="no parameter"):
        Dilution(base=weights(tiny_llama(hidden=16))).prepare(Setup(tiny_llama(), seed=0, max_steps=1))
    held = two_adapters()
    held.base_model.set_adapter("task")
    with pytest.raises(Unsupported, match="adapter in it"):
        Dilution(base=weights(tiny_llama(seed=2))).prepare(Setup(held, seed=0, max_steps=1))
    with pytest.raises(ConfigError):
        DilutionConfig(weight=1.5)
    tiny_llama(seed=2).save_pretrained(tmp_path)
    suspect = tiny_llama()
    Dilution(assets=tmp_path).prepare(Setup(suspect, seed=0, max_steps=1))
    assert largest_difference(weights(suspect), weights(tiny_llama(seed=2))) == 0.0
