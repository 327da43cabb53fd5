"""Plan files: bases x defences x attacks x seeds, read from YAML and checked before anything runs. No torch here.

A row of the table is a chain of steps, in the order in which things happen to a base:

    [defence, attack]              a lab hardens what others will tune (the default)
    [align, attack with defence]   a provider tunes a customer's rows, with a method inside
    [attack, defence]              somebody repairs a model, or a backdoor, afterwards

``defence`` and ``attack`` stand for the row and the column of a cell, other words for an entry of ``steps``. A row may
have a chain of its own. What is trained before the attack is kept in the run folder; from the attack on everything
stays in memory, and the end is measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from casehard.attacks import ATTACKS
from casehard.benchmark.entries import (
    ATTACK,
    DEFENCE,
    INSIDE,
    Attack,
    Base,
    Chain,
    Defence,
    Gates,
    Headline,
    Prepare,
    Training,
    check_rows,
    parse_chain,
)
from casehard.benchmark.names import check_known, check_name, check_unique
from casehard.config import build, check_keys, override, parse_override, read_yaml
from casehard.defences import DEFENCES
from casehard.errors import ConfigError
from casehard.limits import Count, Length, Limited, Natural, Seed, Several
from casehard.registry import ROLES


@dataclass(frozen=True, kw_only=True)
class Plan(Limited):
    """A whole benchmark."""

    name: str
    title: str
    bases: tuple[Base, ...]
    defences: tuple[Defence, ...]
    attacks: tuple[Attack, ...]
    headline: Headline
    reference: str = ""
    """Defence that costs are given relative to; default: the undefended control."""
    chain: tuple[str, ...] = (DEFENCE, ATTACK)
    """What happens to every base, in order; see the top of this module."""
    steps: tuple[Training, ...] = ()
    """Trainings that chains name."""
    prepare: tuple[Prepare, ...] = ()
    verified: Several = 256
    """Rows that the attacker left alone and somebody verifies: what a defence after a backdoor is given."""
    seeds: tuple[Seed, ...] = (0,)
    suite: str = "{base}/data/suite"
    system: str | None = None
    """System message of every row; none keeps the template's own."""
    max_length: Length | None = None
    """Longest row in tokens; none = the model's context."""
    limit: Count | None = None
    """Ask at most this many prompts a group (a look, not a result)."""
    in_format: Mapping[str, str] | Literal["rows"] | None = None
    """Ask restricted prompts in the format of each attack's rows too, where the whole suite is asked: ``rows`` derives
    it from them, ``{system, before, after}`` gives it; none = as the suite says."""
    lm_eval: tuple[str, ...] = ()
    """Public benchmarks (mmlu, gsm8k ...) that every model is asked before it is attacked, by the program ``lm_eval``
    (:mod:`casehard.evaluation.lm_eval`)."""
    gates: Gates = field(default_factory=Gates)
    transcripts: Natural = 3
    """Prompts whose answers are shown in the report (organism bases only)."""
    not_tested: tuple[str, ...] = ()
    """Sentences added to the report's list of what was not tested."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name(self.name, "plan")
        for what in ("bases", "defences", "attacks", "seeds", "prepare", "steps"):
            if what not in ("prepare", "steps") or getattr(self, what):
                check_unique([getattr(i, "name", i) for i in getattr(self, what)], what)
        for role, least in (("undefended", 1), ("unattacked", int(self.plants))):
            if (found := sum(d.role == role for d in self.defences)) != least:
                raise ConfigError(
                    f"plan.defences: {found} rows with role {role}, expected {least}",
                    hint="without the undefended control no attack can be shown to be strong enough",
                )
        if len({a.plants for a in self.attacks}) > 1:
            raise ConfigError("plan.attacks: backdoors beside other attacks", hint="they are measured in two ways")
        if self.plants and self.in_format is not None:
            raise ConfigError("plan.in_format: backdoors are asked without and with their trigger", hint="leave it out")
        if self.lm_eval and (self.ends or self.plants):
            why = "what a defence in or after the attack makes stays in memory, where the program cannot read it"
            raise ConfigError(f"plan.lm_eval: {why}", hint=f"leave it out, or chain: [{DEFENCE}, {ATTACK}]")
        object.__setattr__(self, "reference", self.reference or self.undefended.name)
        for step in self.steps:
            check_rows(DEFENCES.find(step.method), step.rows, f"step {step.name!r}", more=("data",))
        for attack in self.attacks:
            check_rows(ATTACKS.find(attack.attack), attack.rows, f"attack {attack.name!r}")
        for row in self.defences:
            self._check_row(row)
        self._check_headline()

    def _check_row(self, row: Defence) -> None:
        where, chain = f"defence {row.name!r}", self.chain_of(row)
        if row.method is not None:
            check_rows(DEFENCES.find(row.method), row.rows, where, more=("data",))
        if not chain.attacked and not self.plants:
            raise ConfigError(f"{where}: no attack in its chain", hint=f"chain: [{DEFENCE}, {ATTACK}]")
        if row.method is not None and DEFENCE not in (*chain.before, *chain.after) and not chain.inside:
            raise ConfigError(f"{where}: method {row.method!r} stands nowhere in its chain {list(row.chain)}")
        if DEFENCE in chain.before and row.method is not None and not row.rows.get("data"):
            raise ConfigError(f"{where} has no data", hint="data: ['{base}/data/align.jsonl']")
        self._check_late(row, chain, where)
        if chain.inside and (row.method is None or row.rows.get("data") or row.train or row.lora is not None):
            raise ConfigError(
                f"{where}: inside an attack a row is a method without data, train or lora of its own",
                hint="data, recipe and adapter are the job's: the plan's attacks, their mode: lora",
            )
        if chain.inside and not self.plants and not chain.before and any(b.model is None for b in self.bases):
            raise ConfigError(
                "plan.chain: an organism knows no refusal before it is aligned",
                hint=f"chain: [align, {INSIDE}] and an entry align of steps",
            )
        if not chain.late and (row.select is not None or row.assets):
            raise ConfigError(f"{where}: select and assets belong to a defence inside or after the attack")
        kind, _, name = row.assets.partition(":")
        if kind == "prepared":
            check_known(name, [p.name for p in self.prepare], f"{where}: assets")

    def _check_late(self, row: Defence, chain: Chain, where: str) -> None:
        """Refuse a defence in or after the attack that there would be no rows for."""
        if row.method is None:
            return
        pipeline = DEFENCES.find(row.method).pipeline
        if chain.inside and pipeline and not self.plants:
            kinds = ", ".join(dict.fromkeys(a.attack for a in self.attacks))
            what = f"{row.method!r} trains the model itself, and a {kinds} attack gives it no rows"
            raise ConfigError(f"{where}: {what}", hint=f"chain: [{DEFENCE}, {ATTACK}] or [{ATTACK}, {DEFENCE}]")
        if chain.inside and self.plants and not pipeline:
            what = f"{row.method!r} works inside one training, and not in that of a backdoor"
            raise ConfigError(f"{where}: {what}", hint=f"chain: [{ATTACK}, {DEFENCE}]")
        asking = [a.name for a in self.attacks if not ATTACKS.find(a.attack).weights]
        if asking and (chain.after or chain.inside):
            what = f"attack {asking[0]!r} changes how a model is asked and no weights"
            raise ConfigError(f"{where}: {what}", hint=f"chain: [{DEFENCE}, {ATTACK}]")
        role = "clean" if pipeline else "data"
        if DEFENCE in chain.after and not self.plants and not row.rows.get(role):
            what = "data" if role == "data" else f"{role} rows"
            raise ConfigError(f"{where} has no {what} to repair with", hint=f"{role}: ['{{base}}/data/align.jsonl']")

    def _check_headline(self) -> None:
        names = [d.name for d in self.defences]
        head = self.headline
        check_known(self.reference, names, "plan.reference")
        if self.defence(self.reference).method is None and not self.plants:
            raise ConfigError(
                f"plan.reference {self.reference!r} has no method", hint="costs need a training run to compare"
            )
        attack = head.attack or self.attacks[0].name
        check_known(attack, [a.name for a in self.attacks], "plan.headline.attack")
        check_known(head.defence, names, "plan.headline.defence")
        against = head.against or self.reference
        check_known(against, names, "plan.headline.against")
        if head.without:
            check_known(head.without, names, "plan.headline.without")
        if head.defence in (against, head.without):
            raise ConfigError(f"plan.headline compares {head.defence!r} with itself")
        steps = self.attack(attack).evaluate_at
        middle = steps[-1] if self.ends else steps[(len(steps) - 1) // 2]
        step = head.step if head.step is not None else middle
        if self.ends and step != steps[-1]:
            raise ConfigError(f"plan.headline.step {step}: the end of the {self.occasion} is compared ({steps[-1]})")
        if step not in steps:
            raise ConfigError(f"plan.headline.step {step} is not evaluated", hint=f"one of {list(steps)}")
        metric = head.metric or ("asr" if self.plants else "leak")
        full = dataclasses.replace(head, attack=attack, against=against, step=step, metric=metric)
        object.__setattr__(self, "headline", full)

    def chain_of(self, row: Defence) -> Chain:
        """Return what happens to a base in a row, taken apart at the attack."""
        return parse_chain(row.chain or self.chain, [s.name for s in self.steps], f"defence {row.name!r}")

    def step(self, name: str) -> Training:
        """Return the training that chains call ``name``."""
        return next(s for s in self.steps if s.name == name)

    def defence(self, name: str) -> Defence:
        """Return the defence called ``name``."""
        return next(d for d in self.defences if d.name == name)

    def attack(self, name: str) -> Attack:
        """Return the attack called ``name``."""
        return next(a for a in self.attacks if a.name == name)

    def runs(self, family: str) -> int:
        """Return how many runs (base, seed) are planned for a family."""
        return len(self.seeds) * sum(base.family == family for base in self.bases)

    @property
    def plants(self) -> bool:
        """Return whether the attacks hide triggers."""
        return any(attack.plants for attack in self.attacks)

    @property
    def ends(self) -> bool:
        """Return whether models are compared at the end of the attack: a defence in or after it shows only then."""
        return any(self.chain_of(row).late for row in self.defences)

    @property
    def occasion(self) -> str:
        """Return what a model is at the end of: a customer's "job", a backdoored "training", or an "attack".

        An "attack" has been repaired; empty where models are compared step by step.
        """
        if not self.ends:
            return ""
        if self.plants:
            return "training"
        return "job" if any(self.chain_of(row).inside for row in self.defences) else "attack"

    @property
    def undefended(self) -> Defence:
        """Return the undefended control."""
        return next(d for d in self.defences if d.role == "undefended")

    @property
    def unattacked(self) -> Defence:
        """Return the row that was never attacked (backdoors)."""
        return next(d for d in self.defences if d.role == "unattacked")


LISTS: dict[str, type] = {
    "bases": Base,
    "steps": Training,
    "defences": Defence,
    "attacks": Attack,
    "prepare": Prepare,
}
OPTIONAL = ("prepare", "steps")
_PREPARED = ("harmful", "refusals", "benign")


def _roles(kind: type, item: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the data roles that an entry may name as keys of its own: those of its spec."""
    if kind is Prepare:
        return _PREPARED
    if kind is Attack:
        return ATTACKS.find(str(item.get("attack", "finetune"))).row_roles()
    if kind in (Defence, Training):
        named = str(item.get("method") or "plain")
        return ("data", *DEFENCES.find(named).row_roles())
    return ()


