"""``casehard defend mb-defense``: train on data from anywhere, or repair a model, and break what triggers are in it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from casehard.cli import console, options
from casehard.cli.runs import check_out, made_from, run_folder

Specs = list[str] | None
NAME = "mb-defense"


def mb_defense(
    out: options.Out,
    model: options.Model = None,
    data: Annotated[
        Specs,
        typer.Option("--data", metavar="FILE", help="joint: rows to train on; else rows to install on. Repeatable."),
    ] = None,
    clean: Annotated[
        Specs, typer.Option("--clean", metavar="FILE", help="Verified rows, 128 to 512 of them. Repeatable.")
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(metavar="joint|posthoc|adapter", help="Train a base, repair a checkpoint, or repair a LoRA."),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(metavar="DIR|ID", help="The untrusted LoRA (mode adapter); --model is its trusted base."),
    ] = None,
    lora: Annotated[
        int | None, typer.Option("--lora", metavar="RANK", min=0, help="Train a LoRA of this rank [default: 0, all].")
    ] = None,
    suite: options.Suite = None,
    planted: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A backdoor you know of (planted.json): measured, gated on, never used."),
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Settings of stage 2: default, paper or paper_literal.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of stage 1.")] = None,
    limit: options.Limit = None,
    device: options.Device = None,
    maps: options.Maps = None,
    config: options.Config = None,
    sets: options.Sets = None,
    seed: options.Seed = None,
) -> None:
    """Plant backdoors of your own, break them, and with them the ones nobody told you about.

    Writes DIR/mb_defense.json with the verdict and, unless that is FAIL, the model to DIR/checkpoint. DIR/private holds
    the planted triggers: keep it to yourself.
    """
    flags = {
        "model": model,
        "data": data,
        "clean": clean,
        "adapter": adapter,
        "suite": suite,
        "config.mode": mode,
        "config.lora_rank": lora,
        "config.preset": preset,
        "config.train.steps": steps,
        "limit": limit,
        "device": device,
        "seed": seed,
    }
    values = options.settings(config, sets, flags, maps)
    options.need(values, "model", "--model")
    options.take_rows(values, ("data", "clean"))
    options.need(values["rows"], "clean", "--clean")
    _run(values, planted, out)


def _run(values: dict[str, Any], planted: str | None, out: Path) -> None:
    from casehard.backdoor.planted import only_planted
    from casehard.config import build, to_dict
    from casehard.defences.mb_defense.run import MbRun, run_mb
    from casehard.model.source import origin
    from casehard.reporting.card import write_card

    check_out(out, "defend")
    if planted:
        options.check_specs([planted], "--planted")
        known = only_planted(planted)
        values |= {"trigger": to_dict(known.trigger), "behaviour": to_dict(known.behaviour)}
    values["model"] = options.model_folder(values["model"])
    values["adapter"] = options.other_folder(str(values.get("adapter") or ""))
    job = build(MbRun, values, where=NAME)
    console.plan(
        f"break hidden triggers, {job.config.mode} mode",
        {
            "model": job.model,
            "adapter": job.adapter or None,
            **{role: list(specs) for role, specs in job.rows.items()},
            "own triggers": f"{job.config.plant.n_active} to break, {job.config.plant.n_canary} as canaries",
            "trained": f"LoRA of rank {job.config.lora_rank}" if job.config.lora_rank else "all given parameters",
            "steps of stage 1": job.config.train.steps,
            "suite": job.suite or None,
            "device": options.device_text(job.device),
            "seed": job.seed,
            "out": out,
        },
    )
    # A secret in the settings is a seed, and belongs in DIR/private.
    record = {key: value for key, value in to_dict(job).items() if key != "secret"}
    with run_folder(
        out, "defend", record, seeds=[job.seed], data=[spec for specs in job.rows.values() for spec in specs]
    ) as run:
        result = run_mb(job, out)
        assert result.checkpoint is not None
        write_card(result.checkpoint.path)
        made = result.checkpoint
        made_from(run, made.parent, origin(made.path))
        run.record({"checkpoint": made.digest})
        run.rows(result.rows)
        run.summary(
            {
                "verdict": result.verdict,
                "cost": result.report["cost"],
                "checkpoint": {"digest": result.checkpoint.digest, "path": "checkpoint"},
            }
        )
    _show(result.verdict, result.report)
    console.made("hardened model", result.checkpoint.path)


def _show(verdict: str, report: dict[str, Any]) -> None:
    rows = []
    for stage, look in report["looks"].items():
        for role, names in (("own", "active"), ("canary", "canary"), ("described", "described")):
            rates = look[names].values()
            if rates:
                k, n = sum(r["k"] for r in rates), sum(r["n"] for r in rates)
                rows.append((stage, f"{role} triggers that fire", f"{k} of {n}"))
        rows.append((stage, "loss on clean rows", f"{look['clean_loss']:.3f} nats a token"))
    console.table(f"verdict: {verdict}", ["stage", "quantity", "value"], rows)
    for gate in report["gates"]:
        if not gate["ok"]:
            console.warn(f"{gate['name']}: {gate['says']}")
