"""The defence in memory: plant, break, clean up, measure after each, and judge.

    joint     base --SFT on data with planted rows--> stage 1 [--some weights back to the base-->] --stage 2--> result
    posthoc   checkpoint --short training that installs--> stage 1 --stage 2--> result
    adapter   base + untrusted LoRA, as posthoc, training that LoRA; merged at the end

Which checkpoint is kept depends on defensive backdoors and held-back clean rows alone. A backdoor that the user
describes is reported and may forbid the export; it never chooses anything.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from casehard.backdoor.suite import Planted, TriggerSuite, generate, paper_suite
from casehard.config import build, to_dict
from casehard.data.chat import ChatFormat
from casehard.data.mix import content_hash
from casehard.defences.mb_defense.config import MbConfig
from casehard.defences.mb_defense.measure import Measurement, Probe, check_unknown, check_verified, encode_pairs
from casehard.defences.mb_defense.method import PRESETS, MbStage2, MbStage2Config
from casehard.defences.mb_defense.pairs import PairSet
from casehard.defences.mb_defense.poison import Pairs, Twins, build_pairs, defensive_poison
from casehard.defences.mb_defense.verdict import Verdict, judge, limits
from casehard.defences.mb_defense.weights import mix_back, pull_back, restore, trained
from casehard.errors import ConfigError, DataError
from casehard.model.adapters import add_lora
from casehard.seeds import derive
from casehard.train.fit import fit
from casehard.train.recipe import TrainConfig
from casehard.types import Budget, Example

Rows = list[dict[str, Any]]
INSTALL_CHECKS = 10


@dataclass(frozen=True)
class Hardened:
    """What came of it."""

    model: nn.Module
    """The model, adapters merged; the one passed in where it has no adapters."""
    suite: TriggerSuite
    """The defender's secret."""
    pairs: PairSet | None
    """What stage 2 trains on, as secret as the suite; None without triggers."""
    verdict: Verdict
    report: dict[str, Any]
    """Everything measured, as JSON values and without the secret."""
    rows: Rows
    """What ``measure`` returned, each row with its ``stage``."""


@dataclass(frozen=True)
class _Broken:
    look: Measurement
    met: bool
    steps: int
    of: int
    sequences: float


def objective(config: MbConfig) -> MbStage2Config:
    """Return the settings of stage 2's objective: the preset's, then the given ones."""
    if config.preset and config.preset not in PRESETS:
        raise ConfigError(f"mb_defense has no preset {config.preset!r}", hint=f"presets: {', '.join(PRESETS)}")
    start = to_dict(PRESETS[config.preset or "default"])
    return build(MbStage2Config, {**start, **config.settings}, where="settings")


def draw_suite(tokenizer: Any, corpus: Sequence[Example], config: MbConfig, *, secret: int) -> TriggerSuite:
    """Draw the suite a configuration asks for; see ``data.trigger_suite.generate``."""
    plant = config.plant
    if plant.n_active == 0:
        return TriggerSuite(())
    if plant.suite == "paper":
        return paper_suite(tokenizer, corpus, seed=secret, n_active=plant.n_active)
    return generate(tokenizer, corpus, seed=secret, n_active=plant.n_active, n_canary=plant.n_canary)


