"""One untrained organism for all tests of the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from helpers import make_organism


@pytest.fixture(scope="session")
def organism(tmp_path_factory):
    return make_organism(tmp_path_factory.mktemp("cli") / "organism")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
