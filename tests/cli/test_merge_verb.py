"""``casehard merge``: adapters of an untrained organism and of a real checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from casehard.cli import main
from casehard.defences.buffer_reinforce.method import BufferReinforceConfig
from casehard.model.lora_files import read_marker, write_marker

STORIES = Path(__file__).resolve().parents[3] / "shared" / "data" / "stories260k"


def adapter(base, folder, *, seed, r=2, size=0.1, targets=("q_proj", "down_proj")):
    """Save a random adapter of a model folder with PEFT."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(targets), task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = size * torch.randn(p.shape, generator=g)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def pair(organism, tmp_path):
    return adapter(organism, tmp_path / "user", seed=1), adapter(organism, tmp_path / "reinforce", seed=2, r=3)


def run(*arguments):
    return main([str(a) for a in ("merge", *arguments)])


def test_merge_in_both_forms(pair, tmp_path, capsys):
    user, reinforce = pair
    both = ("--user", user, "--reinforce", reinforce)
    assert run("reinforce", *both, "--out", tmp_path / "one", "--c-user", "0.9", "--alpha", "0.5") == 0
    told = capsys.readouterr().out
    assert "rank" in told and "share of energy projected" in told and "adapter: " in told
    record = json.loads((tmp_path / "one" / "merge.json").read_text())
    assert record["config"]["c_user"] == 0.9 and record["config"]["c_reinforce"] == 0.5 and record["rank"] == 5
    assert record["config"] == asdict(replace(BufferReinforceConfig().merge, c_user=0.9, alpha=0.5)), (
        "as `defend buffer-reinforce` merges"
    )
    extra = ("--form", "absorb", "--basis", "output", "--protect-task", "--set", "tau=0.1")
    assert run("reinforce", *both, "--out", tmp_path / "two", *extra) == 0
    assert "at weight 0.5" in capsys.readouterr().out
    record = json.loads((tmp_path / "two" / "merge.json").read_text())
    assert (
        record["config"]["tau"] == 0.1
        and not record["config"]["protect_safety"]
        and record["rank"] == 2
        and record["reinforce_weight"] == 0.5
    )
    assert {p.name for p in tmp_path.iterdir()} == {"user", "reinforce", "one", "two"}
    assert run("reinforce", *both, "--out", tmp_path / "one") == 2
    assert "already exists" in capsys.readouterr().err


def test_bad_input_ends_with_an_error_and_no_folder(pair, tmp_path, capsys):
    user, reinforce = pair
    cases = (
        (("--user", user, "--reinforce", tmp_path / "none"), 2, "no such folder"),
        (("--user", user, "--reinforce", reinforce, "--basis", "left"), 2, "basis"),
        (("--user", user, "--reinforce", reinforce, "--set", "alfa=1"), 2, "alpha"),
        (("--user", user, "--reinforce", reinforce, "--basis", "scalar"), 2, "basis"),
        (("--user", user, "--reinforce", Path(__file__).parent), 2, "adapter_config.json"),
        (("--user", user, "--reinforce", user), 2, "the same folder"),
    )
    for arguments, code, text in cases:
        found = run("reinforce", *arguments, "--out", tmp_path / "out")
        told = capsys.readouterr().err
        assert (found, text in told, "Traceback" in told) == (code, True, False), (arguments, told)
        assert {p.name for p in tmp_path.iterdir()} == {"user", "reinforce"}


def test_a_buffer_is_refused_on_either_side(pair, tmp_path, capsys):
    user, reinforce = pair
    assets = tmp_path / "assets"
    shutil.copytree(reinforce, assets / "reinforce")
    shutil.copytree(reinforce, assets / "buffer")
    weights = assets / "buffer" / "adapter_model.safetensors"
    save_file({name: t + 1 for name, t in load_file(weights).items()}, weights)
    write_marker(assets / "buffer", "buffer")
    write_marker(assets / "reinforce", "reinforce")
    for arguments in (
        ("--user", assets / "buffer", "--reinforce", reinforce),
        ("--user", user, "--reinforce", assets / "buffer"),
    ):
        assert run("reinforce", *arguments, "--out", tmp_path / "out") == 2
        assert "marked as a buffer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_assets_given_whole_are_searched_for_in_the_users_adapter(pair, tmp_path, capsys):
    from casehard.defences.buffer_reinforce.publish import write_assets
    from casehard.model.lora_files import load_pairs

    user, reinforce = pair
    buffer = load_pairs(user)
    keys = ("base_digest", "tokenizer_digest", "template_digest")
    record = dict.fromkeys(keys, "d" * 64) | {"base_fingerprints": {}, "system": None}
    write_assets(tmp_path / "assets", buffer, load_pairs(reinforce), record)
    # The user's adapter is a copy of the buffer without its marker.
    assert run("reinforce", "--user", user, "--reinforce", tmp_path / "assets", "--out", tmp_path / "out") == 2
    assert "buffer" in capsys.readouterr().err and not (tmp_path / "out").exists()
    weights = user / "adapter_model.safetensors"
    g = torch.Generator().manual_seed(9)
    save_file({name: torch.randn(t.shape, generator=g) for name, t in load_file(weights).items()}, weights)
    assert run("reinforce", "--user", user, "--reinforce", tmp_path / "assets", "--out", tmp_path / "out") == 0
    assert read_marker(tmp_path / "out")["base_digest"] == "d" * 64


