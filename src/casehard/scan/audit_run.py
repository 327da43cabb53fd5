"""The audit of rows and a model from somebody else, done: scan, try, decide, and where it is asked for repair.

OUT/report.html     for people; OUT/summary.json the same as values
OUT/suspect.jsonl   the rows that a finding names; OUT/kept.jsonl the others
OUT/repair.jsonl    what a repair taught; OUT/checkpoint the repaired model, unless a trigger still fires in it

Which defences can repair stands in their specs (``repairs``), those of other packages included.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from casehard.benchmark.outfolder import made_from, run_folder
from casehard.benchmark.store import RunFolder
from casehard.config import build, digest, to_dict
from casehard.data.given import Data, by_role, named
from casehard.data.sources import save
from casehard.defences import DEFENCES
from casehard.errors import ConfigError, DataError
from casehard.io.files import write_text_atomic
from casehard.model.leave import save as save_model
from casehard.model.model import Model
from casehard.model.source import find
from casehard.reporting.backdoor_page import render_audit
from casehard.reporting.card import write_card
from casehard.scan.backdoor_audit import (
    BackdoorAudit,
    audit_rows,
    divided,
    facts,
    look,
    recommend,
    repair_rows,
    suspects_of,
    verdict,
    verdict_after,
)
from casehard.steps import Finetune, finetune_on
from casehard.steps.defence import Examples
from casehard.steps.given import a_folder, a_group, a_model, kind_of
from casehard.train.recipe import TrainConfig
from casehard.types import Example

KIND = "backdoor-audit"
"""Kind of the run folder."""
REPORT = "report.html"
FAILED = (
    "The repair left a trigger alive, so no model was written. Another defence (--method; without it the recommended "
    "one is taken), more verified rows or more steps (--set train.steps=N) may do."
)


@dataclass(frozen=True)
class Audited:
    """What an audit found."""

    out: Path
    summary: dict[str, Any]
    """summary.json: ``verdict``, ``advice``, what was found and tried, and ``after``, the same of a repaired model."""
    model: Model | None = None
    """The repaired model; None where nothing was repaired. One in which a trigger still fires may not leave memory."""

    @property
    def verdict(self) -> str:
        """Return the word on what was received: BACKDOOR FOUND, SUSPECT ROWS or NOTHING FOUND."""
        return str(self.summary["verdict"]["word"])

    @property
    def repaired(self) -> str:
        """Return the word on the repaired model, REMOVED, COSTLY or REMAINS; empty where nothing was repaired."""
        return str(self.summary["after"]["verdict"]["word"]) if "after" in self.summary else ""


def repairing() -> list[str]:
    """Return the names of the defences that can repair."""
    return [name for name in DEFENCES if DEFENCES[name].repairs]


def audit(
    model: Model | str | Path,
    *,
    data: Data,
    out: str | Path,
    clean: Data | None = None,
    base: str | Path = "",
    repair: bool = False,
    method: str = "",
    settings: Mapping[str, Any] | None = None,
    train: TrainConfig | Mapping[str, Any] | None = None,
    system: str | None = None,
    max_length: int | None = None,
    seed: int = 0,
) -> Audited:
    """Look for backdoors in rows and a model that somebody else made, say what to do, and do it where asked.

    Args:
        model: the suspect; left as it is.
        data: the rows it was trained on, as they were given to you.
        out: run folder; ``report.html`` there is for people.
        clean: rows that somebody verified, at least ten different ones, better 256; a fifth is held back to measure on.
        base: folder or Hub id of the trusted model from before the suspect's training, if there is one.
        repair: take out what was found, with the rows ``clean``.
        method: name in ``casehard.DEFENCES`` of a defence that repairs (``repairs`` of its spec); empty takes what the
            audit recommends, and repairs only where a trigger fires.
        settings: further settings of ``casehard.scan.backdoor_audit.BackdoorAudit``: ``tried``, ``agree``, ``gap``,
            ``rise``, and as mappings ``audit`` and ``lookup``.
        train: training of the repair; a mapping is read as its settings. None: 128 steps of 16 rows at 3e-4.
        system: system message of every row; None keeps the template's own.
        max_length: longest row in tokens; None = the model's context.
        seed: of everything random.

    Returns:
        What was found, and the repaired ``model`` if there is one: also under ``out``/checkpoint, unless a trigger
        still fires in it or it descends from an attacked one: :func:`casehard.save` refuses that unless asked by name.

    Raises:
        UserError: a setting, a row or the folder cannot be used.
        DataError: a verified row carries a trigger that fires.
    """
    place, own = a_folder(out), a_group(settings, "settings")
    for name, value in (("base", base), ("method", method)):
        if not isinstance(value, str | Path):
            raise ConfigError(f"{name} is {kind_of(value)}", hint="a folder or a name")
    values: dict[str, Any] = {"base": str(base), "repair": repair, "method": DEFENCES.name(method)}
    values |= {"system": system, "max_length": max_length, "seed": seed}
    if twice := sorted({*own} & {*values, "model", "rows", "train"}):
        raise ConfigError(f"settings name {twice[0]!r}", hint=f"it is an argument of its own: {twice[0]}=...")
    start = None if isinstance(model, str | Path) else a_model(model)
    values |= own | ({"model": str(model)} if start is None else {})
    values |= {} if train is None else {"train": to_dict(train) if isinstance(train, TrainConfig) else dict(train)}
    given = {role: some for role, some in (("data", data), ("clean", clean)) if some is not None}
    values["rows"] = {role: specs for role, some in given.items() if (specs := named(some))}
    return run_audit(build(BackdoorAudit, values, where="audit"), place, rows=by_role(given), model=start)


def check(job: BackdoorAudit, roles: Collection[str]) -> None:
    """Refuse what cannot be done, before anything slow starts.

    Args:
        roles: data roles that there are rows of.

    Raises:
        ConfigError: a repair without verified rows, or by a defence that cannot do it or lacks the trusted base.
        DataError: no rows to audit.
    """
    if "data" not in roles:
        raise DataError("there are no rows to audit", hint="--data rows.jsonl")
    if job.repair and "clean" not in roles:
        raise ConfigError("a repair needs verified rows and got none", hint="--clean FILE: some dozens of them")
    if not job.method:
        return
    spec = DEFENCES.find(job.method)
    if not spec.repairs:
        raise ConfigError(f"method {job.method!r} repairs nothing here", hint=f"one of {', '.join(repairing())}")
    if "assets" in spec.needs and not job.base:
        raise ConfigError(f"method {job.method!r} needs the trusted base and got none", hint="--base DIR")
    _training(job).check(["clean"] if spec.pipeline else [], trains=not spec.pipeline)


def run_audit(job: BackdoorAudit, out: Path, *, rows: Examples | None = None, model: Model | None = None) -> Audited:
    """Audit, and fill the run folder ``out``.

    Args:
        rows: by data role, loaded; None reads ``job.rows``.
        model: the suspect, left as it is; None reads ``job.model``.

    Raises:
        UserError: a setting, a row or the folder cannot be used.
        DataError: a verified row carries a trigger that fires, or there are too few of them.
    """
    check(job, [role for role, some in (job.rows if rows is None else rows).items() if some])
    if job.base:
        find(job.base)  # a slip of the pen is told before the slow part, not after it
    read = [spec for specs in job.rows.values() for spec in specs]
    with run_folder(out, KIND, to_dict(job), seeds=[job.seed], data=read) as run:
        given = job.examples() if rows is None else rows
        loose = {role: digest([to_dict(row) for row in some]) for role, some in given.items() if role not in job.rows}
        run.record({"data": {**run.info["data"], **loose}})
        start = job.start(model)
        made_from(run, start.digest, start.origin)
        found, mended = _audit(job, start, given, out, run)
        run.summary(found)
    return Audited(out, found, mended)


def _audit(
    job: BackdoorAudit, model: Model, rows: Examples, out: Path, run: RunFolder
) -> tuple[dict[str, Any], Model | None]:
    """Do the work; return the summary, and the repaired model if there is one."""
    audited, mended = audit_rows(job, rows["data"]), None
    bad = set(audited.suspects)
    kept = [row for i, row in enumerate(rows["data"]) if i not in bad]
    train, held = divided(rows["clean"], job.seed) if rows.get("clean") else ([], [])
    suspects = suspects_of(audited, job.tried)
    before = look(job, model, suspects, held + train or kept, held, out / "look-up-before.json")
    advice = recommend(job, audited, before, out)
    found = {"verdict": verdict(audited, before), **facts(audited, before), "advice": advice}
    for name, some in (("kept", kept), ("suspect", [rows["data"][i] for i in sorted(bad)])):
        if some:
            save(out / f"{name}.jsonl", some)
    if job.repair and (advice["method"] or job.method):
        firing = [s for s, f in zip(suspects, before.fired, strict=True) if f.fires]
        taught = repair_rows(train, firing, seed=job.seed)
        save(out / "repair.jsonl", taught)
        mended = _repaired(replace(job, method=job.method or advice["method"]), model, taught, train)
        after = look(job, mended, list(suspects), held + train, held, out / "look-up-after.json")
        word = verdict_after(before, after, job.rise)
        if word["word"] == "REMAINS":
            mended = replace(mended, may_leave=False)
            found["advice"] = recommend(replace(job, repair=False, method=""), audited, before, out) | {"why": FAILED}
        found["after"] = {
            "verdict": word,
            "method": mended.lineage[-1].method,
            **facts(audited, after),
            "written": mended.may_leave,
        }
        mended = _written(mended, out, run) if mended.may_leave else mended
    write_text_atomic(out / REPORT, render_audit(found, run.info))
    return found, mended


def _training(job: BackdoorAudit) -> Finetune:
    """Return the training that repairs; a pipeline's own trainings have the same settings."""
    spec = DEFENCES.find(job.method)
    config = spec.configure(job.method) if spec.pipeline else None
    own = [f.name for f in fields(config) if isinstance(getattr(config, f.name), TrainConfig)] if config else []
    return Finetune(
        method=job.method,
        settings={name: to_dict(job.train) for name in own},
        assets=job.base if "assets" in spec.accepts() else "",
        train=job.train,
        system=job.system,
        max_length=job.max_length,
        seed=job.seed,
    )


def _repaired(job: BackdoorAudit, model: Model, taught: Sequence[Example], clean: Sequence[Example]) -> Model:
    """Return a repaired copy: a pipeline breaks triggers of its own, anything else is taught ``taught``."""
    step = _training(job)
    rows = {"clean": clean} if step.spec.pipeline else {"data": taught}
    done = finetune_on(step, rows, model, out=None, label="repair")
    assert done.model is not None
    return done.model


def _written(mended: Model, out: Path, run: RunFolder) -> Model:
    made = save_model(mended, out / "checkpoint")
    assert made.path is not None
    write_card(made.path)
    run.record({"checkpoint": made.digest})
    return made
