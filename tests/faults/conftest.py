"""One fork server for all fault tests."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def forks():
    """Return a multiprocessing context whose children start with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["children"])
    with pytest.MonkeyPatch.context() as patch:
        # The server finds its preload through the environment only; without it every child imports torch again.
        here = Path(__file__).parent
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (here, here.parent))))
        forkserver.ensure_running()
        yield context
