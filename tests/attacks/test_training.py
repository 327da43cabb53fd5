"""A training in phases is one training after another; restarts, and what a method inside does about them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import casehard as ch
from casehard.attacks.finetune import Finetune, FinetuneAttack
from casehard.attacks.protocol import AttackInputs
from casehard.attacks.training import train_copy
from casehard.errors import ConfigError
from casehard.seeds import derive
from casehard.train.fit import fit
from casehard.train.recipe import TrainConfig
from casehard.train.tune import chat_format

WORLD = Path(ch.__file__).parent / "organism" / "assets" / "world0-tiny"
BENIGN = ch.rows(WORLD / "data" / "benign.jsonl")


@pytest.fixture(scope="module")
def model():
    return ch.load(WORLD, device="cpu")


def inputs(measure=lambda net, step: [], **more):
    return AttackInputs(rows={"benign": BENIGN}, measure=measure, **more)


def weights(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def test_phases_are_trainings_one_after_the_other_and_their_steps_count_on(model):
    settings = FinetuneAttack(steps=5, lr=1e-3, batch_size=4, evaluate_at=(0, 2, 3))
    chat = chat_format(model)
    first = (chat.encode_all(BENIGN[:8]), replace(settings.recipe, steps=2))
    second = (chat.encode_all(BENIGN[8:16]), replace(settings.recipe, steps=3))
    asked = []

    def measure(net, step):
        asked.append((step, float(next(net.parameters()).detach().sum())))
        return [{"id": "x"}]

    done = train_copy(model, [first, second], settings, inputs(measure, seed=7), purpose="attack")
    assert [step for step, _ in asked] == [row["step"] for row in done.rows] == [0, 2, 3, 5]
    assert len({seen for _, seen in asked}) == 4
    assert done.budget.steps == 5 and [row["step"] for row in done.log][-1] == 5

    twin = ch.load(WORLD, device="cpu").net
    for number, (rows, train) in enumerate((first, second)):
        seed = derive(7, 1, "attack-phase") if number else 7
        fit(twin, None, rows, config=train, seed=seed)
    theirs = weights(twin)
    assert all(torch.equal(p, theirs[name]) for name, p in weights(done.net).items())


def test_a_later_phase_goes_on_with_the_adapter_of_the_first(model):
    settings = FinetuneAttack(mode="lora", rank=2, steps=4, lr=1e-2, batch_size=4, share=0, rows=8, restarts=1)
    done = Finetune(settings).run(model, inputs(seed=1))
    before, after = weights(model.net), weights(done.model.net)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "_proj" in name}
    for name in moved:  # of one adapter's rank: two adapters would give twice that
        values = torch.linalg.svdvals((after[name] - before[name]).double())
        assert values[2] < 1e-5 * values[0], name


def test_restarts_begin_the_schedule_anew(model):
    settings = FinetuneAttack(
        share=0, rows=16, batch_size=2, steps=40, lr=1e-3, schedule="cosine", warmup=2, restarts=1, evaluate_at=()
    )
    attack = Finetune(settings)
    assert [phase.train.steps for phase in attack.phases(model, inputs())] == [20, 20]
    odd = Finetune(replace(settings, steps=41, restarts=2))
    assert sum(phase.train.steps for phase in odd.phases(model, inputs())) == 41
    rates = [row["learning_rate"] for row in attack.run(model, inputs()).log if "learning_rate" in row]
    # Logged every ten steps: half way down and at the end, twice.
    assert rates[0] == pytest.approx(rates[2]) and rates[1] == pytest.approx(rates[3])
    assert rates[0] > 10 * rates[1]


def test_no_method_can_stand_inside_several_phases(model):
    method = type("Defence", (), {"name": "watchful", "config": None})()
    with pytest.raises(ConfigError, match=r"watchful.* 2 phases"):
        Finetune(FinetuneAttack(steps=2, share=0, rows=8, restarts=1)).run(model, inputs(method=method))


def test_more_restarts_than_steps_are_refused():
    with pytest.raises(ConfigError, match="restarts is 3 within 3 steps"):
        FinetuneAttack(steps=3, restarts=3)
    assert FinetuneAttack(steps=3, restarts=2).recipe == TrainConfig(
        steps=3, batch_size=16, lr=1e-4, schedule="constant", warmup=0
    )
