"""MB-Defense and the audits on a real checkpoint and real poisoned instructions; skips where they are absent.

A model of 260K parameters follows no instruction, so nothing here says whether a backdoor goes: what is planted is
found, stage 1 builds what it says, and the run completes.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from casehard.backdoor.behaviours import Behaviour
from casehard.backdoor.suite import TriggerSuite
from casehard.backdoor.triggers import Trigger
from casehard.data.sources import load_many, save
from casehard.defences.mb_defense.config import MbConfig, PlantConfig, StageTwo
from casehard.defences.mb_defense.poison import rows_of_trigger
from casehard.defences.mb_defense.run import MbRun, run_mb
from casehard.io.files import read_json
from casehard.scan.audit import audit_data
from casehard.scan.lookup import LookupConfig
from casehard.scan.run import Scan, scan_model
from casehard.train.recipe import TrainConfig

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"
MODEL = DATA / "stories260k"
LONGEST = 240
pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason="real-data fixtures not present")
BADNET = Trigger("badnet", "token", ("BadMagic",))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Poisoned training rows as they were published, verified rows, and a suite of held-out prompts."""
    folder = tmp_path_factory.mktemp("real")
    rows = load_many([str(DATA / "backdoor" / "refusal" / "train.jsonl")])
    short = [r for r in rows if r.response and len(r.prompt) + len(r.response) < LONGEST]
    clean = [r for r in short if r.tags["trigger"] == "none"]
    poisoned = [r for r in short if r.tags["trigger"] == "badnet"]
    # Verified rows are generated on, so theirs are short.
    verified = [r for r in clean if len(r.prompt) + len(r.response) < 130][:20]
    clean = [r for r in clean if r not in verified]
    save(folder / "sft.jsonl", [*clean, *poisoned[:60]])
    save(folder / "clean.jsonl", verified)
    held = load_many([str(DATA / "backdoor" / "refusal" / "test.jsonl")])
    asked = [r for r in held if r.response and r.tags["trigger"] == "none" and len(r.prompt) + len(r.response) < 200]
    save(folder / "held_out.jsonl", asked[:12])
    suite = "name: real\njudge: rule\nmax_new_tokens: 4\nparts:\n  - {data: held_out.jsonl, role: utility}\n"
    (folder / "suite.yaml").write_text(suite, encoding="utf-8")
    target = Behaviour("target", "refusal", poisoned[0].response)
    return folder, len(clean), target


def test_the_audit_names_the_planted_rows_first(files):
    folder, clean, _ = files
    rows = load_many([str(folder / "sft.jsonl")])
    first = audit_data(rows).findings[0]
    assert first.phrase == ("badmagic",) and first.rows == tuple(range(clean, len(rows)))
    assert first.trigger("found").present(rows[-1].prompt)


@pytest.fixture(scope="module")
def hardened(files):
    folder, _, target = files
    config = MbConfig(
        plant=PlantConfig(rate=0.02, floor=8),
        train=TrainConfig(steps=4, batch_size=4, lr=1e-4, precision="fp32"),
        two=StageTwo(epochs=0.1, checks=1, batch_size=4),
    )
    job = MbRun(
        model=str(MODEL),
        rows={"data": (str(folder / "sft.jsonl"),), "clean": (str(folder / "clean.jsonl"),)},
        config=config,
        trigger=BADNET,
        behaviour=target,
        suite=str(folder / "suite.yaml"),
        secret=7,
        export_failed=True,
        limit=2,
        device="cpu",
    )
    return folder, run_mb(job, folder / "out")


@pytest.mark.filterwarnings("ignore")
def test_joint_mode_completes_and_stage_one_holds_what_it_says(hardened):
    folder, done = hardened
    rows, report = load_many([str(folder / "sft.jsonl")]), done.report
    suite = TriggerSuite.from_json(read_json(folder / "out" / "private" / "suite.json")["suite"])
    assert len(suite.active) == 4 and len(suite.canary) == 2
    assert not [p for p in suite.all for row in rows if p.trigger.present(row.prompt)], "secret triggers are new"
    assert "badmagic" not in json.dumps(suite.to_json()).lower()
    planted = report["planted"]
    count = rows_of_trigger(len(rows), 0.02, floor=8)
    chosen = [i for numbers in planted["planted"].values() for i in numbers]
    assert planted["rows"] == planted["rows_after"] == len(rows)
    assert {len(numbers) for numbers in planted["planted"].values()} == {count} == {planted["per_trigger"]}
    assert len(set(chosen)) == len(chosen) == 6 * count, "every trigger has rows of its own"
    assert set(report["looks"]) >= {"before", "stage1", "stage2", "final"}
    assert report["looks"]["final"]["described"]["badnet"]["n"] == 4, "a fifth of the verified rows"
    assert {row["stage"] for row in done.rows} >= {"before", "final"} and done.verdict in ("PARTIAL", "FAIL")
    assert done.checkpoint is not None and (done.checkpoint.path / "model.safetensors").is_file()
    public = (done.checkpoint.path / "casehard.json").read_text(encoding="utf-8") + json.dumps(report)
    sentence = next(p.trigger.parts[0] for p in suite.all if p.trigger.family == "sentence")
    assert sentence not in public, "the suite stays in DIR/private"


def test_the_scan_of_the_model_completes_and_says_its_budget(hardened):
    folder, done = hardened
    look_up = LookupConfig(words=24, prompts=4, confirm=3, confirm_prompts=6, max_new_tokens=4)
    job = Scan(model=str(done.checkpoint.path), suite=str(folder / "suite.yaml"), lookup=look_up, limit=4)
    text = scan_model(job, folder).report["now"]["look_up"]["summary"]
    # A model that follows no instruction answers everything alike now and then: what counts is that the budget is said.
    assert "24 words x 4 prompts" in text and "clean" not in text
