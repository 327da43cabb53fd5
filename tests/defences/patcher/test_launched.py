"""The command line with attackers beside: started by itself, and as one of the ranks of a launcher.

The ranks are told what torchrun tells them; test_together.py has the launcher itself.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import casehard
import forks
from casehard.cli import main
from casehard.io.manifest import file_digest

TINY = Path(casehard.__file__).parent / "organism" / "assets" / "world0-tiny"
SETTINGS = (
    *("--steps", "12", "--set", "settings.round_steps=4", "--set", "train.batch_size=4"),
    *("--set", "settings.attackers=[{steps: 3, lr: 1.0e-3, batch_size: 4}]", "--seed", "3"),
)


def command(out: Path, *more: str) -> list[str]:
    data = ("--data", str(TINY / "data/align.jsonl"), "--unsafe", str(TINY / "data/simulated.jsonl"))
    return ["defend", "patcher", "--model", str(TINY), *data, "--out", str(out), *SETTINGS, *more]


@pytest.fixture
def one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_two_ranks_of_torchrun_make_the_same_bytes_as_one_process(tmp_path, one_thread):
    assert main(command(tmp_path / "alone")) == 0
    done = forks.Ranks(2, command(tmp_path / "ranks", "--schedule", "lockstep")).done()
    assert done.returncode == 0, done.stdout + done.stderr
    weights = [file_digest(tmp_path / side / "checkpoint" / "model.safetensors") for side in ("alone", "ranks")]
    assert weights[0] == weights[1]
    assert not list((tmp_path / "ranks").rglob("*patcher-*"))  # neither vectors nor copies are left


@pytest.mark.slow
def test_attackers_alone_means_async_and_the_table_tells_the_age(tmp_path, one_thread, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(command(tmp_path / "out", "--attackers", "2", "--set", "settings.max_age=4")) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "attackers beside 2" in out and "schedule=async" in out
    assert re.search(r"age of the attack vectors .* [0-4] at most", out)
    log = [json.loads(line) for line in (tmp_path / "out" / "events.jsonl").read_text().splitlines()]
    adopted = [row for row in log if "attack_norm_0" in row or "attack_norm_1" in row]
    assert adopted and max(row.get("attack_age_max", 0) for row in log) <= 4


def test_attackers_do_not_change_the_schedule_that_a_preset_names():
    from casehard.cli.defend import _multiply_attackers

    values = {"method": "patcher", "attackers": 1, "preset": "reference_parallel", "settings": {"round_steps": 4}}
    assert _multiply_attackers(values) == 1
    assert "schedule" not in values["settings"] and values["settings"]["attackers"][0]["steps"] == 500
    values = {"method": "patcher", "attackers": 1, "preset": "paper_sequential", "settings": {"max_age": 4}}
    assert _multiply_attackers(values) == 1 and values["settings"]["schedule"] == "async"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--schedule", "asink"), "asink"),
        (("--schedule", "async", "--set", "settings.delay=3"), "delay 3 with schedule 'async'"),
        (
            ("--set", "settings.attackers=[{steps: 1}, {steps: 2}]", "--attackers", "3"),
            "--attackers 3, and the settings",
        ),
    ],
)
def test_contradictions_are_refused_before_anything_starts(tmp_path, capsys, more, message):
    assert main(command(tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_other_methods_have_no_attackers(tmp_path, capsys):
    arguments = ["defend", "plain", "--model", str(TINY), "--data", str(TINY / "data/align.jsonl")]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--attackers", "1"]) == 2
    assert "plain simulates no attacks" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["patcher", "plain", "buffer-reinforce"])
def test_ranks_for_attackers_that_are_not_there_are_refused(tmp_path, capsys, method):
    words = [
        "defend",
        method,
        "--model",
        str(TINY),
        "--data",
        str(TINY / "data/align.jsonl"),
        "--out",
        str(tmp_path / "o"),
    ]
    assert main([*words, "--attacker-ranks", "2"]) == 2
    assert "--attacker-ranks 2 and no attackers beside" in capsys.readouterr().err


def test_ranks_that_nobody_needs_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(command(tmp_path / "out", "--schedule", "lockstep", "--attacker-ranks", "2")) == 7
    assert "2 ranks leave 0 for the defender, with 2 that attack" in capsys.readouterr().err
