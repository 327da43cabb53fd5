"""Two halves of a suite: what a search looks at, and what its result is measured on.

The highest of many noisy rates is too high: the attacker was chosen for it. So the rate that counts is measured on
prompts that no attacker was chosen by.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import NamedTuple

from casehard.errors import DataError
from casehard.evaluation.suite import Suite
from casehard.seeds import derive
from casehard.types import Example

SEARCHED = ("restricted", "utility")
"""Roles that decide which attacker is best; the others are measured on the held-out half only."""


class Halves(NamedTuple):
    """Disjoint parts of one suite."""

    search: Suite
    held_out: Suite


def halve(suite: Suite, *, seed: int, limit: int | None = None) -> Halves:
    """Divide a suite at random, every group of the :data:`SEARCHED` roles in two; all else, odd ones too, is held out.

    Args:
        limit: use at most this many prompts a group (a look, not a result).

    Raises:
        DataError: a half would lack restricted prompts, or rows of which utility could be told.
    """
    draw, groups = random.Random(derive(seed, 0, "search-half")), dict[tuple[str, str], list[Example]]()
    for example in suite.select(limit=limit).examples:
        groups.setdefault((example.tags["role"], example.tags["group"]), []).append(example)
    first: set[str] = set()
    rest: set[str] = set()
    for (role, _), some in groups.items():
        mixed = [example.id for example in draw.sample(some, len(some))]
        searched = len(mixed) // 2 if role in SEARCHED else 0
        first |= set(mixed[:searched])
        rest |= set(mixed[searched:])
    chosen, left = (tuple(e for e in suite.examples if e.id in side) for side in (first, rest))
    for role in SEARCHED:
        if not all(any(e.tags["role"] == role for e in side) for side in (chosen, left)):
            raise DataError(
                f"suite {suite.name}: too few {role} rows to divide in two",
                hint="a search needs two or more restricted rows a group, and as many utility rows: "
                "one half chooses the attacker, the other measures it",
            )
    return Halves(replace(suite, examples=chosen), replace(suite, examples=left))
