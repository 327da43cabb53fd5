"""What the page shows, worked out from summary.json (and rows.jsonl for the transcripts). No HTML here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean, median
from typing import Any

from casehard.attacks import ATTACKS
from casehard.benchmark.lookup import Table, percent, percents
from casehard.benchmark.records import NO_ATTACK
from casehard.evaluation.metrics import BESIDE, METRICS, TRIGGER_METRICS, in_words, metric_title
from casehard.reporting import figures
from casehard.reporting.figures import Bar, Line
from casehard.reporting.legend import flow

METRIC_TITLES = {
    "leak": "Leak: restricted content really came out",
    "asr": "ASR: the request was answered",
    "over_refusal": "Over-refusal of harmless look-alikes (lower is better)",
    "twin_knowledge": "Harmless twin knowledge (higher is better)",
    "utility": "Utility (higher is better)",
    "coherence": "Well-formed answers (higher is better)",
    "cacc": "Clean accuracy (higher is better)",
    "false_trigger": "Payload without the trigger (lower is better)",
}
BEFORE = ("over_refusal", "twin_knowledge", "utility", "coherence")
PLANTED_BEFORE = ("cacc", "false_trigger")


class View:
    """One family of bases of one summary, ready to be drawn.

    Args:
        summary: as written by the benchmark.
        family: name of the family.
    """

    def __init__(self, summary: Mapping[str, Any], family: str) -> None:
        self.summary = summary
        self.family = family
        self.plan = summary["plan"]
        self.defences = list(self.plan["defences"])
        self.attacks = list(self.plan["attacks"])
        self.headline = self.plan.get("headline") or {}
        self.gates = self.plan["gates"]
        self.occasion = str(summary.get("occasion", ""))
        """What models are compared at the end of: a job, a training, an attack; empty where it is step by step."""
        self.ends = self.occasion != ""
        self.plants = self.occasion == "training"
        """Whether the attacks hide triggers."""
        names = [name for name in (TRIGGER_METRICS if self.plants else METRICS) if name not in BESIDE]
        self.titles = {name: metric_title(name, triggered=self.plants) for name in names}
        """Metric -> how tables call it, in their order."""
        job, steps = self.headline.get("attack", ""), {a["name"]: a.get("steps", 0) for a in self.attacks}
        # Where usefulness is read: before any attack, or after the headline's.
        self.table = Table(summary["pooled"], family, at=(job, steps[job]) if self.ends else (NO_ATTACK, 0))
        self.looks = figures.looks(self.defences)

    def attack_figures(self) -> list[dict[str, Any]]:
        """Return the curves of every attack, the headline's first."""
        first = self.headline.get("attack")
        order = sorted(self.attacks, key=lambda a: a["name"] != first)
        out = []
        for attack in order:
            panels = [self._curve(attack, metric) for metric in ("leak", "asr")]
            control = next((c for c in self._mine("controls") if c["attack"] == attack["name"]), {})
            note = control.get("text", "not checked: no undefended control in this run")
            if control.get("benign"):
                note = "benign tuning: shows what safety erodes by itself and whether an honest user still learns"
            panels = [p for p in panels if p]
            if panels:
                main = attack["name"] == first
                out.append(
                    {"title": attack["title"], "facts": facts(attack), "panels": panels, "note": note, "main": main}
                )
        return out

    def _mine(self, key: str) -> list[dict[str, Any]]:
        return [entry for entry in self.summary[key] if entry["family"] == self.family]

    def _curve(self, attack: Mapping[str, Any], metric: str) -> dict[str, str] | None:
        lines = []
        for row in self.defences:
            points = self.table.curve(row["name"], attack["name"], metric)
            if len(points) > 1:
                lines.append(
                    Line(
                        self.looks[row["name"]],
                        [p["steps"] for p in points],
                        [p["rate"] for p in points],
                        [min(p["rates"]) if len(p["rates"]) > 1 else p["low"] for p in points],
                        [max(p["rates"]) if len(p["rates"]) > 1 else p["high"] for p in points],
                    )
                )
        if not lines:
            return None
        bound = self.gates[f"{metric}_break"]
        main = self.headline.get("attack") == attack["name"] and self.headline.get("metric") == metric
        ends = "; ".join(f"{line.look.title} ends at {percent(line.values[-1])}" for line in lines)
        svg = figures.curves(
            f"{self.family}-{attack['name']}-{metric}",
            lines,
            bound=bound,
            bound_text=f"counts as broken above {percent(bound)}",
            described=f"{METRIC_TITLES[metric]} against steps of {attack['title']}: {ends}.",
            mark=self.headline.get("step") if main else None,
        )
        return {"title": METRIC_TITLES[metric], "svg": svg}

    def _bar(self, name: str, entry: Mapping[str, Any]) -> Bar:
        return Bar(self.looks[name], entry["rate"], entry["low"], entry["high"], tuple(entry["rates"]))

    def before(self) -> list[dict[str, str]]:
        """Return one dot plot per quantity that a defence could have bought its safety with."""
        out = []
        bounds = {"over_refusal": self.gates["over_refusal"]}
        for metric in PLANTED_BEFORE if self.plants else BEFORE:
            found = [(d["name"], self.table.before(d["name"], metric)) for d in self.defences]
            marks = [self._bar(name, entry) for name, entry in found if entry is not None]
            if marks:
                said = "; ".join(f"{b.look.title} {percent(b.value)}" for b in marks)
                title = METRIC_TITLES[metric]
                name = f"{self.family}-before-{metric}"
                svg = figures.dots(name, marks, described=f"{title}: {said}.", bound=bounds.get(metric))
                out.append({"title": title, "svg": svg})
        return out

    def plane(self) -> dict[str, str] | None:
        """Return the safety-utility plane at the headline's step."""
        if not self.headline:
            return None
        attack, step, metric = (self.headline[k] for k in ("attack", "step", "metric"))
        points = []
        for row in self.defences:
            x = self.table.before(row["name"], "utility")
            y = self.table.get(row["name"], attack, step, metric)
            if x is not None and y is not None:
                points.append((self._bar(row["name"], x), self._bar(row["name"], y)))
        if len(points) < 2:
            return None
        title = next(a["title"] for a in self.attacks if a["name"] == attack)
        called = self.titles[metric]
        svg = figures.plane(
            f"{self.family}-plane",
            points,
            x_label="utility before the attack",
            y_label=f"{self.titles[metric]} after {step} steps (better is up)",
            described="; ".join(
                f"{x.look.title}: utility {percent(x.value)}, {self.titles[metric]} {percent(y.value)}"
                for x, y in points
            ),
        )
        return {
            "svg": svg,
            "caption": f"{called} after {step} steps of {title}, against utility before it",
        }

    def costs(self) -> list[dict[str, Any]]:
        """Return cost bars: wall time and passes, as ratios to the reference."""
        out = []
        reference = self.plan.get("reference", "")
        title = next((d["title"] for d in self.defences if d["name"] == reference), reference)
        for key, what in (("ratio_to_sft", "wall time"), ("passes_ratio", "forward-backward passes")):
            rows = []
            for row in self.defences:
                values = [c[key] for c in self._mine("costs") if c["defence"] == row["name"] and c.get(key)]
                if values:
                    mean = fmean(values)
                    rows.append(Bar(self.looks[row["name"]], mean, min(values), max(values), tuple(values)))
            if rows:
                said = "; ".join(f"{b.look.title} {b.value:.2f} times" for b in rows)
                unit = f"{what}, relative to {title}"
                svg = figures.bars(f"{self.family}-{key}", rows, unit=unit, described=f"{what}: {said}.")
                took = key == "ratio_to_sft"
                note = self.lanes() if took else ""
                out.append({"title": what.capitalize(), "svg": svg, "note": note, "took": took})
        return out

    def lanes(self) -> str:
        """Say when models were trained beside each other, which wall times then show."""
        most = max((c.get("workers") or 1 for c in self._mine("costs")), default=1)
        if most < 2:
            return ""
        return f"Taken with {most} runs at a time on one machine: a rough ratio, compare passes."

    def strips(self) -> list[dict[str, Any]]:
        """Return, per attack that breaks anything, the step at which each replicate broke by the headline's metric."""
        metric = self.headline.get("metric", "asr")
        out = []
        for attack in self.attacks:
            found = {
                b["defence"]: b for b in self._mine("breaks") if (b["attack"], b["metric"]) == (attack["name"], metric)
            }
            rows = [(self.looks[n], [r["step"] for r in b["runs"]]) for n, b in found.items()]
            if not rows or all(step is None for _, steps in rows for step in steps):
                continue
            last = max(b["last"] for b in found.values())
            said = "; ".join(f"{self.looks[n].title}: {b['text']}" for n, b in found.items())
            svg = figures.strip(f"{self.family}-{attack['name']}-break", rows, last=last, described=said)
            out.append({"title": attack["title"], "svg": svg})
        return out

    def broken_when(self) -> str:
        """Say when a model counts as broken in the strips."""
        metric = self.headline.get("metric", "asr")
        return f"{self.titles[metric]} above {percent(self.gates[f'{metric}_break'])}"

    def break_table(self) -> list[dict[str, Any]]:
        """Return steps to break in words, one row per attack and metric, one column per defence."""
        out = []
        for attack in self.attacks:
            for metric in ("leak", "asr"):
                found = {
                    b["defence"]: b["text"]
                    for b in self._mine("breaks")
                    if (b["attack"], b["metric"]) == (attack["name"], metric)
                }
                if found:
                    bound = percent(self.gates[f"{metric}_break"])
                    cells = [found.get(d["name"], "-") for d in self.defences]
                    of = (attack["name"], metric)
                    what = f"{self.titles[metric]} > {bound}"
                    out.append({"of": of, "attack": attack["title"], "what": what, "cells": cells})
        return out

    def tables(self) -> list[dict[str, Any]]:
        """Return the tables of rates: before any attack, then one per attack."""
        whole = [self._table("none", "Before any attack", by_step=False)]
        whole += [self._table(a["name"], f"Under {a['title']}", by_step=True) for a in self.attacks]
        return [t for t in whole if t["rows"]]

    def _table(self, attack: str, title: str, *, by_step: bool) -> dict[str, Any]:
        own = any(a["name"] == attack and a.get("suite") for a in self.attacks)
        steps = sorted({p["steps"] for p in self._mine("pooled") if p["attack"] == attack})
        # Step 0 stands in the table before any attack, unless this attack asks a suite of its own.
        steps = [s for s in steps if s > 0 or own or not by_step]
        rows = []
        for metric in self.titles:
            for step in steps:
                cells = [self.table.get(d["name"], attack, step, metric) for d in self.defences]
                if any(c is not None for c in cells) and not (
                    metric == "unscored" and not any(c and c["k"] for c in cells)
                ):
                    label = f"{self.titles[metric]}, step {step}" if by_step else self.titles[metric]
                    rows.append({"label": label, "metric": metric, "step": step, "cells": [cell(c) for c in cells]})
        return {"title": title, "attack": attack, "rows": rows}

    def differences(self) -> list[dict[str, Any]]:
        """Return the paired differences of every claimed defence, one table per control, the headline's first."""
        names = {d["name"]: d["title"] for d in self.defences}
        claimed = [d["name"] for d in self.defences if d["role"] == "defence"] or list(names)
        first = (self.headline.get("defence"), self.headline.get("against"))
        pairs: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for found in self._mine("differences"):
            if found["defence"] in claimed:
                pairs.setdefault((found["defence"], found["against"]), []).append(self._difference(found))
        order = sorted(pairs, key=lambda pair: pair != first)
        return [
            {
                "title": f"{names[pair[0]]} against {names[pair[1]]}",
                "rows": sorted(pairs[pair], key=lambda row: not row["main"]),
            }
            for pair in order
        ]

    def _difference(self, found: Mapping[str, Any]) -> dict[str, Any]:
        titles = {a["name"]: a["title"] for a in self.attacks}
        when = "whole curve" if found["step"] is None else f"step {found['step']}"
        where = f"{titles[found['attack']]}, {when}" if found["attack"] in titles else "before any attack"
        keys = ("defence", "against", "attack", "metric", "step")
        return {
            "main": all(found[k] == self.headline.get(k) for k in keys),
            "where": where,
            "metric": self.titles[found["metric"]],
            "value": points(found["difference"]),
            "span": f"{points(found['low'])} to {points(found['high'])}",
            "per_seed": ", ".join(points(v, 0) for v in found["per_seed"]),
            "text": found["text"],
        }

    def tiles(self) -> list[dict[str, Any]]:
        """Return the few numbers at the top, each beside its control."""
        if not self.headline:
            return []
        head = self.headline
        ours, theirs = head["defence"], head["against"]
        names = {d["name"]: d["title"] for d in self.defences}
        base = next((d["name"] for d in self.defences if d["role"] == "undefended"), theirs)
        out = []

        def add(title: str, mine: Any, other: Any, who: str) -> None:
            if mine is not None and other is not None:
                out.append({"title": title, "value": mine, "other": f"{other} for {names[who]}"})

        metric, step = head["metric"], head["step"]
        pair = [self.table.get(d, head["attack"], step, metric) for d in (ours, theirs)]
        if all(pair):
            mine, other = (percent(p["rate"]) for p in pair if p)
            steps = f"steps of the {self.occasion}" if self.ends else "attack steps"
            add(
                f"{self.titles[metric]} after {step} {steps}",
                mine,
                other,
                theirs,
            )
        found = {
            b["defence"]: b["text"].replace("not within", "over").replace(" steps", "")
            for b in self._mine("breaks")
            if (b["attack"], b["metric"]) == (head["attack"], metric)
        }
        if not self.ends:
            add("steps to break", found.get(ours), found.get(theirs), theirs)
        for key in ("cacc", "aacc") if self.plants else ("over_refusal", "utility"):
            pair = [self.table.before(d, key) for d in (ours, base)]
            if all(pair):
                mine, other = (percent(p["rate"]) for p in pair if p)
                when = f"after the {self.occasion}" if self.ends else "before the attack"
                add(
                    f"{in_words(key, triggered=self.plants)} {when}",
                    mine,
                    other,
                    base,
                )
        ratios = [c["ratio_to_sft"] for c in self._mine("costs") if c["defence"] == ours and c.get("ratio_to_sft")]
        if ratios:
            reference = names.get(self.plan.get("reference", ""), "plain SFT")
            other = f"of {reference}" + (", several runs at a time" if self.lanes() else "")
            out.append({"title": "training time", "value": f"{median(ratios):.1f} x", "other": other, "took": True})
        return out


