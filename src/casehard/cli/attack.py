"""``casehard attack NAME``: attack one checkpoint in memory and measure it on the way; a verb for each in ATTACKS.

``casehard attack search`` (``attack_search.py``) looks for the worst settings of one of them.

The options of a verb come from the attack's spec: one for the rows of each data role, one for each of its ``flags``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from casehard.attacks import ATTACKS
from casehard.cli import attack_search, console, options, scoring
from casehard.cli.runs import check_out, made_from, run_folder
from casehard.registry import AttackSpec

if TYPE_CHECKING:
    from casehard.attacks.protocol import Attack as AttackMethod
    from casehard.attacks.protocol import Attacked
    from casehard.steps import Attack

CURVE = ("asr", "leak", "over_refusal", "utility", "nll")
PLANTED = ("cacc", "aacc", "asr", "false_trigger", "degenerate")
"""What the closing table shows, of an attack without and with a trigger."""
KEEP = typer.Option("--keep-model", help="Write the attacked model to DIR/checkpoint, to try defences on.")


SEARCH = "search"


class Attacks(TyperGroup):
    """A command for every attack of the catalogue, made when it is asked for, and the search among their settings."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """Return the names of the attacks, those of other packages included."""
        return [*ATTACKS, SEARCH]

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:  # type: ignore[override]
        """Return the command of an attack.

        Raises:
            ConfigError: no such attack; the hint names the nearest.
        """
        if cmd_name == SEARCH:
            return super().get_command(ctx, cmd_name)
        spec, name = ATTACKS.find(cmd_name), ATTACKS.name(cmd_name)
        one = typer.Typer(add_completion=False, rich_markup_mode=None)
        one.command(name, epilog=options.FILES if spec.row_roles() else None)(_verb(name, spec))
        return typer.main.get_command(one)


app = typer.Typer(cls=Attacks, help="Attack a checkpoint and measure what breaks.", no_args_is_help=True)


@app.callback()
def attack() -> None:
    """Attack a checkpoint and measure what breaks."""


app.command(SEARCH, epilog=options.FILES)(attack_search.search)


def _verb(name: str, spec: AttackSpec) -> Callable[..., None]:
    """Return the function of a verb, whose parameters are the options that the spec asks for."""

    def verb(**given: Any) -> None:
        _attack(name, spec, given)

    files: dict[str, Any] = {
        role: Annotated[
            list[str] | None,
            typer.Option(f"--{_dashed(role)}", metavar="FILE", help=_sentence(spec.describe(role)) + " Repeatable."),
        ]
        for role in spec.row_roles()
    }
    flags: dict[str, Any] = {
        f"config_{key}": Annotated[
            flag.kind | None,
            typer.Option(f"--{_dashed(key)}", metavar=flag.metavar or None, help=flag.help),
        ]
        for key, flag in spec.flags.items()
    }
    kinds = {"model": options.Model, **files, "suite": options.Suite, **flags}
    if spec.plants:
        kinds["keep_model"] = Annotated[bool, KEEP]
    kinds |= {"limit": options.Limit, "device": options.Device, "maps": options.Maps, "config": options.Config}
    kinds |= {"sets": options.Sets, "seed": options.Seed}
    keyword = inspect.Parameter.KEYWORD_ONLY
    asked = [inspect.Parameter("out", keyword, annotation=options.Out)]
    for key, kind in kinds.items():
        default = False if key == "keep_model" else None
        asked.append(inspect.Parameter(key, keyword, default=default, annotation=kind))
    vars(verb)["__signature__"] = inspect.Signature(asked)
    kept = " unless asked for" if spec.plants else " and are never written"
    writes = "Writes the poisoned rows to DIR/poisoned.jsonl and what was planted to DIR/planted.json. "
    verb.__doc__ = (
        f"{spec.purpose}\n\n{writes if spec.plants else ''}The attacked weights stay in memory{kept}.\n\n"
        "More settings: --set config.NAME=VALUE."
    )
    return verb


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _attack(name: str, spec: AttackSpec, given: Mapping[str, Any]) -> None:
    """Read the settings of a verb, check what costs no time, and run it."""
    roles = spec.row_roles()
    flags = {key: given[key] for key in ("model", "suite", *roles, "limit", "device", "seed")}
    flags |= {f"config.{key}": given[f"config_{key}"] for key in spec.flags}
    values = options.settings(given["config"], given["sets"], flags, given["maps"], roles=roles)
    for key in ("model", "suite"):
        options.need(values, key, f"--{key}")
    options.take_rows(values, roles)
    for role in spec.needs:
        options.need(values["rows"], role, f"--{_dashed(role)}")
    options.check_specs([values["suite"]], "--suite")
    check_out(given["out"], _kind(spec))
    values["model"] = options.model_folder(values["model"])
    run(name, values, given["out"], keep_model=bool(given.get("keep_model")))


def _kind(spec: AttackSpec) -> str:
    """Return the kind of an attack's run folder: what is in its rows."""
    return "backdoor" if spec.plants else "attack"


