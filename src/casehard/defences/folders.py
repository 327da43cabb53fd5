"""Weights of a model folder by name, for methods that compare with another checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from casehard.errors import DataError
from casehard.io.tensorfile import load_tensors


def base_weights(name: str, assets: Path | None, base: Mapping[str, torch.Tensor] | None) -> Mapping[str, torch.Tensor]:
    """Return the weights of a trusted base, given as its folder or by name.

    Args:
        name: of the method that needs them, for messages.

    Raises:
        DataError: neither or both of them; or no safetensors weights in the folder.
    """
    if (base is None) == (assets is None):
        raise DataError(f"{name} needs the weights of the trusted base", hint="--assets BASE_MODEL")
    return base if base is not None else read_weights(Path(str(assets)))


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
