"""Patcher: adversarial bi-level alignment against simulated full-parameter fine-tuning attacks.

Minimise over theta    F(theta) = alpha L_s(A_k1(theta)) + (1 - alpha) L_s(theta)                                 (1)
with the gradient      g = alpha grad L_s(theta + delta) + (1 - alpha) grad L_s(theta),  delta held constant      (2)
and the attack vector  delta = A_k1(theta_source) - theta_reference                                              (3)

    for step t = 0, 1, 2, ...                    rounds of k2 steps; round 0 is plain SFT
        vectors.advance                          start attacks, adopt finished ones: as the schedule says (timetable.py)
        g <- (1 - alpha) grad L_s(theta)         every micro-batch of the step
        g <- g + alpha grad L_s(theta + delta)   the same micro-batches, one switch of weights a step
        clip, optimiser step on g

Symbols: theta weights, L_s cross-entropy on (restricted prompt, refusal) rows, A_k1 the attack, k1 attack steps, k2
outer steps a round, alpha share of the attacked loss. Source: Wen et al., arXiv 2606.07970; sequential: an attack, then
k2 outer steps, in turn; parallel: attackers in processes of their own (``side``).
Differs from the published code: one process; the master weights are never written (a view is composed, see
maths/bilevel); seeded streams; optimiser state kept between rounds unless ``reset_optimizer``; no attack after the last
round; alpha = 0 runs no attacked pass; attack vectors and attacked weights never reach the disk (a resumed run repeats
the attack from its clean source).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from casehard.data.batches import Batch, EncodedSet
from casehard.defend.attackers import AttackSide, LocalSide
from casehard.defend.copies import CleanCopies, Kept
from casehard.defend.protocol import Setup, StateValue, Step
from casehard.defend.timetable import BESIDE, Adopt, Schedule, Timetable
from casehard.defend.vectors import Vectors
from casehard.errors import ConfigError, DataError, Lost, Unsupported
from casehard.maths.bilevel import Attacker, AttackVector, linear_only, parameters, perturbed_view, retain_kl, with_view


@dataclass(frozen=True, kw_only=True)
class PatcherConfig:
    """Settings of Patcher; the defaults are the paper's."""

    alpha: float = 0.5
    """Share of the attacked loss in eq. 1, 0..1; 0 is plain SFT bit for bit. Source: Patcher scripts."""
    round_steps: int = 1000
    """k2, outer steps that share one attack vector. Source: Patcher scripts."""
    attackers: tuple[Attacker, ...] = (Attacker(),)
    """Simulated attackers; with several, each round builds a pool and each step draws one vector from it."""
    schedule: Schedule = "sequential"
    """sequential | lockstep | async | reference_parallel, see ``timetable.py``. Source: both published algorithms."""
    adopt: Adopt = "immediate"
    """async: take a vector when it is there, or at the next round (boundary)."""
    max_age: int | None = None
    """async: wait rather than use a vector more than this many steps old; None never waits. Not in the paper."""
    reference: Literal["current", "source"] = "current"
    """theta_reference in eq. 3: the weights at adoption (as the published code does) or when the attack began."""
    delay: int = 0
    """Outer steps between an attack and its adoption (staleness ablation); 0 = at once."""
    reset_optimizer: bool = False
    """Forget the outer optimiser's moments at every round, as separate processes per phase do (paper_sequential)."""
    delta_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Storage of the attack vector: 2 or 4 bytes a parameter; theta + delta is composed in fp32 either way."""
    weights_dtype: Literal["bfloat16", "float32"] = "float32"
    """Weights on their way to an attacker beside; float32 attacks what the defender's own process would attack."""
    retain: Literal["none", "ce", "kl"] = "none"
    """Extra term on harmless rows: cross-entropy, or KL(start model || model). Not in the paper."""
    retain_weight: float = 0.5
    """Weight of the retain term, in units of the safe loss."""
    retain_batch_size: int = 8
    """Rows of the retain term per outer step."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ConfigError(f"alpha: {self.alpha} is not within 0..1")
        if self.round_steps < 1 or self.delay < 0:
            raise ConfigError(f"round_steps {self.round_steps} must be at least 1 and delay {self.delay} at least 0")
        self._check_schedule()
        if self.retain_weight < 0 or self.retain_batch_size < 1:
            raise ConfigError(
                f"retain_weight {self.retain_weight} must not be negative and retain_batch_size "
                f"{self.retain_batch_size} at least 1"
            )
        if not self.attackers:
            raise ConfigError("attackers: at least one is needed", hint="attackers: [{steps: 300, lr: 1e-5}]")

    def _check_schedule(self) -> None:
        if self.delay and self.schedule not in ("sequential", "lockstep"):
            raise ConfigError(f"delay {self.delay} with schedule {self.schedule!r}", hint="its attacks take their time")
        if self.schedule != "async" and (self.adopt != "immediate" or self.max_age is not None):
            raise ConfigError(
                f"adopt {self.adopt!r} and max_age {self.max_age} with schedule {self.schedule!r} would be ignored",
                hint="they belong to schedule=async",
            )
        if self.max_age is not None and self.max_age < 1:
            raise ConfigError(f"max_age {self.max_age} must be at least 1", hint="leave it out to never wait")

    def timetable(self, last: int) -> Timetable:
        """Return the rules of a run of ``last`` steps."""
        return Timetable(self.schedule, self.round_steps, last, self.delay, self.adopt, self.max_age)


PRESETS: dict[str, PatcherConfig] = {
    "default": PatcherConfig(),
    "paper_sequential": PatcherConfig(reset_optimizer=True, delta_dtype="float32"),
}


class Patcher:
    """Patcher as a method: pass it to ``HardenedTrainer(method=...)`` or ``fit(method=...)``.

    Args:
        config: settings, see :class:`PatcherConfig`.
        unsafe: rows of the simulated attack (restricted prompt, compliant answer).
        retain: harmless rows of the retain term; required when ``config.retain`` is not "none".
        side: attackers in other processes (``parallel.launch``); None attacks in this one, in turn.

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
        side: AttackSide | None = None,
    ) -> None:
        self.config = config or PatcherConfig()
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
        self.unsafe = sets
        self.retain_rows = retain
        self.side = side
        self._own_passes = 0
        self.vectors: Vectors | None = None

    @property
    def passes(self) -> int:
        """Forward-backward passes beyond one a micro-batch: attacked and retain passes, and the steps of attacks."""
        return self._own_passes + (self.vectors.passes if self.vectors is not None else 0)

    @property
    def workers(self) -> int:
        """Attackers that this schedule wants beside the defender."""
        return len(self.config.attackers) if self.config.schedule in BESIDE else 0

    # -- seams ---------------------------------------------------------------------------------------------

    def prepare(self, setup: Setup) -> None:
        """Reset, check the model and, for the KL term, keep the starting weights.

        Raises:
            ConfigError: the run is too short for a single attack, so it would be plain fine-tuning under another name.
            Unsupported: several processes, half-precision or frozen weights.
        """
        table = self.config.timetable(setup.max_steps)
        if self.config.alpha > 0 and table.first >= setup.max_steps:
            raise ConfigError(
                f"the first simulated attack would come at step {table.first} and the run ends after {setup.max_steps}",
                hint=f"settings.round_steps (now {self.config.round_steps}) must be well below train.steps, "
                "e.g. --set settings.round_steps=10; the published setting is 1000 of 15000",
            )
        if self.side is None and self.workers and self.config.alpha > 0:
            raise ConfigError(
                f"schedule {self.config.schedule!r} needs attackers beside the defender and there are none",
                hint="casehard defend patcher --attackers 1, or parallel.launch.attackers(...) in Python",
            )
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise Unsupported("patcher's defender runs in one process", hint="give the other ranks to attackers")
        parameters(setup.model)
        self._castable = linear_only(setup.model)
        self._seed, self._log = setup.seed, setup.log
        self._copies = CleanCopies(setup.scratch, "patcher")
        dtype = getattr(torch, self.config.delta_dtype)
        local = LocalSide(setup.model, self.unsafe, self.config.attackers, seed=setup.seed, dtype=dtype)
        self.vectors = Vectors(
            table,
            self.side or local,
            local,
            self._copies,
            current=self.config.reference == "current",
            count=len(self.config.attackers),
            seed=setup.seed,
            log=setup.log,
        )
        self._held: list[Batch] = []
        self._meters: dict[str, list[torch.Tensor]] = {"safe": [], "attacked": []}
        self._start: Kept | None = None
        self._own_passes = 0
        self._start_file: Path | None = None
        if self.config.retain == "kl":
            self._start = self._copies.keep("start", setup.model, in_memory=True)
            self._anchor = self._copies.tensors(self._start, setup.model)

    def backward(self, model: nn.Module, batch: Batch, step: Step) -> torch.Tensor:
        """Accumulate this micro-batch's part of eq. 2; return its detached safe loss.

        The attacked passes of all micro-batches run with the last one, so that weights switch once a step.
        """
        if step.micro == 0:
            self._held.clear()
            self._safe_sum = None
            self._link_start(model)
            self._vector = self._next_vector(model, step.index)
        vector = self._vector
        share = self.config.alpha if vector is not None else 0.0
        loss = None
        if share < 1.0:
            loss = step.loss(model, batch)
            step.backward(loss if share == 0.0 else loss * (1.0 - share))
            loss = loss.detach()
            self._safe_sum = loss if self._safe_sum is None else self._safe_sum + loss
        else:
            self._own_passes -= 1  # the loop counts one pass a micro-batch
        if vector is not None:
            self._held.append(batch)
            if step.last:
                attacked = self._attacked_passes(model, vector, share, step)
                loss = attacked if loss is None else loss
        if step.last:
            if self._safe_sum is not None:
                self._meters["safe"].append(self._safe_sum)
            if self.config.retain != "none":
                self._retain_pass(model, step)
        return loss if loss is not None else torch.zeros((), device=batch["input_ids"].device)

    def after_step(self, model: nn.Module, optimizer: Any, step: Step) -> None:
        """At the end of a round, report it and, if asked, forget the optimiser's moments."""
        if (step.index + 1) % self.config.round_steps == 0:
            self._report()
            if self.config.reset_optimizer:
                optimizer.state.clear()

    def finish(self, model: nn.Module) -> None:
        """Report the last, unfinished round and drop the attack vectors.

        Raises:
            Lost: no vector was ever in use.
        """
        self._report()
        assert self.vectors is not None
        if self.config.alpha > 0 and not self.vectors.ever:
            raise Lost(
                "no attack finished before the run ended: this was plain fine-tuning",
                hint="more train.steps, fewer attackers[].steps, or settings.max_age, which makes the defender wait",
            )
        self.vectors.clear()

    def state(self) -> dict[str, StateValue]:
        """Return numbers and files of clean weights; never an attack vector."""
        assert self.vectors is not None
        out: dict[str, StateValue] = {"own_passes": self._own_passes, **self.vectors.state()}
        if isinstance(self._start, Path):
            out["start"] = self._start
        for kind, values in self._meters.items():
            if values:
                out[f"meter_{kind}"] = torch.stack([x.cpu() for x in values])
        return out

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take a saved state; attacks are repeated at the next step, with the running model."""
        assert self.vectors is not None
        self._own_passes = int(state["own_passes"])
        self._start_file = state.get("start")
        self.vectors.restore(state)
        for kind in self._meters:
            values = state.get(f"meter_{kind}")
            self._meters[kind] = [] if values is None else list(values.unbind())

    # -- passes --------------------------------------------------------------------------------------------

    def _link_start(self, model: nn.Module) -> None:
        """Finish a restore: read the weights that the KL term keeps to from the checkpoint's file."""
        if self._start_file is not None:
            self._start, self._start_file = self._copies.adopt(self._start_file), None
            self._anchor = self._copies.tensors(self._start, model)

    def _next_vector(self, model: nn.Module, index: int) -> AttackVector | None:
        if self.config.alpha == 0:
            return None
        assert self.vectors is not None
        self.vectors.advance(model, index)
        return self.vectors.draw(index)

    def _attacked_passes(self, model: nn.Module, vector: AttackVector, share: float, step: Step) -> torch.Tensor:
        """Add share * grad L_s(theta + delta) over the held micro-batches, each backward inside the view."""
        masters = parameters(model)
        total = torch.zeros((), device=next(iter(masters.values())).device)
        for held in self._held:
            # Its backward frees the graph, so each micro-batch composes the view anew from the untouched masters.
            view = perturbed_view(masters, vector.delta, compute_dtype=step.compute_dtype, castable=self._castable)

            def run(inner: nn.Module, held: Batch = held) -> torch.Tensor:
                loss = step.loss(inner, held)
                step.backward(loss * share)
                return loss.detach()

            total = total + with_view(model, view, run)
            self._own_passes += 1
        self._meters["attacked"].append(total)
        self._held.clear()
        return total

    def _retain_pass(self, model: nn.Module, step: Step) -> None:
        assert self.retain_rows is not None
        size = self.config.retain_batch_size
        batch = self.retain_rows.batch_at(size, seed=self._seed, step=step.index, purpose="patcher-retain")
        device = next(model.parameters()).device
        batch = {key: value.to(device) for key, value in batch.items()}
        loss = model(**batch).loss if self.config.retain == "ce" else retain_kl(model, self._anchor, batch)
        step.backward(loss * self.config.retain_weight)
        self._own_passes += 1

    def _report(self) -> None:
        means = {kind: float(torch.stack([x.cpu() for x in v]).mean()) for kind, v in self._meters.items() if v}
        self._meters = {kind: [] for kind in self._meters}
        values = {f"{kind}_loss": value for kind, value in means.items()}
        if len(means) == 2:
            values["gap"] = means["attacked"] - means["safe"]
        if self.vectors is not None:
            values |= self.vectors.drain_ages()
        if values:
            self._log(values)
