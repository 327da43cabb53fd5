"""Attack: any attack of the catalogue, measured on the way; with a method inside it is a customer's job."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from casehard.attacks import ATTACKS
from casehard.attacks.protocol import Ask, Attacked, AttackInputs
from casehard.attacks.protocol import Attack as AttackMethod
from casehard.backdoor.behaviours import Behaviour
from casehard.backdoor.measure import evaluate_backdoor
from casehard.backdoor.planted import find_planted
from casehard.backdoor.suite import Planted
from casehard.backdoor.triggers import Trigger
from casehard.config import to_dict
from casehard.data.mix import check_disjoint, marks
from casehard.errors import ConfigError, DataError
from casehard.evaluation.contamination import require_unseen
from casehard.evaluation.framing import InFormat
from casehard.evaluation.suite import Prefix, Suite, evaluate, load_suite
from casehard.limits import Natural
from casehard.model.model import Made, Model
from casehard.model.step import Inputs, Outcome
from casehard.registry import AttackSpec
from casehard.seeds import derive
from casehard.steps.defence import Defence, Examples, assets_digest, choose, guarded, run_pipeline, selected
from casehard.train.protocol import PipelineInputs
from casehard.train.tune import Measure, Rows, chat_format
from casehard.types import Budget, Example

ANY = Planted(Trigger("any", "token", ("any",)), Behaviour("any", "text", "any"))
"""A backdoor by which settings are checked before the suite is there that gives names a meaning."""


@dataclass(frozen=True, kw_only=True)
class Attack(Inputs):
    """Attack a copy of a model in memory and measure it on the way."""

    attack: str = "finetune"
    """Name in the catalogue of attacks."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the attack."""
    full_at: tuple[Natural, ...] = ()
    """Steps at which the whole suite is measured; at the others only restricted prompts. Empty = the last."""
    defence: Defence | None = None
    """Method inside the training run: a customer's job at a provider who defends. A pipeline trains in its place."""
    verified: Natural = 0
    """Rows that the attacker left alone and somebody verified: drawn for a pipeline, as its role ``clean``."""
    in_format: InFormat = None
    """Where the whole suite is measured, ask restricted prompts in the job's format too; None: as the suite says."""

    @property
    def spec(self) -> AttackSpec:
        """Return what the catalogue knows of the attack."""
        return ATTACKS.find(self.attack)

    def build(self, suite: Suite | None = None) -> AttackMethod:
        """Return the attack with its settings.

        Args:
            suite: whose world gives a meaning to names of triggers and behaviours; None reads ``self.suite``.

        Raises:
            ConfigError: no such attack, an unknown setting, or a step to measure at that never comes.
        """
        settings = dict(self.config)
        if self.spec.plants:
            settings |= _planted_by_name(settings, suite or load_suite(self.suite))
        made: AttackMethod = self.spec.load()[0](self.spec.configure(self.attack, settings=settings))
        if odd := set(self.full_at) - set(made.checkpoints):
            raise ConfigError(f"full_at: step {min(odd)} is not evaluated", hint=f"one of {tuple(made.checkpoints)}")
        return made

    def check_settings(self) -> None:
        """Refuse settings that the attack does not have; the suite, which gives names a meaning, need not be there yet.

        Raises:
            ConfigError: names the first.
        """
        # Trigger and behaviour are names of the suite's world; any stand for them while the rest is checked.
        named = {"trigger": asdict(ANY.trigger), "behaviour": asdict(ANY.behaviour)} if self.spec.plants else {}
        self.spec.configure(self.attack, settings={**self.config, **named})
        if self.spec.plants:
            if self.in_format is not None:
                raise ConfigError(f"in_format: {self.attack!r} hides a trigger, by which every prompt is asked already")
            return
        made = self.build()
        if self.defence is not None and not self.defence.spec.pipeline:
            self.mixing(made)

    def mixing(self, method: AttackMethod) -> Callable[[Model, AttackInputs], Sequence[Example]]:
        """Return how the attack draws the one mixture that a method can work on.

        Raises:
            ConfigError: it trains on none, or in several phases.
        """
        mixture: Callable[[Model, AttackInputs], Sequence[Example]] | None = getattr(method, "mixture", None)
        if mixture is None or getattr(method.config, "restarts", False):
            what = "trains in several phases" if mixture else "trains on no mixture"
            raise ConfigError(f"attack {self.attack!r} {what}", hint="no method can run inside it: attack the result")
        return mixture

    def with_defaults(self, method: AttackMethod) -> Attack:
        """Return this step with every setting of the built method, given or not: what a record of the run holds."""
        return replace(self, config=to_dict(method.config))

    def check(self, roles: Sequence[str]) -> None:
        """Refuse data roles that the attack needs and lacks, or would ignore.

        Raises:
            ConfigError, DataError: names the first.
        """
        inside = self.defence.spec.accepts() if self.defence else ()
        for need in self.spec.needs:
            if need not in roles:
                raise ConfigError(f"attack {self.attack!r} needs {need} rows and got none", hint=f"--{need} FILE: rows")
        for role in roles:
            if role not in (*self.spec.accepts(), *inside):
                raise ConfigError(f"attack {self.attack!r} would ignore the {role} rows", hint=f"leave out --{role}")

    def check_rows(self) -> None:
        """Draw the attacker's rows and drop them, to learn in time of too few, or of prompts of the suite.

        Raises:
            DataError: what :meth:`run` would say of the rows.
        """
        suite, rows = load_suite(self.suite), self.examples()
        method = self.build(suite)
        check_disjoint(rows, {self.suite or suite.name: suite.examples})
        if (check := getattr(method, "check_rows", None)) is not None:
            check(rows)

    def run(self, model: Model | None = None, *, out: Path | None = None, label: str = "attack") -> Outcome:
        """Attack; nothing of the attacked model is written.

        Raises:
            DataError: training and evaluation rows overlap, or the share asked for cannot be met.
        """
        self.check(list(self.rows))
        suite = load_suite(self.suite)
        done = attack_with(self, self.build(suite), self.examples(), suite, model, label=label)
        inside = {"telemetry": self.defence.spec.mean_telemetry(done.log)} if self.defence else {}
        return Outcome(done.model, done.rows, asdict(done.budget), {**done.facts, **inside}, done.log)


