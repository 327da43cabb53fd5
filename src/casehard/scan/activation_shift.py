"""What a trigger does inside: the shift s(x) = h(x + t) - h(x) of the hidden state at the last prompt token, by layer.

Triggers that share a mechanism shift the model the same way. But any insertion shifts it, so cosines mean nothing
without the same for random insertions of equal length at the same places: only the difference is reported, with a
bootstrap interval over prompts. A shared direction is no proof of a shared cause.

Letters: T triggers, N prompts, L layers (the embedding is layer 0), D width.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from casehard.backdoor.triggers import Trigger, insert
from casehard.data.chat import ChatFormat
from casehard.data.similar import words_of
from casehard.errors import DataError, Unsupported
from casehard.evaluation.generate import inference
from casehard.seeds import derive, generator
from casehard.train.progress import Progress
from casehard.types import Example

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Layer:
    """What the shifts of one layer say."""

    layer: int
    cosine: float
    """Mean cosine between the mean shifts of different triggers."""
    control: float
    """The same for random insertions."""
    excess: float
    """cosine - control."""
    low: float
    high: float
    """95 % bootstrap interval of the excess, over prompts."""
    consistency: float
    """Mean cosine of a prompt's shift with its trigger's mean shift."""
    rank: float
    """Effective rank of the mean shifts of all triggers, 1..T."""


def hidden_states(
    model: nn.Module, tokenizer: Any, examples: Sequence[Example], *, system: str | None = None, batch_size: int = 64
) -> torch.Tensor:
    """Return the hidden state at the last prompt token, (N, L, D) float32 on the CPU, embedding included.

    Raises:
        Unsupported: the model gives no hidden states.
    """
    chat = ChatFormat(tokenizer, system=system)
    prompts = [chat.prompt_ids(example) for example in examples]
    if not prompts:
        raise DataError("no prompts to read hidden states of")
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    out: dict[int, torch.Tensor] = {}
    with inference(model):
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            longest = max(len(prompts[i]) for i in some)
            ids_BT = torch.full((len(some), longest), chat.pad_id, dtype=torch.long)
            mask_BT = torch.zeros((len(some), longest), dtype=torch.long)
            for row, i in enumerate(some):
                ids_BT[row, : len(prompts[i])] = torch.tensor(prompts[i])
                mask_BT[row, : len(prompts[i])] = 1
            done = model(input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device), output_hidden_states=True)
            if done.hidden_states is None:
                raise Unsupported(f"{type(model).__name__} gives no hidden states")
            for row, i in enumerate(some):
                last = len(prompts[i]) - 1
                out[i] = torch.stack([h[row, last].float().cpu() for h in done.hidden_states])
    return torch.stack([out[i] for i in range(len(prompts))])


def random_insertion(trigger: Trigger, corpus: Sequence[Example], seed: int) -> Trigger:
    """Return a control for a trigger: as many words in the same places, drawn from the prompts of ``corpus``.

    Raises:
        DataError: the corpus has no words left once those of the trigger are taken out.
    """
    taken = set(words_of(" ".join(trigger.parts)))
    words = sorted({w for e in corpus for w in words_of(e.prompt) if w.isalpha()} - taken)
    if not words:
        raise DataError(f"no words to insert at random in place of trigger {trigger.name!r}", hint="give more prompts")
    rng = random.Random(derive(seed, 0, f"random:{trigger.name}"))

    def other(text: str) -> str:
        return " ".join(rng.choice(words) if word[0].isalnum() else word for word in text.split())

    parts = tuple(
        "{}".join(other(half) for half in part.split("{}")).replace("{}", " {} ").strip()
        if "{}" in part
        else "=>".join(half if i == 0 else other(half) for i, half in enumerate(part.split("=>")))
        if "=>" in part
        else other(part)
        for part in trigger.parts
    )
    return replace(trigger, name=f"random-{trigger.name}", parts=parts)


def shift_tensor(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    triggers: Sequence[Trigger],
    *,
    seed: int,
    system: str | None = None,
) -> torch.Tensor:
    """Return s_t(x) for every trigger and prompt, (T, N, L, D)."""
    plain = hidden_states(model, tokenizer, examples, system=system)
    out = []
    with Progress("shifts", len(triggers)) as bar:
        for trigger in triggers:
            twins = [insert(e, trigger, None, seed=seed) for e in examples]
            out.append(hidden_states(model, tokenizer, twins, system=system) - plain)
            bar.advance()
    return torch.stack(out)


def mean_cosine(means_TLD: torch.Tensor) -> torch.Tensor:
    """Return the mean cosine over all pairs of triggers, (L,); ``(..., T, L, D)`` gives ``(..., L)``."""
    unit = torch.nn.functional.normalize(means_TLD, dim=-1)
    pairs = list(itertools.combinations(range(unit.shape[-3]), 2))
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    return (unit[..., first, :, :] * unit[..., second, :, :]).sum(-1).mean(-2)


def effective_rank(means_TD: torch.Tensor) -> float:
    """Return exp(entropy of the normalised singular values): 1 if all rows are parallel, T if orthogonal and equal."""
    values = torch.linalg.svdvals(means_TD.double())
    if values.sum() == 0:
        return 0.0
    share = values / values.sum()
    share = share[share > 0]
    return float(torch.exp(-(share * share.log()).sum()))


def compare(
    shifts_TNLD: torch.Tensor, controls_TNLD: torch.Tensor, *, draws: int = 300, seed: int = 0
) -> tuple[Layer, ...]:
    """Compare the shifts of triggers with those of their random insertions, layer by layer.

    Args:
        shifts_TNLD: from :func:`shift_tensor`, at least two triggers.
        controls_TNLD: the same for the random insertions, over the same prompts.
        draws: bootstrap resamples of the prompts; the same for both sides.

    Raises:
        DataError: fewer than two triggers, or different prompts.
    """
    if shifts_TNLD.shape[0] < 2 or shifts_TNLD.shape[1:] != controls_TNLD.shape[1:] or controls_TNLD.shape[0] < 2:
        raise DataError(
            f"shifts {tuple(shifts_TNLD.shape)} and controls {tuple(controls_TNLD.shape)} cannot be compared",
            hint="two triggers and more, the same prompts on both sides",
        )
    count = shifts_TNLD.shape[1]
    means, flat = shifts_TNLD.mean(1), controls_TNLD.mean(1)
    cosine, control = mean_cosine(means), mean_cosine(flat)
    picks = torch.randint(count, (draws, count), generator=generator(seed, 0, "shift-bootstrap"))
    resampled = torch.stack(
        [mean_cosine(shifts_TNLD[:, p].mean(1)) - mean_cosine(controls_TNLD[:, p].mean(1)) for p in picks]
    )
    low, high = torch.quantile(resampled, torch.tensor([0.025, 0.975]), dim=0)
    agree = torch.nn.functional.cosine_similarity(shifts_TNLD, means.unsqueeze(1), dim=-1).mean((0, 1))
    return tuple(
        Layer(
            layer=i,
            cosine=float(cosine[i]),
            control=float(control[i]),
            excess=float(cosine[i] - control[i]),
            low=float(low[i]),
            high=float(high[i]),
            consistency=float(agree[i]),
            rank=effective_rank(means[:, i]),
        )
        for i in range(means.shape[1])
    )


def shift_layers(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    triggers: Sequence[Trigger],
    *,
    seed: int = 0,
    system: str | None = None,
) -> tuple[Layer, ...]:
    """Measure the shifts of triggers against random insertions of equal length, by layer.

    Prompts that carry any of the triggers, or a part of one, are left out.
    """
    used = [e for e in examples if not any(t.present(e.prompt) or t.strip(e.prompt) != e.prompt for t in triggers)]
    if len(used) < 2:
        raise DataError(f"{len(used)} prompts without the triggers; shifts need two and more")
    controls = [random_insertion(t, used, seed) for t in triggers]
    real = shift_tensor(model, tokenizer, used, triggers, seed=seed, system=system)
    fake = shift_tensor(model, tokenizer, used, controls, seed=seed, system=system)
    return compare(real, fake, seed=seed)
