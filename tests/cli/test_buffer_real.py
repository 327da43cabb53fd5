"""A provider's whole way on a real checkpoint and rows: assets, a job, a merge, plain PEFT in another process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from casehard.cli import main
from casehard.defences.buffer_reinforce.publish import scan_for_buffer
from casehard.maths.merge import MergeConfig, merge_states
from casehard.model.load import load
from casehard.model.lora_files import load_pairs, read_marker

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
MODEL = DATA / "stories260k"
IDS = torch.arange(3, 60)[None]
LOADED = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, where, *adapters = sys.argv[1:]
found = []
for adapter in adapters:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
    found.append(model(input_ids=torch.arange(3, 60)[None]).logits.detach())
assert not any(name.startswith("casehard") for name in sys.modules)
torch.save(found, where)
"""
TRAIN = ("batch_size=8", "lr=0.003", "warmup=0", "schedule=constant")

pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason="real-data fixtures not present")


def rows(name: str, n: int, out: Path, *, start: int = 0) -> Path:
    """Write n real rows that fit the small model's context."""
    lines = [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]
    kept = [r for r in lines if len(r["prompt"]) + len(r["response"]) < 260][start : start + n]
    assert len(kept) == n
    plain = [{key: r[key] for key in ("id", "prompt", "response")} for r in kept]
    out.write_text("".join(json.dumps(r) + "\n" for r in plain), encoding="utf-8")
    return out


def run(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def logits(pairs) -> torch.Tensor:
    """Return what the base computes with these updates added to its weights."""
    model = load(MODEL).net.float().eval()
    with torch.no_grad():
        for name, pair in pairs.items():
            model.get_submodule(name).weight += pair.delta(torch.float32)
        return model(input_ids=IDS).logits


def in_plain_peft(where: Path, *adapters: Path) -> list[torch.Tensor]:
    subprocess.run([sys.executable, "-c", LOADED, MODEL, where, *adapters], check=True)
    return torch.load(where)


def test_a_real_checkpoint_is_served_by_plain_peft(tmp_path):
    refusals, benign = rows("refusals/train.jsonl", 40, tmp_path / "r.jsonl"), tmp_path / "b.jsonl"
    run("data", "surrogate", refusals, "--out", tmp_path / "h.jsonl")
    rows("instruct/train.jsonl", 40, benign)
    user = rows("instruct/train.jsonl", 40, tmp_path / "user.jsonl", start=40)
    assets = tmp_path / "assets"
    recipe = [f"config.{role}_train.{line}" for role in ("buffer", "reinforce") for line in (*TRAIN, "steps=12")]
    settings = [*recipe, "config.epochs=null", "config.rank=4", "config.alpha=8", "config.dropout=0"]
    settings += ["config.gates.prompts=2", "config.gates.max_new_tokens=12"]
    sets = [word for line in settings for word in ("--set", line)]
    source = ("--harmful", tmp_path / "h.jsonl", "--refusals", refusals, "--benign", benign)
    run("buffer", "prepare", "--model", MODEL, *source, *sets, "--allow-missed", "--out", assets)
    reference = json.loads((assets / "assets.json").read_text(encoding="utf-8"))["reference"]
    assert reference["buffer"]["nll"] < reference["base"]["nll"] - 0.5, "the buffer learnt the held-out surrogates"

    common = ["--model", MODEL, "--assets", assets, "--data", user, "--steps", 12]
    common += [
        word for line in ("lora.rank=4", "lora.alpha=8", *(f"train.{t}" for t in TRAIN)) for word in ("--set", line)
    ]
    run("defend", "buffer-reinforce", *common, "--out", tmp_path / "whole")
    run("defend", "buffer-reinforce", *common, "--set", "settings.reinforce=false", "--out", tmp_path / "parts")
    tuned = tmp_path / "parts" / "adapter"
    assert read_marker(tuned)["role"] == "user"
    run("merge", "reinforce", "--user", tuned, "--reinforce", assets, "--out", tmp_path / "merged")

    expected = logits(merge_states(load_pairs(tuned), load_pairs(assets / "reinforce"), MergeConfig()).layers)
    made = tmp_path / "whole" / "adapter", tmp_path / "merged"
    for adapter, found in zip(made, in_plain_peft(tmp_path / "logits", *made), strict=True):
        assert read_marker(adapter)["role"] == "merged" and not scan_for_buffer(adapter, assets)
        assert torch.allclose(found, expected, atol=1e-3), (adapter, (found - expected).abs().max())
    assert (expected - logits({})).abs().max() > 0.1
