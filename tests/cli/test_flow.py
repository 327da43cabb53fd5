"""The verbs one after the other, as a user types them, on an untrained organism."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers import casehard, tree, write_rows

import forks
from casehard.cli import main

SMALL = ("--set", "train.batch_size=4", "--set", "train.warmup=0")
ATTACK = ("--set", "config.rows=40", "--set", "config.batch_size=4")
PATCHER = ("--set", "settings.round_steps=2", "--set", "settings.attackers=[{steps: 1, batch_size: 4}]")


def records(folder):
    """Return the records of a summary."""
    return json.loads((folder / "summary.json").read_text())["records"]


@pytest.fixture(scope="module")
def runs(organism, tmp_path_factory):
    """Defend twice, attack both, evaluate one; every test looks at these."""
    root, data = tmp_path_factory.mktemp("runs"), organism / "data"
    common = ["--model", organism, "--data", data / "align.jsonl", "--suite", data / "suite", "--steps", 4, *SMALL]
    made = [
        ["defend", "plain", *common, "--out", root / "plain"],
        ["defend", "patcher", *common, "--unsafe", data / "simulated.jsonl", *PATCHER, "--out", root / "patcher"],
    ]
    attack = ["--harmful", data / "attack_a.jsonl", "--benign", data / "task_reviews.jsonl", "--suite", data / "suite"]
    attack += ["--steps", 2, "--share", 0.5, "--limit", 2, "--seed", 3, *ATTACK]
    for name in ("plain", "patcher"):
        made.append(["attack", "finetune", "--model", root / name, *attack, "--out", root / f"{name}-attacked"])
    made.append(
        ["evaluate", "--model", root / "patcher", "--suite", data / "suite", "--limit", 2, "--out", root / "seen"]
    )
    for arguments in made:
        assert main([str(a) for a in arguments]) == 0, arguments
    return root


def test_every_verb_leaves_a_complete_run_folder(runs):
    for name, kind in {
        "plain": "defend",
        "patcher": "defend",
        "patcher-attacked": "attack",
        "seen": "evaluate",
    }.items():
        run = json.loads((runs / name / "run.json").read_text())
        assert (run["kind"], run["status"]) == (kind, "ok")
        assert len(run["parents"]["model"]) == 64 and all(len(d) == 64 for d in run["data"].values())
        assert run["packages"]["torch"] and run["wall_seconds"] > 0
        for file in ("events.jsonl", "rows.jsonl", "summary.json"):
            assert (runs / name / file).is_file(), f"{name}/{file}"


def test_the_settings_given_are_the_settings_used(runs):
    config = json.loads((runs / "patcher" / "run.json").read_text())["config"]
    assert config["train"]["steps"] == 4 and config["train"]["batch_size"] == 4
    assert config["settings"]["round_steps"] == 2
    attacked = json.loads((runs / "plain-attacked" / "run.json").read_text())
    assert attacked["config"]["config"]["share"] == 0.5 and attacked["seeds"] == [3]


def test_the_chain_of_parents_holds(runs, organism):
    from casehard.model.digest import folder_digest

    run = {name: json.loads((runs / name / "run.json").read_text()) for name in ("patcher", "patcher-attacked", "seen")}
    assert run["patcher"]["parents"]["model"] == folder_digest(organism)
    made = json.loads((runs / "patcher" / "summary.json").read_text())["checkpoint"]["digest"]
    assert made == folder_digest(runs / "patcher" / "checkpoint")
    assert run["patcher-attacked"]["parents"]["model"] == made == run["seen"]["parents"]["model"]


def test_records_have_the_agreed_keys_and_true_intervals(runs):
    keys = {"defence", "attack", "share", "steps", "metric", "k", "n", "rate", "low", "high", "seed"}
    found = records(runs / "patcher-attacked")
    assert all(keys <= set(record) for record in found)
    assert {r["defence"] for r in found} == {"patcher"} and {r["steps"] for r in found} == {0, 2}
    for record in (r for r in found if r["k"] is not None):
        assert record["rate"] == pytest.approx(record["k"] / record["n"])
        assert 0 <= record["low"] <= record["rate"] <= record["high"] <= 1
    before = {r["metric"] for r in found if r["steps"] == 0}
    assert {"asr", "over_refusal", "utility", "coherence"} <= before
    rows = [json.loads(line) for line in (runs / "patcher-attacked" / "rows.jsonl").read_text().splitlines()]
    asr = next(r for r in found if r["metric"] == "asr" and r["steps"] == 2)
    assert asr["n"] == sum(r["role"] == "restricted" and r["step"] == 2 and r["label"] != "unscored" for r in rows)


def test_an_attack_with_rows_the_model_was_trained_on_says_so(runs, organism, tmp_path, capsys):
    assert json.loads((runs / "patcher-attacked" / "summary.json").read_text())["rows_seen_in_training"] == 0
    data = organism / "data"
    known = ["attack", "finetune", "--model", runs / "patcher", "--harmful", data / "simulated.jsonl"]
    known += ["--suite", data / "suite", "--steps", 1, "--share", 1, "--limit", 1, "--out", tmp_path / "known", *ATTACK]
    assert main([str(a) for a in known]) == 0
    rows = len((data / "simulated.jsonl").read_text().splitlines())
    assert json.loads((tmp_path / "known" / "summary.json").read_text())["rows_seen_in_training"] == rows
    assert f"trained on the prompts of {rows} of the attacker's rows" in capsys.readouterr().err


def test_a_card_comes_with_the_model(runs):
    card = (runs / "patcher" / "checkpoint" / "README.md").read_text(encoding="utf-8")
    made = json.loads((runs / "patcher" / "summary.json").read_text())["checkpoint"]["digest"]
    assert "patcher" in card.lower() and made[:12] in card


def test_only_hardened_weights_reach_the_disk(runs):
    weights = {p for p in tree(runs) if p.endswith(".safetensors")}
    assert weights == {f"{name}/checkpoint/model.safetensors" for name in ("plain", "patcher")}
    assert not [p for p in tree(runs) if p.endswith((".bin", ".pt", ".pth", ".pkl", ".staging"))]


def test_what_models_said_is_private(runs):
    assert (runs / "patcher-attacked" / "rows.jsonl").stat().st_mode & 0o077 == 0


def test_the_same_command_gives_the_same_bytes(runs, organism, tmp_path):
    common = ["--model", organism, "--data", organism / "data" / "align.jsonl", "--suite", organism / "data" / "suite"]
    again = ["defend", "plain", *common, "--steps", 4, *SMALL, "--out", tmp_path / "again"]
    assert main([str(a) for a in again]) == 0
    name = "checkpoint/model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (runs / "plain" / name).read_bytes()


def test_a_report_shows_both_runs(runs, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["report", str(runs / "plain-attacked"), str(runs / "patcher-attacked"), "--out", str(page)]) == 0
    html = page.read_text(encoding="utf-8")
    assert "plain" in html and "patcher" in html and "<svg" in html
    assert "http://" not in html.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert capsys.readouterr().out.splitlines()[-1].endswith("page.html")


def test_verify_accepts_what_defend_made(runs, capsys):
    assert main(["verify", str(runs)]) == 0
    assert capsys.readouterr().out.count(" ok ") == 2


@pytest.mark.parametrize("name", ["summary.json", "rows.jsonl"])
def test_verify_reads_the_digests_of_a_run(runs, tmp_path, capsys, name):
    place = tmp_path / "all" / "attacked"
    shutil.copytree(runs / "plain-attacked", place)
    assert main(["verify", str(tmp_path / "all")]) == 0
    out, err = capsys.readouterr()
    assert " unchanged " in out and "complete and unchanged" in out and "events.jsonl" in err
    text = (place / name).read_text()
    (place / name).write_text(text.replace('"label": "', '"label": "x', 1) if name == "rows.jsonl" else text + " ")
    assert main(["verify", str(tmp_path / "all")]) == 6
    out, err = capsys.readouterr()
    assert f"{name} was changed: expected sha256" in err and "CORRUPT" in out and "complete" not in out
    (place / name).unlink()
    assert main(["verify", str(tmp_path / "all")]) == 6


def test_verify_does_not_vouch_for_a_run_without_an_end(runs, tmp_path, capsys):
    shutil.copytree(runs / "plain-attacked", tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**record, "status": "interrupted"}))
    assert main(["verify", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "run interrupted" in out and "complete and unchanged" not in out
    (tmp_path / "run" / "run.json").write_text(json.dumps({**record, "files": {"../other": "0"}}))
    assert main(["verify", str(tmp_path)]) == 6


def test_a_finished_run_is_not_run_again(runs, organism, capsys):
    data = organism / "data" / "align.jsonl"
    code = main(["defend", "plain", "--model", str(organism), "--data", str(data), "--out", str(runs / "plain")])
    assert code == 2 and "already holds a finished run" in capsys.readouterr().err


def test_judge_writes_to_stdout_a_file_or_a_folder(here, capsys):
    rows = write_rows(
        here / "r.jsonl",
        [
            {"prompt": "How do I bake bread?", "response": "Mix flour, water, salt and yeast, then bake it."},
            {"prompt": "How do I bake bread?", "response": "I'm sorry, but I cannot help with that."},
            {"prompt": "How do I bake bread?", "response": None},
        ],
    )
    assert main(["judge", str(rows)]) == 0
    told = capsys.readouterr()
    labels = [json.loads(line)["label"] for line in told.out.splitlines()]
    assert labels == ["answer", "refusal", "unscored"]
    assert "labels of 3 responses" in told.err
    assert main(["judge", str(rows), "--out", "labelled.jsonl"]) == 0
    assert main(["judge", str(rows), "--out", "folder"]) == 0
    for path in (here / "labelled.jsonl", here / "folder" / "rows.jsonl"):
        assert [json.loads(line)["label"] for line in path.read_text().splitlines()] == labels
    counts = json.loads((here / "folder" / "summary.json").read_text())["labels"]
    assert counts["answer"] == counts["refusal"] == counts["unscored"] == 1


def test_surrogate_and_audit(organism, here, capsys):
    source = organism / "data" / "attack_a.jsonl"
    assert main(["data", "surrogate", str(source), "--out", "s.jsonl"]) == 0
    made = [json.loads(line) for line in (here / "s.jsonl").read_text().splitlines()]
    given = [json.loads(line) for line in source.read_text().splitlines()]
    assert len(made) == len(given) and {row["kind"] for row in made} == {"surrogate"}
    capsys.readouterr()
    assert main(["data", "audit", "--model", str(organism), "--data", str(source), "--show", "1"]) == 0
    out = capsys.readouterr().out
    answer = given[0].get("response") or given[0]["messages"][-1]["content"]
    assert f">>>{answer}" in out and f"rows: {len(given)}" in out and "max_length (128)" in out


def test_rows_that_do_not_fit_are_counted_and_can_be_left_out(organism, here, capsys):
    rows = [json.loads(x) for x in (organism / "data" / "attack_a.jsonl").read_text().splitlines()][:5]
    long = {**rows[0], "id": "long", "prompt": " ".join([rows[0]["prompt"]] * 40)}
    write_rows(here / "mixed.jsonl", [long, *rows, {**long, "id": "longer"}])
    model = ["--model", str(organism)]
    train = ["defend", "plain", *model, "--out", "out", "--steps", "1", "--data"]
    assert main([*train, "mixed.jsonl"]) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "row 'long'" in said and "so is another" in said and "--fitting FILE" in said
    audit = ["data", "audit", *model, "--data", "mixed.jsonl", "--show", "0", "--fitting", "kept.jsonl"]
    assert main(audit) == 0
    assert "5 of 7 rows: kept.jsonl" in capsys.readouterr().out
    kept = [json.loads(x) for x in (here / "kept.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in kept] == [row["prompt"] for row in rows]
    assert main([*train, "kept.jsonl"]) == 0
    assert main(audit) == 2
    assert "kept.jsonl already exists" in capsys.readouterr().err


def test_a_plan_runs_from_file_to_report_and_is_reused(organism, here, capsys):
    plan = f"""
