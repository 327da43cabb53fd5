"""What a summary of backdoor runs holds, as it is read back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from casehard.benchmark.shapes import Some, Whole

BACKDOOR_STATUS = Literal[
    "meets", "lowers", "no_difference", "disagree", "worse", "collapsed", "shallow", "too_weak", "not_measured"
]


@dataclass(frozen=True)
class BackdoorJudged:
    """What was found of one backdoor."""

    attack: str
    text: str


@dataclass(frozen=True)
class BackdoorVerdict:
    """The verdict on one family, backdoor by backdoor."""

    family: str
    status: BACKDOOR_STATUS
    sentence: str
    details: list[str]
    backdoors: list[BackdoorJudged]


@dataclass(frozen=True)
class BackdoorPooled:
    """A rate over runs."""

    defence: str
    attack: str
    metric: str
    k: int
    n: int
    rate: float
    low: float
    high: float
    run_low: float
    run_high: float
    rates: Some[float]


@dataclass(frozen=True)
class BackdoorDifference:
    """A paired difference."""

    defence: str
    against: str
    attack: str
    metric: str
    difference: float
    low: float
    high: float
    no_difference: bool


@dataclass(frozen=True)
class Canaries:
    """What became of the defender's own triggers."""

    defence: str
    attack: str
    looks: dict[str, dict[str, tuple[int, int]]]
    steps: list[int]
    verdicts: list[str]


@dataclass(frozen=True)
class BackdoorCost:
    """What a row spent, over the undefended training."""

    defence: str
    tokens_ratio: float | None
    passes_ratio: float | None
    seconds_ratio: float | None = None


@dataclass(frozen=True)
class BackdoorTable:
    """One family of bases."""

    family: str
    pooled: list[BackdoorPooled]
    differences: list[BackdoorDifference]
    canaries: list[Canaries]
    canary_rank_correlation: float | None
    costs: list[BackdoorCost]


@dataclass(frozen=True, kw_only=True)
class BackdoorSummary(Whole):
    """summary.json of a benchmark of the stage backdoor."""

    verdicts: Some[BackdoorVerdict]
    backdoors: list[BackdoorTable]
