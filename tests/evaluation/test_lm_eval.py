"""lm-evaluation-harness as a program of its own: what it is asked, what is read, and every way in which it can fail."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import casehard
from casehard.cli import main
from casehard.errors import ConfigError, Corrupt, DataError, Refused, UserError
from casehard.evaluation.lm_eval import LmEval, arguments, read_results, run_lm_eval
from casehard.steps import Evaluate

WORLD = Path(casehard.__file__).parent / "organism" / "assets" / "world0-tiny"
STAND_IN = Path(__file__).with_name("lm_eval_stand_in.py")
ALL = LmEval(tasks=("mmlu", "gsm8k", "ifeval"))


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Put an ``lm_eval`` first on PATH; return how to say what it does."""
    place = tmp_path / "bin"
    place.mkdir()
    (place / "lm_eval").write_text(f'#!/bin/sh\nexec {sys.executable} {STAND_IN} "$@"\n')
    (place / "lm_eval").chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:/usr/bin:/bin")
    monkeypatch.delenv("HOW", raising=False)
    return lambda how: monkeypatch.setenv("HOW", how)


def measure(tmp_path, config=ALL, **more):
    place = tmp_path / "place"
    place.mkdir()
    return run_lm_eval(config, WORLD, place, **{"device": "cpu", **more})


def test_the_metrics_of_the_tasks_asked_for_are_read_with_intervals(program, tmp_path):
    found = {score.metric: score for score in measure(tmp_path, limit=50, seed=3)}
    assert set(found) == {
        "mmlu acc",
        "gsm8k exact_match,strict-match",
        "gsm8k exact_match,flexible-extract",
        "ifeval inst_level_strict_acc",
    }
    mmlu = found["mmlu acc"]
    assert (mmlu.n, mmlu.k, mmlu.rate) == (50, None, 0.25)
    assert (mmlu.low, mmlu.high) == (pytest.approx(0.25 - 0.0196), pytest.approx(0.25 + 0.0196))
    assert found["gsm8k exact_match,flexible-extract"].high == 1.0  # a share ends there
    # No standard error: the interval of 20 out of 50, worked out by hand (Wilson).
    ifeval = found["ifeval inst_level_strict_acc"]
    assert (ifeval.low, ifeval.high) == (pytest.approx(0.276, abs=1e-3), pytest.approx(0.538, abs=1e-3))
    (kept,) = (tmp_path / "place" / "out").rglob("results_*.json")
    asked = json.loads(kept.read_text())["config"]["argv"]
    assert asked == arguments(ALL, WORLD, device="cpu", limit=50, seed=3, system=None)
    assert asked[asked.index("--tasks") + 1] == "mmlu,gsm8k,ifeval" and "--apply_chat_template" in asked


def test_what_it_is_asked_follows_the_settings(tmp_path):
    given = {"device": "cuda:1", "limit": None, "seed": 0, "system": "be kind , please"}
    asked = arguments(replace(ALL, chat=False, batch_size="8"), WORLD, **given)
    assert asked[asked.index("--system_instruction") + 1] == "be kind , please"
    assert (
        "--limit" not in asked
        and "--apply_chat_template" not in asked
        and asked[asked.index("--batch_size") + 1] == "8"
    )
    with pytest.raises(ConfigError, match=r"reads .* as settings"):
        arguments(ALL, tmp_path / "a,trust_remote_code=True", **given)
    for wrong in ({"tasks": ()}, {"tasks": ("mmlu --trust",)}, {"tasks": ("a",), "batch_size": "8 --x"}):
        with pytest.raises(ConfigError):
            LmEval(**wrong)


@pytest.mark.parametrize(
    ("how", "error", "text"),
    [
        ("fails", UserError, "exit code 1; stderr ends: no data set of that name"),
        ("nothing", DataError, "left no results_"),
        ("twice", DataError, "2 files results_"),
        ("truncated", Corrupt, "not valid JSON"),
        ("without gsm8k", DataError, "no results of 'gsm8k'"),
        ("nan", DataError, "no number for 'mmlu'"),
    ],
)
def test_what_went_wrong_is_said(program, tmp_path, how, error, text):
    program(how)
    with pytest.raises(error, match=text):
        measure(tmp_path)


def test_a_program_that_hangs_is_killed(program, tmp_path):
    program("hangs")
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"did not end within 0\.02 minutes and was killed") as caught:
        measure(tmp_path, replace(ALL, minutes=0.02))
    assert time.monotonic() - begun < 30 and "lm_eval.minutes" in str(caught.value.hint)


def test_a_program_that_is_not_there_or_not_allowed_is_told_before_anything_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CASEHARD_EXTERNAL", raising=False)
    with pytest.raises(ConfigError, match="no program 'lm_eval'") as caught:
        Evaluate(model="nowhere", suite="nowhere", lm_eval=ALL).run()
    assert "pip install lm-eval" in str(caught.value.hint)
    with pytest.raises(Refused, match="ask to run the program"):
        Evaluate(model="nowhere", suite="nowhere", lm_eval=replace(ALL, program="/bin/true")).run()


def test_results_of_another_shape_are_damaged(tmp_path):
    path = tmp_path / "results_x.json"
    for wrong in ("[]", '{"results": [1]}', '{"results": {"mmlu": {}}, "n-samples": {"mmlu": {"effective": "x"}}}'):
        path.write_text(wrong)
        with pytest.raises(Corrupt):
            read_results(path, ("mmlu",))


def test_the_verb_puts_them_into_its_table_and_keeps_the_raw_files(program, tmp_path, capsys):
    out = tmp_path / "run"
    given = ["--model", str(WORLD), "--suite", str(WORLD / "data" / "suite"), "--limit", "1", "--out", str(out)]
    assert main(["evaluate", *given, "--device", "cpu", "--lm-eval", "mmlu, gsm8k"]) == 0
    said = capsys.readouterr().out
    assert "mmlu acc" in said and "0.25 [0.23, 0.27]" in said
    records = {r["metric"]: r for r in json.loads((out / "summary.json").read_text())["records"]}
    assert records["mmlu acc"]["rate"] == 0.25 and records["mmlu acc"]["attack"] == "none" and "utility" in records
    assert len(list((out / "lm_eval" / "out").rglob("results_*.json"))) == 1
    assert json.loads((out / "run.json").read_text())["config"]["lm_eval"]["tasks"] == ["mmlu", "gsm8k"]
