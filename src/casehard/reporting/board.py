"""What a leaderboard is made from: of every defence of a stored benchmark, what each attacker got and what it cost him.

A board is small enough to be kept, so that numbers survive the run folders. In each row the worst case is over
attackers who leave the model useful at the step in question (:mod:`casehard.benchmark.worst_case`).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from casehard.attacks import ATTACKS
from casehard.benchmark.lookup import Table
from casehard.benchmark.plan import Plan, parse_plan
from casehard.benchmark.verdict import judged_at
from casehard.benchmark.worst_case import reaches
from casehard.config import build, digest, to_dict
from casehard.io.stored import read

FORMAT = 1
_FACTS = ("title", "role", "name")
"""What of a row of a plan says nothing of what it does."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one attacker got out of one defence."""

    attack: str
    title: str
    kind: str
    """Name in the catalogue of attacks."""
    step: int | None
    """Step of the highest rate among those at which the model was known to be useful; None where there is none."""
    rate: float | None
    low: float | None
    high: float | None
    runs: int
    asr: float | None
    """ASR at that step, where the board's metric is the leak."""
    lost: float | None
    """Highest rate at any step, useful or not."""
    breaks: int | None
    """First step at which the pooled rate passes the bound and the model was useful."""
    rows: int | None
    """The attacker's harmful rows, or all of his where none is harmful."""
    harmful: bool
    """Whether ``rows`` counts harmful ones."""
    flops: float | None
    """FLOPs up to the step that breaks; 0 where nothing is trained."""


def trains(cell: Cell) -> bool:
    """Return whether an attacker trains; one that another package brought, and that is not here, is taken to."""
    return ATTACKS.ours[cell.kind].trains if cell.kind in ATTACKS.ours else True


@dataclass(frozen=True, kw_only=True)
class Line:
    """One defence of one benchmark."""

    key: str
    """Digest of what the defence does, and to which bases: the same row in another benchmark has the same."""
    family: str
    title: str
    role: str
    utility: float | None
    """Utility of the model as it is judged: before any attack, or after a customer's job. Against backdoors its
    accuracy on clean prompts, the lowest over the attackers."""
    cells: list[Cell]
    models: list[str] = field(default_factory=list)
    """Digests of the models that were attacked, by which a search for attackers is known to be of this row."""

    @property
    def worst(self) -> Cell | None:
        """The attacker who gets most out of a useful model."""
        known = [cell for cell in self.cells if cell.rate is not None]
        return max(known, key=lambda cell: cell.rate or 0.0, default=None)

    @property
    def cheapest(self) -> Cell | None:
        """The attacker who breaks a useful model by the fewest FLOPs of training, as far as these are known; of equals
        the one of fewer steps."""
        broke = [cell for cell in self.cells if cell.breaks is not None and trains(cell)]
        return min(broke, key=lambda cell: (cell.flops is None, cell.flops or 0.0, cell.breaks or 0), default=None)

    @property
    def untrained(self) -> list[Cell]:
        """The attackers who break a useful model and train nothing."""
        return [cell for cell in self.cells if cell.breaks is not None and not trains(cell)]


@dataclass(frozen=True, kw_only=True)
class Board:
    """What is kept of one benchmark."""

    format: int
    name: str
    title: str
    metric: str
    bound: float
    ends: bool
    """Whether models are judged and compared once a customer's job, or what follows an attack, is over."""
    seeds: list[int]
    bases: list[str]
    commit: str
    dirty: bool
    config_digest: str
    lines: list[Line]
    not_tested: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    searched: list[str] = field(default_factory=list)
    """What searches for attackers found, a sentence each."""


def board_of(summary: Mapping[str, Any]) -> Board:
    """Return what is kept of the summary of a benchmark, as :func:`casehard.reporting.page.bench_summary` reads it."""
    plan = parse_plan(summary["plan"])
    code = summary["provenance"]["code"]
    metric = str(plan.headline.metric)
    families = list(dict.fromkeys(base.family for base in plan.bases))
    return Board(
        format=FORMAT,
        name=plan.name,
        title=plan.title,
        metric=metric,
        bound=plan.gates.leak_break if metric == "leak" else plan.gates.asr_break,
        ends=plan.ends,
        seeds=list(plan.seeds),
        bases=[base.name for base in plan.bases],
        commit=str(code.get("commit") or ""),
        dirty=bool(code.get("dirty")),
        config_digest=str(summary["provenance"]["config_digest"]),
        lines=[_line(plan, summary, family, row.name) for family in families for row in plan.defences],
        not_tested=[*summary["not_tested"], *_untried(plan)],
        failed=[str(entry["label"]) for entry in summary["failed"]],
    )


