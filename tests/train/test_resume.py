"""R1: a run killed after any step and resumed ends with the same bits and the same log as one that never stopped."""

from __future__ import annotations

import pytest

from casehard.train.fit import fit
from casehard.train.protocol import has
from casehard.train.recipe import TrainConfig
from conformance.table import SETTINGS, TABLE, Row
from fakes import Averaging, TwoPasses, largest_difference, tiny_llama, tiny_rows, two_adapters, weights

STEPS = 9
FEW = 6
"""Steps where only the first, a middle and the last one are tried."""
ROWS = tiny_rows(20)
TABLED = (*TABLE, Row("averaging", Averaging), Row("two-passes", TwoPasses))
CASES = [pytest.param(row, setting, id=f"{row.name}-{setting}") for row in TABLED for setting in row.settings]


class KilledError(Exception):
    """Stands for the process dying."""


def recipe(setting, steps=STEPS):
    return TrainConfig(
        steps=steps,
        batch_size=3,
        accumulation=2 if setting == "accumulation" else 1,
        lr=1e-2,
        warmup=2,
        save_every=1,
        log_every=3,
        precision="fp32",
    )


def model_for(setting):
    assert setting in SETTINGS
    return two_adapters() if setting == "two_adapters" else tiny_llama(dropout=0.2, layers=1)


def train(row, setting, out=None, die_at=None, steps=STEPS):
    """Train up to the hook of step ``die_at``, which runs before that step's checkpoint."""
    model = model_for(setting)

    def hook(_, step):
        if step == die_at:
            raise KilledError

    told = {"seed": 3, "out": out, "on_step": hook if die_at else None}
    result = fit(model, None, ROWS, config=recipe(setting, steps), method=row.make(), **told)
    return weights(model), result


@pytest.mark.parametrize(("row", "setting"), CASES)
def test_killed_after_every_step(row, setting, tmp_path):
    """Every method that keeps a state after every step once; others, and other set-ups, after the first, a middle and
    the last one: between those only weights and counters change, which plain training keeps after every step."""
    every = setting == row.settings[0] and (row.name == "plain" or has(row.make(), "state"))
    steps = STEPS if every else FEW
    expected, whole = train(row, setting, steps=steps)
    for k in range(1, steps) if every else (1, 3, steps - 1):
        with pytest.raises(KilledError):
            train(row, setting, tmp_path, die_at=k + 1, steps=steps)
        assert (tmp_path / f"checkpoint-{k}").is_dir()
    actual, resumed = train(row, setting, tmp_path, steps=steps)
    assert largest_difference(expected, actual) == 0
    assert resumed.log == whole.log
    # A method may log once more when it finishes.
    assert len([line for line in resumed.log if "loss" in line]) == steps // 3
    kept = ("steps", "passes", "tokens")
    assert [getattr(resumed.budget, key) for key in kept] == [getattr(whole.budget, key) for key in kept]
    assert not (tmp_path / "scratch").exists()
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2


@pytest.mark.parametrize("k", [1, 4, 8])
def test_killed_once(k, tmp_path):
    row = TABLED[-2]
    expected, whole = train(row, "dropout")
    with pytest.raises(KilledError):
        train(row, "dropout", tmp_path, die_at=k + 1)
    actual, resumed = train(row, "dropout", tmp_path)
    assert largest_difference(expected, actual) == 0
    assert resumed.log == whole.log


def test_both_adapters_stay_active(tmp_path):
    row = TABLE[0]
    with pytest.raises(KilledError):
        train(row, "two_adapters", tmp_path, die_at=5)
    model = two_adapters()
    start = weights(model)
    fit(model, None, ROWS, config=recipe("two_adapters"), method=row.make(), seed=3, out=tmp_path)
    assert model.active_adapters == ["task", "buffer"]
    end = weights(model)
    for adapter in ("task", "buffer"):
        moved = [name for name in end if adapter in name and not end[name].equal(start[name])]
        assert len(moved) == 8, (adapter, moved)


def test_a_finished_run_is_not_repeated(tmp_path):
    expected, whole = train(TABLED[-2], "dropout", tmp_path)
    actual, again = train(TABLED[-2], "dropout", tmp_path)
    assert largest_difference(expected, actual) == 0
    assert again.log == whole.log
    assert again.budget.passes == whole.budget.passes
