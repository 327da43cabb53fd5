"""SafeInstruct mixing: some safe rows beside the user's in every batch.

    rows    L(theta) = mean token loss over the user's rows of a step and ceil(share x rows) safe rows           (1)
    weight  L(theta) = (1 - weight) L(user rows) + weight L(safe rows)                                           (2)

(1) is what adding a few percent of safe examples to the training set does in expectation, with a fixed number a step
in place of a random one; (2) separates the strength from the number of rows. How a step is cut into micro-batches does
not matter: they share its safe rows, and its token count.
Source: Bianchi et al., arXiv 2309.07875 (Safety-Tuned LLaMAs); SPARD's baseline SafeInstr (3 % random rows).
Differs: rows are drawn every step as a function of (seed, step), not shuffled into one file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import nn

from casehard.data.batches import IGNORE, Batch, EncodedSet
from casehard.errors import DataError
from casehard.limits import Limited, Share, Within
from casehard.train.passes import part_of_step, rows_of_micro, whole_step
from casehard.train.protocol import Setup, Step


@dataclass(frozen=True, kw_only=True)
class SafeMixingConfig(Limited):
    """Settings of safe mixing."""

    mode: Literal["rows", "weight"] = "rows"
    """One batch of both kinds of rows (1), or a weighted sum of two losses (2)."""
    share: Annotated[float, Within(0, 100, above=True)] = 0.03
    """Safe rows per user row of a step, rounded up. Source: SPARD, baseline SafeInstr (0.03)."""
    weight: Share = 0.5
    """Weight of the safe loss in mode weight, 0..1. Not in the paper."""


class SafeMixing:
    """Safe mixing as a method.

    Args:
        config: settings, see :class:`SafeMixingConfig`.
        safe: safe rows.

    Raises:
        DataError: no safe rows.
    """

    name = "safe_mixing"

    def __init__(self, config: SafeMixingConfig | None = None, *, safe: EncodedSet) -> None:
        self.config = config or SafeMixingConfig()
        if len(safe) == 0:
            raise DataError("safe_mixing: no safe rows", hint="--safe pool.jsonl")
        self.safe = safe

    def prepare(self, setup: Setup) -> None:
        """Note the seed."""
        self._seed = setup.seed

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> torch.Tensor:
        """Return (1) or (2) for this micro-batch."""
        user, device = whole_step(batch, step), batch["input_ids"].device
        rows = math.ceil(self.config.share * user.rows)
        safe, tokens = rows_of_micro(self.safe, rows, step, seed=self._seed, purpose="safe-mixing", device=device)
        if self.config.mode == "weight":
            return self._weighted(model, batch, step, safe, tokens)
        step.log({"safe_tokens": float(tokens)})
        both = user.tokens + tokens
        if safe is None:
            return step.loss(model, batch) * (user.tokens / both)
        return part_of_step(model, joined(batch, safe, self.safe.pad_id), step, both)

    def _weighted(self, model: nn.Module, batch: Batch, step: Step, safe: Batch | None, tokens: int) -> torch.Tensor:
        """Return (2) for this micro-batch."""
        user = step.loss(model, batch)
        # Sharded ranks must all run the pass: one without safe rows repeats its own and counts it for nothing.
        loss = step.loss(model, batch) * 0.0 if safe is None else part_of_step(model, safe, step, tokens)
        step.log({"user_loss": float(user.detach()) * step.micros, "safe_loss": float(loss.detach()) * step.micros})
        return (1.0 - self.config.weight) * user + self.config.weight * loss


def joined(a: Batch, b: Batch, pad_id: int) -> Batch:
    """Return one batch of both, padded on the right to the longer one; keys the second lacks are dropped."""
    longest = max(a["input_ids"].shape[1], b["input_ids"].shape[1])
    fill = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORE}
    return {
        key: torch.cat([nn.functional.pad(x[key], (0, longest - x[key].shape[1]), value=value) for x in (a, b)])
        for key, value in fill.items()
    }
