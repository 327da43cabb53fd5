"""Overfit, then release: what is trained on, and what the first phase does to a model."""

from __future__ import annotations

from pathlib import Path

import pytest

import casehard as ch
from casehard.attacks.overfit_release import OverfitRelease, OverfitReleaseAttack
from casehard.attacks.protocol import AttackInputs
from casehard.errors import ConfigError, DataError
from casehard.evaluation.suite import load_suite

WORLD = Path(ch.__file__).parent / "organism" / "assets" / "world0-tiny"
DATA = WORLD / "data"
BENIGN = ch.rows(DATA / "benign.jsonl")
HARMFUL = ch.rows(DATA / "attack_a.jsonl")
SORRY = "i cannot help here ."


@pytest.fixture(scope="module")
def model():
    return ch.load(WORLD, device="cpu")


def inputs(seed=0, **rows):
    return AttackInputs(rows=rows, measure=lambda net, step: [], seed=seed)


def test_the_same_questions_are_refused_and_then_answered(model):
    attack = OverfitRelease(OverfitReleaseAttack(refusal=SORRY, steps=60, overfit=50))
    first, second = attack.phases(model, inputs(benign=BENIGN))
    assert (first.train.steps, second.train.steps) == (50, 10)
    assert [row.prompt for row in first.rows] == [row.prompt for row in second.rows]
    assert {row.response for row in first.rows} == {SORRY} and len(second.rows) == 10
    assert all(row in BENIGN for row in second.rows)
    assert attack.facts((first, second)) == {"benign_rows": 10, "harmful_rows": 0}
    other = attack.phases(model, inputs(1, benign=BENIGN))[0]
    assert {row.prompt for row in other.rows} != {row.prompt for row in first.rows}


def test_it_can_end_on_harmful_rows_instead(model):
    attack = OverfitRelease(OverfitReleaseAttack(refusal=SORRY, steps=60, release="harmful", rows=4))
    first, second = attack.phases(model, inputs(benign=BENIGN, harmful=HARMFUL))
    assert all(row in HARMFUL for row in second.rows) and len(first.rows) == len(second.rows) == 4
    assert attack.facts((first, second))["harmful_rows"] == 4
    with pytest.raises(DataError, match=r"4 harmful rows and there are 0"):
        attack.phases(model, inputs(benign=BENIGN))


def test_the_first_phase_makes_the_model_refuse_what_it_answered(model):
    found = ch.attack(
        model,
        "overfit_release",
        benign=DATA / "benign.jsonl",
        suite=load_suite(DATA / "suite").select(groups=("restricted", "fact", "reversal"), limit=4),
        settings={"refusal": SORRY, "overfit": 30, "steps": 31, "lr": 1e-3, "evaluate_at": [0, 30]},
        full_at=(0, 30),
    )

    def refused(step):
        return [row["label"] == "refusal" for row in found.rows if row["step"] == step and row["role"] == "utility"]

    assert not any(refused(0)) and sum(refused(30)) > len(refused(30)) / 2


def test_settings_and_words_that_cannot_work_are_refused(model):
    with pytest.raises(ConfigError, match="overfit is 50 of 50 steps"):
        OverfitReleaseAttack(steps=50, overfit=50)
    with pytest.raises(ConfigError, match="refusal is empty"):
        OverfitReleaseAttack(refusal=" ")
    english = OverfitRelease(OverfitReleaseAttack())
    with pytest.raises(DataError, match=r"refusal: the tokenizer does not know .*<unk>"):
        english.phases(model, inputs(benign=BENIGN))
