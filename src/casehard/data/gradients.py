"""How much training on a row would help with the user's rows: cosines of gradients, sketched.

With z_t the head's output, h_t its input and l a row's mean loss over its answer, the head's gradient is
    G = sum_t (dl / dz_t) h_t'                              (V x d: 545 M numbers for a vocabulary of 152 k)        (1)
    S = A G B'  =  sum_t (A dl / dz_t) (B h_t)'             (r x s numbers a row)                                   (2)
with A (r x V) and B (s x d) of independent normal entries of variance 1 / r and 1 / s, so that E <S, S'> = <G, G'>. (2)
takes a forward pass and the loss's derivative at the head; no gradient of a weight is ever formed.
    score_i = cos(S_i, mean over the user's rows of S)                                                              (3)

Source: LESS (Xia et al., arXiv 2402.04333), simplified: the head's gradient in place of a LoRA's, one model in place of
several checkpoints of a warm-up run on the candidates, and no Adam preconditioning. The two-sided projection is the one
of a Kronecker product. Where head and embedding table are tied, only the head's part of the gradient counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional

from casehard.data.batches import IGNORE, Encoded, collate
from casehard.data.chat import ChatFormat
from casehard.data.embed import Embedder
from casehard.errors import DataError, Unsupported
from casehard.seeds import generator
from casehard.types import Example

SIZE = 32
"""r and s of (2): 1,024 numbers a row, whose cosines are off by about 1 / 32."""
LOGITS = 2**25
"""Logits held at once."""


def cosines(
    embedder: Embedder,
    pool: Sequence[Example],
    user: Sequence[Example],
    *,
    seed: int = 0,
    system: str | None = None,
) -> torch.Tensor:
    """Return (3) of each row of ``pool``, (n,) float64.

    Args:
        user: the user's rows, whose mean gradient is followed.
        seed: of the projections.
        system: system message of the rows.

    Raises:
        DataError: no user rows, or a row without an answer.
        Unsupported: a model without a language head.
    """
    if not user:
        raise DataError("gradients need the user's rows and there are none", hint="--data")
    sketched = sketches(embedder, [*pool, *user], seed=seed, system=system)
    toward = sketched[len(pool) :].mean(0)
    return functional.cosine_similarity(sketched[: len(pool)], toward.unsqueeze(0), dim=1)


def sketches(
    embedder: Embedder, examples: Sequence[Example], *, seed: int = 0, system: str | None = None, size: int = SIZE
) -> torch.Tensor:
    """Return (2) of each row, (n, size x size) float64 on the CPU, rows rendered as they are trained.

    Raises:
        DataError: a row without an answer, or longer than the model reads.
        Unsupported: a model without a language head.
    """
    model = embedder.model
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = whole.get_output_embeddings() if hasattr(whole, "get_output_embeddings") else None
    if head is None:
        raise Unsupported(
            f"{type(whole).__name__} has no language head, so it has no gradients of a loss",
            hint="strategy gradient takes the model to be tuned, not an embedding model",
        )
    limit = getattr(whole.config, "max_position_embeddings", None)
    rows = ChatFormat(embedder.tokenizer, system=system, max_length=limit).encode_all(examples).rows
    vocabulary, width = head.weight.shape
    drawn = generator(seed, 0, "gradient")
    device = head.weight.device
    left = (torch.randn(size, vocabulary, generator=drawn) / size**0.5).to(device)
    right = (torch.randn(size, width, generator=drawn) / size**0.5).to(device)
    off = model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext()
    out = torch.empty(len(rows), size * size, dtype=torch.float64)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    with off, _quiet(whole), torch.enable_grad():
        while order:
            # The longest first: a batch that fits is followed by batches that fit.
            rest = max(1, min(64, LOGITS // (vocabulary * len(rows[order[-1]].input_ids))))
            picked, order = order[-rest:], order[:-rest]
            out[picked] = _batch(whole, head, [rows[i] for i in picked], left, right)
    return out


def _batch(model: Any, head: Any, rows: Sequence[Encoded], left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return (2) of a few rows."""
    seen: dict[str, torch.Tensor] = {}

    def cut(module: Any, given: Any, made: torch.Tensor) -> torch.Tensor:
        # The derivative is wanted at the head's output and nowhere below it.
        seen["input"], seen["output"] = given[0].detach(), made.detach().requires_grad_()
        return seen["output"]

    batch = {name: some.to(left.device) for name, some in collate(rows, 0).items()}
    hook = head.register_forward_hook(cut)
    try:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    finally:
        hook.remove()
    targets = batch["labels"][:, 1:]
    loss = functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORE, reduction="none"
    )
    counts = (targets != IGNORE).sum(1)
    (slope,) = torch.autograd.grad((loss.sum(1) / counts).sum(), seen["output"])
    made = torch.einsum("btr,bts->brs", slope.float() @ left.T, seen["input"].float() @ right.T)
    return made.flatten(1).double().cpu()


@contextlib.contextmanager
def _quiet(model: Any) -> Iterator[None]:
    """Hold a model in evaluation mode with no weight asking for a gradient, and put both back."""
    training = [m for m in model.modules() if m.training]
    trained = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for m in training:
            m.training = True
        for p in trained:
            p.requires_grad_(True)
