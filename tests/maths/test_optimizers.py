"""What is read off an optimiser against what it really did."""

from __future__ import annotations

import pytest
import torch

from casehard.errors import Unsupported
from casehard.maths.optimizers import FLOOR, OptimizerView, learning_rate

MAKERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1, betas=(0.8, 0.9)),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1, fused=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.02, foreach=True),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1, amsgrad=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, weight_decay=0.1),
}


def trained(maker, steps=3):
    g = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(4, 3, generator=g)), torch.nn.Parameter(torch.randn(5, generator=g))]
    optimizer = maker(parameters)
    for _ in range(steps):
        before = [p.detach().clone() for p in parameters]
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=g)
        parameters[0].grad[1] = 0
        optimizer.step()
    return parameters, optimizer, before


@pytest.mark.parametrize("name", MAKERS)
def test_last_step_is_the_step_that_was_taken(name):
    parameters, optimizer, before = trained(MAKERS[name])
    view = OptimizerView(optimizer, parameters, [p.grad for p in parameters])
    assert view.knows_step
    for i, (p, old) in enumerate(zip(parameters, before, strict=True)):
        assert torch.allclose(view.last_step(i), p.detach() - old, atol=3e-7)


@pytest.mark.parametrize("name", ["adamw", "adamw-fused", "adamw-amsgrad"])
def test_metric_is_the_inverse_root_of_the_corrected_second_moment(name):
    parameters, optimizer, _ = trained(MAKERS[name])
    view = OptimizerView(optimizer, parameters, floor=0.0)
    beta = optimizer.param_groups[0]["betas"][1]
    for i, p in enumerate(parameters):
        v = optimizer.state[p]["max_exp_avg_sq" if "amsgrad" in name else "exp_avg_sq"] / (1 - beta**3)
        g = torch.randn_like(p)
        want = torch.where(v > 0, g / (v.sqrt() + 1e-8), torch.zeros(()))
        assert torch.allclose(view.metric(i, g), want, rtol=1e-5)
    assert float(view.metric(0, torch.ones(4, 3))[1].abs().max()) == 0, "a row the optimiser never moved stays"


def test_floor_bounds_the_metric_whatever_the_split():
    flat = torch.nn.Parameter(torch.zeros(6))
    optimizer = torch.optim.AdamW([flat], lr=0.1)
    flat.grad = torch.tensor([1e-7, 1.0, 1.0, 1.0, 0.0, 1e-6])
    optimizer.step()
    got = OptimizerView(optimizer, [flat]).metric(0, torch.ones(6))
    typical = (3.0 / 5) ** 0.5
    assert float(got[0]) == pytest.approx(1 / (FLOOR * typical), rel=1e-3)
    assert got[4] == 0 and float(got[1]) == pytest.approx(1.0, rel=1e-3)

    parts = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    split = torch.optim.AdamW(parts, lr=0.1)
    for i, p in enumerate(parts):
        p.grad = flat.grad[2 * i : 2 * i + 2].clone()
    split.step()
    view = OptimizerView(split, parts)
    assert torch.allclose(torch.cat([view.metric(i, torch.ones(2)) for i in range(3)]), got)


def test_reading_adds_nothing_to_the_state():
    parameters, optimizer, _ = trained(MAKERS["adamw"])
    stranger = torch.nn.Parameter(torch.zeros(2))
    view = OptimizerView(optimizer, [*parameters, stranger])
    assert float(view.metric(2, torch.ones(2)).abs().max()) == 0 and float(view.last_step(2).abs().max()) == 0
    assert stranger not in optimizer.state and len(optimizer.state) == 2
    assert learning_rate(optimizer) == 0.02


def test_momentum_is_refused():
    parameters, optimizer, _ = trained(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    view = OptimizerView(optimizer, parameters, [p.grad for p in parameters])
    assert view.is_sgd and not view.knows_step
    with pytest.raises(Unsupported, match="last update"):
        view.last_step(0)
