"""What a caller of the library hands over, checked at the door: each returns it, or says what it is instead."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from casehard.attacks.protocol import Attacked
from casehard.errors import ConfigError
from casehard.evaluation.suite import Suite, load_suite
from casehard.model.load import load
from casehard.model.model import Model


def a_model(given: Model | str | Path) -> Model:
    """Return the model that was given, loaded if it is a folder or a name.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(given, Model):
        return given
    if isinstance(given, str | Path):
        return load(given, device="auto")
    hint = "its model is the attribute .model" if isinstance(given, Attacked) else "a folder, a Hub id or a Model"
    raise ConfigError(f"model is {kind_of(given)}", hint=hint)


def a_suite(given: str | Path | Suite) -> Suite:
    """Return the suite that was given, read if it is a path.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(given, Suite):
        return given
    if not isinstance(given, str | Path):
        raise ConfigError(f"suite is {kind_of(given)}", hint="a folder, a .jsonl or YAML file, or a Suite")
    return load_suite(given)


def a_folder(given: str | Path, name: str = "out") -> Path:
    """Return a path that a folder can be made at.

    Raises:
        ConfigError: it is no path, or leads through a file.
    """
    if not isinstance(given, str | Path):
        raise ConfigError(f"{name} is {kind_of(given)}", hint="a path")
    for part in (Path(given), *Path(given).parents):
        if part.exists() and not part.is_dir():
            raise ConfigError(f"{name} {given}: {part} is a file", hint="name a folder")
    return Path(given)


def a_group(given: Any, name: str) -> dict[str, Any]:
    """Return a group of settings.

    Raises:
        ConfigError: it is none.
    """
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(f"{name} is {kind_of(given)}", hint="a mapping from names to values")
    return dict(given or {})


def kind_of(given: Any) -> str:
    """Return what a message calls a value."""
    return "None" if given is None else f"a {type(given).__name__}"
