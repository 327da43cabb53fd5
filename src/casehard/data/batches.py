"""Token batches as a pure function of (seed, step, purpose).

Letters: N rows in the set, B rows in a batch, T tokens in the longest row of the batch.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from casehard.errors import DataError
from casehard.seeds import generator

IGNORE = -100  # label of tokens the loss leaves out, as in transformers


class Encoded(NamedTuple):
    """One tokenised row; ``labels`` is IGNORE outside the trained span. Example: ids [5, 9, 2], labels [-100, 9, 2]."""

    input_ids: list[int]
    labels: list[int]


Batch = dict[str, torch.Tensor]


def collate(rows: Sequence[Encoded], pad_id: int) -> Batch:
    """Pad rows on the right to one length.

    Returns:
        ``input_ids`` (B, T), ``attention_mask`` (B, T), ``labels`` (B, T), all int64.
    """
    longest = max(len(row.input_ids) for row in rows)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    labels = torch.full((len(rows), longest), IGNORE, dtype=torch.long)
    for i, row in enumerate(rows):
        n = len(row.input_ids)
        ids[i, :n] = torch.tensor(row.input_ids)
        mask[i, :n] = 1
        labels[i, :n] = torch.tensor(row.labels)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@functools.lru_cache(maxsize=64)
def _order(n: int, seed: int, epoch: int, purpose: str) -> tuple[int, ...]:
    return tuple(torch.randperm(n, generator=generator(seed, epoch, purpose)).tolist())


def indices_at(n: int, size: int, *, seed: int, step: int, purpose: str) -> list[int]:
    """Return the row numbers of batch ``step``: epoch after epoch without replacement, freshly shuffled each epoch.

    A batch may span two epochs, so every row is seen equally often whatever ``size`` is.
    """
    if n <= 0:
        raise DataError(f"no rows to draw a batch from (purpose {purpose!r})")
    return [_order(n, seed, p // n, purpose)[p % n] for p in range(step * size, (step + 1) * size)]


@dataclass(frozen=True)
class EncodedSet:
    """Tokenised rows and the pad token they are collated with."""

    rows: tuple[Encoded, ...]
    pad_id: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """Row as a dict, which is what a ``transformers.Trainer`` data set yields."""
        row = self.rows[index]
        return {"input_ids": row.input_ids, "labels": row.labels}

    def collate(self, rows: Sequence[dict[str, list[int]]]) -> Batch:
        """Collate dict rows; pass as ``data_collator``."""
        return collate([Encoded(r["input_ids"], r["labels"]) for r in rows], self.pad_id)

    def batch_at(self, size: int, *, seed: int, step: int, purpose: str) -> Batch:
        """Return batch number ``step`` of an endless, seeded stream. Source of truth for every second data stream."""
        picked = indices_at(len(self.rows), size, seed=seed, step=step, purpose=purpose)
        return collate([self.rows[i] for i in picked], self.pad_id)

    def stream(self, size: int, *, seed: int, purpose: str) -> Callable[[int], Batch]:
        """Return the function ``step -> batch`` of one endless, seeded stream."""
        return lambda step: self.batch_at(size, seed=seed, step=step, purpose=purpose)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the token ids and labels, in order."""
        text = json.dumps([[r.input_ids, r.labels] for r in self.rows])
        return hashlib.sha256(text.encode()).hexdigest()