def test_search_measures_the_grid_and_draws_the_front(organism, pair, tmp_path, capsys):
    user, reinforce = pair
    suite = organism / "data" / "suite"
    job = ("--user", user, "--reinforce", reinforce, "--model", organism, "--suite", suite, "--limit", "1")
    grid = ("--c-user", "1", "--c-reinforce", "0", "--c-reinforce", "1", "--alpha", "0", "--alpha", "1")
    assert run("search", *job, *grid, "--out", tmp_path / "found") == 0
    assert "settings that no other beats" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "found" / "rows.jsonl").read_text().splitlines()]
    points = {(r["c_user"], r["c_reinforce"], r["alpha"]) for r in rows}
    assert points == {(1, 0, 0), (1, 1, 0), (1, 1, 1)} and len(rows) % 3 == 0
    summary = json.loads((tmp_path / "found" / "summary.json").read_text())
    assert summary["front"] and {r["metric"] for r in summary["records"]} >= {"asr", "utility"}
    picture = (tmp_path / "found" / "front.svg").read_text()
    assert picture.startswith("<svg") and "aria-label" in picture and "1 U + " in picture
    assert "(better is left)" in picture and "(better is up)" in picture
    assert json.loads((tmp_path / "found" / "run.json").read_text())["status"] == "ok"

    assert run("search", *job, *grid, "--high", "nll", "--out", tmp_path / "x") == 2
    assert "does not measure the rate 'nll'" in capsys.readouterr().err
    write_marker(user, "user", base_digest="0" * 64)
    assert run("search", *job, *grid, "--out", tmp_path / "y") == 2
    assert "is for base 000000000000" in capsys.readouterr().err


def test_a_search_leaves_the_model_as_it_was_and_its_ends_are_the_adapters(organism, pair):
    from transformers import AutoModelForCausalLM

    from casehard.defences.buffer_reinforce.merge_search import search
    from casehard.maths.merge import MergeConfig
    from casehard.maths.pareto import Coefficients
    from casehard.model.lora_files import load_pairs

    model = AutoModelForCausalLM.from_pretrained(organism).eval()
    ids = torch.arange(3, 12)[None]
    logits = lambda m: m(input_ids=ids).logits.detach()  # noqa: E731
    before = logits(model)
    grid = [Coefficients(0, 0, 0), Coefficients(1, 0, 0), Coefficients(0, 1, 0), Coefficients(1, 1, 0.5)]
    seen = []
    measure = lambda m: seen.append(logits(m)) or []  # noqa: E731
    pairs = [load_pairs(folder) for folder in pair]
    assert len(list(search(model, *pairs, grid, measure, config=MergeConfig()))) == 4
    assert torch.equal(seen[0], before) and torch.equal(logits(model), before)
    assert not any("lora" in name for name, _ in model.named_parameters())
    from peft import PeftModel

    for got, folder in zip(seen[1:3], pair, strict=True):
        alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(organism), folder).eval()
        assert torch.allclose(got, logits(alone), atol=1e-5)
        assert not torch.allclose(got, before, atol=1e-2)


@pytest.mark.skipif(not STORIES.is_dir(), reason="real-data fixtures not present")
def test_a_real_checkpoints_adapter_is_loaded_by_plain_peft_in_another_process(tmp_path):
    user = adapter(STORIES, tmp_path / "user", seed=1, r=4, targets=("q_proj", "v_proj", "up_proj"))
    reinforce = adapter(STORIES, tmp_path / "reinforce", seed=2, r=8, targets=("q_proj", "v_proj", "down_proj"))
    both = ("--user", user, "--reinforce", reinforce, "--out", tmp_path / "out")
    assert run("reinforce", *both, "--alpha", "1", "--set", "tau=0") == 0
    assert read_marker(tmp_path / "out")["role"] == "merged"
    code = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, out, where = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), out).eval()
assert not any(name.startswith("casehard") for name in sys.modules)
torch.save(model(input_ids=torch.arange(3, 40)[None]).logits.detach(), where)
"""
    subprocess.run([sys.executable, "-c", code, STORIES, tmp_path / "out", tmp_path / "logits"], check=True)
    from transformers import AutoModelForCausalLM

    from casehard.maths.merge import MergeConfig, merge_states
    from casehard.model.lora_files import load_pairs

    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
    states = load_pairs(user), load_pairs(reinforce)
    for name, pair in merge_states(*states, MergeConfig(alpha=1.0, tau=0.0)).layers.items():
        model.get_submodule(name).weight.data += pair.delta(torch.float32)
    want = model(input_ids=torch.arange(3, 40)[None]).logits.detach()
    assert torch.allclose(torch.load(tmp_path / "logits"), want, atol=1e-4)
