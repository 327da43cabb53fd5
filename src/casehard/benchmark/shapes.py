"""Shapes of what a benchmark and single verbs write and a report reads back; see :mod:`casehard.io.stored`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

T = TypeVar("T")
Some = Annotated[list[T], Field(min_length=1)]
STATUS = Literal[
    "holds",
    "delays",
    "meets",
    "lowers",
    "no_difference",
    "disagree",
    "worse",
    "collapsed",
    "shallow",
    "too_weak",
    "not_measured",
]


@dataclass(frozen=True)
class Begun:
    """What is read of any run.json, however far its run has come."""

    kind: str
    status: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Code:
    """What wrote a result."""

    version: str
    commit: str | None = None
    dirty: bool | None = None


@dataclass(frozen=True)
class Hardware:
    """What it was made on."""

    processor: str
    cores: int | None
    memory_bytes: int | None = None
    gpus: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Finished(Begun):
    """What is read of the run.json of a run that came to its end."""

    config: dict[str, Any]
    config_digest: str
    seeds: list[int]
    parents: dict[str, str]
    data: dict[str, str]
    code: Code
    packages: dict[str, str]
    hardware: Hardware
    files: dict[str, str] = field(default_factory=dict)
    nodes: dict[str, int] | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Event:
    """What is read of a line of events.jsonl: its name, and what methods log about their steps (bench.records.told)."""

    event: str
    trigger_rate: float = 0.0
    violation: float = 0.0
    alpha_share: float = 0.0
    step_ratio: float = 0.0
    step_cosine: float = 0.0
    safe_loss: float = 0.0


@dataclass(frozen=True)
class Row:
    """One prompt of an evaluation or attack."""

    id: str
    role: str
    label: str
    correct: bool | None
    prompt: str | None
    slots_right: float | None = None
    harmful: bool | None = None
    nll: float | None = None
    ended: bool | None = None
    step: int = 0


@dataclass(frozen=True)
class CellRow:
    """One prompt of a benchmark, with the cell it belongs to, as transcripts show it."""

    base: str
    defence: str
    attack: str
    seed: int
    step: int
    id: str
    role: str
    prompt: str
    response: str
    label: str


@dataclass(frozen=True)
class Spent:
    """What a training spent."""

    steps: int | None = None
    passes: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Made:
    """A checkpoint that a run wrote."""

    digest: str = ""


@dataclass(frozen=True)
class Said:
    """Of a record of a single verb, whose model it is about."""

    defence: str | None = None


@dataclass(frozen=True)
class VerbSummary:
    """summary.json of defend, attack and evaluate."""

    records: list[Said] = field(default_factory=list)
    checkpoint: Made | None = None
    cost: Spent | None = None


@dataclass(frozen=True)
class NodeSummary:
    """summary.json of a node of a benchmark."""

    node: str
    path: str
    digest: str
    cost: Spent
    workers: int = 1
    rows_sha256: str | None = None
    rows_seen_in_training: int | None = None
    attacker_rows: int | None = None
    flops: int | None = None
    telemetry: dict[str, float] | None = None
    selection: dict[str, Any] | None = None
    mb: dict[str, Any] | None = None
    lm_eval: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Verdict:
    """The verdict on one family."""

    family: str
    status: STATUS
    sentence: str
    details: list[str]


@dataclass(frozen=True)
class Record:
    """A rate of one run."""

    defence: str
    attack: str
    steps: int
    metric: str
    k: int | None
    n: int
    rate: float
    low: float
    high: float
    seed: int
    base: str
    family: str
    unreliable: str | None = None


@dataclass(frozen=True)
class Pooled:
    """A rate over runs."""

    family: str
    defence: str
    attack: str
    steps: int
    metric: str
    k: int | None
    n: int
    rate: float
    low: float
    high: float
    rates: Some[float]
    shared: bool
    unreliable: str | None = None


@dataclass(frozen=True)
class Cost:
    """What a defence spent, over the reference."""

    defence: str
    family: str
    passes_ratio: float | None
    ratio_to_sft: float | None = None
    workers: int | None = None


@dataclass(frozen=True)
class Spending:
    """What one attack took of the attacker."""

    family: str
    defence: str
    attack: str
    seed: int
    steps: int | None = None
    harmful_rows: int | None = None
    attacker_rows: int | None = None
    flops: int | None = None


@dataclass(frozen=True)
class Broken:
    """When one run broke."""

    step: int | None


@dataclass(frozen=True)
class Break:
    """When the runs of a defence broke."""

    family: str
    defence: str
    attack: str
    metric: str
    runs: Some[Broken]
    last: int
    text: str


@dataclass(frozen=True)
class Difference:
    """A paired difference."""

    family: str
    defence: str
    against: str
    attack: str
    metric: str
    step: int | None
    difference: float
    low: float
    high: float
    per_seed: list[float]
    text: str


@dataclass(frozen=True)
class End:
    """A defence at the end of all attacks, by one metric."""

    family: str
    defence: str
    metric: str
    attacks: dict[str, float]
    mean: float
    low: float
    high: float
    runs: Some[float]
    difference: float = 0.0
    difference_low: float = 0.0
    difference_high: float = 0.0
    compared: int = 0


@dataclass(frozen=True)
class Told:
    """What a method logged about its steps."""

    defence: str
    means: dict[str, float]


@dataclass(frozen=True)
class Public:
    """A number of a public benchmark, before any attack."""

    family: str
    defence: str
    metric: str
    n: int
    rates: Some[float]
    low: float
    high: float


@dataclass(frozen=True)
class Control:
    """Whether an attack was strong enough."""

    family: str
    attack: str
    benign: bool
    text: str = ""


@dataclass(frozen=True)
class Failed:
    """What did not finish."""

    label: str
    kind: str
    status: str
    message: str
    hint: str


@dataclass(frozen=True)
class Node:
    """A node in the table of digests."""

    label: str
    kind: str
    node: str
    parent: str
    result: str
    folder: str = ""


@dataclass(frozen=True)
class Provenance:
    """Where a summary comes from."""

    config_digest: str
    seeds: list[int]
    data: dict[str, str]
    code: Code
    packages: dict[str, str]
    hardware: Hardware


@dataclass(frozen=True)
class Canaries:
    """What became of the defender's own triggers."""

    family: str
    defence: str
    attack: str
    looks: dict[str, dict[str, tuple[int, int]]]
    steps: list[int]
    verdicts: list[str]


@dataclass(frozen=True, kw_only=True)
class BenchSummary:
    """summary.json of a benchmark."""

    plan: dict[str, Any]
    verdicts: Some[Verdict]
    records: list[Record]
    pooled: list[Pooled]
    costs: list[Cost]
    breaks: list[Break]
    differences: list[Difference]
    controls: list[Control]
    occasion: str = ""
    ends: list[End] = field(default_factory=list)
    telemetry: list[Told] = field(default_factory=list)
    canaries: list[Canaries] = field(default_factory=list)
    canary_agreement: dict[str, float | None] = field(default_factory=dict)
    spent: list[Spending] = field(default_factory=list)
    public: list[Public] = field(default_factory=list)
    failed: list[Failed]
    not_tested: list[str]
    nodes: list[Node]
    provenance: Provenance
