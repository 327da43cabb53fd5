"""Names in plan files: which are allowed, unique, and refer to something. No torch here."""

from __future__ import annotations

import difflib
import re
from typing import Any

from casehard.errors import ConfigError

NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,39}")


def check_name(name: str, what: str) -> None:
    """Refuse a name that could not be a folder's."""
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{what} name {name!r} is not allowed",
            hint="1 to 40 characters a-z 0-9 _ . -, the first a letter or digit (names become folder names)",
        )


def check_unique(names: list[Any], what: str) -> None:
    """Refuse an empty list and names that stand in it twice."""
    if not names:
        raise ConfigError(f"plan.{what} is empty")
    twice = {n for n in names if names.count(n) > 1}
    if twice:
        raise ConfigError(f"plan.{what}: {sorted(twice)[0]!r} appears twice")


def check_known(name: str, known: list[str], where: str) -> None:
    """Refuse a name that refers to nothing, with the nearest one."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(known)}"
        raise ConfigError(f"{where}: no such name {name!r}", hint=hint)
