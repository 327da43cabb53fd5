"""Token-wise constrained fine-tuning: the first tokens of an answer may move little, the others nearly as they like.

    r_t = log p_theta(y_t | x, y_<t) - log p_start(y_t | x, y_<t)                                                (1)
    L(theta) = - mean over answer tokens of (2 / beta_t) log sigmoid(beta_t r_t)                                 (2)
    grad L   = - mean of 2 sigmoid(-beta_t r_t) grad log p_theta(y_t | x, y_<t)                                  (3)

    beta_t = first for t = 1, early for t = 2 .. until, rest afterwards; t counts the answer's tokens from 1

p_start is the model that training starts from, the aligned one. At the start every r_t is 0 and (3) is the gradient of
plain fine-tuning. As a token becomes likelier than it was, its weight 2 sigmoid(-beta_t r_t) falls to zero, the sooner
the larger beta_t is: a large beta binds the token to the aligned model, a small one leaves it free. For beta_t = 0 the
token's term is -r_t, the limit of (2) but for a constant: that is plain fine-tuning.
Source: Qi et al., arXiv 2406.05946, Eq. 3, with beta 0.5, 2 (t = 2 .. 5) and 0.1.
Differs: (2) is a mean over the trained tokens of the whole step, as every loss here is. p_start runs without gradient
and dropout in the same module, on a copy of the weights that are trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from casehard.data.batches import IGNORE, Batch
from casehard.defences.updates import from_state, to_state
from casehard.distributed.ranks import require_one_process
from casehard.limits import Count, Limited, Weight
from casehard.maths.bilevel import logits_under
from casehard.train.passes import whole_step
from casehard.train.protocol import Setup, StateValue, Step


@dataclass(frozen=True, kw_only=True)
class TokenConstrainedConfig(Limited):
    """Settings of token-wise constrained fine-tuning."""

    first: Weight = 0.5
    """beta of the answer's first token. Source: paper (0.5)."""
    early: Weight = 2.0
    """beta of the tokens 2 .. ``until``. Source: paper (2)."""
    until: Count = 5
    """Last token that ``early`` holds for. Source: paper (5)."""
    rest: Weight = 0.1
    """beta of all later tokens. Source: paper (0.1)."""


class TokenConstrained:
    """Token-wise constrained fine-tuning as a method; it needs no rows but the user's.

    Args:
        config: settings, see :class:`TokenConstrainedConfig`.
    """

    name = "token_constrained"

    def __init__(self, config: TokenConstrainedConfig | None = None) -> None:
        self.config = config or TokenConstrainedConfig()
        self._start: dict[str, torch.Tensor] = {}

    def prepare(self, setup: Setup) -> None:
        """Keep the starting weights (frozen ones are shared, not copied).

        Raises:
            Unsupported: several processes: the starting model runs inside the trained one.
        """
        require_one_process("token_constrained")
        named = dict(setup.model.named_parameters())
        self._trained = [name for name, p in named.items() if p.requires_grad]
        self._start = {name: p.detach().clone() if p.requires_grad else p for name, p in named.items()}

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> torch.Tensor:
        """Return this micro-batch's part of (2)."""
        if self.config.first == self.config.early == self.config.rest == 0:
            return step.loss(model, batch)
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        labels = batch["labels"][:, 1:]
        keep = labels != IGNORE
        start = _chosen(logits_under(model, self._start, inputs), labels)
        r = (_chosen(model(**inputs).logits.float()[:, :-1], labels) - start)[keep]
        beta = self.betas(keep)[keep]
        step.log({"tokens": int(batch["attention_mask"].sum())})
        if len(r):
            step.log({"still_learning": float((2.0 * torch.sigmoid(-beta * r.detach())).mean())})
        return constrained(r, beta).sum() / whole_step(batch, step).tokens

    def betas(self, keep: torch.Tensor) -> torch.Tensor:
        """Return beta_t (B, T) for rows whose answer tokens ``keep`` (B, T) marks; its values elsewhere mean nothing.

        Example: keep [[False, True, True]] -> [[., 0.5, 2.0]].
        """
        t = keep.long().cumsum(1)
        beta = torch.full(keep.shape, self.config.rest, device=keep.device)
        beta[t <= self.config.until] = self.config.early
        beta[t <= 1] = self.config.first
        return beta

    def state(self) -> dict[str, StateValue]:
        """Return the start of the trained weights: whoever resumes may have loaded the checkpoint."""
        return to_state({name: self._start[name] for name in self._trained})

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` returned."""
        self._start |= from_state({name: self._start[name] for name in self._trained}, state)


def constrained(r: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """Return the terms of (2) for log-ratios r and their beta, both (N,), in nats."""
    safe = torch.where(beta == 0, 1.0, beta)
    return torch.where(beta == 0, -r, -2.0 / safe * nn.functional.logsigmoid(safe * r))


def _chosen(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return log p (B, T) of the labels (B, T) from logits (B, T, V); that of token 0 where a label is IGNORE."""
    return logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