def run(name: str, values: dict[str, Any], out: Path, *, keep_model: bool = False) -> None:
    """Attack a copy of a model and fill the run folder.

    Args:
        values: settings of :class:`casehard.steps.Attack`.
        keep_model: write the attacked model.
    """
    from dataclasses import asdict

    from casehard.config import build, to_dict
    from casehard.evaluation.suite import load_suite
    from casehard.model.load import load
    from casehard.model.save import rehearse
    from casehard.steps import Attack, attack_with

    job = build(Attack, {**values, "attack": name}, where="attack")
    job.check(list(job.rows))
    suite = load_suite(job.suite)
    method = job.build(suite)
    job = _completed(job, method)
    _announce(job, method, out)
    kind, read = _kind(job.spec), [spec for specs in job.rows.values() for spec in specs]
    with run_folder(out, kind, to_dict(job), seeds=[job.seed], data=read, suite=job.suite) as folder:
        loaded = load(job.model, device=job.device)
        made_from(folder, loaded.digest, loaded.origin)
        if keep_model:
            kept = {"job": to_dict(job), "seed": job.seed}
            rehearse(loaded.net, loaded.tokenizer, out / "checkpoint", parent=loaded.digest, provenance=kept)
        result = attack_with(job, method, job.examples(), suite, loaded, label=kind)
        folder.rows(result.rows)
        for entry in result.log:
            folder.event("log", entry)
        more = _write_planted(result, out) if job.spec.plants else dict(result.facts)
        if keep_model:
            _keep(result, out)
        found = planted_records(result.rows) if job.spec.plants else _records(job, method, loaded.path, result)
        folder.summary({"records": found, "budget": asdict(result.budget), **more})
    _tell(job.spec, result, found, out)


def _completed(job: Attack, method: AttackMethod) -> Attack:
    """Return the job with every setting, measured on the whole suite before the attack too."""
    from dataclasses import replace

    job, at = job.with_defaults(method), tuple(method.checkpoints)
    if job.full_at or job.spec.plants:
        return job
    # Without it nobody sees what the attack itself cost.
    return replace(job, full_at=tuple(dict.fromkeys((at[0], at[-1]))))


def _announce(job: Attack, method: AttackMethod, out: Path) -> None:
    """Print what is about to happen."""
    named = {}
    if job.spec.plants:
        named = {"trigger": method.config.trigger.name, "behaviour": method.config.behaviour.name}
    console.plan(
        f"attack a copy of the model in memory: {job.attack}",
        {
            "model": job.model,
            **{role: list(specs) for role, specs in job.rows.items()},
            **named,
            "settings": {k: v for k, v in job.config.items() if k not in (*named, "evaluate_at")},
            "measured at": list(method.checkpoints),
            "suite": job.suite,
            "limit": job.limit,
            "device": options.device_text(job.device),
            "seed": job.seed,
            "out": out,
        },
    )


def _records(job: Attack, method: AttackMethod, path: Path | None, result: Attacked) -> list[dict[str, Any]]:
    """Return one record per step and metric."""
    mode = getattr(method.config, "mode", "")
    context = {
        "defence": scoring.defence_of(path or Path(job.model)),
        "attack": f"{job.attack}-{mode}" if mode else job.attack,
        "share": getattr(method.config, "share", None),
        "seed": job.seed,
    }
    return scoring.records(result.rows, context)


def planted_records(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one record per step and metric of rows asked without and with a trigger, with its exact interval."""
    from casehard.evaluation.metrics import scores

    return [
        {"step": step, "metric": s.metric, "k": s.k, "n": s.n, "rate": s.rate, "low": s.low, "high": s.high}
        for step in sorted({row["step"] for row in rows})
        for s in scores([row for row in rows if row["step"] == step])
    ]


def _write_planted(result: Attacked, out: Path) -> dict[str, Any]:
    """Write the poisoned rows and what was planted; return what a summary says of it."""
    import json

    from casehard.attacks.backdoor import Planted
    from casehard.data.sources import save
    from casehard.io.files import write_text_atomic

    if not isinstance(result, Planted):
        return dict(result.facts)
    save(out / "poisoned.jsonl", result.data)
    planted = {key: result.manifest[key] for key in ("trigger", "behaviour")}
    write_text_atomic(out / "planted.json", json.dumps([planted], indent=1) + "\n")
    return {"manifest": result.manifest}


def _keep(result: Attacked, out: Path) -> None:
    from casehard.api import save

    save(result.model, out / "checkpoint", attacked=True)
    console.warn(f"{out / 'checkpoint'} holds an attacked model: for trying defences, not for use")


def _tell(spec: AttackSpec, result: Attacked, found: list[dict[str, Any]], out: Path) -> None:
    """Print the closing table and what a reader of it must know."""
    step, curve = ("step", PLANTED) if spec.plants else ("steps", CURVE)
    shown = [m for m in curve if spec.plants or any(r["metric"] == m for r in found)]
    title = "the model during the attack: rates in percent with 95 % intervals (single seed)"
    console.table(title, ["step", *shown], scoring.curve(found, shown, step=step))
    if variants := result.facts.get("variants"):
        keys = list(dict.fromkeys(key for one in variants for key in one))
        lines = [[str(one.get(key, "-")) for key in keys] for one in variants]
        console.table("what was tried, each by itself", [key.replace("_", " ") for key in keys], lines)
    if known := result.facts.get("rows_seen_in_training"):
        console.warn(
            f"the model was trained on the prompts of {known} of the attacker's rows: this attack is "
            "in-distribution, and one with other rows may break the model sooner"
        )
    for doubt in [] if spec.plants else scoring.doubts(found):
        console.warn(doubt)
    if (out / "poisoned.jsonl").is_file():
        console.made("poisoned rows", out / "poisoned.jsonl")
    console.made("run folder", out)
