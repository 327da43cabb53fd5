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
k2 outer steps, in turn; parallel: attackers in processes of their own (``side``). On several ranks (``spread.py``) each
has its rows of a step, and of an attack where the model is sharded; two *branches* share out the two terms of eq. 2.
Differs from the published code: one job; the master weights are never written (a view is composed, see maths/bilevel;
shards are put back from a copy, maths/sharded); seeded streams; optimiser state kept between rounds unless
``reset_optimizer``; no attack after the last round; alpha = 0 runs no attacked pass; attack vectors and attacked
weights never reach the disk (a resumed run repeats the attack from its clean source).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from casehard.data.batches import Batch, EncodedSet
from casehard.defend.attackers import AttackSide, LocalSide
from casehard.defend.copies import CleanCopies, Kept
from casehard.defend.patcher_settings import PRESETS as PRESETS
from casehard.defend.patcher_settings import PatcherConfig as PatcherConfig
from casehard.defend.protocol import Setup, StateValue, Step
from casehard.defend.spread import Branch, Pass, Spread
from casehard.defend.timetable import BESIDE
from casehard.defend.vectors import Vectors
from casehard.errors import ConfigError, DataError, Lost, Unsupported
from casehard.maths.bilevel import AttackVector, linear_only
from casehard.maths.sharded import is_sharded, masters


