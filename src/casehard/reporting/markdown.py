"""The same report as a Markdown page without pictures: what goes into documentation, made again by one command."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from statistics import fmean
from typing import Any

from casehard.benchmark.lookup import percent
from casehard.benchmark.records import NO_ATTACK
from casehard.reporting.ends import canary_part, ends_part, public_part
from casehard.reporting.page_data import BEFORE, View, facts, points

Rows = Iterable[Sequence[Any]]


def markdown(summary: Mapping[str, Any], command: str = "", *, below: int = 0) -> str:
    """Return a report as a Markdown page.

    Args:
        summary: as written by a benchmark, or what ``summary_of_runs`` or ``casehard.reporting.kept.kept`` returns.
        command: what makes it again; empty leaves it out.
        below: level of the heading in a page that it stands under; 0: a page of its own, with the plan's title.
    """
    plan, verdicts = summary["plan"], summary["verdicts"]
    head = "#" * max(below + 1, 2)
    out = [] if below else [f"# {_plain(plan['title'])}", ""]
    out += ["```sh", command, "```", ""] if command else []
    out += [f"{_many(plan)} {_made_with(summary)}", ""]
    for verdict in verdicts:
        view = View(summary, verdict["family"])
        out += [f"{head} {_plain(view.family)}", ""] if len(verdicts) > 1 else []
        out += [f"> {_plain(verdict['sentence'])}", ""]
        out += [*(f"- {_plain(line)}" for line in verdict["details"]), ""] if verdict["details"] else []
        out += _ends(view) if view.ends else [*_breaks(view), *_compared(view), *_by_base(view)]
        out += [*_rates(view), *_public(view), *_costs(view)]
    out += [f"{head} What was not tested", "", *(f"- {_plain(line)}" for line in summary["not_tested"]), ""]
    if summary["failed"]:
        out += [f"{head} What did not finish", ""]
        out += [f"- {_plain(f['label'])}: {_plain(f['message'])}" for f in summary["failed"]] + [""]
    return "\n".join(out)


def bench_command(plan: Mapping[str, Any]) -> str:
    """Return the command that runs a plan of ``plans/`` again."""
    name = str(plan["name"]).replace("-", "_")
    return f"casehard bench plans/{name}.yaml --out runs/{name}"


def _many(plan: Mapping[str, Any]) -> str:
    seeds, bases = [str(s) for s in plan["seeds"]], [b["name"] for b in plan["bases"]]
    runs = len(seeds) * len(bases)
    each = f"{runs} run{'s' if runs != 1 else ''} each"
    return f"{each}: seed{'s' if len(seeds) != 1 else ''} {', '.join(seeds)} on {_plain(', '.join(bases))}."


def _made_with(summary: Mapping[str, Any]) -> str:
    found = summary["provenance"]
    made = found.get("runs", [found])[0]
    commit, hardware = made["code"].get("commit") or "none", made["hardware"]
    draft = " with uncommitted changes: a draft, not evidence" if found["code"].get("dirty") else ""
    torch = made["packages"].get("torch", "")
    machine = ", ".join(hardware.get("gpus") or []) or f"{hardware['processor']}, {hardware['cores']} cores"
    out = f"Measured at commit {commit[:12]}{draft}, torch {torch}, {machine}."
    read = {} if "runs" in found else found["data"]
    each = sorted(f"{PurePath(name).name} {sha[:12]}" for name, sha in read.items())
    return f"{out} SHA-256 of what it read: {_plain(', '.join(each))}." if each else out


def _ends(view: View) -> list[str]:
    """Return what is said of models that are compared at the end of the attacks."""
    if (part := ends_part(view)) is None:
        return []
    heads = [f"mean over the {part['over']}", *part["heads"], f"ASR against {part['against']}, points"]
    rows = [[r["title"], *(_spanned(c) for c in r["cells"]), r["difference"]] for r in part["table"]]
    out = table_lines(heads, rows)
    if len(view.plan["bases"]) > 1:
        out += ["**Base by base**", "", f"Means over the {part['over']}{_seeds(view)}.", ""]
        out += table_lines(["", "base", *part["heads"]], _ends_by_base(view, part["metrics"]))
    for heat in part["heats"] if len(view.attacks) > 1 else []:
        out += [f"**{heat['title']}, one by one**", ""]
        out += table_lines(["", *heat["heads"]], [[r["title"], *(c["text"] for c in r["cells"])] for r in heat["rows"]])
    if own := canary_part(view):
        out += ["**The defender's own triggers**", "", own["correlation"], ""]
        out += table_lines(["", *own["heads"]], [[r["title"], *r["cells"]] for r in own["rows"]])
    return out


def _ends_by_base(view: View, metrics: Sequence[str]) -> Rows:
    found = {(r["defence"], r["metric"]): r["by_run"] for r in view.summary["ends"] if r["family"] == view.family}
    for d in view.defences:
        for base in _bases(view):
            runs = [found.get((d["name"], m), {}) for m in metrics]
            each = [[f"{base}/{seed}" for seed in view.plan["seeds"] if f"{base}/{seed}" in some] for some in runs]
            yield [d["title"], base, *(_mean([some[k] for k in keys]) for some, keys in zip(runs, each, strict=True))]


def _spanned(cell: Mapping[str, str]) -> str:
    return f"{cell['text']} ({cell['span']})" if cell["span"] else cell["text"]


def _bases(view: View) -> list[str]:
    return [b["name"] for b in view.plan["bases"] if b["family"] == view.family]


def _seeds(view: View) -> str:
    """Say what :func:`_mean` puts in brackets."""
    return " and, in brackets, each seed" if len(view.plan["seeds"]) > 1 else ""


def _mean(rates: Sequence[float]) -> str:
    """Return a mean of rates and, where they differ, each of them: ``20 % (0, 12, 49)``."""
    if len(set(rates)) < 2:
        return percent(rates[0]) if rates else "-"
    return f"{percent(fmean(rates))} ({', '.join(percent(rate).removesuffix(' %') for rate in rates)})"


def _breaks(view: View) -> list[str]:
    """Return the steps to break: over all runs and, where there are several, base by base and seed by seed."""
    titles, names = [d["title"] for d in view.defences], [d["name"] for d in view.defences]
    if not (broken := view.break_table()):
        return []
    keys = ("defence", "attack", "metric")
    found = {tuple(b[k] for k in keys): b for b in view.summary["breaks"] if b["family"] == view.family}
    pooled, single, seeds = [], [], view.plan["seeds"]
    for row in broken:
        each = [found.get((name, *row["of"]), {}) for name in names]
        pooled.append([row["attack"], row["what"], *map(_broke, each)])
        single += [[row["attack"], row["what"], base, *(_steps(b, base, seeds) for b in each)] for base in _bases(view)]
    out = ["**Steps to break**", "", *table_lines(["attack", "broken when", *titles], pooled)]
    if len(seeds) * len(_bases(view)) > 1:
        signs = '"-": not within the attack; "?": not measured'
        out += ["**Steps to break, run by run**", "", f"Seeds {', '.join(map(str, seeds))}; {signs}.", ""]
        out += table_lines(["attack", "broken when", "base", *titles], single)
    return out


def _broke(entry: Mapping[str, Any]) -> str:
    """Return the range of steps to break and, where runs differ, their median: ``10 to 50, median 25``."""
    text = str(entry.get("text", "-"))
    median = "not within it" if entry.get("median") is None else entry["median"]
    return f"{text}, median {median}" if len({run["step"] for run in entry.get("runs", ())}) > 1 else text


def _steps(entry: Mapping[str, Any], base: str, seeds: Sequence[int]) -> str:
    """Return the step at which each seed broke on a base: ``25, -, ?`` where one never did and one was not measured."""
    found = {
        r["seed"]: "-" if r["step"] is None else str(r["step"]) for r in entry.get("runs", ()) if r["base"] == base
    }
    return ", ".join(found.get(seed, "?") for seed in seeds) if found else "?"


def _compared(view: View) -> list[str]:
    """Return how the headline's defence differs from each of its controls, where the headline looks."""
    titles = {d["name"]: d["title"] for d in view.defences}
    found = [d for d in view.summary["differences"] if d["family"] == view.family and at_headline(view.headline, d)]
    if not found:
        return []
    attack = next(a["title"] for a in view.attacks if a["name"] == view.headline["attack"])
    what = f"{view.titles[view.headline['metric']]}, step {view.headline['step']} of {attack}"
    heads = [
        "against",
        "points",
        "95 % interval",
        *(["run by run"] if len(found[0]["per_seed"]) > 1 else []),
        "in words",
    ]
    rows = []
    for d in found:
        spans = [f"{points(d['low'])} to {points(d['high'])}", ", ".join(points(v, 0) for v in d["per_seed"])]
        rows.append([titles[d["against"]], points(d["difference"]), *spans[: len(heads) - 3], d["text"]])
    out = [f"**{_plain(titles[view.headline['defence']])}, the headline: {_plain(what)}**", ""]
    return out + table_lines(heads, rows)


