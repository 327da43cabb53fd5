"""``casehard merge``: put a user's adapter and the provider's reinforcing one together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from casehard.cli import console, options, scoring
from casehard.cli.runs import check_out, made_from, new_folder, run_folder
from casehard.errors import ConfigError
from casehard.io import secrets

if TYPE_CHECKING:
    from casehard.maths.merge import MergeConfig

app = typer.Typer(help="Merge adapters in factor space, and look for coefficients.", no_args_is_help=True)

User = Annotated[str, typer.Option("--user", metavar="DIR|ID", help="The user's adapter, as tuned.")]
Reinforce = Annotated[
    str,
    typer.Option(
        "--reinforce",
        metavar="DIR|ID",
        help="The provider's reinforcing adapter, or the (local) folder of its assets.",
    ),
]
BasisOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="paper or output [default: output]."),
]
Tau = Annotated[float | None, typer.Option(help="Relative cut of small directions [default: 0.01].")]
Protect = Annotated[
    bool | None,
    typer.Option(
        "--protect-safety/--protect-task",
        help="Project the user off the reinforcing update, or that off the user as the paper does [default: safety].",
    ),
]


@app.callback()
def merge() -> None:
    """Merge adapters in factor space, and look for coefficients."""


@app.command()
def reinforce(
    user: User,
    reinforce: Reinforce,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Adapter folder to make.")],
    c_user: Annotated[float | None, typer.Option(help="Weight of the user's update [default: 1].")] = None,
    c_reinforce: Annotated[float | None, typer.Option(help="Weight of the reinforcing one [default: 0.5].")] = None,
    alpha: Annotated[float | None, typer.Option(help="Share of the overlap taken off, 0..1 [default: 1].")] = None,
    basis: BasisOption = None,
    form: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="concat: one portable adapter; absorb: the user's rank [default: concat]."),
    ] = None,
    tau: Tau = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Cut to this rank; the error is reported.")] = None,
    protect_safety: Protect = None,
    config: options.Config = None,
    sets: options.Sets = None,
) -> None:
    """Merge a user's adapter with the provider's, without the base model.

    Writes a plain PEFT adapter. With form absorb it is served beside the unchanged reinforcing adapter.
    """
    flags = {
        "c_user": c_user,
        "c_reinforce": c_reinforce,
        "alpha": alpha,
        "basis": basis,
        "form": form,
        "tau": tau,
        "rank": rank,
        "protect_safety": protect_safety,
    }
    settings = _settings(config, sets, flags)
    adapter, provider = _adapters(user, reinforce)
    with new_folder(out):
        _merge(settings, adapter, provider, out)


def _settings(config: Path | None, sets: list[str] | None, flags: dict[str, Any]) -> MergeConfig:
    from casehard.config import build

    values = options.settings(config, sets, flags)
    secrets.refuse(values, where="merge")
    from casehard.maths.merge import MergeConfig

    return build(MergeConfig, values, where="merge")


def _adapters(user: str, reinforce: str) -> tuple[Path, Path]:
    """Return the folders of both adapters; where assets are given whole, the user's is searched for their buffer."""
    from casehard.model.source import find_any
    from casehard.train.progress import announce

    folders = []
    for given, flag in ((user, "--user"), (reinforce, "--reinforce")):
        folders.append(found := find_any(given, tell=announce))
        if not found.is_dir():
            hint = "give the folder of an adapter, or a Hub id org/name[@revision]"
            raise ConfigError(f"{flag}: no such folder: {given}", hint=hint)
    adapter, provider = folders
    if (provider / "adapter_config.json").exists():
        return adapter, provider
    from casehard.defences.buffer_reinforce.assets import refuse_fetched

    refuse_fetched(reinforce)
    inner = provider / "reinforce"
    if not (inner / "adapter_config.json").exists():
        return adapter, provider
    from casehard.defences.buffer_reinforce.publish import refuse_buffer_in

    refuse_buffer_in(adapter, provider)
    return adapter, inner


