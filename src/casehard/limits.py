"""Limits of settings, numbers and words: written once, in the annotation, and held for files and for code alike.

    steps: Count = 300
    tau: Annotated[float | Literal["auto"], Within(0, WEIGHT)] = "auto"

``config.build`` meets them through pydantic and names the whole path; a class that is built directly holds them by
being :class:`Limited`. NaN is inside no limits, infinity only where it means something and ``endless`` says so.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, is_dataclass
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from casehard.errors import ConfigError

WEIGHT = 1e6
"""Beyond any factor that a loss, a coefficient or a share of a gradient is multiplied by."""
PROCESSES = 1024
"""Beyond what one run is spread over."""
LARGEST = 1e38
"""Beyond it fp32 ends. Below it a number may be too large to train with, which a run finds out: Diverged."""


@dataclass(frozen=True)
class Within:
    """From ``low`` to ``high``, both included unless ``above`` or ``below`` says otherwise."""

    low: float
    high: float
    above: bool = False
    below: bool = False
    endless: bool = False

    def check(self, value: Any) -> Any:
        """Return the value; raise ValueError when it is a number outside, whose text goes behind the setting's name."""
        self.no_truth(value)
        if not isinstance(value, int | float):
            return value
        if value != value:  # NaN; math.isnan refuses integers beyond 1e308
            raise ValueError("is nan")
        if value < self.low or (self.above and value == self.low):
            raise ValueError(f"must be {'above' if self.above else 'at least'} {_text(self.low)}, got {_text(value)}")
        if value > self.high and self.endless and value == math.inf:
            return value
        if value > self.high or (self.below and value == self.high):
            raise ValueError(f"must be {'below' if self.below else 'at most'} {_text(self.high)}, got {_text(value)}")
        return value

    @staticmethod
    def no_truth(value: Any) -> Any:
        """Return the value; raise ValueError when it is true or false, which Python and pydantic take for 1 and 0."""
        if isinstance(value, bool):
            raise ValueError(f"is {str(value).lower()}, not a number")
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Let pydantic ask :meth:`check` once it knows the value's type."""
        from pydantic_core import core_schema

        inner = core_schema.no_info_before_validator_function(self.no_truth, handler(source))
        return core_schema.no_info_after_validator_function(self.check, inner)


def _text(number: float) -> str:
    if isinstance(number, int):
        return f"{number:,}" if abs(number) < 10**30 else f"a number of {number.bit_length()} bits"
    return f"{number:g}"


Count = Annotated[int, Within(1, 10**9)]
"""Steps, rows, words: at least one."""
Natural = Annotated[int, Within(0, 10**9)]
"""The same, or none."""
BatchSize = Annotated[int, Within(1, 2**16)]
"""Rows that are held at once."""
Rank = Annotated[int, Within(1, 2**16)]
"""Of a LoRA."""
Length = Annotated[int, Within(1, 2**24)]
"""Tokens."""
Several = Annotated[int, Within(2, 10**9)]
Seed = Annotated[int, Within(-(2**63), 2**63 - 1)]
WorldSeed = Annotated[int, Within(0, 2**63 - 1)]
Share = Annotated[float, Within(0, 1)]
Fraction = Annotated[float, Within(0, 1, below=True)]
"""A share short of the whole."""
Portion = Annotated[float, Within(0, 1, above=True)]
"""A share that is not nothing."""
Weight = Annotated[float, Within(0, WEIGHT)]
Factor = Annotated[float, Within(0, WEIGHT, above=True)]
"""A weight that is never zero."""
Coefficient = Annotated[float, Within(-WEIGHT, WEIGHT)]
LearningRate = Annotated[float, Within(0, 1000)]
Large = Annotated[float, Within(0, LARGEST)]
"""Where much too large is a way to switch off, or to see a run diverge."""


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


_SAID = {float: "a number", int: "a whole number", bool: "true or false"}
_KINDS = {float: Real, int: Integral, bool: bool, NoneType: NoneType}


@functools.cache
def _allowed(hint: Any) -> tuple[tuple[Any, ...], tuple[Any, ...], str]:
    """Return the types and words that a setting may be, and both as text; nothing where any text, or more, will do."""
    if get_origin(hint) is Annotated:
        return _allowed(get_args(hint)[0])
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = tuple(get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in kinds)
    words = tuple(word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind))
    plain = tuple(kind for kind in kinds if get_origin(kind) is not Literal)
    if not all(kind in _KINDS or is_dataclass(kind) or get_origin(kind) is tuple for kind in plain):
        return (), (), ""
    listed = [_said(kind) for kind in plain if kind is not NoneType]
    # Sorted, as two choices of the same words are one to Python, in whichever order it met them first.
    listed += [f"one of {', '.join(sorted(str(word) for word in words if word != ''))}"] if words else []
    return tuple(_KINDS.get(kind, get_origin(kind) or kind) for kind in plain), words, " or ".join(listed)


def _said(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return "a tuple"
    return _SAID.get(kind) or f"{kind.__name__}(...)"


def _walk(hint: Any, value: Any, *, chosen: bool = True) -> None:
    """Raise ValueError where a value is not what a hint says; ``chosen`` is off for one of several types it may be."""
    kinds, words, listed = _allowed(hint)
    if chosen and listed and not isinstance(value, kinds) and value not in words:
        raise ValueError(f"is {value!r}, not {listed}")
    for mark in getattr(hint, "__metadata__", ()):
        if isinstance(mark, Within):
            mark.check(value)
    parts = get_args(hint)
    if get_origin(hint) is tuple:
        items = value if isinstance(value, tuple) else ()
        parts = parts[:1] * len(items) if Ellipsis in parts else parts
        if items and len(items) != len(parts):
            raise ValueError(f"has length {len(items)}, not {len(parts)}")
        for part, item in zip(parts, items, strict=False):
            _walk(part, item)
        return
    for part in parts[:1] if hasattr(hint, "__metadata__") else parts:
        _walk(part, value, chosen=False)


class Limited:
    """A frozen configuration whose numbers and words are those of their annotations, however it is built."""

    def __post_init__(self) -> None:
        """Raise ConfigError at the first number outside its limits, or word that is none of the choices."""
        kind: Any = type(self)
        for name, hint in _hints(kind).items():
            if isinstance(value := getattr(self, name), list) and tuple in _allowed(hint)[0]:
                object.__setattr__(self, name, value := tuple(value))
            try:
                _walk(hint, value)
            except ValueError as error:
                raise ConfigError(f"{name} {error}") from None