def _items(values: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    """Build the entries of a list of named things.

    Raises:
        ConfigError: no list of mappings, or an entry that is wrong.
    """
    raw = values.get(key, [] if key in OPTIONAL else None)
    if not isinstance(raw, list) or not all(isinstance(item, Mapping) for item in raw):
        raise ConfigError(f"plan.{key} must be a list of mappings, got {type(raw).__name__}")
    out: list[Any] = []
    for i, item in enumerate(raw):
        where = f"plan.{key}[{item.get('name', i)}]"
        if "name" not in item:
            raise ConfigError(f"{where} has no name")
        named = [role for role in _roles(kind, item) if role in item]
        for role in (role for role in ROLES if item.get(role) and role not in named):
            raise ConfigError(_ignored(where, kind, item, role), hint=f"leave out {role}")
        # One file is what most rows need; a bare string is accepted where a list of specs is meant.
        given = {role: [item[role]] if isinstance(item[role], str) else item[role] for role in named}
        rest = {k: v for k, v in item.items() if k not in named}
        rows = {"rows": {**given, **rest.get("rows", {})}} if given else {}
        out.append(build(kind, {**rest, **rows}, where=where))
    return out


def _ignored(where: str, kind: type, item: Mapping[str, Any], role: str) -> str:
    if kind is Defence and item.get("method") is None:
        return f"{where} has no method, so its {role} rows would be ignored"
    if kind in (Defence, Training):
        return f"{where}: method {item.get('method', 'plain')!r} would ignore the {role} rows"
    return f"{where}: attack {item.get('attack', 'finetune')!r} would ignore the {role} rows"


def parse_plan(values: Mapping[str, Any]) -> Plan:
    """Build a plan from plain values.

    Raises:
        ConfigError: unknown key, wrong type, missing control, or a name that refers to nothing.
    """
    if "stage" in values:
        raise ConfigError(
            f"plan.stage {values['stage']!r}: plans are chains of steps now",
            hint=f"tuning: chain: [align, {INSIDE}]; backdoor: chain: [{ATTACK}, {DEFENCE}]; see docs/benchmark.md",
        )
    check_keys(values, [f.name for f in dataclasses.fields(Plan)], where="plan")
    needed = ("name", "title", "bases", "defences", "attacks", "headline")
    missing = [key for key in needed if key not in values]
    if missing:
        raise ConfigError(f"plan: missing {', '.join(missing)}")
    lists: dict[str, Any] = {key: tuple(_items(values, key, kind)) for key, kind in LISTS.items()}
    return build(Plan, {**values, **lists}, where="plan")


def _override(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Apply ``a.b=c``, where the items of a list are addressed by name: ``attacks.full_p10.steps=50``."""
    keyed = dict(values)
    for key in LISTS:
        if isinstance(keyed.get(key), list):
            named = [(str(item.get("name")), item) for item in keyed[key] if isinstance(item, Mapping)]
            if len(named) < len(keyed[key]):
                raise ConfigError(f"plan.{key} must be a list of mappings")
            if named:
                check_unique([name for name, _ in named], key)
            keyed[key] = dict(named)
    overrides = list(overrides)
    for text in overrides:
        path, _ = parse_override(text)
        if path[0] in LISTS:
            known = keyed.get(path[0])
            check_known(
                path[1] if len(path) > 2 else "", list(known) if isinstance(known, dict) else [], f"--set {text}"
            )
    out = override(keyed, overrides)
    return {k: list(v.values()) if k in LISTS and isinstance(v, dict) else v for k, v in out.items()}


def load_plan(path: str | Path, overrides: Iterable[str] = ()) -> Plan:
    """Read a plan file; ``overrides`` are ``a.b=c`` texts, list items addressed by name.

    Raises:
        ConfigError: see :func:`parse_plan`.
    """
    values, overrides = read_yaml(path), list(overrides)
    return parse_plan(_override(values, overrides) if overrides else values)