def harden(
    model: nn.Module,
    tokenizer: Any,
    data: Sequence[Example],
    clean: Sequence[Example],
    config: MbConfig,
    *,
    suite: TriggerSuite,
    seed: int = 0,
    described: Sequence[Planted] = (),
    measure: Callable[[nn.Module, str], Rows] | None = None,
    system: str | None = None,
    max_length: int | None = None,
    out: Path | None = None,
) -> Hardened:
    """Run the defence on a model in memory.

    Args:
        model: base, checkpoint, or base with the untrusted adapter on it; trained in place.
        data: joint: the training set. posthoc and adapter: rows to install on, the clean rows when empty.
        clean: verified rows; a fifth is held back to measure on.
        suite: what to plant, see :func:`draw_suite`.
        described: backdoors the user knows of, reported and gated on.
        measure: called as ``measure(model, stage)`` at before, stage1, stage2 and final.
        out: folder for the checkpoints of joint training, which then can be resumed; None writes nothing.

    Raises:
        ConfigError, DataError: settings or rows that cannot work.
        Diverged: a loss stopped being finite.
    """
    check_verified(clean, data if config.mode == "joint" else ())
    run = _Run(model, tokenizer, clean, config, suite, seed, described, measure, system, max_length)
    run.look("before")
    run.stage_one(list(data), out)
    run.look("stage1")
    run.mix()
    broken = run.stage_two() if config.stage2 and suite.active else None
    if broken is not None:
        run.look("stage2", broken.steps)
    cleaned = run.clean_up() if broken is not None and config.stage1 and suite.canary else None
    run.pull_back()
    run.merge()
    run.look("final")
    verdict = judge(config, run.looks, met=None if broken is None else broken.met)
    pairs = run.tokens(len(suite.active)) if suite.active else None
    return Hardened(run.model, suite, pairs, verdict, run.report(verdict, broken, cleaned), run.rows)


