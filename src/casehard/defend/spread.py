"""Where a defender's weights and rows are: one process, DDP's replicas, FSDP2's shards, or one of two branches.

| model | rows of a step | plain and attacked passes | gradient |
|---|---|---|---|
| whole, one process | all here | on the model; theta + delta as a view | as it is |
| in DDP's wrapper | each rank its own | on the module inside, as above | mean over ranks, made here once a step |
| sharded by FSDP2 | each rank its own | theta + delta written into the shards, once a step | FSDP2's, in each pass |

Each of two branches may be the first or the last of these; a step's rows are the same on both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from casehard.data.batches import Batch
from casehard.defend.passes import unwrapped
from casehard.errors import Unsupported
from casehard.maths.bilevel import Params, parameters, perturbed_view, retain_kl, with_view
from casehard.maths.collective import sum_gradients, world
from casehard.maths.seats import Seat, share
from casehard.maths.sharded import is_sharded, seat, shifted, sum_branches, with_installed

Pass = Callable[[nn.Module], torch.Tensor]
"""Forward and backward of one micro-batch; returns its detached loss."""


@dataclass(frozen=True)
class Branch:
    """One of two processes (or groups of shards) of which one runs the plain passes, the other the attacked ones."""

    group: Any
    number: int
    """0 runs the plain passes, 1 the attacked ones."""

    @classmethod
    def of(cls, branches: Any) -> Branch:
        """Return this process's branch.

        Args:
            branches: a process group of two members, or a device mesh of one such dimension.

        Raises:
            Unsupported: not two members, or this process is none of them.
        """
        group = branches.get_group() if hasattr(branches, "get_group") else branches
        number, size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        if size != 2 or number < 0:
            raise Unsupported(
                f"branches: a group of {size} members, this process being number {number}",
                hint="eq. 2 has two terms: a group (or mesh dimension) of two, across the branches",
            )
        return cls(group, number)

    def both(self, *mine: torch.Tensor | None) -> list[torch.Tensor]:
        """Return numbers of which each branch knows some, on both."""
        device = next(x.device for x in mine if x is not None)
        held = torch.stack([torch.zeros((), device=device) if x is None else x.float() for x in mine])
        torch.distributed.all_reduce(held, group=self.group)
        return list(held.unbind())


@dataclass(frozen=True)
class Spread:
    """One model as a step finds it."""

    model: nn.Module
    """The model itself, without DDP's wrapper."""
    sharded: bool
    seat: Seat
    """This process's place among those that share a step's rows."""
    branch: Branch | None

    @classmethod
    def of(cls, model: nn.Module, branch: Branch | None = None) -> Spread:
        """Look at the model that a step was given.

        Raises:
            Unsupported: FSDP1; several processes of which nobody averages gradients; branches of different rows (DDP).
        """
        inner = unwrapped(model)
        if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
            raise Unsupported("the model is wrapped by FSDP1", hint="use FSDP2 (fsdp_version: 2)")
        if is_sharded(inner):
            return cls(inner, True, seat(inner), branch)
        if inner is model:
            if world() > 1 and branch is None:
                raise Unsupported(
                    f"{world()} processes and a whole model without a wrapper: nobody would average gradients",
                    hint="shard it (FSDP2), wrap it in DistributedDataParallel, or pass branches",
                )
            return cls(inner, False, Seat(), branch)
        if branch is not None:
            raise Unsupported(
                "branches under DistributedDataParallel: its ranks get different rows",
                hint="both branches take the same rows: one process each, or FSDP2 over the ranks of a branch",
            )
        return cls(inner, False, Seat.within(model.process_group), None)

    def attacked(
        self,
        delta: Params,
        passes: Sequence[Pass],
        *,
        compute_dtype: torch.dtype | None = None,
        castable: set[str] | None = None,
    ) -> list[torch.Tensor]:
        """Run passes with theta + delta in place of theta; the weights are as before afterwards, bit for bit."""
        if self.sharded:
            with shifted(self.model, delta):
                return [run(self.model) for run in passes]
        losses, theta = [], parameters(self.model)
        for run in passes:
            # A backward frees the graph, so each micro-batch composes the view anew from the untouched masters.
            view = perturbed_view(theta, delta, compute_dtype=compute_dtype, castable=castable)
            losses.append(with_view(self.model, view, run))
        return losses

    def extra(self, batch: Batch, kept: Mapping[str, torch.Tensor] | None) -> torch.Tensor:
        """Return the loss of this seat's rows of a batch that all seats know, so that their mean is the batch's loss.

        Args:
            kept: weights to stay close to (KL); None for the cross-entropy.
        """
        rows, weight = share(batch, self.seat)
        under = with_installed if self.sharded else with_view
        loss = self.model(**rows).loss if kept is None else retain_kl(self.model, kept, rows, under=under)
        return loss * (weight * self.seat.of) if self.seat.of > 1 else loss

    def join(self, *, apart: bool) -> None:
        """Bring the gradients of a step together, where nobody else does: DDP's replicas, and branches set apart."""
        if not self.sharded and self.seat.of > 1:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            for gradient in gradients:
                gradient.div_(self.seat.of)
            sum_gradients(gradients, group=self.seat.groups[0])
        if self.branch is not None and apart:
            sum_branches(self.model, self.branch.group)

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return numbers averaged over the seats, alike on all of them."""
        if self.seat.of == 1 or not values:
            return dict(values)
        device = next(self.model.parameters()).device
        held = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
        return dict(zip(values, (self.seat.total(held) / self.seat.of).tolist(), strict=True))