def at_headline(headline: Mapping[str, Any], difference: Mapping[str, Any]) -> bool:
    """Return whether a difference is of the headline's defence, attack, metric and step; the control may be another."""
    return all(difference[k] == headline.get(k) for k in ("defence", "attack", "metric", "step"))


def by_base(view: View) -> list[tuple[str, int, str]]:
    """Return (attack, step, metric) of the rates that are shown base by base; none for a single base."""
    if len(_bases(view)) < 2 or view.ends:
        return []
    head = view.headline
    return [*([(head["attack"], head["step"], head["metric"])] if head else []), *((NO_ATTACK, 0, m) for m in BEFORE)]


def _by_base(view: View) -> list[str]:
    titles = {a["name"]: a["title"] for a in view.attacks}
    found: dict[tuple[Any, ...], list[float]] = {}
    for r in sorted(view.summary["records"], key=lambda r: int(r["seed"])):
        key = (r["family"], r["attack"], r["steps"], r["metric"], r["base"], r["defence"])
        found.setdefault(key, []).append(r["rate"])
    rows = []
    for attack, step, metric in by_base(view):
        where = f"step {step} of {titles[attack]}" if attack in titles else "before any attack"
        for base in _bases(view):
            cells = [found.get((view.family, attack, step, metric, base, d["name"]), []) for d in view.defences]
            if any(cells):
                rows.append([f"{view.titles[metric]}, {where}", base, *(_mean(cell) for cell in cells)])
    if not rows:
        return []
    out = ["**Base by base**", ""] + ([f"Means{_seeds(view)}.", ""] if len(view.plan["seeds"]) > 1 else [])
    return out + table_lines(["", "base", *(d["title"] for d in view.defences)], rows)