class Patcher:
    """Patcher as a method: pass it to ``HardenedTrainer(method=...)`` or ``fit(method=...)``.

    Args:
        config: settings, see :class:`PatcherConfig`.
        unsafe: rows of the simulated attack (restricted prompt, compliant answer).
        retain: harmless rows of the retain term; required when ``config.retain`` is not "none".
        side: attackers in other processes (``parallel.launch``); None attacks in this one, in turn.
        branches: a process group (or mesh dimension) of two, given the same rows: its first member runs the plain
            passes, its second the attacked ones; attacks run alike on both, and both end with the same weights.

    Raises:
        ConfigError: branches at alpha 0 or 1, where one of them would have nothing to do.
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
        branches: Any = None,
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
        self.branches = branches
        if branches is not None and self.config.alpha in (0.0, 1.0):
            raise ConfigError(f"branches with alpha {self.config.alpha}", hint="one of the two would have no passes")
        self._own_passes = 0
        self.vectors: Vectors | None = None

    @property
    def passes(self) -> int:
        """Forward-backward passes beyond one a micro-batch: attacked and retain passes, and the steps of attacks.

        Counted as in one process: what ranks or branches share out, or do alike, counts once.
        """
        return self._own_passes + (self.vectors.passes if self.vectors is not None else 0)

    @property
    def workers(self) -> int:
        """Attackers that this schedule wants beside the defender."""
        return len(self.config.attackers) if self.config.schedule in BESIDE else 0

    # -- seams ---------------------------------------------------------------------------------------------

    def prepare(self, setup: Setup) -> None:
        """Reset and check the model; how it is spread over processes is seen at the first step.

        Raises:
            ConfigError: the run is too short for a single attack, so it would be plain fine-tuning under another name.
            Unsupported: half-precision or frozen weights, or a combination of spread and settings that cannot be.
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
                hint="casehard defend patcher --attackers 1, or parallel.launch.equipped(...) in Python",
            )
        masters(setup.model)
        self._sharable(is_sharded(setup.model))
        self._castable = linear_only(setup.model)
        self._seed, self._log = setup.seed, setup.log
        self._copies = CleanCopies(setup.scratch, "patcher")
        dtype = getattr(torch, self.config.delta_dtype)
        self._local = local = LocalSide(setup.model, self.unsafe, self.config.attackers, seed=setup.seed, dtype=dtype)
        self.vectors = Vectors(
            table,
            self.side or local,
            local,
            self._copies,
            current=self.config.reference == "current",
            count=len(self.config.attackers),
            seed=setup.seed,
            log=setup.log,
            stop=setup.stop,
        )
        self.vectors.side.begin()
        self._held: list[Batch] = []
        self._meters: dict[str, list[torch.Tensor]] = {"safe": [], "attacked": []}
        self._safe_sum: torch.Tensor | None = None
        self._start: Kept | None = None
        self._own_passes = 0
        self._start_file: Path | None = None
        self._spread: Spread | None = None

    def backward(self, model: nn.Module, batch: Batch, step: Step) -> torch.Tensor:
        """Accumulate this micro-batch's part of eq. 2; return its detached safe loss.

        The attacked passes of all micro-batches run with the last one, so that weights switch once a step. On the
        second of two branches, which runs no plain pass, the step's safe loss comes with the last micro-batch.
        """
        if step.micro == 0:
            self._begin(model, step)
        spread, vector = self._spread, self._vector
        assert spread is not None
        share = self.config.alpha if vector is not None else 0.0
        branch = spread.branch if vector is not None else None  # before the first vector both do the same
        plain = branch is None or branch.number == 0
        loss = None
        if share < 1.0 and plain:
            loss = step.loss(spread.model, batch)
            step.backward(loss if share == 0.0 else loss * (1.0 - share))
            loss = loss.detach()
            self._safe_sum = loss if self._safe_sum is None else self._safe_sum + loss
        elif share == 1.0:
            self._own_passes -= 1  # the loop counts one pass a micro-batch
        if vector is not None:
            self._held.append(batch)
        if step.last:
            attacked = self._attacked_passes(spread, vector, share, step) if vector is not None else None
            if branch is not None:
                self._safe_sum, attacked = branch.both(self._safe_sum, attacked)
                loss = self._safe_sum if loss is None else loss
            self._note(self._safe_sum, attacked)
            if self.config.retain != "none":
                self._retain_pass(spread, step, here=plain)
            spread.join(apart=branch is not None)
            loss = attacked if loss is None else loss
        return loss if loss is not None else torch.zeros((), device=batch["input_ids"].device)

    def after_step(self, model: nn.Module, optimizer: Any, step: Step) -> None:
        """At the end of a round, report it and, if asked, forget the optimiser's moments."""
        if (step.index + 1) % self.config.round_steps == 0:
            self._report()
            if self.config.reset_optimizer:
                optimizer.state.clear()
        if self.vectors is not None and self.vectors.ever and step.index + 1 == self.vectors.table.last:
            self._log({"attack_age_oldest": float(self.vectors.oldest)})

    def finish(self, model: nn.Module) -> None:
        """Report the last, unfinished round and drop the attack vectors.

        Raises:
            Lost: no vector was ever in use.
        """
        if self._spread is None and is_sharded(model):  # resumed after its last step
            self._spread = Spread.of(model, Branch.of(self.branches) if self.branches is not None else None)
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

    def _sharable(self, sharded: bool) -> None:
        if sharded and any(a.lora_rank for a in self.config.attackers):
            raise Unsupported("a LoRA attacker on a sharded model", hint="attackers[].lora_rank: 0, or one process")

    def _servable(self, spread: Spread) -> None:
        """Refuse attackers beside a defender whose processes do not each hold their own rows of every weight."""
        if self.side is None:
            return
        place = spread.seat
        mine = (place.number, place.of) if spread.sharded and len(place.groups) == 1 else (0, 1)
        if spread.branch is not None or place.of > mine[1] or tuple(getattr(self.side, "part", (0, 1))) != mine:
            what = "two branches" if spread.branch is not None else f"{place.of} replicas" if mine[1] == 1 else "shards"
            raise Unsupported(
                f"attackers beside a defender of {what}",
                hint="one process, or FSDP2 over the ranks that parallel.launch.join left to the defender; "
                "schedule=sequential attacks with all of them",
            )

    def _begin(self, model: nn.Module, step: Step) -> None:
        """Start an optimiser step: see how the model is spread, and take the vector that is due."""
        if self._spread is None:
            spread = Spread.of(model, Branch.of(self.branches) if self.branches is not None else None)
            self._sharable(spread.sharded)
            self._servable(spread)
            # The loop may have replaced the model it prepared.
            self._spread, self._local.model = spread, spread.model
        self._held.clear()
        self._safe_sum = None
        self._keep_start(self._spread.model)
        self._vector = self._next_vector(self._spread.model, step.index)

    def _keep_start(self, model: nn.Module) -> None:
        """Keep the weights that the KL term stays close to; after a restore those of the checkpoint's file."""
        if self._start_file is not None:
            self._start, self._start_file = self._copies.adopt(self._start_file), None
        elif self.config.retain == "kl" and self._start is None:
            self._start = self._copies.keep("start", model, in_memory=True)
        else:
            return
        self._anchor = self._copies.tensors(self._start, model)

    def _next_vector(self, model: nn.Module, index: int) -> AttackVector | None:
        if self.config.alpha == 0:
            return None
        assert self.vectors is not None
        self.vectors.advance(model, index)
        return self.vectors.draw(index)

    def _attacked_passes(self, spread: Spread, vector: AttackVector, share: float, step: Step) -> torch.Tensor | None:
        """Add share * grad L_s(theta + delta) over the held micro-batches; return the loss, None on branch 0."""

        def one(held: Batch) -> Pass:
            def run(inner: nn.Module) -> torch.Tensor:
                loss = step.loss(inner, held)
                step.backward(loss * share)
                return loss.detach()

            return run

        self._own_passes += len(self._held)
        passes = [one(held) for held in self._held]
        self._held.clear()
        if spread.branch is not None and spread.branch.number == 0:
            return None
        losses = spread.attacked(vector.delta, passes, compute_dtype=step.compute_dtype, castable=self._castable)
        return torch.stack(losses).sum()

    def _retain_pass(self, spread: Spread, step: Step, *, here: bool) -> None:
        assert self.retain_rows is not None
        self._own_passes += 1
        if not here:
            return
        size = self.config.retain_batch_size
        batch = self.retain_rows.batch_at(size, seed=self._seed, step=step.index, purpose="patcher-retain")
        device = next(spread.model.parameters()).device
        batch = {key: value.to(device) for key, value in batch.items()}
        loss = spread.extra(batch, self._anchor if self.config.retain == "kl" else None)
        step.backward(loss * self.config.retain_weight)

    def _note(self, safe: torch.Tensor | None, attacked: torch.Tensor | None) -> None:
        for kind, value in (("safe", safe), ("attacked", attacked)):
            if value is not None:
                self._meters[kind].append(value)

    def _report(self) -> None:
        means = {kind: float(torch.stack([x.cpu() for x in v]).mean()) for kind, v in self._meters.items() if v}
        self._meters = {kind: [] for kind in self._meters}
        means = self._spread.mean(means) if self._spread is not None else means
        values = {f"{kind}_loss": value for kind, value in means.items()}
        if len(means) == 2:
            values["gap"] = means["attacked"] - means["safe"]
        if self.vectors is not None:
            values |= self.vectors.drain_ages()
        if values:
            self._log(values)
