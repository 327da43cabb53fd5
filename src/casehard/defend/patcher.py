"""Patcher: adversarial bi-level alignment against simulated full-parameter fine-tuning attacks, sequential.

Minimise over theta    F(theta) = alpha L_s(A_k1(theta)) + (1 - alpha) L_s(theta)                                 (1)
with the gradient      g = alpha grad L_s(theta + delta) + (1 - alpha) grad L_s(theta),  delta held constant      (2)
and the attack vector  delta = A_k1(theta_source) - theta_reference                                              (3)

    for step t = 0, 1, 2, ...                    rounds of k2 steps; round 0 is plain SFT
        if t starts a round >= 1:  delta <- k1 optimiser steps on unsafe data from theta, minus theta
        g <- (1 - alpha) grad L_s(theta)         every micro-batch of the step
        g <- g + alpha grad L_s(theta + delta)   the same micro-batches, one switch of weights a step
        clip, optimiser step on g

Symbols: theta weights, L_s cross-entropy on (restricted prompt, refusal) rows, A_k1 the attack, k1 attack steps, k2
outer steps a round, alpha share of the attacked loss. Source: Wen et al., arXiv 2606.07970, the sequential algorithm.
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
from casehard.defend.copies import CleanCopies, Kept, Round, round_from_state, round_to_state
from casehard.defend.protocol import Setup, StateValue, Step
from casehard.errors import ConfigError, DataError, Unsupported
from casehard.maths.bilevel import (
    Attacker,
    AttackRun,
    AttackVector,
    difference,
    linear_only,
    parameters,
    perturbed_view,
    retain_kl,
    simulate_attack,
    with_view,
)
from casehard.maths.tensors import cosine
from casehard.seeds import derive, generator


@dataclass(frozen=True, kw_only=True)
class PatcherConfig:
    """Settings of Patcher; the defaults are the paper's."""

    alpha: float = 0.5
    """Share of the attacked loss in eq. 1, 0..1; 0 is plain SFT bit for bit. Source: Patcher scripts."""
    round_steps: int = 1000
    """k2, outer steps that share one attack vector. Source: Patcher scripts."""
    attackers: tuple[Attacker, ...] = (Attacker(),)
    """Simulated attackers; with several, each round builds a pool and each step draws one vector from it."""
    reference: Literal["current", "source"] = "current"
    """theta_reference in eq. 3: the weights at adoption (as the published code does) or when the attack began."""
    delay: int = 0
    """Outer steps between an attack and its adoption (staleness ablation); 0 = at once."""
    reset_optimizer: bool = False
    """Forget the outer optimiser's moments at every round, as separate processes per phase do (paper_sequential)."""
    delta_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Storage of the attack vector: 2 or 4 bytes a parameter; theta + delta is composed in fp32 either way."""
    retain: Literal["none", "ce", "kl"] = "none"
    """Extra term on harmless rows: cross-entropy, or KL(start model || model). Not in the paper."""
    retain_weight: float = 0.5
    """Weight of the retain term, in units of the safe loss."""
    retain_batch_size: int = 8
    """Rows of the retain term per outer step."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ConfigError(f"alpha: {self.alpha} is not within 0..1")
        if self.round_steps < 1 or not 0 <= self.delay < self.round_steps:
            raise ConfigError(
                f"round_steps {self.round_steps} must be at least 1 and delay {self.delay} within 0..round_steps-1"
            )
        if self.retain_weight < 0 or self.retain_batch_size < 1:
            raise ConfigError(
                f"retain_weight {self.retain_weight} must not be negative and retain_batch_size "
                f"{self.retain_batch_size} at least 1"
            )
        if not self.attackers:
            raise ConfigError("attackers: at least one is needed", hint="attackers: [{steps: 300, lr: 1e-5}]")


PRESETS: dict[str, PatcherConfig] = {
    "default": PatcherConfig(),
    "paper_sequential": PatcherConfig(reset_optimizer=True, delta_dtype="float32"),
}


