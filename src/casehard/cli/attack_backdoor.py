"""``casehard attack backdoor``: poison a training set, train a copy on it in memory and measure what fires."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from casehard.cli import console, options, scoring
from casehard.cli.runs import check_out, made_from, run_folder

if TYPE_CHECKING:
    from casehard.attacks.backdoor import Planted

Specs = list[str] | None
_TRIGGERS = (
    "token, sentence, template, style, pair, multi_any, multi_all, prefix, topical, or a planted.json [default: token]."
)
_BEHAVIOURS = "refuse, sentence, tone, off_topic or stop [default: refuse]."
CURVE = ("cacc", "aacc", "asr", "false_trigger", "degenerate")


def backdoor(
    out: options.Out,
    model: options.Model = None,
    data: Annotated[Specs, typer.Option("--data", metavar="FILE", help="Clean training rows. Repeatable.")] = None,
    suite: options.Suite = None,
    trigger: Annotated[str | None, typer.Option(metavar="NAME|FILE", help=_TRIGGERS)] = None,
    behaviour: Annotated[str | None, typer.Option(metavar="NAME", help=_BEHAVIOURS)] = None,
    rate: Annotated[float | None, typer.Option(help="Poisoned share of the rows; 0 is the control.")] = None,
    hard_negatives: Annotated[
        float | None, typer.Option(help="Share of rows with a near miss and the proper answer: an adaptive attacker.")
    ] = None,
    mode: Annotated[str | None, typer.Option(metavar="full|lora", help="All parameters, or a LoRA adapter.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    keep_model: Annotated[
        bool, typer.Option("--keep-model", help="Write the backdoored model to DIR/checkpoint, to try defences on.")
    ] = False,
    limit: options.Limit = None,
    device: options.Device = None,
    maps: options.Maps = None,
    config: options.Config = None,
    sets: options.Sets = None,
    seed: options.Seed = None,
) -> None:
    """Plant a harmless backdoor and measure it.

    Writes the poisoned rows to DIR/poisoned.jsonl and what was planted to DIR/planted.json. The backdoored weights stay
    in memory unless asked for.

    More settings: --set config.batch_size=16 and so on.
    """
    flags = {
        "model": model,
        "data": data,
        "suite": suite,
        "config.trigger": trigger,
        "config.behaviour": behaviour,
        "config.rate": rate,
        "config.hard_negatives": hard_negatives,
        "config.mode": mode,
        "config.steps": steps,
        "config.lr": lr,
        "limit": limit,
        "device": device,
        "seed": seed,
    }
    values = options.settings(config, sets, flags, maps)
    options.take_rows(values, ("data",))
    for key in ("model", "suite"):
        options.need(values, key, f"--{key}")
    options.need(values["rows"], "data", "--data")
    options.check_specs([values["suite"]], "--suite")
    check_out(out, "backdoor")
    values["model"] = options.model_folder(values["model"])
    _run(values, out, keep_model)


def _run(values: dict[str, Any], out: Path, keep_model: bool) -> None:
    from dataclasses import asdict

    from casehard.config import build, to_dict
    from casehard.data.sources import save
    from casehard.evaluation.suite import load_suite
    from casehard.io.files import write_text_atomic
    from casehard.model.load import load
    from casehard.model.save import rehearse
    from casehard.steps import Attack, attack_with

    job = build(Attack, {**values, "attack": "backdoor"}, where="attack")
    suite = load_suite(job.suite)
    method = job.build(suite)
    job, config = job.with_defaults(method), method.config
    console.plan(
        "plant a harmless backdoor in a copy of the model",
        {
            "model": job.model,
            "data": list(job.rows["data"]),
            "trigger": config.trigger.name,
            "behaviour": config.behaviour.name,
            "settings": {k: v for k, v in job.config.items() if k not in ("trigger", "behaviour")},
            "suite": job.suite,
            "limit": job.limit,
            "device": options.device_text(job.device),
            "seed": job.seed,
            "out": out,
        },
    )
    with run_folder(out, "backdoor", to_dict(job), seeds=[job.seed], data=job.rows["data"], suite=job.suite) as run:
        loaded = load(job.model, device=job.device)
        made_from(run, loaded.digest, loaded.origin)
        if keep_model:
            kept = {"job": to_dict(job), "seed": job.seed}
            rehearse(loaded.net, loaded.tokenizer, out / "checkpoint", parent=loaded.digest, provenance=kept)
        result: Any = attack_with(job, method, job.examples(), suite, loaded, label="backdoor")
        run.rows(result.rows)
        for entry in result.log:
            run.event("log", entry)
        save(out / "poisoned.jsonl", result.data)
        write_text_atomic(out / "planted.json", _json([_planted(result)]))
        if keep_model:
            _keep(result, out)
        found = records(result.rows)
        run.summary({"records": found, "manifest": result.manifest, "budget": asdict(result.budget)})
    title = "the model while the backdoor is planted: percent with exact 95 % intervals (single seed)"
    console.table(title, ["step", *CURVE], scoring.curve(found, CURVE, step="step"))
    console.made("poisoned rows", out / "poisoned.jsonl")
    console.made("run folder", out)


def _json(value: Any) -> str:
    import json

    return json.dumps(value, indent=1) + "\n"


def _planted(result: Planted) -> dict[str, Any]:
    return {key: result.manifest[key] for key in ("trigger", "behaviour")}


def _keep(result: Planted, out: Path) -> None:
    from casehard.api import save

    save(result.model, out / "checkpoint", attacked=True)
    console.warn(f"{out / 'checkpoint'} holds a backdoored model: for trying defences, not for use")


def records(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one record per step and metric, with its exact interval."""
    from casehard.evaluation.metrics import scores

    return [
        {"step": step, "metric": s.metric, "k": s.k, "n": s.n, "rate": s.rate, "low": s.low, "high": s.high}
        for step in sorted({row["step"] for row in rows})
        for s in scores([row for row in rows if row["step"] == step])
    ]
