"""How much of a set of rows is left to learn, with and without the buffer, and which layers would pay for it.

    residual        (1/|y|) sum_t (1 - p(y_t | x, y_<t))                                                          (4)
    S_l             <-grad_{W_l} L, V_l> / ||V_l||_F,  V_l = s_l B_l A_l of an adapter that refuses               (5)
                    = -(dL / d eps_l) / ||V_l||_F  at eps = 0, with eps_l V_l x added to layer l                   (6)

(4) bounds the norm of any gradient of the row. (6) is (5) without a d_out x d_in gradient: one backward pass, to
scalars.
Sign: the update direction is -grad, so a negative score says that a step on these rows works against the refusals.
Source: arXiv 2605.24550, section 4; (6) is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from casehard.data.batches import IGNORE, Batch, EncodedSet, collate
from casehard.data.chat import ChatFormat
from casehard.defences.buffer_reinforce.frozen_lora import FrozenLora, base_layers
from casehard.errors import ConfigError, DataError
from casehard.evaluation.generate import inference
from casehard.evaluation.suite import LOGITS
from casehard.maths.merge import LoraPair
from casehard.types import Example


class Residual(NamedTuple):
    """Per row and on average: (4), and the loss in nats a token; means are over tokens."""

    residual: list[float]
    nll: list[float]
    tokens: list[int]

    @property
    def mean_residual(self) -> float:
        """Mean of (4) over all answer tokens."""
        return sum(r * t for r, t in zip(self.residual, self.tokens, strict=True)) / sum(self.tokens)

    @property
    def mean_nll(self) -> float:
        """Mean loss over all answer tokens, nats."""
        return sum(r * t for r, t in zip(self.nll, self.tokens, strict=True)) / sum(self.tokens)


def residual(model: nn.Module, chat: ChatFormat, examples: Sequence[Example], *, batch_size: int = 64) -> Residual:
    """Measure (4) and the loss of each row's own answer, in fp32 and without dropout.

    Raises:
        DataError: no rows, or an answer without tokens.
    """
    if not examples:
        raise DataError("no rows to measure")
    encoded = [chat.encode(example) for example in examples]
    device = next(model.parameters()).device
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i].input_ids))
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", 1)
    size = max(1, min(batch_size, LOGITS // (len(encoded[order[0]].input_ids) * vocabulary)))
    out: dict[int, tuple[float, float, int]] = {}
    with inference(model):
        for start in range(0, len(order), size):
            picked = order[start : start + size]
            batch = {k: v.to(device) for k, v in collate([encoded[i] for i in picked], 0).items()}
            targets_BT = batch.pop("labels")[:, 1:]
            nll_BT = _token_losses(model(**batch).logits, targets_BT)
            trained_BT = targets_BT != IGNORE
            counts = trained_BT.sum(1).tolist()
            left = (-torch.expm1(-nll_BT) * trained_BT).double().sum(1).tolist()
            nats = nll_BT.double().sum(1).tolist()
            for i, a, b, n in zip(picked, left, nats, counts, strict=True):
                if n == 0:
                    raise DataError(f"row {examples[i].id or i + 1} has no answer to measure")
                out[i] = (a / n, b / n, n)
    rows = [out[i] for i in range(len(examples))]
    return Residual([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows])


def _token_losses(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    wide = logits_BTV[:, :-1].to(torch.promote_types(logits_BTV.dtype, torch.float32))
    return functional.cross_entropy(wide.transpose(1, 2), targets_BT, ignore_index=IGNORE, reduction="none")


class Scores(NamedTuple):
    """Safety Gradient Score of each layer."""

    layers: tuple[str, ...]
    scores: torch.Tensor
    """(L,) equation (5), averaged over rows; negative = a step on these rows degrades safety."""
    norms: torch.Tensor
    """(L,) ||V_l||_F."""
    rows: int


def frobenius(pair: LoraPair) -> float:
    """Return ||s B A||_F from the factors alone: sqrt(tr(B'B A A')) s."""
    a, b = pair.a.double(), pair.b.double()
    return float(((b.t() @ b) * (a @ a.t())).sum().clamp_min(0).sqrt()) * abs(pair.scale)


class ZeroGated:
    """An adapter attached through one scalar a layer, all zero: the model computes what it did.

    Args:
        safety: layer name in the base -> factors.
    """

    def __init__(self, model: nn.Module, safety: Mapping[str, LoraPair]) -> None:
        layers = base_layers(model)
        if missing := sorted(set(safety) - set(layers)):
            raise ConfigError(f"the model has no layer {missing[0]!r}", hint="the adapter was made for another model")
        like = next(model.parameters())
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.layers = tuple(safety)
        self.gates = {n: torch.zeros((), device=like.device, dtype=dtype, requires_grad=True) for n in safety}
        self._handles = [layers[name].register_forward_hook(self._hook(name, safety[name])) for name in safety]

    def _hook(self, name: str, pair: LoraPair) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            a, b = (f.to(device=output.device, dtype=output.dtype) for f in (pair.a, pair.b))
            update = functional.linear(functional.linear(args[0].to(output.dtype), a), b)
            return output + (self.gates[name] * pair.scale).to(output.dtype) * update

        return add

    def __enter__(self) -> ZeroGated:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def gradients(self, loss: torch.Tensor) -> torch.Tensor:
        """Return dL / d eps of every layer, (L,)."""
        return torch.stack(torch.autograd.grad(loss, [self.gates[name] for name in self.layers]))


def row_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the sum over rows of each row's mean token loss."""
    targets_BT = batch["labels"][:, 1:]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    counts = (targets_BT != IGNORE).sum(1).clamp_min(1)
    return (_token_losses(logits, targets_BT).sum(1) / counts).sum()


