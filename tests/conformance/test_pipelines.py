"""Every defence that trains the model itself: what all of them promise, on the shipped organism and a few steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from casehard.data import sources
from casehard.data.mix import content_hash
from casehard.data.sources import load_many
from casehard.defences import DEFENCES
from casehard.errors import ConfigError, DataError
from casehard.model.load import load
from casehard.steps import Finetune, harden
from casehard.steps.finetune import finetune_on
from casehard.train.protocol import Pipeline, PipelineInputs
from casehard.train.recipe import TrainConfig
from fakes import largest_difference, weights

ORGANISM = Path(__file__).resolve().parents[2] / "src" / "casehard" / "organism" / "assets" / "world0-tiny"
TRAIN = TrainConfig(steps=2, batch_size=4, warmup=0)


class Row(NamedTuple):
    """One pipeline as the shared tests see it."""

    name: str
    settings: Mapping[str, Any]


TABLE = (
    Row("mb_defense", {"two": {"epochs": 0.05, "checks": 1}, "plant": {"n_active": 2, "n_canary": 1}}),
    Row("onion", {"keep": 0.9}),
    Row(
        "backdoor_collapse",
        {key: {"steps": 2, "batch_size": 4, "warmup": 0} for key in ("gather", "recover")},
    ),
)


@pytest.fixture(scope="module")
def model():
    return load(ORGANISM, device="cpu")


@pytest.fixture(scope="module")
def rows():
    read = load_many([str(ORGANISM / "data" / "task_reviews.jsonl")], require_response=True)
    distinct = list({content_hash(row): row for row in read}.values())
    return {"clean": distinct[:12], "data": distinct[20:44]}


def step(row: Row, **changes: Any) -> Finetune:
    return Finetune(**{"method": row.name, "settings": row.settings, "train": TRAIN, "seed": 3, **changes})


def test_every_pipeline_has_a_row():
    assert {row.name for row in TABLE} == {name for name, spec in DEFENCES.items() if spec.pipeline}


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_a_pipeline_trains_a_copy_and_the_same_seed_gives_the_same_model(row, model, rows):
    before = weights(model.net)
    first, again = (finetune_on(step(row), rows, model, out=None) for _ in range(2))
    assert largest_difference(before, weights(model.net)) == 0.0
    assert first.model is not None and again.model is not None
    assert largest_difference(weights(first.model.net), weights(again.model.net)) == 0.0
    assert largest_difference(before, weights(first.model.net)) > 0.0
    assert first.model.digest == again.model.digest != model.digest
    assert first.cost["steps"] >= 2 and first.cost["tokens"] > 0
    assert first.model.lineage[-1].method == row.name
    assert len(first.model.trained_prompts) > len(model.trained_prompts)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_what_a_pipeline_made_is_saved_unless_its_own_checks_forbid_it(row, model, rows, tmp_path):
    files = {}
    for role, some in rows.items():
        files[role] = (str(tmp_path / f"{role}.jsonl"),)
        sources.save(files[role][0], some)
    if row.name == "mb_defense":
        rigged = {**row.settings, "gates": {"live": -1}}
        failed = finetune_on(step(row, settings=rigged), rows, model, out=None)
        assert failed.facts["mb"]["verdict"] == "FAIL" and not failed.model.may_leave
        return
    outcome, made = harden(step(row, model=str(ORGANISM), rows=files), tmp_path / "out")
    assert made is not None and made.digest != model.digest and outcome.model.may_leave
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["checkpoint"]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_a_pipeline_repairs_or_says_that_it_cannot(row, model, rows):
    settings = row.settings | (
        {"train": {"steps": 2, "batch_size": 4, "warmup": 0}} if row.name == "mb_defense" else {}
    )
    made = DEFENCES[row.name].load()[0](DEFENCES[row.name].configure(row.name, settings=settings))
    assert isinstance(made, Pipeline) and made.name == row.name
    if not DEFENCES[row.name].repairs:
        made.check(trains=True)
        with pytest.raises(ConfigError, match=row.name):
            made.check(trains=False)
        return
    made.check(trains=False)
    done = made.train(model, PipelineInputs(rows={"clean": rows["clean"]}, train=TRAIN, seed=3))
    assert largest_difference(weights(model.net), weights(done.net)) > 0.0


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_what_a_pipeline_lacks_or_would_ignore_is_refused(row, model, rows):
    with pytest.raises(ConfigError, match="needs clean rows"):
        finetune_on(step(row), {"data": rows["data"]}, model, out=None)
    with pytest.raises(ConfigError, match="would ignore the safe rows"):
        finetune_on(step(row), {**rows, "safe": rows["clean"]}, model, out=None)
    with pytest.raises(ConfigError, match="would ignore the assets"):
        step(row, assets="somewhere").check(["clean"])
    asked = ORGANISM / "data" / "suite"
    overlap = load_many([str(asked / "eval.jsonl")])[-4:]
    with pytest.raises(DataError, match="overlap"):
        finetune_on(step(row, suite=str(asked)), {**rows, "clean": overlap}, model, out=None)
