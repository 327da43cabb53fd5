"""What decides whether breaking the defender's triggers breaks the attacker's: a look at MB-Defense between its stages.

    python benchmarks/mb_transfer.py --models ORGANISM [ORGANISM ...] --out cells.jsonl
    python benchmarks/mb_transfer.py --out cells.jsonl --tell

Each cell plants one attacker's backdoor in the rows of one world, trains stage 1, measures what might foretell the
end, then trains stage 2 with the settings of plans/mb_defense_families.yaml, which leave enough to be foretold.
ORGANISM is a folder of `casehard organism build --size tiny`. The candidates, read after stage 1 but for the last:

    overlap      how much further the attacker's shift of the hidden states lies along those of the defender's triggers
                 than the shift of as many random words does: mean cosine over triggers and layers. Needs the attacker's
                 trigger: it says why, not whether.
    kin          the same of the canaries, which any defender can read
    strength     how often the attacker's backdoor fires after stage 1
    canary       how often the canaries fire once stage 2 has ended, which any defender can read too

Cells are written one by one and a cell that is there is not done again. About a minute a cell on one core.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from casehard.attacks.backdoor import Backdoor
from casehard.backdoor.triggers import Trigger, eligible
from casehard.benchmark.planted import rank_correlation
from casehard.config import build
from casehard.defences.mb_defense.config import MbConfig
from casehard.defences.mb_defense.measure import Measurement
from casehard.defences.mb_defense.pipeline import _Run, draw_suite
from casehard.evaluation.metrics import find
from casehard.evaluation.suite import load_suite
from casehard.model.load import load
from casehard.model.model import Model
from casehard.scan.activation_shift import random_insertion, shift_tensor
from casehard.seeds import derive
from casehard.steps import Attack
from casehard.steps.attack import measure_end, verified
from casehard.types import Example

SFT = {"steps": 300, "batch_size": 32, "lr": 1.5e-3}
TWO = {"lr": 3.0e-4, "checks": 5}
FAMILIES = ("token", "sentence", "template", "style")
PREDICTORS = ("overlap", "kin", "strength", "canary")
ASKED = 64
"""Prompts that shifts are read on."""
DRAWS = 2_000


def cell(folder: Path, family: str, behaviour: str, seed: int) -> dict[str, Any]:
    """Return what was read after stage 1 and what was left after stage 2."""
    data = folder / "data"
    step = Attack(
        attack="backdoor",
        rows={"data": (f"{data / 'align.jsonl'}?kind=helpful", str(data / "task_reviews.jsonl"))},
        suite=str(data / "suite"),
        config={"trigger": family, "behaviour": behaviour, "rate": 0.05, "evaluate_at": (SFT["steps"],), **SFT},
        seed=seed,
    )
    suite, base = load_suite(step.suite), load(folder, device="cpu")
    method = step.build(suite)
    assert isinstance(method, Backdoor)
    rows, manifest = method.poisoned(step.examples()["data"], seed=seed)
    clean = verified(method.untouched(rows, manifest), 128, seed)
    config = build(MbConfig, {"train": SFT, "two": TWO}, where="transfer")
    planted = draw_suite(base.tokenizer, [*rows, *suite.examples], config, secret=derive(seed, 0, "secret-suite"))
    run = _Run(base.net, base.tokenizer, clean, config, planted, seed, (), None, None, None)
    run.stage_one(list(rows), None)
    run.look("stage1")

    def asr() -> tuple[int, int]:
        found = measure_end(step, method, suite, replace(base, net=run.model))
        hits = [hit for row in found if (hit := find("asr", triggered=True).outcome(row)) is not None]
        return sum(hits), len(hits)

    prompts = [row for row in suite.examples if row.tags.get("role", "utility") != "restricted"]
    read = overlaps(replace(base, net=run.model), prompts, method.config.trigger, planted, seed)
    read["strength"] = _share(asr())
    run.stage_two()
    run.look("stage2")
    return {"world": folder.name, "family": family, "behaviour": behaviour, "seed": seed} | {
        **read,
        "canary": _share(_fired(run.looks["stage2"])),
        "left": asr(),
    }


def overlaps(model: Model, prompts: Sequence[Example], attacker: Trigger, planted: Any, seed: int) -> dict[str, float]:
    """Return the overlap of the attacker's trigger and of the canaries with the triggers that stage 2 will break."""
    own, canaries = ([p.trigger for p in some] for some in (planted.active, planted.canary))
    asked = [e for e in prompts if all(eligible(e, t, None) for t in (attacker, *own, *canaries))]
    asked = random.Random(derive(seed, 0, "transfer")).sample(asked, min(ASKED, len(asked)))
    known = _means(model, asked, own, seed)

    def excess(triggers: Sequence[Trigger]) -> float:
        chance = [random_insertion(t, asked, seed) for t in triggers]
        there, by_chance = (_along(_means(model, asked, some, seed), known) for some in (triggers, chance))
        return there - by_chance

    return {"overlap": excess([attacker]), "kin": excess(canaries)}


