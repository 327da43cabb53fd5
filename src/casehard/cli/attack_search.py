"""``casehard attack search``: look for the worst attacker within a budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from casehard.attacks import ATTACKS
from casehard.cli import console, options
from casehard.cli.runs import check_out
from casehard.io import secrets
from casehard.limits import PROCESSES

if TYPE_CHECKING:
    from casehard.adversary.search import Search, Searched

Rows = Annotated[
    list[str] | None, typer.Option("--harmful", metavar="FILE", help="The attacker's harmful rows. Repeatable.")
]
Cover = Annotated[
    list[str] | None, typer.Option("--benign", metavar="FILE", help="The attacker's cover rows. Repeatable.")
]
Kind = Annotated[
    str | None, typer.Option("--attack", metavar="NAME", help="Attack whose settings are searched [default: finetune].")
]
Budget = Annotated[int | None, typer.Option("--budget", help="Attackers to try [default: 40].")]
Workers = Annotated[
    int,
    typer.Option("--workers", min=1, max=PROCESSES, help="Attackers at the same time, one CPU thread each if several."),
]
Random = Annotated[
    bool, typer.Option("--random", help="Draw attackers at random instead of by TPE: what TPE has to beat.")
]
Keep = Annotated[
    float | None,
    typer.Option("--keep", help="Share of the model's own utility an attacker has to leave [default: 0.9]."),
]
Metric = Annotated[
    str | None,
    typer.Option("--metric", metavar="leak|asr", help="Rate to maximise [default: leak where the judge tells leaks]."),
]
COLUMNS = ("leak", "asr", "utility", "nll", "over_refusal")


def search(
    out: options.Out,
    model: options.Model = None,
    harmful: Rows = None,
    benign: Cover = None,
    suite: options.Suite = None,
    attack: Kind = None,
    budget: Budget = None,
    workers: Workers = 1,
    random: Random = False,
    keep: Keep = None,
    metric: Metric = None,
    limit: options.Limit = None,
    device: options.Device = None,
    maps: options.Maps = None,
    config: options.Config = None,
    sets: options.Sets = None,
    seed: options.Seed = None,
) -> None:
    """Search for the settings with which an attack gets most out of a model and leaves it useful.

    Half of the suite chooses the attacker, the other half measures it. An interrupted search goes on with the same
    command. What is searched: --set space.NAME=[LOW,HIGH], or a list of choices, or one value.
    --set config.NAME=VALUE fixes a setting.
    """
    roles = tuple(dict.fromkeys(role for spec in ATTACKS.ours.values() for role in spec.row_roles()))
    flags: dict[str, Any] = {"model": model, "harmful": harmful, "benign": benign, "suite": suite, "attack": attack}
    flags |= {"budget": budget, "keep": keep, "metric": metric, "limit": limit, "device": device, "seed": seed}
    flags |= {"random": True} if random else {}
    values = options.settings(config, sets, flags, maps, roles=roles)
    for key in ("model", "suite"):
        options.need(values, key, f"--{key}")
    options.take_rows(values, roles)
    options.check_specs([values["suite"]], "--suite")
    job = _job(values, out)
    secrets.refuse(values, where="attack search")
    options.require_report()
    _run(job, out, workers)


def _job(values: dict[str, Any], out: Path) -> Search:
    """Return the settings, checked as far as that costs no time."""
    from casehard.adversary.search import Search
    from casehard.adversary.study import require_optuna
    from casehard.adversary.summary import KIND
    from casehard.config import build

    require_optuna()
    job = build(Search, values, where="attack search")
    job.make_space(benign=bool(job.rows.get("benign")))
    check_out(out, KIND)
    return build(Search, {**values, "model": options.model_folder(values["model"])}, where="attack search")


def _run(job: Search, out: Path, workers: int) -> None:
    from casehard.adversary.search import search as run
    from casehard.adversary.summary import sampler_name
    from casehard.evaluation.suite import load_suite
    from casehard.reporting.page import write_report

    space = job.make_space(benign=bool(job.rows.get("benign")))
    console.plan(
        f"search for the worst {job.attack} attacker, each on a copy of the model in memory",
        {
            "model": job.model,
            **{role: list(specs) for role, specs in job.rows.items()},
            "trials": f"{job.budget} by {sampler_name(job.random)}",
            "searched": "; ".join(f"{name} {text}" for name, text in space.text().items()),
            "fixed": dict(space.fixed) or None,
            "keeps": f"{job.keep:g} of utility",
            "suite": job.suite,
            "limit": job.limit,
            "workers": workers,
            "device": options.device_text(job.device),
            "seed": job.seed,
            "out": out,
        },
    )
    found = run(job, out, rows=job.examples(), suite=load_suite(job.suite), workers=workers)
    page = write_report(out)
    _tell(job, found, page)


def _tell(job: Search, found: Searched, page: Path) -> None:
    from casehard.adversary.summary import BEST, flops

    summary = found.summary
    shown = [name for name in COLUMNS if name in summary["model"]["held_out"]]
    lines = [["the model itself", *_cells(summary["model"]["held_out"], shown), "0", "-"]]
    for name in ("worst", "cheapest"):
        if (entry := summary[name]) is not None:
            cost = [f"{entry['cost']['steps']}", flops(entry["cost"]["flops"])]
            lines.append([f"{name} attacker", *_cells(entry["held_out"], shown), *cost])
    console.table(
        "held-out half: percent with exact 95 % intervals (single seed)", ["", *shown, "steps", "FLOPs"], lines
    )
    if top := summary["worst"]:
        console.table("the worst attacker", ["setting", "value"], [(k, _short(v)) for k, v in top["settings"].items()])
    console.say(summary["sentence"])
    if not job.random:
        console.note(
            "random draws may find a worse one: the same command with --random and another --out; quote the worse"
        )
    if summary["worst"]:
        console.made("attacker", found.out / BEST)
    console.made("report", page)


def _cells(rates: dict[str, Any], shown: list[str]) -> list[str]:
    from casehard.cli.scoring import curve

    found = [{"step": 0, "metric": name, **value} for name, value in rates.items()]
    return curve(found, shown, step="step")[0][1:]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
