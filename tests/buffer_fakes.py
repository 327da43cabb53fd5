"""Provider assets for tests: random or briefly trained adapters for the tiny model of ``fakes.py``."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch

from casehard.defences.buffer_reinforce.frozen_lora import fingerprints
from casehard.defences.buffer_reinforce.publish import write_assets
from casehard.maths.merge import LoraPair, MergeConfig
from fakes import tiny_llama

LAYERS = tuple(
    f"model.layers.{i}.{part}"
    for i in range(2)
    for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
)
WIDTHS = {"q_proj": (32, 32), "v_proj": (32, 32), "up_proj": (64, 32), "down_proj": (32, 64)}


def off_the_user(**settings) -> MergeConfig:
    """Return the paper's direction and weights: the reinforcing update is projected off the user's."""
    return MergeConfig(**({"c_user": 0.5, "c_reinforce": 0.5, "alpha": 0.1, "protect_safety": False} | settings))


def random_pairs(rank=4, *, seed=0, size=0.3, layers=LAYERS):
    """Return random factors for some layers of ``tiny_llama()``."""
    g = torch.Generator().manual_seed(seed)
    out = {}
    for name in layers:
        d_out, d_in = WIDTHS[name.rpartition(".")[2]]
        a, b = torch.randn(rank, d_in, generator=g), torch.randn(d_out, rank, generator=g)
        out[name] = LoraPair(a * size, b * size, 1.0)
    return out


def make_assets(folder, *, model=None, buffer=None, reinforce=None, **record):
    """Write assets for ``model`` with random adapters."""
    values = {
        "base_digest": "0" * 64,
        "base_fingerprints": fingerprints(model or tiny_llama()),
        "tokenizer_digest": "1" * 64,
        "template_digest": "2" * 64,
        "system": None,
        "reference": {"base": {"residual": 0.9, "nll": 4.0}, "buffer": {"residual": 0.1, "nll": 0.2}},
    }
    pairs = (buffer or random_pairs(seed=1), reinforce or random_pairs(seed=2))
    return write_assets(Path(folder), *pairs, {**values, **record})


@functools.cache
def shared_assets():
    """Return assets for ``tiny_llama()``, made once a test process."""
    # Held by the cache, so that the folder lives as long as the process.
    folder = tempfile.TemporaryDirectory(prefix="casehard-assets-")
    _KEPT.append(folder)
    return make_assets(Path(folder.name) / "assets")


_KEPT: list = []
