"""One fork server for all fault tests."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def forks():
    """Return a multiprocessing context whose children start with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["children"])
    return context
