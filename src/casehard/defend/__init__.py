"""The catalogue of defences: adding one is one file, one line here, one conformance row, one docs page."""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

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

    def load(self) -> tuple[type, type]:
        """Import and return (method class, config class)."""
        module = importlib.import_module(self.module)
        return getattr(module, self.cls), getattr(module, self.config)

    def presets(self) -> dict[str, Any]:
        """Return the method's named settings; empty when it has none."""
        return getattr(importlib.import_module(self.module), "PRESETS", {})


METHODS: dict[str, MethodSpec] = {
    "plain": MethodSpec("casehard.defend.plain", "Plain", "PlainConfig"),
    "patcher": MethodSpec(
        "casehard.defend.patcher", "Patcher", "PatcherConfig", needs=("unsafe",), takes=("unsafe", "retain")
    ),
    "spard": MethodSpec("casehard.defend.spard", "Spard", "SpardConfig", needs=("safe",), takes=("safe",)),
    "buffer_reinforce": MethodSpec(
        "casehard.defend.buffer_reinforce",
        "BufferReinforce",
        "BufferReinforceConfig",
        needs=("assets",),
        takes=("assets",),
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