def safety_scores(
    model: nn.Module, rows: EncodedSet, safety: Mapping[str, LoraPair], *, batch_size: int = 16
) -> Scores:
    """Measure (5) over ``rows`` through (6); attach a buffer beforehand to see what it saturates.

    Args:
        model: any causal language model, with or without adapters; unchanged afterwards.
        rows: N token rows.
        safety: an adapter that makes the model refuse (ReinforceLoRA): layer -> factors.

    Returns:
        Scores averaged over the N rows, in the order of ``safety``.
    """
    norms = torch.tensor([frobenius(pair) for pair in safety.values()], dtype=torch.float64)
    total = torch.zeros(len(safety), dtype=torch.float64)
    device = next(model.parameters()).device
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        with ZeroGated(model, safety) as gated, torch.enable_grad():
            for start in range(0, len(rows), batch_size):
                batch = collate(rows.rows[start : start + batch_size], rows.pad_id)
                batch = {key: value.to(device) for key, value in batch.items()}
                total -= gated.gradients(row_loss(model, batch)).double().cpu()
    finally:
        for module in training:
            module.training = True
    return Scores(tuple(safety), total / len(rows) / (norms + 1e-8), norms, len(rows))


def left_beside(
    model: nn.Module,
    rows: EncodedSet,
    buffer: Mapping[str, LoraPair],
    refuses: Mapping[str, LoraPair],
    *,
    batch_size: int = 16,
) -> float:
    """Return how much of what rows would teach against refusing is left beside a buffer: 0 is nothing, 1 is all.

    The sum over layers of the sizes of (5) beside the buffer, as a share of that without it. Ours.

    Args:
        model: the bare base; unchanged afterwards.
        rows: restricted prompts with compliant answers that no adapter was trained on.
        buffer: layer -> factors.
        refuses: layer -> factors of the reinforcing adapter.
    """
    alone = float(safety_scores(model, rows, refuses, batch_size=batch_size).scores.abs().sum())
    frozen = FrozenLora(buffer).attach(model)
    try:
        beside = float(safety_scores(model, rows, refuses, batch_size=batch_size).scores.abs().sum())
    finally:
        frozen.detach()
    return beside / max(alone, 1e-12)
