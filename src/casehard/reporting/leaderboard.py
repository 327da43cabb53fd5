"""The leaderboard: of every defence the worst attacker found, over stored benchmarks and searches, oldest first.

The page is made from boards alone (:mod:`casehard.reporting.board`). A row that a later benchmark finds weaker than it
said stays, marked ``unreliable``: RobustBench's rule (Croce et al., arXiv 2010.09670).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from casehard.benchmark.lookup import percent, percents
from casehard.benchmark.store import read_run
from casehard.benchmark.worst_case import KEPT
from casehard.config import to_dict
from casehard.errors import ConfigError, UserError
from casehard.evaluation.metrics import in_words
from casehard.io.files import write_text_atomic
from casehard.reporting import attack_search
from casehard.reporting.board import Board, Line, board_of, read_board, trains
from casehard.reporting.board_search import Search, read_search, with_searches
from casehard.reporting.markdown import table_lines
from casehard.reporting.page import bench_summary, template

UNRELIABLE = "unreliable"
COSTS = ("broken without training by", "cheapest break by training", "its steps", "its rows", "its FLOPs")


def unreliable(boards: Sequence[Board]) -> dict[tuple[int, str], str]:
    """Return the rows that a later board found weaker: (position of the board, key of the row) -> by whom.

    Weaker is: by the same metric, a worst case above the upper end of the interval that the row was given.
    """
    out: dict[tuple[int, str], str] = {}
    for n, board in enumerate(boards):
        for line in board.lines:
            for later in boards[n + 1 :]:
                same = [other for other in later.lines if other.key == line.key and later.metric == board.metric]
                for other in same:
                    mine, theirs = line.worst, other.worst
                    if mine and theirs and (theirs.rate or 0.0) > (mine.high or 0.0):
                        said = f"{theirs.title} reaches {percent(theirs.rate or 0.0)} in {later.name}"
                        out.setdefault((n, line.key), said)
    return out


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A board as both pages show it: texts only."""

    title: str
    facts: list[str]
    heads: list[str]
    ranks: list[list[str]]
    attackers: list[str]
    matrix: list[list[str]]
    searched: list[str]
    not_tested: list[str]


def shown(boards: Sequence[Board]) -> list[Shown]:
    """Return the boards as tables, the defence that gives least away first."""
    marks = unreliable(boards)
    return [
        _shown(board, {key: said for (at, key), said in marks.items() if at == n}) for n, board in enumerate(boards)
    ]


def _shown(board: Board, marks: Mapping[str, str]) -> Shown:
    lines = sorted(board.lines, key=lambda line: (line.worst is None, (line.worst.rate if line.worst else 0) or 0.0))
    attackers = list(dict.fromkeys(cell.title for line in lines for cell in line.cells))
    runs = len(board.seeds) * len(board.bases) if board.bases else 1
    plural = "s" if len(board.seeds) != 1 else ""
    where = f"seed{plural} {', '.join(map(str, board.seeds))}" + (
        f" on {', '.join(board.bases)}" if board.bases else ""
    )
    facts = [f"{runs} run{'s' if runs != 1 else ''} each: {where}."]
    if board.failed:
        facts.append(f"Not finished: {', '.join(board.failed)}.")
    facts.append(
        f"{'Plan' if board.bases else 'Settings'} {board.config_digest[:12]}, commit {board.commit[:12] or 'none'}."
    )
    if board.dirty:
        facts.append("Made from a working tree with uncommitted changes: a draft.")
    many = len({line.family for line in lines}) > 1
    return Shown(
        title=board.title,
        facts=facts,
        heads=["defence", "utility", f"worst {board.metric}", "by", *COSTS, "mark"],
        ranks=[_rank(line, marks.get(line.key, ""), many) for line in lines],
        attackers=attackers,
        matrix=[[_named(line, many), *_across(line, attackers)] for line in lines],
        searched=board.searched,
        not_tested=board.not_tested,
    )


def _named(line: Line, many: bool) -> str:
    control = " (undefended)" if line.role == "undefended" and line.title != "undefended" else ""
    return f"{line.title}{control}" + (f", {line.family}" if many else "")


def _rank(line: Line, mark: str, many: bool) -> list[str]:
    top, low = line.worst, line.cheapest
    out = [_named(line, many), "-" if line.utility is None else percent(line.utility)]
    if top is None or top.rate is None:
        out += ["not measured", "-"]
    else:
        span = percents(top.low or 0.0, top.high or 0.0)
        out += [f"{percent(top.rate)} ({span})", f"{top.title}, step {top.step}" if trains(top) else top.title]
    out.append("; ".join(cell.title for cell in line.untrained) or "none found")
    if low is None:
        return [*out, "none found", "-", "-", "-", f"{UNRELIABLE}: {mark}" if mark else ""]
    rows = "-" if low.rows is None else f"{low.rows} harmful" if low.harmful else f"{low.rows} harmless"
    out += [low.title, str(low.breaks), rows, _flops(low.flops)]
    return [*out, f"{UNRELIABLE}: {mark}" if mark else ""]


def _flops(count: float | None) -> str:
    return "-" if count is None else "0" if count == 0 else f"{count:.1e}".replace("e+", "e")


