"""Searches for attackers on a leaderboard: the worst attacker found within a budget, in the row of what he attacked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from casehard.attacks import ATTACKS
from casehard.benchmark.worst_case import KEPT
from casehard.config import digest
from casehard.reporting import attack_search
from casehard.reporting.board import FORMAT, Board, Cell, Line

BOUNDS = {"leak": "leak_break", "asr": "asr_break"}


@dataclass(frozen=True)
class Search:
    """A finished search, as it was stored."""

    name: str
    """Folder of the model, else of the search: what a model of no known defence is called."""
    summary: Mapping[str, Any]
    highest: Mapping[str, float]
    """Metric -> highest rate of any attacker on the half that chose, useful or not."""
    run: Mapping[str, Any]

    @property
    def model(self) -> str:
        """Return the digest of the model that was attacked."""
        return str(self.run["parents"].get("model", ""))

    def cell(self, metric: str, bound: float) -> Cell | None:
        """Return what the search got out of the model by a metric; None where it did not measure that.

        Args:
            bound: rate from which the model counts as broken.
        """
        own, summary = self.summary["model"]["held_out"], self.summary
        if metric not in own:
            return None
        named = [summary[name] for name in ("worst", "cheapest") if summary[name] is not None]
        useful = [entry for entry in named if self._kept(entry)]
        broke = [entry for entry in useful if entry["held_out"][metric]["rate"] > bound]
        low = min(broke, key=lambda entry: float(entry["cost"]["flops"]), default=None)
        top = useful[0] if useful else None
        rate = top["held_out"][metric] if top else None
        rows = {} if low is None else low["rows"]
        lost = [float(entry["held_out"][metric]["rate"]) for entry in named] or [self.highest.get(metric, 0.0)]
        return Cell(
            attack=f"search-{self.run['config_digest'][:12]}",
            title=f"{summary['attack']}, worst of {summary['budget']} by {summary['sampler']}",
            kind=summary["attack"],
            step=None if top is None else int(top["cost"]["steps"]),
            rate=None if rate is None else float(rate["rate"]),
            low=None if rate is None else float(rate["low"]),
            high=None if rate is None else float(rate["high"]),
            runs=1,
            asr=float(top["held_out"]["asr"]["rate"]) if top and metric == "leak" else None,
            lost=max(lost),
            breaks=None if low is None else int(low["cost"]["steps"]),
            rows=rows.get("harmful_rows") or rows.get("benign_rows"),
            harmful=bool(rows.get("harmful_rows")),
            flops=None if low is None else float(low["cost"]["flops"]),
        )

    def _kept(self, entry: Mapping[str, Any]) -> bool:
        """Return whether an attacked model is useful by the leaderboard's rule, whatever the search's own is."""
        own, now = (rates.get("utility") for rates in (self.summary["model"]["held_out"], entry["held_out"]))
        if self.summary["useful"] != "utility" or own is None or now is None:
            return bool(entry["kept"])
        return bool(now["rate"] >= KEPT * own["rate"] - 1e-9)


def read_search(place: Path) -> Search:
    """Read a finished search.

    Raises:
        Corrupt: the folder is damaged.
    """
    summary, trials, run = attack_search.read(place)
    highest: dict[str, float] = {}
    for trial in trials:
        for metric, found in trial.get("found", {}).items():
            highest[metric] = max(highest.get(metric, 0.0), float(found["rate"]))
    folder = Path(run["config"].get("model") or place.resolve())
    return Search((folder.parent if folder.name == "checkpoint" else folder).name, summary, highest, run)


def with_searches(boards: Sequence[Board], searches: Iterable[Search]) -> list[Board]:
    """Return boards with each search in the row of the model it attacked, and boards of the models that none has.

    Args:
        boards: oldest first; the last one that has the model and its metric takes the search.
    """
    out, rest = list(boards), []
    for search in searches:
        for n, board in reversed(list(enumerate(out))):
            if (found := _joined(board, search)) is not None:
                out[n] = found
                break
        else:
            rest.append(search)
    return out + _alone(rest)


def _joined(board: Board, search: Search) -> Board | None:
    """Return a board with a search in the row whose model it attacked; None where there is none."""
    cell = search.cell(board.metric, board.bound)
    at = next((n for n, line in enumerate(board.lines) if search.model in line.models), None)
    if cell is None or at is None:
        return None
    if cell.attack in {other.attack for other in board.lines[at].cells}:
        return board
    lines = [_with(line, cell) if n == at else line for n, line in enumerate(board.lines)]
    said = f"{board.lines[at].title}: {search.summary['sentence']}"
    dirty = board.dirty or bool(search.run["code"].get("dirty"))
    return replace(board, lines=lines, searched=[*board.searched, said], dirty=dirty)


def _with(line: Line, cell: Cell) -> Line:
    """Return a row with one attacker more, whose title no other has."""
    titles = {other.title for other in line.cells}
    names = (cell.title, *(f"{cell.title} ({n})" for n in range(2, len(titles) + 2)))
    return replace(line, cells=[*line.cells, replace(cell, title=next(name for name in names if name not in titles))])


def _alone(searches: Sequence[Search]) -> list[Board]:
    """Return a board for each metric that was searched by, of models that stand in no benchmark, one row a model."""
    out = []
    for metric in dict.fromkeys(search.summary["metric"] for search in searches):
        mine = [search for search in searches if search.summary["metric"] == metric]
        for bound in dict.fromkeys(search.summary["gates"][BOUNDS[metric]] for search in mine):
            out.append(_board(metric, bound, [s for s in mine if s.summary["gates"][BOUNDS[metric]] == bound]))
    return out


def _board(metric: str, bound: float, searches: Sequence[Search]) -> Board:
    lines: dict[str, Line] = {}
    for search in searches:
        own, cell = search.summary["model"]["held_out"].get("utility"), search.cell(metric, bound)
        utility = None if own is None else float(own["rate"])
        new = Line(
            key=search.model[:16],
            family="",
            title=search.name,
            role="",
            utility=utility,
            cells=[],
            models=[search.model],
        )
        lines[search.model] = _with(lines.get(search.model, new), cell) if cell else new
    used = {search.summary["attack"] for search in searches}
    others = [name for name, spec in ATTACKS.ours.items() if name not in used and not spec.plants]
    commits = {str(search.run["code"].get("commit") or "") for search in searches}
    digests = [search.run["config_digest"] for search in searches]
    return Board(
        format=FORMAT,
        name="searches",
        title="Models that were searched and stand in no benchmark here",
        metric=metric,
        bound=bound,
        ends=False,
        seeds=sorted({seed for search in searches for seed in search.run["seeds"]}),
        bases=[],
        commit=commits.pop() if len(commits) == 1 else "",
        dirty=any(search.run["code"].get("dirty") for search in searches),
        config_digest=digests[0] if len(digests) == 1 else digest(digests),
        lines=list(lines.values()),
        not_tested=[f"Attackers of the catalogue whose settings were not searched: {', '.join(others)}."],
        searched=[f"{search.name}: {search.summary['sentence']}" for search in searches],
    )
