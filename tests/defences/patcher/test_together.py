"""Several ranks that defend together: the command line under torchrun against one process, and what is refused.

torchrun itself is there once, and stopped; other runs have ranks that the tests start, told what torchrun tells them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import casehard
import forks
from casehard.defences import DEFENCES
from casehard.defences.patcher.workers import launch
from casehard.errors import Unsupported
from casehard.steps.finetune import shared_by_ranks

MODEL = Path(casehard.__file__).parent / "organism" / "assets" / "world0-tiny"  # tied embeddings
SETTINGS = """
settings:
  round_steps: 2
  delta_dtype: float32
  attackers: [{steps: 2, lr: 1.0e-3, batch_size: 3}]
  retain: ce
  retain_weight: 0.5
  retain_batch_size: 3
train: {steps: 8, lr: 1.0e-3, warmup: 0, log_every: 1}
device: cpu
"""


def words(folder: Path, out: str, batch: int, *more: str) -> list[str]:
    """Return the arguments of ``casehard defend patcher``."""
    (folder / "settings.yaml").write_text(SETTINGS, encoding="utf-8")
    told = ["defend", "patcher", "--config", "settings.yaml", "--model", MODEL, "--out", out]
    told += ["--data", MODEL / "data/align.jsonl", "--unsafe", MODEL / "data/simulated.jsonl"]
    told += ["--retain", MODEL / "data/benign.jsonl", "--set", f"train.batch_size={batch}", *more]
    return [str(word) for word in told]


def defend(folder: Path, out: str, batch: int, *more: str, ranks: int = 1) -> str:
    """Run it; return what it printed."""
    given = words(folder, out, batch, *more)
    started = forks.Ranks(ranks, given, cwd=folder) if ranks > 1 else forks.Command(given, cwd=folder)
    done = started.done()
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def torchrun(folder: Path, given: list[str], ranks: int) -> subprocess.Popen[str]:
    """Start it as a user does."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, "text": True}
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*launcher, "-m", "casehard.cli", *given], cwd=folder, env=env, **pipes)


def stopped(folder: Path, out: str, batch: int, *more: str, ranks: int, launched: bool = False) -> str:
    """End it with SIGTERM, to the launcher or to every rank as a launcher does, once the first checkpoint is there."""
    given = words(folder, out, batch, "--set", "train.save_every=1", *more)
    started = torchrun(folder, given, ranks) if launched else forks.Ranks(ranks, given, cwd=folder)
    deadline = time.monotonic() + 120
    while not (folder / out / "training" / "checkpoint-1").exists():
        assert started.poll() is None and time.monotonic() < deadline, told(started)
        time.sleep(0.02)
    started.send_signal(signal.SIGTERM)
    code, said = told(started)
    assert code != 0
    steps = [int(path.name.partition("-")[2]) for path in (folder / out / "training").glob("checkpoint-*")]
    assert 1 <= max(steps) < 8
    return said


def told(started: subprocess.Popen[str] | forks.Ranks) -> tuple[int, str]:
    """Return the exit code and all that was said, at the end."""
    if isinstance(started, forks.Ranks):
        done = started.done(60)
        return done.returncode, done.stdout + done.stderr
    said, errors = started.communicate(timeout=60)
    return started.returncode, said + errors


def log_of(folder: Path) -> list[dict]:
    rows = map(json.loads, (folder / "events.jsonl").read_text(encoding="utf-8").splitlines())
    return [{k: v for k, v in row.items() if k != "time"} for row in rows if row["event"] == "log"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """Return a folder with the runs "one", of one process, and "two", of two, and what it said, stopped and resumed."""
    folder = tmp_path_factory.mktemp("together")
    defend(folder, "one", 4)
    return folder, stopped(folder, "two", 2, ranks=2, launched=True), defend(folder, "two", 2, ranks=2)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoint" / "model.safetensors")


@pytest.mark.slow
def test_two_ranks_under_torchrun_stopped_and_started_again_make_the_checkpoint_of_one_process(
    runs: tuple[Path, str, str],
) -> None:
    tmp_path, told, said = runs
    assert told.count("error: stopped by a signal after step") == told.count("hint: resume from two/training") == 1
    assert said.count("harden a checkpoint with patcher") == said.count("hardened model: two") == 1
    one, two = (weights_of(tmp_path / name) for name in ("one", "two"))
    start = load_file(MODEL / "model.safetensors")
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=0)
        assert not torch.equal(value, start[name])
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        files = [(tmp_path / run / "checkpoint" / name).read_text(encoding="utf-8") for run in ("one", "two")]
        assert files[0] == files[1], name
    logs = [log_of(tmp_path / name) for name in ("one", "two")]
    assert [sorted(row) for row in logs[0]] == [sorted(row) for row in logs[1]]
    for mine, row in zip(logs[1], logs[0], strict=True):
        assert {k: v for k, v in mine.items() if k != "event"} == pytest.approx(
            {k: v for k, v in row.items() if k != "event"}, abs=1e-4
        )
    assert any("attack_cosine" in row for row in logs[1])
    costs = [json.loads((tmp_path / name / "summary.json").read_text())["cost"] for name in ("one", "two")]
    assert costs[0]["passes"] == costs[1]["passes"] == 8 + 3 * 2 + 6 + 8  # plain, attacks, attacked, retain
    assert not (tmp_path / "two" / "training").exists()


