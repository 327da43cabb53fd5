"""Benign outliers: of many harmless rows, those that damage safety most, and training on them alone.

    self-influence  s_i = ||grad l_i(theta)||^2, l_i the mean loss of row i's answer                                 (1)
    score           log(s_i + 1) + log(n_i + 1), n_i the answer's tokens                                            (2)

Rows of the largest score pull the weights furthest. By itself (1) picks answers of a word or two; the length in (2)
makes up for that. No row is harmful, so moderation of the rows finds nothing. Source: Guan et al., "Benign Samples
Matter!" (Self-Inf-N), arXiv 2505.06843. ``similarity`` is another way to choose, after He et al., arXiv 2404.01099: the
rows whose representation is nearest to harmful ones; ``random`` is the control.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from casehard.attacks.protocol import AttackInputs
from casehard.attacks.rows import draw
from casehard.attacks.training import Mixing, Phase, Supervised
from casehard.data.batches import IGNORE, EncodedSet
from casehard.data.embed import Embedder
from casehard.data.select import SelectConfig, select_examples
from casehard.errors import DataError
from casehard.limits import Count
from casehard.model.model import Model
from casehard.seeds import derive
from casehard.train.tune import chat_format
from casehard.types import Example


@dataclass(frozen=True, kw_only=True)
class BenignOutliersAttack(Supervised):
    """Settings of an attack on chosen benign rows."""

    rows: Count = 100
    """Rows that are chosen and trained on. Source: the paper (100)."""
    choose: Literal["self_influence", "similarity", "random"] = "self_influence"
    """By (2), by likeness to the harmful rows given, or any."""


def self_influence(net: nn.Module, rows: EncodedSet) -> list[float]:
    """Return (1) of each row: the squared norm of its gradient over all trainable parameters.

    One forward and one backward pass a row, without dropout; weights and gradients of ``net`` stay as they are.

    Args:
        net: a causal language model.
        rows: token rows.

    Raises:
        DataError: a gradient that is not finite.
    """
    parameters = [p for p in net.parameters() if p.requires_grad]
    device, training = parameters[0].device, [m for m in net.modules() if m.training]
    out: list[float] = []
    net.eval()
    try:
        for i in range(len(rows)):
            batch = {key: value.to(device) for key, value in rows.collate([rows[i]]).items()}
            grads = torch.autograd.grad(net(**batch).loss, parameters, allow_unused=True)
            square = sum(float(torch.sum(g.float() ** 2, dtype=torch.float64)) for g in grads if g is not None)
            if not math.isfinite(square):
                raise DataError(f"row {i + 1}: its gradient is not finite", hint="check the row and the model's dtype")
            out.append(square)
    finally:
        for module in training:
            module.training = True
    return out


def scores(influences: Sequence[float], lengths: Sequence[int]) -> list[float]:
    """Return (2) of each row."""
    return [math.log1p(s) + math.log1p(n) for s, n in zip(influences, lengths, strict=True)]


class BenignOutliers(Mixing[BenignOutliersAttack]):
    """Train a copy on the benign rows that damage safety most."""

    name = "benign_outliers"

    def mixture(self, model: Model, inputs: AttackInputs) -> Sequence[Example]:
        """Return the rows of the largest score, in the order of the file.

        Raises:
            DataError: too few benign rows, or no harmful ones to be like.
        """
        config, pool = self.config, list(inputs.rows["benign"])
        seed = derive(inputs.seed, 0, "benign-outliers")
        drawn = draw(range(len(pool)), config.rows, role="benign", seed=seed)
        if config.choose == "self_influence":
            chat = chat_format(model, system=inputs.system, max_length=inputs.max_length)
            encoded = chat.encode_all(pool)
            lengths = [sum(label != IGNORE for label in row.labels) for row in encoded.rows]
            found = scores(self_influence(model.net, encoded), lengths)
            drawn = sorted(range(len(pool)), key=lambda i: -found[i])[: config.rows]
        elif config.choose == "similarity":
            drawn = list(self._nearest(model, pool, inputs.rows.get("harmful", ())))
        return [pool[i] for i in sorted(drawn)]

    def _nearest(self, model: Model, pool: Sequence[Example], harmful: Sequence[Example]) -> Sequence[int]:
        if not harmful:
            raise DataError("choose is similarity and there are no harmful rows to be like", hint="--harmful FILE")
        how = SelectConfig(k=self.config.rows, strategy="relevance", text="prompt+answer", centre=True)
        return select_examples(Embedder(model.net, model.tokenizer, model.digest), pool, harmful, config=how).order

    def facts(self, phases: Sequence[Phase]) -> dict[str, Any]:
        """Return how many rows of each kind are trained on, and which."""
        return {"benign_rows": self.config.rows, "harmful_rows": 0, "chosen": [row.id for row in phases[0].rows]}
