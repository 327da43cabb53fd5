"""Whether two models compute the same: their logits on one text, within what the precision of the weights allows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from casehard.errors import Refused

TEXT = (
    "A lighthouse keeper writes: 3 + 4 = 7, 1,250 km, 07:30.\n\n"
    "- Caf\u00e9, na\u00efve, \u65e5\u672c\u8a9e, \u041c\u043e\u0441\u043a\u0432\u0430 \U0001f30a\n"
    "def wave(x):\n    return [x ** 2 for _ in range(3)]\n"
    "Then she asked: what happens if the lamp goes out before the ships come home?"
)
"""Words, numbers, code, other scripts: what the weights and the tokenizer may differ on."""
_LOOSE = 8
"""Times the spacing of the stored numbers: rounding every weight of a deep network once stays well below."""
_FLOOR = 1e-4
_LENGTH = 128


class Agreement(NamedTuple):
    """How far the logits of two models differ on a text."""

    tokens: int
    largest: float
    """Largest absolute difference of a logit."""
    relative: float
    """Root mean square of the difference, over that of the logits about their mean."""
    allowed: float
    """What the relative difference may be."""


def probe_ids(tokenizer: Any, *, context: int | None = None) -> list[int]:
    """Return the tokens of the text, at most as many as the model has positions."""
    ids = list(tokenizer(TEXT, add_special_tokens=True)["input_ids"])
    return ids[: min(_LENGTH, context or _LENGTH)]


@torch.no_grad()
def probe(net: nn.Module, ids: list[int]) -> Tensor:
    """Return the logits (T, V) of T tokens, in float32 on the CPU."""
    device = next(net.parameters()).device
    logits: Tensor = net.eval()(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0]
    return logits.float().cpu()


def compare(source_TV: Tensor, made_TV: Tensor, stored: torch.dtype) -> Agreement:
    """Return how far two models differ.

    Args:
        source_TV: logits of T tokens over V words, see :func:`probe`.
        made_TV: those of the model made of it.
        stored: dtype that its weights are stored in.

    Raises:
        Refused: they differ by more than the dtype allows, or in size.
    """
    if source_TV.shape != made_TV.shape:
        what = f"the source gives logits of shape {tuple(source_TV.shape)}, what was made {tuple(made_TV.shape)}"
        raise Refused(what, hint="nothing was written; the source or its tokenizer is not what it says")
    difference = made_TV - source_TV
    scale = (source_TV - source_TV.mean(dim=-1, keepdim=True)).square().mean().sqrt().clamp_min(1e-12)
    found = Agreement(
        tokens=source_TV.shape[0],
        largest=float(difference.abs().max()),
        relative=float(difference.square().mean().sqrt() / scale),
        allowed=max(_FLOOR, _LOOSE * torch.finfo(stored).eps),
    )
    if not found.relative <= found.allowed:  # not a number is not below it either
        raise Refused(
            f"what was made computes something else than its source: logits differ by {found.relative:.2g} of their "
            f"spread (largest difference {found.largest:.3g}), where {str(stored).removeprefix('torch.')} allows "
            f"{found.allowed:.2g}",
            hint="nothing was written; import it as float32, or take the original weights",
        )
    return found
