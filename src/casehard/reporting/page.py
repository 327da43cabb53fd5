"""The report: one self-contained HTML file, no scripts, nothing fetched, the same bytes for the same summary.

What differs between two runs of the same seeds, because it was measured with a clock, is in elements of the class
``took`` and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from casehard.benchmark.shapes import BenchSummary, CellRow
from casehard.benchmark.store import read_finished, read_rows, read_run, read_summary, unchanged
from casehard.config import digest
from casehard.errors import ConfigError, Corrupt, UserError
from casehard.io.files import write_text_atomic
from casehard.io.stored import read
from casehard.reporting import attack_search
from casehard.reporting.card import write_cards
from casehard.reporting.ends import canary_part, ends_part, ends_plane, public_part, telemetry_part
from casehard.reporting.from_run_folders import summary_of_runs
from casehard.reporting.legend import legend
from casehard.reporting.markdown import bench_command, markdown
from casehard.reporting.page_data import View, transcripts

REPORT = "report.html"
MADE = ("casehard", "packages", "machine", "GPUs")
STATUS = {
    "holds": ("holds", "good"),
    "delays": ("delays the break", "good"),
    "meets": ("meets every goal", "good"),
    "lowers": ("lowers it, not every goal met", "good"),
    "no_difference": ("made no difference", "plain"),
    "disagree": ("the runs disagree", "plain"),
    "worse": ("makes it worse", "bad"),
    "collapsed": ("no safety claim", "bad"),
    "shallow": ("backdoors too shallow: no claim", "plain"),
    "too_weak": ("attack too weak: no claim", "plain"),
    "not_measured": ("no claim", "plain"),
}


def _yaml(value: Any) -> str:
    import yaml

    return yaml.safe_dump(value, sort_keys=False, allow_unicode=False, width=100)


def made_with(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what a run was made with, under the names in :data:`MADE`."""
    code, hardware = run["code"], run["hardware"]
    commit = code.get("commit") or "none (not a git checkout)"
    state = {True: ", with uncommitted changes", False: ", clean", None: ""}[code.get("dirty")]
    memory = hardware.get("memory_bytes")
    machine = f"{hardware['processor']}, {hardware['cores']} cores"
    machine += f", {memory / 2**30:.0f} GiB" if memory else ""
    gpus = ", ".join(hardware.get("gpus", [])) or "none"
    packages = ", ".join(f"{k} {v}" for k, v in run["packages"].items())
    return list(zip(MADE, (f"{code['version']}, commit {commit}{state}", packages, machine, gpus), strict=True))


