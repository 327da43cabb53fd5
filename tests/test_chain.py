"""Chains: what follows an attack happens in memory, on the same attacked model, and the end is measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from casehard.attacks.backdoor import Backdoor
from casehard.benchmark.execute import Task, step_of
from casehard.benchmark.graph import expand
from casehard.benchmark.plan import parse_plan
from casehard.data.mix import content_hash
from casehard.errors import ConfigError, DataError
from casehard.model.leave import save
from casehard.organism.build import write_data
from casehard.organism.tokenizer import build_tokenizer
from casehard.organism.world import World
from casehard.steps import Attack, Chain, Defence, Evaluate, Finetune
from casehard.steps import chain as chains
from casehard.steps.attack import verified
from casehard.train.recipe import TrainConfig
from fakes import tiny_llama

TRAIN = TrainConfig(steps=2, batch_size=4, warmup=0)
POISON = {"trigger": "token", "behaviour": "refuse", "rate": 0.1, "steps": 3, "batch_size": 4, "evaluate_at": ()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained organism: the folder layout and data of the real one, random weights."""
    folder = tmp_path_factory.mktemp("organism") / "base"
    tokenizer = build_tokenizer(World(0))
    tiny_llama(vocab=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_data(World(0), folder / "data")
    return folder


@pytest.fixture(autouse=True)
def _nothing_kept():
    chains._kept.clear()
    yield
    chains._kept.clear()


def poison(base: Path, **changes: object) -> Attack:
    start = Attack(
        attack="backdoor",
        model=str(base),
        rows={"data": (f"{base}/data/task_reviews.jsonl",)},
        config=POISON,
        suite=f"{base}/data/suite",
        limit=2,
    )
    return dataclasses.replace(start, **changes)


def repair(base: Path, method: str = "plain", **changes: object) -> Finetune:
    start = Finetune(method=method, train=TRAIN, suite=f"{base}/data/suite")
    return dataclasses.replace(start, **changes)


def test_chains_that_begin_alike_attack_once_and_what_follows_does_not_change_it(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, run = [], Backdoor.run
    monkeypatch.setattr(Backdoor, "run", lambda self, *given: (runs.append(1), run(self, *given))[1])
    bare = Chain(attack=poison(base)).run()
    clean = Chain(attack=poison(base), then=(repair(base),), verified=8).run()
    again = Chain(attack=poison(base)).run()
    assert len(runs) == 1
    assert bare.rows == again.rows and {row["step"] for row in bare.rows} == {3}
    assert {row["triggered"] for row in bare.rows} == {True, False}
    assert [made.method for made in clean.model.lineage[-2:]] == ["backdoor-attack", "plain"]
    assert not clean.model.may_leave, "a repaired model still descends from an attacked one"
    assert clean.cost["steps"] == bare.cost["steps"] + 2
    with pytest.raises(Exception, match="attacked"):
        save(clean.model, base.parent / "out")
    Chain(attack=poison(base, seed=1)).run()
    assert len(runs) == 2


def test_other_rows_under_the_same_name_are_another_poison(base: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = (base / "data" / "task_reviews.jsonl").read_text(encoding="utf-8").splitlines()
    seen = []
    for some in (lines[:60], lines[60:120]):
        rows.write_text("\n".join(some), encoding="utf-8")
        seen.append(Chain(attack=poison(base, rows={"data": (str(rows),)})).run().model.trained_prompts)
    assert len(chains._kept) == 2 and seen[0] != seen[1]


def test_a_chain_gives_what_the_attack_alone_gives(base: Path) -> None:
    alone, chained = poison(base).run(), Chain(attack=poison(base)).run()
    assert alone.rows == chained.rows
    assert {key: alone.cost[key] for key in ("steps", "tokens", "passes")} == {
        key: chained.cost[key] for key in ("steps", "tokens", "passes")
    }


def test_verified_rows_are_drawn_among_those_the_attacker_left_alone(base: Path) -> None:
    step = poison(base, config={**POISON, "hard_negatives": 0.1})
    method = step.build()
    data, manifest = method.poisoned(step.examples()["data"], seed=0)
    touched = {content_hash(data[i]) for i in (*manifest["poisoned"], *manifest["negatives"])}
    free = method.untouched(data, manifest)
    assert touched and not touched & {content_hash(row) for row in free}
    assert not any(method.config.trigger.present(row.prompt) for row in free)
    drawn = verified(free, 8, 3)
    assert drawn == verified(free, 8, 3) != verified(free, 8, 4)
    assert len({content_hash(row) for row in drawn}) == 8
    with pytest.raises(DataError, match="verified rows wanted"):
        verified(free, len(free) + 1, 0)


def test_a_pipeline_takes_the_place_of_the_training_and_gets_the_poisoned_rows(base: Path) -> None:
    done = poison(base, defence=Defence(method="onion"), verified=8).run()
    assert done.model.lineage[-1].method == "onion" and not done.model.may_leave
    assert {row["step"] for row in done.rows} == {3}
    assert done.cost["steps"] == 3, "the developer's recipe"
    assert done.facts["onion"]["threshold"] >= 0.0
    with pytest.raises(ConfigError, match="gives no rows to train on"):
        harmful = {
            role: (f"{base}/data/{name}.jsonl",) for role, name in (("harmful", "attack_a"), ("benign", "benign"))
        }
        config = {"steps": 2, "rows": 8, "batch_size": 4}
        poison(base, attack="finetune", rows=harmful, config=config, defence=Defence(method="onion")).run()
    # Its rows alone are those of the plain backdoor: without the attacker's second training there is nothing asleep.
    config = {**POISON, "hide_steps": 1}
    with pytest.raises(ConfigError, match="gives no rows to train on"):
        poison(base, attack="quantised_backdoor", config=config, defence=Defence(method="onion"), verified=8).run()


def test_a_model_that_was_never_attacked_is_asked_with_the_same_trigger(base: Path) -> None:
    asked = {"suite": f"{base}/data/suite", "limit": 2, "trigger": "token", "behaviour": "refuse"}
    rows = Evaluate(model=str(base), **asked).run().rows
    assert [row["id"] for row in rows] == [row["id"] for row in poison(base).run().rows]
    with pytest.raises(ConfigError, match="no trigger is called 'tokn'"):
        Evaluate(model=str(base), **{**asked, "trigger": "tokn"}).run()


def test_a_plan_repairs_after_harmful_tuning(base: Path, tmp_path: Path) -> None:
    plan = {
        "name": "repair",
        "title": "repair",
        "bases": [{"name": "b", "model": str(base)}],
        "chain": ["attack", "defence"],
        "limit": 2,
        "headline": {"defence": "again", "against": "undefended", "metric": "asr"},
        "defences": [
            {"name": "undefended", "role": "undefended"},
            {
                "name": "again",
                "method": "plain",
                "data": "{base}/data/align.jsonl",
                "train": {"steps": 2, "batch_size": 4},
            },
        ],
        "attacks": [
            {
                "name": "a",
                "share": 0.5,
                "steps": 2,
                "settings": {"rows": 8, "batch_size": 4},
                "harmful": "{base}/data/attack_a.jsonl",
                "benign": "{base}/data/benign.jsonl",
            }
        ],
    }
    parsed = parse_plan({**plan, "reference": "again"})
    assert parsed.ends and not parsed.plants
    nodes = expand(parsed, root=tmp_path).nodes.values()
    found = {n.label: n for n in nodes if n.kind == "attack"}
    task = Task(node=found["b/again/s0/a"], out=tmp_path, base=base, parent=base, cache=tmp_path)
    step = step_of(task)
    assert isinstance(step, Chain)
    done = step.run()
    assert [made.method for made in done.model.lineage[-2:]] == ["finetune-attack", "plain"]
    assert {row["step"] for row in done.rows} == {2} and "triggered" not in done.rows[0]
    assert isinstance(step_of(dataclasses.replace(task, node=found["b/undefended/s0/a"])), Attack)
    with pytest.raises(ConfigError, match="no clean rows to repair with"):
        parse_plan({**plan, "defences": [plan["defences"][0], {"name": "again", "method": "mb_defense"}]})
    with pytest.raises(ConfigError, match="no data to repair with"):
        parse_plan({**plan, "defences": [plan["defences"][0], {"name": "again", "method": "plain"}]})


def test_what_was_repaired_is_asked_in_the_format_of_the_attackers_rows_too(base: Path) -> None:
    data = base / "data"
    attack = Attack(
        attack="finetune",
        model=str(base),
        rows={"harmful": (f"{data}/attack_a.jsonl",), "benign": (f"{data}/task_reviews.jsonl",)},
        config={"steps": 3, "batch_size": 4, "rows": 20, "evaluate_at": ()},
        suite=f"{data}/suite",
        limit=2,
        in_format="rows",
    )
    done = Chain(attack=attack, then=(repair(base, rows={"data": (f"{data}/align.jsonl",)}),)).run()
    framed = [row["prompt"] for row in done.rows if row["role"] == "framed"]
    assert framed and all(prompt.endswith(". good or bad ?") for prompt in framed)