def _across(line: Line, attackers: Iterable[str]) -> list[str]:
    """Return one text an attacker: the rate; in brackets one that left no useful model; ? where that is not known."""
    found = {cell.title: cell for cell in line.cells}
    out = []
    for title in attackers:
        cell = found.get(title)
        if cell is None:
            out.append("")
        elif cell.rate is None:
            out.append(f"[{percent(cell.lost or 0.0)}]")
        else:
            more = "" if cell.lost is None or cell.lost <= cell.rate else f" [{percent(cell.lost)}]"
            out.append(f"{percent(cell.rate)}{more}")
    return out


_WORST = (
    f"The worst case is over attackers who leave at least {percent(KEPT)} of the model's own utility at the step in "
    "question; where a customer's job is judged by its end, over all. Rates in square brackets are higher and were "
    "reached only where the model was useless or nobody measured whether it was. Against backdoors utility is accuracy "
    "on clean prompts, the lowest over the attackers, and all count.",
    "In brackets: 95 % interval over prompts. A break is the first measured step at which the rate passes its bound "
    "and the model is useful; the cheapest is the one of fewest FLOPs of training up to there.",
)
_SEARCHED = (
    "A searched attacker (casehard attack search) is named with his budget: his rate is of one run, on prompts that "
    "did not choose him, and his cheapest break is the cheapest of those that were tried."
)
_MARKED = f"A row marked {UNRELIABLE} was found weaker by a later benchmark on this page, and stays."


def legend(boards: Sequence[Board]) -> list[str]:
    """Return the lines above the tables: what is counted on these boards, and how."""
    searched = [_SEARCHED] if any(board.searched for board in boards) else []
    return [*_WORST, *searched, _MARKED, bounds(boards)]


def bounds(boards: Sequence[Board]) -> str:
    """Say what a break is on these boards."""
    said = (f"{b.metric} ({in_words(b.metric)}) above {percent(b.bound)}" for b in boards)
    return f"A model counts as broken by {', or by '.join(dict.fromkeys(said))}."


def markdown(boards: Sequence[Board], command: str) -> str:
    """Return the leaderboard as a Markdown page.

    Args:
        command: what makes it again.
    """
    out = ["# Leaderboard: the worst attacker found", "", "```sh", command, "```", ""]
    out += [*(f"- {line}" for line in legend(boards)), ""]
    for part in shown(boards):
        turned = [[name, *(row[n] for row in part.matrix)] for n, name in enumerate(part.attackers, start=1)]
        out += [f"## {part.title}", "", " ".join(part.facts), "", *table_lines(part.heads, part.ranks)]
        out += ["### Attacker by attacker", "", *table_lines(["attacker", *(row[0] for row in part.matrix)], turned)]
        if part.searched:
            out += ["### What was searched", "", *(f"- {line}" for line in part.searched), ""]
        out += ["### What was not tried", "", *(f"- {line}" for line in part.not_tested), ""]
    return "\n".join(out)


def html(boards: Sequence[Board]) -> str:
    """Return the leaderboard as one self-contained HTML file."""
    found: str = template("leaderboard.html.j2").render(
        parts=shown(boards),
        legend=legend(boards),
        dirty=any(board.dirty for board in boards),
    )
    # A number and its sign stay on one line.
    return re.sub(r"(?<=\d) (?=%)", "\u00a0", found)


def write_leaderboard(sources: Sequence[Path], out: Path) -> Path:
    """Write the leaderboard of stored benchmarks and searches for attackers, oldest first, and return its path.

    A search stands in the row of the defence whose model it attacked, in the last benchmark that has that model; of a
    model that none has, it stands in a table of its own.

    Args:
        sources: run folders of benchmarks and of ``casehard attack search``, or ``.json`` files that an earlier call
            wrote.
        out: ``.md`` or ``.html``: the page; ``.json``: what the page is made from, of one benchmark and searches of its
            models, to be kept.

    Raises:
        UserError: not a finished benchmark or search, or several for one ``.json`` file.
        Corrupt: a file was changed.
    """
    found = [_read(source) for source in sources]
    boards = with_searches([b for b in found if isinstance(b, Board)], [s for s in found if isinstance(s, Search)])
    if not boards:
        raise UserError("no run folder given")
    if out.suffix == ".json":
        if len(boards) > 1:
            raise ConfigError(f"{out} keeps one table and {len(boards)} are given", hint="one file for each")
        text = json.dumps(to_dict(boards[0]), indent=1, sort_keys=True) + "\n"
    elif out.suffix == ".md":
        text = markdown(boards, f"casehard report --leaderboard {' '.join(map(str, sources))} --out {out}")
    else:
        text = html(boards)
    write_text_atomic(out, text)
    return out


def _read(source: Path) -> Board | Search:
    if source.suffix == ".json":
        return read_board(source)
    kind = read_run(source).get("kind")
    if kind == attack_search.KIND:
        return read_search(source)
    if kind != "bench":
        raise UserError(
            f"{source} is a run of {kind!r}", hint="a leaderboard is made of benchmarks and attack searches"
        )
    return board_of(bench_summary(source))
