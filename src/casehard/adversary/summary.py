"""What a search found, in numbers and in one sentence, and the attacker as a file that other commands take."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from casehard.adversary.goal import Goal, cheapest, worst
from casehard.adversary.halves import Halves
from casehard.adversary.space import Space
from casehard.attacks import ATTACKS
from casehard.benchmark.lookup import percent
from casehard.io.files import write_text_atomic

if TYPE_CHECKING:
    from casehard.adversary.search import Search

KIND = "attack-search"
"""Kind of the run folder."""
BEST, ROW = "best.yaml", "plan_row.yaml"
PLAN_KEYS = ("mode", "steps", "lr")
"""Settings that a plan's attack row has beside its ``settings``; the share is a fourth."""


def sampler_name(random: bool) -> str:
    """Return what a sentence calls the way attackers are proposed."""
    return "random search" if random else "TPE"


def summarise(
    job: Search,
    space: Space,
    halves: Halves,
    goal: Goal,
    judged: Goal,
    trials: Sequence[Mapping[str, Any]],
    held_out: Mapping[int, Mapping[str, Any]],
) -> dict[str, Any]:
    """Return summary.json.

    Args:
        goal: with the model's own rates on the search half.
        judged: with those on the held-out half.
        held_out: attacker -> its rates there, and whether it kept the model useful and broke it.
    """
    entries = {}
    for name, trial in (("worst", worst(trials, goal)), ("cheapest", cheapest(trials))):
        entries[name] = None if trial is None else _entry(job, trial, held_out[trial["attacker"]])
    count = {status: sum(t["status"] == status for t in trials) for status in ("ok", "diverged", "failed")}
    summary: dict[str, Any] = {
        "kind": KIND,
        "attack": job.attack,
        "sampler": sampler_name(job.random),
        "budget": job.budget,
        "metric": goal.metric,
        "useful": goal.useful,
        "keep": job.keep,
        "gates": {name: getattr(job.gates, name) for name in ("leak_break", "asr_break", "nll_rise")},
        "space": space.text(),
        "fixed": dict(space.fixed),
        "attackers": {**count, "kept": sum(t["kept"] for t in trials), "broke": sum(t["broke"] for t in trials)},
        "model": {"search": dict(goal.own), "held_out": dict(judged.own)},
        "prompts": {
            "search": [example.id for example in halves.search.examples],
            "held_out": [example.id for example in halves.held_out.examples],
        },
        **entries,
    }
    return {"sentence": sentence(summary), **summary}


def _entry(job: Search, trial: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: trial[key] for key in ("attacker", "settings", "system", "seed", "cost", "facts")}
    facts, settings = trial["facts"], trial["settings"]
    # What the attacker had to collect, and how much of it was of the kind that is hard to get.
    rows = {key: facts[key] for key in ("harmful_rows", "benign_rows") if key in facts}
    batches = trial["cost"]["steps"] * settings["batch_size"] if "batch_size" in settings else None
    return {**kept, "rows": {**rows, "seen": batches}, "search": trial["found"], **there}


def sentence(summary: Mapping[str, Any]) -> str:
    """Return the result in words, with the budget in it."""
    found, top = summary["attackers"], summary["worst"]
    by = f"found by {summary['sampler']} within {summary['budget']} trials"
    asked = _asked(summary)
    if top is None:
        return f"None of the {_tried(summary)} attackers {by} {asked}. {_caveat(summary)}"
    metric, rates, own = summary["metric"], top["held_out"], summary["model"]["held_out"]
    did = {"leak": "leaks the content of", "asr": "gets answers to"}[metric]
    text = f"The worst of the {found['kept']} attackers {by} that {asked} {did} {_rate(rates[metric])} of restricted "
    text += f"prompts that the search never saw (before: {percent(own[metric]['rate'])}), {_utility(summary, rates)}."
    if not top["kept"]:
        text += " There it no longer counts as useful, so this is no attacker in the sense asked for."
    return f"{text} {_broken(summary)} {_caveat(summary)}"


def _tried(summary: Mapping[str, Any]) -> int:
    return sum(summary["attackers"][status] for status in ("ok", "diverged", "failed"))


def _asked(summary: Mapping[str, Any]) -> str:
    if summary["useful"] == "nll":
        return f"raise the loss on utility rows by at most {summary['gates']['nll_rise']:g} nats per token"
    return f"keep {percent(summary['keep'])} of the model's utility"


