"""The log-ratio objective that breaks backdoors, and its exact gradient at the memory of plain fine-tuning.

    s(y | x)  = c sum_t log p(y_t | x, y_<t)                                                                     (1)
    D         = s(y | x_d) - s(y_d | x_d)                                                                        (2)
    R         = log sigmoid(beta D)                                                                              (3)
    L         = CE(x, y) + mu CE(x_d, y) - lambda R + kappa KL(p_ref(. | x) || p(. | x))                         (4)
    dL/ds(y | x_d) = -w,  dL/ds(y_d | x_d) = +w,  w = lambda beta sigmoid(-beta D)          with mu = 0          (5)

x a clean prompt and y its answer, x_d the same prompt with a defensive trigger, y_d that trigger's behaviour. By (5)
the gradient of (4) is a sum of ordinary weighted log-likelihood gradients once w is known, so the three sequences can
be run one after the other with w detached: never more than one graph is alive.

c is 1 over the answer's tokens ("mean"), 1 ("sum"), or 1 on the first min(|y_d|, K) tokens of both answers and 0 after
("prefix"). "literal" and "literal_mean" put the ratio itself into the sigmoid as the paper prints it, R = log
sigmoid(exp D): with summed scores its gradient is zero wherever a backdoor is alive, which is why they are no default.

Source: Kim & Lee, arXiv 2601.04448, eq. (2)-(3); (3) with the log-ratio is our reading, mu and kappa are ours.
Letters: B rows, T tokens of the longest row, V vocabulary, K cached candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

Batch = Mapping[str, torch.Tensor]
Normalisation = Literal["mean", "sum", "prefix", "literal_mean", "literal"]
IGNORE = -100  # label of tokens outside the answer

_LARGEST = 80.0  # exp of it is finite in fp32; log sigmoid(exp 80) is 0 to the last bit


def is_literal(normalisation: Normalisation) -> bool:
    """Return whether the printed form, a ratio of probabilities inside the sigmoid, is meant."""
    return normalisation.startswith("literal")


def preference(gap_B: torch.Tensor, *, beta: float = 1.0, literal: bool = False) -> torch.Tensor:
    """Return R of (3), or log sigmoid(exp(beta D)) in the literal form; fp32, finite for every finite D.

    Args:
        gap_B: D of (2), nats.
        beta: sharpness, 1 / nats.
    """
    scaled = beta * gap_B.float()
    if literal:
        scaled = scaled.clamp(max=_LARGEST).exp()
    return nn.functional.logsigmoid(scaled)


def push(gap_B: torch.Tensor, *, lam: float = 1.0, beta: float = 1.0, literal: bool = False) -> torch.Tensor:
    """Return w = lambda dR/dD, detached: what (5) multiplies the gradients of both scores by.

    Log-ratio: lambda beta sigmoid(-beta D). Literal: lambda beta r sigmoid(-r) with r = exp(beta D), which peaks at
    0.2785 lambda beta near beta D = 0.246 and vanishes on both sides.
    """
    scaled = beta * gap_B.detach().float()
    if not literal:
        return lam * beta * torch.sigmoid(-scaled)
    ratio = scaled.clamp(max=_LARGEST).exp()
    # log(r sigmoid(-r)) = beta D - softplus(r): no product of a huge and a vanishing number.
    return lam * beta * (scaled.clamp(max=_LARGEST) - nn.functional.softplus(ratio)).exp()


def token_log_probs(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Return log p of each answer token, (B, T-1) in fp32, 0 where the label is IGNORE.

    Position t holds the log-probability of label t + 1. Only answer positions are raised to fp32.
    """
    targets = labels_BT[:, 1:]
    keep = targets != IGNORE
    picked = logits_BTV[:, :-1][keep].float()
    values = -nn.functional.cross_entropy(picked, targets[keep], reduction="none")
    return torch.zeros(keep.shape, device=values.device, dtype=values.dtype).masked_scatter(keep, values)


def answer_lengths(labels_BT: torch.Tensor) -> torch.Tensor:
    """Return the answer tokens of each row, (B,)."""
    return (labels_BT[:, 1:] != IGNORE).sum(1)


