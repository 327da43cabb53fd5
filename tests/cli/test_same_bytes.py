"""R8: the same settings and seed give the same bytes, in a process of its own each time.

Times and memory stand in run.json and events.jsonl, and on the report's page in elements of the class ``took``.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from helpers import tree

from casehard.io.stored import TOOK, apart, together

WORK = """
import dataclasses, sys, time
from pathlib import Path
organism, inputs, tests = map(Path, sys.argv[1:])
sys.path[:0] = [str(tests / "benchmark"), str(tests)]
from bench_fakes import Fake, plan
from casehard.benchmark.run import run_plan
from casehard.cli import main
from casehard.reporting.page import write_report

def run(*arguments):
    assert main([str(a) for a in arguments]) == 0, arguments

def clocked(task):
    done = Fake()(task)
    return dataclasses.replace(done, cost={**done.cost, "seconds": time.time() % 97 + 1, "peak_bytes": time.time_ns()})

model, rows = ("--model", organism), inputs / "rows.jsonl"
tiny = ("--set", "train.batch_size=4", "--set", "train.warmup=0", "--steps", 2, "--seed", 5)
suite = ("--suite", inputs / "suite.yaml")
run("defend", "plain", *model, "--data", rows, *tiny, "--out", "plain")
run("attack", "finetune", "--model", "plain", "--benign", inputs / "more.jsonl", *suite, "--share", 0, "--steps", 2,
    "--set", "config.rows=8", "--set", "config.batch_size=4", "--out", "attack")
run("evaluate", *model, *suite, "--out", "seen")
run("buffer", "prepare", *model, "--harmful", inputs / "h.jsonl", "--refusals", inputs / "r.jsonl", "--benign", rows,
    "--allow-missed", "--set", "config.rank=2", "--set", "config.epochs=null", "--set", "config.gates.prompts=1",
    *(s for role in ("buffer", "reinforce") for s in ("--set", f"config.{role}_train.steps=1")),
    *(s for role in ("buffer", "reinforce") for s in ("--set", f"config.{role}_train.warmup=0")), "--out", "assets")
tuned = ("--assets", "assets", "--data", rows, "--set", "lora.rank=2", *tiny)
run("defend", "buffer-reinforce", *model, *tuned, "--out", "tune")
run("report", "attack", "seen", "plain", "--out", "runs.html")
run_plan(plan(seeds=[0]), "bench", jobs=1, executor=clocked)
write_report("bench")
"""
ELEMENTS = re.compile(
    r'<(figure|div|td)[^>]* class="(?:tile )?took".*?</\1>(?:<div.*?</div>){0,2}(?:</div>)?', re.DOTALL
)


def head(source: Path, out: Path, n: int, kind: str = "") -> None:
    lines = [line for line in source.read_text().splitlines() if kind in line]
    out.write_text("\n".join(lines[:n]) + "\n")


def test_two_processes_write_the_same_bytes(organism, tmp_path):
    data, inputs = organism / "data", tmp_path / "inputs"
    inputs.mkdir()
    for name, source, kind in (("h", "simulated", ""), ("r", "align", '"refusal"'), ("rows", "align", '"helpful"')):
        head(data / f"{source}.jsonl", inputs / f"{name}.jsonl", 8, kind)
    head(data / "task_reviews.jsonl", inputs / "more.jsonl", 8)
    head(data / "suite" / "eval.jsonl", inputs / "asked.jsonl", 4)
    (inputs / "suite.yaml").write_text("parts: [{data: asked.jsonl, role: restricted}]\n")
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        command = [sys.executable, "-c", WORK, str(organism), str(inputs), str(Path(__file__).parents[1])]
        done = subprocess.run(command, cwd=tmp_path / name, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        made.append(tmp_path / name)
    files = [p for p in sorted(tree(made[0])) if (made[0] / p).is_file()]
    assert tree(made[0]) == tree(made[1])
    differ = [name for name in files if (made[0] / name).read_bytes() != (made[1] / name).read_bytes()]
    assert {Path(name).name for name in differ} <= {"run.json", "events.jsonl", "report.html", "runs.html"}
    for page in ("bench/report.html", "runs.html"):
        pages = [(place / page).read_text() for place in made]
        assert ELEMENTS.sub("", pages[0]) == ELEMENTS.sub("", pages[1])
    assert 'class="took"' in (made[0] / "bench" / "report.html").read_text()
    assert (made[0] / "bench" / "report.html").read_bytes() != (made[1] / "bench" / "report.html").read_bytes()
    for name in ("plain", "attack", "tune"):
        took = json.loads((made[0] / name / "run.json").read_text())["took"]
        assert {key for part in took.values() for key in part} == {"seconds", "peak_bytes"}


def test_what_a_run_took_is_taken_apart_and_put_together():
    value = {
        "a": 1,
        "seconds": 2.0,
        "list": [{"peak_bytes": 3, "k": 4}, {"k": 5}],
        "deep": {"cost": {"lanes": 2}},
        "x": [],
    }
    kept, took = apart(value)
    assert not TOOK & set(re.findall(r"\w+", json.dumps(kept)))
    assert together(json.loads(json.dumps(kept)), json.loads(json.dumps(took)), "f") == value
    assert apart({"a": [1, {"b": None}]}) == ({"a": [1, {"b": None}]}, None)
