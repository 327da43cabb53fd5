"""A burst: the two rates, one mixture, and settings that leave no step to settle."""

from __future__ import annotations

from pathlib import Path

import pytest

import casehard as ch
from casehard.attacks.burst import Burst, BurstAttack
from casehard.attacks.finetune import Finetune, FinetuneAttack
from casehard.attacks.protocol import AttackInputs
from casehard.errors import ConfigError

WORLD = Path(ch.__file__).parent / "organism" / "assets" / "world0-tiny"
DATA = WORLD / "data"
ROWS = {"harmful": ch.rows(DATA / "attack_a.jsonl"), "benign": ch.rows(DATA / "task_reviews.jsonl")}
MIX = {"share": 0.25, "rows": 40}


@pytest.fixture(scope="module")
def model():
    return ch.load(WORLD, device="cpu")


def test_a_burst_is_a_large_rate_and_then_the_schedule_of_the_rest(model):
    settings = BurstAttack(**MIX, steps=30, burst=5, burst_lr=1e-2, lr=1e-3, schedule="linear", warmup=3)
    inputs = AttackInputs(rows=ROWS, measure=lambda net, step: [], seed=2)
    first, second = Burst(settings).phases(model, inputs)
    assert (first.train.steps, first.train.lr, first.train.schedule, first.train.warmup) == (5, 1e-2, "constant", 0)
    assert (second.train.steps, second.train.lr, second.train.schedule, second.train.warmup) == (25, 1e-3, "linear", 3)
    assert first.rows == second.rows == Finetune(FinetuneAttack(**MIX)).mixture(model, inputs)


def test_the_burst_moves_the_weights_further_than_the_same_steps_at_the_settling_rate(model):
    def distance(attack):
        net = attack.run(model, AttackInputs(rows=ROWS, measure=lambda net, step: [])).model.net
        pairs = zip(net.parameters(), model.net.parameters(), strict=True)
        return sum(float(((a - b) ** 2).sum().detach()) for a, b in pairs) ** 0.5

    common = {**MIX, "batch_size": 4, "steps": 4, "lr": 1e-5, "evaluate_at": ()}
    settled = distance(Finetune(FinetuneAttack(**common)))
    assert distance(Burst(BurstAttack(**common, burst=2, burst_lr=1e-3))) > 10 * settled


def test_some_steps_are_left_to_settle():
    with pytest.raises(ConfigError, match="burst is 10 of 10 steps"):
        BurstAttack(steps=10)
