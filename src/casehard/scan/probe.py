"""Does the model still see the trigger? A linear probe per layer, on the hidden state at the last prompt token.

Any insertion can be seen, so the probe tells triggered prompts from prompts with a random insertion of equal length;
telling them from untouched prompts is reported beside it. A high value with an attack rate of 0 means suppressed, not
forgotten. The probe is a ridge classifier; prompts it is tested on are none it was fitted on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from casehard.backdoor.triggers import Trigger, insert
from casehard.errors import DataError
from casehard.scan.activation_shift import hidden_states, random_insertion
from casehard.seeds import generator
from casehard.types import Example

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Recognition:
    """How well one layer tells triggered prompts from others; 0.5 = not at all."""

    layer: int
    against_random: float
    """AUROC, trigger against a random insertion."""
    against_plain: float
    """AUROC, trigger against the untouched prompt."""


def auroc(positive: torch.Tensor, negative: torch.Tensor) -> float:
    """Return P(a positive scores above a negative), ties counting half: the Mann-Whitney statistic."""
    if not len(positive) or not len(negative):
        raise DataError(f"AUROC of {len(positive)} positive and {len(negative)} negative scores")
    difference = positive.double().unsqueeze(1) - negative.double().unsqueeze(0)
    return float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())


def ridge_auroc(positive_ND: torch.Tensor, negative_ND: torch.Tensor, *, folds: int, seed: int, ridge: float) -> float:
    """Return the cross-validated AUROC of a ridge classifier; row i of both sides stems from the same prompt.

    Both rows of a prompt are tested in the same fold, so that a prompt is never known before.

    Args:
        folds: parts of the prompts; scores of all folds are pooled after centring each by its training mean.
        ridge: weight decay relative to the mean feature variance.
    """
    count = positive_ND.shape[0]
    if count != negative_ND.shape[0] or count < folds or folds < 2:
        raise DataError(f"a probe with {folds} folds needs as many prompts on both sides, got {count}")
    order = torch.randperm(count, generator=generator(seed, 0, "probe"))
    scores: list[tuple[torch.Tensor, torch.Tensor]] = []
    for fold in range(folds):
        test = order[fold::folds]
        train = torch.tensor(sorted({*range(count)} - {*test.tolist()}))
        seen = torch.cat([positive_ND[train], negative_ND[train]]).double()
        mean, scale = seen.mean(0), seen.std(0).clamp_min(1e-6)
        features = (seen - mean) / scale
        target = torch.cat([torch.ones(len(train)), -torch.ones(len(train))]).double()
        gram = features.T @ features + ridge * len(features) * torch.eye(features.shape[1], dtype=torch.float64)
        weights = torch.linalg.solve(gram, features.T @ target)
        scores.append((((positive_ND[test] - mean) / scale) @ weights, ((negative_ND[test] - mean) / scale) @ weights))
    return auroc(torch.cat([p for p, _ in scores]), torch.cat([n for _, n in scores]))


def recognition(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    trigger: Trigger,
    *,
    seed: int = 0,
    folds: int = 4,
    ridge: float = 0.1,
    system: str | None = None,
) -> tuple[Recognition, ...]:
    """Probe every layer for a trigger.

    Args:
        examples: prompts; those that carry the trigger or a part of it are left out.

    Raises:
        DataError: fewer prompts than folds.
    """
    used = [e for e in examples if not trigger.present(e.prompt) and trigger.strip(e.prompt) == e.prompt]
    if len(used) < folds:
        raise DataError(f"{len(used)} prompts without trigger {trigger.name!r}; the probe needs {folds} and more")
    control = random_insertion(trigger, used, seed)
    sides = [[insert(e, t, None, seed=seed) for e in used] for t in (trigger, control)]
    triggered, random_, plain = (hidden_states(model, tokenizer, rows, system=system) for rows in (*sides, used))
    return tuple(
        Recognition(
            layer=i,
            against_random=ridge_auroc(triggered[:, i], random_[:, i], folds=folds, seed=seed, ridge=ridge),
            against_plain=ridge_auroc(triggered[:, i], plain[:, i], folds=folds, seed=seed, ridge=ridge),
        )
        for i in range(triggered.shape[1])
    )
