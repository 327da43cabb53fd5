"""One fork server for all fault tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import forks as server


@pytest.fixture(scope="session")
def forks():
    """Return a multiprocessing context whose children start with torch imported."""
    server.ensure_running()
    return server.CONTEXT
