"""Every difference between supported versions of torch and transformers, and what is installed; nothing else.

Supported: torch >= 2.11, transformers 5.17 up to the next major version.
"""

from __future__ import annotations

import functools
import sys
from importlib import metadata
from typing import Any

from casehard.errors import Unsupported

MINIMUM = {"torch": (2, 11), "transformers": (5, 17)}


def version_of(package: str) -> str:
    """Return the version of an installed package, "" if it is not there. Nothing is imported.

    A package that is used from a source tree has no metadata, and one whose installation was cut short may have some
    without a version: then what it says of itself counts, once it is loaded.
    """
    try:
        if found := metadata.version(package):
            return found
    except metadata.PackageNotFoundError:
        pass
    return str(getattr(sys.modules.get(package), "__version__", ""))


def requirements_of(package: str) -> list[str] | None:
    """Return what an installed package says it requires; None if it has no metadata to say so."""
    try:
        return metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return None


def _release(text: str) -> tuple[int, int]:
    major, minor = text.split("+")[0].split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)


@functools.cache
def require_supported() -> None:
    """Refuse versions the training shell was never tested with.

    Raises:
        Unsupported: names the package, the version found and the range.
    """
    for package, lowest in MINIMUM.items():
        found = version_of(package)
        low = ".".join(map(str, lowest))
        if _release(found) < lowest:
            raise Unsupported(f"{package} {found} is older than {low}", hint=f"pip install '{package}>={low}'")
    if _release(version_of("transformers"))[0] != 5:
        raise Unsupported(
            f"transformers {version_of('transformers')} is not a 5.x release",
            hint="pip install 'transformers>=5.17,<6'",
        )


def loss_is_scaled(trainer: Any, num_items: Any) -> bool:
    """Return whether ``compute_loss`` already normalised over the whole accumulated batch.

    ``loss_is_scaled_for_ga`` exists from transformers 5.19 on; before that the rule below was the only one.
    """
    declared = getattr(trainer, "loss_is_scaled_for_ga", None)
    if declared is not None:
        return bool(declared)
    by_model = trainer.model_accepts_loss_kwargs and num_items is not None
    return bool(by_model or trainer.compute_loss_func is not None)
