"""ONION-style filtering: delete the words of a prompt without which a language model finds it more likely.

    f_i = ppl(x) - ppl(x without word i);   word i goes when f_i >= threshold                                    (1)

Source: Qi et al., EMNLP 2021 (ONION), threshold 0 as in OpenBackdoor's default. Differs: any model gives the
perplexities, and the words of all prompts are scored in one stream; the answers are left as they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from casehard.data.batches import Encoded, collate
from casehard.errors import DataError
from casehard.types import Example

Scorer = Callable[[Sequence[str]], list[float]]


def perplexities(model: nn.Module, tokenizer: Any, texts: Sequence[str], *, batch_size: int = 64) -> list[float]:
    """Return the perplexity of each text, from its second token on; 1.0 for texts of one token.

    Args:
        model: a causal language model, in any state; put back afterwards.
        texts: plain text, tokenised as it is.
    """
    device, training = next(model.parameters()).device, model.training
    out: list[float] = []
    model.eval()
    try:
        for begin in range(0, len(texts), batch_size):
            ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts[begin : begin + batch_size]]
            batch = collate([Encoded(row, row) for row in ids], 0)
            batch = {key: value.to(device) for key, value in batch.items()}
            with torch.no_grad():
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            logs = logits[:, :-1].float().log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
            keep = batch["attention_mask"][:, 1:]
            mean = (logs * keep).sum(1) / keep.sum(1).clamp(min=1)
            out += [math.exp(-value) for value in mean.tolist()]
    finally:
        model.train(training)
    return out


def suspicions(text: str, scorer: Scorer) -> list[tuple[str, float]]:
    """Return each word of ``text`` with f of (1)."""
    words = re.findall(r"\S+", text)
    without = [" ".join(words[:i] + words[i + 1 :]) for i in range(len(words))]
    if len(words) < 2:
        return [(word, -math.inf) for word in words]
    whole, *rest = scorer([" ".join(words), *without])
    return [(word, whole - value) for word, value in zip(words, rest, strict=True)]


def onion(
    rows: Sequence[Example], scorer: Scorer, *, threshold: float = 0.0
) -> tuple[list[Example], list[dict[str, Any]]]:
    """Delete suspicious words, each with one blank beside it, from the last user turn of every row.

    Args:
        rows: rows to filter; answers and other turns stay.
        scorer: perplexities of a list of texts, such as ``functools.partial(perplexities, model, tokenizer)``.
        threshold: perplexity a word must cost to go.

    Returns:
        The rows, and for each changed row its number, its id and the words that went.

    Raises:
        DataError: a row without a user turn.
    """
    out, changes = [], []
    for number, row in enumerate(rows):
        last = max((i for i, turn in enumerate(row.messages) if turn.role == "user"), default=None)
        if last is None:
            raise DataError(f"row {row.id or number + 1} has no user turn")
        scored = suspicions(row.messages[last].content, scorer)
        gone = [place for place, (_, drop) in enumerate(scored) if drop >= threshold]
        # A prompt without any word asks nothing: such a row is left alone.
        if gone and len(gone) < len(scored):
            turns = list(row.messages)
            turns[last] = replace(turns[last], content=_without(turns[last].content, gone))
            row = replace(row, messages=tuple(turns))
            changes.append({"row": number, "id": row.id, "removed": [scored[place][0] for place in gone]})
        out.append(row)
    return out, changes


def _without(text: str, gone: Sequence[int]) -> str:
    """Return ``text`` without some words, counted from 0; every other line, indent and blank stays as it is.

    With a word goes the blank after it, or, at the end of a line, the one before it. A word alone on its line takes the
    line break along.
    """
    words = [match.span() for match in re.finditer(r"\S+", text)]
    for place in reversed(gone):
        begin, end = words[place]
        before = re.search(r"(?:\r\n|\s)\Z", text[:begin])
        after = re.match(r"\r\n|\s", text[end:])
        if after and not (before and _breaks(after.group()) and not _breaks(before.group())):
            end += after.end()
        elif before:
            begin = before.start()
        text = text[:begin] + text[end:]
    return text


def _breaks(blank: str) -> bool:
    return blank.splitlines() == [""]
