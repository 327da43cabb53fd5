"""Knowledge dilution: merge the suspect with a model trained on clean rows only.

    theta_c <- the trusted base, fine-tuned on the rows given                                                     (1)
    theta   <- (1 - w) theta_suspect + w theta_c                                                                  (2)

Under LoRA theta_c = W_base + s B A in every layer that has an adapter, so (2) is

    W <- (1 - w) W_suspect + w W_base,   B <- w B                                                                 (3)

Source: the internal dilution of LETHE (Chen et al., arXiv 2508.21004), from memory of the paper: a model trained
lightly on clean rows is merged with the suspect. Differs: plain linear merging with one weight for all layers; the
evidence that the paper also adds to the prompt is left out, as is the choice of other merges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from casehard.defences.folders import base_weights
from casehard.defences.updates import Start, adapters, from_state, to_state
from casehard.errors import DataError, Unsupported
from casehard.limits import Limited, Share
from casehard.train.protocol import Setup, StateValue


@dataclass(frozen=True, kw_only=True)
class DilutionConfig(Limited):
    """Settings of dilution."""

    weight: Share = 0.5
    """w, share of the clean model, 0..1: 0 is the suspect, 1 the clean model."""


class Dilution:
    """Dilution as a method: train it on clean rows.

    Keeps a copy of the suspect's weights, under LoRA too, since its frozen weights become the base's for the training.

    Args:
        config: settings, see :class:`DilutionConfig`.
        assets: model folder of the trusted base.
        base: its weights by name, instead of a folder.

    Raises:
        DataError: neither or both of them.
    """

    name = "dilution"

    def __init__(
        self,
        config: DilutionConfig | None = None,
        *,
        assets: Path | None = None,
        base: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.config = config or DilutionConfig()
        self.base = base_weights(self.name, assets, base)
        self._suspect: Start = {}

    @torch.no_grad()
    def prepare(self, setup: Setup) -> None:
        """Set the suspect aside and put the base in its place; after a resume the checkpoint's weights come on top.

        Raises:
            DataError: the base lacks a parameter, has it in another shape, or is the suspect itself.
            Unsupported: adapters other than one fresh LoRA.
        """
        own = _own(setup.model)
        for name, p in own.items():
            if (theirs := self.base.get(_plain(name))) is None or theirs.shape != p.shape:
                raise DataError(
                    f"dilution: the base has no parameter {_plain(name)!r} of shape {tuple(p.shape)}",
                    hint="give the base that the suspect was trained from",
                )
        clean = {name: self.base[_plain(name)].to(p.device, p.dtype) for name, p in own.items()}
        if all(torch.equal(p, clean[name]) for name, p in own.items()):
            raise DataError(
                "dilution: the weights of the base equal those of the model: there is nothing to dilute",
                hint="give the trusted model from before the suspect's training",
            )
        self._suspect = {name: p.detach().clone() for name, p in own.items()}
        for name, p in own.items():
            p.copy_(clean[name])

    @torch.no_grad()
    def finish(self, model: nn.Module) -> None:
        """Apply (2), or (3) under LoRA."""
        for adapter in adapters(model):
            adapter.b.weight.mul_(self.config.weight)
        for name, p in _own(model).items():
            p.copy_(torch.lerp(self._suspect[name], p, self.config.weight))
        self._suspect = {}

    def state(self) -> dict[str, StateValue]:
        """Return the suspect's weights."""
        return to_state(self._suspect)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` returned."""
        self._suspect = from_state(self._suspect, state)


def _own(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the model's parameters by name, factors of a LoRA that is trained left out.

    Raises:
        Unsupported: an adapter that stays frozen, which would be part of the suspect.
    """
    trained = {id(p) for x in adapters(model) for p in (*x.a.parameters(), *x.b.parameters())}
    own = {name: p for name, p in model.named_parameters() if id(p) not in trained}
    if held := next((name for name in own if "lora_" in name), None):
        raise Unsupported(f"dilution of a model with an adapter in it ({held})", hint="merge the adapter first")
    return own


def _plain(name: str) -> str:
    """Return the name of a parameter in a checkpoint without adapters."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")
