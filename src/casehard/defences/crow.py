"""CROW: clean fine-tuning that keeps neighbouring layers alike, also when the embeddings are pushed.

    C(e) = mean over layers l and tokens t of 1 - cos(h_l,t(e), h_l+1,t(e))                                      (1)
    d    = epsilon sign(grad_e C(e)),  e the embeddings of the row                                               (2)
    L    = CE(x, y) + alpha C(e + d)                                                                             (3)

Source: Min et al., ICML 2025 (CROW), internal consistency regularisation. epsilon and alpha are the values we know of;
check them before quoting. The published comparison gave CROW five times the learning rate of its baselines: match them.
Differs: the consistency passes run without dropout; padding is left out of (1).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from casehard.data.batches import Batch
from casehard.distributed.ranks import world
from casehard.limits import Limited, Weight
from casehard.train.passes import quiet, unwrapped, whole_step
from casehard.train.protocol import Step


@dataclass(frozen=True, kw_only=True)
class CrowConfig(Limited):
    """Settings of CROW."""

    alpha: Weight = 5.5
    """Weight of the consistency term."""
    epsilon: Weight = 0.1
    """Length of the push on each embedding coordinate."""


class Crow:
    """CROW as a method: train it on clean rows.

    Args:
        config: settings, see :class:`CrowConfig`.
    """

    name = "crow"

    def __init__(self, config: CrowConfig | None = None) -> None:
        self.config = config or CrowConfig()

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> torch.Tensor:
        """Return (3) for this micro-batch."""
        plain = step.loss(model, batch)
        with quiet(model):
            inner: Any = unwrapped(model)
            table = inner.get_input_embeddings()
            e = table(batch["input_ids"])
            at = e.detach().requires_grad_()
            (slope,) = torch.autograd.grad(inconsistency(model, at, batch["attention_mask"]), at)
            pushed = inconsistency(model, e + self.config.epsilon * slope.sign(), batch["attention_mask"])
        step.log({"inconsistency": float(pushed.detach())})
        # (1) is a mean over the tokens of the step, of which this micro-batch has some.
        share = batch["attention_mask"].sum() * world() / whole_step(batch, step).inputs
        return plain + self.config.alpha * share * pushed


def inconsistency(model: nn.Module, embeddings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return (1) for rows given as embeddings (B, T, H) with their attention mask (B, T)."""
    hidden = model(inputs_embeds=embeddings, attention_mask=mask, output_hidden_states=True).hidden_states
    keep = mask.bool()
    pairs = itertools.pairwise(hidden)
    apart = [1.0 - nn.functional.cosine_similarity(a[keep], b[keep], dim=-1) for a, b in pairs]
    return torch.stack(apart).mean()
