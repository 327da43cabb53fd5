"""Rules for every test: no network but loopback, no hub, one torch thread unless said otherwise."""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import types
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

if sys.dont_write_bytecode and sys.pycache_prefix is None:
    # Half of the time of a process that imports torch goes into compiling what it imports: where Python is told not to
    # keep that beside the sources, the processes that the tests start share a folder of the tests' own.
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(Path(__file__).parents[1] / ".pytest_cache" / "bytecode")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix

# No test cuts the power, which is all that flushing guards against, and waiting for the disk was a third of the time.
# tests/train/test_files.py holds what is flushed, and when.
os.fsync = lambda handle: None

# One commit gives one result: draws are a function of the test. With CASEHARD_FUZZ_SECONDS they are new ones each time.
hypothesis.settings.register_profile("suite", derandomize=True, database=None)
if not os.environ.get("CASEHARD_FUZZ_SECONDS"):
    hypothesis.settings.load_profile("suite")

# A shell starts background jobs deaf to Ctrl-C, and what they start inherits it; the commands under test must hear it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_connect = socket.socket.connect
_connect_ex = socket.socket.connect_ex
_lookup = socket.getaddrinfo
_LOCAL = {"localhost", "::1", "", None, socket.gethostname()}


class NetworkUsedError(RuntimeError):
    """A test tried to reach something outside this machine."""


def _check(host):
    host = host.decode() if isinstance(host, bytes) else host
    if host not in _LOCAL and not str(host).startswith("127."):
        raise NetworkUsedError(f"tests run without a network, but {host!r} was asked for")


def _guarded(original):
    def connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _check(address[0])
        return original(self, address)

    return connect


def _getaddrinfo(host, *args, **kwargs):
    _check(host)
    return _lookup(host, *args, **kwargs)


socket.socket.connect = _guarded(_connect)
socket.socket.connect_ex = _guarded(_connect_ex)
socket.getaddrinfo = _getaddrinfo


LONGEST = (
    "mb_pipeline resume audit_planted together remote killed flow real_checkpoint steps same_bytes model_scan fsdp "
    "pipelines run buffer_real mb_defense_verb launched chain backdoor_verbs kill damage bench_lines robust spard"
)
"""Files that take longest, in that order: begun first, so that two workers end together."""


def pytest_collection_modifyitems(items):
    """Put the longest files first; skip the long run unless it was asked for."""
    place = {f"test_{name}": i for i, name in enumerate(LONGEST.split())}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
    if os.environ.get("CASEHARD_LONG") != "1":
        for item in items:
            if "long" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="the long run; set CASEHARD_LONG=1"))


def pytest_collection_finish(session):
    """Leave what is imported and collected out of later collections, spare those that every run of Trainer asks for,
    and let small ones come rarely: Hypothesis has each of them call back."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    if (memory := sys.modules.get("accelerate.utils.memory")) is not None:
        memory.gc = types.SimpleNamespace(collect=lambda: 0)  # a third of the time of a run of a few steps


@pytest.fixture(autouse=True)
def _no_bars():
    """Keep progress lines out of the test output."""
    from casehard.train import progress

    before = progress.quiet
    progress.set_quiet(True)
    yield
    progress.set_quiet(before)
