"""Run folders of single verbs as a summary, so that ``casehard report`` shows them on the page of a benchmark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from casehard.bench.contrasts import make_differences
from casehard.bench.plan import Gates, Plan, parse_plan
from casehard.bench.records import NO_ATTACK, Measured, Point, make_breaks, make_records, pool, told
from casehard.bench.store import read_json, read_rows
from casehard.bench.summary import cost_records, not_tested
from casehard.bench.verdict import Table, make_controls, make_verdict
from casehard.config import digest, to_dict
from casehard.errors import ConfigError, UserError

FAMILY = "checkpoints"
KINDS = ("attack", "evaluate", "defend")


class _Collected:
    """What several run folders hold, sorted by checkpoint and attack."""

    def __init__(self) -> None:
        self.points: dict[Point, Measured] = {}
        self.titles: dict[str, str] = {}
        self.attacks: dict[str, dict[str, Any]] = {}
        self.costs: list[dict[str, Any]] = []
        self.nodes: list[dict[str, Any]] = []
        self.seeds: list[int] = []
        self.limits: dict[str, int] = {}
        """Run folder -> most prompts a group that were asked, of runs that left some out."""
        self.data: dict[str, str] = {}
        self.models: dict[str, str] = {}
        self.methods: dict[str, str] = {}
        self.spent: list[tuple[str, int, Mapping[str, Any]]] = []
        """(checkpoint digest, seed, cost) of every training run."""
        self.logged: list[tuple[str, str, dict[str, float]]] = []
        """(checkpoint digest, folder name, what the method logged about its steps) of every training run."""

    @property
    def telemetry(self) -> list[dict[str, Any]]:
        """What methods logged, under the name of the checkpoint's row; of the run folder if it was never measured."""
        return [{"defence": self.models.get(made, name), "means": means} for made, name, means in self.logged]

    @property
    def looks(self) -> list[str]:
        """Say which runs asked a part of the suite only; empty if none did."""
        asked = ", ".join(f"{limit} in {name}" for name, limit in self.limits.items())
        said = f"The whole suite: at most so many prompts a group were asked (a look, not a result): {asked}."
        return [said] if asked else []

    @property
    def undefended(self) -> str:
        """Name of the undefended control, empty if there is none.

        The untouched model, or, for methods that are the alignment stage themselves, the one aligned by plain training.
        """
        for method in ("none", "plain"):
            found = [name for name, used in self.methods.items() if used == method]
            if found:
                return found[0]
        return ""

    def defence(self, run: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
        """Return the name of the checkpoint's row; two checkpoints of one method get two rows."""
        model = str(run["parents"].get("model", ""))
        if model in self.models:
            return self.models[model]
        records = summary.get("records") or [{}]
        method = str(records[0].get("defence") or "none")
        name = "undefended" if method == "none" else method.lower()
        if name in self.titles:
            name = f"{name}-{model[:8] or len(self.titles)}"
        self.models[model] = name
        self.titles[name] = name
        self.methods[name] = method.lower()
        return name

    def attack(self, config: Mapping[str, Any]) -> str:
        """Return the name of the attack's column; runs that differ only in model and seed share it."""
        settings = {k: v for k, v in config["config"].items() if k != "evaluate_at"}
        suite = {k: config.get(k) for k in ("harmful", "benign", "suite", "system", "limit")}
        key = digest({**settings, **suite})
        if key not in self.attacks:
            mode = "LoRA" if settings["mode"] == "lora" else "full-parameter"
            title = f"{mode} fine-tuning, {settings['share'] * 100:g} % harmful, lr {settings['lr']:g}"
            named = ("mode", "share", "steps", "lr")
            extra = {k: v for k, v in settings.items() if k not in named}
            self.attacks[key] = {"name": f"attack-{len(self.attacks) + 1}", "title": title, "settings": extra}
            self.attacks[key] |= {k: settings[k] for k in named}
        return str(self.attacks[key]["name"])

    def add(self, place: Path) -> None:
        run = read_json(place / "run.json")
        kind, config = run.get("kind"), run.get("config", {})
        if kind not in KINDS:
            hint = "a report needs a run of bench, demo, attack finetune, evaluate or defend"
            if kind == "backdoor":
                hint = "a backdoor is reported beside its controls: a plan with `stage: backdoor`, see casehard bench"
            raise UserError(f"{place} holds a run of {kind!r}", hint=hint)
        if run.get("status") != "ok":
            raise UserError(f"{place}: the run is {run.get('status')!r}, not finished", hint="finish it first")
        summary = read_json(place / "summary.json")
        self.seeds += [s for s in run["seeds"] if s not in self.seeds]
        self.data |= run.get("data", {})
        parent = str(run["parents"].get("model", ""))
        entry = {"label": f"{kind} {place.name}", "kind": kind, "node": run["config_digest"], "parent": parent}
        made = str((summary.get("checkpoint") or {}).get("digest", ""))
        self.nodes.append({**entry, "result": made})
        if kind == "defend":
            self.spent.append((made, int((run["seeds"] or [0])[0]), summary.get("cost") or {}))
            events = read_rows(place / "events.jsonl") if (place / "events.jsonl").is_file() else iter(())
            if means := told(row for row in events if row.get("event") == "log"):
                self.logged.append((made, place.name, means))
            return
        if config.get("limit"):
            self.limits[place.name] = int(config["limit"])
        defence, seed = self.defence(run, summary), int((run["seeds"] or [0])[0])
        attack = self.attack(config) if kind == "attack" else NO_ATTACK
        by_step: dict[int, list[dict[str, Any]]] = {}
        for row in read_rows(place / "rows.jsonl"):
            by_step.setdefault(int(row.pop("step", 0)), []).append(row)
        name = digest({"run": run["config_digest"], "model": parent})
        for step, rows in by_step.items():
            self.points[Point(FAMILY, "checkpoint", defence, seed, attack, step)] = Measured(name, rows)

    def fill(self) -> None:
        """Give every checkpoint and seed its state before any attack: an evaluation's, or else an attack's step 0.

        Greedy evaluation draws nothing, so one evaluation serves all seeds of a checkpoint. Costs come from the
        training runs of checkpoints that were also measured.
        """
        named = [(self.models[made], seed, cost) for made, seed, cost in self.spent if made in self.models]
        spent = {("checkpoint", name, seed): cost for name, seed, cost in named}
        plain = next((name for name, method in self.methods.items() if method == "plain"), "")
        self.costs = cost_records(spent, {"checkpoint": FAMILY}, plain)
        asked = {p.defence: m for p, m in self.points.items() if p.attack == NO_ATTACK}
        for point, found in list(self.points.items()):
            before = point._replace(attack=NO_ATTACK)
            if point.step == 0 and before not in self.points:
                self.points[before] = asked.get(point.defence, found)


def _plan(found: _Collected) -> Plan | None:
    """Return the plan these runs amount to; None when they hold no comparison."""
    base = found.undefended
    others = [name for name in found.titles if name != base]
    if not base or not others or not found.attacks:
        return None
    attacks = []
    for attack in found.attacks.values():
        steps = {p.step for p in found.points if p.attack == attack["name"] and p.step > 0}
        attacks.append({**attack, "evaluate_at": sorted(steps), "harmful": ["-"], "benign": ["-"]})
    methods = found.methods
    rows = [{"name": n, "role": "defence", "method": methods[n], "data": ["-"]} for n in others]
    trained = {"method": "plain", "data": ["-"]} if methods[base] == "plain" else {}
    plain = next((n for n in found.titles if methods[n] == "plain"), others[-1])
    try:
        return parse_plan(
            {
                "name": "runs",
                "title": f"Run folders: {', '.join(found.titles)}",
                "bases": [{"name": "checkpoint", "model": ".", "family": FAMILY}],
                "defences": [{"name": base, "role": "undefended", **trained}, *rows],
                "attacks": attacks,
                "seeds": sorted(found.seeds),
                "reference": plain,
                "headline": {"defence": others[-1], "against": base, "metric": _metric(found)},
            }
        )
    except ConfigError:
        return None


def _metric(found: _Collected) -> str:
    """Return leak where a judge could see it, ASR otherwise."""
    rows: Iterable[Mapping[str, Any]] = (row for _, some in found.points.values() for row in some)
    return "leak" if any(row.get("slots_right") is not None for row in rows) else "asr"


def _loose_plan(found: _Collected) -> dict[str, Any]:
    """Return the shape of a plan for runs that cannot be compared."""
    roles = {n: "undefended" if n == found.undefended else "defence" for n in found.titles}
    return {
        "name": "runs",
        "title": f"Run folders: {', '.join(found.titles) or 'training only'}",
        "bases": [{"name": "checkpoint", "model": ".", "family": FAMILY}],
        "defences": [{"name": n, "title": t, "role": roles[n]} for n, t in found.titles.items()],
        "attacks": list(found.attacks.values()),
        "seeds": sorted(found.seeds),
        "gates": asdict(Gates()),
        "headline": None,
        "transcripts": 0,
    }


def summary_of_runs(folders: Sequence[Path]) -> dict[str, Any]:
    """Return the summary of one or several finished run folders of single verbs.

    With an attack on an undefended checkpoint and the same attack on a hardened one there is a verdict; otherwise the
    page shows what was measured and says that nothing follows from it.

    Raises:
        UserError: not a run folder, not finished, or of a kind without rows.
    """
    found = _Collected()
    for folder in folders:
        found.add(Path(folder))
    found.fill()
    plan = _plan(found)
    records = make_records({a["name"]: a["share"] for a in found.attacks.values()}, found.points)
    pooled, breaks = pool(records), make_breaks(records, Gates())
    differences = make_differences(plan, found.points) if plan else []
    if plan:
        verdict = make_verdict(plan, FAMILY, pooled, breaks, differences)
        controls = make_controls(plan, Table(pooled, FAMILY), FAMILY)
        missing = not_tested(plan)
        if plan.undefended.method:
            aligned = f"The undefended control is {plan.undefended.title}: the model aligned by plain training."
            verdict["details"] = [*verdict["details"], aligned]
        if verdict["status"] == "not_measured":
            hint = "Add the run folders of `casehard evaluate` for both checkpoints: safety alone is no claim."
            verdict["details"] = [*verdict["details"], hint]
    else:
        what = "a single run" if len(folders) == 1 else "these runs"
        lacks = "without the same attack on an undefended checkpoint cannot show a difference"
        sentence = f"No claim: {what} {lacks}."
        verdict = {"family": FAMILY, "status": "not_measured", "sentence": sentence, "details": []}
        controls, missing = [], ["Everything that needs a control: nothing on this page is a comparison."]
    verdict["details"], missing = [*verdict["details"], *found.looks], [*missing, *found.looks]
    last = read_json(Path(folders[-1]) / "run.json")
    return {
        "kind": "runs",
        "plan": to_dict(plan) if plan else _loose_plan(found),
        "verdict": verdict,
        "verdicts": [verdict],
        "records": records,
        "pooled": pooled,
        "costs": found.costs,
        "breaks": breaks,
        "differences": differences,
        "telemetry": found.telemetry,
        "controls": controls,
        "failed": [],
        "not_tested": missing,
        "nodes": found.nodes,
        "provenance": {
            **{key: last[key] for key in ("code", "packages", "hardware")},
            "data": found.data,
            "seeds": sorted(found.seeds),
            "config_digest": digest([n["node"] for n in found.nodes]),
        },
    }
