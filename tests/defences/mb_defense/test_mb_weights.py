"""A share of the base put back between the stages: which weights, how many, and nothing that is not trained."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from casehard.defences.mb_defense.config import MbConfig, StageTwo
from casehard.defences.mb_defense.weights import mix_back, pull_back, restore, trained
from casehard.errors import ConfigError, DataError
from casehard.seeds import generator
from casehard.train.recipe import TrainConfig


def model(seed):
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 3))
    made[1].bias.requires_grad_(False)
    return made


def naive(after, base, share, seed):
    """One weight at a time, from the same draws."""
    out = {}
    for number, (name, p) in enumerate(after.named_parameters()):
        out[name] = p.detach().clone().flatten()
        if not p.requires_grad:
            continue
        draws = torch.rand(p.shape, generator=generator(seed, number, "fine-mixing")).flatten()
        for i, draw in enumerate(draws.tolist()):
            if draw >= 1.0 - share:
                out[name][i] = base[name].flatten()[i]
    return out


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_mix_back_is_the_naive_loop(share):
    base, after = trained(model(0)), model(1)
    expected, before = naive(after, base, share, 7), trained(after)
    mix_back(after, base, share, seed=7)
    moved = total = 0
    for name, p in after.named_parameters():
        assert torch.equal(p.detach().flatten(), expected[name]), name
        if p.requires_grad:
            moved += int((p.detach() != before[name]).sum())
            total += p.numel()
    assert abs(moved / total - share) < 0.04, "2,200 draws: four standard deviations"


def test_the_rest_stays_and_the_seed_decides():
    base, one, two, three = trained(model(0)), model(1), model(1), model(1)
    frozen = one[1].bias.detach().clone()
    for made, seed in ((one, 7), (two, 7), (three, 8)):
        mix_back(made, base, 0.5, seed=seed)
    assert torch.equal(one[1].bias, frozen) and "1.bias" not in base
    assert torch.equal(one[0].weight, two[0].weight) and not torch.equal(one[0].weight, three[0].weight)


def test_what_was_set_aside_comes_back():
    made = model(1)
    kept = trained(made)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(1.0)
    restore(made, kept)
    assert all(torch.equal(p, kept[name]) for name, p in made.named_parameters() if p.requires_grad)
    assert not torch.equal(made[1].bias, model(1)[1].bias), "what is not trained is not put back"


def test_pull_back_goes_a_share_of_the_way():
    base, after = trained(model(0)), model(1)
    before = {name: p.detach().clone() for name, p in after.named_parameters()}
    pull_back(after, base, 0.7)
    for name, p in after.named_parameters():
        expected = 0.3 * base[name] + 0.7 * before[name] if name in base else before[name]
        torch.testing.assert_close(p.detach(), expected)


def test_what_auto_means():
    """Four fifths of the way from the base and a fifth of stage 1's rate, where joint mode trains every parameter."""
    train = TrainConfig(lr=1.5e-3)
    joint = MbConfig(train=train)
    assert (joint.c(), joint.lr_of_two(lora=False)) == (0.8, pytest.approx(3e-4))
    assert MbConfig(train=train, stage2=False).c() == 1.0, "stage 1 alone is a control"
    assert MbConfig(train=train, stage1=False).c() == 0.8, "stage 2 alone differs by the planting alone"
    given = MbConfig(train=train, two=StageTwo(c=0.6, lr=1e-3))
    assert (given.c(), given.lr_of_two(lora=False), given.lr_of_two(lora=True)) == (0.6, 1e-3, 1e-3)
    for other in (MbConfig(mode="posthoc", train=train), MbConfig(mode="adapter", train=train)):
        assert (other.c(), other.lr_of_two(lora=False)) == (1.0, 1e-5), "no base to go back to, no rate to go by"
    assert (MbConfig(lora_rank=8).c(), MbConfig(lora_rank=8).lr_of_two(lora=True)) == (1.0, 1e-4)


def test_refusals():
    with pytest.raises(DataError, match=r"no parameter '0\.weight'"):
        mix_back(model(1), {}, 0.5, seed=0)
    with pytest.raises(ConfigError, match="base_share must be below 1, got 1"):
        StageTwo(base_share=1.0)
    for mode in ("posthoc", "adapter"):
        with pytest.raises(ConfigError, match=r"base_share 0\.5"):
            MbConfig(mode=mode, two=StageTwo(base_share=0.5))
        with pytest.raises(ConfigError, match=r"two\.c 0\.8"):
            MbConfig(mode=mode, two=StageTwo(c=0.8))
    with pytest.raises(ConfigError, match="with lora_rank 8"):
        MbConfig(lora_rank=8, two=StageTwo(base_share=0.5))
