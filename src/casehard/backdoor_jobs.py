"""Plant a backdoor, and scan data and models: one function each, for the command line and for plans.

Each takes a frozen job of plain values. Triggers and behaviours are named: those of the world for a suite of the
organism, English ones otherwise, or a JSON file with one of each.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from casehard import secrets
from casehard.attack.backdoor import BackdoorAttack, BackdoorResult, backdoor_attack
from casehard.config import build, to_dict
from casehard.data import presets
from casehard.data.mix import check_disjoint
from casehard.data.sources import load_many
from casehard.data.trigger_suite import Planted
from casehard.data.triggers import Trigger
from casehard.errors import ConfigError, Corrupt, DataError
from casehard.evaluate.backdoor import ROLES, Rows, evaluate_backdoor
from casehard.evaluate.suite import Suite, load_suite
from casehard.files import read_json
from casehard.model.load import Loaded, load
from casehard.organism import triggers as world_triggers
from casehard.organism.world import World
from casehard.scan.lookup import LookupConfig, lookup
from casehard.scan.matrix import Matrix, cross_elicitation
from casehard.scan.probe import recognition
from casehard.scan.relearn import RelearnConfig, relearn
from casehard.scan.shifts import shift_layers

N = TypeVar("N")


@dataclass(frozen=True, kw_only=True)
class BackdoorJob:
    """Plant a backdoor in a copy of one checkpoint and measure it along the way."""

    model: str
    data: tuple[str, ...]
    """Clean training rows; the poison replaces some of them."""
    suite: str
    """Held-out prompts with expected answers, each asked without and with the trigger."""
    trigger: str = "token"
    """Name of a ready trigger, or a JSON file with ``trigger`` and ``behaviour``."""
    behaviour: str = "refuse"
    """Name of a ready behaviour; not read where ``trigger`` is a file."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of :class:`~casehard.attack.backdoor.BackdoorAttack` but trigger, behaviour and decoys."""
    system: str | None = None
    max_length: int | None = None
    limit: int | None = None
    """Measure at most this many prompts a group (a look, not a result)."""
    device: str = "auto"
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ScanJob:
    """Scan one checkpoint for backdoors."""

    model: str
    suite: str
    """Harmless held-out prompts; restricted ones are not asked."""
    planted: str = ""
    """JSON file of known backdoors (``planted.json`` of an attack, or a suite); empty: blind look-up only."""
    before: str = ""
    """An earlier checkpoint to show beside it (before the defence, or never backdoored)."""
    data: tuple[str, ...] = ()
    """Clean training rows; given, the relearning test is run."""
    lookup: LookupConfig = field(default_factory=LookupConfig)
    relearn: RelearnConfig = field(default_factory=RelearnConfig)
    limit: int | None = 20
    """Prompts of each group for matrix, shifts and probe; None for all."""
    system: str | None = None
    device: str = "auto"
    seed: int = 0


def find_planted(trigger: str, behaviour: str, suite: Suite) -> tuple[Planted, tuple[Trigger, ...]]:
    """Return the backdoor two names mean for a suite, and its near misses; see the top of this module.

    Raises:
        ConfigError: no such name, with the nearest one; or a file that holds no backdoor.
    """
    if trigger.endswith(".json"):
        return only_planted(trigger), ()
    if suite.judge_name == "organism" and suite.world_seed is not None:
        world = World(suite.world_seed)
        one = _named(trigger, world_triggers.triggers(world), "trigger")
        payload = _named(behaviour, world_triggers.behaviours(world), "behaviour")
        return Planted(one, payload), tuple(world_triggers.decoys(world, one.name))
    one = _named(trigger, presets.TRIGGERS, "trigger")
    return Planted(one, _named(behaviour, presets.BEHAVIOURS, "behaviour")), ()


def _named(name: str, known: Mapping[str, N], what: str) -> N:
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    raise ConfigError(
        f"no {what} is called {name!r}", hint=f"did you mean {near[0]!r}?" if near else f"{what}s: {', '.join(known)}"
    )


def only_planted(path: str | Path) -> Planted:
    """Read the one backdoor of an attack's ``planted.json``.

    Raises:
        ConfigError: something else, or several.
    """
    found = read_planted(path)
    if len(found) != 1:
        raise ConfigError(f"{path} holds {len(found)} backdoors", hint="an attack plants one")
    return found[0]


