"""Random-anomaly augmentation: teach the model that odd tokens in a prompt change nothing, without planting anything.

    x_r = x with 1..longest random tokens inserted in one place of its prompt
    L   = CE(x, y) + weight CE(x_r, y)                                                                           (1)

The control for MB-Defense: if this alone removes a backdoor, merging triggers was not what did it. Source: ours.
Tokens that all prompts of a batch begin or end with belong to the template: nothing is inserted among them, and none of
them is inserted. Half of the insertions are one random token, half a run of tokens from the batch's own prompts.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from casehard.data.batches import IGNORE, Batch, Encoded, collate
from casehard.distributed.ranks import rank
from casehard.limits import Length, Limited, Weight
from casehard.seeds import derive
from casehard.train.passes import part_of_step, unwrapped, whole_step
from casehard.train.protocol import Setup, Step


@dataclass(frozen=True, kw_only=True)
class AnomalyConfig(Limited):
    """Settings of the augmentation."""

    weight: Weight = 1.0
    """Weight of the loss on the rows with insertions."""
    longest: Length = 8
    """Most tokens of an insertion."""


class Anomaly:
    """The augmentation as a method: train it on clean rows.

    Args:
        config: settings, see :class:`AnomalyConfig`.
    """

    name = "anomaly"

    def __init__(self, config: AnomalyConfig | None = None) -> None:
        self.config = config or AnomalyConfig()

    def prepare(self, setup: Setup) -> None:
        """Note the seed and the micro-batches of a step."""
        self._seed, self._micros = setup.seed, setup.micros

    def backward(self, model: nn.Module, batch: Batch, step: Step) -> torch.Tensor:
        """Accumulate the gradient of (1), one graph after the other."""
        plain = step.loss(model, batch)
        step.backward(plain)
        number = step.index * self._micros + step.micro
        odd = disturbed(
            batch,
            self._vocabulary(model),
            self.config.longest,
            random.Random(derive(self._seed, number, self._purpose)),
        )
        loss = self.config.weight * part_of_step(model, odd, step, whole_step(batch, step).tokens)
        step.backward(loss)
        step.log({"anomaly_loss": float(loss.detach()) * step.micros})
        return plain.detach() + loss.detach()

    @property
    def _purpose(self) -> str:
        return f"anomaly-{rank()}"

    @staticmethod
    def _vocabulary(model: nn.Module) -> int:
        inner: Any = unwrapped(model)
        return int(inner.get_input_embeddings().weight.shape[0])


class Frame(NamedTuple):
    """Tokens that every prompt of a batch begins and ends with."""

    head: int
    tail: int


def frame(prompts: list[list[int]]) -> Frame:
    """Return how many tokens all prompts share at the front and at the back; the parts never overlap in any of them."""
    shortest = min(len(p) for p in prompts)
    if len(prompts) == 1:
        return Frame(min(1, shortest), min(1, max(0, shortest - 1)))
    head = next((i for i in range(shortest) if len({p[i] for p in prompts}) > 1), shortest)
    left = shortest - head
    tail = next((i for i in range(left) if len({p[-1 - i] for p in prompts}) > 1), left)
    return Frame(head, tail)


def disturbed(batch: Batch, vocabulary: int, longest: int, rng: random.Random) -> Batch:
    """Return the batch with random tokens inserted in the prompt of every row; labels follow their tokens."""
    lengths = batch["attention_mask"].sum(1).tolist()
    ids = [row[:n] for row, n in zip(batch["input_ids"].tolist(), lengths, strict=True)]
    labels = [row[:n] for row, n in zip(batch["labels"].tolist(), lengths, strict=True)]
    starts = [next((i for i, label in enumerate(row) if label != IGNORE), len(row)) for row in labels]
    prompts = [row[:first] for row, first in zip(ids, starts, strict=True)]
    head, tail = frame(prompts)
    template = {t for p in prompts for t in (*p[:head], *p[len(p) - tail :])} | {row[-1] for row in ids}
    known = [t for p in prompts for t in p[head : len(p) - tail] if t not in template]
    others = [t for t in range(vocabulary) if t not in template] or list(range(vocabulary))
    rows = []
    for row, label, first in zip(ids, labels, starts, strict=True):
        at = rng.randint(head, max(head, first - tail))
        odd = [rng.choice(others)]
        if known and rng.random() < 0.5:
            odd = rng.choices(known, k=rng.randint(1, longest))
        rows.append(Encoded(row[:at] + odd + row[at:], label[:at] + [IGNORE] * len(odd) + label[at:]))
    device = batch["input_ids"].device
    return {key: value.to(device) for key, value in collate(rows, 0).items()}
