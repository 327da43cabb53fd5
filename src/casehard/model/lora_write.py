"""Write an adapter as the folder that PEFT and servers read."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from casehard.errors import Diverged
from casehard.maths.merge import LoraPair
from casehard.model.lora_files import CONFIG, PREFIX, WEIGHTS, LayerShape, tensor_digest


def write_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[torch.Tensor]) -> dict[str, str]:
    """Write a float32 safetensors file from a stream; equal tensors give equal bytes.

    Args:
        path: the file to make.
        shapes: name -> shape, in the order in which ``tensors`` yields them.
        tensors: one at a time; each may be dropped once it is written.

    Returns:
        ``{name: SHA-256}``, see :func:`tensor_digest`.

    Raises:
        Diverged: a tensor is not finite, as float32.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digests = {}
    with path.open("wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
            flat = tensor.detach().to("cpu", torch.float32).contiguous()
            assert flat.shape == torch.Size(shape), (name, shape, flat.shape)
            if flat.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(flat))).all()):
                raise Diverged(
                    f"{name} would hold NaN or Inf",
                    hint="the training diverged or a coefficient is too large; nothing was written",
                )
            handle.write(flat.reshape(-1).view(torch.uint8).numpy().tobytes())
            digests[name] = tensor_digest(flat)
    return digests


def write_adapter(
    folder: Path,
    shapes: Mapping[str, LayerShape],
    pairs: Iterator[tuple[str, LoraPair]],
    *,
    rank: int,
    target_modules: Collection[str],
    base: str | None = None,
    fan_in_fan_out: bool = False,
) -> dict[str, str]:
    """Write a plain PEFT adapter: scales folded, one rank for all layers (zero-padded), ``lora_alpha == r``.

    Args:
        folder: an existing, empty folder; the caller stages it.
        shapes: layers in the order in which ``pairs`` yields them.
        pairs: name and factors of each layer, rank <= ``rank``.
        rank: r of the written adapter.
        target_modules: what PEFT is to wrap.
        base: name or path of the base model, for PEFT's automatic loading.
        fan_in_fan_out: whether the base stores its weights transposed (GPT-2).

    Returns:
        ``{name: SHA-256}`` of the tensors written, for the marker.
    """
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "r": rank,
        "target_modules": sorted(target_modules),
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    sizes = {}
    for layer, shape in shapes.items():
        sizes[f"{PREFIX}{layer}.lora_A.weight"] = (rank, shape.d_in)
        sizes[f"{PREFIX}{layer}.lora_B.weight"] = (shape.d_out, rank)

    def stream() -> Iterator[torch.Tensor]:
        for layer, (name, pair) in zip(shapes, pairs, strict=True):
            assert layer == name
            short = rank - pair.a.shape[0]
            yield torch.nn.functional.pad(pair.a, (0, 0, 0, short))
            yield torch.nn.functional.pad(pair.b * pair.scale, (0, short))

    return write_tensors(folder / WEIGHTS, sizes, stream())
