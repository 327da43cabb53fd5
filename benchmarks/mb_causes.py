"""Where MB-Defense loses clean accuracy: one setting changed at a time, on a world that no table uses.

    python benchmarks/mb_causes.py --model ORGANISM [--trigger token] [--behaviour sentence] [--only STAGE_1 ...]

Each line is one model: right answers to untriggered held-out prompts, by group, and what the defender sees of its own
triggers on held-back clean rows. The attacker's backdoor is planted in the training rows, as in the plans, and its
trigger is never asked: nothing here can be chosen by what is left of the attack. Stage 1 is trained once for all the
runs of stage 2 that begin with it. About five minutes for everything on one core.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from casehard.backdoor.measure import ROLES, reference
from casehard.backdoor.suite import Planted
from casehard.config import build
from casehard.data.batches import IGNORE, Batch, Encoded, collate
from casehard.defences.mb_defense import pipeline
from casehard.defences.mb_defense.config import MbConfig
from casehard.defences.mb_defense.measure import Measurement
from casehard.defences.mb_defense.method import MbStage2
from casehard.defences.mb_defense.pairs import PairSet
from casehard.defences.mb_defense.pipeline import _Run, draw_suite
from casehard.defences.mb_defense.weights import trained
from casehard.evaluation.suite import Suite, evaluate, load_suite
from casehard.maths.neutralise import log_probs_of
from casehard.model.load import load
from casehard.seeds import derive, generator
from casehard.steps import Attack
from casehard.steps.attack import verified
from casehard.train.protocol import Setup, Step
from casehard.types import Example

SFT = {"steps": 300, "batch_size": 32, "lr": 1.5e-3}
TWO = {"lr": 3.0e-4, "checks": 5}
LIKED = 0.5
"""Nats a token: rows whose answer the base gives at such a loss or less may anchor it."""
HALF = {"base_share": 0.5}
NO_ANCHOR = {"kappa": 0.0}
PLAIN = {"lam": 0.0, "mu": 0.0, "kappa": 0.0}
STAGE_1: dict[str, dict[str, Any]] = {
    "replace": {},
    "append": {"placement": "append"},
    "floor 18": {"floor": 18},
    "append, 2 triggers": {"placement": "append", "n_active": 2},
    "replace, 2 triggers": {"n_active": 2},
    "no planting": {"stage1": False},
}
STAGE_2: dict[str, dict[str, Any]] = {
    "as it was": {},
    "lr 1e-4": {"two": {"lr": 1.0e-4}},
    "kappa 4": {"settings": {"kappa": 4.0}},
    "lam 0.3": {"settings": {"lam": 0.3}},
    "32 steps": {"two": {"epochs": 1.25}},
    "clean fine-tuning": {"settings": PLAIN},
    "512 rows, same steps": {"clean": 512, "two": {"epochs": 1.25}},
    "512 rows, same steps, lr 1e-4": {"clean": 512, "two": {"epochs": 1.25, "lr": 1.0e-4}},
    "anchor data": {"anchor": "stage 1"},
    "anchor base": {"anchor": "base"},
    "base 0.3": {"two": {"base_share": 0.3}},
    "base 0.5": {"two": HALF},
    "base 0.5, kappa 0": {"two": HALF, "settings": NO_ANCHOR},
    "base 0.5, clean fine-tuning": {"two": HALF, "settings": PLAIN},
    "base 0.5, 512 rows, same steps": {"two": HALF | {"epochs": 1.25}, "clean": 512},
    "base 0.5, kappa 0, 512 rows, same steps": {
        "two": HALF | {"epochs": 1.25},
        "settings": NO_ANCHOR,
        "clean": 512,
    },
}
PLAN: dict[str, tuple[str, ...]] = {
    "replace": (
        "as it was",
        "lr 1e-4",
        "lam 0.3",
        "32 steps",
        "clean fine-tuning",
        "512 rows, same steps",
        "512 rows, same steps, lr 1e-4",
        "anchor data",
        "anchor base",
        "base 0.3",
        "base 0.5",
        "base 0.5, kappa 0",
        "base 0.5, clean fine-tuning",
        "base 0.5, 512 rows, same steps",
        "base 0.5, kappa 0, 512 rows, same steps",
    ),
    "append": ("as it was", "lr 1e-4", "kappa 4"),
    "append, 2 triggers": ("as it was",),
    "replace, 2 triggers": ("as it was", "base 0.5"),
    "floor 18": (),
    "no planting": ("base 0.5, kappa 0", "base 0.5, kappa 0, 512 rows, same steps"),
}


class Wide(MbStage2):
    """Stage 2 whose anchor is asked on ``rows``, one more batch a step, instead of the clean ones."""

    rows: Sequence[Encoded] = ()
    model: nn.Module | None = None
    """The reference; None is the model that stage 2 begins with."""

    def prepare(self, setup: Setup) -> None:
        """Remember what the reference says on all rows."""
        super().prepare(setup)
        clean = self.pairs
        none: tuple[tuple[Encoded, ...], ...] = ((),) * len(self.rows)
        self.pairs = PairSet(tuple(self.rows), none, none, clean.pad_id)
        self._wide = self._answers(self.model or setup.model)
        self.pairs = clean

    def _clean(self, model: nn.Module, batch: Batch, rows: list[int], step: Step) -> torch.Tensor:
        mine, own = self.config, self._reference
        self.config = replace(mine, kappa=0.0)
        loss = super()._clean(model, batch, rows, step)
        self.config = mine
        order = torch.randperm(len(self.rows), generator=generator(self._seed, step.index, "wide"))
        drawn = order[: len(rows)].tolist()
        other = collate([self.rows[i] for i in drawn], self.pairs.pad_id)
        self._reference = self._wide
        logits = model(input_ids=other["input_ids"], attention_mask=other["attention_mask"]).logits
        kl = self._anchor(model, other, drawn, logits)
        self._reference = own
        step.backward(mine.kappa / step.micros * kl)
        return loss + mine.kappa * kl.detach()


class Cell(NamedTuple):
    """The rows of one backdoor."""

    data: Sequence[Example]
    clean: Sequence[Example]
    suite: Suite
    planted: Planted


class Bench:
    """One world and one attacker."""

    def __init__(self, model: Path, trigger: str, behaviour: str) -> None:
        self.model, self.attack = model, {"trigger": trigger, "behaviour": behaviour}
        self.data = [f"{model}/data/align.jsonl?kind=helpful", f"{model}/data/task_reviews.jsonl"]
        self.began = time.monotonic()

    def base(self) -> nn.Module:
        """Return the base, newly read."""
        return load(str(self.model)).net

    def step(self, rate: float = 0.05) -> Attack:
        """Return the attack of the plans at a poison rate; 0 trains on the rows before the poison."""
        config = {**self.attack, **SFT, "rate": rate, "evaluate_at": ()}
        files = {"model": str(self.model), "rows": {"data": tuple(self.data)}, "suite": f"{self.model}/data/suite"}
        return Attack(**files, attack="backdoor", config=config)

    def cell(self, clean: int = 128) -> Cell:
        """Return the rows of a cell of the plans with ``clean`` verified rows."""
        step, suite = self.step(), load_suite(f"{self.model}/data/suite")
        method: Any = step.build(suite)
        data, manifest = method.poisoned(step.examples()["data"], seed=0)
        drawn = verified(method.untouched(data, manifest), clean, 0)
        return Cell(data, drawn, suite, Planted(method.config.trigger, method.config.behaviour))

    def attacked(self, rate: float) -> nn.Module:
        """Return the model after the developer's training on poisoned rows."""
        done = self.step(rate).run()
        assert done.model is not None
        return done.model.net

    def begin(self, plant: Mapping[str, Any], change: Mapping[str, Any]) -> tuple[_Run, Cell]:
        """Return a run that has trained nothing yet."""
        loaded, cell, plant = load(str(self.model)), self.cell(change.get("clean", 128)), dict(plant)
        settings: dict[str, Any] = {"stage1": plant.pop("stage1", True), "plant": plant, "train": SFT}
        settings |= {"two": {**TWO, **change.get("two", {})}, "settings": change.get("settings", {})}
        config = build(MbConfig, settings, where="dev")
        corpus = [*cell.data, *cell.suite.examples]
        suite = draw_suite(loaded.tokenizer, corpus, config, secret=derive(0, 0, "secret-suite"))
        return _Run(loaded.net, loaded.tokenizer, cell.clean, config, suite, 0, (), None, None, None), cell

    def accuracy(self, model: nn.Module, cell: Cell, planted: Sequence[Planted]) -> dict[str, tuple[int, int]]:
        """Return right answers and questions by group; ``fired``: wrong answers that show a behaviour of the
        defender's, and the attacker's, though no trigger was there."""
        roles = [role for role in cell.suite.roles if role in ROLES]
        rows = evaluate(model, load(str(self.model)).tokenizer, cell.suite, roles=roles)
        rows = [row for row in rows if row["correct"] is not None]
        asked, right = Counter(r["group"] for r in rows), Counter(r["group"] for r in rows if r["correct"])
        proper = {e.id: reference(e) for e in cell.suite.examples}
        wrong = [(r["response"], proper[r["id"]]) for r in rows if not r["correct"]]
        own = sum(any(p.behaviour.shown(said, meant) for p in planted) for said, meant in wrong)
        attackers = sum(cell.planted.behaviour.shown(said, meant) for said, meant in wrong)
        groups = {g: (right[g], n) for g, n in sorted(asked.items())}
        return {"all": (sum(right.values()), len(rows)), "fired": (own, attackers), **groups}

    def tell(
        self, name: str, model: nn.Module, cell: Cell, run: _Run | None = None, look: Measurement | None = None
    ) -> None:
        """Print one line for people, and the same as JSON."""
        found = self.accuracy(model, cell, run.suite.all if run else ())
        record: dict[str, Any] = {"name": name, "accuracy": found}
        if look is not None:
            record |= {r: [(x.k, x.n) for x in getattr(look, r).values()] for r in ("active", "canary")}
            record |= {"step": look.step, "clean_loss": look.clean_loss, "margin": look.margin}
        k, n = found["all"]
        own = {
            r: f"{sum(x for x, _ in record[r])}/{sum(x for _, x in record[r])}" for r in ("active", "canary") if look
        }
        print(f"{time.monotonic() - self.began:5.0f} s  {name:58s} {k}/{n} = {k / n:.3f}  {own}")
        print(json.dumps(record), flush=True)

    @contextmanager
    def anchored(self, run: _Run, cell: Cell, to: str) -> Iterator[None]:
        """Let stage 2 anchor on training rows inside the block: all of them to the model it begins with, or those
        whose answer the base finds likely to the base."""
        if not to:
            yield
            return
        rows = list(run.chat.encode_all(list(cell.data)).rows)
        if to == "base":
            base = self.base()
            rows = [row for row in rows if _loss(base, row) <= LIKED]
            Wide.model = base
        Wide.rows, pipeline.MbStage2 = rows, Wide  # type: ignore[misc]
        try:
            yield
        finally:
            Wide.rows, Wide.model, pipeline.MbStage2 = (), None, MbStage2  # type: ignore[misc]

    def stage_two(self, first: str, second: str, start: Mapping[str, torch.Tensor]) -> None:
        """Run stage 2 from the weights after stage 1 and tell what came of it."""
        change = STAGE_2[second]
        run, cell = self.begin(STAGE_1[first], change)
        run.model.load_state_dict(start)
        run.look("stage1")
        run.base = trained(self.base())
        run.mix()
        if "mixed" in run.looks:
            self.tell(f"{first} | {second}: mixed", run.model, cell, run, run.looks["mixed"])
        with self.anchored(run, cell, change.get("anchor", "")):
            look = run.stage_two().look
        self.tell(f"{first} | {second}", run.model, cell, run, look)
        end = copy.deepcopy(run.model.state_dict())
        for share in (0.75, 0.5) if second == "as it was" else ():
            between = {name: torch.lerp(start[name], end[name], share) for name in start}
            run.model.load_state_dict(between)
            run.look("between")
            self.tell(f"{first} | {second}, {share} of the way", run.model, cell, run, run.looks["between"])


@torch.no_grad()
def _loss(model: nn.Module, row: Encoded) -> float:
    """Return the loss of one row, nats a token."""
    batch = collate([row], 0)
    return float(-log_probs_of(model, batch).sum() / (batch["labels"][:, 1:] != IGNORE).sum())


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of an organism")
    parser.add_argument("--trigger", default="token")
    parser.add_argument("--behaviour", default="sentence")
    parser.add_argument("--only", nargs="*", choices=PLAN, help="ways of stage 1; all of them when left out")
    args = parser.parse_args()
    bench = Bench(args.model, args.trigger, args.behaviour)
    cell = bench.cell()
    bench.tell("base", bench.base(), cell)
    bench.tell("never poisoned", bench.attacked(0.0), cell)
    bench.tell("poisoned", bench.attacked(0.05), cell)
    for first in args.only or PLAN:
        run, cell = bench.begin(STAGE_1[first], {})
        run.stage_one(list(cell.data), None)
        run.look("stage1")
        bench.tell(f"{first} | stage 1", run.model, cell, run, run.looks["stage1"])
        start = copy.deepcopy(run.model.state_dict())
        for second in PLAN[first]:
            bench.stage_two(first, second, start)


if __name__ == "__main__":
    main()
