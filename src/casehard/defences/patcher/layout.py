"""How a defender's weights and rows are laid out: one process, DDP's replicas, or FSDP2's shards.

| model | rows of a step | plain and attacked passes | gradient |
|---|---|---|---|
| whole, one process | all here | on the model; theta + delta as a view | as it is |
| in DDP's wrapper | each rank its own | on the module inside, as above | mean over ranks, made here once a step |
| sharded by FSDP2 | each rank its own | theta + delta written into the shards, once a step | FSDP2's, in each pass |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from casehard.data.batches import Batch
from casehard.distributed.fsdp import (
    is_sharded,
    local_weights,
    rank_info,
    simulate_attack_sharded,
    weights_plus,
    weights_set_to,
    with_weights_set_to,
)
from casehard.distributed.ranks import RankInfo, rows_of, sum_gradients, world
from casehard.errors import Unsupported
from casehard.maths.bilevel import (
    Attacker,
    AttackRun,
    Params,
    parameters,
    perturbed_view,
    retain_kl,
    simulate_attack,
    with_view,
)
from casehard.train.passes import unwrapped

Pass = Callable[[nn.Module], torch.Tensor]
"""Forward and backward of one micro-batch; returns its detached loss."""


class Placed(Protocol):
    """Attackers in other processes, which exchange weights with the part of the model that is in this one."""

    @property
    def place(self) -> RankInfo:
        """The part of every weight that they expect here."""


def simulate(
    model: nn.Module,
    source: Mapping[str, torch.Tensor],
    batch_at: Callable[[int], Mapping[str, torch.Tensor]],
    attacker: Attacker,
    **how: Any,
) -> AttackRun:
    """Run :func:`casehard.maths.bilevel.simulate_attack`, or its twin for shards where they lie."""
    if not is_sharded(model):
        return simulate_attack(model, source, batch_at, attacker, **how)
    there = local_weights(model)
    if all(source[name].data_ptr() == p.data_ptr() for name, p in there.items()):
        return simulate_attack_sharded(model, batch_at, attacker, **how)
    with weights_set_to(model, source):
        return simulate_attack_sharded(model, batch_at, attacker, **how)


def count_once(model: nn.Module, number: int) -> int:
    """Return a number that all ranks of a sharded model know, 0 on all but the first: costs are summed over ranks."""
    return 0 if is_sharded(model) and rank_info(model).rank else number


@dataclass(frozen=True)
class ModelLayout:
    """One model as a step finds it."""

    model: nn.Module
    """The model itself, without DDP's wrapper."""
    sharded: bool
    place: RankInfo
    """This process's place among those that share a step's rows."""

    @classmethod
    def of(cls, model: nn.Module) -> ModelLayout:
        """Look at the model that a step was given.

        Raises:
            Unsupported: FSDP1, or several processes of which nobody averages gradients.
        """
        inner = unwrapped(model)
        if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
            raise Unsupported("the model is wrapped by FSDP1", hint="use FSDP2 (fsdp_version: 2)")
        if is_sharded(inner):
            return cls(inner, True, rank_info(inner))
        if inner is not model:
            return cls(inner, False, RankInfo.of_group(model.process_group))
        if world() > 1:
            raise Unsupported(
                f"{world()} processes and a whole model without a wrapper: nobody would average gradients",
                hint="shard it (FSDP2) or wrap it in DistributedDataParallel",
            )
        return cls(inner, False, RankInfo())

    @classmethod
    def of_shards(cls, model: nn.Module) -> ModelLayout | None:
        """Return the layout of a sharded model; None for a whole one, of which only a step shows whether it is wrapped.

        Raises:
            Unsupported: half-precision or frozen weights, or shards that are not FSDP2's alone.
        """
        local_weights(model)
        return cls(model, True, rank_info(model)) if is_sharded(model) else None

    def check(self, attackers: Sequence[Attacker], elsewhere: Placed | None = None) -> None:
        """Refuse attackers that cannot serve this layout.

        Args:
            elsewhere: attackers in other processes; None when this one attacks.

        Raises:
            Unsupported: LoRA attackers on shards, or a defender whose processes do not hold their own rows each.
        """
        if self.sharded and any(a.lora_rank for a in attackers):
            raise Unsupported("a LoRA attacker on a sharded model", hint="attackers[].lora_rank: 0, or one process")
        if elsewhere is None:
            return
        mine = self.place if self.sharded and len(self.place.groups) == 1 else RankInfo()
        if self.place.world_size > mine.world_size or elsewhere.place != mine:
            what = f"{self.place.world_size} replicas" if mine.world_size == 1 else "shards"
            raise Unsupported(
                f"attackers in other processes for a defender of {what}",
                hint="one process, or FSDP2 over the ranks that workers.launch.join left to the defender; "
                "schedule=sequential attacks with all of them",
            )

    def with_delta(
        self,
        delta: Params,
        passes: Sequence[Pass],
        *,
        compute_dtype: torch.dtype | None = None,
        castable: set[str] | None = None,
    ) -> list[torch.Tensor]:
        """Run passes with theta + delta in place of theta; the weights are as before afterwards, bit for bit."""
        if self.sharded:
            with weights_plus(self.model, delta):
                return [run(self.model) for run in passes]
        losses, theta = [], parameters(self.model)
        for run in passes:
            # A backward frees the graph, so each micro-batch composes the view anew from the untouched weights.
            view = perturbed_view(theta, delta, compute_dtype=compute_dtype, castable=castable)
            losses.append(with_view(self.model, view, run))
        return losses

    def retain_loss(self, batch: Batch, anchor: Mapping[str, torch.Tensor] | None) -> torch.Tensor:
        """Return the loss of this rank's rows of a batch that all ranks know, so that their mean is the batch's loss.

        Args:
            anchor: weights to stay close to (KL); None for the cross-entropy.
        """
        rows, weight = rows_of(batch, self.place)
        under = with_weights_set_to if self.sharded else with_view
        loss = self.model(**rows).loss if anchor is None else retain_kl(self.model, anchor, rows, under=under)
        return loss * (weight * self.place.world_size) if self.place.world_size > 1 else loss

    def average_gradients(self) -> None:
        """Take the mean of the step's gradients over DDP's replicas; FSDP2 does so itself in every pass."""
        if not self.sharded and self.place.world_size > 1:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            for gradient in gradients:
                gradient.div_(self.place.world_size)
            sum_gradients(gradients, group=self.place.groups[0])

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return numbers averaged over the ranks, alike on all of them."""
        if self.place.world_size == 1 or not values:
            return dict(values)
        device = next(self.model.parameters()).device
        sums = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
        return dict(zip(values, (self.place.total(sums) / self.place.world_size).tolist(), strict=True))
