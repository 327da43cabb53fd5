"""Antidote: after fine-tuning, remove in one shot the coordinates that matter most on harmful rows.

    ||X_j|| = sqrt(sum over tokens of x_j^2)      input j of a linear layer, over all tokens of the unsafe rows  (1)
    h_ij = |M_ij| ||X_j||                         Wanda score of coordinate (i, j)                               (2)
    M_ij <- 0  where h_ij is among the top mask_ratio of its group                                               (3)

What M is, ``prune``:  "update"   D, what training added to the layer's weight: W_0 + D becomes W_0 + masked D
                       "weights"  W_0 + D, the tuned weight itself
                       "factors"  A and B of the adapters, as two linear layers each with its own inputs (LoRA only)

Under LoRA "update" and "weights" give a matrix that is no product of thin factors: it is added to the base weight in
memory and B becomes 0, so an adapter exported by mistake is the aligned model, not the undefended one. "factors" stays
an adapter. Activations are those of the tuned model, before anything is removed.
Source: Huang et al., arXiv 2408.09600 (Antidote); the score of Sun et al., arXiv 2306.11695 (Wanda).
Differs: the paper writes (3) for "the weights"; which of the three readings its code takes under LoRA we could not
check.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from casehard.data.batches import EncodedSet, collate
from casehard.defences.updates import Layer, Start, from_state, layers, start_of, to_state
from casehard.errors import ConfigError, DataError, Diverged, Unsupported
from casehard.limits import BatchSize, Limited, Share
from casehard.train.passes import quiet
from casehard.train.protocol import Setup, StateValue


@dataclass(frozen=True, kw_only=True)
class AntidoteConfig(Limited):
    """Settings of Antidote."""

    mask_ratio: Share = 0.05
    """Share of coordinates removed, 0..1. Source: Buffer-and-Reinforce's run of it (0.05)."""
    prune: Literal["update", "weights", "factors"] = "update"
    """What M of (3) is."""
    group: Literal["layer", "row"] = "layer"
    """Rank scores within a matrix, or within each of its rows as Wanda does."""
    batch_size: BatchSize = 8
    """Unsafe rows a forward pass; all rows are read once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prune == "factors" and self.group == "row":
            raise ConfigError("group: rows of B are as short as the adapter's rank", hint="group layer with factors")

    @property
    def moves_base(self) -> bool:
        """Whether under LoRA the result stands in the base weights: an adapter alone would be the undefended one."""
        return self.prune != "factors"


class Antidote:
    """Antidote as a method; acts on linear layers, the output head left out.

    Args:
        config: settings, see :class:`AntidoteConfig`.
        unsafe: the re-alignment set: restricted prompts with compliant answers. They are read, never trained on.

    Raises:
        DataError: no unsafe rows.
    """

    name = "antidote"

    def __init__(self, config: AntidoteConfig | None = None, *, unsafe: EncodedSet) -> None:
        self.config = config or AntidoteConfig()
        if len(unsafe) == 0:
            raise DataError("antidote: no unsafe rows", hint="--unsafe harmful.jsonl")
        self.unsafe = unsafe
        self.removed = 0
        """Coordinates removed, once training is over."""
        self._start: Start = {}

    def prepare(self, setup: Setup) -> None:
        """Copy the weights of full-parameter training that D is measured from; check the model before training.

        Raises:
            Unsupported: adapters other than plain LoRA, sharded or half-precision weights, factors without LoRA.
        """
        for layer in layers(setup.model):
            if self.config.prune == "factors" and not layer.adapters:
                raise Unsupported("antidote: prune factors without adapters", hint="prune update or weights")
            if self.config.prune != "factors" and layer.linear.weight.dtype in (torch.bfloat16, torch.float16):
                raise Unsupported(
                    f"{layer.name} is stored in {layer.linear.weight.dtype}: adding the update there loses most of it",
                    hint="load the model in float32, or prune factors",
                )
        self._start = start_of(setup.model) if self.config.prune == "update" else {}

    @torch.no_grad()
    def finish(self, model: nn.Module) -> None:
        """Measure (1) on the tuned model, then apply (3) layer by layer."""
        found = layers(model)
        watched = [m for layer in found for m in self._matrices(layer)]
        norms = input_norms(model, watched, self.unsafe, self.config.batch_size)
        self.removed = 0
        for layer in found:
            if self.config.prune == "factors":
                for linear in self._matrices(layer):
                    linear.weight.copy_(self._pruned(linear.weight.float(), norms[linear]))
            else:
                self._mend(layer, norms[layer.linear])
        self._start = {}

    def _matrices(self, layer: Layer) -> list[nn.Linear]:
        """Return the linear layers whose inputs are measured."""
        factors = [linear for adapter in layer.adapters for linear in (adapter.a, adapter.b)]
        return factors if self.config.prune == "factors" else [layer.linear]

    def _mend(self, layer: Layer, norms: torch.Tensor) -> None:
        weight = layer.linear.weight
        if self.config.prune == "update":
            start = weight if layer.adapters else self._start[layer.parameter]
            weight.copy_(start + self._pruned(layer.update(self._start), norms))
        else:
            whole = weight + layer.update({}) if layer.adapters else weight
            weight.copy_(self._pruned(whole, norms))
        for adapter in layer.adapters:
            adapter.b.weight.zero_()

    def _pruned(self, matrix: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        mask = top(matrix.abs() * norms, self.config.mask_ratio, rows=self.config.group == "row")
        self.removed += int(mask.sum())
        return matrix.masked_fill(mask, 0.0)

    def state(self) -> dict[str, StateValue]:
        """Return the starting weights of full-parameter training."""
        return to_state(self._start)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` returned."""
        self._start = from_state(self._start, state)


