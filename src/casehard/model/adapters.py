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


def merged(net: nn.Module) -> nn.Module:
    """Return a model without adapters: their updates are added to its weights, in place, all of which can train then.

    Whoever goes on with a trained model (an attacker, a repair, another customer's job) may not meet somebody's frozen
    base with an adapter on it: "train all weights" would train that adapter and nothing else.

    Args:
        net: a ``PeftModel``, which is used up; any other model is returned as it is.
    """
    if not hasattr(net, "peft_config"):
        return net
    wrapped: Any = net
    bare: nn.Module = wrapped.merge_and_unload()
    for p in bare.parameters():
        p.requires_grad_(p.is_floating_point())
    return bare


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
        ConfigError: a value out of range, or a target that names no linear layer, or the table of the embeddings.
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
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing")  # PEFT asks transformers by its old name
        torch.manual_seed(derive(seed, 0, "lora"))
        try:
            wrapped: nn.Module = get_peft_model(inner, config)
        except ValueError as error:
            raise ConfigError(f"LoRA target {target!r}: {str(error)[:200]}") from None
    named: dict[str, Any] = {name: m for name, m in wrapped.named_modules() if isinstance(m, LoraLayer)}
    for name, layer in named.items():
        _require_own(inner, name, layer.get_base_layer())
    layers = list(named.values())
    width = max(min(layer.in_features, layer.out_features) for layer in layers)
    if rank > width:
        warnings.warn(
            f"LoRA of rank {rank}, and no adapted layer is wider than {width}: a higher rank can express no more",
            stacklevel=2,
        )
    return wrapped


def _require_own(model: Any, name: str, layer: nn.Module) -> None:
    """Refuse an adapter on the table of the embeddings: merged into a tied head it would change what is read too."""
    table = getattr(model.get_input_embeddings(), "weight", None)
    if isinstance(layer, nn.Embedding) or (table is not None and getattr(layer, "weight", None) is table):
        raise ConfigError(
            f"LoRA target {name.removeprefix('base_model.model.')!r} is the table of the embeddings, or tied to it",
            hint="name linear layers: q_proj, v_proj ..., or all-linear",
        )
