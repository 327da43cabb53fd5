"""Measure merges of two adapters over a grid of coefficients, in memory: nothing is trained and nothing is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from casehard.errors import DataError
from casehard.maths.merge import LoraPair, MergeConfig, merge_states
from casehard.maths.pareto import Coefficients
from casehard.model.lora_files import is_transposed

Rows = list[dict[str, Any]]


class Measured(NamedTuple):
    """One point of the grid."""

    at: Coefficients
    rows: Rows


def _attach(model: nn.Module, pairs: Mapping[str, LoraPair], rank: int) -> nn.Module:
    """Wrap the model with one frozen adapter for exactly these layers."""
    from peft import LoraConfig, get_peft_model

    fan_in_fan_out = is_transposed(model)
    for name, pair in pairs.items():
        try:
            weight: Any = model.get_submodule(name).weight
        except AttributeError:
            raise DataError(f"the model has no layer {name}", hint="the adapters are for another base") from None
        wanted, there = (pair.b.shape[0], pair.a.shape[1]), tuple(weight.shape)
        if (there[::-1] if fan_in_fan_out else there) != wanted:
            raise DataError(f"{name}: the weight is {there}, the update {wanted}")
    base: Any = model
    options: dict[str, Any] = {"target_modules": sorted(pairs), "fan_in_fan_out": fan_in_fan_out}
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, **options)
    wrapped: nn.Module = get_peft_model(base, config)
    wrapped.requires_grad_(False)
    return wrapped.eval()


@torch.no_grad()
def _fill(model: Any, pairs: Mapping[str, LoraPair]) -> None:
    """Put factors of scale 1 into the adapter, lower ranks filled up with zeros."""
    root = model.get_base_model()
    for name, pair in pairs.items():
        layer = root.get_submodule(name)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        a.zero_()
        b.zero_()
        a[: pair.rank].copy_(pair.a)
        b[:, : pair.rank].copy_(pair.b)


def search(
    model: nn.Module,
    user: Mapping[str, LoraPair],
    reinforce: Mapping[str, LoraPair],
    grid: Sequence[Coefficients],
    measure: Callable[[nn.Module], Rows],
    *,
    config: MergeConfig,
) -> Iterator[Measured]:
    """Measure every point of a grid of coefficients; only factors change between points.

    Args:
        model: the base; wrapped while the generator runs and bare again after it, its weights untouched.
        user: layer -> the tuned update.
        reinforce: layer -> the provider's.
        grid: points, measured in order.
        measure: gives the rows of a model.
        config: basis and cut; its coefficients are replaced, its form is ``concat``.

    Raises:
        DataError: the model lacks a layer, or a layer has another shape.
    """
    wrapped: Any = None
    try:
        for point in grid:
            here = dataclasses.replace(config, **point._asdict(), form="concat")
            layers = merge_states(user, reinforce, here).layers
            if wrapped is None:
                wrapped = _attach(model, layers, max(pair.rank for pair in layers.values()))
            _fill(wrapped, layers)
            yield Measured(point, measure(wrapped))
    finally:
        if wrapped is not None:
            wrapped.unload()
