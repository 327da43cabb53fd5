"""``casehard backdoor audit``: rows and a model somebody gave you - what is in them, what to do, and doing it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from casehard.cli import console, options
from casehard.cli.runs import check_out, made_from, run_folder
from casehard.defences import DEFENCES

app = typer.Typer(help="From a suspicion to a decision, and to a repaired model.", no_args_is_help=True)
KIND = "backdoor-audit"
METHODS = ("plain", "fine_mixing", "dilution", "crow", "backdoor_collapse")


@app.callback()
def backdoor() -> None:
    """From a suspicion to a decision, and to a repaired model."""


@app.command(epilog=options.FILES)
def audit(
    out: options.Out,
    checkpoint: options.Model = None,
    rows: Annotated[
        list[str] | None, typer.Option("--data", metavar="FILE", help="The rows you were given. Repeatable.")
    ] = None,
    clean: Annotated[
        list[str] | None, typer.Option("--clean", metavar="FILE", help="Rows that somebody verified. Repeatable.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="DIR|ID", help="The trusted model the suspect was trained from, if at hand.")
    ] = None,
    repair: Annotated[bool, typer.Option("--repair", help="Remove what was found, with the rows of --clean.")] = False,
    method: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"Defence that repairs: {', '.join(METHODS)}.")
    ] = None,
    device: options.Device = None,
    maps: options.Maps = None,
    config: options.Config = None,
    sets: options.Sets = None,
    seed: options.Seed = None,
) -> None:
    """Scan rows and model, try on the model what the rows gave away, say what to do, and with --repair do it.

    Writes DIR/report.html for people, DIR/summary.json, DIR/kept.jsonl and DIR/suspect.jsonl, and with --repair the
    repaired model to DIR/checkpoint, unless a trigger still fires in it.
    """
    flags = {
        "model": checkpoint,
        "data": rows,
        "clean": clean,
        "base": base,
        "repair": repair or None,
        "method": method,
        "device": device,
        "seed": seed,
    }
    values = options.settings(config, sets, flags, maps)
    options.need(values, "model", "--model")
    options.take_rows(values, ("data", "clean"))
    options.need(values["rows"], "data", "--data")
    check_out(out, KIND)
    values["model"] = options.model_folder(values["model"])
    values["base"] = options.other_folder(str(values.get("base") or ""))
    _run(values, out)


def _job(values: dict[str, Any]) -> Any:
    from casehard.config import build
    from casehard.errors import ConfigError
    from casehard.scan.backdoor_audit import BackdoorAudit

    job = build(BackdoorAudit, values, where="backdoor audit")
    name = job.method.replace("-", "_")
    if name and name not in METHODS:
        raise ConfigError(f"--method {job.method!r} repairs nothing here", hint=f"one of {', '.join(METHODS)}")
    if name and "assets" in DEFENCES.find(name).needs and not job.base:
        raise ConfigError(f"method {name!r} needs the trusted base and got none", hint="--base DIR")
    return replace(job, method=name)


def _run(values: dict[str, Any], out: Path) -> None:
    from casehard.config import to_dict
    from casehard.errors import Refused
    from casehard.model.load import load

    job = _job(values)
    shown = {role: list(specs) for role, specs in job.rows.items()}
    device = options.device_text(job.device)
    told = {"model": job.model, **shown, "base": job.base or None, "repair": "yes" if job.repair else "no"}
    console.plan("audit rows and a model for backdoors", {**told, "device": device, "seed": job.seed, "out": out})
    read = [spec for specs in job.rows.values() for spec in specs]
    with run_folder(out, KIND, to_dict(job), seeds=[job.seed], data=read) as run:
        found = _audit(job, load(job.model, device=job.device), out, run)
        run.summary(found)
    _tell(found, out)
    if found.get("after", {}).get("verdict", {}).get("word") == "REMAINS":
        raise Refused("a trigger still fires, so the model is not exported", hint=f"see {out / 'report.html'}")


def _audit(job: Any, model: Any, out: Path, run: Any) -> dict[str, Any]:
    """Do the work; return the summary."""
    from casehard.data.sources import save
    from casehard.io.files import write_text_atomic
    from casehard.reporting.backdoor_page import render_audit
    from casehard.scan import backdoor_audit as work

    rows = job.examples()
    audited = work.audit_rows(job, rows["data"])
    bad = set(audited.suspects)
    kept = [row for i, row in enumerate(rows["data"]) if i not in bad]
    train, held = work.divided(rows["clean"], job.seed) if rows.get("clean") else ([], [])
    suspects = work.suspects_of(audited, job.tried)
    before = work.look(job, model, suspects, held + train or kept, held, out / "look-up-before.json")
    advice = work.recommend(job, audited, before, out)
    found = {"verdict": work.verdict(audited, before), **work.facts(audited, before), "advice": advice}
    for name, some in (("kept", kept), ("suspect", [rows["data"][i] for i in sorted(bad)])):
        if some:
            save(out / f"{name}.jsonl", some)
    if job.repair and (advice["method"] or job.method):
        firing = [s for s, f in zip(suspects, before.fired, strict=True) if f.fires]
        taught = work.repair_rows(train, firing, seed=job.seed)
        save(out / "repair.jsonl", taught)
        mended = _repaired(replace(job, method=job.method or advice["method"]), model, taught, train)
        after = work.look(job, mended, list(suspects), held + train, held, out / "look-up-after.json")
        word = work.verdict_after(before, after, job.rise)
        found["after"] = {"verdict": word, "method": mended.lineage[-1].method, **work.facts(audited, after)}
        if word["word"] != "REMAINS":
            _save(mended, out, run)
    write_text_atomic(out / "report.html", render_audit(found, run.info))
    return found


def _repaired(job: Any, model: Any, taught: Any, train: Any) -> Any:
    from casehard.steps import Finetune
    from casehard.steps.finetune import finetune_on

    spec = DEFENCES.find(job.method)
    pipeline, assets = spec.pipeline, job.base if "assets" in spec.needs else ""
    stages = {"gather": {"steps": job.train.steps}, "recover": {"steps": job.train.steps}}
    step = Finetune(
        method=job.method,
        settings=stages if pipeline else {},
        assets=assets,
        train=job.train,
        system=job.system,
        max_length=job.max_length,
        seed=job.seed,
    )
    done = finetune_on(step, {"clean": train} if pipeline else {"data": taught}, model, out=None, label="repair")
    assert done.model is not None
    return done.model


def _save(mended: Any, out: Path, run: Any) -> None:
    from casehard.model.leave import save
    from casehard.model.source import origin
    from casehard.reporting.card import write_card

    made = save(mended, out / "checkpoint")
    assert made.path is not None
    write_card(made.path)
    made_from(run, made.parent, origin(made.path))
    run.record({"checkpoint": made.digest})


def _tell(found: dict[str, Any], out: Path) -> None:
    parts = [("received", found)] + ([("repaired", found["after"])] if "after" in found else [])
    for name, part in parts:
        console.say(f"{name}: {part['verdict']['word']}. {part['verdict']['sentence']}")
        lines = [
            (
                f["phrase"],
                f["source"],
                f"{f['hits']}/{f['of']}",
                f"{f['without']}/{f['of']}",
                "yes" if f["fires"] else "no",
            )
            for f in part["tried"]
        ]
        if lines:
            console.table(f"{name}: triggers tried", ["trigger", "from", "with it", "without", "fires"], lines)
    console.say(found["advice"]["why"])
    for line in found["advice"]["commands"]:
        console.say(f"  {line}")
    if (out / "checkpoint").exists():
        console.made("repaired model", out / "checkpoint")
    console.made("page", out / "report.html")
