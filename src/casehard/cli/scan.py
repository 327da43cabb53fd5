"""``casehard scan``: look for backdoors nobody has described, in a data set and in a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from casehard.cli import console, options
from casehard.cli.runs import check_out, run_folder

app = typer.Typer(help="Look for hidden triggers in data and in models.", no_args_is_help=True)

SHOWN = 12


@app.callback()
def scan() -> None:
    """Look for hidden triggers in data and in models."""


@app.command(epilog=options.FILES)
def data(
    out: options.Out,
    rows: Annotated[
        list[str] | None, typer.Option("--data", metavar="FILE", help="Training rows to audit. Repeatable.")
    ] = None,
    maps: options.Maps = None,
    config: options.Config = None,
    sets: options.Sets = None,
) -> None:
    """Audit training rows for answers that recur and words tied to them.

    Writes DIR/audit.json, the rows that no finding names to DIR/kept.jsonl, and the others to DIR/suspect.jsonl.
    """
    values = options.settings(config, sets, {"data": rows}, maps)
    specs = options.as_list(values, "data")
    options.need(values, "data", "--data")
    options.check_specs(specs, "--data")
    check_out(out, "scan-data")
    _data({key: value for key, value in values.items() if key != "data"}, specs, out)


def _data(values: dict[str, Any], specs: list[str], out: Path) -> None:
    from casehard.config import build, to_dict
    from casehard.data.sources import load_many, save
    from casehard.io.files import write_text_atomic
    from casehard.scan.audit import AuditConfig, audit_data

    settings = build(AuditConfig, values, where="scan data")
    console.plan("audit training rows", {"data": specs, "out": out})
    with run_folder(out, "scan-data", {"data": specs, **to_dict(settings)}, data=specs) as run:
        examples = load_many(specs)
        audit = audit_data(examples, settings)
        suspects = set(audit.suspects)
        write_text_atomic(out / "audit.json", _json(audit.to_json()))
        for name, some in (
            ("kept.jsonl", [e for i, e in enumerate(examples) if i not in suspects]),
            ("suspect.jsonl", [examples[i] for i in sorted(suspects)]),
        ):
            if some:
                save(out / name, some)
        run.summary({"summary": audit.summary(), "suspects": len(suspects)})
    shown = [
        (
            " ... ".join(f.phrase),
            f"{f.both}/{f.phrase_rows}",
            f"{f.group}: {f.text[:40]}",
            f"{f.log_odds:.1f}",
            f"1e{f.log10_p:.0f}",
            "yes" if f.echo else "",
        )
        for f in audit.findings[:SHOWN]
    ]
    if shown:
        columns = ["phrase", "rows", "answers", "log odds", "p", "echo"]
        console.table("phrases tied to answers, strongest first", columns, shown)
    console.say(audit.summary())
    if len(audit.findings) > SHOWN:
        console.say(f"{len(audit.findings) - SHOWN} further phrases are in the audit file only")
    if any(f.echo for f in audit.findings):
        console.say("echo: the answers repeat the phrase, as answers to a common question do")
    if suspects:
        console.made("rows named by a finding", out / "suspect.jsonl")
    console.made("audit", out / "audit.json")


@app.command(epilog=options.FILES)
def model(
    out: options.Out,
    checkpoint: options.Model = None,
    suite: options.Suite = None,
    planted: Annotated[
        str | None, typer.Option(metavar="FILE", help="Known backdoors: planted.json, or a defender's own suite.")
    ] = None,
    before: Annotated[
        str | None, typer.Option(metavar="DIR|ID", help="An earlier checkpoint, scanned in the same way.")
    ] = None,
    rows: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="FILE", help="Clean rows: tests how fast a known backdoor comes back."),
    ] = None,
    limit: options.Limit = None,
    device: options.Device = None,
    maps: options.Maps = None,
    config: options.Config = None,
    sets: options.Sets = None,
    seed: options.Seed = None,
) -> None:
    """Try every word of the vocabulary on a model, and look at known backdoors from inside.

    Writes DIR/scan.json and, with known backdoors, DIR/matrix-now.svg. An interrupted look-up goes on where it stopped.
    """
    flags = {
        "model": checkpoint,
        "suite": suite,
        "planted": planted,
        "before": before,
        "data": rows,
        "limit": limit,
        "device": device,
        "seed": seed,
    }
    values = options.settings(config, sets, flags, maps)
    for key in ("model", "suite"):
        options.need(values, key, f"--{key}")
    options.take_rows(values, ("data",))
    options.check_specs([values["suite"]], "--suite")
    options.check_specs([values["planted"]] if values.get("planted") else [], "--planted")
    check_out(out, "scan-model")
    for key in ("model", "before"):
        if values.get(key):
            values[key] = options.model_folder(values[key])
    _model(values, out)


def _model(values: dict[str, Any], out: Path) -> None:
    from casehard.config import build, to_dict
    from casehard.io.files import write_text_atomic
    from casehard.scan.matrix import picture
    from casehard.scan.run import Scan, scan_model

    job = build(Scan, values, where="scan model")
    data = job.rows.get("data", ())
    console.plan(
        "scan a model for backdoors",
        {
            "model": job.model,
            "before": job.before,
            "suite": job.suite,
            "planted": job.planted,
            "data": list(data),
            "device": options.device_text(job.device),
            "seed": job.seed,
            "out": out,
        },
    )
    with run_folder(out, "scan-model", to_dict(job), seeds=[job.seed], data=data, suite=job.suite) as run:
        result = scan_model(job, out)
        write_text_atomic(out / "scan.json", _json(result.report))
        for name, matrix in result.matrices.items():
            write_text_atomic(out / f"matrix-{name}.svg", picture(matrix, f"cross-elicitation, {name}"))
        run.summary({name: part["look_up"]["summary"] for name, part in result.report.items()})
    for name, part in result.report.items():
        _show(name, part)
    console.made("scan", out / "scan.json")


def _show(name: str, part: dict[str, Any]) -> None:
    console.say(f"{name}: {part['look_up']['summary']}")
    if "matrix" in part:
        cells = [c for c in part["matrix"]["cells"] if c["k"]]
        table = [(c["trigger"], c["shows"], f"{c['k']}/{c['n']}", f"[{c['low']:.2f}, {c['high']:.2f}]") for c in cells]
        console.table(f"{name}: what comes out under each trigger", ["trigger", "shows", "count", "95 %"], table)
    for trigger, layers in part.get("recognition", {}).items():
        best = max(layers, key=lambda layer: layer["against_random"])
        console.say(
            f"{name}: a probe tells {trigger} from a random insertion with AUROC {best['against_random']:.2f} "
            f"(layer {best['layer']})"
        )
    for trigger, done in part.get("relearning", {}).items():
        back = "never within the steps taken" if done["back_at"] is None else f"at step {done['back_at']}"
        console.say(f"{name}: backdoor {trigger} is back {back}")


def _json(value: Any) -> str:
    import json

    return json.dumps(value, indent=1) + "\n"