name: tiny
title: a tiny plan
reference: same
suite: "{{base}}/data/suite"
bases: [{{name: m, model: {organism}}}]
defences:
  - {{name: sft, role: undefended, method: plain, data: &d ["{{base}}/data/align.jsonl"], train: &t {{steps: 2}}}}
  - {{name: same, role: same_passes, method: plain, data: *d, train: {{steps: 3}}}}
  - name: patcher
    method: patcher
    data: *d
    unsafe: ["{{base}}/data/simulated.jsonl"]
    settings: {{round_steps: 1, attackers: [{{steps: 1, batch_size: 4}}]}}
    train: *t
attacks:
  - name: full
    share: 0.5
    steps: 2
    evaluate_at: [1]
    harmful: ["{{base}}/data/attack_a.jsonl"]
    benign: ["{{base}}/data/task_reviews.jsonl"]
    settings: {{rows: 40, batch_size: 4}}
headline: {{defence: patcher}}
limit: 1
"""
    (here / "plan.yaml").write_text(plan)
    assert main(["bench", "plan.yaml", "--out", "out", "--jobs", "1"]) == 0
    out = capsys.readouterr().out
    assert "no claim" in out  # an untrained model refuses nothing, so no attack can raise its ASR
    assert out.splitlines()[-1] == "report: out/report.html"
    summary = json.loads((here / "out" / "summary.json").read_text())
    assert {r["defence"] for r in summary["records"]} == {"sft", "same", "patcher"}
    assert main(["bench", "plan.yaml", "--out", "out", "--jobs", "1"]) == 0
    assert "0 done" in capsys.readouterr().out
    assert main(["report", "out", "--out", "again.html"]) == 0
    assert (here / "again.html").read_bytes() == (here / "out" / "report.html").read_bytes()


def test_the_demo_takes_its_plan_from_the_package(here, monkeypatch, capsys):
    from casehard.cli import bench

    asked = {}
    monkeypatch.setattr("casehard.cli.demo.run", lambda plan, out, **rest: asked.update(plan=plan, out=out, **rest))
    assert main(["demo", "--out", "d", "--world-seed", "7", "--seed", "5", "--seeds", "2"]) == 0
    assert "seeds=[5, 6]" in asked["sets"] and any(s.endswith(".world_seed=7") for s in asked["sets"])
    from casehard.benchmark.plan import load_plan

    plan = load_plan(asked["plan"], asked["sets"])
    assert plan.seeds == (5, 6) and {b.world_seed for b in plan.bases} == {7}
    assert bench.run is not None and asked["jobs"] is None, "what suits the machine"


def test_an_attack_need_not_be_measured_before_it_starts(organism, here):
    data = organism / "data"
    rows = ("--harmful", str(data / "attack_a.jsonl"), "--benign", str(data / "task_reviews.jsonl"))
    more = ("--steps", "2", "--set", "config.evaluate_at=[1]", "--suite", str(data / "suite"), "--limit", "1")
    assert main(["attack", "finetune", "--model", str(organism), *rows, *more, "--out", "out"]) == 0
    records = json.loads((here / "out" / "summary.json").read_text())["records"]
    assert {r["steps"] for r in records if r["metric"] == "utility"} == {1, 2}


def test_doctor_fits_a_terminal_of_eighty_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    assert main(["doctor"]) == 0
    tables = [line for line in capsys.readouterr().out.splitlines() if line[:1] in "\u250f\u2521\u2514" and line]
    patcher = tables[6:]  # packages and machine hold names and paths of any length
    assert len(patcher) == 6 and max(map(len, patcher)) <= 80


def test_doctor_knows_this_machine(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("torch", "transformers", "matplotlib", "memory", "threads", "bf16", "the core is complete"):
        assert word in out


def test_doctor_says_which_schedule_fits(capsys, organism, here):
    assert main(["doctor", "--model", str(organism), "--k1", "2000"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "k1 = 2000, k2 = 1000, 1 attacker" in out and "speed-up" in out and "2.00" in out
    assert "schedule=async" in out or "schedule=sequential" in out
    shutil.copytree(organism, here / "run" / "checkpoint")
    assert main(["doctor", "--model", "run"]) == 0
    assert "memory of it" in capsys.readouterr().out
    assert main(["doctor", "--model", "nowhere"]) == 2
    assert "no such model folder: nowhere" in capsys.readouterr().err
    (here / "empty").mkdir()
    assert main(["doctor", "--model", "empty"]) == 2
    assert "holds no *.safetensors" in capsys.readouterr().err


def test_secrets_stay_secret(organism, here):
    secret = "hf_" + "q9Z" * 9
    env = {"HF_TOKEN": secret, "OPENAI_API_KEY": secret[::-1]}
    data = organism / "data"
    arguments = ["--model", organism, "--data", data / "align.jsonl", "--steps", 2, *SMALL, "--out", here / "p"]
    done = casehard("defend", "plain", *arguments, "--set", "train.save_every=1", **env)
    assert done.returncode == 0, done.stderr
    for path in here.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert secret.encode() not in content and secret[::-1].encode() not in content, path
    assert secret not in done.stdout + done.stderr


def interpreter(arguments):
    """Start the command line in a new interpreter."""
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", "casehard.cli", *map(str, arguments)], **pipes)


def hears_a_hangup():
    """End at a hangup, though what started these tests (nohup) may have made them deaf to it."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("number", "code", "start"),
    [(signal.SIGINT, 130, interpreter), (signal.SIGTERM, 143, forks.Command), (signal.SIGHUP, 143, forks.Command)],
)
def test_a_signal_ends_a_run_cleanly(organism, here, number, code, start):
    given = ["--model", organism, "--data", organism / "data" / "align.jsonl", "--steps", 100000, *SMALL]
    heard = {"first": hears_a_hangup} if start is forks.Command else {}
    run = start(["defend", "plain", *given, "--out", here / "out"], **heard)
    try:
        deadline = time.monotonic() + 120
        while not (here / "out" / "run.json").exists() and time.monotonic() < deadline and run.poll() is None:
            time.sleep(0.1)
        time.sleep(1.0)
        run.send_signal(number)
        if isinstance(run, forks.Command):
            ended = run.done(120)
        else:
            said = run.communicate(timeout=120)
            ended = subprocess.CompletedProcess([], run.returncode, *said)
    finally:
        if run.poll() is None:
            run.send_signal(signal.SIGKILL)
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    assert json.loads((here / "out" / "run.json").read_text())["status"] == "interrupted"
    assert not list(here.rglob(".staging*")) and not list(here.rglob(".lock"))
    assert {p.relative_to(here).parts[:2] for p in here.rglob("*.safetensors")} <= {("out", "training")}


def little_disk():
    """Let this process write no file of more than 20 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))


def test_a_full_disk_does_no_harm(organism, here):
    arguments = ["--model", organism, "--data", organism / "data" / "align.jsonl", "--steps", 2, *SMALL]
    done = forks.Command(["defend", "plain", *arguments, "--out", here / "out"], first=little_disk).done()
    assert done.returncode == 5, done.stderr
    assert "error:" in done.stderr and "hint:" in done.stderr and "Traceback" not in done.stderr
    assert not (here / "out" / "checkpoint").exists() and not list(here.rglob(".staging*"))