def _rates(view: View) -> list[str]:
    """Return the rates: before any attack, and under each attack, as curves where it was measured at several steps."""
    before: dict[str, Sequence[Mapping[str, str]]] = {}
    cells = [c for table in view.tables() for row in table["rows"] for c in row["cells"]]
    losses = " (losses: nats a token)" if any(c["count"].startswith("n = ") for c in cells) else ""
    once = ", every prompt counted once" if len(view.plan["seeds"]) > 1 else ""
    runs = " (lowest to highest run)" if any(map(_runs, cells)) else ""
    out = [f"Below: percent{losses} [95 % interval{once}]{runs}.", ""]
    for table in view.tables():
        attack = next((a for a in view.attacks if a["name"] == table["attack"]), None)
        rows = [row for row in table["rows"] if not _silent(row["metric"], table["rows"])]
        often = {row["metric"] for n, row in enumerate(rows) if row["metric"] in {r["metric"] for r in rows[:n]}}
        out += [f"**{_plain(table['title'])}**", ""]
        if attack is None:
            before = {row["metric"]: row["cells"] for row in table["rows"]}
        else:
            out += [f"{_plain(facts(attack))}.", ""]
        out += _curves(view, [row for row in rows if row["metric"] in often], before)
        single = [[f"{r['label']}{_of(r['cells'])}", *map(_rate, r["cells"])] for r in rows if r["metric"] not in often]
        out += table_lines(["", *(d["title"] for d in view.defences)], single) if single else []
    return out if cells else []