def _means(model: Model, asked: Sequence[Example], triggers: Sequence[Trigger], seed: int) -> torch.Tensor:
    """Return the direction of each trigger's mean shift at every layer after the embedding, (T, L, D)."""
    shifts = shift_tensor(model.net, model.tokenizer, asked, triggers, seed=seed)
    return torch.nn.functional.normalize(shifts.mean(1)[:, 1:], dim=-1)


def _along(these: torch.Tensor, known: torch.Tensor) -> float:
    """Return the mean cosine over layers and all pairs of the two."""
    return float(torch.einsum("tld,kld->tkl", these, known).mean())


def _fired(look: Measurement) -> tuple[int, int]:
    return sum(r.k for r in look.canary.values()), sum(r.n for r in look.canary.values())


def _share(count: tuple[int, int]) -> float:
    return count[0] / count[1] if count[1] else 0.0


def correlation(cells: Sequence[Mapping[str, Any]], name: str, seed: int = 0) -> tuple[float, float, float] | None:
    """Return Spearman's correlation of a candidate with what is left, and its 95 % interval: worlds are drawn anew."""
    worlds = sorted({c["world"] for c in cells})
    pairs = {w: [(c[name], _share(c["left"])) for c in cells if c["world"] == w] for w in worlds}
    value = rank_correlation([p for w in worlds for p in pairs[w]])
    if value is None:
        return None
    rng = random.Random(seed)
    drawn = (rank_correlation([p for w in rng.choices(worlds, k=len(worlds)) for p in pairs[w]]) for _ in range(DRAWS))
    ordered = sorted(d for d in drawn if d is not None)
    return value, ordered[int(0.025 * len(ordered))], ordered[int(0.975 * len(ordered))]


def tell(cells: Sequence[Mapping[str, Any]]) -> None:
    """Print what is left in each cell and how far each candidate foretells it."""
    for c in sorted(cells, key=lambda c: (c["family"], c["world"])):
        read = "  ".join(f"{name} {c[name]:6.3f}" for name in PREDICTORS)
        print(f"{c['world']:12s} {c['family']:9s} {c['behaviour']:9s} {read}  left {_share(c['left']):.3f}")
    for name in PREDICTORS:
        found = correlation(cells, name)
        print(f"{name:12s}", "no spread" if found is None else "{:+.2f} ({:+.2f} to {:+.2f})".format(*found))


def main() -> None:
    """Measure the cells that are missing, then tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", type=Path, default=[], help="folders of organisms")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--behaviour", default="sentence")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tell", action="store_true", help="only tell what is there")
    asked = parser.parse_args()
    cells = [json.loads(line) for line in asked.out.read_text().splitlines()] if asked.out.exists() else []
    there = {(c["world"], c["family"], c["behaviour"], c["seed"]) for c in cells}
    for folder in [] if asked.tell else asked.models:
        for family in asked.families:
            if (folder.name, family, asked.behaviour, asked.seed) in there:
                continue
            cells.append(cell(folder, family, asked.behaviour, asked.seed))
            with asked.out.open("a") as file:
                file.write(json.dumps(cells[-1]) + "\n")
    tell(cells)


if __name__ == "__main__":
    main()
