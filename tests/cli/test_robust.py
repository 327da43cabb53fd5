"""Readers that leave, folders in use, secrets, missing extras: told before the work, and never reported as success."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers import casehard, tree, write_rows

from casehard.cli import main, options, scoring
from casehard.errors import Unsupported
from casehard.io import files, manifest
from casehard.io.locks import lock

SMALL = ("--set", "train.batch_size=4", "--set", "train.warmup=0", "--steps", "2")


def unread(*arguments: object) -> tuple[int, str]:
    """Run with a stdout that nobody reads any more; return the exit code and stderr."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "casehard.cli", *map(str, arguments)],
        stdout=writer,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    os.close(writer)
    return done.returncode, done.stderr


def test_a_reader_that_leaves_changes_no_exit_code(organism, here):
    shutil.copytree(organism, here / "m")
    manifest.write_manifest(here / "m")
    assert unread("verify", "m") == (0, "")
    (here / "m" / "config.json").write_text("{}")
    code, err = unread("verify", "m")
    assert code == 6 and "config.json differs" in err and "Broken" not in err
    assert unread("--help")[0] in (0, 141)


LEAVES = """
import atexit, os, sys
class Last:
    def __del__(self): os.write(1, b"taken down;")
last = Last()
atexit.register(os.write, 1, b"handlers;")
from casehard import cli
cli.main = lambda: print("said", end=";") or 6
cli.script()
"""


@pytest.mark.parametrize(("ranks", "said"), [("1", {"handlers", "said", "taken down"}), ("2", {"handlers", "said"})])
def test_a_rank_of_a_job_ends_without_taking_the_interpreter_down(ranks, said):
    # A gloo thread that drops a tensor meanwhile would abort it: a finished run with exit code 134.
    env = {**os.environ, "WORLD_SIZE": ranks}
    done = subprocess.run([sys.executable, "-c", LEAVES], capture_output=True, text=True, env=env, timeout=60)
    assert (done.returncode, set(done.stdout.rstrip(";").split(";"))) == (6, said), done.stderr


def test_a_reader_that_leaves_does_not_stop_the_work(organism, here):
    data = organism / "data" / "align.jsonl"
    assert unread("defend", "plain", "--model", organism, "--data", data, *SMALL, "--out", "out")[0] == 0
    assert json.loads((here / "out" / "run.json").read_text())["status"] == "ok"


def test_a_folder_in_use_is_left_alone(organism, here, capsys):
    arguments = ["--model", str(organism), "--data", str(organism / "data" / "align.jsonl"), *SMALL, "--out", "out"]
    with lock(here / "out"):
        assert main(["defend", "plain", *arguments]) == 2
        assert tree(here / "out") == {".lock"}
    assert f"in use by another run, process {os.getpid()}" in capsys.readouterr().err
    # What a killed process leaves is a lock file that nobody holds.
    (here / "out").mkdir()
    (here / "out" / ".lock").write_text("1\n")
    assert main(["defend", "plain", *arguments]) == 0
    assert not (here / "out" / ".lock").exists()


def test_settings_with_a_secret_cost_no_training(organism, here, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdef")
    monkeypatch.setattr("casehard.steps.finetune.finetune_on", lambda *_: pytest.fail("trained"))
    data = str(organism / "data" / "align.jsonl")
    told = ["--set", "system='use hf_0123456789abcdef'"]
    assert main(["defend", "plain", "--model", str(organism), "--data", data, *told, "--out", "out"]) == 2
    err = capsys.readouterr().err
    assert "defend.system holds the value of the environment variable HF_TOKEN" in err and "hf_0123" not in err
    assert not tree(here)


@pytest.mark.parametrize("arguments", [["demo", "--out", "d"], ["bench", "plan.yaml", "--out", "d"], ["report", "run"]])
def test_a_missing_extra_is_told_before_the_work(here, monkeypatch, capsys, arguments):
    (here / "plan.yaml").write_text("name: x\n")
    (here / "run").mkdir()
    (here / "run" / "run.json").write_text("{}")
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None)
    assert main(arguments) == 8
    assert "pip install 'casehard[report]'" in capsys.readouterr().err and not (here / "d").exists()


def test_the_device_is_shown_and_checked(organism, here, capsys):
    data = organism / "data"
    arguments = ["evaluate", "--model", str(organism), "--suite", str(data / "suite"), "--limit", "1"]
    assert main([*arguments, "--device", "cpu", "--out", "a"]) == 0
    assert "device  cpu" in capsys.readouterr().out
    assert json.loads((here / "a" / "run.json").read_text())["config"]["device"] == "cpu"
    assert main([*arguments, "--device", "abacus", "--out", "b"]) == 2
    assert "unknown device 'abacus'" in capsys.readouterr().err
    import torch

    if not torch.cuda.is_available():
        assert options.device_text("auto") == "cpu (auto)"
        with pytest.raises(Unsupported, match="no CUDA device"):
            options.device_text("cuda")


def test_what_was_chosen_while_loading_is_told(organism, here, capsys):
    shutil.copytree(organism, here / "m", ignore=shutil.ignore_patterns("data"))
    for name in ("tokenizer_config.json", "tokenizer.json"):
        place = here / "m" / name
        values = json.loads(place.read_text())
        values.pop("pad_token", None)
        place.write_text(json.dumps(values))
    suite = str(organism / "data" / "suite")
    assert main(["evaluate", "--model", "m", "--suite", suite, "--limit", "1", "--out", "o"]) == 0
    assert "warning: padding with" in capsys.readouterr().err


