"""SPARD's SPAG: a utility step, then a projection onto the half-space where the safety loss meets its target.

Minimise L(user rows, theta)  subject to  L(safe rows, theta) <= tau                                              (1)

    for step t = 0, 1, 2, ...
        theta+ <- theta + the optimiser's step on the user's batch
        l <- L(safe batch, theta+)                                  forward only
        if l <= tau + delta:  theta <- theta+                       no backward, nothing is touched
        else:                 g <- grad L(safe batch, theta+)
                              alpha <- min((l - tau) / g' M g, eta_safe)                                         (2)
                              theta <- theta+ - alpha M g                                                        (3)

M is the identity in mode "euclidean" (the paper's Algorithm 1 to the letter) and the optimiser's own diagonal metric in
mode "adam" (the default): with AdamW as the utility optimiser the Euclidean step under the cap eta_safe = lr is some
thousand times smaller than the utility step, so it does nothing. With several sets of safe rows, (2) and (3) become the
projection onto the intersection of their half-spaces (maths/projection). The safety gradient enters neither moments nor
weight decay. Mode "reference" repeats what the published code does (clip each tensor, then step the shared optimiser);
it is no projection, and is there for reproduction only.

Symbols: tau target, delta hysteresis, eta_safe cap. Source: Chen et al., arXiv 2605.28030, Algorithm 1.
Differs from the published code: see docs/methods/spard.md. Batches are functions of (seed, step), so a resumed run
repeats the uninterrupted one; ranks share one safe batch, add up loss and tokens in one collective and branch alike.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from torch import nn

from casehard.data.batches import IGNORE, EncodedSet, collate
from casehard.distributed.ranks import sharded, sum_gradients, sum_over_ranks, world
from casehard.errors import ConfigError, DataError, Diverged, Unsupported
from casehard.limits import WEIGHT, BatchSize, Count, Factor, Limited, Weight, Within
from casehard.maths.optimizers import FLOOR, OptimizerView, learning_rate
from casehard.maths.projection import Projection, project_
from casehard.maths.tensors import norm
from casehard.train.passes import quiet, reshard, rows_of_rank, trained_tokens
from casehard.train.protocol import Setup, StateValue, Step

MAX_SKIPS = 10
"""Consecutive checks without a finite loss or gradient after which the run stops: it is no longer protected."""


@dataclass(frozen=True, kw_only=True)
class SpardConfig(Limited):
    """Settings of SPAG; the defaults are the paper's where it states them."""

    tau: Annotated[float | Literal["auto"], Within(0, WEIGHT)] = "auto"
    """Target of the safety loss, nats a token. "auto" = tau_scale x the starting model's own loss on the safe rows, for
    each set apart; the paper's 0.2 is a number for its own answers and models."""
    tau_scale: Weight = 0.75
    """Factor of tau="auto"; below 1 asks for more than the starting model gives. Ours."""
    delta: Weight = 0.1
    """Hysteresis: act when the loss exceeds tau + delta, then aim at tau; nats a token. Source: P, script."""
    batch_size: BatchSize = 4
    """Safe rows a check and set, over all ranks, in one batch. Source: script (1 x 4 accumulated); the paper says 1."""
    eta_safe: Annotated[float | Literal["lr"], Within(0, WEIGHT, endless=True)] = "lr"
    """Cap on alpha of (2): a number, or the optimiser's current learning rate; inf for none. Source: P (eta_ft)."""
    rho: Factor | None = None
    """Further cap, ||safety step|| <= rho ||utility step||. Not in the paper."""
    mode: Literal["adam", "euclidean", "reference"] = "adam"
    """Metric of the projection, or the published code's behaviour (reproduction only)."""
    floor: Factor = FLOOR
    """Mode adam: least sqrt(v_hat), as a share of its root mean square, so that M is at most 1 / floor times typical.
    Not in the paper; settled on a world that no table uses."""
    embeddings: bool = False
    """Whether the correction may move embedding tables, when they are trained. The paper moves all trained weights,
    which are a LoRA's; in full-parameter training the tables took most of the correction (docs page) and the
    model learnt which words stand in the safe rows instead of refusing."""
    every: Count = 1
    """Check every that many optimiser steps."""
    dropout: bool = False
    """Leave dropout on during the check; its masks are drawn from (seed, step), never from the user's stream."""


