"""Poisoned training mixes with exact counts, and the check that training never saw an evaluation prompt."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

from casehard.errors import ConfigError, DataError
from casehard.seeds import derive
from casehard.types import Example

T = TypeVar("T")


class Counts(NamedTuple):
    """Rows of each kind in a mix; example: share 0.1 of 1000 -> (100, 900)."""

    harmful: int
    benign: int


def counts(*, share: float, n: int) -> Counts:
    """Return how many rows of each kind a mix of ``n`` rows with harmful share ``share`` holds (half rounds up).

    Raises:
        ConfigError: ``share`` outside [0, 1], ``n`` < 1, or a share that is neither 0 nor 1 but rounds to it.
    """
    if not (math.isfinite(share) and 0 <= share <= 1):
        raise ConfigError(f"share must lie in [0, 1], got {share}")
    if n < 1:
        raise ConfigError(f"a mix needs at least one row, got n={n}")
    harmful = math.floor(share * n + 0.5)
    if 0 < share < 1 and harmful in (0, n):
        raise ConfigError(
            f"share {share} of {n} rows rounds to {harmful} harmful rows",
            hint=f"use at least {math.ceil(0.5 / max(min(share, 1 - share), 1e-9))} rows, or share 0 or 1",
        )
    return Counts(harmful, n - harmful)


def _draw(rows: Sequence[T], n: int, *, kind: str, repeat: bool, rng: random.Random) -> list[T]:
    """Draw ``n`` rows; with ``repeat`` whole passes and a rest, so that counts per row differ by at most one."""
    if n > 0 and not rows:
        raise DataError(
            f"the mix needs {n} {kind} rows and there are none",
            hint=f"give {kind} rows, or a share of {0 if kind == 'harmful' else 1}",
        )
    if n > len(rows) and not repeat:
        raise DataError(
            f"the mix needs {n} {kind} rows and there are only {len(rows)}",
            hint="give more rows, or mix fewer: `attack finetune --set config.rows=N`, settings: {rows: N} in a plan",
        )
    drawn: list[T] = []
    while len(drawn) < n:
        drawn += rng.sample(rows, min(n - len(drawn), len(rows)))
    return drawn


def poison(
    harmful: Sequence[Example],
    benign: Sequence[Example],
    *,
    share: float,
    n: int,
    seed: int,
    oversample: bool = False,
) -> list[Example]:
    """Mix ``n`` rows of which exactly :func:`counts` are harmful, in seeded random order.

    Args:
        harmful: rows the attacker wants learnt.
        benign: rows they are hidden among.
        share: harmful share p in [0, 1].
        n: rows in the mix.
        seed: decides which rows and in which order.
        oversample: allow rows to occur several times when a side has too few.

    Raises:
        ConfigError: see :func:`counts`.
        DataError: too few rows on one side and ``oversample`` is off.
    """
    wanted = counts(share=share, n=n)
    rng = random.Random(derive(seed, 0, "poison"))
    mix = _draw(harmful, wanted.harmful, kind="harmful", repeat=oversample, rng=rng)
    mix += _draw(benign, wanted.benign, kind="benign", repeat=oversample, rng=rng)
    rng.shuffle(mix)
    return mix


def normalise(text: str) -> str:
    """Return lower-case letters and digits only; text without any keeps its other characters, blanks removed."""
    folded = unicodedata.normalize("NFKC", text).lower()
    kept = "".join(c for c in folded if c.isalnum())
    return kept or "".join(folded.split())


def content_hash(example: Example) -> str:
    """Return the SHA-256 (hex) of the normalised user turns: equal for prompts that differ in case or punctuation."""
    asked = "\n".join(normalise(m.content) for m in example.messages if m.role == "user")
    return hashlib.sha256(asked.encode()).hexdigest()


def trained_hashes(example: Example) -> list[str]:
    """Return the hashes a row's prompt is known by: of all its user turns, and of the last, whose answer it trains."""
    last = [m for m in example.messages if m.role == "user"][-1:]
    return [content_hash(example), content_hash(replace(example, messages=tuple(last)))]


def mark(example: Example) -> str:
    """Return the first 64 bits of :func:`content_hash` in hex: among a million prompts two collide at odds of 3e-8."""
    return content_hash(example)[:16]


def marks(*sets: Sequence[Example]) -> set[str]:
    """Return the marks of all prompts, as kept in the provenance of what was trained on them; see `trained_hashes`."""
    return {h[:16] for rows in sets for example in rows for h in trained_hashes(example)}


def _name(example: Example, position: int) -> str:
    return example.id or f"row {position + 1}"


def check_disjoint(train: Mapping[str, Sequence[Example]], evaluation: Mapping[str, Sequence[Example]]) -> None:
    """Check that no evaluation prompt, compared by :func:`content_hash`, occurs in any training set.

    A prompt also occurs where it is the last user turn of a longer conversation: its answer is trained there too.

    Args:
        train: training sets by name.
        evaluation: evaluation sets by name.

    Raises:
        DataError: names every overlapping pair of sets, how many prompts they share, and the first few rows.
    """
    seen = {
        name: {h: _name(e, i) for i, e in reversed(list(enumerate(rows))) for h in trained_hashes(e)}
        for name, rows in train.items()
    }
    problems: list[str] = []
    for (left, hashes), (right, rows) in itertools.product(seen.items(), evaluation.items()):
        shared = [(hashes[h], _name(e, i)) for i, e in enumerate(rows) if (h := content_hash(e)) in hashes]
        if shared:
            first = ", ".join(f"{a} = {b}" for a, b in shared[:3])
            problems.append(
                f"{len(shared)} of {len(rows)} prompts of {right!r} also occur in {left!r} (first: {first})"
            )
    if problems:
        raise DataError(
            "training and evaluation overlap: " + "; ".join(problems),
            hint="remove these rows from the training set; a score on them would measure memory",
        )
