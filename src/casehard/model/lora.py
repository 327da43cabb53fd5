"""Read a LoRA adapter that somebody else made: safetensors only, nothing of it is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from casehard.errors import Corrupt, DataError, Unsupported
from casehard.files import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def read_lora(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put the adapter in ``folder`` onto ``model``, trainable; the base is frozen in place.

    Args:
        model: a ``PreTrainedModel`` without adapters, of the architecture the adapter was made for.
        folder: ``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT saves them.

    Returns:
        The ``PeftModel``; its adapter is called "default".

    Raises:
        DataError: no adapter there.
        Unsupported: pickled weights, an adapter other than LoRA, or a base that already has adapters.
        Corrupt: the adapter does not fit the model, or holds values that are not finite.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise DataError(f"{folder}: no {CONFIG}", hint="give the folder of a PEFT adapter")
    if not (folder / WEIGHTS).is_file():
        raise Unsupported(f"{folder}: no {WEIGHTS}", hint="pickled adapters can run code; convert it first")
    if hasattr(model, "peft_config"):
        raise Unsupported("the model already has adapters", hint="merge them first")
    config = read_json(folder / CONFIG)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA" or config.get("auto_mapping"):
        raise Unsupported(f"{folder}: an adapter of type {kind!r}", hint="only plain LoRA is supported")
    from peft import PeftModel

    inner: Any = model
    try:
        wrapped: nn.Module = PeftModel.from_pretrained(inner, str(folder), is_trainable=True, local_files_only=True)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise Corrupt(f"{folder}: the adapter does not fit the model: {str(error)[:200]}") from None
    bad = [n for n, p in wrapped.named_parameters() if p.requires_grad and not bool(torch.isfinite(p).all())]
    if bad:
        raise Corrupt(f"{folder}: values that are not finite in {bad[0]}")
    return wrapped