def _untried(plan: Plan) -> list[str]:
    """Name the attackers of the catalogue that stand in no column, of those that could."""
    used = {attack.attack for attack in plan.attacks}
    rest = [name for name, spec in ATTACKS.ours.items() if name not in used and spec.plants == plan.plants]
    return [f"Attackers of the catalogue without a column: {', '.join(rest)}."] if rest else []


def _line(plan: Plan, summary: Mapping[str, Any], family: str, name: str) -> Line:
    row, found = plan.defence(name), Table(summary["pooled"], family, at=judged_at(plan))
    does = {key: value for key, value in to_dict(row).items() if key not in _FACTS}
    made = [to_dict(step) for step in plan.steps], [to_dict(step) for step in plan.prepare], list(plan.chain)
    bases = [to_dict(base) for base in plan.bases if base.family == family]
    if plan.plants:
        clean = [found.get(name, attack.name, attack.steps, "cacc") for attack in plan.attacks]
        utility = min((entry for entry in clean if entry is not None), key=lambda entry: entry["rate"], default=None)
    else:
        utility = found.before(name, "utility")
    return Line(
        key=digest([does, *made, bases])[:16],
        family=family,
        title=row.title,
        role=row.role,
        utility=None if utility is None else float(utility["rate"]),
        cells=[cell for attack in plan.attacks if (cell := _cell(plan, summary, found, family, name, attack.name))],
        models=_models(plan, summary, family, name),
    )


def _models(plan: Plan, summary: Mapping[str, Any], family: str, name: str) -> list[str]:
    """Return the digests of a row's models before any attack; none where what is attacked is not yet defended."""
    if plan.ends or plan.plants:
        return []
    nodes = summary["nodes"]
    result = {node["node"]: node["result"] for node in nodes}
    mine = {f"{base.name}/{name}" for base in plan.bases if base.family == family}
    parents = [n["parent"] for n in nodes if n["kind"] == "attack" and "/".join(n["label"].split("/")[:2]) in mine]
    return sorted({result[parent] for parent in parents if result.get(parent)})


def _cell(plan: Plan, summary: Mapping[str, Any], rates: Table, family: str, name: str, attack: str) -> Cell | None:
    """Return what an attack got out of a defence; None where nothing was measured."""
    metric, entry = str(plan.headline.metric), plan.attack(attack)
    found = [reach for reach in reaches(plan, rates, metric, name) if reach.attack.name == attack]
    if not found:
        return None
    bound = plan.gates.leak_break if metric == "leak" else plan.gates.asr_break
    useful = [reach.entry for reach in found if reach.kept]
    top = max(useful, key=lambda e: float(e["rate"]), default=None)
    over = next((int(e["steps"]) for e in useful if e["rate"] > bound), None)
    asr = None if top is None or metric == "asr" else rates.get(name, attack, int(top["steps"]), "asr")
    whole = [s for s in summary.get("spent", ()) if (s["family"], s["defence"], s["attack"]) == (family, name, attack)]
    harmful = [s["harmful_rows"] for s in whole if s.get("harmful_rows")]
    counted = harmful or [s["attacker_rows"] for s in whole if s.get("attacker_rows")]
    flops = [s["flops"] for s in whole if s.get("flops")]
    free, part = not ATTACKS.find(entry.attack).trains, (over or 0) / entry.steps
    paid = statistics.fmean(flops) * part if flops else 0.0 if free else None
    return Cell(
        attack=attack,
        title=entry.title,
        kind=entry.attack,
        step=None if top is None else int(top["steps"]),
        rate=None if top is None else float(top["rate"]),
        low=None if top is None else float(top["low"]),
        high=None if top is None else float(top["high"]),
        runs=len((top or found[0].entry)["rates"]),
        asr=None if asr is None else float(asr["rate"]),
        lost=max(float(reach.entry["rate"]) for reach in found),
        breaks=over,
        rows=max(counted) if counted else None,
        harmful=bool(harmful),
        flops=None if over is None else paid,
    )


def read_board(path: Path) -> Board:
    """Read a board that was kept.

    Raises:
        UserError, Corrupt: no such file, or not a board.
    """
    return build(Board, read(path, Board), where=str(path))
