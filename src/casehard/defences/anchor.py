"""Anchor: fine-tuning held near the starting model, in what it says (KL) or in the weights that matter (EWC).

    kl    L(theta) = L(user rows) + weight KL(p_start || p_theta)                                                (1)
    ewc   L(theta) = L(user rows) + weight / 2 sum_i F_i (theta_i - start_i)^2                                   (2)
          F_i = mean over safe rows (x, y) of (d log p_start(y | x) / d theta_i)^2                               (3)

The KL is the mean over the answer tokens of a few safe rows a step or, where no safe rows are given, of the user's own
rows. i runs over the trained parameters. (1) has no single source: it is the usual penalty of RLHF and distillation,
and SafeGrad's alignment loss without its surgery. (2): Kirkpatrick et al., arXiv 1612.00796.
Differs: (3) takes the answers of the safe rows, where the Fisher information has answers drawn from the model (the
"empirical Fisher"). Both terms count once an optimiser step, however it is cut up, and are computed without dropout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from casehard.data.batches import Batch, EncodedSet, collate, indices_at
from casehard.defences.updates import from_state, to_state
from casehard.distributed.ranks import require_one_process
from casehard.errors import DataError, Diverged
from casehard.limits import BatchSize, Count, Limited, Weight
from casehard.maths.bilevel import retain_kl
from casehard.train.passes import quiet, rows_of_micro, share_of_step, trained_tokens, whole_step
from casehard.train.protocol import Setup, StateValue, Step


@dataclass(frozen=True, kw_only=True)
class AnchorConfig(Limited):
    """Settings of the anchor."""

    kind: Literal["kl", "ewc"] = "kl"
    """(1) or (2)."""
    weight: Weight = 1.0
    """Weight of the anchor; 0 is plain fine-tuning. For kl in units of the user's loss. EWC's has no natural unit, see
    preset "ewc"."""
    batch_size: BatchSize = 4
    """kl: safe rows a step; without safe rows the user's are taken, all of them."""
    fisher_rows: Count = 200
    """ewc: safe rows that (3) is the mean over, at most; one backward pass each, once before training."""


PRESETS: dict[str, AnchorConfig] = {
    "kl": AnchorConfig(),
    "ewc": AnchorConfig(kind="ewc", weight=1000.0),
}


class Anchor:
    """The anchor as a method.

    Args:
        config: settings, see :class:`AnchorConfig`.
        safe: safe rows. Without them (1) holds the model on the user's rows; (2) needs them.

    Raises:
        DataError: an empty set of safe rows, or none for ewc.
    """

    name = "anchor"

    def __init__(self, config: AnchorConfig | None = None, *, safe: EncodedSet | None = None) -> None:
        self.config = config or AnchorConfig()
        if self.config.kind == "ewc" and safe is None:
            raise DataError("anchor: kind ewc measures on safe rows what matters", hint="--safe pool.jsonl, or kind kl")
        if safe is not None and len(safe) == 0:
            raise DataError("anchor: no safe rows", hint="--safe pool.jsonl")
        self.safe = safe
        self._start: dict[str, torch.Tensor] = {}
        self._fisher: dict[str, torch.Tensor] = {}

    def prepare(self, setup: Setup) -> None:
        """Keep the starting weights (frozen ones are shared, not copied) and, for (2), measure (3).

        Raises:
            Unsupported: several processes: the starting model runs inside the trained one.
            Diverged: a gradient on the safe rows is not finite.
        """
        require_one_process("anchor")
        self._seed, named = setup.seed, dict(setup.model.named_parameters())
        self._trained = [name for name, p in named.items() if p.requires_grad]
        self._start = {name: p.detach().clone() if p.requires_grad else p for name, p in named.items()}
        if self.config.kind == "ewc":
            assert self.safe is not None
            few = indices_at(
                len(self.safe),
                min(len(self.safe), self.config.fisher_rows),
                seed=setup.seed,
                step=0,
                purpose="anchor-fisher",
            )
            self._fisher = fisher(setup.model, EncodedSet(tuple(self.safe.rows[i] for i in few), self.safe.pad_id))

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> torch.Tensor:
        """Return this micro-batch's part of (1) or (2)."""
        user = step.loss(model, batch)
        if self.config.weight == 0:
            return user
        if self.config.kind == "kl":
            return user + self.config.weight * self._kl(model, batch, step)
        if not step.last:  # the weights do not move within a step: the penalty need not be cut up
            return user
        held = {name: p for name, p in model.named_parameters() if name in self._fisher}
        far = [(self._fisher[name] * (p - self._start[name]).square()).sum() for name, p in held.items()]
        penalty = 0.5 * torch.stack(far).sum()
        step.log({"anchor_loss": float(penalty.detach())})
        return user + self.config.weight * penalty

    def _kl(self, model: nn.Module, batch: Batch, step: Step) -> torch.Tensor:
        """Return this micro-batch's part of the mean over the tokens of a step's rows."""
        if self.safe is None:
            rows: Batch | None = batch
            tokens: torch.Tensor | int = whole_step(batch, step).tokens
        else:
            size, device = self.config.batch_size, batch["input_ids"].device
            rows, tokens = rows_of_micro(self.safe, size, step, seed=self._seed, purpose="anchor", device=device)
        if rows is None:
            return torch.zeros((), device=batch["input_ids"].device)
        if self.safe is not None:
            step.log({"tokens": int(rows["attention_mask"].sum())})
        with quiet(model):
            part = share_of_step(rows, step, tokens) * retain_kl(model, self._start, rows)
        step.log({"anchor_loss": float(part.detach()) * step.micros})
        return part

    def state(self) -> dict[str, StateValue]:
        """Return the anchor: whoever resumes may have loaded the checkpoint, not the start."""
        start = to_state({name: self._start[name] for name in self._trained})
        return start | {f"fisher.{name}": value for name, value in self._fisher.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` returned."""
        self._start |= from_state({name: self._start[name] for name in self._trained}, state)
        for name, value in self._fisher.items():
            self._fisher[name] = state[f"fisher.{name}"].to(value.device)


def fisher(model: nn.Module, rows: EncodedSet) -> dict[str, torch.Tensor]:
    """Return (3) for every trained parameter, by name, each of its parameter's shape; one backward pass a row.

    Raises:
        Diverged: a gradient is not finite.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    out = {name: torch.zeros_like(p) for name, p in trained.items()}
    device = next(iter(trained.values())).device
    with quiet(model):
        for row in rows.rows:
            batch = {key: value.to(device) for key, value in collate([row], rows.pad_id).items()}
            likelihood = -model(**batch).loss * trained_tokens(batch)  # of the whole answer, not of a token
            slopes = torch.autograd.grad(likelihood, list(trained.values()), allow_unused=True)
            for total, slope in zip(out.values(), slopes, strict=True):
                if slope is not None:
                    total.addcmul_(slope, slope, value=1.0 / len(rows))
    if not all(bool(total.isfinite().all()) for total in out.values()):
        raise Diverged("anchor: a gradient on the safe rows is not finite", hint="check the starting model")
    return out
