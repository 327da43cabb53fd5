"""Weight difference: take back what a defence changed, from somebody who has the model before it.

    D = W - W_before = U S V',   W = W - f U_r S_r V_r'                                                          (1)

for every matrix; of other tensors (norms, biases) all of D is taken back f times. f is the factor, r how many of the
largest singular directions; all of them and f = 1 give the model before. Nothing is trained. Sources: negated task
vectors, Ilharco et al., arXiv 2212.04089; alignment in few directions of the weights, Wei et al., arXiv 2402.05162.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from casehard.attacks.editing import Untrained, copy_of, measured
from casehard.attacks.protocol import Attacked, AttackInputs
from casehard.errors import ConfigError, DataError
from casehard.limits import Factor, Limited, Rank
from casehard.model.load import load
from casehard.model.model import Model


@dataclass(frozen=True, kw_only=True)
class WeightDifferenceAttack(Limited):
    """Settings of taking a weight difference back."""

    before: str
    """The model before the defence: a folder or a Hub id, of the same architecture."""
    factor: Factor = 1.0
    """f; above 1 goes beyond the model before."""
    rank: Rank | None = None
    """r, directions of each matrix that are taken back; None: all."""

    def __post_init__(self) -> None:
        """Raise ConfigError where no model is named."""
        super().__post_init__()
        if not self.before.strip():
            raise ConfigError("before is empty", hint="--before DIR|ID: the model before the defence")


def top(difference: torch.Tensor, rank: int | None) -> torch.Tensor:
    """Return the best approximation of rank r of a matrix (O, I); other tensors, and all ranks, as they are."""
    if rank is None or difference.dim() != 2 or rank >= min(difference.shape):
        return difference
    u, s, v = torch.linalg.svd(difference, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


class WeightDifference(Untrained[WeightDifferenceAttack]):
    """Subtract a part of what a defence changed from a copy."""

    name = "weight_difference"

    @torch.no_grad()
    def run(self, model: Model, inputs: AttackInputs) -> Attacked:
        """Apply (1) to a copy of ``model`` and measure it.

        Raises:
            UserError: the model before cannot be loaded; see :func:`casehard.model.load.load`.
            DataError: it is of another architecture, or its weights are the same.
        """
        begun, config, net = time.monotonic(), self.config, copy_of(model)
        before = load(config.before)
        old = dict(before.net.named_parameters())
        own = dict(net.named_parameters())
        shapes = [{name: p.shape for name, p in some.items()} for some in (old, own)]
        if odd := sorted(name for name in {*old, *own} if shapes[0].get(name) != shapes[1].get(name)):
            where = [tuple(some[odd[0]]) if odd[0] in some else "missing" for some in shapes]
            raise DataError(
                f"{config.before}: the tensor {odd[0]} is {where[0]}, that of the model {where[1]}",
                hint="before is a model of the same architecture",
            )
        total = taken = 0.0
        for name, weight in own.items():
            difference = weight.float() - old[name].to(weight.device, torch.float32)
            part = top(difference, config.rank)
            weight.sub_((config.factor * part).to(weight.dtype))
            total, taken = total + float(difference.square().sum()), taken + float(part.square().sum())
        if total == 0:
            what = f"{config.before}: its weights are those of the model"
            raise DataError(what, hint="before is the model that the defence started from")
        facts = {"before": before.digest, "share_taken": taken / total}
        return measured(self, model, net, inputs, facts, begun)
