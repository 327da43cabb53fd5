"""Patcher: adversarial bi-level alignment against simulated full-parameter fine-tuning attacks.

Minimise over theta    F(theta) = alpha L_s(A_k1(theta)) + (1 - alpha) L_s(theta)                                 (1)
with the gradient      g = alpha grad L_s(theta + delta) + (1 - alpha) grad L_s(theta),  delta held constant      (2)
and the attack vector  delta = A_k1(theta_source) - theta_reference                                              (3)

    for step t = 0, 1, 2, ...                    rounds of k2 steps; round 0 is plain SFT
        delta <- vectors.at(t)                   (3): in_turn.py, as published; every other schedule: scheduled.py
        g <- (1 - alpha) grad L_s(theta)         every micro-batch of the step
        g <- g + alpha grad L_s(theta + delta)   the same micro-batches, one switch of weights a step
        clip, optimiser step on g

Symbols: theta weights, L_s cross-entropy on (restricted prompt, refusal) rows, A_k1 the attack: k1 steps of fine-tuning
on L_u, the (restricted prompt, compliant answer) rows; k2 outer steps a round, alpha share of the attacked loss.
Source: Wen et al., arXiv 2606.07970. On several ranks (``layout.py``) each has its rows of a step, and of an attack
where the model is sharded.
Differs from the published code: one job; the master weights are never written (a view is composed, see maths/bilevel;
shards are put back from a copy, distributed/fsdp); seeded streams; optimiser state kept between rounds unless
``reset_optimizer``; no attack after the last round; alpha = 0 runs no attacked pass; attack vectors and attacked
weights never reach the disk (a resumed run repeats the attack from its clean source).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from casehard.data.batches import Batch, EncodedSet
from casehard.defences.patcher.backend import AttackBackend
from casehard.defences.patcher.in_turn import AttackVectors, SimulatedAttacks
from casehard.defences.patcher.layout import ModelLayout, Pass
from casehard.defences.patcher.meters import LossMeters
from casehard.defences.patcher.retain import RetainKind, RetainTerm
from casehard.defences.patcher.schedule import NEEDS_ATTACKERS, Adopt, Schedule, ScheduleName
from casehard.defences.patcher.scheduled import attack_vectors
from casehard.defences.patcher.snapshots import Snapshots
from casehard.defences.updates import from_state, others, start_of, to_state
from casehard.errors import ConfigError, DataError, Lost, Note
from casehard.limits import BatchSize, Count, Limited, Natural, Portion, Share, Weight
from casehard.maths.bilevel import Attacker, Params, linear_only
from casehard.train.protocol import Setup, StateValue, Step

ROUNDS, SHORTEST, REACH = 30, 10, 5
"""Rounds of a run, its shortest round, rounds in its longest attack, where nobody says: plans/patcher_default.yaml."""


@dataclass(frozen=True, kw_only=True)
class PatcherConfig(Limited):
    """Settings of Patcher. Rounds and attacks that are not given hang on the run, see :meth:`over_run`."""

    alpha: Share = 0.5
    """Share of the attacked loss in eq. 1, 0..1; 0 is plain SFT bit for bit. Source: Patcher scripts."""
    round_steps: Count | None = None
    """k2, outer steps that share one attack vector; None: a thirtieth of the run, 10 at least. The paper: 1000."""
    attackers: tuple[Attacker, ...] = (Attacker(),)
    """Simulated attackers; with several, each round builds a pool and each step draws one vector from it.
    One that names no steps draws k1 from 0..5 k2, one that names no learning rate takes the training's."""
    schedule: ScheduleName = "sequential"
    """sequential | lockstep | async | reference_parallel, see ``schedule.py``. Source: both published algorithms."""
    adopt: Adopt = "immediate"
    """async: take a vector when it arrives, or at the next round (boundary)."""
    max_age: Count | None = None
    """async: wait rather than use a vector more than this many steps old; None never waits. Not in the paper."""
    reference: Literal["current", "source"] = "current"
    """theta_reference in eq. 3: the weights at adoption (as the published code does) or when the attack began."""
    delay: Natural = 0
    """Outer steps between an attack and its adoption (staleness ablation); 0 = at once."""
    reset_optimizer: bool = False
    """Forget the outer optimiser's moments at every round, as separate processes per phase do (paper_sequential)."""
    delta_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Storage of the attack vector: 2 or 4 bytes a parameter; theta + delta is composed in fp32 either way."""
    weights_dtype: Literal["bfloat16", "float32"] = "float32"
    """Weights on their way to an attacker in another process; float32 attacks what this one would attack."""
    retain: RetainKind = "auto"
    """Extra term on harmless rows: cross-entropy, or KL(start model || model); auto: KL where such rows are given.
    Not in the paper."""
    retain_weight: Weight = 1.0
    """Weight of the retain term, in units of the safe loss."""
    retain_batch_size: BatchSize = 8
    """Rows of the retain term per outer step."""
    c: Portion = 1.0
    """Share of the whole update that is kept at the end: theta_0 + c (theta - theta_0). Below 1 it gives back knowledge
    for some of the delay, and the run keeps a copy of the start. Not in the paper; WiSE-FT, arXiv 2109.01903."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.over(0).check()
        if not self.attackers:
            raise ConfigError("attackers: at least one is needed", hint="attackers: [{steps: 300, lr: 1e-5}]")

    def over(self, steps: int) -> Schedule:
        """Return the schedule of a run of ``steps`` steps."""
        return Schedule(self.schedule, self._round(steps), steps, self.delay, self.adopt, self.max_age)

    def over_run(self, steps: int, lr: float | None) -> PatcherConfig:
        """Return the settings with every number that hangs on a run of ``steps`` steps and peak rate ``lr``."""
        k2 = self._round(steps)
        return replace(self, round_steps=k2, attackers=tuple(a.within(steps=REACH * k2, lr=lr) for a in self.attackers))

    def _round(self, steps: int) -> int:
        return self.round_steps or max(SHORTEST, steps // ROUNDS)


FAR = 8.0
"""Factor between the learning rates of attacker and training from which the run says so."""
_PAPER = PatcherConfig(round_steps=1000, delta_dtype="float32", retain="none")
PRESETS: dict[str, PatcherConfig] = {
    "default": PatcherConfig(),
    "paper_sequential": replace(_PAPER, attackers=(Attacker(steps=300, lr=1e-5),), reset_optimizer=True),
    # What held longest at least cost in knowledge on the organism, see docs/evidence/patcher.md.
    "holds": PatcherConfig(round_steps=20, attackers=(Attacker(steps_min=0, steps=100),), retain="kl", c=0.9),
    "reference_parallel": replace(_PAPER, attackers=(Attacker(steps=500, lr=1e-5),), schedule="reference_parallel"),
}


class Patcher:
    """Patcher as a method: pass it to ``HardenedTrainer(method=...)`` or ``fit(method=...)``.

    Args:
        config: settings, see :class:`PatcherConfig`.
        unsafe: rows of the simulated attack (restricted prompt, compliant answer).
        retain: harmless rows of the retain term; required when ``config.retain`` is not "none".
        backend: attackers in other processes (``workers.launch``); None attacks in this one.

    Raises:
        DataError: ``unsafe`` (or a needed ``retain``) is empty, or ``retain`` is given and not used.
    """

    name = "patcher"

    def __init__(
        self,
        config: PatcherConfig | None = None,
        *,
        unsafe: EncodedSet | tuple[EncodedSet, ...],
        retain: EncodedSet | None = None,
        backend: AttackBackend | None = None,
    ) -> None:
        config = config or PatcherConfig()
        if config.retain == "auto":
            config = replace(config, retain="kl" if retain else "none")
        self._asked = self.config = config
        sets = unsafe if isinstance(unsafe, tuple) else (unsafe,)
        if len(sets) == 1:
            sets = sets * len(self.config.attackers)
        if len(sets) != len(self.config.attackers) or any(len(s) == 0 for s in sets):
            raise DataError(
                f"patcher: {len(sets)} unsafe sets of {[len(s) for s in sets]} rows for "
                f"{len(self.config.attackers)} attackers",
                hint="give one set for all attackers or one non-empty set for each (--unsafe)",
            )
        if self.config.retain == "none" and retain:
            raise DataError(
                f"patcher: {len(retain)} retain rows would be ignored", hint="--set settings.retain=kl (or ce)"
            )
        if self.config.retain != "none" and not retain:
            raise DataError(f"patcher: retain={self.config.retain!r} needs harmless rows", hint="--retain rows.jsonl")
        self.unsafe, self.retain_rows, self.backend = sets, retain, backend
        self.vectors: AttackVectors | None = None
        self._own_passes = 0

    @property
    def passes(self) -> int:
        """Forward-backward passes beyond one a micro-batch: attacked and retain passes, and the steps of attacks.

        Counted as in one process: what ranks share out counts once.
        """
        return self._own_passes + (self.vectors.pool.passes if self.vectors is not None else 0)

    @property
    def workers(self) -> int:
        """Attackers in processes of their own that this schedule needs."""
        return len(self.config.attackers) if self.config.schedule in NEEDS_ATTACKERS else 0

    def settle(self, steps: int, lr: float | None) -> None:
        """Fill in what hangs on the run: attackers in other processes start before :meth:`prepare` is called."""
        self.config = self._asked.over_run(steps, lr)

    # -- seams ---------------------------------------------------------------------------------------------

    def prepare(self, setup: Setup) -> None:
        """Reset and check the model; whether DDP wraps it is seen at the first step.

        Raises:
            ConfigError: the run is too short for a single attack, so it would be plain fine-tuning under another name.
            Unsupported: half-precision or frozen weights, or a layout of the model that the settings cannot serve.
        """
        self.settle(setup.max_steps, setup.lr)
        schedule = self.config.over(setup.max_steps)
        if self.config.alpha > 0:
            schedule.check_length()
            for attacker in self.config.attackers:
                attacker.numbers()  # now, not at the first attack
        if self.backend is None and self.workers and self.config.alpha > 0:
            raise ConfigError(
                f"schedule {self.config.schedule!r} needs attackers in processes of their own and there are none",
                hint="casehard defend patcher --attackers 1, or workers.launch.with_attackers(...) in Python",
            )
        if layout := ModelLayout.of_shards(setup.model):
            layout.check(self.config.attackers)
        config, snapshots = self.config, Snapshots(setup.scratch, "patcher")
        self._round_steps = schedule.round_steps
        attacks = SimulatedAttacks(self.unsafe, config.attackers, setup.seed, getattr(torch, config.delta_dtype))
        current = config.reference == "current"
        self.vectors = attack_vectors(schedule, attacks, setup, snapshots, backend=self.backend, current=current)
        self._retain = None
        if self.retain_rows:
            size = config.retain_batch_size
            self._retain = RetainTerm(config.retain, self.retain_rows, size, seed=setup.seed, snapshots=snapshots)
        self._last, self._log = setup.max_steps, setup.log
        self._castable = linear_only(setup.model)
        self._meters = LossMeters()
        self._layout: ModelLayout | None = None
        self._delta: Params | None = None
        self._batches: list[Batch] = []
        self._safe: torch.Tensor | None = None
        self._own_passes = 0
        self._start = start_of(setup.model) if config.c < 1 else {}
        self._warn_of_rates(setup.lr)

    def backward(self, model: nn.Module, batch: Batch, step: Step) -> torch.Tensor:
        """Accumulate this micro-batch's part of eq. 2; return its detached safe loss.

        The attacked passes of all micro-batches run with the last one, so that weights switch once a step.
        """
        layout = self._begin(model, step) if step.micro == 0 or self._layout is None else self._layout
        alpha = self.config.alpha if self._delta is not None else 0.0
        loss = torch.zeros((), device=batch["input_ids"].device)
        if alpha < 1.0:
            safe = step.loss(layout.model, batch)
            step.backward(safe if alpha == 0.0 else safe * (1.0 - alpha))  # (1 - alpha) grad L_s(theta)
            loss = safe.detach()
            self._safe = loss if self._safe is None else self._safe + loss
        else:
            self._own_passes -= 1  # the loop counts one pass a micro-batch
        self._batches.append(batch)
        if step.last:
            attacked = None if self._delta is None else self._attacked_passes(layout, self._delta, step)
            self._meters.note(safe=self._safe, attacked=attacked)
            if self._retain is not None:
                self._own_passes += 1
                step.backward(self._retain.loss(layout, step.index) * self.config.retain_weight)
            layout.average_gradients()
            if attacked is not None and alpha == 1.0:
                return attacked
        return loss

    def after_step(self, model: nn.Module, optimizer: Any, step: Step) -> None:
        """At the end of a round, report it and, if asked, forget the optimiser's moments."""
        if (step.index + 1) % self._round_steps == 0:
            self._report()
            if self.config.reset_optimizer:
                optimizer.state.clear()
        if self.vectors is not None and self.vectors.pool.used and step.index + 1 == self._last:
            self._log({"attack_age_oldest": float(self.vectors.pool.oldest)})

    def finish(self, model: nn.Module) -> None:
        """Report the last, unfinished round and drop the attack vectors.

        Raises:
            Lost: no vector was ever in use.
        """
        assert self.vectors is not None
        if self._layout is None:  # resumed after its last step
            self._layout = ModelLayout.of_shards(model)
        self._report()
        if self.config.alpha > 0 and not self.vectors.pool.used:
            raise Lost(
                "no attack finished before the run ended: this was plain fine-tuning",
                hint="more train.steps, fewer attackers[].steps, or settings.max_age, which makes the defender wait",
            )
        self.vectors.clear()
        with torch.no_grad():
            for name, p in others(model).items() if self._start else ():
                p.copy_(torch.lerp(self._start[name], p, self.config.c))
        self._start = {}

    def state(self) -> dict[str, StateValue]:
        """Return numbers and files of clean weights; never an attack vector."""
        assert self.vectors is not None
        kept = self._retain.state() if self._retain is not None else {}
        numbers = {"own_passes": self._own_passes, **self.vectors.state(), **self._meters.state()}
        return {**numbers, **kept, **to_state(self._start)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take a saved state; attacks are repeated at the next step, with the running model."""
        assert self.vectors is not None
        self._own_passes = int(state["own_passes"])
        self.vectors.restore(state)
        self._meters.restore(state)
        if self._retain is not None:
            self._retain.restore(state)
        self._start = from_state(self._start, state)

    def _warn_of_rates(self, lr: float | None) -> None:
        """Say when the simulated attacks are far weaker, or stronger, than the training they are part of."""
        if not lr or self.config.alpha == 0:
            return
        for attacker in self.config.attackers:
            k1, rate = attacker.numbers()
            if k1 and not lr / FAR <= rate <= lr * FAR:
                warnings.warn(
                    f"patcher: an attacker's learning rate {rate:g} is far from the training's {lr:g}; the "
                    f"paper has them equal (settings.attackers=[{{lr: {lr:g}, ...}}])",
                    Note,
                    stacklevel=2,
                )

    # -- one step ------------------------------------------------------------------------------------------

    def _begin(self, model: nn.Module, step: Step) -> ModelLayout:
        """Start an optimiser step: see how the model is laid out, and take the vector that is due."""
        assert self.vectors is not None
        if self._layout is None:
            self._layout = ModelLayout.of(model)
            self._layout.check(self.config.attackers, self.backend)
        self._batches.clear()
        self._safe = None
        self._delta = self.vectors.at(self._layout.model, step.index) if self.config.alpha > 0 else None
        return self._layout

    def _attacked_passes(self, layout: ModelLayout, delta: Params, step: Step) -> torch.Tensor:
        """Add alpha grad L_s(theta + delta) over the step's micro-batches; return the loss."""

        def one(batch: Batch) -> Pass:
            def run(inner: nn.Module) -> torch.Tensor:
                loss = step.loss(inner, batch)
                step.backward(loss * self.config.alpha)
                return loss.detach()

            return run

        passes = [one(batch) for batch in self._batches]
        self._own_passes += len(passes)
        losses = layout.with_delta(delta, passes, compute_dtype=step.compute_dtype, castable=self._castable)
        return torch.stack(losses).sum()

    def _report(self) -> None:
        assert self.vectors is not None
        if values := self._meters.drain(self._layout) | self.vectors.pool.ages():
            self._log(values)
