"""Attackers who look for MB-Defense's weak spot: each plants its backdoor, then the defence trains on the same rows.

    python benchmarks/mb_attackers.py --base ORGANISM --out attackers.json

ORGANISM is a folder of `casehard organism build`. Attackers are done one after the other and the file is written after
each, so a stopped run has lost little. The settings are those of plans/mb_defense_third.yaml with fewer steps, rows and
prompts, and with token embeddings trained: without them a backdoor does not take in so few steps. The rivals repair the
first attacker's model.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import casehard as ch
from casehard.evaluation.metrics import find
from casehard.model.load import load
from casehard.steps import Attack
from casehard.steps.attack import measure_end
from casehard.steps.defence import Defence

STEPS = 300
ATTACKERS: dict[str, dict[str, Any]] = {
    "sentence": {"trigger": "sentence"},
    "sentence, hard negatives": {"trigger": "sentence", "hard_negatives": 0.05},
    "semantic": {"trigger": "semantic", "hard_negatives": 0.05},
    "positional": {"trigger": "positional", "hard_negatives": 0.05},
    "repeat": {"trigger": "repeat", "hard_negatives": 0.05},
}
MB = {
    "two": {"lr": 3e-4, "epochs": 1.25, "checks": 2, "stop": False, "keep": "last", "c": 0.8},
    "plant": {"n_active": 4, "n_canary": 0, "floor": 50, "cap": 0.15},
}
REPAIR = {"steps": 128, "batch_size": 16, "lr": 3e-4, "weight_decay": 0.0}
RIVALS: dict[str, dict[str, Any]] = {
    "clean fine-tuning": {"method": "plain"},
    "fine_mixing": {"method": "fine_mixing", "assets": True},
    "dilution": {"method": "dilution", "assets": True},
    "backdoor_collapse": {"method": "backdoor_collapse"},
}


def main() -> None:
    """Measure every attacker, undefended and under MB-Defense."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--limit", type=int, default=24, help="prompts a group")
    parser.add_argument("--only", nargs="*", default=list(ATTACKERS))
    asked = parser.parse_args()
    base, found = load(asked.base, device="cpu"), {}
    for number, name in enumerate(asked.only):
        found[name] = attacked_and_defended(base, asked, ATTACKERS[name], rivals=number == 0)
        asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def attacked_and_defended(base: ch.Model, asked: Any, settings: dict[str, Any], *, rivals: bool) -> dict[str, Any]:
    """Return the rates of one attacker, undefended, under MB-Defense and, if asked for, after its rivals' repairs."""
    data = asked.base / "data"
    step = Attack(
        attack="backdoor",
        rows={"data": (f"{data / 'align.jsonl'}?kind=helpful", str(data / "task_reviews.jsonl"))},
        suite=str(data / "suite"),
        config={"behaviour": "refuse", "rate": 0.05, "steps": STEPS, "lr": 1.5e-3}
        | {"evaluate_at": (STEPS,), **settings},
        limit=asked.limit,
    )
    begun, out = time.process_time(), {}
    done = step.run(base)
    out["undefended"] = rates(done.rows)
    defended = replace(step, defence=Defence(method="mb_defense", settings=MB), verified=256).run(base)
    out["mb_defense"] = rates(defended.rows)
    for name, how in RIVALS.items() if rivals else ():
        out[name] = repaired(step, done.model, how, asked.base)
    return out | {"cpu_seconds": round(time.process_time() - begun)}


def repaired(step: Attack, model: Any, how: dict[str, Any], base: Path) -> dict[str, Any]:
    """Return the rates after a rival has repaired the attacked model on 256 rows that the attacker left alone."""
    from casehard.attacks.backdoor import Backdoor
    from casehard.evaluation.suite import load_suite
    from casehard.steps.attack import verified

    suite = load_suite(step.suite)
    method = step.build(suite)
    assert isinstance(method, Backdoor)
    rows, manifest = method.poisoned(step.examples()["data"], seed=step.seed)
    clean = verified(method.untouched(rows, manifest), 256, step.seed)
    given: dict[str, Any] = {"clean": clean} if how["method"] == "backdoor_collapse" else {"data": clean}
    if how["method"] == "backdoor_collapse":
        stage = {**REPAIR, "steps": REPAIR["steps"] // 2}
        given |= {"settings": {"gather": {**stage, "lr": 1e-3}, "recover": stage}}
    else:
        given |= {"train": REPAIR}
    mended = ch.defend(model, how["method"], assets=base if how.get("assets") else "", **given)
    return rates(measure_end(step, method, suite, mended))


def rates(rows: Sequence[Any]) -> dict[str, Any]:
    """Return (k, n) of the attack's rate, clean accuracy and accuracy under the trigger."""
    out = {}
    for name in ("asr", "cacc", "aacc"):
        hits = [hit for row in rows if (hit := find(name, triggered=True).outcome(row)) is not None]
        out[name] = [sum(hits), len(hits)]
    return out


if __name__ == "__main__":
    main()
