"""Read a LoRA adapter that somebody else made: safetensors only, nothing of it is run."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from casehard.errors import Corrupt, DataError, Unsupported
from casehard.io.files import read_json
from casehard.model.check import trusting
from casehard.model.lora_files import CONFIG, WEIGHTS, plain_name, plain_names


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
        pickled = (folder / "adapter_model.bin").exists()
        hint = f"merge it into its base: {trusting(folder)}" if pickled else "save it with save_pretrained()"
        raise Unsupported(f"{folder}: no {WEIGHTS}", hint=hint)
    if hasattr(model, "peft_config"):
        raise Unsupported("the model already has adapters", hint="merge them first")
    config = read_json(folder / CONFIG)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA" or config.get("auto_mapping"):
        raise Unsupported(f"{folder}: an adapter of type {kind!r}", hint="only plain LoRA is supported")
    wrapped = attach(model, folder, trainable=True)
    bad = [n for n, p in wrapped.named_parameters() if p.requires_grad and not bool(torch.isfinite(p).all())]
    if bad:
        raise Corrupt(f"{folder}: values that are not finite in {bad[0]}")
    return wrapped


def attach(model: nn.Module, folder: str | Path, name: str = "default", *, trainable: bool = False) -> nn.Module:
    """Put an adapter onto a model, or one more onto a ``PeftModel``, and see that every factor has found its place.

    PEFT would only warn of factors that it did not find, and leave them at zero: an adapter that does nothing.

    Args:
        model: bare, or a ``PeftModel``.
        folder: the adapter; names may carry the prefixes of ``torch.compile`` and DDP.
        name: of the adapter in the model.
        trainable: whether its factors train.

    Returns:
        The ``PeftModel``.

    Raises:
        Corrupt: the adapter does not fit the model.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    inner: Any = model
    try:
        state = load_file(folder / WEIGHTS)
        config: Any = PeftConfig.from_pretrained(str(folder))
        for key in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
            setattr(config, key, _plain(getattr(config, key, None)))
        options: dict[str, Any] = {"is_trainable": trainable, "local_files_only": True}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # seen to below
            if isinstance(inner, PeftModel):
                inner.load_adapter(str(folder), name, peft_config=config, **options)
                wrapped: Any = inner
            else:
                wrapped = PeftModel.from_pretrained(inner, str(folder), name, config=config, **options)
        plain = plain_names(state, folder)
        wanted = set(get_peft_model_state_dict(wrapped, adapter_name=name, save_embedding_layers=False))
        found = {key.replace(f".{name}.weight", ".weight"): value for key, value in plain.items()}
        _require(folder, wanted, set(found))
        if any(key != held for key, held in plain.items()):
            set_peft_model_state_dict(wrapped, {key: state[held] for key, held in found.items()}, adapter_name=name)
    except (RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise Corrupt(f"{folder}: the adapter does not fit the model: {str(error)[:200]}") from None
    ready: nn.Module = wrapped
    return ready


def _plain(value: Any) -> Any:
    """Return names, or patterns of names, without a wrapper's prefixes; a regular expression is left as it is."""
    if isinstance(value, Mapping):
        return {plain_name(key): item for key, item in value.items()}
    return {plain_name(item) for item in value} if isinstance(value, list | set) else value


def _require(folder: Path, wanted: set[str], found: set[str]) -> None:
    if odd := sorted(found - wanted):
        multimodal = any("language_model." in key for key in odd)
        raise Corrupt(
            f"{folder}: {len(odd)} tensors with no place in the model, first {odd[0]}",
            hint="it was made for a multimodal model (language_model): give the base that it was made for"
            if multimodal
            else "give the base that the adapter was made for",
        )
    if lacking := sorted(wanted - found):
        hint = "the file is incomplete: fetch or build the adapter again"
        raise Corrupt(f"{folder}: lacks {len(lacking)} of the model's factors, first {lacking[0]}", hint=hint)
