"""The same report as a Markdown page without pictures: what goes into documentation, made again by one command."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from casehard.reporting.ends import canary_part, ends_part, public_part
from casehard.reporting.page_data import View

Rows = Iterable[Sequence[Any]]


def markdown(summary: Mapping[str, Any], command: str = "") -> str:
    """Return a report as a Markdown page.

    Args:
        summary: as written by a benchmark, or what ``summary_of_runs`` returns.
        command: what makes it again; empty leaves it out.
    """
    plan = summary["plan"]
    runs = len(plan["seeds"]) * len(plan["bases"])
    out = [f"# {_plain(plan['title'])}", ""]
    out += ["```sh", command, "```", ""] if command else []
    out += [f"{runs} run{'s' if runs != 1 else ''} each ({_many(plan)}). {_made_with(summary)}", ""]
    for verdict in summary["verdicts"]:
        view = View(summary, verdict["family"])
        out += [f"## {_plain(view.family)}", "", f"> {_plain(verdict['sentence'])}", ""]
        out += [*(f"- {_plain(line)}" for line in verdict["details"]), ""]
        out += _ends(view) if view.ends else _steps(view)
        out += _costs(view)
    out += ["## What was not tested", "", *(f"- {_plain(line)}" for line in summary["not_tested"]), ""]
    if summary["failed"]:
        out += ["## What did not finish", ""]
        out += [f"- {_plain(f['label'])}: {_plain(f['message'])}" for f in summary["failed"]] + [""]
    return "\n".join(out)


def _many(plan: Mapping[str, Any]) -> str:
    seeds, bases = len(plan["seeds"]), len(plan["bases"])
    return f"{seeds} seed{'s' if seeds != 1 else ''} on {bases} base{'s' if bases != 1 else ''}"


def _made_with(summary: Mapping[str, Any]) -> str:
    found = summary["provenance"]
    made = found.get("runs", [found])[0]
    commit, hardware = made["code"].get("commit") or "none", made["hardware"]
    draft = " with uncommitted changes: a draft, not evidence" if found["code"].get("dirty") else ""
    torch = made["packages"].get("torch", "")
    machine = ", ".join(hardware.get("gpus") or []) or f"{hardware['processor']}, {hardware['cores']} cores"
    return f"Measured at commit {commit[:12]}{draft}, torch {torch}, {machine}."


def _ends(view: View) -> list[str]:
    """Return what is said of models that are compared at the end of the attacks."""
    if (part := ends_part(view)) is None:
        return []
    heads = [f"mean over the {part['over']}", *part["heads"], f"ASR against {part['against']}, points"]
    rows = [[r["title"], *(_spanned(c) for c in r["cells"]), r["difference"]] for r in part["table"]]
    out = table_lines(heads, rows)
    for heat in part["heats"]:
        out += [f"**{heat['title']}, one by one**", ""]
        out += table_lines(["", *heat["heads"]], [[r["title"], *(c["text"] for c in r["cells"])] for r in heat["rows"]])
    if own := canary_part(view):
        out += ["**The defender's own triggers**", "", own["correlation"], ""]
        out += table_lines(["", *own["heads"]], [[r["title"], *r["cells"]] for r in own["rows"]])
    return out


def _spanned(cell: Mapping[str, str]) -> str:
    return f"{cell['text']} ({cell['span']})" if cell["span"] else cell["text"]


def _steps(view: View) -> list[str]:
    """Return what is said of models that are compared step by step."""
    titles = [d["title"] for d in view.defences]
    out = []
    if broken := view.break_table():
        out += ["**Steps to break**", ""]
        out += table_lines(["attack", "broken when", *titles], [[r["attack"], r["what"], *r["cells"]] for r in broken])
    for table in view.tables():
        out += [f"**{_plain(table['title'])}**", ""]
        rows = [[r["label"], *(_rate(c) for c in r["cells"])] for r in table["rows"]]
        out += table_lines(["", *titles], rows)
    if public := public_part(view):
        rows = [[r["title"], *(_spanned(c) for c in r["cells"])] for r in public["rows"]]
        out += ["**Public benchmarks, before any attack**", "", *table_lines(["", *public["heads"]], rows)]
    return out


def _rate(cell: Mapping[str, str]) -> str:
    return f"{cell['rate']} ({cell['span']}; {cell['count']})" if cell["span"] else cell["rate"]


def _costs(view: View) -> list[str]:
    titles = {d["name"]: d["title"] for d in view.defences}
    keys = ("passes_ratio", "tokens_ratio", "ratio_to_sft")
    rows = []
    for name, title in titles.items():
        own = [c for c in view.summary["costs"] if (c["family"], c["defence"]) == (view.family, name)]
        means = [[c[key] for c in own if c.get(key)] for key in keys]
        if any(means):
            rows.append([title, *(f"{fmean(some):.2f}" if some else "-" for some in means)])
    reference = titles.get(view.plan.get("reference", ""), "the reference")
    heads = [f"cost, as a ratio to {reference}", "passes", "tokens", "wall time"]
    return table_lines(heads, rows) if rows else []


def table_lines(heads: Sequence[str], rows: Rows) -> list[str]:
    """Return a table in Markdown, and an empty line behind it."""
    lines = [heads, ["---"] * len(heads), *rows]
    return [*(f"| {' | '.join(_plain(cell) for cell in line)} |" for line in lines), ""]


def _plain(text: Any) -> str:
    """Return text that Markdown takes literally, on one line."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")
