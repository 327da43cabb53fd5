"""Attacks that edit weights: what is taken back, what is rounded."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import pytest
import torch

import casehard as ch
from casehard.attacks.protocol import AttackInputs
from casehard.attacks.round_trip import RoundTrip, RoundTripAttack, round_trip
from casehard.attacks.weight_difference import WeightDifference, WeightDifferenceAttack, top
from casehard.errors import ConfigError, DataError, UserError
from conformance.attacks import before

WORLD = Path(ch.__file__).parent / "organism" / "assets" / "world0-tiny"
NOTHING = AttackInputs(rows={}, measure=lambda net, at: [{"id": "x"}])


@functools.cache
def organism() -> ch.Model:
    return ch.load(WORLD, device="cpu")


@functools.cache
def moved() -> dict[str, torch.Tensor]:
    return dict(ch.load(before(), device="cpu").net.named_parameters())


def taken_back(**settings) -> tuple[dict[str, torch.Tensor], dict]:
    found = WeightDifference(WeightDifferenceAttack(before=before(), **settings)).run(organism(), NOTHING)
    assert found.rows == [{"id": "x", "step": 0}]
    return dict(found.model.net.named_parameters()), dict(found.facts)


def test_all_of_the_difference_gives_the_model_before() -> None:
    weights, facts = taken_back()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, moved()[name], rtol=1e-5, atol=1e-6)
    assert facts["share_taken"] == 1.0 and facts["before"] == ch.load(before(), device="cpu").digest


@torch.no_grad()
def test_some_directions_of_it_are_those_of_the_naive_twin() -> None:
    weights, facts = taken_back(rank=3, factor=0.7)
    total = taken = 0.0
    for name, own in organism().net.named_parameters():
        difference = (own - moved()[name]).double()
        part = difference
        if own.dim() == 2:
            u, s, v = torch.linalg.svd(difference)
            part = sum(s[i] * torch.outer(u[:, i], v[i]) for i in range(3))
        torch.testing.assert_close(weights[name].double(), own.double() - 0.7 * part, rtol=1e-4, atol=1e-5)
        total, taken = total + float(difference.square().sum()), taken + float(part.square().sum())
    assert facts["share_taken"] == pytest.approx(taken / total, rel=1e-3) and facts["share_taken"] < 0.5
    wide = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    assert top(wide, 4) is wide and top(wide, None) is wide and torch.linalg.matrix_rank(top(wide, 2)) == 2


def test_another_model_or_the_same_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="its weights are those of the model"):
        WeightDifference(WeightDifferenceAttack(before=str(WORLD))).run(organism(), NOTHING)
    with pytest.raises(UserError, match="nowhere"):
        WeightDifference(WeightDifferenceAttack(before=str(tmp_path / "nowhere"))).run(organism(), NOTHING)
    with pytest.raises(ConfigError, match="before is empty"):
        WeightDifferenceAttack(before=" ")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(WORLD)
    config.num_hidden_layers = 1
    shutil.copytree(WORLD, tmp_path / "other", ignore=shutil.ignore_patterns("data", "manifest.json", "organism.json"))
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match=r"the tensor model\.layers\.1\.\S+ is missing, that of the model \("):
        WeightDifference(WeightDifferenceAttack(before=str(tmp_path / "other"))).run(organism(), NOTHING)


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 0), (4, 4), (4, 3), (8, 99)])
def test_rounding_is_that_of_the_naive_twin(bits: int, group: int) -> None:
    weight = torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
    weight[1, :4] = 0
    got, levels = round_trip(weight, bits, group), 2 ** (bits - 1) - 1
    for i in range(3):
        for start in range(0, 10, group or 10):
            some = weight[i, start : start + (group or 10)].tolist()
            most = max(map(abs, some))
            slow = [round(w / most * levels) * most / levels if most else 0.0 for w in some]
            assert got[i, start : start + (group or 10)].tolist() == pytest.approx(slow, rel=1e-5, abs=1e-7)
    torch.testing.assert_close(round_trip(got, bits, group), got), "rounding again changes nothing"
    assert len({abs(w) for w in round_trip(weight, 4)[0].tolist()}) <= 8


def test_every_linear_layer_but_the_head_is_rounded() -> None:
    found = RoundTrip(RoundTripAttack(bits=4)).run(organism(), NOTHING)
    assert (found.facts["layers"], found.facts["group"]) == (21, 64)
    own = dict(organism().net.named_parameters())
    for name, weight in found.model.net.named_parameters():
        linear = weight.dim() == 2 and "embed" not in name
        assert torch.equal(weight, round_trip(own[name], 4, 64) if linear else own[name]), name
    fine = RoundTrip(RoundTripAttack()).run(organism(), NOTHING)
    assert 0 < fine.facts["relative_change"] < found.facts["relative_change"] / 5
