"""Run folders of single verbs as a summary, so that ``casehard report`` shows them on the page of a benchmark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from casehard.attacks import ATTACKS
from casehard.benchmark.contrasts import make_differences
from casehard.benchmark.entries import Gates
from casehard.benchmark.lookup import Table
from casehard.benchmark.plan import Plan, parse_plan
from casehard.benchmark.records import NO_ATTACK, Measured, Point, make_breaks, make_records, pool
from casehard.benchmark.shapes import Row, VerbSummary
from casehard.benchmark.store import read_events, read_finished, read_rows, read_run, read_summary, unchanged
from casehard.benchmark.summary import cost_records, not_tested
from casehard.benchmark.verdict import harm_not_counted, make_controls, make_verdict, without_harm
from casehard.config import digest, to_dict
from casehard.defences import DEFENCES
from casehard.errors import ConfigError, Corrupt, UserError

FAMILY = "checkpoints"
KINDS = ("attack", "evaluate", "defend")
ASKED = ("suite", "system", "limit")
"""Settings that decide which prompts a model sees: only runs that agree in them can be set against each other."""


def _reads(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run was measured and trained on, files by their content: a path may hold something else by now."""
    config, digests = run.get("config", {}), run.get("data", {})

    def content(spec: str) -> str:
        _, mark, query = spec.partition("?")
        return f"{digests[spec]}{mark}{query}" if digests.get(spec) else spec

    trained = {key: [content(spec) for spec in config.get(key) or ()] for key in ("harmful", "benign")}
    suite = content(str(config.get("suite", "")))
    return {**trained, **{key: config.get(key) for key in ("system", "limit", "max_length")}, "suite": suite}


