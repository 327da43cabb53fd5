"""Catalogues of defences, attacks and judges: name -> spec, those of other packages included.

All that the rest of the library knows of a method stands in its spec: where it lives, what it is for, which rows it
takes, what it reports. Nothing else lists methods by name. Another package adds one through an entry point whose value
is a spec; entry points are looked up only when a name is unknown, or when the catalogue is listed. No torch here.
"""

from __future__ import annotations

import difflib
import importlib
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, Literal, TypeVar

from casehard.config import build, to_dict
from casehard.errors import ConfigError

ROLES: dict[str, str] = {
    "unsafe": "restricted prompts with compliant answers",
    "retain": "harmless prompts with answers",
    "safe": "restricted prompts with refusals, and harmless rows",
    "harmful": "restricted prompts with compliant answers",
    "benign": "the attacker's cover rows",
    "data": "rows to train on",
    "clean": "verified rows: nobody can have poisoned them",
}
"""Data roles of the built-in specs, and what is in them; a spec may describe further ones of its own."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Where something lives and what the rest of the library must know of it."""

    module: str
    """Dotted name of the module, imported on first use."""
    cls: str
    """Name of the class there."""
    config: str
    """Name of its configuration, a frozen dataclass, there."""
    purpose: str
    """What it is for, in one or two sentences: tables, cards and ``--help`` say it."""
    needs: tuple[str, ...] = ()
    """Data roles without which it refuses to run."""
    takes: tuple[str, ...] = ()
    """Further data roles it accepts."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """What is in data roles that :data:`ROLES` does not know."""
    telemetry: tuple[str, ...] = ()
    """Logged quantities whose mean over the run a report shows."""

    def load(self) -> tuple[type, type]:
        """Import and return (class, configuration)."""
        module = importlib.import_module(self.module)
        return getattr(module, self.cls), getattr(module, self.config)

    def presets(self) -> dict[str, Any]:
        """Return the named settings, from ``PRESETS`` of the module; empty when it has none."""
        return getattr(importlib.import_module(self.module), "PRESETS", {})

    def configure(self, name: str, preset: str = "", settings: Mapping[str, Any] | None = None) -> Any:
        """Return the configuration: a preset's values, or the defaults when ``preset`` is empty, under ``settings``.

        Args:
            name: what messages call it.

        Raises:
            ConfigError: no such preset, an unknown setting or a value out of range.
        """
        presets = self.presets() if preset else {}
        if preset and preset not in presets:
            listed = f"presets: {', '.join(presets)}" if presets else "it has none: leave out --preset"
            raise ConfigError(f"{name!r} has no preset {preset!r}", hint=listed)
        start = to_dict(presets[preset]) if preset else {}
        config: Any = build(self.load()[1], {**start, **(settings or {})}, where=name)
        return config

    def accepts(self) -> tuple[str, ...]:
        """Return every data role it needs or takes; ``assets``, a folder and no rows, among them."""
        return tuple(dict.fromkeys((*self.needs, *self.takes)))

    def row_roles(self) -> tuple[str, ...]:
        """Return those of :meth:`accepts` that are rows."""
        return tuple(role for role in self.accepts() if role != "assets")

    def mean_telemetry(self, log: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Return the mean over a run's log rows of each quantity in ``telemetry`` that the run logged."""
        seen: dict[str, list[float]] = {}
        for row in log:
            for key in self.telemetry:
                if key in row:
                    seen.setdefault(key, []).append(float(row[key]))
        return {key: statistics.fmean(values) for key, values in seen.items()}

    def describe(self, role: str) -> str:
        """Return what is in the rows of a data role."""
        return self.roles.get(role) or ROLES.get(role, "rows")


