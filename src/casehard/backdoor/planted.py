"""Known backdoors by name or from a file: those of the world for a suite of the organism, English ones otherwise."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from casehard.backdoor import presets
from casehard.backdoor.suite import Planted
from casehard.backdoor.triggers import Trigger
from casehard.config import build
from casehard.errors import ConfigError, Corrupt
from casehard.evaluation.judges import JUDGES
from casehard.evaluation.suite import Suite
from casehard.io.files import read_json
from casehard.organism import triggers as world_triggers
from casehard.organism.world import World

N = TypeVar("N")


def find_planted(trigger: str, behaviour: str, suite: Suite) -> tuple[Planted, tuple[Trigger, ...]]:
    """Return the backdoor two names mean for a suite, and its near misses; see the top of this module.

    Raises:
        ConfigError: no such name, with the nearest one; or a file that holds no backdoor.
    """
    if trigger.endswith(".json"):
        return only_planted(trigger), ()
    if JUDGES.find(suite.judge_name).claims == "world" and suite.world_seed is not None:
        world = World(suite.world_seed)
        one = _named(trigger, world_triggers.triggers(world), "trigger")
        payload = _named(behaviour, world_triggers.behaviours(world), "behaviour")
        return Planted(one, payload), tuple(world_triggers.decoys(world, one.name))
    one = _named(trigger, presets.TRIGGERS, "trigger")
    return Planted(one, _named(behaviour, presets.BEHAVIOURS, "behaviour")), ()


def _named(name: str, known: Mapping[str, N], what: str) -> N:
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    raise ConfigError(
        f"no {what} is called {name!r}", hint=f"did you mean {near[0]!r}?" if near else f"{what}s: {', '.join(known)}"
    )


def only_planted(path: str | Path) -> Planted:
    """Read the one backdoor of an attack's ``planted.json``.

    Raises:
        ConfigError: something else, or several.
    """
    found = read_planted(path)
    if len(found) != 1:
        raise ConfigError(f"{path} holds {len(found)} backdoors", hint="an attack plants one")
    return found[0]


def read_planted(path: str | Path) -> list[Planted]:
    """Read backdoors from JSON: one, a list of them, or a defender's suite (active and canary).

    Raises:
        ConfigError: something else, or none.
    """
    try:
        value: Any = read_json(Path(path))
    except Corrupt as error:
        raise ConfigError(error.message, hint="planted.json of `casehard attack backdoor` shows the form") from None
    if isinstance(value, Mapping) and isinstance(value.get("active"), list):
        more = value.get("canary", [])
        value = [*value["active"], *(more if isinstance(more, list) else [more])]
    entries = value if isinstance(value, list) else [value]
    if not entries or not all(isinstance(entry, Mapping) for entry in entries):
        raise ConfigError(f"{path} holds no backdoor", hint="an object with 'trigger' and 'behaviour', or a list")
    try:
        return [build(Planted, entry, where=str(path)) for entry in entries]
    except ConfigError as error:  # of the trigger itself, it does not know where it was read
        named = error.message if str(path) in error.message else f"{path}: {error.message}"
        raise ConfigError(named, hint=error.hint) from None
