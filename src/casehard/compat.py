"""Every difference between supported versions of torch and transformers, and nothing else.

Supported: torch >= 2.11, transformers 5.17 up to the next major version.
"""

from __future__ import annotations

import functools
from importlib.metadata import version
from typing import Any

from casehard.errors import Unsupported

MINIMUM = {"torch": (2, 11), "transformers": (5, 17)}


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
        found = version(package)
        low = ".".join(map(str, lowest))
        if _release(found) < lowest:
            raise Unsupported(f"{package} {found} is older than {low}", hint=f"pip install '{package}>={low}'")
    if _release(version("transformers"))[0] != 5:
        raise Unsupported(
            f"transformers {version('transformers')} is not a 5.x release",
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
