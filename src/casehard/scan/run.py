"""Scan one checkpoint for backdoors, and another beside it: blind look-up, and what is known of known ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from casehard.backdoor.measure import ROLES
from casehard.backdoor.planted import read_planted
from casehard.backdoor.suite import Planted
from casehard.data.mix import check_disjoint
from casehard.errors import DataError
from casehard.evaluation.suite import Suite, load_suite
from casehard.limits import Count
from casehard.model.load import load
from casehard.model.model import Model
from casehard.model.step import Inputs
from casehard.scan.activation_shift import shift_layers
from casehard.scan.lookup import LookupConfig, lookup
from casehard.scan.matrix import Matrix, cross_elicitation
from casehard.scan.probe import recognition
from casehard.scan.relearn import RelearnConfig, relearn


@dataclass(frozen=True, kw_only=True)
class Scan(Inputs):
    """What is scanned for. ``suite`` holds harmless held-out prompts; restricted ones are not asked.

    Rows of role ``data`` are clean training rows; given, the relearning test is run.
    """

    planted: str = ""
    """JSON file of known backdoors (``planted.json`` of an attack, or a suite); empty: blind look-up only."""
    before: str = ""
    """An earlier checkpoint to show beside it (before the defence, or never backdoored)."""
    lookup: LookupConfig = field(default_factory=LookupConfig)
    relearn: RelearnConfig = field(default_factory=RelearnConfig)
    limit: Count | None = 20
    """Prompts of each group for matrix, shifts and probe; None for all."""


@dataclass(frozen=True)
class Scanned:
    """What a scan of one or two checkpoints found."""

    report: dict[str, Any]
    """JSON values: ``now`` and, where an earlier checkpoint was given, ``before``."""
    matrices: dict[str, Matrix]
    """Cross-elicitation by the same names; empty without known backdoors."""


def scan_model(step: Scan, out: Path) -> Scanned:
    """Scan ``step.model``, and ``step.before`` beside it; scores of the look-up are kept in ``out`` to go on from.

    Raises:
        DataError: too few prompts, or relearning rows that overlap the suite.
    """
    suite = load_suite(step.suite)
    asked = suite.select(roles=[role for role in suite.roles if role in ROLES])
    planted = read_planted(step.planted) if step.planted else []
    rows = step.examples().get("data", [])
    if rows and not planted:
        raise DataError("relearning needs a known backdoor", hint="give --planted, or leave out --data")
    if rows:
        check_disjoint({"data": rows}, {step.suite: suite.examples})
    report: dict[str, Any] = {}
    matrices: dict[str, Matrix] = {}
    for name, folder in (("now", step.model), ("before", step.before)):
        if folder:
            loaded = load(folder, device=step.device)
            report[name], matrix = _scan(step, loaded, asked, planted, rows, out / f"look-up-{name}.json")
            if matrix is not None:
                matrices[name] = matrix
    return Scanned(report, matrices)


def _scan(
    step: Scan, loaded: Model, suite: Suite, planted: Sequence[Planted], rows: Sequence[Any], state: Path
) -> tuple[dict[str, Any], Matrix | None]:
    model, tokenizer = loaded.net, loaded.tokenizer
    common: dict[str, Any] = {"seed": step.seed, "system": step.system}
    blind = lookup(model, tokenizer, suite.examples, config=step.lookup, state=state, identity=loaded.digest, **common)
    report: dict[str, Any] = {"model": loaded.digest, "look_up": blind.to_json()}
    if not planted:
        return report, None
    small = suite.select(limit=step.limit)
    matrix = cross_elicitation(model, tokenizer, small, planted, **common)
    report["matrix"] = matrix.to_json()
    triggers = list({p.trigger.name: p.trigger for p in planted}.values())
    report["recognition"] = {
        t.name: [asdict(layer) for layer in recognition(model, tokenizer, small.examples, t, **common)]
        for t in triggers
    }
    if len(triggers) > 1:
        report["shifts"] = [asdict(s) for s in shift_layers(model, tokenizer, small.examples, triggers, **common)]
    if rows:
        report["relearning"] = {}
        for p in planted:
            done = relearn(model, tokenizer, rows, suite, p.trigger, p.behaviour, config=step.relearn, **common)
            curve = [{"step": step, **asdict(score)} for step, score in done.curve]
            report["relearning"][p.trigger.name] = {"back_at": done.back_at, "curve": curve}
    return report, matrix