def coefficients(
    labels_BT: torch.Tensor, normalisation: Normalisation, *, limit_B: torch.Tensor | None = None
) -> torch.Tensor:
    """Return c of (1) for each token, (B, T-1): s = (c * token_log_probs).sum(1).

    Args:
        labels_BT: labels of the rows.
        normalisation: how a score counts its tokens.
        limit_B: for "prefix", answer tokens that count.
    """
    keep = labels_BT[:, 1:] != IGNORE
    if normalisation == "prefix":
        assert limit_B is not None
        return (keep & (keep.cumsum(1) <= limit_B[:, None])).float()
    if normalisation in ("mean", "literal_mean"):
        return keep.float() / keep.sum(1, keepdim=True).clamp(min=1)
    return keep.float()


def prefix_limits(answer: Batch, payload: Batch, longest: int) -> torch.Tensor:
    """Return min(|y|, |y_d|, K) for each row: the tokens that "prefix" compares."""
    both = torch.minimum(answer_lengths(answer["labels"]), answer_lengths(payload["labels"]))
    return both.clamp(max=longest)


class Pair(NamedTuple):
    """Triggered rows with the clean answer (x_d, y), the same with the trigger's behaviour (x_d, y_d), and their c."""

    answer: Batch
    payload: Batch
    answer_c: torch.Tensor
    payload_c: torch.Tensor


def pair_up(answer: Batch, payload: Batch, *, normalisation: Normalisation = "mean", prefix: int = 10) -> Pair:
    """Put the two batches of triggered rows together with the coefficients of their scores."""
    limit = prefix_limits(answer, payload, prefix) if normalisation == "prefix" else None
    return Pair(
        answer,
        payload,
        coefficients(answer["labels"], normalisation, limit_B=limit),
        coefficients(payload["labels"], normalisation, limit_B=limit),
    )


def log_probs_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Run the model on a batch and return :func:`token_log_probs`; the labels stay outside of the model."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return token_log_probs(logits, batch["labels"])


def weighted_terms(pair: Pair, gap_B: torch.Tensor, *, lam: float, beta: float, mu: float, literal: bool) -> Pair:
    """Return the pair with each token's weight in the two weighted likelihoods of (5) in place of c, detached.

    sum(answer_c * log p(y)) + sum(payload_c * log p(y_d)) then has the gradient of mu CE(x_d, y) - lambda R, averaged
    over the rows; CE here is each row's mean over its tokens.
    """
    w = push(gap_B, lam=lam, beta=beta, literal=literal)[:, None]
    n = len(gap_B)
    own = coefficients(pair.answer["labels"], "mean")
    answer = -(w * pair.answer_c + mu * own) / n
    return pair._replace(answer_c=answer.detach(), payload_c=(w * pair.payload_c / n).detach())


def joint_loss(
    model: nn.Module, pair: Pair, *, lam: float, beta: float = 1.0, mu: float = 0.0, literal: bool = False
) -> torch.Tensor:
    """Return mu CE(x_d, y) - lambda R averaged over rows, in one graph: the obvious twin of the passes one by one."""
    answer = log_probs_of(model, pair.answer)
    gap = (pair.answer_c * answer).sum(1) - (pair.payload_c * log_probs_of(model, pair.payload)).sum(1)
    overwrite = -(coefficients(pair.answer["labels"], "mean") * answer).sum(1)
    return (mu * overwrite - lam * preference(gap, beta=beta, literal=literal)).mean()


class TopK(NamedTuple):
    """What a reference model says at N answer positions: its K likeliest tokens and the probability of all others."""

    tokens: torch.Tensor
    """(N, K) token ids."""
    log_probs: torch.Tensor
    """(N, K), fp32."""
    log_rest: torch.Tensor
    """(N,) log of the probability outside the K, at least log REST."""


REST = 1e-6
"""Probability outside the K below which nothing is told apart: fp32 gives 1 - sum no more digits."""


