"""Attack: any attack of the catalogue, measured on the way; with a method inside it is a customer's job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from casehard.attacks import ATTACKS
from casehard.attacks.protocol import Attack as AttackMethod
from casehard.attacks.protocol import Attacked, AttackInputs
from casehard.backdoor.measure import evaluate_backdoor
from casehard.backdoor.planted import find_planted
from casehard.config import to_dict
from casehard.data.mix import check_disjoint
from casehard.errors import ConfigError
from casehard.evaluation.contamination import require_unseen
from casehard.evaluation.suite import Suite, evaluate, load_suite
from casehard.limits import Natural
from casehard.model.model import Model
from casehard.model.step import Inputs, Outcome
from casehard.registry import AttackSpec
from casehard.steps.defence import Defence, Examples, assets_digest, choose, guarded, selected
from casehard.train.tune import Measure, Rows, chat_format


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
    """Method inside the training run: a customer's job at a provider who defends."""

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
    step: Attack, method: AttackMethod, rows: Examples, suite: Suite, model: Model | None = None, *, label: str
) -> Attacked:
    """Do the work of :class:`Attack` on rows that are loaded already; ``rows`` holds the defence's roles too."""
    check_disjoint(rows, {step.suite or suite.name: suite.examples})
    start = step.start(model)
    require_unseen(suite, start.trained_prompts, start.path or "the model")
    own = {role: some for role, some in rows.items() if role in step.spec.accepts()}
    inputs = AttackInputs(
        rows=own,
        measure=lambda net, at: [],
        seed=step.seed,
        system=step.system,
        max_length=step.max_length,
        label=label,
    )
    if step.defence is None:
        return method.run(start, replace(inputs, measure=_measure(step, method, suite, start)))
    inside, facts = _inside(step, step.defence, method, inputs, rows, start)
    # A method that protects by what is said at inference (PTST) is measured as it would be served.
    measure = _measure(step, method, suite, start, served=getattr(inside, "serving_system", None))
    with guarded(inside, start, step.system):
        done = method.run(start, replace(inputs, measure=measure, method=inside))
    return replace(done, facts={**done.facts, **facts})


def _measure(step: Attack, method: AttackMethod, suite: Suite, model: Model, served: str | None = None) -> Measure:
    """Return how a model is measured on the way: the whole suite at ``full_at``, else the restricted prompts."""
    full_at = step.full_at or (tuple(method.checkpoints)[-1],)

    def ask(net: nn.Module, at: int) -> Rows:
        system = served if served and at else step.system
        roles = None if at in full_at else {"restricted"}
        return evaluate(net, model.tokenizer, suite, roles=roles, limit=step.limit, system=system)

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


def _inside(
    step: Attack, defence: Defence, method: AttackMethod, inputs: AttackInputs, rows: Examples, model: Model
) -> tuple[Any, dict[str, Any]]:
    """Return the method that runs inside the attacker's training, and what is worth keeping of how it was made."""
    others: dict[str, Any] = {role: list(some) for role, some in rows.items() if role not in inputs.rows}
    mixture = getattr(method, "mixture", None)
    if mixture is None:
        raise ConfigError(f"attack {step.attack!r} trains on no mixture", hint="no method can run inside it")
    chosen = choose(defence, others, mixture(inputs), model, step.seed)
    chat = chat_format(model, system=step.system, max_length=step.max_length)
    made = defence.build({role: chat.encode_all(some) for role, some in others.items()})
    facts = {"assets_digest": assets_digest(defence.assets)} if defence.assets else {}
    return made, {**facts, **({"selection": selected(chosen)} if chosen else {})}