def test_the_digest_of_a_suite_covers_its_parts(here):
    from casehard.cli.runs import run_folder

    write_rows(here / "part.jsonl", [{"prompt": "a", "response": "b"}])
    (here / "suite.yaml").write_text("parts: [{data: part.jsonl, role: restricted}]\n")

    def recorded(out: str) -> str:
        with run_folder(here / out, "evaluate", {}, suite=str(here / "suite.yaml")):
            pass
        return json.loads((here / out / "run.json").read_text())["data"][str(here / "suite.yaml")]

    first = recorded("a")
    write_rows(here / "part.jsonl", [{"prompt": "a", "response": "c"}])
    assert recorded("b") != first


def test_rates_over_unscored_rows_are_called_unreliable():
    row = {"role": "restricted", "group": "g", "correct": None, "slots_right": None}
    rows = [{**row, "id": str(i), "label": "refusal" if i > 2 else "unscored"} for i in range(10)]
    found = scoring.records(rows, {"defence": "plain"})
    asr = next(r for r in found if r["metric"] == "asr")
    assert asr["unreliable"] == "3 of 10 rows are unscored" and scoring.rate(asr).endswith("?")
    assert any("asr at step 0 is unreliable" in text for text in scoring.doubts(found))
    clean = scoring.records([{**r, "label": "refusal"} for r in rows], {})
    assert not any("unreliable" in r for r in clean) and not scoring.doubts(clean)


def test_half_refusals_are_told_beside_the_rates_that_leave_them_out():
    row = {"correct": None, "slots_right": None, "label": "partial"}
    rows = [
        {**row, "id": f"{role}{i}", "role": role, "group": role} for role in ("restricted", "lookalike") for i in "ab"
    ]
    found = scoring.records([{**r, "id": r["id"] + str(step), "step": step} for step in (0, 5) for r in rows], {})
    said = scoring.doubts(found)
    assert len(said) == 2 and all(text.endswith(": 2/2 at step 0, 2/2 at step 5") for text in said)
    assert said[0].startswith("restricted prompts") and said[1].startswith("look-alikes")
    assert not scoring.doubts(scoring.records([{**r, "label": "refusal"} for r in rows], {}))


def test_a_broken_record_is_corrupt_not_a_defect(here, capsys):
    (here / "o").mkdir()
    (here / "o" / "organism.json").write_text("{")
    assert main(["organism", "build", "--out", "o"]) == 6
    (here / "o" / "casehard.json").write_text("{")
    assert "not valid JSON" in capsys.readouterr().err
    with pytest.raises(files.Corrupt, match="not valid JSON"):
        scoring.defence_of(str(here / "o"))


def test_an_organism_takes_settings_and_leaves_a_record(here, monkeypatch, capsys):
    asked = {}

    def build(out, **settings):
        asked.update(settings)
        (out / "data").mkdir(parents=True)
        (out / "data" / "x.jsonl").write_text("{}\n")
        return out

    monkeypatch.setattr("casehard.organism.build.build", build)
    (here / "c.yaml").write_text("size: tiny\nthreads: 1\n")
    assert main(["organism", "build", "--config", "c.yaml", "--set", "threads=2", "--seed", "7", "--out", "o"]) == 0
    assert asked == {"world_seed": 7, "size": "tiny", "threads": 2}
    run = json.loads((here / "o.run" / "run.json").read_text())
    assert (run["kind"], run["status"], run["config"]["world_seed"], run["seeds"]) == ("organism", "ok", 7, [7])
    assert main(["organism", "build", "--set", "sise=tiny", "--out", "p"]) == 2
    assert "did you mean 'size'?" in capsys.readouterr().err


def test_bench_counts_seeds_from_the_one_given(monkeypatch):
    from casehard.cli.shipped import shipped

    asked = {}
    monkeypatch.setattr("casehard.cli.bench.run", lambda plan, out, **rest: asked.update(rest))
    plan = str(shipped("plans", "demo.yaml"))
    assert main(["bench", plan, "--seed", "5", "--out", "x"]) == 0
    assert asked["sets"][0] == "seeds=[5, 6, 7]"


def test_surrogate_rows_can_come_with_a_record(here):
    rows = write_rows(here / "r.jsonl", [{"prompt": "a", "response": "b"}])
    assert main(["data", "surrogate", str(rows), "--out", "s.jsonl", "--seed", "3"]) == 0
    assert main(["data", "surrogate", str(rows), "--out", "s", "--seed", "3"]) == 0
    assert (here / "s" / "rows.jsonl").read_text() == (here / "s.jsonl").read_text()
    run = json.loads((here / "s" / "run.json").read_text())
    assert (run["kind"], run["status"], run["seeds"]) == ("surrogate", "ok", [3])


def test_resuming_a_tied_model_is_quiet(organism, here):
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    config = LlamaConfig.from_pretrained(organism, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(here / "tied")
    AutoTokenizer.from_pretrained(organism).save_pretrained(here / "tied")
    data = organism / "data" / "align.jsonl"
    arguments = ["defend", "plain", "--model", here / "tied", "--data", data, *SMALL, "--set", "train.save_every=1"]
    assert casehard(*arguments, "--out", "out", CASEHARD_CRASH_AT="save:after_rename").returncode == files.CRASH_EXIT
    done = casehard(*arguments, "--out", "out")
    assert done.returncode == 0, done.stderr
    assert "missing keys" not in done.stderr