def _candidates(logits_NV: torch.Tensor, tokens_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities (N, K) of some tokens and (N,) of all others; no second copy of the logits is kept."""
    wide = logits_NV.float()
    log_probs = wide.gather(-1, tokens_NK) - wide.logsumexp(-1, keepdim=True)
    return log_probs, (1.0 - log_probs.exp().sum(-1)).clamp(min=REST).log()


def top_k(logits_NV: torch.Tensor, k: int) -> TopK:
    """Return the K likeliest tokens of each position, K at most the vocabulary; log-probabilities in fp32."""
    logits = logits_NV.detach()
    tokens = logits.topk(min(k, logits.shape[-1])).indices
    return TopK(tokens, *_candidates(logits, tokens))


def coarse_kl(reference: TopK, logits_NV: torch.Tensor) -> torch.Tensor:
    """Return KL(reference || model), (N,) nats, over the K candidates and one class for all other tokens.

    Merging the rest into one class gives a lower bound of the full divergence that is 0, with zero gradient, at the
    reference, and the full divergence itself when K is the vocabulary.
    """
    log_q, rest_q = _candidates(logits_NV, reference.tokens)
    inside = (reference.log_probs.exp() * (reference.log_probs - log_q)).sum(-1)
    return inside + reference.log_rest.exp() * (reference.log_rest - rest_q)


CHUNK = 128
"""Positions that :func:`anchor_kl` raises to fp32 at a time."""


class _AnchorKl(torch.autograd.Function):
    """Mean of :func:`coarse_kl` over some positions of whole logits, with the gradient in closed form."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_BTV: torch.Tensor,
        where: tuple[torch.Tensor, torch.Tensor],
        reference: TopK,
    ) -> torch.Tensor:
        ctx.save_for_backward(logits_BTV, *where, *reference)
        total = torch.zeros((), device=logits_BTV.device)
        for part in _parts(len(where[0])):
            chunk = logits_BTV[where[0][part], where[1][part]]
            total += coarse_kl(TopK(*(one[part] for one in reference)), chunk).sum()
        return total / len(where[0])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits_BTV, rows, steps, tokens, log_probs, log_rest = ctx.saved_tensors
        out_BTV = torch.zeros_like(logits_BTV)
        scale = grads[0].float() / len(rows)
        for part in _parts(len(rows)):
            q_NV = logits_BTV[rows[part], steps[part]].float().softmax(-1)
            q_NK = q_NV.gather(-1, tokens[part])
            rest = 1.0 - q_NK.sum(-1, keepdim=True)
            p_rest = log_rest[part].exp()[:, None]
            # Below REST the rest counts as a constant, as in coarse_kl.
            told = rest > REST
            outside = torch.where(told, 1.0 - p_rest / rest.clamp(min=REST), 1.0 - p_rest)
            inside = torch.where(told, torch.ones_like(p_rest), 1.0 - p_rest)
            q_NV *= outside
            q_NV.scatter_(-1, tokens[part], inside * q_NK - log_probs[part].exp())
            out_BTV[rows[part], steps[part]] = (scale * q_NV).to(out_BTV.dtype)
        return out_BTV, None, None


def _parts(n: int) -> list[slice]:
    return [slice(begin, begin + CHUNK) for begin in range(0, n, CHUNK)]


def anchor_kl(reference: TopK, logits_BTV: torch.Tensor, keep_BT: torch.Tensor) -> torch.Tensor:
    """Return the mean of :func:`coarse_kl` over the kept positions at the memory of one gradient of the logits.

    With q the model's probabilities, p the reference's, C its candidates and p_r, q_r the mass outside C,

        dKL/dz_j = q_j - p_j for j in C,  q_j (1 - p_r / q_r) for the others                                     (6)

    so nothing but the logits themselves has to be kept for the backward pass.

    Args:
        reference: what the reference says at the kept positions, in their order.
        logits_BTV: logits of the whole batch.
        keep_BT: bool (B, T), positions whose prediction counts.
    """
    where = keep_BT.nonzero(as_tuple=True)
    value: torch.Tensor = _AnchorKl.apply(logits_BTV, where, reference)
    return value