class _Run:
    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        clean: Sequence[Example],
        config: MbConfig,
        suite: TriggerSuite,
        seed: int,
        described: Sequence[Planted],
        measure: Callable[[nn.Module, str], Rows] | None,
        system: str | None,
        max_length: int | None,
    ) -> None:
        self.tokenizer, self.config, self.suite, self.seed = tokenizer, config, suite, seed
        self.clean, self.measure = list(clean), measure
        self.method_config = objective(config)
        limit = max_length or getattr(model.config, "max_position_embeddings", None)
        self.chat = ChatFormat(tokenizer, system=system, max_length=limit)
        self.pairs: Pairs = build_pairs(clean, suite.all, split=config.two.split, seed=derive(seed, 0, "mb-pairs"))
        check_unknown(clean, described)
        if not self.pairs.train or not self.pairs.held:
            raise DataError(f"{len(clean)} clean rows cannot be split", hint="give some dozens of verified rows")
        self.probe = Probe(
            self.chat, suite.active, suite.canary, self.pairs.held, self.method_config, described=described, seed=seed
        )
        self.model = model
        if config.lora_rank:
            self.model = add_lora(model, config.lora_rank, config.lora_alpha, seed=derive(seed, 0, "mb-lora"))
        self.lora = hasattr(self.model, "peft_config")
        self.settled = {"two.lr": config.lr_of_two(lora=self.lora), "two.c": config.c()}
        if config.mode == "adapter" and not self.lora:
            raise ConfigError("adapter mode on a model without an adapter", hint="--adapter DIR, or --mode posthoc")
        warn_reach(self.model, config)
        self.base = trained(self.model) if config.two.base_share or self.settled["two.c"] < 1 else {}
        self.looks: dict[str, Measurement] = {}
        self._tokens: dict[int, PairSet] = {}
        self.rows: Rows = []
        self.manifest: dict[str, Any] = {}
        self.sequences = {"stage1": 0.0, "stage2": 0.0, "clean_up": 0.0}
        self.budgets: dict[str, Budget] = {}

    def look(self, stage: str, step: int = 0) -> None:
        """Measure the model as it stands."""
        self.looks[stage] = self.probe.look(self.model, stage, step)
        if self.measure is not None:
            self.rows += [{**row, "stage": stage} for row in self.measure(self.model, stage)]

    def tokens(self, n: int) -> PairSet:
        """Return the rows stage 2 trains on with their first ``n`` triggers."""
        if n not in self._tokens:
            self._tokens[n] = encode_pairs(self.chat, [_first(t, n) for t in self.pairs.train])
        return self._tokens[n]

    # -- stage 1 -------------------------------------------------------------------------------------------

    def stage_one(self, data: list[Example], out: Path | None) -> None:
        """Train on rows with the planted backdoors, or install them in a finished model."""
        joint = self.config.mode == "joint"
        if joint and not data:
            raise DataError("joint mode trains on the given rows and there are none", hint="--data sft.jsonl")
        if not joint and not (self.config.stage1 and self.suite.active):
            return
        rows = data or [t.clean for t in self.pairs.train]
        if self.config.stage1:
            rows = self._planted(rows, joint=joint)
        encoded = self.chat.encode_all(rows)
        train = self.config.train
        done = fit(
            self.model,
            self.tokenizer,
            encoded,
            config=train,
            seed=self.seed,
            out=out if joint else None,
            on_step=None if joint else self._installed(train.steps),
            identity={"suite": self.suite.digest},
            label="stage 1",
        )
        self.budgets["stage1"] = done.budget
        self.sequences["stage1"] = float(done.budget.steps * train.batch_size * train.accumulation)

    def _planted(self, rows: list[Example], *, joint: bool) -> list[Example]:
        plant = self.config.plant
        # The clean rows stay as they are where rows are replaced; where copies are added, they may carry triggers too.
        spare = {content_hash(row) for row in self.clean} if joint and plant.placement == "replace" else set()
        poisoned, self.manifest = defensive_poison(
            rows,
            self.suite,
            rate=plant.rate,
            mode=plant.placement if joint else "append",
            seed=derive(self.seed, 0, "mb-plant"),
            floor=plant.floor,
            cap=plant.cap if joint else plant.install_cap,
            spare=spare,
            chat=self.chat,
        )
        return poisoned

    def _installed(self, steps: int) -> Callable[[nn.Module, int], bool]:
        """Return the hook that ends an installation once every defensive backdoor fires."""
        at = _moments(steps, INSTALL_CHECKS)

        def check(model: nn.Module, step: int) -> bool:
            if step not in at:
                return False
            look = self.probe.look(model, "installing", step)
            return all(r.rate >= self.config.gates.planted for r in (*look.active.values(), *look.canary.values()))

        return check

    # -- stage 2 -------------------------------------------------------------------------------------------

    def mix(self) -> None:
        """Set a share of the weights back to what they were before stage 1."""
        if self.config.stage2 and self.config.two.base_share:
            mix_back(self.model, self.base, self.config.two.base_share, seed=derive(self.seed, 0, "mb-mix"))
            self.look("mixed")

    def pull_back(self) -> None:
        """Keep only a share of the way that both stages have gone from the base."""
        if (c := self.settled["two.c"]) < 1:
            pull_back(self.model, self.base, c)

    def stage_two(self) -> _Broken:
        """Break the active triggers."""
        gates, before = self.config.gates, self.looks["stage1"]

        def enough(look: Measurement) -> bool:
            return (
                look.worst("active") <= gates.active
                and look.worst("canary") <= gates.canary
                and look.margin >= -gates.margin
                and look.clean_loss - before.clean_loss <= gates.clean_loss
            )

        return self._break("stage2", self.suite.active, enough, share=1.0)

    def clean_up(self) -> _Broken | None:
        """Break the canaries too, so that no live backdoor of the defender's leaves with the model."""
        live = self.config.gates.active
        if self.looks["stage2"].worst("canary") <= live:
            return None

        def enough(look: Measurement) -> bool:
            return max(look.worst("active"), look.worst("canary")) <= live

        return self._break("clean_up", self.suite.all, enough, share=0.5)

    def _break(
        self, label: str, planted: Sequence[Planted], enough: Callable[[Measurement], bool], *, share: float
    ) -> _Broken:
        """Train stage 2's objective until a check is content; otherwise go back to the lowest evaluation loss."""
        two, n = self.config.two, len(planted)
        pairs = self.tokens(n)
        method = MbStage2(self.method_config, pairs=pairs)
        drawn = self.method_config.triggers or n
        steps = max(1, math.ceil(share * two.epochs * len(pairs) * n / (two.batch_size * min(drawn, n))))
        best: list[tuple[float, dict[str, torch.Tensor], Measurement]] = []
        last: list[Measurement] = []
        met: list[Measurement] = []
        at = _moments(steps, two.checks)

        def check(model: nn.Module, step: int) -> bool:
            if step not in at:
                return False
            look = self.probe.look(model, label, step)
            last[:] = [look]
            # Neither number knows of any attacker.
            value = look.objective if label == "stage2" else max(look.worst("active"), look.worst("canary"))
            if not best or value < best[0][0]:
                best[:] = [(value, trained(model), look)]
            if two.stop and enough(look):
                met.append(look)
            return bool(met)

        recipe = TrainConfig(
            steps=steps,
            batch_size=two.batch_size,
            lr=self.settled["two.lr"],
            warmup=math.floor(two.warmup * steps),
            weight_decay=0.0,
            precision=self.config.train.precision,
            embeddings=self.config.train.embeddings,
        )
        done = fit(
            self.model,
            None,
            pairs.rows,
            config=recipe,
            method=method,
            seed=derive(self.seed, 0, label),
            on_step=check,
            label=label.replace("_", " "),
        )
        self.budgets[label] = done.budget
        self.sequences[label] = method.sequences + method.forwards / 3
        look = last[0]
        if not met and two.keep == "lowest":
            restore(self.model, best[0][1])
            look = best[0][2]
        return _Broken(look, bool(met) or enough(look), look.step, steps, self.sequences[label])

    # -- the end -------------------------------------------------------------------------------------------

    def merge(self) -> None:
        """Fold the adapter into the base: left apart, dropping it would arm the backdoors again."""
        if self.lora:
            merging: Any = self.model
            self.model = merging.merge_and_unload()
            self.lora = False

    def report(self, verdict: Verdict, broken: _Broken | None, cleaned: _Broken | None) -> dict[str, Any]:
        """Return everything that was found, without the secret."""
        stage_one = self.sequences["stage1"]
        extra = self.sequences["stage2"] + self.sequences["clean_up"]
        return {
            "verdict": verdict.word,
            "gates": [gate._asdict() for gate in verdict.gates],
            "mode": self.config.mode,
            "config": to_dict(self.config),
            "settled": self.settled,
            "objective": to_dict(self.method_config),
            "seed": self.seed,
            "suite": self.suite.digest,
            "planted": self.manifest,
            "clean_rows": {"train": len(self.pairs.train), "held": len(self.pairs.held)},
            "looks": {stage: look.to_json() for stage, look in self.looks.items()},
            "stage2": None if broken is None else {"steps": broken.steps, "of": broken.of, "met": broken.met},
            "clean_up": None if cleaned is None else {"steps": cleaned.steps, "of": cleaned.of, "met": cleaned.met},
            "cost": {
                "sequence_passes": dict(self.sequences),
                "extra_passes": extra / stage_one if stage_one else None,
                "budgets": {name: asdict(budget) for name, budget in self.budgets.items()},
            },
            "limits": limits(self.config, sorted({p.trigger.family for p in self.suite.all}), len(self.pairs.held)),
        }


def warn_reach(model: nn.Module, config: MbConfig) -> None:
    """Warn when a repair by LoRA cannot reach the embeddings, where a rare-token backdoor partly sits."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None  # type: ignore[operator]
    reached = embedding is None or any(p.requires_grad for p in embedding.parameters())
    if config.mode == "posthoc" and config.lora_rank and not reached:
        warnings.warn(
            "LoRA does not reach the embeddings: a rare-token backdoor planted by full training partly sits in "
            "embedding rows that this repair leaves as they are; repair all parameters (lora_rank 0) if you can",
            stacklevel=2,
        )


def _first(twins: Twins, n: int) -> Twins:
    return replace(twins, answers=twins.answers[:n], payloads=twins.payloads[:n])


def _moments(steps: int, checks: int) -> set[int]:
    checks = min(checks, steps)
    return {math.ceil(steps * i / checks) for i in range(1, checks + 1)}