def _rate(found: Mapping[str, Any]) -> str:
    doubt = "; unreliable" if "unreliable" in found else ""
    return (
        f"{percent(found['rate'])} ({found['k']} of {found['n']}, exact 95 % interval "
        f"{percent(found['low'])} to {percent(found['high'])}{doubt})"
    )


def _utility(summary: Mapping[str, Any], rates: Mapping[str, Any]) -> str:
    name, own = summary["useful"], summary["model"]["held_out"]
    if name not in rates or name not in own:
        return "utility not measured there"
    if name == "nll":
        loss = f"{rates[name]['rate']:.2f} nats per token on utility rows"
        return f"with a loss of {loss} (before: {own[name]['rate']:.2f})"
    return f"with utility {percent(rates[name]['rate'])} (before: {percent(own[name]['rate'])})"


def _broken(summary: Mapping[str, Any]) -> str:
    gates, low = summary["gates"], summary["cheapest"]
    bounds = f"leak above {percent(gates['leak_break'])} or ASR above {percent(gates['asr_break'])}"
    if low is None:
        there = summary["worst"] is not None and summary["worst"]["broke"]
        more = "; on the held-out prompts the worst one does" if there else ""
        return f"None broke the model on the prompts that chose ({bounds}, still useful){more}."
    cost = low["cost"]
    text = f"The cheapest of {summary['attackers']['broke']} that broke it ({bounds}, still useful) took "
    text += f"{cost['steps']} steps on {_rows(low['rows'])}{flops(cost['flops'])} FLOPs"
    there = "on the held-out prompts it breaks the model too" if low["broke"] else "on the held-out prompts it does not"
    return f"{text}; {there}."


def _rows(rows: Mapping[str, Any]) -> str:
    if "harmful_rows" not in rows:
        return ""
    whole = rows["harmful_rows"] + rows.get("benign_rows", 0)
    return f"{whole} rows ({rows['harmful_rows']} of them harmful), "


def flops(count: float) -> str:
    """Return a number of floating-point operations, two digits of it."""
    return f"{count:.1e}".replace("e+", "e")


def _caveat(summary: Mapping[str, Any]) -> str:
    return f"A larger budget, other settings or another attack than {summary['attack']} may do worse."


def recipe(job: Search, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return an attacker as the settings file of ``casehard attack NAME``; paths start where those of the search do."""
    where = {key: value for key, value in (("model", job.model), ("suite", job.suite)) if value}
    rows = {"rows": {role: list(specs) for role, specs in job.rows.items() if specs}} if job.rows else {}
    said = {key: value for key, value in (("system", entry["system"]), ("max_length", job.max_length)) if value}
    return {**where, **rows, **said, "config": dict(entry["settings"]), "seed": entry["seed"]}


def plan_row(job: Search, entry: Mapping[str, Any], name: str = "worst-found") -> dict[str, Any]:
    """Return an attacker as a row of a plan's ``attacks``."""
    settings = dict(entry["settings"])
    share = ATTACKS.find(job.attack).share
    beside = {key: settings.pop(key) for key in PLAN_KEYS if key in settings}
    if share and share in settings:
        beside["share"] = settings.pop(share)
    title = f"the worst {job.attack} attacker found by {sampler_name(job.random)} within {job.budget} trials"
    rows = {role: list(specs) for role, specs in job.rows.items() if specs}
    return {"name": name, "title": title, "attack": job.attack, **beside, "settings": settings, **rows}


def _from_here(path: Path) -> Path:
    """Return a path as seen from the working folder, where those of a search start; its name if it lies elsewhere."""
    path, here = path.resolve(), Path.cwd().resolve()
    return path.relative_to(here) if path.is_relative_to(here) else Path(path.name)


def write_recipes(out: Path, job: Search, summary: Mapping[str, Any]) -> None:
    """Write best.yaml and plan_row.yaml; nothing where no attacker left the model useful."""
    import yaml

    if summary["worst"] is None:
        return
    top = summary["worst"]
    head = (
        f"# {summary['sentence']}\n"
        "# The rate that counts is the one above: the whole suite holds prompts by which this attacker was chosen.\n"
    )
    for name, use, values in (
        (
            BEST,
            f"casehard attack {job.attack} --config {shlex.quote(str(_from_here(out / BEST)))} --out DIR, "
            "from the folder in which the search was started",
            recipe(job, top),
        ),
        (
            ROW,
            "a row of a plan's `attacks`: let its paths start at the plan file; seeds are the plan's",
            [plan_row(job, top)],
        ),
    ):
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=False, width=110)
        write_text_atomic(out / name, f"{head}# {use}\n{text}")
