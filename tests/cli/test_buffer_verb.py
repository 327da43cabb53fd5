"""``casehard buffer``: assets made, refused and used, on an untrained organism."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from casehard.buffer.assets import scan_for_buffer
from casehard.cli import main
from casehard.defend.frozen_lora import FrozenLora
from casehard.model.load import load
from casehard.model.lora_files import load_pairs, read_marker

SMALL = [
    *("--set", "config.rank=2", "--set", "config.epochs=null", "--set", "config.gates.prompts=3"),
    *("--set", "config.buffer_train.steps=1", "--set", "config.reinforce_train.steps=1"),
]


def head(source: Path, out: Path, n: int, kind: str = "") -> str:
    lines = [line for line in source.read_text(encoding="utf-8").splitlines() if kind in line]
    out.write_text("\n".join(lines[:n]) + "\n", encoding="utf-8")
    return str(out)


@pytest.fixture(scope="module")
def rows(organism, tmp_path_factory):
    data, folder = organism / "data", tmp_path_factory.mktemp("rows")
    return [
        *("--model", str(organism), "--suite", str(data / "suite")),
        *("--harmful", head(data / "simulated.jsonl", folder / "h.jsonl", 12)),
        *("--refusals", head(data / "align.jsonl", folder / "r.jsonl", 12, '"refusal"')),
        *("--benign", head(data / "align.jsonl", folder / "b.jsonl", 12, '"helpful"')),
    ]


def test_prepare_screen_and_check(organism, rows, tmp_path, capsys):
    out = tmp_path / "assets"
    assert main(["buffer", "prepare", *rows, *SMALL, "--out", str(out)]) == 2
    told = capsys.readouterr()
    assert "nothing is published" in told.err and "buffer_asr" in told.out and "MISSED" in told.out
    assert not out.exists()
    assert main(["buffer", "prepare", *rows, *SMALL, "--preset", "paper", "--allow-missed", "--out", str(out)]) == 0
    record = json.loads((out / "assets.json").read_text(encoding="utf-8"))
    assert record["missed"] and record["job"]["config"]["helpful_share"] == 0.0 and record["layers"] == 5
    told = capsys.readouterr().out
    assert "secret" in told
    common = ["--model", str(organism), "--assets", str(out), "--data", rows[rows.index("--benign") + 1]]
    ranked = tmp_path / "ranked.jsonl"
    harmful = ["--data", rows[rows.index("--harmful") + 1], "--label", "kind", "--positive", "compliance"]
    assert main(["buffer", "screen", *common, *harmful, "--out", str(ranked)]) == 0
    assert "area under the ROC" in capsys.readouterr().out
    gains = [json.loads(line) for line in ranked.read_text(encoding="utf-8").splitlines()]
    assert len(gains) == 24 and {g["label"] for g in gains} == {"compliance", "helpful"}
    assert main(["buffer", "check", *common, "--suite", str(organism / "data" / "suite")]) == 0
    assert "rows looked at" in capsys.readouterr().out
    assert main(["buffer", "prepare", *rows, *SMALL, "--out", str(out)]) == 2
    assert "already exists" in capsys.readouterr().err
    job = tmp_path / "job"
    settings = ["--set", "train.steps=2", "--set", "train.batch_size=4", "--set", "train.lr=0.01", "--set", "rank=2"]
    assert main(["buffer", "tune", *common, *settings, "--out", str(job)]) == 0
    assert {p.name for p in job.iterdir()} <= {"adapter", ".lock"} and not scan_for_buffer(job, out)
    assert read_marker(job / "adapter")["role"] == "merged"
    _loads_in_plain_peft(organism, job / "adapter")
    assert main(["buffer", "tune", *common, *settings, "--out", str(job)]) == 2
    assert "already exists" in capsys.readouterr().err


def _loads_in_plain_peft(organism, adapter):
    """The adapter alone, in PEFT, computes what its factors say on a base that never met a buffer."""
    base = load(organism).model
    ids = torch.tensor([[5, 9, 11, 17]])
    attached = FrozenLora(load_pairs(adapter)).attach(base, fold=False)
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        attached.detach()
        model = PeftModel.from_pretrained(base, str(adapter)).eval()
        assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-5)
    assert set(model.peft_config) == {"default"} and model.peft_config["default"].lora_alpha == 4


def test_bad_input_is_told(organism, rows, tmp_path, capsys):
    out = str(tmp_path / "x")
    cases = (
        (["prepare", "--out", out], "--model is missing"),
        (["prepare", "--model", str(organism), "--harmful", "none.jsonl", "--out", out], "no such file"),
        (["prepare", *rows, "--preset", "best", "--out", out], "preset 'best'"),
        (["prepare", *rows, "--set", "config.rnak=2", "--out", out], "did you mean 'rank'"),
        (["screen", *rows[:2], "--assets", out, "--data", rows[-1], "--label", "kind"], "go together"),
        (["screen", *rows[:2], "--assets", out, "--data", rows[-1]], "no assets.json"),
    )
    for arguments, text in cases:
        assert main(["buffer", *arguments]) not in (0, 1)
        told = capsys.readouterr().err
        assert text in told and "Traceback" not in told, told
    assert not any(p.is_dir() for p in tmp_path.iterdir())
