"""Where MB-Defense loses clean accuracy: stage 1 and stage 2 changed one setting at a time, on a world of no table.

    python benchmarks/mb_causes.py --model ORGANISM [--trigger token] [--behaviour sentence] [--only NAME ...]

Each line is one model: clean accuracy on untriggered prompts, by group, and what the defender sees of its own
triggers. The attacker's trigger is planted in the training rows, as in the plans, and never asked: nothing here can be
chosen by what is left of the attack. Stage 1 is trained once for all the runs of stage 2 that begin with it.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from casehard.bench.arms import _attacked, _Cell, arm_of
from casehard.config import build
from casehard.data.batches import IGNORE, Batch, Encoded, collate
from casehard.data.trigger_suite import Planted
from casehard.defend.mb_defense import MbDefense
from casehard.defend.protocol import Setup, Step
from casehard.evaluate.backdoor import ROLES, reference
from casehard.evaluate.suite import evaluate
from casehard.maths.neutralise import log_probs_of
from casehard.mb import pipeline
from casehard.mb.config import MbConfig
from casehard.mb.measure import Look
from casehard.mb.pipeline import _Run, draw_suite
from casehard.mb.weights import trained
from casehard.model.load import load
from casehard.seeds import derive, generator

SFT = {"steps": 300, "batch_size": 32, "lr": 1.5e-3}
TWO = {"lr": 3.0e-4, "checks": 5}
STAGE_1: dict[str, dict[str, Any]] = {
    "replace": {},
    "no planting": {"stage1": False},
    "append": {"placement": "append"},
    "floor 18": {"floor": 18},
    "append, floor 18": {"placement": "append", "floor": 18},
    "append, 2 triggers": {"placement": "append", "n_active": 2},
    "replace, 2 triggers": {"n_active": 2},
    "append, 2 and 1": {"placement": "append", "n_active": 2, "n_canary": 1},
}
STAGE_2: dict[str, dict[str, Any]] = {
    "as it was": {},
    "lr 1e-4": {"two": {"lr": 1.0e-4}},
    "kappa 4": {"settings": {"kappa": 4.0}},
    "512 rows, same steps": {"clean": 512, "two": {"epochs": 1.25}},
    "512 rows, same steps, lr 1e-4": {"clean": 512, "two": {"epochs": 1.25, "lr": 1.0e-4}},
    "512 rows": {"clean": 512},
    "anchor data": {"anchor": "stage1"},
    "anchor base": {"anchor": "base"},
    "lam 0.3": {"settings": {"lam": 0.3}},
    "lam 0": {"settings": {"lam": 0.0}},
    "32 steps": {"two": {"epochs": 1.25}},
    "clean fine-tuning": {"settings": {"lam": 0.0, "mu": 0.0, "kappa": 0.0}},
    "base 0.5": {"two": {"base_share": 0.5}},
    "base 0.5, kappa 0": {"two": {"base_share": 0.5}, "settings": {"kappa": 0.0}},
    "base 0.5, lr 1e-4": {"two": {"base_share": 0.5, "lr": 1.0e-4}},
    "base 0.5, clean fine-tuning": {"two": {"base_share": 0.5}, "settings": {"lam": 0.0, "mu": 0.0, "kappa": 0.0}},
    "base 0.5, 512 rows": {"two": {"base_share": 0.5, "epochs": 1.25}, "clean": 512},
    "base 0.3, lr 1e-4": {"two": {"base_share": 0.3, "lr": 1.0e-4}},
    "base 0.3": {"two": {"base_share": 0.3}},
    "base 0.5, kappa 0, 512 rows": {"two": {"base_share": 0.5, "epochs": 1.25}, "settings": {"kappa": 0.0}, "clean": 512},
    "base 0.4, kappa 0": {"two": {"base_share": 0.4}, "settings": {"kappa": 0.0}},
}
PLAN: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("replace", ("as it was", "base 0.5, kappa 0", "base 0.5", "base 0.5, kappa 0, 512 rows", "base 0.5, 512 rows")),
    ("no planting", ("base 0.5, kappa 0",)),
    ("replace, 2 triggers", ("base 0.5, kappa 0",)),
)


class Wide(MbDefense):
    """Stage 2 whose anchor is asked on other rows than the clean ones."""

    rows: Sequence[Encoded] = ()
    model: nn.Module | None = None

    def prepare(self, setup: Setup) -> None:
        super().prepare(setup)
        clean, self.pairs = self.pairs, _Rows(self.rows, self.pairs.pad_id)
        self._wide = self._answers(self.model or setup.model)
        self.pairs = clean

    def _anchor(self, model: nn.Module, batch: Batch, rows: list[int], logits: torch.Tensor) -> torch.Tensor:
        raise AssertionError("not asked on clean rows")

    def _clean(self, model: nn.Module, batch: Batch, rows: list[int], step: Step) -> torch.Tensor:
        kappa, kept = self.config.kappa, self._reference
        self.config = replace(self.config, kappa=0.0)
        loss = super()._clean(model, batch, rows, step)
        self.config = replace(self.config, kappa=kappa)
        g = generator(self._seed, step.index, "wide")
        drawn = torch.randperm(len(self.rows), generator=g)[: len(rows)].tolist()
        other = collate([self.rows[i] for i in drawn], self.pairs.pad_id)
        self._reference = self._wide
        logits = model(input_ids=other["input_ids"], attention_mask=other["attention_mask"]).logits
        kl = MbDefense._anchor(self, model, other, drawn, logits)
        self._reference = kept
        step.log({"kl": float(kl.detach())})
        step.backward(kappa / step.micros * kl)
        return loss + kappa * kl.detach()


class _Rows:
    def __init__(self, rows: Sequence[Encoded], pad_id: int) -> None:
        self.clean, self.pad_id = rows, pad_id


class Bench:
    """One world and one attacker."""

    def __init__(self, model: Path, trigger: str, behaviour: str) -> None:
        self.model = model
        self.base = {"data": [f"{model}/data/align.jsonl?kind=helpful", f"{model}/data/task_reviews.jsonl"]}
        self.attack = {"trigger": trigger, "behaviour": behaviour}
        self.began = time.monotonic()

    def cell(self, clean: int) -> _Cell:
        """Return the rows of a cell of the plans with ``clean`` verified rows."""
        config = {**self.attack, "rate": 0.05, "hard_negatives": 0.0, "system": None, "max_length": None, "sft": SFT}
        config |= {"arm": "attacked", "method": "", "settings": {}, "train": {}, "clean": clean, "limit": None}
        suite = f"{self.model}/data/suite"
        return _Cell(arm_of(config, str(self.model), self.base["data"], suite, seed=0, where="dev"), "dev")

    def begin(self, plant: Mapping[str, Any], change: Mapping[str, Any]) -> tuple[_Run, _Cell]:
        """Return a run that has trained nothing yet."""
        loaded, cell = load(str(self.model)), self.cell(change.get("clean", 128))
        plant = dict(plant)
        settings = {"stage1": plant.pop("stage1", True), "plant": plant, "train": SFT, "two": {**TWO, **change.get("two", {})}}
        config = build(MbConfig, {**settings, "settings": change.get("settings", {})}, where="dev")
        corpus = [*cell.data, *cell.suite.examples]
        suite = draw_suite(loaded.tokenizer, corpus, config, secret=derive(0, 0, "secret-suite"))
        return _Run(loaded.model, loaded.tokenizer, cell.clean, config, suite, 0, (), None, None, None), cell

    def accuracy(self, model: nn.Module, cell: _Cell, planted: Sequence[Planted]) -> dict[str, tuple[int, int]]:
        """Return correct answers and questions by group, without any trigger; ``fired``: wrong answers that show a
        behaviour of the defender's, and the attacker's, where nothing should have set it off."""
        roles = [role for role in cell.suite.roles if role in ROLES]
        rows = evaluate(model, load(str(self.model)).tokenizer, cell.suite, roles=roles)
        rows = [row for row in rows if row["correct"] is not None]
        asked, right = Counter(r["group"] for r in rows), Counter(r["group"] for r in rows if r["correct"])
        proper = {e.id: reference(e) for e in cell.suite.examples}
        wrong = [(r["response"], proper[r["id"]]) for r in rows if not r["correct"]]
        fired = sum(any(p.behaviour.shown(said, right_) for p in planted) for said, right_ in wrong)
        woken = sum(cell.planted.behaviour.shown(said, right_) for said, right_ in wrong)
        by_group = {g: (right[g], n) for g, n in sorted(asked.items())}
        return {"all": (sum(right.values()), len(rows)), "fired": (fired, woken), **by_group}

    def tell(
        self,
        name: str,
        model: nn.Module,
        cell: _Cell,
        look: Look | None = None,
        planted: Sequence[Planted] = (),
        **more: Any,
    ) -> None:
        """Print one line, and the same as JSON."""
        found = self.accuracy(model, cell, planted)
        own = {r: [(x.k, x.n) for x in getattr(look, r).values()] for r in ("active", "canary")} if look else {}
        losses = {"clean_loss": look.clean_loss, "margin": look.margin} if look else {}
        k, n = found["all"]
        print(f"{time.monotonic() - self.began:5.0f} s  {name:50s} {k}/{n} = {k / n:.3f}  {own} {losses} {more}")
        record = {"name": name, "accuracy": found, **own, **losses, **more}
        print(json.dumps(record), flush=True)


def mixed(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
    """Return share a + (1 - share) b, tensor by tensor."""
    return {name: torch.lerp(b[name].float(), value.float(), share).to(value.dtype) for name, value in a.items()}


def own_loss(model: nn.Module, row: Encoded) -> float:
    """Return the loss of one row, nats a token."""
    batch = collate([row], 0)
    return float(-log_probs_of(model, batch).sum() / (batch["labels"][:, 1:] != IGNORE).sum())


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--trigger", default="token")
    parser.add_argument("--behaviour", default="sentence")
    parser.add_argument("--only", nargs="*", default=None, help="stage 1 variants; all when left out")
    args = parser.parse_args()
    bench = Bench(args.model, args.trigger, args.behaviour)
    cell = bench.cell(128)
    bench.tell("base", load(str(args.model)).model, cell)
    if args.only is None:
        bench.tell("never poisoned", _attacked(cell.job.source.clean())[0], cell)
        bench.tell("poisoned", _attacked(cell.job.source)[0], cell)
    for first, seconds in PLAN:
        if args.only is not None and first not in args.only:
            continue
        run, cell = bench.begin(STAGE_1[first], {})
        run.stage_one(list(cell.data), None)
        run.look("stage1")
        planted = run.looks["stage1"]
        bench.tell(f"{first} | stage 1", run.model, cell, planted, run.suite.all)
        start = copy.deepcopy(run.model.state_dict())
        for second in seconds:
            again, other = bench.begin(STAGE_1[first], STAGE_2[second])
            again.model.load_state_dict(start)
            again.look("stage1")
            change = STAGE_2[second]
            if again.config.two.base_share:
                again.base = trained(load(str(args.model)).model)
                again.mix()
                bench.tell(f"{first} | {second}: mixed", again.model, other, again.looks["mixed"], again.suite.all)
            pipeline.MbDefense = MbDefense
            if "anchor" in change:
                base = load(str(args.model)).model
                encoded = again.chat.encode_all(list(other.data)).rows
                liked = encoded
                if change["anchor"] == "base":
                    with torch.no_grad():
                        losses = [own_loss(base, row) for row in encoded]
                    liked = [row for row, loss in zip(encoded, losses, strict=True) if loss < 0.5]
                    bad = set(other.manifest["poisoned"])
                    print(
                        "liked",
                        len(liked),
                        "of",
                        len(encoded),
                        "poisoned among them",
                        sum(losses[i] < 0.5 for i in bad),
                    )
                Wide.rows, Wide.model = liked, base if change["anchor"] == "base" else None
                pipeline.MbDefense = Wide
            broken = again.stage_two()
            facts = {"steps": broken.steps, "of": broken.of, "met": broken.met}
            facts["rise"] = broken.look.clean_loss - again.looks["stage1"].clean_loss
            bench.tell(f"{first} | {second}", again.model, other, broken.look, again.suite.all, **facts)
            end = copy.deepcopy(again.model.state_dict())
            for share in (0.75, 0.5) if second == "as it was" and first in ("replace", "append") else ():
                again.model.load_state_dict(mixed(end, start, share))
                again.look(f"mixed {share}")
                bench.tell(
                    f"{first} | {second}, {share} of it",
                    again.model,
                    other,
                    again.looks[f"mixed {share}"],
                    again.suite.all,
                )


if __name__ == "__main__":
    main()
