"""``casehard defend METHOD``: harden one checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from casehard.cli import console, options
from casehard.cli.runs import check_out, cost_rows, made_from, run_folder
from casehard.config import shown
from casehard.defences import DEFENCES
from casehard.errors import ConfigError
from casehard.limits import PROCESSES

ROLES = ("unsafe", "retain", "safe", "clean")

Specs = list[str] | None
Retain = Annotated[Specs, typer.Option("--retain", metavar="FILE", help="Harmless rows of a retain term. Repeatable.")]
Clean = Annotated[
    Specs,
    typer.Option("--clean", metavar="FILE", help="Rows that somebody verified (onion, backdoor-collapse). Repeatable."),
]
Select = Annotated[
    bool | None,
    typer.Option(
        "--select/--all-safe",
        help="Choose few of the safe rows, relevant to the data and diverse (spard's default), or use all.",
    ),
]
LoraRank = Annotated[
    int | None,
    typer.Option(min=1, help="Train a LoRA of this rank; further keys: --set lora.alpha=A, dropout, target."),
]
SaveAs = Annotated[
    str | None,
    typer.Option(
        metavar="merged|adapter", help="Of a LoRA: a checkpoint with it merged in (the default), or a PEFT adapter."
    ),
]
Schedule = Annotated[
    str | None, typer.Option(help="When Patcher attacks: sequential, lockstep, async or reference_parallel.")
]
Attackers = Annotated[
    int | None,
    typer.Option(min=1, help="Attackers in processes of their own (patcher); alone it means --schedule async."),
]
Assets = Annotated[
    str | None,
    typer.Option(metavar="DIR|ID", help="What the method reads: adapters made earlier, or another checkpoint."),
]


def defend(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="Name of the defence: patcher, spard, plain ...")],
    out: options.Out,
    model: options.Model = None,
    data: Annotated[
        Specs, typer.Option("--data", metavar="FILE", help="Rows to train on: refusals and harmless rows. Repeatable.")
    ] = None,
    unsafe: Annotated[
        Specs, typer.Option("--unsafe", metavar="FILE", help="Rows of the simulated attack (patcher). Repeatable.")
    ] = None,
    retain: Retain = None,
    safe: Annotated[
        Specs, typer.Option("--safe", metavar="FILE", help="Safe rows: refusals and harmless rows (spard). Repeatable.")
    ] = None,
    clean: Clean = None,
    select: Select = None,
    assets: Assets = None,
    suite: options.Suite = None,
    preset: Annotated[str | None, typer.Option(help="Named settings of the method to start from.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps; same as --set train.steps=N.")] = None,
    lora_rank: LoraRank = None,
    save_as: SaveAs = None,
    schedule: Schedule = None,
    attackers: Attackers = None,
    attacker_ranks: Annotated[
        int, typer.Option(min=1, help="Under torchrun: ranks of each attacker, over which its model is sharded.")
    ] = 1,
    device: options.Device = None,
    maps: options.Maps = None,
    config: options.Config = None,
    sets: options.Sets = None,
    seed: options.Seed = None,
) -> None:
    """Harden a checkpoint and save it under DIR/checkpoint.

    With --lora-rank only an adapter is trained; --save-as adapter saves it by itself under DIR/adapter, as
    buffer-reinforce and security-vector do in any case.
    With --suite, rows that also occur in the evaluation suite are an error.
    """
    flags = {
        "method": method,
        "model": model,
        "data": data,
        "unsafe": unsafe,
        "retain": retain,
        "safe": safe,
        "clean": clean,
        "assets": assets,
        "suite": suite,
        "preset": preset,
        "train.steps": steps,
        "lora.rank": lora_rank,
        "save_as": save_as,
        "settings.schedule": schedule,
        "attackers": attackers,
        "device": device,
        "seed": seed,
    }
    _run(options.settings(config, sets, flags, maps), select, out, attacker_ranks)


def _selection(values: dict[str, Any], asked: bool | None) -> dict[str, Any] | None:
    """Return the settings of the selection of safe rows, or None for all of them."""
    given: dict[str, Any] | None = values.get("select")
    # SPARD is the projection and the selection: leaving one out is something to ask for, as `select: null` does too.
    usual = DEFENCES.find(values["method"]).selects and bool(values["rows"].get("safe")) and "select" not in values
    chosen = asked if asked is not None else given is not None or usual
    return (given or {}) if chosen else None


def _check(values: dict[str, Any]) -> bool:
    """Check and complete the settings; return whether the method tunes an adapter."""
    values["method"] = DEFENCES.name(str(values["method"]))
    spec = DEFENCES.find(values["method"])
    options.need(values, "model", "--model")
    options.take_rows(values, ("data", *ROLES, *spec.row_roles()))
    if not spec.pipeline:  # one that trains the model itself may repair it; whether it can, its own check says
        options.need(values["rows"], "data", "--data")
    for role in values["rows"]:
        if role != "data" and role not in spec.row_roles():
            raise ConfigError(
                f"{values['method']} takes no --{role} rows", hint="leave them out: they would be ignored"
            )
    values["model"] = options.model_folder(values["model"])
    values["assets"] = options.other_folder(str(values.get("assets") or ""))
    return spec.adapter


def _run(values: dict[str, Any], select: bool | None, out: Path, attacker_ranks: int) -> None:
    adapter, count = _check(values), _multiply_attackers(values)
    if attacker_ranks > 1 and not count:
        raise ConfigError(f"--attacker-ranks {attacker_ranks} and no attackers beside", hint="--attackers 1")
    if adapter:
        _tune(values, select, out)
        return
    chosen = _selection(values, select)
    from casehard.defences.patcher.workers.launch import join, leave
    from casehard.distributed.ranks import rank, world

    if join(count, each=attacker_ranks, sharing=DEFENCES.find(values["method"]).ranks):
        return  # this rank was an attacker
    if not rank():
        check_out(out, "defend")
    from casehard.config import build, to_dict
    from casehard.reporting.card import write_card
    from casehard.steps import Finetune, harden

    train = DEFENCES.find(values["method"]).training(values.get("train") or {})
    job = build(Finetune, {**values, "select": chosen, "train": train}, where="defend")
    if rank():
        _help(job, out)
        return
    console.plan(
        f"harden a checkpoint with {job.method}",
        {
            "model": job.model,
            **{role: list(specs) for role, specs in job.rows.items()},
            "safe rows used": _used(job),
            "assets": job.assets or None,
            "preset": job.preset,
            "settings": dict(job.settings) or None,
            "attackers beside": (f"{count} of {attacker_ranks} processes" if attacker_ranks > 1 else count) or None,
            "processes": world() if world() > 1 else None,
            "trains": told(job.lora),
            "saves": None if job.lora is None else "a PEFT adapter" if job.leaves_adapter else "merged",
            "steps": job.train.steps,
            "batch": f"{job.train.batch_size} x {job.train.accumulation}",
            "device": options.device_text(job.device),
            "seed": job.seed,
            "out": out,
        },
    )
    read = [spec for specs in job.rows.values() for spec in specs]
    with run_folder(out, "defend", to_dict(job), seeds=[job.seed], data=read) as run:
        result, made = harden(job, out)
        assert made is not None and made.path is not None
        write_card(made.path)
        made_from(run, made.parent, made.origin)
        run.record({job.place: made.digest})
        for entry in result.log:
            run.event("log", entry)
        run.rows([])
        run.summary({"cost": result.cost, job.place: {"digest": made.digest, "path": job.place}})
    leave()
    _tell(job.method, result, made.path)


def told(lora: Any) -> str:
    """Return what is trained, in words."""
    if lora is None:
        return "all weights"
    where = lora.target if isinstance(lora.target, str) else ", ".join(lora.target)
    dropout = f", dropout {lora.dropout:g}" if lora.dropout else ""
    return f"a LoRA of rank {lora.rank}, alpha {lora.alpha:g}{dropout}, on {where}"


def _tell(method: str, result: Any, folder: Path) -> None:
    rows = cost_rows(result.cost) + _age_rows(result.log)
    console.table(f"{method}: what it cost", ["quantity", "value"], rows)
    if result.model.writer is not None:
        console.made("adapter", folder)
        console.say(f"to serve it as a model: casehard model import {console.shown(folder)} --base MODEL --out DIR")
    else:
        console.made("hardened model", folder)
    if served := result.model.served_with:
        console.say(f"the defence is a system message to put before every request: {served!r}")


def _age_rows(log: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return how old the attack vectors of the patched steps were, where a schedule lets them age."""
    ages = [row["attack_age"] for row in log if "attack_age" in row]
    if not ages:
        return []
    oldest = max(row.get("attack_age_oldest", 0.0) for row in log)
    return [("age of the attack vectors", f"{sum(ages) / len(ages):.0f} steps on average, {oldest:.0f} at most")]


