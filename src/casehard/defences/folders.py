"""Weights of a model folder by name, for methods that compare with another checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from casehard.errors import DataError
from casehard.io.tensorfile import load_tensors


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a model folder, sharded or not; on the CPU.

    Raises:
        DataError: no safetensors weights there.
    """
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    if not all((folder / Path(name).name).is_file() for name in names):
        raise DataError(f"{folder}: no complete safetensors weights", hint="give the folder of the base model")
    out: dict[str, torch.Tensor] = {}
    for name in names:
        out |= load_tensors(folder / Path(name).name, device=torch.device("cpu"))
    return out
