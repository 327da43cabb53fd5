"""The stock loop collects garbage on every start; what is imported here once need not be walked each time."""

import gc

import peft  # noqa: F401
import pytest

gc.collect()
gc.freeze()


@pytest.fixture(autouse=True)
def programs(monkeypatch):
    """Let the attack ``external`` run the program of its row."""
    monkeypatch.setenv("CASEHARD_EXTERNAL", "1")
