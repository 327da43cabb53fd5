"""A customer's job by LoRA on the command line: a merged checkpoint or a PEFT adapter, both of the trained model."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import tree

from casehard.cli import main
from casehard.model.digest import folder_digest
from casehard.model.load import load
from casehard.model.lora_files import read_marker

SMALL = ("--set", "train.batch_size=4", "--set", "train.warmup=0", "--set", "train.lr=0.01", "--steps", "3")


@pytest.fixture(scope="module")
def job(organism):
    data = organism / "data"
    rows = ["--data", data / "task_reviews.jsonl", "--safe", data / "align.jsonl", "--all-safe"]
    constraint = ["--set", "settings.tau=0.1", "--set", "settings.delta=0"]
    return [
        "defend",
        "spard",
        "--model",
        organism,
        *rows,
        *constraint,
        *SMALL,
        "--lora-rank",
        4,
        "--suite",
        data / "suite",
    ]


def run(*arguments):
    return main([str(a) for a in arguments])


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(5, 30)[None]).logits


def test_spard_with_a_lora_gives_a_checkpoint_or_an_adapter_of_the_same_model(job, organism, tmp_path, capsys):
    from peft import PeftModel

    merged, alone, back = tmp_path / "merged", tmp_path / "alone", tmp_path / "back"
    assert run(*job, "--set", "lora.target=[q_proj,v_proj]", "--out", merged) == 0
    said = capsys.readouterr().out
    assert "a LoRA of rank 4, alpha 16, on q_proj, v_proj" in said and "hardened model" in said
    assert run(*job, "--set", "lora.target=[q_proj,v_proj]", "--save-as", "adapter", "--out", alone) == 0
    said = capsys.readouterr().out
    assert "a PEFT adapter" in said and "casehard model import" in said
    weights = {p for p in tree(tmp_path) if p.endswith(".safetensors")}
    assert weights == {"merged/checkpoint/model.safetensors", "alone/adapter/adapter_model.safetensors"}
    trained = load(merged / "checkpoint")
    assert (logits(trained.net) - logits(load(organism).net)).abs().max() > 1e-3
    on_top = PeftModel.from_pretrained(load(organism).net, str(alone / "adapter"))
    assert torch.allclose(logits(on_top), logits(trained.net), atol=1e-5)
    assert run("model", "import", alone / "adapter", "--base", organism, "--out", back) == 0
    again = load(back)
    assert torch.allclose(logits(again.net), logits(trained.net), atol=1e-5)
    assert again.trained_prompts == trained.trained_prompts

    summary = json.loads((alone / "summary.json").read_text())
    assert summary["adapter"] == {"digest": folder_digest(alone / "adapter"), "path": "adapter"}
    record = json.loads((alone / "adapter" / "job.json").read_text())
    assert record["job"]["lora"]["rank"] == 4 and record["base_digest"] == folder_digest(organism)
    assert read_marker(alone / "adapter")["role"] == "user"
    for card in (merged / "checkpoint" / "README.md", alone / "adapter" / "README.md"):
        assert "# Hardened with spard" in card.read_text() and "lora.rank: 4" in card.read_text()
    assert f"base digest: `{folder_digest(organism)}`" in (alone / "adapter" / "README.md").read_text()
    told = json.loads((merged / "run.json").read_text())["config"]
    assert told["lora"]["target"] == ["q_proj", "v_proj"] and told["save_as"] is None
    assert run("evaluate", "--model", alone, "--suite", organism / "data" / "suite", "--out", tmp_path / "e") == 7
    assert "without its base model" in capsys.readouterr().err


def test_an_adapter_of_a_tuning_method_is_merged_with_a_providers(job, organism, tmp_path):
    from casehard.model.adapters import add_lora
    from casehard.model.lora_write import adapter_writer

    base = load(organism)
    adapter_writer(add_lora(base.net, 2, 4.0), load(organism), {"config_digest": "x"})(tmp_path / "theirs")
    assert run(*job, "--save-as", "adapter", "--out", tmp_path / "mine") == 0
    marker = tmp_path / "theirs" / "casehard_adapter.json"
    marker.write_text(marker.read_text().replace('"user"', '"reinforce"'))
    (tmp_path / "theirs" / "manifest.json").unlink()
    merge = ["merge", "reinforce", "--user", tmp_path / "mine" / "adapter", "--reinforce", tmp_path / "theirs"]
    assert run(*merge, "--out", tmp_path / "both") == 0
    assert json.loads((tmp_path / "both" / "adapter_config.json").read_text())["r"] == 6


def test_what_cannot_be_is_told_before_anything_is_made(job, organism, tmp_path, capsys):
    out = tmp_path / "x"
    plain = [a for a in job if a not in ("--lora-rank", 4)]
    cases = (
        ([*plain, "--save-as", "adapter"], "all weights are trained"),
        ([*job, "--save-as", "peft"], "'peft'"),
        ([*job, "--set", "lora.rnak=3"], "did you mean 'rank'"),
        ([*job, "--set", "lora.target=[q_prj]"], "q_prj"),
        ([*job, "--set", "lora.target=[embed_tokens]"], "table of the embeddings"),
    )
    for arguments, text in cases:
        assert run(*arguments, "--out", out) == 2, arguments
        told = capsys.readouterr().err
        assert text in told and "Traceback" not in told, told
        assert not out.exists() or not any(p.is_file() for p in out.rglob("*") if p.name != ".lock"), arguments
