"""What is not finite never leaves: weights, merged adapters, a user's adapter, a provider's assets."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from casehard.defences.buffer_reinforce.publish import write_assets
from casehard.errors import ConfigError, Diverged
from casehard.maths.merge import LoraPair, MergeConfig
from casehard.model.lora_files import LayerShape
from casehard.model.lora_write import write_adapter
from casehard.model.merge import merge_folders
from casehard.model.save import save

_spec = importlib.util.spec_from_file_location("casehard_test_fakes", Path(__file__).resolve().parents[1] / "fakes.py")
fakes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fakes)

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


def written(folder, names, *, size=1.0, scale=1.0):
    """Write an adapter on some layers, all factors of one size."""
    folder.mkdir(parents=True)
    pairs = {name: LoraPair(a=torch.full((2, 32), size), b=torch.full((32, 2), size), scale=scale) for name in names}
    shapes = {name: LayerShape(32, 32, 2) for name in names}
    write_adapter(folder, shapes, iter(pairs.items()), rank=2, target_modules=["q_proj", "v_proj"])
    return folder


@pytest.mark.parametrize("value", [1e300, -1e300, math.inf, math.nan, 1e7])
def test_a_coefficient_beyond_all_use_is_refused(value):
    with pytest.raises(ConfigError, match="c_user"):
        MergeConfig(c_user=value)


@pytest.mark.parametrize(("user", "reinforce"), [((Q,), (Q,)), ((Q,), (V,)), ((Q, V), (V,))])
@pytest.mark.parametrize("form", ["concat", "absorb"])
def test_a_merge_that_leaves_fp32_is_not_written(tmp_path, user, reinforce, form):
    large, small = written(tmp_path / "u", user, size=3e33), written(tmp_path / "r", reinforce)
    with pytest.raises(Diverged, match=r"q_proj|v_proj"):
        merge_folders(large, small, tmp_path / "out", MergeConfig(c_user=1e6, form=form, protect_safety=False))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [{"size": math.nan}, {"size": math.inf}, {"size": 1e30, "scale": 1e30}])
def test_an_adapter_that_is_not_finite_is_not_written(tmp_path, wrong):
    with pytest.raises(Diverged, match="q_proj"):
        written(tmp_path / "user", [Q], **wrong)


def test_assets_that_are_not_finite_are_not_written(tmp_path):
    good = {Q: LoraPair(a=torch.ones(2, 32), b=torch.ones(32, 2), scale=1.0)}
    bad = {Q: LoraPair(a=torch.ones(2, 32), b=torch.full((32, 2), math.nan), scale=1.0)}
    record = dict.fromkeys(("base_digest", "tokenizer_digest", "template_digest"), "0" * 64)
    for buffer, reinforce in ((bad, good), (good, bad)):
        with pytest.raises(Diverged, match="q_proj"):
            write_assets(tmp_path / "assets", buffer, reinforce, record)
        assert not (tmp_path / "assets").exists()


def test_a_model_with_a_stored_buffer_that_is_not_finite_is_not_saved(tmp_path):
    model = fakes.tiny_llama()
    model.model.register_buffer("table", torch.tensor([1.0, math.inf]))
    model.model.register_buffer("mask", torch.tensor([-math.inf]), persistent=False)  # never stored: no harm
    with pytest.raises(Diverged, match="table"):
        save(model, None, tmp_path / "out", parent="", method="plain", provenance={})
    assert not (tmp_path / "out").exists()
