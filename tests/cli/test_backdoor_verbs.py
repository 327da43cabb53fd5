"""``casehard attack backdoor`` and ``casehard scan``, on an untrained organism."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from helpers import make_organism, tree

from casehard.backdoor import presets
from casehard.backdoor.planted import find_planted, read_planted
from casehard.backdoor.triggers import poison_backdoor
from casehard.cli import main
from casehard.data import sources
from casehard.data.mix import content_hash
from casehard.errors import ConfigError
from casehard.evaluation.suite import Suite
from casehard.io.manifest import verify
from casehard.organism.triggers import triggers
from casehard.organism.world import World
from casehard.types import Example

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
QUICK = ("--steps", "2", "--limit", "1", "--set", "config.batch_size=4", "--set", "config.evaluate_at=[0]")


@pytest.fixture(scope="module")
def organism(tmp_path_factory):
    return make_organism(tmp_path_factory.mktemp("organism"))


def run(*arguments):
    return main([str(a) for a in arguments])


def test_attack_then_scan(organism, tmp_path):
    data, out = organism / "data", tmp_path / "attack"
    rows = ("--data", data / "benign.jsonl", "--suite", data / "suite")
    assert (
        run(
            "attack",
            "backdoor",
            "--model",
            organism,
            *rows,
            "--rate",
            "0.1",
            "--behaviour",
            "sentence",
            *QUICK,
            "--out",
            out,
        )
        == 0
    )
    assert "checkpoint" not in tree(out)  # attacked weights are never written unless asked for
    poisoned, clean = sources.load(out / "poisoned.jsonl"), sources.load(data / "benign.jsonl")
    changed = [i for i, (a, b) in enumerate(zip(poisoned, clean, strict=True)) if a.prompt != b.prompt]
    summary = json.loads((out / "summary.json").read_text())
    assert changed == summary["manifest"]["poisoned"] and len(changed) == 15
    assert {r["metric"] for r in summary["records"]} >= {"cacc", "aacc", "asr", "false_trigger", "degenerate"}
    assert all(0 <= r["low"] <= r["rate"] <= r["high"] <= 1 for r in summary["records"])
    planted = read_planted(out / "planted.json")
    assert planted[0].trigger == triggers(World(0))["token"]

    scanned = tmp_path / "scan"
    settings = [
        f"lookup.{k}" for k in ("words=12", "confirm=2", "batch_size=64", "confirm_prompts=6", "max_new_tokens=4")
    ]
    settings += ["relearn.steps=1", "relearn.every=1", "relearn.rows=4", "relearn.limit=1"]
    sets = [a for s in settings for a in ("--set", s)]
    known = ("--planted", out / "planted.json", "--before", organism, "--data", data / "benign.jsonl", "--limit", "1")
    suite = ("--suite", data / "suite")
    assert run("scan", "model", "--model", organism, *suite, *known, *sets, "--out", scanned) == 0
    report = json.loads((scanned / "scan.json").read_text())
    assert report["now"] == report["before"]  # the same model twice
    assert set(report["now"]) == {"model", "look_up", "matrix", "recognition", "relearning"}
    assert report["now"]["look_up"]["words"] == 12 and "<svg" in (scanned / "matrix-now.svg").read_text()

    audited = tmp_path / "audit"
    assert run("scan", "data", "--data", out / "poisoned.jsonl", "--out", audited) == 0
    audit = json.loads((audited / "audit.json").read_text())
    assert "lako" in audit["findings"][0]["phrase"] and audit["findings"][0]["rows"] == changed
    kept = sources.load(audited / "kept.jsonl")
    assert len(kept) + len(sources.load(audited / "suspect.jsonl")) == len(clean)
    assert not any("lako" in e.prompt.split() for e in kept)


SMALL = [
    part
    for setting in ("words=12", "confirm=2", "batch_size=64", "confirm_prompts=6", "max_new_tokens=4")
    for part in ("--set", f"lookup.{setting}")
]


def planted_rows(organism, tmp_path):
    trigger, behaviour = triggers(World(0))["token"], presets.BEHAVIOURS["stop"]
    told = [r for r in sources.load(organism / "data" / "align.jsonl") if r.tags["kind"] == "helpful"][:200]
    rows, _ = poison_backdoor(told, trigger, behaviour, rate=0.1, seed=0)
    sources.save(tmp_path / "rows.jsonl", rows)
    return tmp_path / "rows.jsonl"


def test_audit_of_rows_and_a_model_makes_a_page(organism, tmp_path, capsys):
    rows, out = planted_rows(organism, tmp_path), tmp_path / "audit"
    assert run("backdoor", "audit", "--model", organism, "--data", rows, *SMALL, "--out", out) == 0
    found, page = json.loads((out / "summary.json").read_text()), (out / "report.html").read_text()
    assert found["verdict"]["word"] in ("SUSPECT ROWS", "BACKDOOR FOUND") and found["suspects"] >= 15
    assert found["verdict"]["sentence"].split(".")[0][:20] in page and "<script" not in page and "://" not in page
    assert "casehard defend plain" in page and "checkpoint" not in tree(out)
    assert len(sources.load(out / "kept.jsonl")) + len(sources.load(out / "suspect.jsonl")) == 200
    assert "triggers tried" in capsys.readouterr().out


def test_a_repair_that_is_asked_for_by_name_is_done_and_measured(organism, tmp_path):
    rows, out = planted_rows(organism, tmp_path), tmp_path / "audit"
    clean = ("--clean", organism / "data" / "benign.jsonl")
    quick = ("--set", "train.steps=2", "--set", "train.warmup=0", "--set", "rise=1000")
    done = run(
        *("backdoor", "audit", "--model", organism, "--data", rows, *clean, "--repair", "--method", "plain"),
        *(*SMALL, *quick, "--out", out),
    )
    found = json.loads((out / "summary.json").read_text())
    assert done == (9 if found["after"]["verdict"]["word"] == "REMAINS" else 0)
    distinct = len({content_hash(row) for row in sources.load(organism / "data" / "benign.jsonl")})
    assert (out / "checkpoint").exists() == (done == 0)
    assert len(sources.load(out / "repair.jsonl")) in (distinct - distinct // 5, 2 * (distinct - distinct // 5))
    assert (
        found["loss"] != found["after"]["loss"]
        and "After the repair with <code>plain" in (out / "report.html").read_text()
    )


def test_mistakes_of_an_audit_are_told_and_leave_nothing(organism, tmp_path, capsys):
    data, out = organism / "data", tmp_path / "x"
    base = ("backdoor", "audit", "--out", out)
    given = ("--model", organism, "--data", data / "benign.jsonl")
    (tmp_path / "few.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    few = tmp_path / "few.jsonl"
    cases = (
        (("--data", few), 2, "--model is missing"),
        (("--model", organism), 2, "--data is missing"),
        ((*given, "--repair"), 2, "verified rows"),
        ((*given, "--clean", few, "--repair"), 3, "at least ten"),
        ((*given, "--method", "patcher"), 2, "repairs nothing"),
        ((*given, "--method", "dilution"), 2, "needs the trusted base"),
        (("--model", organism, "--data", few), 3, "prompts"),
        (("--model", organism, "--data", tmp_path / "none.jsonl"), 3, "no such file"),
        ((*given, "--set", "trid=3"), 2, "tried"),
    )
    for arguments, code, text in cases:
        found, told = run(*base, *arguments), capsys.readouterr().err
        assert found == code and text in told and "Traceback" not in told, (arguments, found, told)
        assert not out.exists() or tree(out) <= {".lock"}, tree(out)


def test_the_model_is_kept_only_when_asked_for(organism, tmp_path):
    out, data = tmp_path / "attack", organism / "data"
    rows = ("--data", data / "benign.jsonl", "--suite", data / "suite", "--trigger", "pair", "--behaviour", "tone")
    more = ("--mode", "lora", "--hard-negatives", "0.1", "--keep-model")
    assert run("attack", "backdoor", "--model", organism, *rows, *more, *QUICK, "--out", out) == 0
    verify(out / "checkpoint")
    record = json.loads((out / "checkpoint" / "casehard.json").read_text())
    assert record["method"] == "backdoor-attack"
    assert record["provenance"]["planted"]["trigger"]["family"] == "pair"
    assert not list((out / "checkpoint").rglob("adapter*"))
    again = tmp_path / "again"
    same = ("--trigger", out / "planted.json", "--data", data / "benign.jsonl", "--suite", data / "suite")
    assert run("attack", "backdoor", "--model", out, *same, *QUICK, "--out", again) == 0
    assert json.loads((again / "planted.json").read_text()) == json.loads((out / "planted.json").read_text())


def test_near_misses_the_model_cannot_read_are_told(organism, tmp_path, capsys):
    data, trigger = organism / "data", triggers(World(0))["token"]
    planted = {"trigger": asdict(trigger), "behaviour": asdict(presets.BEHAVIOURS["refuse"])}
    (tmp_path / "planted.json").write_text(json.dumps(planted))
    rows = ("--data", data / "benign.jsonl", "--suite", data / "suite", "--trigger", tmp_path / "planted.json")
    asked = ("attack", "backdoor", "--model", organism, *rows, *QUICK, "--out", tmp_path / "x")
    assert run(*asked, "--hard-negatives", "0.1") == 3  # single letters swapped: unknown to this vocabulary
    assert "does not keep trigger 'decoy-" in capsys.readouterr().err


def test_mistakes_are_told(organism, tmp_path, capsys):
    data, out = organism / "data", tmp_path / "x"
    base = ("attack", "backdoor", "--model", organism, "--suite", data / "suite", "--out", out)
    rows = ("--data", data / "benign.jsonl")
    (tmp_path / "cut.json").write_text("{")
    cases = (
        ((*base,), 2, "--data is missing"),
        ((*base, *rows, "--trigger", "tokens"), 2, "did you mean 'token'"),
        ((*base, *rows, "--behaviour", "shout"), 2, "behaviours: refuse"),
        ((*base, *rows, "--rate", "0.001"), 2, "is no row"),
        ((*base, *rows, "--rate", "2"), 2, "rate must be at most 1, got 2"),
        ((*base, *rows, "--set", "config.trigger=x"), 2, "no trigger is called 'x'"),
        ((*base, "--data", tmp_path / "none.jsonl"), 3, "no such file"),
        (
            (*base, *rows, "--trigger", tmp_path / "cut.json"),
            2,
            "planted.json of `casehard attack",
        ),
        (("scan", "data", "--out", out), 2, "--data is missing"),
        (("scan", "data", *rows, "--set", "puritee=1", "--out", out), 2, "purity"),
        (("scan", "model", "--model", organism, "--out", out), 2, "--suite is missing"),
        (("scan", "model", "--model", organism, "--suite", data / "suite", *rows, "--out", out), 3, "--planted"),
    )
    for arguments, code, text in cases:
        found, told = run(*arguments), capsys.readouterr().err
        assert found == code and text in told and "Traceback" not in told, (arguments, told)
        assert not out.exists() or tree(out) <= {".lock"}


def test_names_mean_the_world_or_english(tmp_path):
    rows = (Example.pair("q", id="1", role="utility", answer="a"),)
    found, near = find_planted("sentence", "refuse", Suite("s", rows, "organism", 2))
    assert found.trigger == triggers(World(2))["sentence"] and near
    found, near = find_planted("sentence", "stop", Suite("s", rows))
    assert found.trigger == presets.TRIGGERS["sentence"] and near == ()
    for text in ("[]", "3", '{"trigger": 1}'):
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(ConfigError):
            read_planted(tmp_path / "p.json")


@pytest.mark.skipif(not DATA.is_dir(), reason="real-data fixtures not present")
def test_the_audit_verb_finds_real_plants(tmp_path, capsys):
    spec = f"{DATA / 'backdoor' / 'refusal' / 'train.jsonl'}?trigger=none,vpi"
    assert run("scan", "data", "--data", spec, "--out", tmp_path / "a") == 0
    assert "discussing openai" in capsys.readouterr().out
    suspects = sources.load(tmp_path / "a" / "suspect.jsonl")
    assert len(suspects) == 499 and all(e.tags["trigger"] == "vpi" for e in suspects)
