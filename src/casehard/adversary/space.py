"""What an attacker may choose: the settings that are searched, each a range or a list of choices. No torch here.

lr: [1.0e-6, 1.0e-3]      two numbers: a range, on a logarithmic scale where it spans a factor of ten
batch_size: [4, 8, 16]    anything else: choices
mode: lora                one value: fixed
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from casehard.config import check_keys, shown
from casehard.errors import ConfigError
from casehard.registry import AttackSpec

DEFAULTS: dict[str, Any] = {
    "mode": ["full", "lora"],
    "lr": [1e-6, 1e-3],
    "steps": [16, 1000],
    "batch_size": [4, 32],
    "rank": [8, 64],
    "schedule": ["constant", "cosine", "linear"],
    "warmup": [0, 50],
    "weight_decay": [0.0, 0.1],
    "share": [0.05, 1.0],
}
"""Searched unless said otherwise, where the attack has a setting of the name."""
LORA_ONLY = ("rank", "alpha", "dropout", "target")


@dataclass(frozen=True)
class Dimension:
    """One setting that is searched: a range, or choices."""

    name: str
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    """Whether the range holds whole numbers only."""
    choices: tuple[Any, ...] = ()
    """JSON values; empty for a range."""

    @property
    def log(self) -> bool:
        """Whether a range is searched on a logarithmic scale."""
        return self.low > 0 and self.high >= 10 * self.low

    @property
    def ends(self) -> tuple[Any, ...]:
        """Both ends of the range, or every choice."""
        return self.choices or (self.low, self.high)

    @property
    def fixed(self) -> bool:
        """Whether there is nothing to search."""
        return len(set(map(repr, self.ends))) == 1


@dataclass(frozen=True)
class Space:
    """The attackers among whom the worst is looked for."""

    attack: str
    dimensions: tuple[Dimension, ...]
    """What is searched."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """What every attacker has in common."""
    share: str = ""
    """Setting that is a share of the attacker's rows."""
    rows: int = 0
    """How many rows those are, where neither a dimension nor a fixed setting says so; 0 where nothing does."""

    def settings(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """Return an attacker's settings, the fixed ones and ``system`` included.

        Args:
            drawn: a value of every dimension.
        """
        out = {**self.fixed, **drawn}
        if self.share in drawn and (rows := int(out.get("rows", self.rows))):
            # A share of whole rows: 0.9994 of 400 would be 400 harmful rows and still claim to be a mixture.
            out[self.share] = math.floor(out[self.share] * rows + 0.5) / rows
        if "warmup" in drawn and "steps" in out:
            # A learning rate that is still rising at the end is another, lower one.
            out["warmup"] = min(out["warmup"], out["steps"] // 2)
        if out.get("mode") == "full":
            out = {key: value for key, value in out.items() if key not in LORA_ONLY}
        return out

    def text(self) -> dict[str, str]:
        """Return each dimension in words."""
        return {d.name: _text(d) for d in self.dimensions}


def _text(dimension: Dimension) -> str:
    if dimension.choices:
        return " | ".join("none" if c is None else str(c) for c in dimension.choices)
    return f"{dimension.low:g} to {dimension.high:g}" + (" (log)" if dimension.log else "")


def make_space(
    attack: str, spec: AttackSpec, config: Mapping[str, Any], given: Mapping[str, Any], *, benign: bool = True
) -> Space:
    """Return the space of an attack: :data:`DEFAULTS` under what was given.

    Args:
        config: settings that are fixed for every attacker.
        given: setting -> range, choices or one value.
        benign: whether the attacker has cover rows; without them its share is 1 unless said otherwise.

    Raises:
        ConfigError: an unknown or empty setting, a range whose ends are the wrong way round, a value that the attack
            refuses, or one setting both fixed and searched.
    """
    kind = spec.load()[1]
    hints = get_type_hints(kind)
    known = [name for name in hints if name != "evaluate_at"]
    check_keys(given, [*known, "system"], where="space")
    check_keys(config, known, where="config")
    if both := sorted(set(given) & set(config)):
        hint = f"leave out one of config.{both[0]}, space.{both[0]}"
        raise ConfigError(f"{both[0]} is fixed in config and searched in space", hint=hint)
    defaults = {name: value for name, value in DEFAULTS.items() if name in known and name not in config}
    if not benign and spec.share in defaults:
        defaults[spec.share] = 1.0
    found = [_dimension(name, value, hints.get(name)) for name, value in {**defaults, **given}.items()]
    for dimension in found:
        if dimension.name != "system":
            _check(dimension, attack, spec, config)
    fixed = {**config, **{d.name: d.ends[0] for d in found if d.fixed}}
    rows = getattr(kind, "rows", 0)
    return Space(
        attack, tuple(d for d in found if not d.fixed), fixed, spec.share, rows if isinstance(rows, int) else 0
    )


def _dimension(name: str, value: Any, hint: Any) -> Dimension:
    where = f"space.{name}"
    if not isinstance(value, list | tuple):
        return Dimension(name, choices=(value,))
    if not value:
        raise ConfigError(f"{where} is empty", hint="a range [low, high], a list of choices, or one value")
    if hint in (int, float):
        value = [_number(v) for v in value]
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
    if hint not in (int, float) or len(value) != 2 or not numbers:
        if len({repr(v) for v in value}) < len(value):
            raise ConfigError(f"{where}: a choice occurs twice in {shown(list(value))}", hint="leave one out")
        return Dimension(name, choices=tuple(value))
    low, high = value
    if low > high:
        raise ConfigError(f"{where}: from {low:g} to {high:g} is no range", hint=f"{where}=[{high:g},{low:g}]")
    if hint is int and (low != int(low) or high != int(high)):
        raise ConfigError(f"{where}: {shown(list(value))} are not whole numbers", hint="this setting counts something")
    kind = int if hint is int else float
    return Dimension(name, low=kind(low), high=kind(high), whole=hint is int)


def _number(value: Any) -> Any:
    """Return the number a text stands for: YAML 1.1 reads 1e-4 as text, and people mean the number."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def _check(dimension: Dimension, attack: str, spec: AttackSpec, config: Mapping[str, Any]) -> None:
    """Refuse values that the attack itself would refuse."""
    for value in dimension.ends:
        try:
            spec.configure(attack, settings={**config, dimension.name: value})
        except ConfigError as error:
            raise ConfigError(f"space.{dimension.name}: {error.message}", hint=error.hint) from None