def _public(view: View) -> list[str]:
    """Return what public benchmarks said of each model."""
    if (public := public_part(view)) is None:
        return []
    rows = [[r["title"], *(_spanned(c) for c in r["cells"])] for r in public["rows"]]
    return ["**Public benchmarks, before any attack**", "", *table_lines(["", *public["heads"]], rows)]


def _silent(metric: str, rows: Iterable[Mapping[str, Any]]) -> bool:
    """Return whether a metric is not worth its lines: nobody, anywhere, refused and answered at once."""
    rates = {c["rate"] for r in rows if r["metric"] == metric for c in r["cells"]}
    return metric == "partial" and rates <= {"-", "0 %"}


def _curves(
    view: View, rows: Sequence[Mapping[str, Any]], before: Mapping[str, Sequence[Mapping[str, str]]]
) -> list[str]:
    """Return a table with a line per metric and defence and a column per step."""
    steps = sorted({row["step"] for row in rows})
    if not steps:
        return []
    found = {(row["metric"], row["step"]): row["cells"] for row in rows}
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    if steps[0] > 0 and any(metric in before for metric in metrics):
        found |= {(metric, 0): before[metric] for metric in metrics if metric in before}
        steps = [0, *steps]
    lines = []
    for metric in metrics:
        of = _of([c for (name, _), cells in found.items() if name == metric for c in cells])
        for n, d in enumerate(view.defences):
            cells = [_rate(found[metric, step][n]) if (metric, step) in found else "-" for step in steps]
            lines.append([f"{view.titles[metric]}{of}", d["title"], *cells])
    return table_lines(["", "", *(f"step {step}" if step else "before" for step in steps)], lines)


def _of(cells: Iterable[Mapping[str, str]]) -> str:
    """Say how many answers each cell is of."""
    sizes = sorted({int(c["n"]) for c in cells if c["n"]})
    return f", of {sizes[0]}" + (f" to {sizes[-1]}" if len(sizes) > 1 else "") if sizes else ""


def _rate(cell: Mapping[str, str]) -> str:
    """Return ``44 [38, 50]`` and, where there are several runs, their range: ``44 [38, 50] (40 to 48)``."""
    if not cell["span"]:
        return cell["rate"]
    rate, span = cell["rate"].removesuffix(" %"), cell["span"].removesuffix(" %").replace(" to ", ", ")
    runs = _runs(cell).removeprefix("runs ").removesuffix(" %")
    doubt = cell["count"].partition("; ")[2]  # unreliable, and why
    return " ".join(filter(None, (f"{rate} [{span}]", f"({runs})" if runs else "", doubt)))


def _runs(cell: Mapping[str, str]) -> str:
    """Return the range over runs, where there are several that differ."""
    low, _, high = cell["seeds"].removeprefix("runs ").removesuffix(" %").partition(" to ")
    return cell["seeds"] if high and low != high else ""


def _costs(view: View) -> list[str]:
    titles = {d["name"]: d["title"] for d in view.defences}
    keys = ("passes_ratio", "tokens_ratio", "ratio_to_sft")
    rows = []
    for name, title in titles.items():
        own = [c for c in view.summary["costs"] if (c["family"], c["defence"]) == (view.family, name)]
        each = [[c[key] for c in own if c.get(key)] for key in keys]
        if any(each):
            rows.append([title, *map(_ratio, each)])
    reference = titles.get(view.plan.get("reference", ""), "the reference")
    heads = [f"cost, as a ratio to {reference}", "passes", "tokens", "wall time"]
    note = [_plain(view.lanes()), ""] if view.lanes() else []
    return [*table_lines(heads, rows), *note] if rows else []


def _ratio(each: Sequence[float]) -> str:
    """Return a mean and, where runs differ, their range."""
    low, high = (f"{end(each):.2f}" if each else "" for end in (min, max))
    return f"{fmean(each):.2f}" + (f" ({low} to {high})" if low != high else "") if each else "-"


def table_lines(heads: Sequence[str], rows: Rows) -> list[str]:
    """Return a table in Markdown, and an empty line behind it."""
    lines = [heads, ["---"] * len(heads), *rows]
    return [*(f"| {' | '.join(_plain(cell) for cell in line)} |" for line in lines), ""]


def _plain(text: Any) -> str:
    """Return text that Markdown takes literally, on one line."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")
