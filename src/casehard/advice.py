"""What to use, given what a provider has: the winners of the measured tables, from ``advice.json``. No torch here.

Entries of a stage stand in the order of preference, by what was measured; the first whose needs are met within the
budget wins. Each carries sentences of the page that holds its numbers (``says``), and a test looks them up there.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from casehard.errors import ConfigError

REAL = "docs/evidence/real.md"
"""Page with what was measured on SmolLM2-135M-Instruct."""


@dataclass(frozen=True)
class Entry:
    """One measured way of doing a stage's work."""

    stage: str
    method: str
    """Name in the catalogue of defences."""
    title: str
    needs: tuple[str, ...]
    """What a provider must have, keys of the stage's ``have``."""
    passes: float
    """Passes over the model's weights, as a ratio to plain training of as many steps."""
    command: str
    """The command to run; words in capitals are the reader's files."""
    why: str
    price: str
    doubt: str
    page: str
    """Page of evidence, relative to the repository."""
    plan: str
    worlds: str
    runs: int
    seeds: str = "0"
    says: tuple[str, ...] = ()
    """Text of the page that the numbers above are taken from."""
    real: str = ""
    """What it did on a real model, one seed, by ``REAL``; empty where it was not tried."""
    real_says: tuple[str, ...] = ()
    """Text of that page that its numbers are taken from."""


@dataclass(frozen=True)
class Stage:
    """Something that a provider does, and what helps with it."""

    name: str
    title: str
    have: dict[str, str]
    """What a provider may have -> what that is."""
    without: str
    """What to do who has none of it."""
    check: str
    """Command that measures the result."""


@dataclass(frozen=True)
class Advice:
    """What wins, and what would win with more."""

    stage: Stage
    winner: Entry | None
    """None: nothing that was measured can be used with what is there."""
    better: tuple[Entry, ...] = ()
    """Entries of higher preference that need something more, or more passes."""
    others: tuple[Entry, ...] = ()
    """Usable ones of lower preference."""


@cache
def table() -> tuple[dict[str, Stage], tuple[Entry, ...]]:
    """Return the stages and the entries, in order of preference within each stage."""
    raw: dict[str, Any] = json.loads(files("casehard").joinpath("advice.json").read_text(encoding="utf-8"))
    stages = {name: Stage(name=name, **values) for name, values in raw["stages"].items()}
    listed: list[dict[str, Any]] = [
        {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
        for entry in raw["entries"]
    ]
    entries = tuple(Entry(**values) for values in listed)
    return stages, entries


def recommend(stage: str, have: Collection[str] = (), *, passes: float | None = None) -> Advice:
    """Return what wins at a stage, by what was measured.

    Args:
        stage: release, tune, service or scraped.
        have: what there is, keys of the stage's ``have`` (``refusals``, ``safe``, ``assets``, ``base`` ...).
        passes: budget, as a ratio to the passes of plain training; None for any.

    Raises:
        ConfigError: no such stage, something no stage asks for, or a budget that is not positive.
    """
    stages, entries = table()
    if not isinstance(stage, str) or stage not in stages:
        raise ConfigError(f"no stage {stage!r}", hint=_near(stage, list(stages), "stages"))
    found = stages[stage]
    if isinstance(have, str):
        have = (have,)
    for thing in have:
        if thing not in found.have:
            raise ConfigError(
                f"stage {stage} does not ask for {thing!r}", hint=_near(thing, list(found.have), "it asks for")
            )
    if passes is not None and (isinstance(passes, bool) or not isinstance(passes, int | float) or not passes > 0):
        raise ConfigError(f"passes: {passes} is no budget", hint="a ratio to plain training: 2 is twice its passes")
    mine = [e for e in entries if e.stage == stage]
    usable = [e for e in mine if set(e.needs) <= set(have) and (passes is None or e.passes <= passes)]
    winner = usable[0] if usable else None
    ahead = mine if winner is None else mine[: mine.index(winner)]
    return Advice(found, winner, tuple(e for e in ahead if e not in usable), tuple(usable[1:]))


def _near(given: str, known: list[str], what: str) -> str:
    near = difflib.get_close_matches(str(given), known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"{what}: {', '.join(known)}"
