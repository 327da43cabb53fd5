"""SafeLoRA: project a layer's update onto what alignment changed in that layer, where the two point apart.

    V = W_aligned - W_base                                                                                       (1)
    C = V V' / ||V||_F                       "approximate", as published                                         (2)
    C = V (V' V)^+ V'                        "exact": the orthogonal projector onto the column space of V        (3)
    D <- C D   where cos(C D, D) < threshold, or in the ``layers`` layers with the smallest cosine                (4)

D = B A is the update of a linear layer by training: under LoRA the factor B becomes C B; in full-parameter training
D = W - W_aligned and W becomes W_aligned + C D. ``assets`` is the folder of the model *before* alignment; W_aligned are
the weights training starts from. C is never formed: (2) is V (V' B) / ||V||_F, read and done one layer at a time.
Source: Hsu et al., arXiv 2405.16833 (Safe LoRA); equation numbers are ours.
Differs: full-parameter updates (the paper has LoRA only); `layers` picks exactly that many; a layer that alignment left
alone (V = 0) has C = 0, so its update is removed when its cosine, 0, is below the threshold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from casehard.defences.updates import Folder, Layer, Start, from_state, layers, start_of, to_state
from casehard.errors import DataError
from casehard.limits import Coefficient, Fraction, Limited, Natural
from casehard.train.protocol import Setup, StateValue


@dataclass(frozen=True, kw_only=True)
class SafeLoraConfig(Limited):
    """Settings of SafeLoRA."""

    threshold: Coefficient = 0.5
    """Cosine below which a layer is projected; above 1 projects all. Source: SafeLoRA's code (0.5);
    Buffer-and-Reinforce runs it with 0.6."""
    layers: Natural | None = None
    """Project that many layers, those with the smallest cosine, instead of a threshold. Source: their code (10)."""
    projection: Literal["approximate", "exact"] = "approximate"
    """(2) or (3)."""
    rank_tolerance: Fraction = 1e-3
    """Singular values of V below this share of the largest count as zero in (3). With a V of full row rank (3) is the
    identity and the method does nothing."""


class SafeLora:
    """SafeLoRA as a method; acts on linear layers, the output head left out.

    Args:
        config: settings, see :class:`SafeLoraConfig`.
        assets: folder of the unaligned base model, same architecture, in safetensors.

    Raises:
        DataError: the folder holds no weights.
    """

    name = "safelora"

    def __init__(self, config: SafeLoraConfig | None = None, *, assets: Path) -> None:
        self.config = config or SafeLoraConfig()
        self.base = Folder(assets)
        self.cosines: dict[str, float] = {}
        """cos(C D, D) of each layer, once training is over."""
        self.projected: tuple[str, ...] = ()
        """Layers that were projected."""
        self._start: Start = {}

    def prepare(self, setup: Setup) -> None:
        """Copy the weights of full-parameter training, and check that the base fits before training starts.

        Raises:
            DataError: the base lacks a layer or has another shape, or is the aligned model itself.
            Unsupported: adapters other than plain LoRA, or sharded parameters.
        """
        found = layers(setup.model)
        for layer in found:
            self.base.require(f"{layer.name}.weight", layer.linear.weight.shape)
        if not any(bool(self._alignment(layer, layer.linear.weight.detach()).any()) for layer in found):
            raise DataError(
                f"{self.base.path}: its weights equal those of the model to be tuned",
                hint="assets is the model before alignment; the model to be tuned is the aligned one",
            )
        self._start = start_of(setup.model)

    @torch.no_grad()
    def finish(self, model: nn.Module) -> None:
        """Measure every layer's cosine, choose, and apply (4)."""
        found = layers(model)
        self.cosines = {layer.name: self._cosine(layer) for layer in found}
        self.projected = choose(self.cosines, self.config)
        for layer in found:
            if layer.name in self.projected:
                self._project(layer)
        self._start = {}

    def _alignment(self, layer: Layer, aligned: torch.Tensor) -> torch.Tensor:
        """Return V of (1) in fp32."""
        return aligned.float() - self.base.read(f"{layer.name}.weight").to(aligned.device)

    def _of(self, layer: Layer) -> torch.Tensor:
        return self._alignment(layer, layer.linear.weight if layer.adapters else self._start[layer.parameter])

    def _apply(self, v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        exact = self.config.projection == "exact"
        return project_exact(v, x, self.config.rank_tolerance) if exact else project_approximate(v, x)

    def _cosine(self, layer: Layer) -> float:
        if layer.adapters:
            b, a = layer.factors()
            return factor_cosine(self._apply(self._of(layer), b), b, a)
        update = layer.update(self._start)
        eye = torch.eye(1, device=update.device)
        return factor_cosine(self._apply(self._of(layer), update).reshape(-1, 1), update.reshape(-1, 1), eye)

    def _project(self, layer: Layer) -> None:
        v = self._of(layer)
        for adapter in layer.adapters:
            adapter.b.weight.copy_(self._apply(v, adapter.b.weight.float()))
        if not layer.adapters:
            start = self._start[layer.parameter].float()
            layer.linear.weight.copy_(start + self._apply(v, layer.update(self._start)))

    def state(self) -> dict[str, StateValue]:
        """Return the starting weights of full-parameter training."""
        return to_state(self._start)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` returned."""
        self._start = from_state(self._start, state)


def project_approximate(v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return C x with C of (2); v (O, I), x (O, K)."""
    size = torch.linalg.vector_norm(v)
    return v @ (v.T @ x) / size if size > 0 else torch.zeros_like(x)


def project_exact(v: torch.Tensor, x: torch.Tensor, tolerance: float) -> torch.Tensor:
    """Return C x with C of (3), from the left singular vectors of v above ``tolerance`` x the largest value."""
    u, s, _ = torch.linalg.svd(v, full_matrices=False)
    kept = u[:, (s > tolerance * s[0]) & (s > 0)]
    return kept @ (kept.T @ x)


def factor_cosine(left: torch.Tensor, right: torch.Tensor, a: torch.Tensor) -> float:
    """Return cos(left A, right A) without forming the products: <L A, R A> = <L' R, A A'>; 1 when right A is zero.

    Args:
        left: L (O, R).
        right: R (O, R).
        a: A (R, I).
    """
    left, right, gram = left.double(), right.double(), a.double() @ a.double().T
    inner, lengths = ((left.T @ right) * gram).sum(), [((x.T @ x) * gram).sum().clamp(min=0) for x in (left, right)]
    if lengths[1] == 0:
        return 1.0
    return float(inner / (lengths[0] * lengths[1]).sqrt()) if lengths[0] > 0 else 0.0


def choose(cosines: Mapping[str, float], config: SafeLoraConfig) -> tuple[str, ...]:
    """Return the layers that (4) projects; of equal cosines the earlier layer comes first."""
    if config.layers is None:
        return tuple(name for name, cosine in cosines.items() if cosine < config.threshold)
    return tuple(sorted(cosines, key=lambda name: cosines[name])[: config.layers])
