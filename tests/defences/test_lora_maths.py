"""Lisa and SafeGrad where only an adapter trains: their terms are of A and B, by their definition."""

from __future__ import annotations

import pytest
import torch
from test_spard_lora import adapted

from casehard.defences.lisa import Lisa, LisaConfig
from casehard.defences.safegrad import SafeGrad, SafeGradConfig
from casehard.train.protocol import Setup, Step
from fakes import tiny_rows

USER, SAFE = tiny_rows(8, seed=1), tiny_rows(8, seed=2)


def step_of(index):
    return Step(index, 0, 1, lambda m, b: m(**b).loss, lambda loss: loss.backward())


def trained(model):
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert named and all("lora_" in n for n in named)
    return named


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients]).double()


def test_lisa_holds_a_and_b_near_their_anchor():
    model, rho = adapted(), 3.0
    method = Lisa(LisaConfig(safe_steps=1, user_steps=3, rho=rho), safe=SAFE)
    method.prepare(Setup(model, seed=0, max_steps=4))
    anchor = {n: p.detach().clone() for n, p in trained(model).items()}
    with torch.no_grad():
        for p in trained(model).values():
            p.add_(0.01)
    batch = USER.batch_at(4, seed=0, step=0, purpose="x")
    plain = model(**batch).loss
    found = method.loss(model, batch, step_of(2))
    held = sum(((p - anchor[n]) ** 2).sum() for n, p in trained(model).items())
    assert float(found - plain) == pytest.approx(float(rho / 2 * held), rel=1e-4)
    found.backward()
    assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)
    assert {n.removeprefix("anchor.") for n in method.state()} == set(anchor)


def test_safegrad_takes_out_of_the_adapters_gradient_what_works_against_alignment():
    model = adapted()
    method = SafeGrad(SafeGradConfig(alignment="ce", weight=0.5), safe=SAFE)
    method.prepare(Setup(model, seed=0, max_steps=1))
    model.eval()
    batch = USER.batch_at(4, seed=0, step=0, purpose="x")
    leaves = list(trained(model).values())
    user = flat(torch.autograd.grad(model(**batch).loss, leaves))
    safe = SAFE.batch_at(4, seed=0, step=0, purpose="safegrad")
    align = flat(torch.autograd.grad(model(**safe).loss, leaves))
    if user @ align < 0:
        user = user - (user @ align) / (align @ align) * align
    method.backward(model, batch, step_of(0))
    assert torch.allclose(flat([p.grad for p in leaves]), user + 0.5 * align, atol=1e-6)
    assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)


def test_safegrads_reference_shares_the_frozen_base_and_copies_the_factors():
    model = adapted()
    method = SafeGrad(safe=SAFE)
    method.prepare(Setup(model, seed=0, max_steps=1))
    for name, p in model.named_parameters():
        assert (method._start[name] is p) == (not p.requires_grad), name
