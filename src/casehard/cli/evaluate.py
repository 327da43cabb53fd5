"""``casehard evaluate``: measure one checkpoint on a suite."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from casehard.cli import console, options, scoring
from casehard.cli.runs import check_out, made_from, run_folder


def evaluate(
    out: options.Out,
    model: options.Model = None,
    suite: options.Suite = None,
    limit: options.Limit = None,
    format_of: Annotated[
        list[str] | None,
        typer.Option(
            "--format-of",
            metavar="FILE",
            help="Rows the model was tuned on: restricted prompts are asked in their format too. Repeatable.",
        ),
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            "--lm-eval",
            metavar="TASKS",
            help="Public benchmarks besides, as mmlu,gsm8k,ifeval, by the program lm_eval, which is not part of this "
            "package and fetches their data itself.",
        ),
    ] = None,
    device: options.Device = None,
    config: options.Config = None,
    sets: options.Sets = None,
    seed: options.Seed = None,
) -> None:
    """Measure a checkpoint on a suite.

    Writes one row per prompt and rates with intervals. Decoding is greedy, so --seed is recorded and changes nothing.
    """
    values = options.settings(config, sets, {"model": model, "suite": suite, "limit": limit, "device": device})
    if format_of:
        options.check_specs(format_of, "--format-of")
        values |= {"in_format": "rows", "rows": {"data": format_of}}
    options.need(values, "model", "--model")
    options.need(values, "suite", "--suite")
    options.check_specs([values["suite"]], "--suite")
    if lm_eval is not None:
        tasks = [task.strip() for task in lm_eval.split(",") if task.strip()]
        values["lm_eval"] = {**options.group(values, "lm_eval"), "tasks": tasks}
    check_out(out, "evaluate")
    values["model"] = options.model_folder(values["model"])
    _run(values, out, seed or 0)


def _run(values: dict[str, Any], out: Path, seed: int) -> None:
    from casehard.config import build, to_dict
    from casehard.evaluation.lm_eval import require_program
    from casehard.evaluation.suite import load_suite
    from casehard.model.load import load
    from casehard.model.provenance import served_with
    from casehard.model.source import find, origin
    from casehard.steps import Evaluate

    job = build(Evaluate, values, where="evaluate")
    where = options.device_text(job.device)
    folder = find(job.model)
    came = origin(folder)
    # A Hub model names itself; of another the plan says what it was made from.
    whence = {"descends from": came} if came != job.model else {}
    items = {
        "model": job.model,
        **whence,
        "suite": job.suite,
        "system": job.system,
        "limit": job.limit,
        **({} if job.in_format is None else {"in format": job.rows.get("data", job.in_format)}),
        **({"lm_eval": ", ".join(job.lm_eval.tasks)} if job.lm_eval else {}),
        "device": where,
    }
    console.plan("measure a checkpoint", {**items, "out": out})
    if (served := served_with(folder)) and job.system is None:
        console.warn(f"this checkpoint's defence is a system message that is not used here: --set system={served!r}")
    if job.lm_eval is not None:
        require_program(job.lm_eval)
    load_suite(job.suite)  # rows that cannot be evaluated are told before a model is loaded, and leave no folder
    with run_folder(out, "evaluate", to_dict(job), seeds=[seed], suite=job.suite) as run:
        loaded = load(job.model, device=job.device)
        made_from(run, loaded.digest, loaded.origin)
        done = job.run(loaded, out=out)
        run.rows(done.rows)
        context = {"defence": scoring.defence_of(folder), "attack": "none", "share": 0.0, "seed": seed}
        found = scoring.records(done.rows, context)
        for score in done.facts.get("lm_eval", []):
            found.append({**context, "steps": 0, **{key: score[key] for key in scoring.KEYS}})
        run.summary({"records": found})
    console.table("measured, with 95 % intervals", ["metric", "count", "value"], scoring.score_rows(found))
    for doubt in scoring.doubts(found):
        console.warn(doubt)
    console.made("run folder", out)
