"""Patcher's neighbours of the alignment stage: one-step gradients against twins that are written out slowly."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from casehard.data.batches import EncodedSet
from casehard.defences import DEFENCES, vaccine
from casehard.defences.booster import Booster, BoosterConfig
from casehard.defences.tar import Tar, TarConfig, points, representation_distance, tamper_loss
from casehard.defences.vaccine import Vaccine, VaccineConfig
from casehard.errors import ConfigError, DataError, Unsupported
from casehard.maths.bilevel import Attacker, simulate_attack
from casehard.model.adapters import add_lora
from casehard.seeds import derive
from casehard.train.fit import fit
from casehard.train.protocol import Setup, Step
from casehard.train.recipe import TrainConfig
from fakes import largest_difference, tiny_llama, tiny_rows, weights

USER, UNSAFE, HARMLESS = tiny_rows(24, seed=1), tiny_rows(10, seed=2), tiny_rows(10, seed=3)
EMPTY = EncodedSet((), pad_id=0)


def model_of(kind):
    """Return a model to align, all weights or an adapter, whose B is not zero so that A has a gradient."""
    if kind == "full":
        return tiny_llama()
    model = add_lora(tiny_llama(), rank=3, alpha=6.0, seed=1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return model


def user_batch(index=0):
    return USER.batch_at(4, seed=0, step=index, purpose="outer")


def one(method, model, *, index=0, micros=1):
    """Run the backward passes of one optimiser step; return trained gradients and telemetry."""
    log = {}
    method.prepare(Setup(model, seed=5, max_steps=10, micros=micros))
    for micro in range(micros):
        step = Step(index, micro, micros, lambda m, b: m(**b).loss / micros, lambda x: x.backward(), log.update)
        method.backward(model, user_batch(index * micros + micro), step)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}, log


def gradients(model, loss):
    """Return the gradients of the trained weights by name."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values()), materialize_grads=True), strict=True))


def sizes(tensors):
    return math.sqrt(sum(t.detach().double().square().sum().item() for t in tensors))


