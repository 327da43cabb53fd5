"""MB-Defense, stage 2: its gradient against one graph, its anchor, its pairs, and what it refuses."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch

from casehard.data.batches import collate
from casehard.defences.mb_defense.method import PRESETS, MbStage2, MbStage2Config, preset
from casehard.defences.mb_defense.pairs import PairSet, read_pairs
from casehard.errors import ConfigError, Corrupt, DataError, Diverged
from casehard.maths.neutralise import coarse_kl, joint_loss, pair_up, top_k
from casehard.model.adapters import add_lora
from casehard.train.fit import fit
from casehard.train.protocol import Setup, Step
from casehard.train.recipe import TrainConfig
from fakes import largest_difference, tiny_llama, tiny_pairs, tiny_rows, weights

PAIRS = tiny_pairs(12, triggers=3)


def method_for(model, *, micros=1, pairs=PAIRS, **settings):
    method = MbStage2(MbStage2Config(**settings), pairs=pairs)
    method.prepare(Setup(model, seed=0, max_steps=10, micros=micros))
    return method


def one(method, model, rows, *, index=0, micros=1):
    """Run one optimiser step on rows of the pairs; return gradients, loss and telemetry."""
    log: dict[str, list[float]] = {}
    model.zero_grad()
    total = 0.0
    for micro, part in enumerate(rows[k::micros] for k in range(micros)):
        batch = collate([method.pairs.clean[i] for i in part], 0)
        step = Step(
            index,
            micro,
            micros,
            lambda m, b: m(**b).loss / micros,
            lambda x: x.backward(),
            lambda v: [log.setdefault(k, []).append(x) for k, x in v.items()],
        )
        total += float(method.backward(model, batch, step))
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()], total, log


def close(a, b, atol=1e-6):
    return all(torch.allclose(x, y, atol=atol, rtol=1e-5) for x, y in zip(a, b, strict=True))


def moved(model, amount=0.05):
    out = copy.deepcopy(model)
    with torch.no_grad():
        for i, p in enumerate(out.parameters()):
            if p.requires_grad:
                p.add_(amount * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return out


def naive(model, start, rows, *, lam=1.0, beta=1.0, mu=1.0, kappa=1.0, k=64, triggers=(0, 1, 2)):
    """Equation (4) in one graph, all triggers averaged."""
    clean = collate([PAIRS.clean[i] for i in rows], 0)
    out = model(**clean)
    loss = out.loss
    keep = clean["labels"][:, 1:] != -100
    with torch.no_grad():
        target = top_k(start(**clean).logits[:, :-1][keep], k)
    loss = loss + kappa * coarse_kl(target, out.logits[:, :-1][keep]).mean()
    for j in triggers:
        pair = pair_up(*(collate([of[i][j] for i in rows], 0) for of in (PAIRS.answers, PAIRS.payloads)))
        loss = loss + joint_loss(model, pair, lam=lam, beta=beta, mu=mu) / len(triggers)
    return loss


@pytest.mark.parametrize("settings", [{}, {"mu": 0.0, "kappa": 0.0}, {"lam": 0.3, "beta": 2.0, "kappa": 0.0}])
def test_gradient_is_that_of_the_whole_objective(settings):
    start = tiny_llama()
    model = moved(start)
    method = method_for(start, triggers=0, **settings)
    rows = [0, 3, 7, 8]
    got, value, log = one(method, model, rows)
    want = naive(model, start, rows, **settings)
    assert close(got, torch.autograd.grad(want, list(model.parameters())))
    assert value == pytest.approx(float(want.detach()), rel=1e-5)
    assert {"log_ratio", "preference", "triggered_loss"} <= set(log)


def test_adapters_are_anchored_to_their_own_start():
    start = add_lora(tiny_llama(), 4, 8.0, seed=1)
    start = moved(start)
    method = method_for(start, triggers=0)
    before = weights(start)
    model = moved(start)
    got, _, _ = one(method, model, [1, 2, 5])
    want = naive(model, start, [1, 2, 5])
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(want, trained)
    assert close([g for g, p in zip(got, model.parameters(), strict=True) if p.requires_grad], expected)
    assert all(not g.any() for g, p in zip(got, model.parameters(), strict=True) if not p.requires_grad)
    assert largest_difference(before, weights(start)) == 0


@pytest.mark.parametrize("lora", [False, True])
def test_the_anchor_pulls_nowhere_at_its_reference(lora):
    model = add_lora(tiny_llama(), 4, 8.0) if lora else tiny_llama()
    model = moved(model)
    plain = method_for(model, lam=0.0, mu=0.0, kappa=0.0)
    anchored = method_for(model, lam=0.0, mu=0.0, kappa=5.0, top_k=8)
    a, value, _ = one(plain, model, [0, 1, 2])
    b, other, log = one(anchored, model, [0, 1, 2])
    assert close(a, b) and value == pytest.approx(other, abs=1e-6)
    assert log["kl"][0] == pytest.approx(0.0, abs=1e-6)


def test_without_lambda_and_extras_it_is_cross_entropy():
    model = tiny_llama()
    method = method_for(model, lam=0.0, mu=0.0, kappa=0.0)
    got, value, log = one(method, model, [0, 4, 9])
    loss = model(**collate([PAIRS.clean[i] for i in (0, 4, 9)], 0)).loss
    assert close(got, torch.autograd.grad(loss, list(model.parameters())), atol=1e-6)
    assert value == pytest.approx(float(loss.detach()), abs=1e-6) and not log
    assert method.sequences == 3


def test_accumulation_is_one_big_batch():
    model = tiny_llama()
    # Rows of one length: the stand-in loss of ``one`` averages each micro-batch over its own tokens.
    rows = [i for i, row in enumerate(PAIRS.clean) if len(row.input_ids) == 12][:2]
    rows = rows * 2
    big, _, _ = one(method_for(model, triggers=0, kappa=0.0), model, rows)
    small, _, _ = one(method_for(model, triggers=0, kappa=0.0, micros=2), model, rows, micros=2)
    assert close(big, small)


def test_draws_are_a_function_of_seed_and_step():
    model = tiny_llama()
    a, b = (method_for(model, triggers=2) for _ in range(2))
    step = Step(5, 0, 1, None, None)
    drawn = a._draw(40, step)
    assert drawn == b._draw(40, step) != a._draw(40, Step(6, 0, 1, None, None))
    assert all(len(set(row)) == 2 for row in zip(*drawn, strict=True))
    assert {j for one_pass in drawn for j in one_pass} == {0, 1, 2}
    assert method_for(model, triggers=0)._draw(2, step) == [[0, 0], [1, 1], [2, 2]]
    assert method_for(model, triggers=9)._draw(2, step) == [[0, 0], [1, 1], [2, 2]]


def train(model, steps=60, **settings):
    method = MbStage2(MbStage2Config(**settings), pairs=PAIRS)
    config = TrainConfig(steps=steps, batch_size=4, lr=5e-3, warmup=2, precision="fp32")
    fit(model, None, PAIRS.rows, config=config, method=method, seed=0)
    return method


def chances(model):
    """Mean log p(y | x_d) and log p(y_d | x_d) a token."""
    with torch.no_grad():
        return [
            -float(model(**collate([row[j] for row in rows for j in range(3)], 0)).loss)
            for rows in (PAIRS.answers, PAIRS.payloads)
        ]


def test_training_breaks_the_payload_and_mu_brings_the_answer_back():
    planted = tiny_llama()
    both = [*PAIRS.clean, *(row[j] for row in PAIRS.payloads for j in range(3))]
    install = type(PAIRS.rows)(tuple(both), 0)
    fit(planted, None, install, config=TrainConfig(steps=150, batch_size=12, lr=5e-3, precision="fp32"), seed=0)
    answer, payload = chances(planted)
    assert payload > -0.3 and answer < payload
    after = {}
    for name, settings in {"plain": {"lam": 0.0, "mu": 0.0}, "paper": {"mu": 0.0}, "default": {}}.items():
        model = copy.deepcopy(planted)
        train(model, **{"kappa": 0.0, **settings})
        after[name] = chances(model)
    assert after["plain"][1] > -1.0, "clean rows alone leave the payload alive"
    assert after["paper"][1] < -3.0 and after["default"][1] < -3.0
    assert after["default"][0] > after["paper"][0] > after["plain"][0]


def test_only_adapters_move_and_merging_keeps_the_logits():
    model = add_lora(tiny_llama(), 4, 8.0)
    before = weights(model)
    train(model, steps=5)
    after = weights(model)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed and all("lora_" in name for name in changed)
    batch = {"input_ids": torch.tensor([[3, 4, 5, 6]])}
    with torch.no_grad():
        wrapped = model(**batch).logits
        merged = model.merge_and_unload()(**batch).logits
    assert torch.allclose(wrapped, merged, atol=1e-5)


def test_full_training_moves_every_parameter():
    model = tiny_llama()
    before = weights(model)
    train(model, steps=5)
    assert all(not torch.equal(before[n], w) for n, w in weights(model).items())


def test_sequences_are_counted():
    model = tiny_llama()
    method = method_for(model, triggers=2, kappa=0.0)
    one(method, model, [0, 1, 2])
    assert (method.sequences, method.forwards) == (3 + 2 * 2 * 3, 2 * 3)
    assert method_for(model).forwards == len(PAIRS), "one forward pass a clean row for the anchor"


def test_pairs_survive_the_disk_and_damage_is_noticed(tmp_path):
    PAIRS.write(tmp_path)
    again = read_pairs(tmp_path)
    assert again == PAIRS and again.digest == PAIRS.digest and again.triggers == 3
    assert MbStage2(assets=tmp_path).pairs == PAIRS
    record = json.loads((tmp_path / "pairs.json").read_text())
    record["clean"][0][0][0] += 1
    (tmp_path / "pairs.json").write_text(json.dumps(record))
    with pytest.raises((Corrupt, DataError)):
        read_pairs(tmp_path)
    (tmp_path / "pairs.json").write_text("{}")
    with pytest.raises(Corrupt, match="not a set of pairs"):
        read_pairs(tmp_path)
    with pytest.raises(DataError, match=r"no pairs\.json"):
        read_pairs(tmp_path / "nowhere")


def test_pairs_that_are_none_are_refused():
    with pytest.raises(DataError, match="clean set is empty"):
        PairSet((), (), (), 0)
    with pytest.raises(DataError, match="different prompts"):
        PairSet(PAIRS.clean, PAIRS.answers, tuple(row[::-1] for row in PAIRS.payloads), 0)
    with pytest.raises(DataError, match="leaves no trace"):
        PairSet(PAIRS.clean, tuple((row,) for row in PAIRS.clean), tuple((row,) for row in PAIRS.clean), 0)
    with pytest.raises(DataError, match="twins of"):
        PairSet(PAIRS.clean, PAIRS.answers[:-1], PAIRS.payloads, 0)


def test_rows_without_twins_and_missing_pairs_are_refused():
    model = tiny_llama()
    method = method_for(model)
    with pytest.raises(DataError, match="no triggered twins"):
        method.pairs.find(collate(tiny_rows(3, seed=9).rows, 0))
    with pytest.raises(DataError, match="needs clean rows"):
        MbStage2()
    assert method.pairs.find(collate(PAIRS.clean[3:6], 0)) == [3, 4, 5]


def test_scores_that_are_not_finite_stop_the_run():
    model = tiny_llama()
    method = method_for(model, kappa=0.0)
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    with pytest.raises(Diverged, match="not finite"):
        one(method, model, [0])


def test_settings():
    for bad in ({"lam": -1.0}, {"beta": 0.0}, {"mu": -1.0}, {"kappa": -1.0}, {"triggers": -1}, {"prefix": 0}):
        with pytest.raises(ConfigError):
            MbStage2Config(**bad)
    assert preset("paper", lam=2.0) == MbStage2Config(mu=0.0, kappa=0.0, triggers=0, lam=2.0)
    with pytest.raises(ConfigError, match="unknown"):
        preset("papper")
    with pytest.warns(UserWarning, match="does nothing"):
        MbStage2(PRESETS["paper_literal"], pairs=PAIRS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MbStage2(pairs=PAIRS)
