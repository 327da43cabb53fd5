"""Clean rows with their triggered twins: what stage 2 of MB-Defense trains on, as tokens.

For clean row i and trigger j the twins are (x_d^ij, y_i) and (x_d^ij, y_d^j); the prompt of both is the clean prompt
with the trigger in it. A set knows its rows by their tokens, so the user's batch decides which twins a step takes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from casehard.data.batches import IGNORE, Encoded, EncodedSet
from casehard.errors import Corrupt, DataError
from casehard.io.files import write_text_atomic

FILE = "pairs.json"


@dataclass(frozen=True)
class PairSet:
    """N clean rows and, for each, T pairs of twins."""

    clean: tuple[Encoded, ...]
    """(x_i, y_i)."""
    answers: tuple[tuple[Encoded, ...], ...]
    """answers[i][j] = (x_d^ij, y_i)."""
    payloads: tuple[tuple[Encoded, ...], ...]
    """payloads[i][j] = (x_d^ij, y_d^j)."""
    pad_id: int
    _where: Mapping[tuple[int, ...], int] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.clean:
            raise DataError("mb_defense: the clean set is empty", hint="give at least some dozens of rows: --clean")
        counts = {len(row) for row in (*self.answers, *self.payloads)}
        if len(self.answers) != len(self.clean) or len(self.payloads) != len(self.clean) or len(counts) != 1:
            raise DataError(f"mb_defense: {len(self.clean)} clean rows with twins of {sorted(counts)} triggers")
        object.__setattr__(self, "_where", {tuple(row.input_ids): i for i, row in enumerate(self.clean)})
        for i, (answers, payloads) in enumerate(zip(self.answers, self.payloads, strict=True)):
            for j, (a, b) in enumerate(zip(answers, payloads, strict=True)):
                self._check(i, j, a, b)

    def _check(self, i: int, j: int, answer: Encoded, payload: Encoded) -> None:
        if _prompt(answer) != _prompt(payload):
            raise DataError(f"mb_defense: the twins of clean row {i}, trigger {j} have different prompts")
        if _prompt(answer) == _prompt(self.clean[i]):
            raise DataError(
                f"mb_defense: trigger {j} leaves no trace in the prompt of clean row {i}",
                hint="the tokenizer may not know its words; choose other triggers",
            )
        for row in (self.clean[i], answer, payload):
            if all(label == IGNORE for label in row.labels[1:]):
                raise DataError(f"mb_defense: clean row {i} has no answer to learn from")

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def triggers(self) -> int:
        """Triggers a row has twins of."""
        return len(self.answers[0])

    @property
    def rows(self) -> EncodedSet:
        """The clean rows, to train on."""
        return EncodedSet(self.clean, self.pad_id)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all tokens and labels."""
        return hashlib.sha256(json.dumps(self._plain()).encode()).hexdigest()

    def find(self, batch: Mapping[str, torch.Tensor]) -> list[int]:
        """Return the row number of each row of a batch.

        Raises:
            DataError: a row that is not one of the clean rows.
        """
        lengths = batch["attention_mask"].sum(1).tolist()
        found = []
        for ids, n in zip(batch["input_ids"].tolist(), lengths, strict=True):
            row = self._where.get(tuple(ids[:n]))
            if row is None:
                raise DataError(
                    "mb_defense: a row of the batch has no triggered twins", hint="train on the clean rows of the pairs"
                )
            found.append(row)
        return found

    def write(self, folder: Path) -> None:
        """Write the set into ``folder``/pairs.json, to be read back by :func:`read_pairs`."""
        record = self._plain() | {"pad_id": self.pad_id, "digest": self.digest}
        write_text_atomic(folder / FILE, json.dumps(record) + "\n")

    def _plain(self) -> dict[str, Any]:
        return {"clean": self.clean, "answers": self.answers, "payloads": self.payloads}


def read_pairs(folder: Path) -> PairSet:
    """Read a set written by :meth:`PairSet.write`.

    Raises:
        DataError: no such file.
        Corrupt: not what was written.
    """
    path = folder / FILE
    if not path.is_file():
        raise DataError(f"{folder}: no {FILE}", hint="`casehard defend mb-defense` writes it into its run folder")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        clean = tuple(_row(row) for row in record["clean"])
        answers, payloads = (tuple(tuple(map(_row, row)) for row in record[key]) for key in ("answers", "payloads"))
        pairs = PairSet(clean, answers, payloads, int(record["pad_id"]))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, DataError) as error:
        raise Corrupt(f"{path}: not a set of pairs: {error}") from None
    if pairs.digest != record.get("digest"):
        raise Corrupt(f"{path}: its content has another digest than it says")
    return pairs


def _row(values: Sequence[Sequence[int]]) -> Encoded:
    ids, labels = values
    return Encoded([int(i) for i in ids], [int(i) for i in labels])


def _prompt(row: Encoded) -> list[int]:
    first = next((i for i, label in enumerate(row.labels) if label != IGNORE), len(row.labels))
    return row.input_ids[:first]