PRESETS: dict[str, SpardConfig] = {
    "default": SpardConfig(),
    "paper": SpardConfig(tau=0.2, delta=0.0, batch_size=1, eta_safe=5e-5, mode="euclidean", embeddings=True),
    "published_code": SpardConfig(tau=0.2, delta=0.1, batch_size=4, mode="reference"),
}


class Spard:
    """SPAG as a method: pass it to ``HardenedTrainer(method=...)`` or ``fit(method=...)``.

    Args:
        config: settings, see :class:`SpardConfig`.
        safe: safe rows (restricted prompts with refusals **and** harmless rows: refusals alone teach over-refusal); a
            mapping of topic to rows makes one constraint a topic.

    Raises:
        DataError: no safe rows, or rows without a trained token.
    """

    name = "spard"

    def __init__(self, config: SpardConfig | None = None, *, safe: EncodedSet | Mapping[str, EncodedSet]) -> None:
        self.config = config or SpardConfig()
        self.safe = dict(safe) if isinstance(safe, Mapping) else {"safe": safe}
        if not self.safe:
            raise DataError("spard: no set of safe rows", hint="--safe pool.jsonl")
        for topic, rows in self.safe.items():
            if len(rows) == 0:
                raise DataError(f"spard: no safe rows for {topic!r}", hint="--safe pool.jsonl")
            if not all(any(label != IGNORE for label in row.labels[1:]) for row in rows.rows):
                raise DataError(f"spard: a safe row of {topic!r} has no answer to learn from")
        if self.config.mode == "reference" and len(self.safe) > 1:
            raise ConfigError(f"spard: mode reference takes one set of safe rows, got {len(self.safe)}")
        self.taus: list[float] = []
        self.checks = self.triggers = self.skips = 0

    # -- seams ---------------------------------------------------------------------------------------------

    def prepare(self, setup: Setup) -> None:
        """Reset, and measure tau="auto" on the model as it stands."""
        if self.config.batch_size < world():
            raise ConfigError(
                f"spard: {self.config.batch_size} safe rows a check for {world()} processes",
                hint=f"batch_size of at least {world()}",
            )
        trained = {n: p for n, p in setup.model.named_parameters() if p.requires_grad}
        half = [n for n, p in trained.items() if torch.finfo(p.dtype).bits < 32]
        if half:
            warnings.warn(
                f"{len(half)} trained tensors are in half precision ({half[0]}): small steps vanish in rounding",
                stacklevel=2,
            )
        self._seed = setup.seed
        self._in_a_row = 0
        self.checks = self.triggers = self.skips = 0
        self.taus = [self._tau(setup.model, rows, setup.log, topic) for topic, rows in self.safe.items()]

    def after_step(self, model: nn.Module, optimizer: Any, step: Step) -> None:
        """Check the safety loss after the utility step and, if it is violated, project."""
        if step.index % self.config.every:
            return
        # Before the forward pass: after it, FSDP2 shows gathered parameters that the backward pass frees.
        kept = [(p, p.grad) for p in model.parameters() if p.requires_grad]
        with quiet(model, dropout=self.config.dropout, seed=(self._seed, step.index)):
            losses, totals, values = self._forward(model, step)
            self.checks += 1
            if not all(math.isfinite(v) for v in values):
                reshard(model)
                self._skip(step, "the safety loss")
                return
            excess = [v - tau for v, tau in zip(values, self.taus, strict=True)]
            if max(excess) <= self.config.delta:
                reshard(model)
                self._in_a_row = 0
                step.log({"safe_loss": sum(values) / len(values), "trigger_rate": 0.0})
                return
            self.triggers += 1
            for p, _ in kept:
                p.grad = None
            gradients = self._gradients(losses, totals, [p for p, _ in kept], optimizer, step)
        telemetry = {"safe_loss": sum(values) / len(values), "trigger_rate": 1.0, "violation": max(excess)}
        if self.config.mode == "reference":
            step.log(telemetry | self._reference(optimizer, [p for p, _ in kept], gradients[0], excess[0]))
            return
        if not self.config.embeddings:
            tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
            moves = [i for i, (p, _) in enumerate(kept) if id(p) not in tables]
            kept, gradients = [kept[i] for i in moves], [[g[i] for i in moves] for g in gradients]
        done = self._project(optimizer, kept, gradients, excess)
        if done is None:
            self._skip(step, "the safety gradient")
            return
        self._in_a_row = 0
        step.log(telemetry | self._report(done))

    def state(self) -> dict[str, StateValue]:
        """Return the targets and the counters; the safe stream is a function of (seed, step)."""
        counters = [self.checks, self.triggers, self.skips, self._in_a_row]
        return {"taus": list(self.taus), "counters": [int(c) for c in counters]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` returned; tau is that of the model the run began with."""
        self.taus = [float(t) for t in state["taus"]]
        self.checks, self.triggers, self.skips, self._in_a_row = (int(c) for c in state["counters"])

    # -- parts ---------------------------------------------------------------------------------------------

    @property
    def trigger_rate(self) -> float:
        """Share of checks so far that violated a constraint."""
        return self.triggers / self.checks if self.checks else 0.0

    def _tau(self, model: nn.Module, rows: EncodedSet, log: Any, topic: str) -> float:
        if self.config.tau != "auto":
            return float(self.config.tau)
        total, tokens = 0.0, 0
        device = next(model.parameters()).device
        order = sorted(rows.rows, key=lambda row: len(row.input_ids))
        with quiet(model, dropout=False, seed=(self._seed, 0)), torch.no_grad():
            for begin in range(0, len(order), 16):
                batch = {k: v.to(device) for k, v in collate(order[begin : begin + 16], rows.pad_id).items()}
                count = trained_tokens(batch)
                total += float(model(**batch).loss) * count
                tokens += count
        loss = total / tokens
        if not math.isfinite(loss):
            raise Diverged(f"spard: the starting model's loss on the safe rows of {topic!r} is {loss}")
        log({"tau" if len(self.safe) == 1 else f"tau_{topic}": self.config.tau_scale * loss})
        return self.config.tau_scale * loss

    def _forward(self, model: nn.Module, step: Step) -> tuple[list[torch.Tensor], list[float], list[float]]:
        """Return, for each topic, this rank's summed loss (with graph), all ranks' tokens and the mean over them."""
        device = next(model.parameters()).device
        sums, counts = [], []
        for topic, rows in self.safe.items():
            number, size = step.index // self.config.every, self.config.batch_size
            batch = rows_of_rank(rows, size, seed=self._seed, step=number, purpose=f"spard-{topic}", device=device)
            counts.append(trained_tokens(batch))
            # The seam's loss is this micro-batch's part of a step.
            sums.append(step.loss(model, batch) * (step.micros * counts[-1]))
        both = torch.stack([s.detach().double() for s in sums])
        both = torch.cat([both, torch.tensor(counts, dtype=torch.float64, device=both.device)])
        total = sum_over_ranks(both).tolist()
        tokens = total[len(sums) :]
        return sums, tokens, [s / t for s, t in zip(total, tokens, strict=False)]

    def _gradients(
        self,
        losses: list[torch.Tensor],
        tokens: list[float],
        parameters: list[nn.Parameter],
        optimizer: Any,
        step: Step,
    ) -> list[list[torch.Tensor]]:
        """Return the gradient of each topic's mean loss over all ranks; ``.grad`` ends up None."""
        scaler = getattr(optimizer, "scaler", None)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        out = []
        for loss, total in zip(losses, tokens, strict=True):
            # Sharded gradients are averaged over the ranks by the backward pass, replicated ones are added up here.
            step.backward(loss * ((world() if any(map(sharded, parameters)) else 1) / total))
            out.append([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
            for p in parameters:
                p.grad = None
            if scale != 1.0:
                torch._foreach_div_(out[-1], scale)
            sum_gradients(out[-1])
        return out

    def _project(
        self,
        optimizer: Any,
        kept: list[tuple[nn.Parameter, torch.Tensor | None]],
        gradients: list[list[torch.Tensor]],
        excess: list[float],
    ) -> Projection | None:
        parameters = [p for p, _ in kept]
        view = OptimizerView(optimizer, parameters, [g for _, g in kept], floor=self.config.floor)
        if self.config.rho is not None and not view.knows_step:
            raise Unsupported(
                f"spard: rho needs the last update, which {type(optimizer).__name__} does not tell",
                hint="use adamw, or leave rho unset",
            )
        adaptive = self.config.mode == "adam" and view.adaptive
        if self.config.mode == "adam" and not (view.adaptive or view.is_sgd):
            raise Unsupported(
                f"spard: mode adam cannot read the metric of {type(optimizer).__name__}",
                hint="use adamw, adam or sgd (whose metric is the identity), or mode euclidean",
            )
        return project_(
            parameters,
            gradients,
            excess,
            metric=view.metric if adaptive else None,
            cap=learning_rate(optimizer) if self.config.eta_safe == "lr" else self.config.eta_safe,
            rho=self.config.rho,
            previous=view.last_step if view.knows_step else None,
        )

    def _report(self, done: Projection) -> dict[str, float]:
        if sum(done.full) == 0:
            warnings.warn("spard: the safety loss is violated and its gradient is zero; no step taken", stacklevel=3)
            return {"zero_gradient": 1.0}
        out = {"alpha": done.alpha, "alpha_share": done.share, "residual": max(done.residuals)}
        if done.previous is not None and done.cosine is not None:
            # Positive: both steps pull the same way.
            out["step_cosine"] = done.cosine
            if done.previous > 0:
                out["step_ratio"] = done.length / done.previous
        if not done.feasible:
            out["conflict"] = 1.0
        return out

    def _reference(
        self, optimizer: Any, parameters: list[nn.Parameter], gradient: list[torch.Tensor], excess: float
    ) -> dict[str, float]:
        """Do what the published code does: clip to norm 1, clip each tensor to the violation, step the optimiser."""
        size = norm(gradient)
        if not math.isfinite(size):
            raise Diverged("spard: the safety gradient is not finite")
        before = [p.detach().clone() for p in parameters]
        for p, g in zip(parameters, gradient, strict=True):
            g.mul_(min(1.0, 1.0 / (size + 1e-6)))
            p.grad = g.mul_(min(excess / (norm([g]) + 1e-8), 1.0))
        optimizer.step()
        for p in parameters:
            p.grad = None
        return {"step_length": norm([p.detach() - b for p, b in zip(parameters, before, strict=True)])}

    def _skip(self, step: Step, what: str) -> None:
        self.skips += 1
        self._in_a_row += 1
        step.log({"skipped": 1.0})
        if self._in_a_row >= MAX_SKIPS:
            raise Diverged(
                f"spard: {what} was not finite in {MAX_SKIPS} checks in a row, up to step {step.index}",
                hint="lower the learning rate, or compute in float32",
            )


def preset(name: str, **changes: Any) -> SpardConfig:
    """Return a named preset with changes applied: ``default``, ``paper`` or ``published_code``."""
    if name not in PRESETS:
        raise ConfigError(f"spard preset {name!r} is unknown", hint=f"one of {sorted(PRESETS)}")
    return replace(PRESETS[name], **changes)
