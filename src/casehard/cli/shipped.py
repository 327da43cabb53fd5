"""Find the plans and recipes that come with the package."""

from __future__ import annotations

from pathlib import Path

import casehard
from casehard.errors import ConfigError


def shipped(kind: str, name: str) -> Path:
    """Return a file of ``plans/`` or ``recipes/``: inside the installed wheel, or beside ``src/`` in a clone.

    Raises:
        ConfigError: it is in neither place.
    """
    package = Path(casehard.__file__).resolve().parent
    places = (package / kind / name, package.parents[1] / kind / name)
    for place in places:
        if place.is_file():
            return place
    raise ConfigError(
        f"the file {kind}/{name} is missing from this installation", hint="pip install --force-reinstall casehard"
    )
