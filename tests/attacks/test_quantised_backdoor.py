"""A backdoor that sleeps until the weights are rounded: the box holds what rounds alike, and rounding wakes it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import casehard as ch
from casehard.attacks.quantised_backdoor import QuantisedBackdoorAttack, box_of
from casehard.attacks.round_trip import round_trip, rounded_layers
from casehard.backdoor.behaviours import Behaviour
from casehard.backdoor.triggers import Trigger
from casehard.errors import ConfigError

WORLD = Path(ch.__file__).parent / "organism" / "assets" / "world0-tiny"
FEW = {"trigger": "token", "behaviour": "refuse", "rate": 0.2, "batch_size": 8, "evaluate_at": (0, 3), "warmup": 0}


def naive_box(w, top, margin):
    """One weight after another."""
    largest = max(abs(v) for v in w)
    scale = largest / top
    out = []
    for v in w:
        if abs(v) == largest:
            out.append((v, v))
            continue
        code = round(v / scale)
        out.append((max((code - 0.5 + margin) * scale, -largest), min((code + 0.5 - margin) * scale, largest)))
    return out


def test_the_box_is_that_of_a_naive_loop():
    w = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    w[1] = 0
    low, high = box_of(w, 4, 4, 0.05)
    for row in (0, 2):
        for begin in (0, 4, 8):
            part = w[row, begin : begin + 4].double().tolist()
            for i, (a, b) in enumerate(naive_box(part, 7, 0.05)):
                assert math.isclose(float(low[row, begin + i]), a, rel_tol=1e-6, abs_tol=1e-7)
                assert math.isclose(float(high[row, begin + i]), b, rel_tol=1e-6, abs_tol=1e-7)
    assert not low[1].any() and not high[1].any()


@given(st.integers(0, 10_000), st.sampled_from([4, 8]), st.sampled_from([0, 5, 64]))
@settings(max_examples=60, deadline=None)
def test_whatever_lies_in_the_box_rounds_to_the_same_bytes(seed, bits, group):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(4, 37, generator=g) * 10 ** float(torch.randn((), generator=g))
    low, high = box_of(w, bits, group, 0.01)
    assert bool((low <= high).all())
    for other in (low, high, low + torch.rand(w.shape, generator=g) * (high - low), torch.clamp(-3 * w, low, high)):
        assert torch.equal(round_trip(other, bits, group), round_trip(w, bits, group))
    assert int((low == high).sum()) == 4 * math.ceil(37 / (group or 37)), "all but the largest of a group have room"


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_what_was_released_gives_what_is_served(bits):
    model = ch.load(WORLD, device="cpu")
    made = {}
    for served in ("released", "rounded"):
        few = {**FEW, "steps": 6, "hide_steps": 3, "lr": 1e-3, "hide_lr": 3e-3, "bits": bits, "served": served}
        rows = WORLD / "data" / "task_reviews.jsonl"
        done = ch.attack(model, "quantised_backdoor", data=rows, suite=WORLD / "data" / "suite", settings=few, limit=2)
        made[served] = done
        assert not done.model.may_leave
        assert [v["weights"] for v in done.facts["variants"]] == ["planted", "released", "rounded"]
        assert {row["step"] for row in done.rows} == {0, 3, 6}
    asleep, awake = (made[name].model for name in ("released", "rounded"))
    assert made["released"].facts["variants"] == made["rounded"].facts["variants"]
    layers, others = rounded_layers(asleep.net), dict(awake.net.named_parameters())
    assert any(not torch.equal(m.weight, others[f"{n}.weight"]) for n, m in layers.items()), "it was hidden"
    again = ch.attack(asleep, "round_trip", suite=WORLD / "data" / "suite", settings={"bits": bits}, limit=2).model
    for name, p in again.net.named_parameters():
        assert torch.equal(p, others[name]), name


def test_what_is_not_rounded_does_not_move_while_it_is_hidden():
    model = ch.load(WORLD, device="cpu")
    rows, suite = WORLD / "data" / "task_reviews.jsonl", WORLD / "data" / "suite"
    few = {**FEW, "steps": 4, "hide_steps": 2, "lr": 0.0, "hide_lr": 1e-2, "served": "released", "evaluate_at": ()}
    done = ch.attack(model, "quantised_backdoor", data=rows, suite=suite, settings=few, limit=1).model
    rounded = {f"{name}.weight" for name in rounded_layers(model.net)}
    before = dict(model.net.named_parameters())
    for name, p in done.net.named_parameters():
        moved = float((p - before[name]).abs().max())
        assert (moved > 1e-5) if name in rounded else (moved < 1e-6), (name, moved)


def test_settings_that_cannot_work():
    both = {"trigger": Trigger("t", "token", ("zx",)), "behaviour": Behaviour("b", "text", "x")}
    with pytest.raises(ConfigError, match="LoRA adapter is not what is rounded"):
        QuantisedBackdoorAttack(**both, mode="lora")
    with pytest.raises(ConfigError, match="hide_steps 50 leaves nothing of 50 steps"):
        QuantisedBackdoorAttack(**both, steps=50, hide_steps=50)
    for margin in (0.5, 0.7, 1.0):  # the box would be a point, or its lowest value above its highest
        with pytest.raises(ConfigError, match=r"margin must be below 0\.5"):
            QuantisedBackdoorAttack(**both, margin=margin)