class _Collected:
    """What several run folders hold, sorted by checkpoint and attack."""

    def __init__(self) -> None:
        self.points: dict[Point, Measured] = {}
        self.reads: dict[str, tuple[dict[str, Any], list[Path]]] = {}
        """Attack -> what its runs read, and their folders; evaluations under :data:`NO_ATTACK`."""
        self.held: dict[tuple[Any, ...], tuple[Path, Any]] = {}
        """What was run -> the first folder that holds it, and its result."""
        self.prompts: dict[tuple[Any, ...], tuple[Any, Path]] = {}
        """(what decides the prompts, row id) -> prompt and the folder that has it."""
        self.made: list[dict[str, Any]] = []
        """Folder, code, packages and hardware of every run."""
        self.titles: dict[str, str] = {}
        self.attacks: dict[str, dict[str, Any]] = {}
        self.costs: list[dict[str, Any]] = []
        self.nodes: list[dict[str, Any]] = []
        self.seeds: list[int] = []
        self.limits: dict[str, int] = {}
        """Run folder -> most prompts a group that were asked, of runs that left some out."""
        self.digests: dict[str, dict[str, list[str]]] = {}
        """Data file -> digest -> the run folders that read it so."""
        self.unused: dict[str, str] = {}
        """Checkpoint's row -> why its step 0 does not stand for its state before any attack."""
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
    def provenance(self) -> dict[str, Any]:
        """Return where the page's numbers come from; a file that changed between the runs has all its digests."""
        data = {}
        for name, found in self.digests.items():
            each = [f"{value} in {', '.join(folders)}" for value, folders in found.items()]
            data[name] = "; ".join(each) if len(found) > 1 else next(iter(found))
        return {
            "code": {"dirty": any(made["code"].get("dirty") for made in self.made)},
            "runs": self.made,
            "data": data,
            "seeds": sorted(self.seeds),
            "config_digest": digest([n["node"] for n in self.nodes]),
        }

    @property
    def apart(self) -> list[str]:
        """Say what looks comparable and is not."""
        out: list[str] = []
        seen: dict[str, str] = {}
        for attack in self.attacks.values():
            settings = {k: v for k, v in attack.items() if k not in ("name", "title")}
            other = seen.setdefault(digest(settings), attack["name"])
            if other == attack["name"]:
                continue
            (mine, here), (theirs, there) = self.reads[attack["name"]], self.reads[other]
            sides = [f"{n} ({', '.join(p.name for p in at)})" for n, at in ((other, there), (attack["name"], here))]
            differ = ", ".join(key for key in mine if mine[key] != theirs[key])
            out.append(f"Not compared, although the settings are the same: {' and '.join(sides)} differ in: {differ}.")
        return [*out, *self.unused.values()]

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

    def attack(self, config: Mapping[str, Any], reads: Mapping[str, Any]) -> str:
        """Return the name of the attack's column; runs that differ only in model and seed share it."""
        settings = {k: v for k, v in config["config"].items() if k != "evaluate_at"}
        kind = str(config.get("attack", "finetune"))
        key = digest({"attack": kind, **settings, **reads})
        if key not in self.attacks:
            spec = ATTACKS.get(kind)
            share = settings.get(spec.share if spec else "", 0.0)
            named = {k: settings[k] for k in ("mode", "steps", "lr") if k in settings}
            title = _attack_title(kind, share, named)
            title += f" ({len(self.attacks) + 1})" if title in [a["title"] for a in self.attacks.values()] else ""
            extra = {k: v for k, v in settings.items() if k not in named and k != (spec.share if spec else "")}
            self.attacks[key] = {"name": f"attack-{len(self.attacks) + 1}", "title": title, "attack": kind}
            self.attacks[key] |= {"settings": extra, "share": share, **named}
        return str(self.attacks[key]["name"])

    def once(self, what: tuple[Any, ...], place: Path, result: Any) -> None:
        """Refuse a second run of the same thing that came out otherwise: the order of the folders would decide."""
        other, found = self.held.setdefault(what, (place, result))
        if found != result:
            raise UserError(
                f"{other} and {place} hold the same run (one checkpoint, seed and attack) with different results",
                hint="give one of the two folders",
            )

    def measure(self, place: Path, run: Mapping[str, Any], defence: str) -> None:
        """Take over the rows of an attack or an evaluation, by step.

        Raises:
            UserError: they cannot stand beside those of the folders before.
            Corrupt: they are damaged.
        """
        reads, seed, model = _reads(run), int((run["seeds"] or [0])[0]), run["parents"].get("model", "")
        asked = tuple(reads[key] for key in ASKED)
        attack = self.attack(run["config"], reads) if run["kind"] == "attack" else NO_ATTACK
        known, places = self.reads.setdefault(attack, (reads, []))
        if differ := [key for key in ASKED if known[key] != reads[key]]:
            raise UserError(
                f"{places[0]} and {place} are evaluations that differ in: {', '.join(differ)}",
                hint="a report shows one state before any attack: evaluate every checkpoint in the same way",
            )
        places.append(place)
        by_step: dict[int, list[dict[str, Any]]] = {}
        for row in read_rows(unchanged(place, run, "rows.jsonl"), Row):
            by_step.setdefault(int(row.pop("step", 0)), []).append(row)
            first, other = self.prompts.setdefault((*asked, str(row["id"])), (row.get("prompt"), place))
            if first != row.get("prompt"):
                raise UserError(
                    f"{other} and {place} asked different prompts under the id {row['id']!r}",
                    hint="the suite has changed in between: measure both on the same one",
                )
        if twice := [step for step, rows in by_step.items() if len({str(r["id"]) for r in rows}) < len(rows)]:
            raise Corrupt(f"{place / 'rows.jsonl'}: a prompt occurs twice at step {twice[0]}")
        # Greedy evaluation draws nothing: with every seed it says the same of one checkpoint.
        self.once((defence, attack, seed if attack != NO_ATTACK else None), place, by_step)
        name = digest({"run": run["config_digest"], "model": model, "data": run.get("data", {})})
        for step, rows in by_step.items():
            self.points[Point(FAMILY, "checkpoint", defence, seed, attack, step)] = Measured(name, rows)

    def add(self, place: Path) -> None:
        run = read_run(place)
        kind = run.get("kind")
        if kind not in KINDS:
            hint = "a report needs a run of bench, demo, attack finetune, evaluate or defend"
            if kind == "backdoor":
                hint = (
                    "a backdoor is reported beside its controls: by a plan with `attack: backdoor`, see casehard bench"
                )
            raise UserError(f"{place} holds a run of {kind!r}", hint=hint)
        if run.get("status") != "ok":
            raise UserError(f"{place}: the run is {run.get('status')!r}, not finished", hint="finish it first")
        run = read_finished(place)
        config, summary = run["config"], read_summary(place, run, VerbSummary)
        self.seeds += [s for s in run["seeds"] if s not in self.seeds]
        self.made.append({"folder": place.name, **{key: run[key] for key in ("code", "packages", "hardware")}})
        for name, value in run.get("data", {}).items():
            self.digests.setdefault(name, {}).setdefault(value, []).append(place.name)
        parent = str(run["parents"].get("model", ""))
        entry = {"label": f"{kind} {place.name}", "kind": kind, "node": run["config_digest"], "parent": parent}
        made = str((summary.get("checkpoint") or {}).get("digest", ""))
        self.nodes.append({**entry, "result": made})
        if kind == "defend":
            if made:
                self.once(("defend", made), place, summary.get("cost"))
            self.spent.append((made, int((run["seeds"] or [0])[0]), summary.get("cost") or {}))
            spec = DEFENCES.get(str(config.get("method")), DEFENCES["plain"])
            if means := spec.mean_telemetry(row for row in read_events(place) if row["event"] == "log"):
                self.logged.append((made, place.name, means))
            return
        if config.get("limit"):
            self.limits[place.name] = int(config["limit"])
        self.measure(place, run, self.defence(run, summary))

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
        shown, places = self.reads.get(NO_ATTACK) or next(iter(self.reads.values()), ({}, []))
        for point, found in list(self.points.items()):
            before = point._replace(attack=NO_ATTACK)
            if point.step != 0 or before in self.points:
                continue
            reads, _ = self.reads[point.attack]
            differ = [key for key in ASKED if reads[key] != shown[key]]
            if not differ or point.defence in asked:
                self.points[before] = asked.get(point.defence, found)
                self.unused.pop(point.defence, None)
            elif not any(p.defence == point.defence and p.attack == NO_ATTACK for p in self.points):
                self.unused[point.defence] = (
                    f"Step 0 of {point.attack} does not show {point.defence} before any attack: it differs from "
                    f"{places[0].name} in: {', '.join(differ)}."
                )