def layered(model, batch, pushes, seen=None):
    """Return the mean loss of a batch (B, T), layer by layer, with a push added to what enters each layer."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    llama, ids = base.model, batch["input_ids"]
    at = torch.arange(ids.shape[1])[None]
    hidden = llama.embed_tokens(ids)
    rotary = llama.rotary_emb(hidden, at)
    later = torch.full((ids.shape[1], ids.shape[1]), -1e9).triu(1)[None, None]
    for number, layer in enumerate(llama.layers):
        hidden = hidden + pushes[number]
        if seen is not None:
            hidden = hidden if hidden.requires_grad else hidden.detach().requires_grad_()
            seen.append(hidden)
        out = layer(hidden, attention_mask=later, position_embeddings=rotary)
        hidden = out[0] if isinstance(out, tuple) else out
    logits = base.lm_head(llama.norm(hidden))[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("where", ["layers", "embeddings"])
def test_vaccine_is_the_gradient_at_pushed_embeddings(kind, where):
    rho = 0.7
    got, log = one(Vaccine(VaccineConfig(rho=rho, where=where)), model_of(kind), index=2)
    model, batch, seen = model_of(kind), user_batch(2), []
    plain = layered(model, batch, [0.0, 0.0], seen)
    slopes = list(torch.autograd.grad(plain, seen))
    if where == "embeddings":
        slopes[1] = torch.zeros_like(slopes[1])
    size = sizes(slopes)
    pushes = [(rho * g / size).detach() for g in slopes]
    assert sizes(pushes) == pytest.approx(rho, rel=1e-5)
    worse = layered(model, batch, pushes)
    for name, wanted in gradients(model, worse).items():
        assert torch.allclose(got[name], wanted, atol=1e-6), name
    assert log["pushed_loss"] == pytest.approx(worse.item(), abs=1e-5)
    assert worse.item() > plain.item()


def test_a_short_push_raises_the_loss_by_its_length_times_the_slope():
    model, batch = tiny_llama(), user_batch()
    loss, slopes = vaccine.slopes_of(lambda: model(**batch).loss, list(model.model.layers))
    assert all(p.grad is None for p in model.parameters())
    size, rho = sizes(slopes), 1e-2
    with vaccine.pushed_by(model.model.layers, [rho / size * g for g in slopes]):
        pushed = model(**batch).loss
    assert (pushed - loss).item() / rho == pytest.approx(size, rel=0.05)
    assert torch.equal(model(**batch).loss, loss), "the hooks are gone"


def test_the_push_survives_gradient_checkpointing():
    def run(checkpointing):
        model = tiny_llama()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return one(Vaccine(VaccineConfig(rho=0.5)), model)[0]

    assert largest_difference(run(False), run(True)) < 1e-6


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_booster_is_three_gradients(kind):
    lam, alpha = 3.0, 0.2
    method = Booster(BoosterConfig(weight=lam, alpha=alpha, batch_size=3), unsafe=UNSAFE)
    model = model_of(kind)
    before = weights(model)
    got, log = one(method, model, index=1)
    assert largest_difference(before, weights(model)) == 0, "the weights are never moved"
    twin, rows = model_of(kind), UNSAFE.batch_at(3, seed=5, step=1, purpose="booster")
    f = gradients(twin, twin(**user_batch(1)).loss)
    h_here = twin(**rows).loss
    h = gradients(twin, h_here)
    size = sizes(h.values())
    with torch.no_grad():
        for name, p in twin.named_parameters():
            if name in h:
                p.sub_(alpha * h[name] / size)
    h_there = twin(**rows).loss
    ahead = gradients(twin, h_there)
    for name in f:
        assert torch.allclose(got[name], f[name] + lam * (h[name] - ahead[name]), atol=2e-6), name
    assert float(log["harmful_drop"]) == pytest.approx((h_here - h_there).item(), abs=1e-5)


def test_booster_lowers_what_a_harmful_step_gains():
    """In the quantity that it minimises, it does better than plain training on the same rows."""

    def drop(lam):
        model = tiny_llama()
        method = Booster(BoosterConfig(weight=lam, alpha=0.3, batch_size=10), unsafe=UNSAFE)
        fit(model, None, USER, config=recipe(40), method=method, seed=0)
        _, log = one(Booster(BoosterConfig(weight=1.0, alpha=0.3, batch_size=10), unsafe=UNSAFE), model)
        return float(log["harmful_drop"])

    assert drop(2.0) < 0.8 * drop(0.0)


@pytest.mark.parametrize("objective", ["entropy", "loss"])
def test_tar_is_the_mean_over_the_points_of_one_attack(objective):
    attacker = Attacker(steps=5, lr=2e-2, batch_size=2)
    config = TarConfig(
        attackers=(attacker,),
        every=2,
        objective=objective,
        tamper_weight=3.0,
        retain_weight=0.5,
        representation=0.2,
        tamper_batch_size=3,
        retain_batch_size=3,
    )
    model = tiny_llama()
    method = Tar(config, unsafe=UNSAFE, retain=HARMLESS)
    method.prepare(Setup(model, seed=5, max_steps=10))
    with torch.no_grad():  # training has gone on since
        model.lm_head.weight.add_(0.01)
        model.model.layers[0].mlp.up_proj.weight.mul_(1.3)
    before = weights(model)
    step = Step(4, 0, 1, lambda m, b: m(**b).loss, lambda x: x.backward(), lambda values: None)
    method.backward(model, user_batch(4), step)
    assert largest_difference(before, weights(model)) == 0
    twin = copy.deepcopy(model)
    wanted = {name: 0.5 * g for name, g in gradients(twin, twin(**user_batch(4)).loss).items()}
    start, rows = tiny_llama(), HARMLESS.batch_at(3, seed=5, step=4, purpose="tar-retain")
    for name, g in gradients(twin, 0.5 * 0.2 * naive_distance(twin, start, rows)).items():
        wanted[name] += g
    seed, rows = derive(5, 4, "tar"), UNSAFE.batch_at(3, seed=5, step=4, purpose="tar-resist")
    attacked = copy.deepcopy(model)
    optimiser = torch.optim.AdamW(attacked.parameters(), lr=2e-2, weight_decay=0.01)
    for k in range(1, 6):
        optimiser.zero_grad()
        attacked(**UNSAFE.batch_at(2, seed=seed, step=k - 1, purpose="tar-attack")).loss.backward()
        nn.utils.clip_grad_norm_(attacked.parameters(), 1.0)
        optimiser.step()
        if k in (2, 4, 5):
            for name, g in gradients(attacked, naive_tamper(attacked, rows, objective)).items():
                wanted[name] += 3.0 / 3 * g
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, wanted[name], atol=5e-6, rtol=1e-3), name


def naive_distance(model, start, batch):
    total, count = 0.0, 0
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        row = ids[: int(mask.sum())][None]
        now, was = (m(input_ids=row, output_hidden_states=True).hidden_states[1:] for m in (model, start))
        total = total + sum(((a - b.detach()) ** 2).sum() for a, b in zip(now, was, strict=True)) / len(now)
        count += row.shape[1]
    return total / count


def naive_tamper(model, batch, objective):
    if objective == "loss":
        return -model(**batch).loss
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    parts = [
        torch.distributions.Categorical(logits=logits[i, t - 1]).entropy()
        for i, labels in enumerate(batch["labels"])
        for t in range(1, len(labels))
        if labels[t] != -100
    ]
    return -torch.stack(parts).mean()


def test_the_parts_of_tar_at_their_ends():
    assert points(10, 4) == {4, 8, 10} and points(8, 4) == {4, 8} and points(2, 4) == {2}
    model, batch = tiny_llama(), user_batch()
    assert representation_distance(model, weights(tiny_llama()), batch).item() == 0.0
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert tamper_loss(model, batch, "entropy").item() == pytest.approx(-math.log(64), abs=1e-5)
    assert tamper_loss(model, batch, "loss").item() == pytest.approx(-math.log(64), abs=1e-5)


def test_a_visit_sees_every_step_of_an_attack_and_changes_nothing():
    model, seen = tiny_llama(), []
    theta, attacker = dict(model.named_parameters()), Attacker(steps=3, lr=1e-2, batch_size=2)
    batch_at = UNSAFE.stream(2, seed=0, purpose="t")

    def visit(i, attacked):
        seen.append((i, {name: value.detach().clone() for name, value in attacked.items()}))

    watched = simulate_attack(model, theta, batch_at, attacker, seed=0, visit=visit)
    alone = simulate_attack(model, theta, batch_at, attacker, seed=0)
    assert [i for i, _ in seen] == [0, 1, 2]
    assert largest_difference(watched.weights, alone.weights) == 0
    assert largest_difference(seen[-1][1], watched.weights) == 0
    assert (
        largest_difference(seen[0][1], simulate_attack(model, theta, batch_at, attacker, seed=0, steps=1).weights) == 0
    )


def recipe(steps=4):
    return TrainConfig(steps=steps, batch_size=4, lr=3e-3, precision="fp32", warmup=0, schedule="constant")


@pytest.mark.parametrize(
    "method",
    [
        Vaccine(VaccineConfig(rho=0.0)),
        Booster(BoosterConfig(weight=0.0), unsafe=UNSAFE),
        Tar(TarConfig(tamper_weight=0.0, representation=0.0), unsafe=UNSAFE),
    ],
    ids=lambda method: method.name,
)
def test_at_strength_zero_each_is_plain_training_bit_for_bit(method):
    plain, other = tiny_llama(dropout=0.2), tiny_llama(dropout=0.2)
    first = fit(plain, None, USER, config=recipe(), seed=0)
    second = fit(other, None, USER, config=recipe(), method=method, seed=0)
    assert largest_difference(weights(plain), weights(other)) == 0
    assert first.budget.passes == second.budget.passes


def test_what_a_step_costs_is_counted():
    def passes(method):
        return fit(tiny_llama(), None, USER, config=recipe(), method=method, seed=0).budget.passes

    assert passes(Vaccine()) == 4 * 2
    assert passes(Booster(unsafe=UNSAFE)) == 4 * 3
    attackers = (Attacker(steps=5, lr=1e-3, batch_size=2),)
    tamper = TarConfig(attackers=attackers, every=2)
    assert passes(Tar(tamper, unsafe=UNSAFE, retain=HARMLESS)) == 4 * (1 + 5 + 3 + 1)


def test_what_cannot_work_is_refused(monkeypatch):
    with pytest.raises(DataError, match="no unsafe rows"):
        Booster(unsafe=EMPTY)
    with pytest.raises(DataError, match="no unsafe rows"):
        Tar(unsafe=EMPTY)
    with pytest.raises(DataError, match="needs harmless rows"):
        Tar(unsafe=UNSAFE)
    with pytest.raises(DataError, match="would be ignored"):
        Tar(TarConfig(representation=0.0), unsafe=UNSAFE, retain=HARMLESS)
    with pytest.raises(ConfigError, match="at least one"):
        TarConfig(attackers=())
    with pytest.raises(ConfigError, match="at least one step"):
        TarConfig(attackers=(Attacker(steps=0),))
    with pytest.raises(ConfigError):
        VaccineConfig(rho=-1.0)
    with pytest.raises(Unsupported, match="frozen"):
        Tar(unsafe=UNSAFE, retain=HARMLESS).prepare(Setup(model_of("lora"), seed=0, max_steps=1))
    with pytest.raises(Unsupported, match="vanish"):
        Booster(unsafe=UNSAFE).prepare(Setup(tiny_llama().to(torch.bfloat16), seed=0, max_steps=1))
    monkeypatch.setattr("casehard.distributed.ranks.world", lambda: 2)
    for method in (Vaccine(), Booster(unsafe=UNSAFE), Tar(unsafe=UNSAFE, retain=HARMLESS)):
        with pytest.raises(Unsupported, match="one process"):
            method.prepare(Setup(tiny_llama(), seed=0, max_steps=1))


@pytest.mark.parametrize("name", ["vaccine", "booster", "tar"])
def test_the_published_settings_are_a_preset(name):
    paper = DEFENCES[name].configure(name, "paper")
    if name == "vaccine":
        assert (paper.rho, paper.where) == (2.0, "layers")
    elif name == "booster":
        assert (paper.weight, paper.alpha, paper.batch_size) == (5.0, 0.1, 10)
    else:
        assert {a.steps for a in paper.attackers} == {64}
        assert (paper.objective, paper.tamper_weight, paper.retain_weight) == ("entropy", 4.0, 1.0)
        assert paper.representation == 1.0
