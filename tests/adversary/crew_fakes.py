"""A job that a worker process does without importing torch."""

from __future__ import annotations

import os
from typing import Any

from casehard.benchmark.worker import describe
from casehard.errors import DataError


def double(number: Any) -> dict[str, Any]:
    """Return twice the number; end the process on a negative one, and complain of text."""
    if isinstance(number, str):
        return {"status": "failed", **describe(DataError("no number", hint="give one"))}
    if number < 0:
        os._exit(9)
    return {"status": "ok", "twice": 2 * number}
