"""Direct preference optimisation: the loss of pairs of answers, and the log-probabilities that it compares.

    l = -log sigmoid( beta [ (log pi(y+|x) - log ref(y+|x)) - (log pi(y-|x) - log ref(y-|x)) ] )                     (1)

y+ the preferred and y- the rejected answer to x, pi the model that is trained, ref the one it began from.

Letters: B rows in a batch, T tokens, V words. Source: Rafailov et al., arXiv 2305.18290, eq. 7.
"""

from __future__ import annotations

import torch
from torch.nn import functional

IGNORE = -100
"""Label of tokens that do not count, as in ``casehard.data.batches``."""


def answer_log_probs(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of each row's answer, (B,) in fp32: the sum over its tokens, in nats.

    Args:
        logits_BTV: what the model says after each token.
        labels_BT: the tokens themselves, IGNORE outside the answer.
    """
    targets = labels_BT[:, 1:]
    nats = functional.cross_entropy(
        logits_BTV[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORE, reduction="none"
    )
    return -nats.sum(1)


def margins(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return log pi - log ref of the preferred answer, less that of the rejected one, (B,).

    Args:
        policy: log-probabilities by the trained model, (2, B): preferred, rejected.
        reference: the same by the model it began from.
    """
    gained = policy - reference
    return gained[0] - gained[1]


def dpo_loss(margin: torch.Tensor, beta: float) -> torch.Tensor:
    """Return (1), mean over pairs.

    Args:
        margin: see :func:`margins`, (B,).
        beta: strength of the pull towards the reference, > 0; a small one lets the model go far.
    """
    return -functional.logsigmoid(beta * margin).mean()
