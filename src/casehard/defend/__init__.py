"""The catalogue of defences: adding one is one file, one line here, one conformance row, one docs page."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from casehard.config import build, to_dict
from casehard.errors import ConfigError


@dataclass(frozen=True)
class MethodSpec:
    """Where a method lives and which data roles it needs besides the rows it trains on."""

    module: str
    cls: str
    config: str
    needs: tuple[str, ...] = ()
    """Data roles the constructor requires, by keyword (``unsafe``, ...)."""
    takes: tuple[str, ...] = ()
    """Data roles it accepts."""
    adapter: bool = False
    """Tunes a LoRA adapter and nothing else: ``casehard defend`` then writes DIR/adapter, not DIR/checkpoint."""

    def load(self) -> tuple[type, type]:
        """Import and return (method class, config class)."""
        module = importlib.import_module(self.module)
        return getattr(module, self.cls), getattr(module, self.config)

    def presets(self) -> dict[str, Any]:
        """Return the method's named settings; empty when it has none."""
        return getattr(importlib.import_module(self.module), "PRESETS", {})

    def configure(self, name: str, preset: str, settings: Mapping[str, Any]) -> Any:
        """Return the method's config: a preset's values, or the defaults when ``preset`` is empty, under ``settings``.

        Args:
            name: what messages call the method.

        Raises:
            ConfigError: no such preset, an unknown setting or a value out of range.
        """
        presets = self.presets() if preset else {}
        if preset and preset not in presets:
            listed = f"presets: {', '.join(presets)}" if presets else "it has none: leave out --preset"
            raise ConfigError(f"method {name!r} has no preset {preset!r}", hint=listed)
        start = to_dict(presets[preset]) if preset else {}
        config: Any = build(self.load()[1], {**start, **settings}, where=name)
        return config


METHODS: dict[str, MethodSpec] = {
    "plain": MethodSpec("casehard.defend.plain", "Plain", "PlainConfig"),
    "patcher": MethodSpec(
        "casehard.defend.patcher.method", "Patcher", "PatcherConfig", needs=("unsafe",), takes=("unsafe", "retain")
    ),
    "spard": MethodSpec("casehard.defend.spard", "Spard", "SpardConfig", needs=("safe",), takes=("safe",)),
    "buffer_reinforce": MethodSpec(
        "casehard.defend.buffer_reinforce",
        "BufferReinforce",
        "BufferReinforceConfig",
        needs=("assets",),
        takes=("assets",),
        adapter=True,
    ),
    "safe_mixing": MethodSpec(
        "casehard.defend.safe_mixing", "SafeMixing", "SafeMixingConfig", needs=("safe",), takes=("safe",)
    ),
    "lisa": MethodSpec("casehard.defend.lisa", "Lisa", "LisaConfig", needs=("safe",), takes=("safe",)),
    "safegrad": MethodSpec("casehard.defend.safegrad", "SafeGrad", "SafeGradConfig", needs=("safe",), takes=("safe",)),
    "ptst": MethodSpec("casehard.defend.ptst", "Ptst", "PtstConfig"),
    "shrink": MethodSpec("casehard.defend.shrink", "Shrink", "ShrinkConfig"),
    "safelora": MethodSpec(
        "casehard.defend.safelora", "SafeLora", "SafeLoraConfig", needs=("assets",), takes=("assets",)
    ),
    "security_vector": MethodSpec(
        "casehard.defend.security_vector",
        "SecurityVector",
        "SecurityVectorConfig",
        needs=("assets",),
        takes=("assets",),
        adapter=True,
    ),
    "antidote": MethodSpec(
        "casehard.defend.antidote", "Antidote", "AntidoteConfig", needs=("unsafe",), takes=("unsafe",)
    ),
    "mb_defense": MethodSpec(
        "casehard.defend.mb_defense", "MbDefense", "MbDefenseConfig", needs=("assets",), takes=("assets",)
    ),
    "fine_mixing": MethodSpec(
        "casehard.defend.fine_mixing", "FineMixing", "FineMixingConfig", needs=("assets",), takes=("assets",)
    ),
    "crow": MethodSpec("casehard.defend.crow", "Crow", "CrowConfig"),
    "anomaly": MethodSpec("casehard.defend.anomaly", "Anomaly", "AnomalyConfig"),
}

ENTRY_POINTS = "casehard.methods"


def canonical(name: str) -> str:
    """Return the catalogue's spelling of a method's name, in which hyphens are underscores; other names as they are."""
    plain = name.replace("-", "_")
    return plain if plain in METHODS else name


def find(name: str) -> MethodSpec:
    """Return the spec of a method; third-party entry points are looked up only when the name is unknown.

    Raises:
        ConfigError: no such method; the hint names the nearest.
    """
    if name in METHODS:
        return METHODS[name]
    for point in entry_points(group=ENTRY_POINTS):
        if point.name == name:
            spec = point.load()
            if not isinstance(spec, MethodSpec):
                raise ConfigError(f"entry point {point.value!r} is a {type(spec).__name__}, not a MethodSpec")
            return spec
    near = difflib.get_close_matches(name, METHODS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"methods: {', '.join(METHODS)}"
    raise ConfigError(f"no method called {name!r}", hint=hint)