def _merge(settings: MergeConfig, user: Path, provider: Path, out: Path) -> None:
    from statistics import fmean

    from casehard.model.merge import merge_folders

    console.plan(
        f"merge two adapters, form {settings.form}, basis {settings.basis}",
        {
            "user": f"{console.shown(user)} x {settings.c_user:g}",
            "reinforce": f"{console.shown(provider)} x {settings.c_reinforce:g}",
            "alpha": f"{settings.alpha:g}" + (" (off the user)" if settings.protect_safety else ""),
            "rank": settings.rank,
            "out": out,
        },
    )
    made = merge_folders(user, provider, out, settings)
    for note in made.notes:
        console.warn(note)
    reports = list(made.reports.values())
    rows: list[tuple[str, str]] = [("layers", str(made.layers)), ("rank", str(made.rank))]
    if reports:
        rows += [
            ("cosine of the two updates, mean", f"{fmean(r.cosine for r in reports):+.4f}"),
            ("share of energy projected, mean", f"{100 * fmean(r.removed for r in reports):.2f} %"),
            ("directions projected off, mean", f"{fmean(r.kept for r in reports):.1f}"),
        ]
        if settings.rank is not None:
            rows.append(("error of the cut, largest", f"{max(r.error for r in reports):.3f}"))
        if settings.form == "absorb":
            rows.append(("growth of the user's A, largest", f"{max(r.growth for r in reports):.2f} x"))
    console.table("the merged adapter", ["quantity", "value"], rows)
    if made.reinforce_weight is not None:
        console.say(f"serve it beside {console.shown(provider)} at weight {made.reinforce_weight:g}")
    console.made("adapter", out)


@app.command()
def search(
    user: User,
    reinforce: Reinforce,
    out: options.Out,
    model: options.Model = None,
    suite: options.Suite = None,
    c_user: Annotated[list[float] | None, typer.Option(help="Weights of the user's update. Repeatable.")] = None,
    c_reinforce: Annotated[list[float] | None, typer.Option(help="Weights of the other. Repeatable.")] = None,
    alpha: Annotated[list[float] | None, typer.Option(help="Shares of the overlap. Repeatable.")] = None,
    low: Annotated[str, typer.Option(metavar="METRIC", help="Rate that should be low.")] = "asr",
    high: Annotated[str, typer.Option(metavar="METRIC", help="Rate that should be high.")] = "utility",
    basis: BasisOption = None,
    tau: Tau = None,
    protect_safety: Protect = None,
    limit: options.Limit = None,
    system: Annotated[str | None, typer.Option(help="System message of every prompt.")] = None,
    device: options.Device = None,
    config: options.Config = None,
    sets: options.Sets = None,
) -> None:
    """Measure a small grid of coefficients on provider data and draw the front.

    Nothing is trained; prompts that an adapter is known to have been trained on are refused. Choose on rows you do not
    report on: the best of many settings looks better than it is.
    """
    from casehard.maths.pareto import coefficient_grid

    settings = _settings(config, sets, {"basis": basis, "tau": tau, "protect_safety": protect_safety})
    for value, flag in ((model, "--model"), (suite, "--suite")):
        if not value:
            raise ConfigError(f"{flag} is missing", hint=f"give {flag}")
    options.check_specs([suite or ""], "--suite")
    options.require_report()
    adapter, provider = _adapters(user, reinforce)
    given = {"c_user": c_user, "c_reinforce": c_reinforce, "alpha": alpha}
    grid = coefficient_grid(**{key: value for key, value in given.items() if value})
    check_out(out, "merge-search")
    job = {
        "user": str(adapter),
        "reinforce": str(provider),
        "model": options.model_folder(model or ""),
        "suite": suite,
        "grid": [list(point) for point in grid],
        "low": low,
        "high": high,
        "limit": limit,
        "system": system,
        "device": device or "auto",
    }
    _search(settings, job, grid, out)


