"""SafeGrad, gradient surgery: take out of the user's gradient what works against alignment, and add alignment.

    g_u = grad L(user rows),  g_a = grad A(safe rows)
    if <g_u, g_a> < 0:   g_u <- g_u - (<g_u, g_a> / ||g_a||^2) g_a                                               (1)
    g <- g_u + weight g_a                                                                                        (2)

A is KL(starting model || model) on the safe rows ("kl"), or their cross-entropy ("ce"). One pair of global gradients a
step, over all trained parameters. Source: Yi et al., arXiv 2508.07172 (SafeGrad); (2) with weight 1 is our reading.
Differs: the surgery acts once an optimiser step, on the gradients summed over its micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from casehard.data.batches import Batch, EncodedSet
from casehard.defences.updates import from_state, to_state
from casehard.distributed.ranks import require_one_process
from casehard.errors import DataError
from casehard.limits import BatchSize, Limited, Weight
from casehard.maths.bilevel import retain_kl
from casehard.maths.tensors import dot, norm
from casehard.train.passes import quiet, rows_of_rank
from casehard.train.protocol import Setup, StateValue, Step


@dataclass(frozen=True, kw_only=True)
class SafeGradConfig(Limited):
    """Settings of SafeGrad."""

    alignment: Literal["kl", "ce"] = "kl"
    """Alignment loss A. Source: SafeGrad (KL to the aligned model); "kl" keeps a copy of the trained weights."""
    weight: Weight = 1.0
    """Weight of the alignment gradient in (2); 0 keeps the surgery alone."""
    batch_size: BatchSize = 4
    """Safe rows a step."""


class SafeGrad:
    """SafeGrad as a method.

    Args:
        config: settings, see :class:`SafeGradConfig`.
        safe: safe rows.

    Raises:
        DataError: no safe rows.
    """

    name = "safegrad"

    def __init__(self, config: SafeGradConfig | None = None, *, safe: EncodedSet) -> None:
        self.config = config or SafeGradConfig()
        if len(safe) == 0:
            raise DataError("safegrad: no safe rows", hint="--safe pool.jsonl")
        self.safe = safe

    def prepare(self, setup: Setup) -> None:
        """Keep the starting weights for the KL term (frozen ones are shared, not copied).

        Raises:
            Unsupported: several processes; gradients are not yet averaged where the surgery acts.
        """
        require_one_process("safegrad")
        self._seed = setup.seed
        self._start: dict[str, torch.Tensor] = {}
        self._trained: list[str] = []
        if self.config.alignment == "kl":
            named = dict(setup.model.named_parameters())
            self._trained = [name for name, p in named.items() if p.requires_grad]
            self._start = {name: p.detach().clone() if p.requires_grad else p for name, p in named.items()}

    def backward(self, model: nn.Module, batch: Batch, step: Step) -> torch.Tensor:
        """Accumulate the user's gradient; with the last micro-batch, replace it by (2)."""
        loss = step.loss(model, batch)
        step.backward(loss)
        if step.last:
            self._surgery(model, step)
        return loss.detach()

    def state(self) -> dict[str, StateValue]:
        """Return the start of the trained weights: whoever resumes may have loaded the checkpoint."""
        return to_state({name: self._start[name] for name in self._trained})

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` returned; an older checkpoint has none, and the start is prepare's."""
        if state:
            self._start |= from_state({name: self._start[name] for name in self._trained}, state)

    def _surgery(self, model: nn.Module, step: Step) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        user = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        for p in trained:
            p.grad = None
        device = user[0].device
        size = self.config.batch_size
        batch = rows_of_rank(self.safe, size, seed=self._seed, step=step.index, purpose="safegrad", device=device)
        with quiet(model):
            loss = retain_kl(model, self._start, batch) if self._start else step.loss(model, batch) * step.micros
            step.backward(loss)
        align = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        along = remove_conflict_(user, align)
        for p, u, a in zip(trained, user, align, strict=True):
            p.grad = u.add_(a, alpha=self.config.weight)
        step.log({"alignment_loss": float(loss.detach()), "conflict_rate": float(along < 0), "alignment_cosine": along})


def remove_conflict_(user: list[torch.Tensor], align: list[torch.Tensor]) -> float:
    """Apply (1) in place to ``user`` and return the cosine between the two gradients before it."""
    product, size = dot(user, align), norm(align)
    cosine = product / (size * norm(user)) if size > 0 and norm(user) > 0 else 0.0
    if product < 0:
        torch._foreach_add_(user, align, alpha=-product / size**2)
    return cosine