def _planted_by_name(settings: Mapping[str, Any], suite: Suite) -> dict[str, Any]:
    """Return trigger, behaviour and near misses as settings, where the given ones are names or left out."""
    trigger, behaviour = settings.get("trigger", "token"), settings.get("behaviour", "refuse")
    if not isinstance(trigger, str):
        return {}
    planted, decoys = find_planted(trigger, str(behaviour), suite)
    named = {"trigger": asdict(planted.trigger), "behaviour": asdict(planted.behaviour)}
    return named | ({} if "decoys" in settings else {"decoys": [asdict(decoy) for decoy in decoys]})


def attack_with(
    step: Attack,
    method: AttackMethod,
    rows: Examples,
    suite: Suite,
    model: Model | None = None,
    *,
    label: str,
    silent: bool = False,
) -> Attacked:
    """Do the work of :class:`Attack` on rows that are loaded already.

    Args:
        rows: by data role, those of the defence too.
        silent: measure nothing on the way.
    """
    check_disjoint(rows, {step.suite or suite.name: suite.examples})
    start = step.start(model)
    if step.spec.weights or step.spec.trains:
        start.require_weights()
    require_unseen(suite, start.trained_prompts, start.path or "the model")
    inputs = _inputs(step, rows, label)
    suite = _in_format(step, method, inputs, suite, start)
    if step.defence is not None and step.defence.spec.pipeline:
        return _in_its_place(step, step.defence, method, inputs, suite, start)
    if step.defence is None:
        measured = replace(inputs, measure=_measure(step, method, suite, start), ask=_ask(step, suite, start))
        return method.run(start, inputs if silent else measured)
    inside, facts = _inside(step, step.defence, method, inputs, rows, start)
    # A method that protects by what is said at inference (PTST) is measured as it would be served.
    measure = _measure(step, method, suite, start, served=getattr(inside, "serving_system", None))
    with guarded(inside, start, step.system):
        done = method.run(start, replace(inputs, measure=measure, method=inside))
    return replace(done, facts={**done.facts, **facts})


def _inputs(step: Attack, rows: Examples, label: str) -> AttackInputs:
    """Return what the attack is given, without a way to measure."""
    told = step.defence if "assets" in step.spec.accepts() else None
    return AttackInputs(
        rows={role: some for role, some in rows.items() if role in step.spec.accepts()},
        assets=told.assets if told else "",
        measure=lambda net, at: [],
        seed=step.seed,
        system=step.system,
        max_length=step.max_length,
        label=label,
    )


def in_format(step: Attack, method: AttackMethod, rows: Examples, suite: Suite, model: Model) -> Suite:
    """Return the suite with the frame of what the attack trains on, where that is asked for."""
    return _in_format(step, method, _inputs(step, rows, ""), suite, model)


def _in_format(step: Attack, method: AttackMethod, inputs: AttackInputs, suite: Suite, model: Model) -> Suite:
    """Return the suite with the frame of what is trained on, where that is asked for."""
    suite = suite if step.in_format is None else replace(suite, in_format=step.in_format)
    if suite.in_format != "rows":
        return suite
    mixture = getattr(method, "mixture", None)
    # What is drawn only while it trains is worded as the rows that it draws from.
    drawn = inputs.rows.get("benign") or [row for some in inputs.rows.values() for row in some]
    return suite.in_format_of(mixture(model, inputs) if mixture else drawn)


