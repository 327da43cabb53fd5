"""Plain LoRA through PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from casehard.errors import ConfigError, Unsupported
from casehard.model.lora_files import is_transposed
from casehard.seeds import derive


def add_lora(
    model: nn.Module,
    rank: int,
    alpha: float,
    target: str | Sequence[str] = "all-linear",
    dropout: float = 0.0,
    *,
    seed: int = 0,
) -> nn.Module:
    """Wrap ``model`` with one trainable LoRA adapter, ``W x + alpha / rank * B A x``; the base is frozen in place.

    Args:
        model: a ``PreTrainedModel``; its linear layers are replaced inside it.
        rank: columns of A's image, >= 1.
        alpha: numerator of the scale.
        target: ``all-linear`` (every linear layer but the output head) or names of modules.
        dropout: on the adapter's input, in [0, 1).
        seed: decides A; B starts at zero, so the wrapped model computes what the model did.

    Returns:
        The ``PeftModel``.

    Raises:
        ConfigError: a value out of range, or a target that names no linear layer.
        Unsupported: the model already has adapters.
    """
    from peft import LoraConfig, TaskType, get_peft_model
    from peft.tuners.lora import LoraLayer

    if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
        raise ConfigError(f"LoRA needs rank >= 1, alpha > 0, 0 <= dropout < 1; got {rank}, {alpha}, {dropout}")
    if hasattr(model, "peft_config"):
        raise Unsupported("the model already has adapters", hint="merge them first")
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT only divides by the rank
        lora_dropout=dropout,
        target_modules=target if isinstance(target, str) else list(target),
        fan_in_fan_out=is_transposed(model),
    )
    inner: Any = model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, 0, "lora"))
        try:
            wrapped: nn.Module = get_peft_model(inner, config)
        except ValueError as error:
            raise ConfigError(f"LoRA target {target!r}: {str(error)[:200]}") from None
    layers: list[Any] = [module for module in wrapped.modules() if isinstance(module, LoraLayer)]
    width = max(min(layer.in_features, layer.out_features) for layer in layers)
    if rank > width:
        warnings.warn(
            f"LoRA of rank {rank}, and no adapted layer is wider than {width}: a higher rank can express no more",
            stacklevel=2,
        )
    return wrapped
