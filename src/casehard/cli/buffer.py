"""``casehard buffer``: the provider's assets for Buffer-and-Reinforce, and what they tell about a customer's data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from casehard.cli import console, options
from casehard.cli.runs import check_out, cost_rows, made_from, new_folder, run_folder
from casehard.errors import ConfigError
from casehard.io import secrets

app = typer.Typer(help="Make a provider's buffer and reinforce adapters; screen customers' data.", no_args_is_help=True)

Specs = list[str] | None
Assets = Annotated[Path, typer.Option("--assets", metavar="DIR", help="Folder made by `casehard buffer prepare`.")]
Base = Annotated[str, typer.Option("--model", metavar="DIR|ID", help="The base the assets were made for.")]
Rows = Annotated[list[str], typer.Option("--data", metavar="FILE", help="The customer's rows. Repeatable.")]
System = Annotated[str | None, typer.Option(help="System message of every row.")]


@app.callback()
def buffer() -> None:
    """Make a provider's buffer and reinforce adapters; screen customers' data."""


@app.command(epilog=options.FILES)
def prepare(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of assets to make.")],
    model: options.Model = None,
    harmful: Annotated[
        Specs, typer.Option("--harmful", metavar="FILE", help="Restricted prompts, compliant answers. Repeatable.")
    ] = None,
    refusals: Annotated[
        Specs, typer.Option("--refusals", metavar="FILE", help="Restricted prompts with refusals. Repeatable.")
    ] = None,
    benign: Annotated[
        Specs, typer.Option("--benign", metavar="FILE", help="Harmless prompts, helpful answers. Repeatable.")
    ] = None,
    suite: options.Suite = None,
    preset: Annotated[
        str | None, typer.Option(help="default; paper: compliance-only buffer, always on; security_vector.")
    ] = None,
    system: System = None,
    allow_missed: Annotated[
        bool, typer.Option("--allow-missed", help="Publish although gates are missed; the record says so.")
    ] = False,
    device: options.Device = None,
    maps: options.Maps = None,
    config: options.Config = None,
    sets: options.Sets = None,
    seed: options.Seed = None,
) -> None:
    """Train the buffer, then reinforce; measure the gates; publish both only if they pass.

    DIR/buffer is a working jailbreak of the model: keep DIR to yourself. --suite gives the judge of the gates; rows
    that also occur in it are an error.
    """
    flags = {
        "model": model,
        "harmful": harmful,
        "refusals": refusals,
        "benign": benign,
        "suite": suite,
        "system": system,
        "config.allow_missed": allow_missed or None,
        "device": device,
        "seed": seed,
    }
    values = options.settings(config, sets, flags, maps)
    options.need(values, "model", "--model")
    options.take_rows(values, ("harmful", "refusals", "benign"))
    for role in ("harmful", "refusals", "benign"):
        options.need(values["rows"], role, f"--{role}")
    if preset:
        values["preset"] = preset
    secrets.refuse(values, where="buffer prepare")
    with new_folder(out):
        values["model"] = options.model_folder(values["model"])
        _prepare(values, out)


def prepare_step(values: Mapping[str, Any]) -> Any:
    """Build the step from plain values; the group ``config`` is laid over the preset that ``preset`` names.

    Raises:
        ConfigError: unknown keys, or values out of range.
    """
    from casehard.config import build, to_dict
    from casehard.defences.buffer_reinforce.prepare import Prepare, preset

    given = values.get("config") or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"config: must be a group of settings, got {given!r}")
    config = _over(to_dict(preset(str(values.get("preset") or "default"))), given)
    rest = {key: value for key, value in values.items() if key != "preset"}
    return build(Prepare, {**rest, "config": config}, where="buffer prepare")


def _prepare(values: dict[str, Any], out: Path) -> None:
    from casehard.defences.buffer_reinforce.prepare import prepare as make
    from casehard.errors import UserError

    job = prepare_step(values)
    console.plan(
        "make the buffer and reinforce adapters of one base",
        {
            "model": job.model,
            **{role: list(specs) for role, specs in job.rows.items()},
            "preset": values.get("preset") or "default",
            "rank": job.config.rank,
            "device": options.device_text(job.device),
            "seed": job.seed,
            "out": out,
        },
    )
    try:
        done = make(job, out)
    except UserError as error:
        if gates := getattr(error, "gates", None):
            _show(gates)
        raise
    _show([gate.record() for gate in done.gates])
    console.made("assets (secret: the buffer is a jailbreak of the model)", out)


def _over(start: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(start)
    for key, value in given.items():
        inner = out.get(key)
        out[key] = _over(inner, value) if isinstance(inner, dict) and isinstance(value, Mapping) else value
    return out


def _show(gates: list[dict[str, Any]]) -> None:
    rows = []
    for gate in gates:
        value = f"{gate['value']:.3f}" + (f" [{gate['low']:.2f}, {gate['high']:.2f}]" if "low" in gate else "")
        limit = "" if gate["limit"] is None else f"{gate['limit']:g} " + ("" if gate["passed"] else "MISSED")
        rows.append([gate["name"], value, limit.strip()])
    console.table("gates, on held-out rows of the provider", ["quantity", "measured", "limit"], rows)


def _open(
    model: str, assets: Path, data: list[str], system: str | None, device: str | None
) -> tuple[Any, Any, Any, Any]:
    """Load what both looks at a job need: the base, its chat format, the assets, the rows."""
    options.check_specs(data, "--data")
    from casehard.data.chat import ChatFormat
    from casehard.data.sources import load_many
    from casehard.defences.buffer_reinforce.assets import read_assets
    from casehard.model.load import load

    opened = read_assets(assets)
    rows = load_many(data, require_response=True)
    loaded = load(model, device=device or "auto")
    limit = getattr(loaded.net.config, "max_position_embeddings", None)
    return loaded, ChatFormat(loaded.tokenizer, system=system, max_length=limit), opened, rows


@app.command(epilog=options.FILES)
def tune(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to make; the adapter is DIR/adapter.")],
    model: options.Model = None,
    assets: Annotated[
        str | None, typer.Option("--assets", metavar="DIR", help="Folder made by `casehard buffer prepare`.")
    ] = None,
    data: Annotated[Specs, typer.Option("--data", metavar="FILE", help="The customer's rows. Repeatable.")] = None,
    system: System = None,
    device: options.Device = None,
    maps: options.Maps = None,
    config: options.Config = None,
    sets: options.Sets = None,
    seed: options.Seed = None,
) -> None:
    """Tune a customer's rows beside the buffer and write DIR/adapter: `casehard defend buffer-reinforce`.

    The buffer is in nothing that is written; an interrupted job goes on when called again.
    """
    flags = {"model": model, "assets": assets, "data": data, "system": system, "device": device, "seed": seed}
    values = options.settings(config, sets, flags, maps)
    values.setdefault("method", "buffer_reinforce")
    options.need(values, "model", "--model")
    options.take_rows(values, ("data",))
    options.need(values["rows"], "data", "--data")
    values["model"] = options.model_folder(values["model"])
    tune_adapter(values, out)


def tune_adapter(values: dict[str, Any], out: Path) -> None:
    """Run a customer's job from plain values and write DIR/adapter; also what ``casehard defend`` does for its method.

    Raises:
        ConfigError: no assets, unusable settings, or ``out`` is taken.
    """
    options.need(values, "assets", "--assets")
    check_out(out, "tune")
    from casehard.config import build, to_dict
    from casehard.reporting.card import write_card
    from casehard.steps import CUSTOMER, Finetune, harden

    job = build(Finetune, values, where="tune")
    settings = to_dict(job.build({}).config)  # assets that cannot be used leave no folder behind
    console.plan(
        f"tune a customer's rows with {job.method}",
        {
            "model": job.model,
            "assets": job.assets,
            "data": list(job.rows["data"]),
            "preset": job.preset,
            "settings": settings,
            "rank": (job.lora or CUSTOMER).rank,
            "steps": job.train.steps,
            "batch": f"{job.train.batch_size} x {job.train.accumulation}",
            "device": options.device_text(job.device),
            "seed": job.seed,
            "out": out,
        },
    )
    with run_folder(out, "tune", to_dict(job), seeds=[job.seed], data=job.rows["data"], suite=job.suite) as run:
        done, made = harden(job, out)
        assert made is not None and made.path is not None
        write_card(made.path)
        for entry in done.log:
            run.event("log", entry)
        run.summary({"cost": done.cost, "adapter": "adapter"})
    console.table("what it cost", ["quantity", "value"], cost_rows(done.cost))
    console.made("adapter", out / "adapter")


@app.command(epilog=options.FILES)
def screen(
    model: Base,
    assets: Assets,
    data: Rows,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="JSONL file of all rows, ranked.")] = None,
    label: Annotated[str, typer.Option(help="Tag that tells kinds of rows apart, for the ROC.")] = "",
    positive: Annotated[str, typer.Option(help="Value of the tag that should rank high.")] = "",
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="SVG file of the ROC; with --label.")
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="Rows to print.")] = 10,
    maps: options.Maps = None,
    system: System = None,
    device: options.Device = None,
) -> None:
    """Rank rows by what the buffer's help makes likelier: what the base would have refused.

    Neither prompts nor answers are written to FILE.
    """
    if bool(label) != bool(positive):
        raise ConfigError("--label and --positive go together", hint="example: --label kind --positive compliance")
    for file, flag in ((out, "--out"), (picture, "--picture")):
        if file is not None and file.exists():
            raise ConfigError(f"{file} already exists", hint=f"give another file with {flag}, or remove it")
    if picture is not None:
        if not label:
            raise ConfigError("--picture draws the ROC, which needs labels", hint="--label TAG --positive VALUE")
        options.require_report()
    from casehard.defences.buffer_reinforce.screen import roc, write_screening
    from casehard.defences.buffer_reinforce.screen import screen as rank

    model = options.model_folder(model)
    data = options.mapped(data, maps)
    loaded, chat, opened, rows = _open(model, assets, data, system, device)
    console.plan("screen rows with the buffer", {"model": model, "assets": assets, "data": data, "label": label})
    gains = rank(loaded.net, chat, opened, rows, label=label)
    top = [[g.id or str(g.row + 1), f"{g.gain:.2f}", f"{g.gain_per_token:.3f}", g.label] for g in gains[:show]]
    console.table("highest gain", ["row", "nats", "nats a token", label or "-"], top)
    if label:
        found = roc(gains, positive), roc(gains, positive, per_token=True)
        counts = f"{found[0].positives} against {found[0].negatives}"
        console.table(
            f"{label} = {positive}, {counts} rows",
            ["score", "area under the ROC"],
            [("gain", f"{found[0].auc:.3f}"), ("gain a token", f"{found[1].auc:.3f}")],
        )
        if picture is not None:
            _draw_rocs(picture, found, f"{label} = {positive}, {counts} rows")
    if out is not None:
        write_screening(out, gains)
        console.made("ranked rows", out)


def _draw_rocs(path: Path, found: tuple[Any, Any], what: str) -> None:
    from casehard.io.files import write_text_atomic
    from casehard.reporting.saturation import Curve, curves

    drawn = [Curve(t, f.auc, f.points) for t, f in zip(("gain", "gain a token"), found, strict=True)]
    said = f"ROC of {what}; " + "; ".join(f"{c.title}: area {c.auc:.3f}" for c in drawn)
    write_text_atomic(path, curves("screen-roc", drawn, described=said) + "\n")
    console.made("picture", path)


@app.command(epilog=options.FILES)
def saturation(
    model: Base,
    assets: Assets,
    data: Rows,
    out: options.Out,
    maps: options.Maps = None,
    system: System = None,
    device: options.Device = None,
) -> None:
    """Draw what a job's rows would teach, layer by layer, without and beside the buffer.

    Below 0 a step on these rows works against the refusals of the provider's reinforce adapter; where the buffer covers
    the rows, its line stays near 0. Give rows of one kind: a mixture shows its mean.
    """
    data = options.mapped(data, maps)
    options.check_specs(data, "--data")
    options.require_report()
    check_out(out, "buffer-saturation")
    from casehard.defences.buffer_reinforce.screen import saturation as measure

    model = options.model_folder(model)
    loaded, chat, opened, rows = _open(model, assets, data, system, device)
    job = {"model": model, "assets": str(assets), "data": data, "system": system, "device": device or "auto"}
    console.plan("what is left to learn, without and beside the buffer", {**job, "rows": len(rows), "out": out})
    with run_folder(out, "buffer-saturation", job, data=data) as run:
        found = measure(loaded.net, chat, opened, rows)
        made_from(run, loaded.digest, loaded.origin, assets=opened.digest)
        lines = _write_saturation(out, run, found)
    console.table(f"{len(rows)} rows", ["quantity", "without", "beside the buffer"], lines)
    console.made("picture", out / "saturation.svg")


def _write_saturation(out: Path, run: Any, found: Any) -> list[tuple[str, str, str]]:
    """Write the numbers and the picture; return what to print."""
    from casehard.io.files import write_text_atomic
    from casehard.reporting.saturation import Series, layers

    scores = [part.scores.tolist() for part in (found.base, found.buffer)]
    parts = {}
    for name, rows, values in zip(("without", "buffer"), found.rows, scores, strict=True):
        parts[name] = {"residual": rows.mean_residual, "nll": rows.mean_nll, "scores": values, "sum": sum(values)}
    run.summary({"layers": list(found.base.layers), "rows": found.base.rows, **parts})
    a, b = parts["without"], parts["buffer"]
    lines = [
        ("mean 1 - p", f"{a['residual']:.3f}", f"{b['residual']:.3f}"),
        ("loss, nats a token", f"{a['nll']:.3f}", f"{b['nll']:.3f}"),
        ("safety gradient score, sum of layers", f"{a['sum']:.4g}", f"{b['sum']:.4g}"),
        ("layers below 0", _negative(a["scores"]), _negative(b["scores"])),
    ]
    said = "safety gradient score of each layer; " + "; ".join(f"{t}: {x} without, {y} beside" for t, x, y in lines)
    series = Series(found.base.layers, *scores)
    write_text_atomic(out / "saturation.svg", layers("buffer-saturation", series, described=said) + "\n")
    return lines


def _negative(values: list[float]) -> str:
    return f"{sum(v < 0 for v in values)} of {len(values)}"


@app.command(epilog=options.FILES)
def check(
    model: Base,
    assets: Assets,
    data: Rows,
    suite: options.Suite = None,
    system: System = None,
    device: options.Device = None,
) -> None:
    """Look, before a job is run, whether the buffer covers its data; warn where it does not.

    --suite gives the judge that tells refusals; none of its rows is used.
    """
    from casehard.defences.buffer_reinforce.screen import check as look
    from casehard.evaluation.judges import make_judge
    from casehard.evaluation.suite import load_suite

    model = options.model_folder(model)
    loaded, chat, opened, rows = _open(model, assets, data, system, device)
    chosen = load_suite(suite) if suite else None
    judge = chosen.make_judge() if chosen else make_judge("rule")
    console.plan("check a job against the buffer", {"model": model, "assets": assets, "data": data})
    found = look(loaded.net, chat, opened, rows, judge)
    lines = [
        ("rows looked at", f"{found.rows}"),
        ("prompts the base refuses, answered in the data", f"{found.refused}"),
        ("of them still refused with the buffer", f"{found.still_refused}"),
        ("answers that are refusals", f"{found.refusals}"),
        ("mean 1 - p without / with the buffer", f"{found.residual:.3f} / {found.residual_buffer:.3f}"),
    ]
    if found.coverage is not None:
        lines.append(("coverage of the refused rows", f"{found.coverage:.2f}"))
    console.table("the job's rows", ["quantity", "value"], lines)
    for warning in found.warnings:
        console.write(f"warning: {warning}\n")
