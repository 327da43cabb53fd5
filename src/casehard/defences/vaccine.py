"""Vaccine: align on embeddings pushed the way that hurts most, so that what tuning does to them later hurts less.

    e_l     hidden embedding that enters decoder layer l (rows, tokens, width), l = 1..L; e_1 are the token embeddings
    G_l     = grad of L_s with respect to e_l                         first pass, weights as they are                (1)
    eps_l   = rho G_l / ||(G_1, ..., G_L)||                           one norm over all layers and rows of the step  (2)
    g       = grad of L_s with every e_l + eps_l in place of e_l      second pass; the optimiser takes g             (3)

L_s is the loss on the rows trained on (refusals, harmless rows); no harmful row is needed. eps is held constant in (3).
Source: Huang et al., arXiv 2402.01109 (Vaccine), algorithm 1, from memory of the paper.
Differs: the push is added to what enters each decoder layer, so to attention's input and to the residual beside it;
the published code is said to push what attention gives out. (2) takes the norm over a whole optimiser step, so that
gradient accumulation changes nothing. Rows stay in memory from the first pass to the second.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from casehard.data.batches import Batch
from casehard.distributed.ranks import require_one_process
from casehard.limits import Limited, Weight
from casehard.maths.tensors import norm
from casehard.train.passes import decoder_layers, unwrapped
from casehard.train.protocol import Setup, Step


@dataclass(frozen=True, kw_only=True)
class VaccineConfig(Limited):
    """Settings of Vaccine."""

    rho: Weight = 0.5
    """Length of the push over all layers and rows of a step, in the units of the embeddings; 0 is plain SFT bit for
    bit. Source: tries on the organism; 2 in the paper, from memory."""
    where: Literal["layers", "embeddings"] = "layers"
    """Push what enters every decoder layer (the paper), or the token embeddings alone."""


PRESETS: dict[str, VaccineConfig] = {"paper": VaccineConfig(rho=2.0, where="layers")}


class Vaccine:
    """Vaccine as a method, for all weights or for LoRA.

    Args:
        config: settings, see :class:`VaccineConfig`.
    """

    name = "vaccine"

    def __init__(self, config: VaccineConfig | None = None) -> None:
        self.config = config or VaccineConfig()

    def prepare(self, setup: Setup) -> None:
        """Check the model.

        Raises:
            Unsupported: several processes, whose rows (2) would have to be taken together; or no decoder layers.
        """
        require_one_process("vaccine")
        decoder_layers(setup.model)
        self._seen: list[tuple[Batch, list[torch.Tensor]]] = []

    def backward(self, model: nn.Module, batch: Batch, step: Step) -> torch.Tensor:
        """Measure (1) on this micro-batch; with the last one, accumulate (3). Return the loss of the first pass."""
        if self.config.rho == 0:
            loss = step.loss(model, batch)
            step.backward(loss)
            return loss.detach()
        if step.micro == 0:
            self._seen.clear()
        loss, slopes = slopes_of(lambda: step.loss(model, batch), self._pushed(model))
        self._seen.append((batch, slopes))
        step.log({"passes": 1, "tokens": int(batch["attention_mask"].sum())})
        if step.last:
            size = norm(g for _, several in self._seen for g in several)
            scale = self.config.rho / size if size > 0 else 0.0
            for rows, several in self._seen:
                with pushed_by(self._pushed(model), [scale * g for g in several]):
                    worse = step.loss(model, rows)
                    step.backward(worse)
                step.log({"pushed_loss": float(worse.detach()) * step.micros})
            self._seen.clear()
        return loss.detach()

    def _pushed(self, model: nn.Module) -> list[nn.Module]:
        found = decoder_layers(unwrapped(model))
        return found if self.config.where == "layers" else found[:1]


def slopes_of(loss: Callable[[], torch.Tensor], layers: Sequence[nn.Module]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the loss and its gradient (1) with respect to what enters each layer, (B, T, H) each.

    No gradient reaches the weights.
    """
    probes: list[torch.Tensor | None] = [None] * len(layers)

    def probe(at: int, hidden: torch.Tensor) -> torch.Tensor:
        found = probes[at]
        if found is None:  # a checkpointed layer runs twice, with one probe
            found = probes[at] = torch.zeros_like(hidden, requires_grad=True)
        return hidden + found

    with _entering(layers, probe):
        value = loss()
        slopes = torch.autograd.grad(value, [p for p in probes if p is not None])
    return value, list(slopes)


@contextlib.contextmanager
def pushed_by(layers: Sequence[nn.Module], push: Sequence[torch.Tensor]) -> Iterator[None]:
    """Run a block with ``push[l]`` (B, T, H) added to what enters layer l."""
    with _entering(layers, lambda at, hidden: hidden + push[at].to(hidden.dtype)):
        yield


@contextlib.contextmanager
def _entering(layers: Sequence[nn.Module], change: Callable[[int, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    def hook(at: int) -> Callable[..., Any]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            if args:
                return (change(at, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": change(at, kwargs["hidden_states"])}

        return enter

    hooks = [layer.register_forward_pre_hook(hook(at), with_kwargs=True) for at, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
