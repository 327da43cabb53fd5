"""``casehard attack search``: refusals with their codes, and one small search from the command to the page."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

import casehard as ch
from casehard.adversary import search as searching
from casehard.cli import main

pytest.importorskip("optuna")
WORLD = Path(ch.__file__).parent / "organism" / "assets" / "world0-tiny"
DATA = WORLD / "data"
COMMAND = ["attack", "search", "--model", WORLD, "--harmful", DATA / "attack_a.jsonl", "--suite", DATA / "suite"]
COMMAND += ["--benign", DATA / "task_reviews.jsonl", "--limit", 2, "--device", "cpu", "--out", "s", "--budget", 2]
SMALL = ["config.rows=20", "config.batch_size=4", "space.steps=2", "space.mode=full", "space.lr=[1e-5,1e-4]"]


def run(*more: object) -> int:
    return main([*map(str, (*COMMAND, *more))])


def small(*more: object) -> int:
    return run(*(word for setting in SMALL for word in ("--set", setting)), *more)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--budget", 0], "budget must be at least 1, got 0"),
        (["--set", "space.lr=[1e-3,1e-6]"], "space.lr: from 0.001 to 1e-06 is no range"),
        (["--set", "space.learning_rate=[1e-6,1e-3]"], "unknown key 'learning_rate'"),
        (["--set", "spaces.lr=1"], "did you mean 'space'?"),
        (["--attack", "backdoor"], "hides a trigger: no search"),
        (["--attack", "finetoon"], "did you mean 'finetune'?"),
        (["--metric", "leaks"], "metric"),
        (["--workers", 0], "workers"),
        (["--harmful", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_bad_input_leaves_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], more: list[object], said: str
) -> None:
    assert run(*more) in (2, 3)
    assert said in capsys.readouterr().err and not list(here.iterdir())


def test_an_interrupted_search_is_gone_on_with(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tried = searching.attempt, []

    def stops(job: searching.Job) -> dict[str, object]:
        tried.append(job.label if not job.still else "still")
        if len(tried) == 3:
            raise KeyboardInterrupt
        return real(job)

    monkeypatch.setattr(searching, "attempt", stops)
    assert small() == 130
    assert "run the same command again to go on" in capsys.readouterr().err
    assert json.loads((here / "s" / "run.json").read_text())["status"] == "interrupted"
    assert small("--seed", 1) == 2 and "holds another search" in capsys.readouterr().err
    assert small() == 0
    assert tried[:5] == ["still", "attacker 1/2", "attacker 2/2", "still", "attacker 2/2"]
    said = capsys.readouterr().out
    assert "found by TPE within 2 trials" in said and "attacker: s/best.yaml" in said
    left = {p.name for p in (here / "s").iterdir()}
    assert left >= {"trials.jsonl", "best.yaml", "plan_row.yaml", "summary.json", "report.html", "journal.log"}
    assert not list((here / "s").rglob("*.safetensors"))
    assert small() == 2 and "already holds a finished run" in capsys.readouterr().err
    assert main(["report", "s", "--out", "again.html"]) == 0
    assert (here / "again.html").read_bytes() == (here / "s" / "report.html").read_bytes()
    assert main(["attack", "finetune", "--config", "s/best.yaml", "--limit", "1", "--out", "again"]) == 0


def test_best_yaml_runs_as_its_comment_says_with_paths_as_they_were_given(
    here: Path,
) -> None:
    shutil.copytree(WORLD, here / "world")
    data = Path("world") / "data"
    files = {"--model": "world", "--harmful": data / "attack_a.jsonl", "--benign": data / "task_reviews.jsonl"}
    words = [
        str(w)
        for pair in {**files, "--suite": data / "suite", "--limit": 2, "--device": "cpu", "--out": "my runs/s"}.items()
        for w in pair
    ]
    sets = [word for setting in SMALL for word in ("--set", setting)]
    assert main(["attack", "search", "--budget", "1", *words, *sets]) == 0
    text = (here / "my runs" / "s" / "best.yaml").read_text()
    assert str(here) not in text
    (said,) = re.findall(r"# casehard (.*) --out DIR, from the folder in which the search was started", text)
    assert main([*shlex.split(said), "--limit", "1", "--out", "again"]) == 0