def _help(job: Any, out: Path) -> None:
    """Train a shard of rank 0's model, which says and saves everything; say only what went wrong here alone."""
    import warnings

    from casehard.defences.patcher.workers.launch import leave
    from casehard.errors import Elsewhere, Interrupted, Lost
    from casehard.steps import harden
    from casehard.train.progress import set_quiet

    set_quiet()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            harden(job, out)
        except (Elsewhere, Interrupted, Lost) as error:
            raise typer.Exit(error.exit_code) from None
    leave()


def _multiply_attackers(values: dict[str, Any]) -> int:
    """Make the list of attackers in the settings as long as ``--attackers`` says; return how many run beside."""
    count, settings = values.get("attackers") or 0, options.group(values, "settings")
    if not isinstance(count, int) or not 0 <= count <= PROCESSES:
        raise ConfigError(
            f"attackers: {shown(count)} is not within 0..{PROCESSES}", hint="each is a process of its own"
        )
    if values["method"] != "patcher":
        if count or "schedule" in settings:
            raise ConfigError(f"{values['method']} simulates no attacks", hint="leave out --attackers and --schedule")
        return 0
    from casehard.config import to_dict
    from casehard.defences.patcher.schedule import NEEDS_ATTACKERS

    preset = values.get("preset") or ""
    spec = DEFENCES.find("patcher")
    if count and "schedule" not in settings and spec.configure("patcher", preset, {}).schedule == "sequential":
        settings = values["settings"] = {**settings, "schedule": "async"}
    configured = spec.configure("patcher", preset, settings)
    listed = configured.attackers
    if count and configured.schedule == "sequential":
        raise ConfigError(
            f"--attackers {count} with schedule 'sequential', which attacks in its own process",
            hint="--schedule lockstep gives the same weights, --schedule async does not wait",
        )
    if count and len(listed) not in (1, count):
        raise ConfigError(f"--attackers {count}, and the settings list {len(listed)}", hint="leave one of them out")
    if count and len(listed) == 1:
        one = {key: value for key, value in to_dict(listed[0]).items() if value is not None}  # None hangs on the run
        values["settings"] = {**settings, "attackers": [one] * count}
    return count or (len(listed) if configured.schedule in NEEDS_ATTACKERS else 0)


def _tune(values: dict[str, Any], select: bool | None, out: Path) -> None:
    from casehard.cli.buffer import tune_adapter

    if _selection(values, select) is not None:
        raise ConfigError(f"{values['method']} takes no safe rows to choose from", hint="leave out --select")
    tune_adapter(values, out)


def _used(job: Any) -> str | None:
    if not job.rows.get("safe"):
        return None
    if job.select is None:
        return "all"
    few = job.select.k if job.select.k is not None else f"{job.select.share:.0%} of the data"
    return f"{few}, chosen by {job.select.strategy} (--all-safe takes all)"
