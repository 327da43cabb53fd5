"""One run at a time in a folder; what a killed process left behind blocks nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from casehard.errors import ConfigError
from casehard.io.locks import LOCK, lock

HOLD = """
import sys, time
from casehard.io.locks import lock
with lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    child = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "out"], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    yield child
    child.kill()
    child.wait()


def test_a_second_run_is_told_who_holds_the_folder(tmp_path, holder):
    with (
        pytest.raises(ConfigError, match=f"out is in use by another run, process {holder.pid}"),
        lock(tmp_path / "out"),
    ):
        pass
    assert (tmp_path / "out" / LOCK).is_file()


def test_a_killed_holder_blocks_nobody(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "out" / LOCK).is_file()
    with lock(tmp_path / "out"):
        assert (tmp_path / "out" / LOCK).read_text().strip() == str(os.getpid())
    assert not (tmp_path / "out" / LOCK).exists()


def test_the_same_process_cannot_hold_it_twice(tmp_path):
    with lock(tmp_path), pytest.raises(ConfigError, match=f"process {os.getpid()}"), lock(tmp_path):
        pass
    with lock(tmp_path):
        pass


def test_a_folder_made_for_nothing_is_removed(tmp_path):
    with lock(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
    with lock(tmp_path / "used"):
        (tmp_path / "used" / "x").write_text("1")
    assert [p.name for p in (tmp_path / "used").iterdir()] == ["x"]


def test_fit_holds_its_folder(tmp_path):
    import torch

    from casehard.data.batches import Encoded, EncodedSet
    from casehard.train.fit import fit
    from casehard.train.recipe import TrainConfig
    from fakes import tiny_llama

    rows = EncodedSet([Encoded([1, 2, 3, 4], [1, 2, 3, 4])] * 4, pad_id=0)
    seen = []

    def second(model: torch.nn.Module, step: int) -> None:
        with pytest.raises(ConfigError, match="in use by another run"):
            fit(tiny_llama(layers=1), None, rows, config=TrainConfig(steps=2, batch_size=2), seed=0, out=tmp_path / "t")
        seen.append(step)

    config = TrainConfig(steps=2, batch_size=2, warmup=0)
    fit(tiny_llama(layers=1), None, rows, config=config, seed=0, out=tmp_path / "t", on_step=second)
    assert seen == [1, 2] and not (tmp_path / "t" / LOCK).exists()