@pytest.mark.slow
def test_two_ranks_with_an_attacker_of_two_beside_make_the_bytes_of_two_that_attack_themselves(
    runs: tuple[Path, str, str],
) -> None:
    folder, _, _ = runs
    said = defend(folder, "four", 2, "--schedule", "lockstep", "--attacker-ranks", "2", ranks=4)
    assert "1 of 2 processes" in said and said.count("hardened model: four") == 1
    two, four = (weights_of(folder / name) for name in ("two", "four"))
    assert all(torch.equal(four[name], value) for name, value in two.items())
    logs = [log_of(folder / name) for name in ("two", "four")]
    assert logs[0] == logs[1]
    costs = [json.loads((folder / name / "summary.json").read_text())["cost"] for name in ("two", "four")]
    assert [(c["passes"], c["tokens"]) for c in costs[:1]] == [(c["passes"], c["tokens"]) for c in costs[1:]]


@pytest.mark.slow
def test_with_a_whole_attacker_beside_they_stop_and_go_on_as_one_process_too(runs: tuple[Path, str, str]) -> None:
    folder, _, _ = runs
    stopped(folder, "three", 2, "--schedule", "lockstep", ranks=3)
    defend(folder, "three", 2, "--schedule", "lockstep", ranks=3)
    one, three = (weights_of(folder / name) for name in ("one", "three"))
    for name, value in one.items():
        torch.testing.assert_close(three[name], value, atol=1e-5, rtol=0)


# -- refused before anything starts --------------------------------------------------------------------------


@pytest.fixture
def two_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")


@pytest.mark.usefixtures("two_of_a_job")
def test_join_refuses_ranks_that_nobody_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unsupported, match="2 ranks leave 2 for the defender, with this method"):
        launch.join(0)
    with pytest.raises(Unsupported, match="2 ranks leave -1 for the defender"):
        launch.join(3, sharing=True)
    with pytest.raises(Unsupported, match="2 ranks leave 0 for the defender, with 2 that attack"):
        launch.join(1, each=2, sharing=True)
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(Unsupported, match="attackers of 2 processes without a launcher"):
        launch.join(1, each=2, sharing=True)


def test_methods_that_need_one_process_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not shared_by_ranks(DEFENCES["patcher"], "patcher")
    monkeypatch.setattr("casehard.steps.finetune.world", lambda: 2)
    assert shared_by_ranks(DEFENCES["patcher"], "patcher")
    with pytest.raises(Unsupported, match="plain on 2 ranks"):
        shared_by_ranks(DEFENCES["plain"], "plain")


def test_attackers_that_no_rank_was_set_aside_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Attacked:
        workers, backend = 1, None

    monkeypatch.setattr(launch, "world", lambda: 2)
    with (
        pytest.raises(Unsupported, match="2 processes, and no rank was set aside for them"),
        launch.with_attackers(Attacked(), torch.nn.Linear(1, 1), seed=0, bf16=False),
    ):
        pass


def test_who_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.shards_wanted("auto") == 0
    monkeypatch.setattr(launch, "world", lambda: 2)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert launch.shards_wanted("cpu") == 2  # accelerate would leave it
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert launch.shards_wanted("auto") == 0
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    assert launch.shards_wanted("auto") == 2
    with pytest.raises(Unsupported, match="device 'cpu' for 2 ranks"):
        launch.shards_wanted("cpu")
