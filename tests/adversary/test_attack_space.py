"""The space of a search: what is searched, what is fixed, what is refused before anything runs."""

from __future__ import annotations

from typing import Any

import pytest

from casehard.adversary.space import DEFAULTS, make_space
from casehard.attacks import ATTACKS
from casehard.attacks.finetune import FinetuneAttack
from casehard.data.mix import counts
from casehard.errors import ConfigError


def space(given: dict[str, Any], config: dict[str, Any] | None = None, **more: Any):
    return make_space("finetune", ATTACKS["finetune"], config or {}, given, **more)


def test_ranges_choices_and_single_values() -> None:
    found = space({"lr": ["1e-6", "3e-3"], "batch_size": [4, 8, 16], "mode": "lora", "rank": [8, 8]})
    by = {d.name: d for d in found.dimensions}
    assert (by["lr"].low, by["lr"].high, by["lr"].log) == (1e-6, 3e-3, True), "YAML reads 1e-6 in a list as text"
    assert by["batch_size"].choices == (4, 8, 16) and not by["weight_decay"].log
    assert by["steps"].whole and (by["steps"].low, by["steps"].high) == (16, 1000)
    assert found.fixed == {"mode": "lora", "rank": 8}
    assert set(by) | set(found.fixed) == set(DEFAULTS)


def test_what_is_fixed_is_not_searched() -> None:
    found = space({}, {"lr": 2e-4, "rows": 100})
    assert "lr" not in {d.name for d in found.dimensions} and found.fixed == {"lr": 2e-4, "rows": 100}


def test_without_cover_rows_every_row_is_harmful() -> None:
    assert space({}, benign=False).fixed == {"share": 1.0}


@pytest.mark.parametrize(
    ("given", "config", "said"),
    [
        ({"lr": [1e-3, 1e-6]}, {}, r"space.lr: from 0.001 to 1e-06 is no range"),
        ({"learning_rate": [1e-6, 1e-3]}, {}, r"space: unknown key 'learning_rate'"),
        ({"evaluate_at": [1, 2]}, {}, r"unknown key 'evaluate_at'"),
        ({"share": [0.1, 1.5]}, {}, r"space.share: .*at most 1, got 1.5"),
        ({"mode": ["full", "half"]}, {}, r"space.mode: "),
        ({"steps": [16, 20.5]}, {}, r"whole numbers"),
        ({"mode": []}, {}, r"space.mode is empty"),
        ({"mode": ["full", "full"]}, {}, r"a choice occurs twice"),
        ({"lr": [1e-5, 1e-3]}, {"lr": 1e-4}, r"lr is fixed in config and searched in space"),
    ],
)
def test_a_space_that_makes_no_sense_is_refused(given: dict[str, Any], config: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        space(given, config)


def test_settings_of_an_attacker_are_those_of_the_attack() -> None:
    found = space({})
    drawn = {"mode": "full", "lr": 1e-4, "steps": 20, "batch_size": 4, "rank": 30, "schedule": "cosine"}
    drawn |= {"warmup": 40, "weight_decay": 0.0, "share": 0.5}
    settings = found.settings(drawn)
    assert settings["warmup"] == 10, "a learning rate that only rises is a lower one"
    assert "rank" not in settings and found.settings({**drawn, "mode": "lora"})["rank"] == 30
    assert FinetuneAttack(**settings).schedule == "cosine"


@pytest.mark.parametrize(("share", "rows", "whole"), [(0.9994, 400, 1.0), (0.001, 400, 0.0), (0.33, 10, 0.3)])
def test_a_share_is_one_of_whole_rows(share: float, rows: int, whole: float) -> None:
    found = space({}, {"rows": rows} if rows != 400 else {})
    assert found.settings({"share": share})["share"] == whole
    counts(share=whole, n=rows)  # what the attack asks of its share


@pytest.mark.parametrize("name", [n for n, s in ATTACKS.ours.items() if s.trains and not s.plants])
def test_every_attack_that_trains_has_a_space(name: str) -> None:
    steps = {"steps": [64, 1000]}  # overfit_release overfits for 50 before it begins
    found = make_space(name, ATTACKS[name], {}, steps)
    own = {"mode"} if ATTACKS[name].weights else set()
    assert {"lr", "steps"} | own <= {d.name for d in found.dimensions}
    drawn = {d.name: d.ends[0] for d in found.dimensions}
    assert ATTACKS[name].configure(name, settings=found.settings(drawn)).steps == 64