def _provenance(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what the page was made from; what differs between run folders comes once each, with the folders."""
    found = summary["provenance"]
    folders: dict[tuple[str, str], list[str]] = {}
    for run in found.get("runs", [found]):
        for fact in made_with(run):
            folders.setdefault(fact, []).append(run.get("folder", ""))
    kinds = [what for what, _ in folders]
    out = []
    for what, value in sorted(folders, key=lambda fact: MADE.index(fact[0])):
        of = f" of {', '.join(folders[what, value])}" if kinds.count(what) > 1 else ""
        out.append((what + of, value))
    out += [("seeds", ", ".join(str(s) for s in found["seeds"])), ("config digest", found["config_digest"])]
    return out + [(f"data: {name}", digest) for name, digest in found["data"].items()]


def _part(view: View, verdict: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything the page shows of one family of bases."""
    return {
        "name": view.family,
        "verdict": verdict,
        "status": STATUS[verdict["status"]],
        "tiles": view.tiles(),
        "ends": None if (ends := ends_part(view)) is None else {**ends, "plane": ends_plane(view)},
        "canaries": canary_part(view),
        "telemetry": telemetry_part(view),
        "attacks": [] if view.ends else view.attack_figures(),
        "plane": None if view.ends else view.plane(),
        "before": view.before(),
        "public": public_part(view),
        "costs": view.costs(),
        "strips": [] if view.ends else view.strips(),
        "broken_when": view.broken_when(),
        "break_rows": [] if view.ends else view.break_table(),
        "plants": view.plants,
        "tables": view.tables(),
        "differences": view.differences(),
    }


@cache
def template(name: str = "page.html.j2") -> Any:
    """Return a page's template of this package."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    env = Environment(
        loader=PackageLoader("casehard.reporting", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Figures are made here, from escaped text; nothing else on the page is trusted.
    env.filters["figure"] = Markup
    return env.get_template(name)


def render(summary: Mapping[str, Any], rows: Iterable[Mapping[str, Any]] = ()) -> str:
    """Return the report's HTML.

    Args:
        summary: summary.json of a benchmark, or what :func:`summary_of_runs` returns.
        rows: rows.jsonl of the benchmark, for the transcripts.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    plan = summary["plan"]
    families = [View(summary, verdict["family"]) for verdict in summary["verdicts"]]
    parts = [_part(view, verdict) for view, verdict in zip(families, summary["verdicts"], strict=True)]
    made = legend(families[0].looks, plan["defences"])
    said = [] if families[0].plants else transcripts(summary, rows)
    code = summary["provenance"]["code"]
    html = template().render(
        title=plan["title"],
        name=plan["name"],
        parts=parts,
        many=len(parts) > 1,
        planned=summary.get("kind") != "runs",
        rows=made,
        defences=plan["defences"],
        seeds=plan["seeds"],
        bases=plan["bases"],
        gates=plan["gates"],
        replicates=len(plan["seeds"]) * len(plan["bases"]),
        transcripts=said,
        not_tested=summary["not_tested"],
        failed=summary["failed"],
        dirty=bool(code.get("dirty")),
        provenance=_provenance(summary),
        nodes=summary["nodes"],
        config=_yaml(plan),
    )
    # A number and its sign stay on one line.
    return re.sub(r"(?<=\d) (?=%)", "\u00a0", html)


@dataclass(frozen=True)
class _Plan:
    config_digest: str


@dataclass(frozen=True)
class _Whose:
    provenance: _Plan


def bench_summary(place: Path) -> dict[str, Any]:
    """Return the summary of a benchmark's folder, if the last run there wrote it, together with what the runs took.

    A bench that starts in a used folder leaves the old summary until it has its own: one that has not come to its end
    has none, and one that failed has one only if it failed in some nodes, which it counts when the summary is written.

    Raises:
        UserError: the summary is of an earlier run, or missing.
        Corrupt: it is damaged.
    """
    hint = "run the same bench command again: it goes on from what is finished, and writes the report"
    run = read_run(place)
    status = run.get("status")
    if status not in ("ok", "failed") or (status == "failed" and "nodes" not in run):
        # The first line: what follows is a hint about the run, and this error has its own.
        why = f" ({str(run['error']).splitlines()[0]})" if run.get("error") else ""
        raise UserError(f"{place}: the last bench there is {status!r}, it did not come to its end{why}", hint=hint)
    run = read_finished(place)
    path = place / "summary.json"
    made = read(path, _Whose)["provenance"]["config_digest"]
    if made != (wanted := run["config_digest"]):
        what = f"summary.json is of the plan {made[:12]}, and the last bench ran the plan {wanted[:12]}"
        raise UserError(f"{place}: {what}", hint=hint)
    summary = read_summary(place, run, BenchSummary)
    if digest(summary["plan"]) != made:
        raise Corrupt(f"{path}: plan was changed: expected sha256 {made}, actual {digest(summary['plan'])}", hint=hint)
    return summary


def _rows(place: Path, summary: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """Return the rows for the transcripts, where the page has any."""
    if not summary["plan"].get("transcripts") or not (place / "rows.jsonl").exists():
        return ()
    return read_rows(unchanged(place, read_run(place), "rows.jsonl"), CellRow)


def render_search(place: Path) -> str:
    """Return the page of a finished search for the worst attacker.

    Raises:
        Corrupt: the folder is damaged.
        MissingExtra: matplotlib is not installed.
    """
    summary, trials, run = attack_search.read(place)
    made = [*made_with(run), ("seed", str(run["seeds"][0])), ("model", str(run["parents"].get("model", "")))]
    made += [("config digest", run["config_digest"]), *((f"data: {k}", v) for k, v in run["data"].items())]
    shown = attack_search.context(summary, trials)
    html = template("search.html.j2").render(**shown, dirty=bool(run["code"].get("dirty")), provenance=made)
    return re.sub(r"(?<=\d) (?=%)", "\u00a0", html)


def write_report(folders: str | Path | Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the report of a finished run and return its path; a benchmark's checkpoints get their model cards too.

    Args:
        folders: the run folder of a benchmark or of a search for attackers, or one or several of single verbs (attack,
            evaluate, defend): attacks on an undefended and on a hardened checkpoint together make a comparison.
        out: the file, HTML or, where its name ends in ``.md``, a Markdown page of the tables; default ``report.html``
            in the (first) folder.

    Raises:
        ConfigError: ``out`` is a folder or neither HTML nor Markdown.
        UserError: not a run folder, the last run there did not come to its end (a benchmark some of whose nodes failed
            did), or several runs that cannot be shown together, see :func:`summary_of_runs`.
        MissingExtra: matplotlib is not installed.
    """
    places = [Path(folders)] if isinstance(folders, str | Path) else [Path(f) for f in folders]
    if not places:
        raise UserError("no run folder given")
    target = Path(out) if out is not None else places[0] / REPORT
    if target.is_dir():
        raise ConfigError(f"{target} is a folder", hint=f"name the file: {target / REPORT}")
    if target.suffix not in (".html", ".md"):
        raise ConfigError(f"{target} is neither .html nor .md", hint=f"{target.name}.html: the whole report")
    runs = [read_run(place) for place in places]
    kinds = [run.get("kind") for run in runs]
    if "bench" in kinds and len(places) > 1:
        raise UserError("a benchmark's run folder is reported alone", hint="give one folder")
    if attack_search.KIND in kinds:
        if len(places) > 1 or target.suffix == ".md":
            hint = "give one folder, and a file whose name ends in .html"
            raise UserError("a search for attackers has a page of its own", hint=hint)
        write_text_atomic(target, render_search(places[0]))
        return target
    summary = bench_summary(places[0]) if kinds == ["bench"] else summary_of_runs(places)
    if target.suffix == ".md":
        text = markdown(summary, bench_command(summary["plan"]) if kinds == ["bench"] else "")
    elif kinds == ["bench"]:
        text = render(summary, _rows(places[0], summary))
        write_cards(places[0], summary)
    else:
        text = render(summary)
    write_text_atomic(target, text)
    return target
