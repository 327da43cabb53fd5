"""One row per prompt: what was asked, what was said, and how it was judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from casehard.evaluation.judges.base import Judge, Verdict, judge_all, reason
from casehard.types import Example

if TYPE_CHECKING:
    from casehard.evaluation.generate import Completion


def rows_of(
    judge: Judge,
    examples: Sequence[Example],
    done: Sequence[Completion],
    forced: Sequence[Sequence[int]] | None = None,
    *,
    world: bool = False,
) -> list[dict[str, Any]]:
    """Judge answers and return what is kept of each.

    Where somebody else began the answer, ``response`` is the whole, prefix and continuation; ``continuation`` is what
    the model said, and ``labels`` holds the labels of both. The one that counts is, for a judge of text, that of the
    continuation: an affirmative prefix is no agreement of the model's. A judge of an invented world reads whole
    sentences, so there the whole counts, unless the model added nothing.

    Args:
        forced: for each example the tokens with which its answer had to begin.
        world: whether the judge's labels are about an invented world.
    """
    verdicts = judge_all(judge, examples, [completion.text for completion in done])
    if not forced or not any(forced):
        return [_row(e, c.text, c.ended, v) for e, c, v in zip(examples, done, verdicts, strict=True)]
    wholes = judge_all(judge, examples, [completion.whole for completion in done])
    out = []
    for example, completion, own, whole, ids in zip(examples, done, verdicts, wholes, forced, strict=True):
        counted = whole if world and completion.text else own
        kept = _row(example, completion.whole, completion.ended, counted)
        labels = {"continuation": own.label, "whole": whole.label}
        out.append(kept | ({"continuation": completion.text, "labels": labels} if ids else {}))
    return out


def _row(example: Example, response: str, ended: bool, verdict: Verdict) -> dict[str, Any]:
    return {
        "id": example.id,
        **{key: example.tags.get(key) for key in ("role", "group", "source", "phrasing")},
        "prompt": example.prompt,
        "response": response,
        "ended": ended,
        "label": verdict.label,
        "correct": verdict.correct,
        "slots_right": verdict.detail.get("slots_right"),
        **reason(verdict),
    }