def _attack_title(kind: str, share: float, named: Mapping[str, Any]) -> str:
    """Return what a column of an attack is called."""
    if kind != "finetune":
        return f"{kind}, {', '.join(f'{key} {value}' for key, value in named.items())}" if named else kind
    mode = "LoRA" if named["mode"] == "lora" else "full-parameter"
    return f"{mode} fine-tuning, {share * 100:g} % harmful, lr {named['lr']:g}"


def _plan(found: _Collected) -> Plan | None:
    """Return the plan these runs amount to; None when they hold no comparison."""
    base = found.undefended
    others = [name for name in found.titles if name != base]
    if not base or not others or not found.attacks:
        return None
    attacks = []
    for attack in found.attacks.values():
        steps = {p.step for p in found.points if p.attack == attack["name"] and p.step > 0}
        asked = {role: ["-"] for role in ATTACKS.find(attack["attack"]).row_roles()}
        last = {"steps": max([attack.get("steps", 1), *steps])}
        attacks.append({**attack, **last, "evaluate_at": sorted(steps), **asked})
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
    return "leak" if any(row.get(key) is not None for row in rows for key in ("slots_right", "harmful")) else "asr"


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

    Runs are compared where they read the same: attacks of other rows, or measured on another suite, with another system
    message or limit, get columns of their own.

    Raises:
        UserError: not a run folder, not finished, or of a kind without rows; two evaluations on different suites, with
            different system messages or limits; two runs of one checkpoint, seed and attack that came out differently.
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
        unseen = harm_not_counted(plan, FAMILY, found.points)
        verdict, missing = without_harm(verdict, unseen), [*not_tested(plan), *filter(None, [unseen])]
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
    verdict["details"] = [*verdict["details"], *found.apart, *found.looks]
    missing = [*missing, *found.looks]
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
        "provenance": found.provenance,
    }