def _search(settings: MergeConfig, job: dict[str, Any], grid: list[Any], out: Path) -> None:
    from dataclasses import asdict

    from casehard.defences.buffer_reinforce.merge_search import search as walk
    from casehard.evaluation.contamination import require_unseen
    from casehard.evaluation.suite import evaluate, load_suite
    from casehard.io.files import write_text_atomic
    from casehard.model.load import find_device, load
    from casehard.model.lora_files import load_pairs, read_marker, refuse_buffer
    from casehard.model.provenance import trained_prompts

    console.plan(f"measure {len(grid)} merges in memory", {**job, "grid": None, "basis": settings.basis, "out": out})
    asked = load_suite(job["suite"])
    with run_folder(out, "merge-search", {**job, "merge": asdict(settings)}, suite=job["suite"]) as run:
        for folder in (job["user"], job["reinforce"]):
            refuse_buffer(folder)
        loaded = load(job["model"], device=str(find_device(job["device"])))
        for folder in (job["user"], job["reinforce"]):
            marker = read_marker(folder) or {}
            if marker.get("role") == "merged":
                raise ConfigError(f"{folder} is merged already", hint="tune with --set settings.reinforce=false")
            bound = marker.get("base_digest")
            if bound and bound != loaded.digest:
                raise ConfigError(
                    f"{folder} is for base {bound[:12]}, {job['model']} is {loaded.digest[:12]}",
                    hint="--model is the base that both adapters were made for",
                )
            # The record of the assets lies above the reinforcing adapter.
            require_unseen(asked, trained_prompts(folder, Path(folder).parent), folder)
        require_unseen(asked, loaded.trained_prompts, job["model"])
        made_from(run, loaded.digest, loaded.origin)
        measure = lambda m: evaluate(m, loaded.tokenizer, asked, limit=job["limit"], system=job["system"])  # noqa: E731
        points, answers = [], []
        pairs = load_pairs(job["user"]), load_pairs(job["reinforce"])
        for at, rows in walk(loaded.net, *pairs, grid, measure, config=settings):
            answers += [{**at._asdict(), **row} for row in rows]
            run.rows(answers)
            found = scoring.records(rows, {"merge": at._asdict(), "seed": 0})
            _pick(found, job["low"], job["high"])  # at the first point, not after the last
            points.append((at, found))
            run.event("point", at._asdict())
        table, picture = _front(points, job["low"], job["high"])
        run.summary({"records": [r for _, found in points for r in found], "front": table})
        write_text_atomic(out / "front.svg", picture + "\n")
    shown = [[f"{p['c_user']:g}", f"{p['c_reinforce']:g}", f"{p['alpha']:g}", *p["shown"]] for p in table]
    console.table(
        "settings that no other beats (intervals: 95 %)",
        ["c_user", "c_reinforce", "alpha", job["low"], job["high"]],
        shown,
    )
    console.made("picture", out / "front.svg")


def _pick(found: list[dict[str, Any]], low: str, high: str) -> tuple[dict[str, Any], dict[str, Any]]:
    rates = {record["metric"]: record for record in found if record["k"] is not None}
    for metric in (low, high):
        if metric not in rates:
            raise ConfigError(f"the suite does not measure the rate {metric!r}", hint=f"it measures {', '.join(rates)}")
    return rates[low], rates[high]


def _front(points: list[Any], low: str, high: str) -> tuple[list[dict[str, Any]], str]:
    """Return the settings on the front, and the picture of all."""
    from casehard.evaluation.metrics import metric_title
    from casehard.maths.pareto import pareto_front
    from casehard.reporting.pareto import Setting, front

    both = [_pick(found, low, high) for _, found in points]
    best = pareto_front([(x["rate"], y["rate"]) for x, y in both], maximise=(False, True))
    settings = [
        Setting(f"{at.c_user:g} U + {at.c_reinforce:g} R, alpha {at.alpha:g}", x["rate"], y["rate"], i in best)
        for i, ((at, _), (x, y)) in enumerate(zip(points, both, strict=True))
    ]
    described = f"{high} against {low} of {len(settings)} merges; on the front: " + "; ".join(
        f"{s.label}: {s.x:.2f}, {s.y:.2f}" for s in settings if s.best
    )
    table = [
        {
            **points[i][0]._asdict(),
            "shown": [scoring.rate(r) for r in both[i]],
            low: both[i][0]["rate"],
            high: both[i][1]["rate"],
        }
        for i in best
    ]
    labels = [f"{metric_title(m)} (better is {way})" for m, way in ((low, "left"), (high, "up"))]
    return table, front("merge-search", settings, x_label=labels[0], y_label=labels[1], described=described)