class Patcher:
    """Sequential Patcher as a method: pass it to ``HardenedTrainer(method=...)`` or ``fit(method=...)``.

    Args:
        config: settings, see :class:`PatcherConfig`.
        unsafe: rows of the simulated attack (restricted prompt, compliant answer).
        retain: harmless rows of the retain term; required when ``config.retain`` is not "none".

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
        self.passes = 0
        self._restored: dict[str, Any] = {}

    # -- seams ---------------------------------------------------------------------------------------------

    def prepare(self, setup: Setup) -> None:
        """Reset, check the model and, for the KL term, keep the starting weights.

        Raises:
            ConfigError: the run is too short for a single attack, so it would be plain fine-tuning under another name.
            Unsupported: several processes, half-precision or frozen weights.
        """
        first = self.config.round_steps + self.config.delay
        if self.config.alpha > 0 and first >= setup.max_steps:
            raise ConfigError(
                f"the first simulated attack would come at step {first} and the run ends after {setup.max_steps}",
                hint=f"settings.round_steps (now {self.config.round_steps}) must be well below train.steps, "
                "e.g. --set settings.round_steps=10; the published setting is 1000 of 15000",
            )
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise Unsupported("patcher runs in one process", hint="start it without torchrun or accelerate launch")
        parameters(setup.model)
        self._castable = linear_only(setup.model)
        self._seed, self._max_steps, self._log = setup.seed, setup.max_steps, setup.log
        self._copies = CleanCopies(setup.scratch, "patcher")
        self._active: Round | None = None
        self._pending: Round | None = None
        self._pool: list[AttackVector] = []
        self._held: list[Batch] = []
        self._meters: dict[str, list[torch.Tensor]] = {"safe": [], "attacked": []}
        self._start: Kept | None = None
        self.passes = 0
        self._restored = {}
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
            self._catch_up(model)
            if self.config.alpha > 0:
                self._schedule(model, step.index)
        vector = self._draw(step.index)
        share = self.config.alpha if vector is not None else 0.0
        loss = None
        if share < 1.0:
            loss = step.loss(model, batch)
            step.backward(loss if share == 0.0 else loss * (1.0 - share))
            loss = loss.detach()
            self._safe_sum = loss if self._safe_sum is None else self._safe_sum + loss
        else:
            self.passes -= 1  # the loop counts one pass a micro-batch
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
        """Report the last, unfinished round and drop the attack vectors."""
        self._report()
        self._pool.clear()
        self._active = self._pending = None

    def state(self) -> dict[str, StateValue]:
        """Return numbers and files of clean weights; never an attack vector."""
        out: dict[str, StateValue] = {"passes": self.passes}
        out |= round_to_state("active", self._active)
        out |= round_to_state("pending", self._pending)
        if isinstance(self._start, Path):
            out["start"] = self._start
        for kind, values in self._meters.items():
            if values:
                out[f"meter_{kind}"] = torch.stack([x.cpu() for x in values])
        return out

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take a saved state; the round's attack is repeated at the next step, with the running model."""
        self._restored = dict(state)
        self.passes = int(state["passes"])
        for kind in self._meters:
            values = state.get(f"meter_{kind}")
            self._meters[kind] = [] if values is None else list(values.unbind())

    # -- rounds --------------------------------------------------------------------------------------------

    def _catch_up(self, model: nn.Module) -> None:
        """Finish a restore: link the clean copies back and rebuild the vectors by repeating their attack."""
        if not self._restored:
            return
        state, self._restored = self._restored, {}
        if isinstance(start := state.get("start"), Path):
            self._start = self._copies.adopt(start)
            self._anchor = self._copies.tensors(self._start, model)
        self._active = round_from_state("active", state, self._copies)
        self._pending = round_from_state("pending", state, self._copies)
        if self._active is not None:
            self._build_pool(model, self._active)
        self.passes = int(state["passes"])  # the repeated attack was counted when it first ran

    def _schedule(self, model: nn.Module, index: int) -> None:
        """Start an attack where a round begins and adopt it ``delay`` steps later."""
        k2, delay = self.config.round_steps, self.config.delay
        if index >= k2 and index % k2 == 0 and index + delay < self._max_steps:
            source = self._copies.keep(f"source-{index}", model, in_memory=delay > 0)
            self._pending = Round(index // k2, index, source)
        if self._pending is None or index < self._pending.source_step + delay:
            return
        reference: Kept | None = None
        if self.config.reference == "current" and delay > 0:
            reference = self._copies.keep(f"reference-{index}", model, in_memory=False)
        before, previous = self._active, self._pool
        self._active = self._pending._replace(adopted_step=index, reference=reference)
        self._pending = None
        self._announce(previous, self._build_pool(model, self._active))
        if before is not None:
            self._copies.discard(before.source, before.reference)
        if self._copies.scratch is None:
            # Nothing will resume this run, so the copy in memory has served.
            self._active = self._active._replace(source={}, reference=None)

    def _build_pool(self, model: nn.Module, entry: Round) -> list[AttackRun]:
        """Run the round's attacks and keep their vectors (eq. 3); return how each attack went, weights consumed."""
        source = self._copies.tensors(entry.source, model)
        reference = source if entry.reference is None else self._copies.tensors(entry.reference, model)
        self._pool, runs = [], []
        for i, (attacker, rows) in enumerate(zip(self.config.attackers, self.unsafe, strict=True)):
            seed = derive(self._seed, entry.number, f"patcher-attack-{i}")
            steps = attacker.steps
            if attacker.steps_min is not None:
                low = attacker.steps_min
                steps = low + int(torch.randint(steps - low + 1, (), generator=generator(seed, 0, "length")))
            batch_at = rows.stream(attacker.batch_size, seed=seed, purpose="attack-batch")
            run = simulate_attack(model, source, batch_at, attacker, seed=seed, steps=steps)
            delta = difference(run.weights, reference, dtype=getattr(torch, self.config.delta_dtype))
            self._pool.append(AttackVector.of(delta, source_step=entry.source_step, attack_steps=steps))
            self.passes += steps
            runs.append(run)
        return runs

    def _announce(self, previous: list[AttackVector], runs: list[AttackRun]) -> None:
        self._log({"tokens": sum(run.tokens for run in runs)})
        for i, vector in enumerate(self._pool):
            tag = "" if len(self._pool) == 1 else f"_{i}"
            values = {f"attack_norm{tag}": vector.norm, f"attack_steps{tag}": float(vector.attack_steps)}
            if losses := runs[i].losses:
                values |= {f"attack_loss_first{tag}": losses[0], f"attack_loss_last{tag}": losses[-1]}
            if previous:
                old = previous[i].delta
                values[f"attack_cosine{tag}"] = cosine(list(old.values()), [vector.delta[k] for k in old])
            self._log(values)

    def _draw(self, index: int) -> AttackVector | None:
        if len(self._pool) <= 1:
            return self._pool[0] if self._pool else None
        pick = torch.randint(len(self._pool), (), generator=generator(self._seed, index, "patcher-pool"))
        return self._pool[int(pick)]

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
            self.passes += 1
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
        self.passes += 1

    def _report(self) -> None:
        means = {kind: float(torch.stack([x.cpu() for x in v]).mean()) for kind, v in self._meters.items() if v}
        self._meters = {kind: [] for kind in self._meters}
        values = {f"{kind}_loss": value for kind, value in means.items()}
        if len(means) == 2:
            values["gap"] = means["attacked"] - means["safe"]
        if values:
            self._log(values)
