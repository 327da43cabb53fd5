"""Errors a user can act on. Each says what was wrong, the value seen and what to do, and has its own exit code."""

from __future__ import annotations

import re

# Control characters (C0, DEL, C1), what turns the direction of writing or ends a line, halves of a character. Not tabs.
_OBEYED = re.compile(r"[\x00-\x08\n-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str, *, lines: bool = False) -> str:
    """Return text for a terminal: what a terminal would obey is spelled out, as a JSON string spells it.

    Args:
        lines: whether line ends are the text's own and stay; else they are part of a name or of somebody's message.
    """

    def spell(found: re.Match[str]) -> str:
        sign = found[0]
        return sign if lines and sign == "\n" else {"\n": "\\n", "\r": "\\r"}.get(sign, f"\\u{ord(sign):04x}")

    return _OBEYED.sub(spell, text)


class Note(UserWarning):
    """What a user should know although nothing is wrong: how a file was read."""


class UserError(Exception):
    """Report a problem the user can mend.

    Args:
        message: what was wrong, with the value seen.
        hint: what to do about it; shown on a line of its own.
    """

    exit_code = 2

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class ConfigError(UserError):
    """A setting is unknown, of the wrong type or out of range."""


class DataError(UserError):
    """A data file or row cannot be used; the message names file and line."""

    exit_code = 3


class Diverged(UserError):
    """A loss or gradient stopped being finite; raised before that step's update."""

    exit_code = 4


class StorageError(UserError):
    """The disk refused a write (full, quota, size limit); nothing half-written is left."""

    exit_code = 5


class Elsewhere(StorageError):
    """Another process of the run could not write or read its part, and said why; this one stops with it."""


class Corrupt(UserError):
    """A file does not match its manifest; the message names file, expected and actual digest."""

    exit_code = 6


class Unsupported(UserError):
    """The combination asked for is not available; the hint names one that is."""

    exit_code = 7


class Refused(UserError):
    """A result fails its own gates and is not exported; the report says which."""

    exit_code = 9


class Lost(UserError):
    """A process that the run cannot do without is gone; earlier checkpoints are intact."""

    exit_code = 10


class MissingExtra(UserError):
    """An optional dependency is not installed."""

    exit_code = 8

    def __init__(self, package: str, extra: str, *, purpose: str = "") -> None:
        what = f" ({purpose})" if purpose else ""
        super().__init__(f"the package {package!r} is not installed{what}", hint=f"pip install 'casehard[{extra}]'")
        self.package = package
        self.extra = extra


class Interrupted(UserError):
    """The run was asked to stop (SIGINT 130, SIGTERM 143) and left a checkpoint to resume from."""

    exit_code = 130

    def __init__(self, message: str, *, hint: str = "", exit_code: int = 130) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code


def is_panic(error: BaseException) -> bool:
    """Return whether a library in Rust gave up: such an error is no ``Exception``, and its class cannot be imported."""
    return type(error).__name__ == "PanicException"