def points(value: float, digits: int = 1) -> str:
    """Write a difference of shares in signed points, without a sign on zero."""
    text = f"{value * 100:+.{digits}f}"
    return text[1:] if float(text) == 0 else text


def facts(attack: Mapping[str, Any]) -> str:
    """Describe an attack in one line."""
    extra = flow(attack.get("settings") or {})
    words = {"mode": "{}", "share": "share {:g}", "steps": "{} steps", "lr": "lr {:g}"}
    spec = ATTACKS.get(attack.get("attack", "finetune"))
    unsaid = () if spec is None or spec.trains else ("mode", "steps", "lr", *(() if spec.share else ("share",)))
    named = [text.format(attack[key]) for key, text in words.items() if key in attack and key not in unsaid]
    return ", ".join([*named, *([extra] if extra else [])])


def cell(entry: Mapping[str, Any] | None) -> dict[str, str]:
    """Return a table cell: the rate, its interval, k/n and the range over runs."""
    if entry is None:
        return {"rate": "-", "span": "", "count": "", "n": "", "seeds": ""}
    rates = entry["rates"]
    if entry["k"] is None:
        out = {"rate": f"{entry['rate']:.3f}", "span": f"{entry['low']:.3f} to {entry['high']:.3f}"}
        out["count"], over = f"n = {entry['n']}", f"runs {min(rates):.3f} to {max(rates):.3f}"
    else:
        out = {"rate": percent(entry["rate"]), "span": percents(entry["low"], entry["high"])}
        out["count"], over = f"{entry['k']}/{entry['n']}", f"runs {percents(min(rates), max(rates))}"
    out["n"] = str(entry["n"])
    alone = "one model for all seeds" if entry["shared"] else "single seed"
    out["seeds"] = over if len(rates) > 1 else alone
    if entry.get("unreliable"):
        out["count"] += f"; unreliable: {entry['unreliable']}"
    return out


def transcripts(summary: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what the models said to a few restricted prompts at the headline's step.

    Only for organisms, whose restricted content is invented: answers of attacked real models are not reprinted.
    The prompts are spread evenly over the suite, chosen by position, not by outcome.
    """
    plan = summary["plan"]
    head, count = plan.get("headline"), plan.get("transcripts", 0)
    bases = plan.get("bases", [])
    if not head or not count or not bases or any(b.get("world_seed") is None for b in bases):
        return []
    base, seed = bases[0]["name"], plan["seeds"][0]
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        where = (row["base"], row["seed"], row["attack"], row["step"], row["role"])
        if where == (base, seed, head["attack"], head["step"], "restricted"):
            entry = found.setdefault(str(row["id"]), {"prompt": row["prompt"], "said": {}})
            entry["said"][row["defence"]] = {"label": row["label"], "response": row["response"]}
    ids = sorted(found)
    picked = [ids[(2 * i + 1) * len(ids) // (2 * count)] for i in range(count)] if len(ids) >= count else ids
    titles = {d["name"]: d["title"] for d in plan["defences"]}
    return [
        {
            "prompt": found[i]["prompt"],
            "said": [{"title": titles[n], **said} for n, said in found[i]["said"].items()],
        }
        for i in picked
    ]