def input_norms(
    model: nn.Module, watched: list[nn.Linear], rows: EncodedSet, batch_size: int
) -> dict[nn.Linear, torch.Tensor]:
    """Return (1) for each watched layer, shape (I,), in eval mode and without autocast; padding does not count.

    Raises:
        Diverged: an activation is not finite.
        Unsupported: a layer's input is not (rows, tokens, I).
    """
    squares = {linear: torch.zeros(linear.in_features, device=linear.weight.device) for linear in watched}
    real = torch.zeros(0)

    def watch(linear: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(linear, nn.Linear)
        if inputs[0].shape[:-1] != real.shape:
            raise Unsupported(f"antidote: a layer's input is {tuple(inputs[0].shape)}", hint="dense models only")
        squares[linear] += inputs[0][real].float().square().sum(0)

    hooks = [linear.register_forward_pre_hook(watch) for linear in watched]
    # Under mixed precision the training loop shadows forward with one that computes in bf16.
    forward = getattr(model, "_original_forward", model)
    device = next(model.parameters()).device
    try:
        with quiet(model):
            for at in range(0, len(rows), batch_size):
                batch = collate(rows.rows[at : at + batch_size], rows.pad_id)
                mask = batch["attention_mask"].to(device)
                real = mask.bool()
                forward(input_ids=batch["input_ids"].to(device), attention_mask=mask)
    finally:
        for hook in hooks:
            hook.remove()
    if not all(bool(total.isfinite().all()) for total in squares.values()):
        raise Diverged("antidote: an activation on the unsafe rows is not finite", hint="lower the learning rate")
    return {linear: total.sqrt() for linear, total in squares.items()}


def top(scores: torch.Tensor, share: float, *, rows: bool = False) -> torch.Tensor:
    """Return the mask (O, I) of the ``share`` largest scores of the matrix, or of each row; zeros are never in it.

    Example: scores [[1, 4], [3, 2]], share 0.5 -> [[False, True], [True, False]].
    """
    groups = scores if rows else scores.reshape(1, -1)
    chosen = groups.topk(round(share * groups.shape[1]), dim=1).indices
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, chosen, True)
    return mask.view_as(scores) & (scores > 0)
