"""``casehard backdoor audit``: rows and a model somebody gave you - what is in them, what to do, and doing it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from casehard.cli import console, options
from casehard.cli.runs import check_out
from casehard.defences import DEFENCES

app = typer.Typer(help="From a suspicion to a decision, and to a repaired model.", no_args_is_help=True)
KIND = "backdoor-audit"
OURS = ", ".join(name for name, spec in DEFENCES.ours.items() if spec.repairs)


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
        str | None, typer.Option(metavar="NAME", help=f"Defence that repairs: {OURS}, or one of another package.")
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
    values["method"] = DEFENCES.name(str(values.get("method") or ""))
    values["model"] = options.model_folder(values["model"])
    values["base"] = options.other_folder(str(values.get("base") or ""))
    _run(values, out)


def _run(values: dict[str, Any], out: Path) -> None:
    from casehard.config import build
    from casehard.errors import Refused
    from casehard.scan.audit_run import check, run_audit
    from casehard.scan.backdoor_audit import BackdoorAudit

    job = build(BackdoorAudit, values, where="backdoor audit")
    check(job, job.rows)
    shown = {role: list(specs) for role, specs in job.rows.items()}
    device = options.device_text(job.device)
    told = {"model": job.model, **shown, "base": job.base or None, "repair": "yes" if job.repair else "no"}
    console.plan("audit rows and a model for backdoors", {**told, "device": device, "seed": job.seed, "out": out})
    found = run_audit(job, out)
    _tell(found.summary, out)
    if found.model is not None and not found.model.may_leave:
        why = "a trigger still fires" if found.repaired == "REMAINS" else "the defence's own checks forbid it"
        raise Refused(f"{why}, so the model is not exported", hint=f"see {out / 'report.html'}")


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
    for command in found["advice"]["commands"]:
        console.say(command["does"])
        console.say(f"  {command['line']}")
    if (out / "checkpoint").exists():
        console.made("repaired model", out / "checkpoint")
    console.made("page", out / "report.html")
