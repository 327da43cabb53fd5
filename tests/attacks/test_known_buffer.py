"""A known buffer: scores against dense gradients, which rows are taken, and the adapter taken out of the merge."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import casehard as ch
from casehard.attacks.finetune import FinetuneAttack
from casehard.attacks.known_buffer import KnownBuffer, KnownBufferAttack, scores
from casehard.attacks.protocol import AttackInputs
from casehard.data.batches import collate
from casehard.data.sources import save
from casehard.defences.buffer_reinforce.assets import read_assets, tokenizer_digests
from casehard.defences.buffer_reinforce.frozen_lora import fingerprints
from casehard.defences.buffer_reinforce.method import BufferReinforce, BufferReinforceConfig
from casehard.defences.buffer_reinforce.publish import write_assets
from casehard.errors import ConfigError
from casehard.maths.merge import LoraPair, MergeConfig
from casehard.model.lora_files import live_pairs
from casehard.steps import Attack
from casehard.steps.defence import Defence
from casehard.train.tune import chat_format

WORLD = Path(ch.__file__).parent / "organism" / "assets" / "world0-tiny"
DATA = WORLD / "data"
HARMFUL = ch.rows(DATA / "attack_a.jsonl")[:16]
BENIGN = ch.rows(DATA / "task_reviews.jsonl")[:40]
SHORT = {
    "mode": "lora",
    "rank": 2,
    "steps": 2,
    "batch_size": 4,
    "lr": 1e-2,
    "evaluate_at": (),
    "rows": 16,
    "share": 0.25,
}


@pytest.fixture(scope="module")
def model():
    return ch.load(WORLD, device="cpu")


@pytest.fixture(scope="module")
def assets(model, tmp_path_factory):
    draws = torch.Generator().manual_seed(0)

    def pairs():
        found = {}
        for name, module in model.net.named_modules():
            if isinstance(module, torch.nn.Linear) and name.startswith("model.layers"):
                a = torch.randn(2, module.in_features, generator=draws)
                b = torch.randn(module.out_features, 2, generator=draws)
                found[name] = LoraPair(0.2 * a, 0.2 * b, 1.0)
        return found

    tokenizer, template = tokenizer_digests(model.tokenizer)
    record = {
        "base_digest": "0" * 64,
        "base_fingerprints": fingerprints(model.net),
        "tokenizer_digest": tokenizer,
        "template_digest": template,
        "system": None,
    }
    return write_assets(tmp_path_factory.mktemp("provider") / "assets", pairs(), pairs(), record).path


def inputs(harmful=HARMFUL, **more):
    return AttackInputs(rows={"harmful": harmful, "benign": BENIGN}, measure=lambda net, step: [], **more)


def dense(model, row, assets):
    """(1) from the gradient of every dense weight of a copy whose weights hold the buffer."""
    net = copy.deepcopy(model.net).eval()
    layers = dict(net.named_modules())
    for name, (a, b, scale) in assets.buffer().items():
        layers[name].weight.data += scale * b @ a
    batch = collate([chat_format(model).encode(row)], 0)
    net(**batch).loss.backward()
    total = 0.0
    for name, (a, b, scale) in assets.reinforce().items():
        v = scale * b @ a
        total -= float((layers[name].weight.grad * v).sum() / v.norm())
    return total


def test_scores_are_those_of_dense_gradients_and_the_base_is_left_as_it_was(model, assets):
    before = [p.detach().clone() for p in model.net.parameters()]
    found = scores(model, HARMFUL[:3], read_assets(assets), inputs(), by="against")
    assert found == pytest.approx([dense(model, row, read_assets(assets)) for row in HARMFUL[:3]], rel=1e-3, abs=1e-6)
    assert len(set(found)) == 3
    left = scores(model, HARMFUL[:3], read_assets(assets), inputs(), by="residual")
    assert all(-1 <= value <= 0 for value in left)
    assert all(torch.equal(a, b) for a, b in zip(before, model.net.parameters(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.net.modules())


@pytest.mark.parametrize("by", ["against", "residual"])
def test_it_takes_the_rows_that_teach_most_beside_the_buffer(model, assets, by):
    found = dict(
        zip([r.id for r in HARMFUL], scores(model, HARMFUL, read_assets(assets), inputs(), by=by), strict=True)
    )
    attack = KnownBuffer(KnownBufferAttack(choose=by, assets=str(assets), rows=16, share=0.25))
    rows = attack.mixture(model, inputs())
    assert sorted(found[r.id] for r in rows if r.id in found) == sorted(found.values())[:4] and len(rows) == 16


def test_who_knows_no_buffer_draws_as_finetune_does(model, assets, tmp_path):
    plain = FinetuneAttack(rows=16, share=0.25).mixed(inputs().rows, seed=0)
    for settings, known in (({}, ""), ({}, str(tmp_path)), ({"choose": "random"}, str(assets))):
        attack = KnownBuffer(KnownBufferAttack(rows=16, share=0.25, **settings))
        assert list(attack.mixture(model, inputs(assets=known))) == plain


def test_his_own_adapter_is_the_first_part_of_the_merge(model, assets):
    """What the attack keeps is what (2) reads off the adapter that the provider gives back."""
    merge = MergeConfig(c_user=0.5, c_reinforce=0.5, alpha=0.1)
    config = BufferReinforceConfig(merge=merge)
    nets = {}
    for keeps in ("own", "merged"):
        attack = KnownBuffer(KnownBufferAttack(keeps=keeps, **SHORT))
        method = BufferReinforce(config, assets=assets)
        method.check_format(model.tokenizer, system=None)
        nets[keeps] = attack.run(model, inputs(method=method, assets=str(assets))).model.net
    own, merged = live_pairs(nets["own"]), live_pairs(nets["merged"])
    assert set(own) <= set(merged)
    for name, (a, b, scale) in own.items():
        full = merged[name]
        taken = full.scale * full.b[:, :2] @ full.a[:2] / merge.c_user
        assert float((b @ a).abs().max()) > 0
        torch.testing.assert_close(taken, scale * b @ a, rtol=1e-4, atol=1e-6)


def test_inside_a_job_the_attacker_knows_that_providers_assets(model, assets, tmp_path):
    save(tmp_path / "harmful.jsonl", HARMFUL)
    step = Attack(
        attack="known_buffer",
        config={**SHORT, "share": 0.5},
        rows={"harmful": (str(tmp_path / "harmful.jsonl"),), "benign": (str(DATA / "task_reviews.jsonl"),)},
        suite=str(DATA / "suite"),
        limit=1,
        defence=Defence(method="buffer_reinforce", assets=str(assets)),
    )
    done = step.run(model)
    assert done.facts["harmful_rows"] == 8 and done.facts["assets_digest"] == read_assets(assets).digest


def test_what_cannot_be_is_refused(model, assets):
    other = copy.deepcopy(model.net)
    other.get_parameter("model.layers.0.mlp.up_proj.weight").data += 1.0
    attack = KnownBuffer(KnownBufferAttack(assets=str(assets), **SHORT))
    with pytest.raises(ConfigError, match="made for another base"):
        attack.mixture(replace(model, net=other), inputs())
    cut = BufferReinforce(BufferReinforceConfig(merge=MergeConfig(rank=2)), assets=assets)
    with pytest.raises(ConfigError, match=r"merge.rank is 2: the customer's factors"):
        KnownBuffer(KnownBufferAttack(**SHORT)).run(model, inputs(method=cut))