@dataclass(frozen=True, kw_only=True)
class DefenceSpec(Spec):
    """A method with seams of ``casehard.train.protocol``; ``takes`` may hold ``assets``, a folder it reads."""

    hardens: bool = True
    """Whether a card may call its result hardened: against harmful fine-tuning, that is."""
    adapter: bool = False
    """Tunes a LoRA adapter and nothing else: what leaves is an adapter, not a checkpoint."""
    lora: bool = True
    """Whether it can work while an adapter trains; False for what acts on all weights by its definition."""
    ranks: bool = False
    """Whether several ranks may train one model."""
    pipeline: bool = False
    """Trains the model itself (``casehard.train.protocol.Pipeline``) instead of working inside one training."""
    repairs: bool = False
    """Whether it takes a backdoor out of a finished model with no more than verified rows and, where it needs assets,
    the trusted base: a method trains on those rows, a pipeline gets them as ``clean``."""
    selects: bool = False
    """Whether safe rows are chosen (``casehard.data.select``) unless all are asked for."""
    limits: tuple[str, ...] = ()
    """Sentences that a model card adds to what the result is not."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """Training settings (``casehard.train.recipe.TrainConfig``) of a run that gives none of its own."""

    def training(self, given: Any) -> Any:
        """Return the training settings of a run: a group of them over those of the method; else what was given."""
        return {**self.train, **given} if isinstance(given, Mapping) else given


@dataclass(frozen=True)
class Flag:
    """A setting that has an option of its own on the command line."""

    help: str
    kind: type[int] | type[float] | type[str] = str
    metavar: str = ""
    """What the help writes for a value; empty: its type."""


@dataclass(frozen=True, kw_only=True)
class AttackSpec(Spec):
    """An attack of ``casehard.attacks.protocol``."""

    trains: bool = True
    """Whether it changes weights step by step, so that there are steps to measure at."""
    weights: bool = True
    """Whether it changes weights at all; where it changes how a model is asked, nothing is left to repair."""
    share: str = ""
    """Setting that says which share of the rows is the attacker's; empty where there is none."""
    knows: bool = False
    """Whether it is made against a defence, by somebody who knows how that works."""
    plants: bool = False
    """Whether it hides a trigger: its settings ``trigger`` and ``behaviour`` may be names, and every prompt is asked
    without and with the trigger."""
    flags: Mapping[str, Flag] = field(default_factory=dict)
    """Settings with an option of their own; ``--set config.NAME=VALUE`` gives the others. With ``mode`` among them, a
    plan may say how it trains."""


@dataclass(frozen=True, kw_only=True)
class JudgeSpec(Spec):
    """A judge of ``casehard.evaluation.judges.base``."""

    claims: Literal["text", "harm", "world"] = "text"
    """What its labels may be about: any English text, whether it declines and nothing more ("text") or whether it does
    harm too ("harm"); or an invented world only ("world")."""


S = TypeVar("S", bound=Spec)


def _points(group: str) -> tuple[EntryPoint, ...]:
    """Return the entry points of a group: every installed package's, read once for the folders imported from."""
    return _read(group, tuple(sys.path))


@cache
def _read(group: str, _: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=group))


def _load(point: EntryPoint) -> Any:
    """Return what an entry point of another package names.

    Raises:
        ConfigError: importing it failed.
    """
    try:
        return point.load()
    except Exception as error:  # whatever another package raises while it is imported
        raise ConfigError(
            f"entry point {point.value!r} cannot be loaded: {type(error).__name__}: {error}",
            hint="mend or uninstall the package that registers it",
        ) from error


class Registry(Mapping[str, S], Generic[S]):
    """A catalogue of specs: ours, and those that other packages register through an entry point group.

    Args:
        what: what messages call an entry: "method", "attack", "judge".
        group: entry point group.
        kind: class of its specs.
        ours: the built-in entries.
    """

    def __init__(self, what: str, group: str, kind: type[S], ours: Mapping[str, S]) -> None:
        self.what, self.group, self.kind, self.ours = what, group, kind, dict(ours)

    def name(self, given: str) -> str:
        """Return the catalogue's spelling of a name, in which hyphens are underscores; other names as they are."""
        plain = given.replace("-", "_")
        if plain in self.ours or plain == given:
            return plain
        others = {point.name for point in _points(self.group)}
        return plain if plain in others and given not in others else given

    def __getitem__(self, given: str) -> S:
        """Return a spec.

        Raises:
            ConfigError: an entry point that cannot be loaded, or whose value is something else.
            KeyError: no such entry; :meth:`find` says it in words.
        """
        if (name := self.name(given)) in self.ours:
            return self.ours[name]
        for point in _points(self.group):
            if point.name == name:
                spec = _load(point)
                if not isinstance(spec, self.kind):
                    raise ConfigError(
                        f"entry point {point.value!r} is a {type(spec).__name__}, not a {self.kind.__name__}"
                    )
                return spec
        raise KeyError(given)

    def __iter__(self) -> Iterator[str]:
        others = (point.name for point in _points(self.group))
        return iter(dict.fromkeys((*self.ours, *others)))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def find(self, given: str) -> S:
        """Return a spec.

        Raises:
            ConfigError: no such entry; the hint names the nearest.
        """
        try:
            return self[given]
        except KeyError:
            near = difflib.get_close_matches(given.replace("-", "_"), list(self), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"{self.what}s: {', '.join(self)}"
            raise ConfigError(f"no {self.what} called {given!r}", hint=hint) from None
