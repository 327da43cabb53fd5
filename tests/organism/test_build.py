"""Building: reproducible bytes, ordinary folders, a cache that never reuses the wrong or a broken build."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch

from casehard.data import sources
from casehard.errors import ConfigError, Corrupt
from casehard.evaluation.suite import evaluate, load_suite
from casehard.io.manifest import verify
from casehard.organism import build as module
from casehard.organism import suite
from casehard.train import progress


def _sha(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module", autouse=True)
def short_recipe() -> object:
    """Pre-train for three steps instead of minutes; everything else is the real path."""
    patch = pytest.MonkeyPatch()
    short = {name: dataclasses.replace(s, steps=3, batch=4, warmup=1) for name, s in module.SIZES.items()}
    patch.setattr(module, "SIZES", short)
    patch.setattr(module, "ASSETS", Path("no-such-folder"))
    patch.setattr(progress, "quiet", True)
    yield patch
    patch.undo()


@pytest.fixture(scope="module")
def organism(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return module.build(tmp_path_factory.mktemp("organism") / "o", world_seed=0, size="tiny")


def test_the_folder_is_complete_and_ordinary(organism: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    verify(organism)
    model = AutoModelForCausalLM.from_pretrained(organism)
    tokenizer = AutoTokenizer.from_pretrained(organism)
    assert model.config.model_type == "llama"
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.hidden_size == 96
    assert json.loads((organism / "organism.json").read_text())["world_seed"] == 0
    names = {p.suffix for p in organism.rglob("*") if p.is_file()}
    assert names <= {".json", ".jsonl", ".safetensors", ".jinja"}
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "how do i carve it ?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**ids, max_new_tokens=3)
    assert out.shape[1] <= ids["input_ids"].shape[1] + 3
    for name in ("align", "simulated", "attack_a", "attack_b", "benign", "task_reviews", "task_translation"):
        assert len(sources.load(str(organism / "data" / f"{name}.jsonl"))) >= 100


@pytest.mark.parametrize("home", suite.SUITES.values())
def test_the_suites_load_and_evaluate(organism: Path, home: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = load_suite(organism / "data" / home)
    rows = evaluate(
        AutoModelForCausalLM.from_pretrained(organism), AutoTokenizer.from_pretrained(organism), loaded, limit=2
    )
    # Three steps teach nothing: what it says is no sentence of the world.
    assert {r["label"] for r in rows} == {"incoherent"}
    assert {r["slots_right"] for r in rows if r["role"] == "restricted"} == {0.0}


def test_same_seed_same_bytes_other_seed_other_bytes(organism: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)
    again = module.build(tmp_path / "again", world_seed=0, size="tiny")
    assert _sha(again) == _sha(organism)
    assert (again / "manifest.json").read_text() == (organism / "manifest.json").read_text()
    assert _sha(module.build(tmp_path / "other", world_seed=1, size="tiny")) != _sha(organism)


def test_unknown_size_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'huge'(.|\n)*tiny, small"):
        module.build(tmp_path / "x", size="huge")
    assert not (tmp_path / "x").exists()


def test_ensure_reuses_a_build_and_refuses_a_broken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = module.ensure(2, "tiny", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "build", lambda *a, **k: pytest.fail("built again"))
        assert module.ensure(2, "tiny", tmp_path) == first
    weights = first / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    with pytest.raises(Corrupt, match=r"model\.safetensors"):
        module.ensure(2, "tiny", tmp_path)


def test_the_digest_covers_seed_size_and_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = {module.recipe_digest(seed, size) for seed in (0, 1) for size in module.SIZES}
    assert len(digests) == 4
    longer = {**module.SIZES, "tiny": dataclasses.replace(module.SIZES["tiny"], steps=4)}
    monkeypatch.setattr(module, "SIZES", longer)
    assert module.recipe_digest(0, "tiny") not in digests


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no data today")

    monkeypatch.setattr(module, "write_data", fail)
    with pytest.raises(RuntimeError, match="no data today"):
        module.build(tmp_path / "o", size="tiny")
    assert list(tmp_path.iterdir()) == []


def test_a_bundled_copy_is_preferred(tmp_path: Path, organism: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.bundled(0, "tiny") is None
    monkeypatch.setattr(module, "ASSETS", tmp_path)
    (tmp_path / "world0-tiny").symlink_to(organism)
    assert module.bundled(0, "tiny") == tmp_path / "world0-tiny"
    assert module.bundled(0, "small") is None