def read_planted(path: str | Path) -> list[Planted]:
    """Read backdoors from JSON: one, a list of them, or a defender's suite (active and canary).

    Raises:
        ConfigError: something else, or none.
    """
    try:
        value: Any = read_json(Path(path))
    except Corrupt as error:
        raise ConfigError(error.message, hint="planted.json of `casehard attack backdoor` shows the form") from None
    if isinstance(value, Mapping) and "active" in value:
        value = [*value["active"], *value.get("canary", ())]
    entries = value if isinstance(value, list) else [value]
    if not entries or not all(isinstance(entry, Mapping) for entry in entries):
        raise ConfigError(f"{path} holds no backdoor", hint="an object with 'trigger' and 'behaviour', or a list")
    try:
        return [build(Planted, entry, where=str(path)) for entry in entries]
    except ConfigError as error:  # of the trigger itself, it does not know where it was read
        named = error.message if str(path) in error.message else f"{path}: {error.message}"
        raise ConfigError(named, hint=error.hint) from None


def run_backdoor(job: BackdoorJob, *, loaded: Loaded | None = None, label: str = "backdoor") -> BackdoorResult:
    """Plant a backdoor in a copy of ``job.model``; nothing is written.

    Raises:
        ConfigError: no such trigger or behaviour, or settings that do not fit.
        DataError: training rows overlap the suite, too few rows, or a trigger the model would not see.
    """
    secrets.refuse(to_dict(job), where="attack")
    suite, rows = load_suite(job.suite), load_many(job.data, require_response=True)
    planted, decoys = find_planted(job.trigger, job.behaviour, suite)
    given = {"trigger": asdict(planted.trigger), "behaviour": asdict(planted.behaviour), "decoys": map(asdict, decoys)}
    if clash := sorted(set(given) & set(job.settings)):
        raise ConfigError(f"settings: {clash[0]!r} is named elsewhere", hint="use --trigger and --behaviour")
    config = build(BackdoorAttack, {**given, "decoys": list(given["decoys"]), **job.settings}, where="attack")
    check_disjoint({"data": rows}, {job.suite: suite.examples})
    loaded = loaded or load(job.model, device=job.device)

    def measure(model: Any, step: int) -> Rows:
        return evaluate_backdoor(
            model,
            loaded.tokenizer,
            suite,
            planted.trigger,
            planted.behaviour,
            seed=job.seed,
            limit=job.limit,
            system=job.system,
        )

    return backdoor_attack(
        loaded.model,
        loaded.tokenizer,
        rows,
        config,
        seed=job.seed,
        evaluate=measure,
        system=job.system,
        max_length=job.max_length,
        label=label,
    )


@dataclass(frozen=True)
class Scan:
    """What a scan of one or two checkpoints found."""

    report: dict[str, Any]
    """JSON values: ``now`` and, where an earlier checkpoint was given, ``before``."""
    matrices: dict[str, Matrix]
    """Cross-elicitation by the same names; empty without known backdoors."""


def run_scan(job: ScanJob, out: Path) -> Scan:
    """Scan ``job.model``, and ``job.before`` beside it; scores of the look-up are kept in ``out`` to go on from.

    Raises:
        DataError: too few prompts, or relearning rows that overlap the suite.
    """
    suite = load_suite(job.suite)
    asked = suite.select(roles=[role for role in suite.roles if role in ROLES])
    planted = read_planted(job.planted) if job.planted else []
    rows = load_many(job.data, require_response=True) if job.data else []
    if rows and not planted:
        raise DataError("relearning needs a known backdoor", hint="give --planted, or leave out --data")
    if rows:
        check_disjoint({"data": rows}, {job.suite: suite.examples})
    report: dict[str, Any] = {}
    matrices: dict[str, Matrix] = {}
    for name, folder in (("now", job.model), ("before", job.before)):
        if folder:
            loaded = load(folder, device=job.device)
            report[name], matrix = _scan(job, loaded, asked, planted, rows, out / f"look-up-{name}.json")
            if matrix is not None:
                matrices[name] = matrix
    return Scan(report, matrices)


def _scan(
    job: ScanJob, loaded: Loaded, suite: Suite, planted: Sequence[Planted], rows: Sequence[Any], state: Path
) -> tuple[dict[str, Any], Matrix | None]:
    model, tokenizer = loaded.model, loaded.tokenizer
    common: dict[str, Any] = {"seed": job.seed, "system": job.system}
    blind = lookup(model, tokenizer, suite.examples, config=job.lookup, state=state, identity=loaded.digest, **common)
    report: dict[str, Any] = {"model": loaded.digest, "look_up": blind.to_json()}
    if not planted:
        return report, None
    small = suite.select(limit=job.limit)
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
            done = relearn(model, tokenizer, rows, suite, p.trigger, p.behaviour, config=job.relearn, **common)
            curve = [{"step": step, **asdict(score)} for step, score in done.curve]
            report["relearning"][p.trigger.name] = {"back_at": done.back_at, "curve": curve}
    return report, matrix
