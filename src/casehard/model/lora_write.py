"""Write an adapter as the folder that PEFT and servers read."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from casehard import __version__
from casehard.errors import ConfigError, Diverged, Unsupported
from casehard.io.files import staged
from casehard.io.stored import read
from casehard.maths.merge import LoraPair
from casehard.model.digest import tokenizer_digests
from casehard.model.lora_files import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    LayerShape,
    is_transposed,
    live_pairs,
    tensor_digest,
    write_marker,
)
from casehard.model.model import Model
from casehard.types import Checkpoint

RECORD = "job.json"


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


def adapter_writer(
    net: torch.nn.Module,
    base: Model,
    provenance: Mapping[str, Any],
    *,
    merged: bool = False,
    check: Callable[[Path], object] | None = None,
) -> Callable[[Path], Checkpoint]:
    """Return the function that writes the tuned adapter of ``net`` as a PEFT folder with ``job.json`` and a marker.

    The factors are copied now: ``net`` may be merged or trained on afterwards.

    Args:
        net: a ``PeftModel`` with one LoRA adapter.
        base: the model it was tuned on, to which the marker binds it.
        provenance: JSON values, ``config_digest`` among them: only a run of the same settings may replace the folder.
        merged: whether another adapter is in it already, so that it is not merged with that again.
        check: looks at the folder before it is published; what it raises leaves nothing behind.

    Raises:
        Unsupported: no LoRA adapter.
    """
    pairs = live_pairs(net)
    if not pairs:
        raise Unsupported("the model has no LoRA adapter to write", hint="train one: lora rank 8")
    transposed = is_transposed(net)
    record = {**provenance, "base_digest": base.digest, "merged": merged, "casehard": __version__}

    def write(out: Path) -> Checkpoint:
        require_own(out, str(provenance["config_digest"]))
        ranks = {name: int(p.a.shape[0]) for name, p in pairs.items()}
        shapes = {name: LayerShape(int(p.b.shape[0]), int(p.a.shape[1]), ranks[name]) for name, p in pairs.items()}
        needs = sum(4 * (p.a.numel() + p.b.numel()) for p in pairs.values()) + (1 << 20)
        tokenizer, template = tokenizer_digests(base.tokenizer)
        options: dict[str, Any] = {"target_modules": pairs, "fan_in_fan_out": transposed}
        with staged(out, needs=needs) as folder:
            digests = write_adapter(folder, shapes, iter(pairs.items()), rank=max(ranks.values()), **options)
            write_marker(
                folder,
                "merged" if merged else "user",
                base_digest=base.digest,
                tokenizer_digest=tokenizer,
                template_digest=template,
                tensors_sha256=digests,
            )
            (folder / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            if check is not None:
                check(folder)
        return Checkpoint(out, "", base.digest, "adapter")

    return write


@dataclass(frozen=True)
class _Record:
    """What is read of the record in an adapter folder."""

    config_digest: str


def require_own(adapter: Path, config_digest: str) -> None:
    """Refuse to replace what another run, or somebody, put where the adapter goes.

    Raises:
        ConfigError: it was not written by a run of the same settings.
    """
    record = adapter / RECORD
    if adapter.is_symlink() or (adapter.exists() and not record.is_file()):
        raise ConfigError(f"{adapter} already exists", hint="give another folder with --out")
    if adapter.exists() and read(record, _Record)["config_digest"] != config_digest:
        raise ConfigError(f"{adapter} is of another job", hint="give another folder with --out")
