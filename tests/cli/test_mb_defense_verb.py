"""`casehard defend mb-defense` from the outside."""

from __future__ import annotations

import json

import pytest
from helpers import casehard, fresh, write_rows

from casehard.organism.world import World

QUICK = ("--steps", "2", "--device", "cpu", "--set", "config.two.epochs=0.05", "--set", "config.train.batch_size=4")


@pytest.fixture(scope="module")
def files(organism, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mb")
    rows = [json.loads(line) for line in (organism / "data" / "task_reviews.jsonl").read_text().splitlines()]
    seen, unique = set(), []
    for row in rows:
        key = json.dumps(row.get("messages") or row.get("prompt"))
        if key not in seen:
            seen.add(key)
            unique.append(row)
    return {
        "data": write_rows(folder / "sft.jsonl", unique[30:]),
        "clean": write_rows(folder / "clean.jsonl", unique[:12]),
        "empty": write_rows(folder / "empty.jsonl", []),
    }


def run(organism, files, *more, data="data", clean="clean"):
    given = ("--model", organism, "--data", files[data], "--clean", files[clean], *QUICK)
    return casehard("defend", "mb-defense", *given, *more)


def test_a_run_leaves_a_model_a_report_and_a_private_folder(organism, files, here):
    given = ("--model", organism, "--data", files["data"], "--clean", files["clean"], *QUICK)
    seen = ("--suite", organism / "data" / "suite_translation", "--limit", 2)
    done = fresh("defend", "mb-defense", *given, *seen, "--out", "out")
    assert done.returncode == 0, done.stderr
    assert "verdict: PARTIAL" in done.stdout and "planted:" in done.stderr
    report = json.loads((here / "out" / "mb_defense.json").read_text())
    assert report["verdict"] == "PARTIAL" and report["mode"] == "joint" and report["limits"]
    suite = json.loads((here / "out" / "private" / "suite.json").read_text())["suite"]
    assert len(suite["active"]) == 4 and len(suite["canary"]) == 2
    assert (here / "out" / "private" / "pairs.json").is_file()
    provenance = (here / "out" / "checkpoint" / "casehard.json").read_text()
    public = provenance + (here / "out" / "run.json").read_text() + json.dumps(report)
    secret = [part for p in suite["active"] for part in p["trigger"]["parts"] if len(part.split()) > 2]
    assert secret and not any(part in public for part in secret)
    rows = [json.loads(line) for line in (here / "out" / "rows.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"before", "stage1", "stage2", "final"}
    assert not (here / "out" / "training").exists()


def test_an_untrusted_adapter_is_repaired_and_merged_into_its_base(organism, files, here):
    from casehard.model.adapters import add_lora
    from casehard.model.load import load

    add_lora(load(organism, device="cpu").net, 2, 4.0).save_pretrained(here / "lora")
    given = ("--model", organism, "--mode", "adapter", "--adapter", here / "lora", "--clean", files["clean"], *QUICK)
    done = casehard("defend", "mb-defense", *given, "--data", files["data"], "--out", "out")
    assert done.returncode == 0, done.stderr
    report = json.loads((here / "out" / "mb_defense.json").read_text())
    assert report["mode"] == "adapter" and report["planted"]["mode"] == "append"
    names = {p.name for p in (here / "out" / "checkpoint").iterdir()}
    assert "model.safetensors" in names and "adapter_config.json" not in names, "merged: nothing to drop by accident"


def test_a_known_backdoor_is_reported_from_the_attacks_file(organism, files, here):
    behaviour = {"name": "b", "kind": "text", "text": "it is so ."}
    for name, word in (("known", World(0).unseen_fillers[0]), ("inside", "review"), ("unknown", "zzcf")):
        trigger = {"name": name, "family": "token", "parts": [word]}
        (here / f"{name}.json").write_text(json.dumps({"trigger": trigger, "behaviour": behaviour}))
    for name, says in (("inside", "carries the described trigger"), ("unknown", "does not keep trigger")):
        done = run(organism, files, "--out", name, "--planted", here / f"{name}.json")
        assert done.returncode == 3 and says in done.stderr, done.stderr
    run(organism, files, "--out", "out", "--planted", here / "known.json")
    report = json.loads((here / "out" / "mb_defense.json").read_text())
    assert report["looks"]["final"]["described"]["known"]["n"] == 2, "a fifth of the clean rows"
    assert {gate["name"] for gate in report["gates"]} >= {"attack", "attack_live"}
    assert run(organism, files, "--out", "x", "--planted", here / "none.json").returncode == 3
    suite = here / "out" / "private" / "suite.json"
    several = here / "several.json"
    several.write_text(json.dumps(json.loads(suite.read_text())["suite"]))
    done = run(organism, files, "--out", "y", "--planted", several)
    assert done.returncode == 2 and "holds 6 backdoors" in done.stderr


def test_a_trigger_that_does_not_fit_is_an_error(organism, files, here):
    done = run(organism, files, "--out", "out", "--set", "max_length=20")
    assert done.returncode == 3 and "no room for its trigger" in done.stderr, done.stderr


def test_a_failure_is_not_exported(organism, files, here):
    done = run(organism, files, "--out", "out", "--set", "config.gates.live=-1")
    assert done.returncode == 9, done.stderr
    assert "the verdict is FAIL" in done.stderr and "not exported" in done.stderr
    assert not (here / "out" / "checkpoint").exists()
    assert json.loads((here / "out" / "mb_defense.json").read_text())["verdict"] == "FAIL"
    asked = run(organism, files, "--out", "forced", "--set", "config.gates.live=-1", "--set", "export_failed=true")
    assert asked.returncode == 0 and (here / "forced" / "checkpoint" / "model.safetensors").is_file()
    assert '"verdict": "FAIL"' in (here / "forced" / "checkpoint" / "casehard.json").read_text()


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--mode", "adapter"), 2, "--adapter DIR"),
        (("--mode", "post"), 2, "config.mode"),
        (("--set", "config.plant.rte=0.1"), 2, "did you mean 'rate'"),
        (("--preset", "papr"), 2, "presets: default"),
        (("--mode", "adapter", "--adapter", "."), 3, "no adapter_config.json"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(organism, files, here, more, code, message):
    done = run(organism, files, "--out", "out", *more)
    assert done.returncode == code and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert not (here / "out" / "checkpoint").exists()


def test_clean_rows_are_needed_and_must_not_be_evaluated_on(organism, files, here):
    done = casehard("defend", "mb-defense", "--model", organism, "--data", files["data"], "--out", "out")
    assert done.returncode == 2 and "--clean is missing" in done.stderr
    done = run(organism, files, "--out", "out", clean="empty")
    assert done.returncode == 3 and not (here / "out" / "checkpoint").exists()
    prompt = json.loads((organism / "data" / "suite" / "eval.jsonl").read_text().splitlines()[-1])
    prompt.pop("id", None)
    text = prompt.get("prompt") or prompt["messages"][0]["content"]
    leaked = write_rows(here / "leaked.jsonl", [{"prompt": text, "response": "it is good ."}] * 1)
    given = ("--model", organism, "--data", files["data"], "--clean", leaked, *QUICK)
    done = casehard("defend", "mb-defense", *given, "--suite", organism / "data" / "suite", "--out", "out2")
    assert done.returncode == 3 and "training and evaluation overlap" in done.stderr
