"""SPAG where only an adapter trains: the projection acts on A and B, by its closed form, and the base stays."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from test_spard import EAGER, SAFE, adamw, drive, same, weights

from casehard.defences.spard import Spard, SpardConfig
from casehard.model.adapters import add_lora
from fakes import tiny_llama


def adapted(dropout=0.0, *, started=True):
    """A model with an adapter on two kinds of layer; ``started`` gives B values, so that A has a gradient too."""
    model = add_lora(tiny_llama(dropout=dropout), 4, 8.0, ["q_proj", "v_proj"], seed=3)
    if started:
        g = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.copy_(0.05 * torch.randn(p.shape, generator=g))
    return model


def factors(model):
    """Return A and B by name, and everything else, as copies."""
    named = {n: p.detach().clone() for n, p in model.named_parameters()}
    return {n: p for n, p in named.items() if "lora_" in n}, {n: p for n, p in named.items() if "lora_" not in n}


def loss_by_hand(model, a_and_b, batch):
    """The safety loss as a function of A and B alone: W + (alpha / r) B A put into a bare model, dense."""
    bare, changed = tiny_llama(), {}
    for name, w in bare.named_parameters():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.default.weight" in a_and_b:
            b, a = a_and_b[f"{key}.lora_B.default.weight"], a_and_b[f"{key}.lora_A.default.weight"]
            changed[name] = w.detach() + 2.0 * b @ a
        else:
            changed[name] = w.detach()
    bare.eval()
    return torch.func.functional_call(bare, changed, kwargs=batch).loss


@pytest.mark.parametrize("mode", ["euclidean", "adam"])
@pytest.mark.parametrize("eta_safe", [math.inf, 1e-4, "lr"])
def test_in_adapter_space_the_step_is_the_closed_form_in_a_and_b(mode, eta_safe):
    model, log = adapted(), []
    config = SpardConfig(**EAGER, mode=mode, eta_safe=eta_safe)
    optimizer = adamw(model)
    shadow = copy.deepcopy(model)
    shadow_optimizer = adamw(shadow)
    drive(None, shadow, 1, optimizer=shadow_optimizer)
    drive(Spard(config, safe=SAFE), model, 1, optimizer=optimizer, log=log)

    plus, base = factors(shadow)  # theta+, where the user's step has left A and B
    leaves = {n: p.clone().requires_grad_() for n, p in plus.items()}
    batch = SAFE.batch_at(config.batch_size, seed=0, step=0, purpose="spard-safe")
    loss = loss_by_hand(shadow, leaves, batch)
    g = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    metric = {n: torch.ones_like(p) for n, p in plus.items()}
    if mode == "adam":
        named = dict(shadow.named_parameters())
        v = {n: shadow_optimizer.state[named[n]]["exp_avg_sq"] / (1 - 0.999) for n in plus}
        live = torch.cat([x[x > 0] for x in v.values()]).double()
        least = config.floor * float(live.mean().sqrt())
        metric = {n: torch.where(x > 0, 1 / (x.sqrt() + 1e-8).clamp(min=least), torch.zeros(())) for n, x in v.items()}
    square = sum(float((g[n].double() * metric[n].double() * g[n].double()).sum()) for n in g)
    violation = float(loss.detach()) - config.tau
    alpha = min(violation / square, 1e-2 if eta_safe == "lr" else eta_safe)

    got, still = factors(model)
    assert all(torch.equal(still[n], base[n]) for n in base), "the frozen base does not move"
    for n in got:
        want = -alpha * metric[n] * g[n]
        assert torch.allclose(got[n] - plus[n], want, atol=1e-6 + 1e-3 * float(want.abs().max())), n
    assert {n.split(".")[-3] for n in got if not torch.equal(got[n], plus[n])} == {"lora_A", "lora_B"}
    assert log[-1]["alpha"] == pytest.approx(alpha, rel=1e-3)
    assert log[-1]["violation"] == pytest.approx(violation, rel=1e-4)


@pytest.mark.parametrize("mode", ["euclidean", "adam"])
def test_in_adapter_space_the_safety_loss_meets_its_first_order_promise(mode):
    """Uncapped, l + <g, step> = tau; the loss itself is off by the curvature, which falls with the step squared."""
    errors, sizes = [], (0.04, 0.02)
    for violation in sizes:
        model = adapted()
        shadow, optimizer = copy.deepcopy(model), adamw(model, lr=1e-4)
        drive(None, shadow, 1, optimizer=adamw(shadow, lr=1e-4))
        batch = SAFE.batch_at(4, seed=0, step=0, purpose="spard-safe")
        shadow.eval()
        tau = float(shadow(**batch).loss.detach()) - violation
        config = SpardConfig(tau=tau, delta=0.0, batch_size=4, mode=mode, eta_safe=math.inf)
        log = []
        drive(Spard(config, safe=SAFE), model, 1, optimizer=optimizer, log=log)
        assert log[-1]["residual"] == pytest.approx(0.0, abs=1e-6)
        model.eval()
        errors.append(abs(float(model(**batch).loss.detach()) - tau))
    assert errors[0] < 0.5 * sizes[0]
    assert errors[1] < 0.35 * errors[0] + 2e-6  # a quarter, were it the second order alone


@pytest.mark.parametrize("mode", ["euclidean", "adam"])
def test_in_adapter_space_the_setting_of_embeddings_does_not_matter(mode):
    made = []
    for embeddings in (False, True):
        model = adapted(started=False)
        drive(Spard(SpardConfig(**EAGER, mode=mode, embeddings=embeddings), safe=SAFE), model, 3)
        made.append(weights(model))
    assert same(*made)


@pytest.mark.parametrize("mode", ["euclidean", "adam"])
def test_on_a_fresh_adapter_the_first_projection_moves_b_and_the_next_moves_both(mode):
    """B = 0 makes the gradient of A vanish; after one update of the user B is there, and A has one too."""
    model = adapted(started=False)
    before, _ = factors(model)
    optimizer = adamw(model, lr=0.0)
    drive(Spard(SpardConfig(**EAGER, mode=mode, eta_safe=1e-3), safe=SAFE), model, 1, optimizer=optimizer)
    after, _ = factors(model)
    moved = {n.split(".")[-3] for n in after if not torch.equal(after[n], before[n])}
    assert moved == {"lora_B"}
    drive(Spard(SpardConfig(**EAGER, mode=mode, eta_safe=1e-3), safe=SAFE), model, 2)
    later, _ = factors(model)
    assert {n.split(".")[-3] for n in later if not torch.equal(later[n], after[n])} == {"lora_A", "lora_B"}
