"""``casehard attack finetune`` and ``backdoor``: attack one checkpoint in memory and measure it along the way."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from casehard.cli import attack_backdoor, console, options, scoring
from casehard.cli.runs import check_out, made_from, run_folder

app = typer.Typer(help="Attack a checkpoint and measure what breaks.", no_args_is_help=True)

Specs = list[str] | None
CURVE = ("asr", "leak", "over_refusal", "utility", "nll")


@app.callback()
def attack() -> None:
    """Attack a checkpoint and measure what breaks."""


@app.command(epilog=options.FILES)
def finetune(
    out: options.Out,
    model: options.Model = None,
    harmful: Annotated[
        Specs, typer.Option("--harmful", metavar="FILE", help="Restricted prompts with compliant answers. Repeatable.")
    ] = None,
    benign: Annotated[
        Specs, typer.Option("--benign", metavar="FILE", help="The attacker's cover rows. Repeatable.")
    ] = None,
    suite: options.Suite = None,
    share: Annotated[float | None, typer.Option(help="Harmful share of the attacker's rows, 0..1.")] = None,
    mode: Annotated[str | None, typer.Option(metavar="full|lora", help="All parameters, or a LoRA adapter.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps of the attack.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of the attack.")] = None,
    limit: options.Limit = None,
    device: options.Device = None,
    maps: options.Maps = None,
    config: options.Config = None,
    sets: options.Sets = None,
    seed: options.Seed = None,
) -> None:
    """Fine-tune a copy on poisoned rows and measure it.

    The attacked weights stay in memory and are never written.

    More settings: --set config.rank=8, --set config.batch_size=16 and so on.
    """
    flags = {
        "model": model,
        "harmful": harmful,
        "benign": benign,
        "suite": suite,
        "config.share": share,
        "config.mode": mode,
        "config.steps": steps,
        "config.lr": lr,
        "limit": limit,
        "device": device,
        "seed": seed,
    }
    values = options.settings(config, sets, flags, maps)
    for key in ("model", "suite"):
        options.need(values, key, f"--{key}")
    options.take_rows(values, ("harmful", "benign"))
    options.check_specs([values["suite"]], "--suite")
    check_out(out, "attack")
    values["model"] = options.model_folder(values["model"])
    _run(values, out)


def _run(values: dict[str, Any], out: Path) -> None:
    from dataclasses import replace

    from casehard.config import build, to_dict
    from casehard.model.load import load
    from casehard.steps import Attack

    job = build(Attack, values, where="attack")
    method = job.build()
    job, settings = job.with_defaults(method), method.config
    if not job.full_at:
        # The whole suite before the attack too: without it nobody sees what the attack itself cost.
        job = replace(job, full_at=tuple(dict.fromkeys((settings.checkpoints[0], settings.checkpoints[-1]))))
    console.plan(
        f"attack a copy of the model by {settings.mode} fine-tuning, in memory",
        {
            "model": job.model,
            **{role: list(specs) for role, specs in job.rows.items()},
            "mixture": f"{settings.rows} rows, share {settings.share:g} harmful",
            "steps": f"{settings.steps} of {settings.batch_size} rows, {settings.optimizer}, lr {settings.lr:g}",
            "measured at": list(settings.checkpoints),
            "suite": job.suite,
            "limit": job.limit,
            "device": options.device_text(job.device),
            "seed": job.seed,
            "out": out,
        },
    )
    data = [spec for specs in job.rows.values() for spec in specs]
    with run_folder(out, "attack", to_dict(job), seeds=[job.seed], data=data, suite=job.suite) as run:
        loaded = load(job.model, device=job.device)
        made_from(run, loaded.digest, loaded.origin)
        result = job.run(loaded)
        run.rows(result.rows)
        for entry in result.log:
            run.event("log", entry)
        context = {
            "defence": scoring.defence_of(loaded.path or Path(job.model)),
            "attack": f"finetune-{settings.mode}",
            "share": settings.share,
            "seed": job.seed,
        }
        found = scoring.records(result.rows, context)
        run.summary({"records": found, "budget": result.cost, **result.facts})
    shown = [m for m in CURVE if any(r["metric"] == m for r in found)]
    title = "the model during the attack: rates in percent with 95 % intervals (single seed)"
    console.table(title, ["step", *shown], scoring.curve_rows(found, shown))
    if known := result.facts["known_rows"]:
        console.warn(
            f"the model was trained on the prompts of {known} of the attacker's rows: this attack is "
            "in-distribution, and one with other rows may break the model sooner"
        )
    for doubt in scoring.doubts(found):
        console.warn(doubt)
    console.made("run folder", out)


app.command("backdoor", epilog=options.FILES)(attack_backdoor.backdoor)