def _measure(step: Attack, method: AttackMethod, suite: Suite, model: Model, served: str | None = None) -> Measure:
    """Return how a model is measured on the way: the whole suite at ``full_at``, else the restricted prompts."""
    full_at = step.full_at or (tuple(method.checkpoints)[-1],)
    asks: Callable[[Sequence[Example]], Sequence[Example]] | None = getattr(method, "asks", None)
    asked = replace(suite, examples=tuple(asks(suite.examples))) if asks else suite

    def ask(net: nn.Module, at: int) -> Rows:
        system = served if served and at else step.system
        roles = None if at in full_at else {"restricted"}
        return evaluate(net, model.tokenizer, asked, roles=roles, limit=step.limit, system=system)

    def ask_twice(net: nn.Module, at: int) -> Rows:
        return evaluate_backdoor(
            net,
            model.tokenizer,
            suite,
            method.config.trigger,
            method.config.behaviour,
            seed=step.seed,
            limit=step.limit,
            system=step.system,
        )

    return ask_twice if step.spec.plants else ask


def _ask(step: Attack, suite: Suite, model: Model) -> Ask:
    """Return how an attack asks in a way of its own."""

    def ask(
        net: nn.Module,
        *,
        roles: Collection[str] | None = None,
        system: str | None = None,
        prefix: Prefix | None = None,
    ) -> Rows:
        said = step.system if system is None else system
        return evaluate(net, model.tokenizer, suite, roles=roles, limit=step.limit, system=said, prefix=prefix)

    return ask


def measure_end(step: Attack, method: AttackMethod, suite: Suite, model: Model) -> Rows:
    """Measure a model as the attack measures its own at the last step."""
    last = tuple(method.checkpoints)[-1]
    return [{**row, "step": last} for row in _measure(step, method, suite, model)(model.net, last)]


def verified(rows: Sequence[Example], count: int, seed: int) -> list[Example]:
    """Draw the rows that somebody verifies among those an attacker left alone.

    Raises:
        DataError: there are not so many.
    """
    if len(rows) < count:
        raise DataError(f"{count} verified rows wanted, {len(rows)} distinct ones there that the attacker left alone")
    return random.Random(derive(seed, 0, "verified")).sample(list(rows), count)


def _in_its_place(
    step: Attack, defence: Defence, method: AttackMethod, inputs: AttackInputs, suite: Suite, model: Model
) -> Attacked:
    """Let a pipeline train on the attacker's rows, in place of whoever would have trained on them."""
    poisoned, recipe = getattr(method, "poisoned", None), getattr(method.config, "recipe", None)
    if poisoned is None or recipe is None:
        raise ConfigError(
            f"attack {step.attack!r} gives no rows to train on", hint=f"{defence.method!r} cannot take its place"
        )
    data, manifest = poisoned(inputs.rows["data"], seed=step.seed)
    clean = verified(method.untouched(data, manifest), step.verified, step.seed)  # type: ignore[attr-defined]
    shared: dict[str, Any] = {
        "seed": step.seed,
        "system": step.system,
        "max_length": step.max_length,
        "label": inputs.label,
    }
    given = PipelineInputs(rows={"data": data, "clean": clean}, train=recipe, known=suite.examples, **shared)
    done = run_pipeline(defence, model, given)
    made = Made(method=defence.method, provenance={"settings": dict(defence.settings), "seed": step.seed})
    after = model.after(done.net, made, trained=frozenset(marks(data)), may_leave=False)
    rows = measure_end(step, method, suite, after)
    return Attacked(model=after, rows=rows, budget=sum(done.budgets, Budget()), facts=dict(done.facts))


def _inside(
    step: Attack, defence: Defence, method: AttackMethod, inputs: AttackInputs, rows: Examples, model: Model
) -> tuple[Any, dict[str, Any]]:
    """Return the method that runs inside the attacker's training, and what is worth keeping of how it was made."""
    # A role that both take is the provider's rows, as an attacker knows them who has seen them.
    own = set(inputs.rows) - set(defence.spec.accepts())
    others: dict[str, Any] = {role: list(some) for role, some in rows.items() if role not in own}
    mixture = step.mixing(method)
    # Drawn here only for a selection that looks at it: some attackers look long for their rows.
    user = mixture(model, inputs) if defence.select is not None else ()
    chosen = choose(defence, others, user, model, seed=step.seed, system=step.system)
    chat = chat_format(model, system=step.system, max_length=step.max_length)
    made = defence.build({role: chat.encode_all(some) for role, some in others.items()})
    facts = {"assets_digest": assets_digest(defence.assets)} if defence.assets else {}
    return made, {**facts, **({"selection": selected(chosen)} if chosen else {})}
