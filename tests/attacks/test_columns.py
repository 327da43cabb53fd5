"""Attacks that train nothing as columns of a plan."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import casehard as ch
from casehard.benchmark.plan import parse_plan
from casehard.errors import ConfigError
from casehard.steps import Attack, Chain, Defence, Finetune

WORLD = Path(ch.__file__).parent / "organism" / "assets" / "world0-tiny"
PROGRAM = Path(__file__).with_name("edit_model.py")
PLAN = """
name: editors
title: attacks that edit or prompt
suite: "{base}/data/suite"
bases: [{name: m, model: WORLD}]
defences:
  - {name: none, role: undefended, method: plain, data: &d ["{base}/data/align.jsonl"], train: {steps: 2, lr: 1.0e-4}}
  - {name: same, method: plain, data: *d, train: {steps: 3, lr: 1.0e-4}}
attacks:
  - {name: prefill, attack: prefill, settings: {source: rows, tokens: [2]}, harmful: "{base}/data/attack_a.jsonl"}
  - name: abliteration
    attack: abliteration
    settings: {rows: 8, held_out: 4, strengths: [1.0]}
    harmful: "{base}/data/attack_a.jsonl"
    benign: "{base}/data/benign.jsonl"
  - {name: difference, attack: weight_difference, settings: {before: WORLD, factor: 0.5}}
  - {name: rounded, attack: round_trip, settings: {bits: 4}}
  - {name: soft, attack: soft_prompt, steps: 1, lr: 0.1, settings: {tokens: 2}, harmful: "{base}/data/attack_a.jsonl"}
  - {name: other, attack: external, settings: {command: [PYTHON, PROGRAM, "{model}", "{out}", "0.5"]}}
headline: {defence: same, metric: asr}
limit: 1
"""


RUN = ("prefill", "difference", "soft")
"""Columns that are run; the others differ in nothing that a plan looks at."""


def plan() -> dict:
    words = {"WORLD": WORLD, "PYTHON": sys.executable, "PROGRAM": PROGRAM}
    text = PLAN
    for word, value in words.items():
        text = text.replace(word, str(value))
    return yaml.safe_load(text)


def test_they_are_columns_of_a_bench(tmp_path: Path) -> None:
    some = [a for a in plan()["attacks"] if a["name"] in RUN]
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan() | {"attacks": some}))
    done = ch.bench(tmp_path / "plan.yaml", out=tmp_path / "out", jobs=1)
    assert not done.failed
    found = {(r["defence"], r["attack"], r["steps"]) for r in done.summary["records"] if r["metric"] == "asr"}
    assert found >= {(d, name, 1) for d in ("none", "same") for name in RUN}


def test_a_plan_accepts_each_and_gives_it_its_settings() -> None:
    for column in parse_plan(plan()).attacks:
        step = Attack(attack=column.attack, config=column.config)
        step.check_settings()
        assert set(column.settings) <= set(step.config) and "mode" not in step.config


def test_a_mode_or_share_that_an_attack_does_not_have_is_refused() -> None:
    soft = {"name": "soft", "attack": "soft_prompt", "mode": "lora", "harmful": "{base}/data/attack_a.jsonl"}
    with pytest.raises(ConfigError, match="attack 'soft' has no mode: 'lora' would be ignored"):
        parse_plan(plan() | {"attacks": [soft]})
    with pytest.raises(ConfigError, match=r"attack 'soft' has no share: 0\.5 would be ignored"):
        parse_plan(plan() | {"attacks": [{**soft, "mode": "full", "share": 0.5}]})


def test_nothing_repairs_what_was_only_asked() -> None:
    repaired = plan() | {"chain": ["attack", "defence"]}
    with pytest.raises(ConfigError, match="attack 'prefill' changes how a model is asked and no weights"):
        parse_plan(repaired)
    with pytest.raises(ConfigError, match="attack 'prefill' changes no weights"):
        Chain(attack=Attack(attack="prefill", suite=str(WORLD / "data" / "suite")), then=(Finetune(),)).run()


@pytest.mark.parametrize(
    ("attack", "config", "why"),
    [
        ("burst", {}, "trains on no mixture"),
        ("preference", {}, "trains on no mixture"),
        ("prefill", {}, "trains on no mixture"),
        ("finetune", {"restarts": 2}, "trains in several phases"),
    ],
)
def test_an_attack_without_one_training_takes_no_method_inside(attack, config, why):
    step = Attack(attack=attack, config=config, defence=Defence(method="shrink"))
    with pytest.raises(ConfigError, match=why):
        step.check_settings()
    replace(step, defence=None).check_settings()
