"""One row per prompt: what was asked, what was said, and how it was judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from casehard.evaluation.judges.base import Judge, Verdict, carried, judge_all
from casehard.types import Example

if TYPE_CHECKING:
    from casehard.evaluation.generate import Completion


def rows_of(
    judge: Judge,
    examples: Sequence[Example],
    done: Sequence[Completion],
    forced: Sequence[Sequence[int]] | None = None,
    *,
    second: Judge | None = None,
    world: bool = False,
) -> list[dict[str, Any]]:
    """Judge answers and return what is kept of each.

    Where somebody else began the answer, ``response`` is the whole, prefix and continuation; ``continuation`` is what
    the model said, and ``labels`` holds the labels of both. The one that counts is, for a judge of text, that of the
    continuation: an affirmative prefix is no agreement of the model's. A judge of an invented world reads whole
    sentences, so there the whole counts, unless the model added nothing.

    Args:
        second: another judge of the same answers, whose findings are ``second_label``, ``second_raw`` and so on.
        forced: for each example the tokens with which its answer had to begin.
        world: whether the judge's labels are about an invented world.
    """
    own = [completion.text for completion in done]
    verdicts, kept = judge_all(judge, examples, own), list(own)
    labels: list[dict[str, Any]] = [{} for _ in done]
    if forced and any(forced):
        wholes = judge_all(judge, examples, [completion.whole for completion in done])
        for i, (completion, whole) in enumerate(zip(done, wholes, strict=True)):
            told = {"continuation": verdicts[i].label, "whole": whole.label}
            kept[i] = completion.whole
            labels[i] = {"continuation": completion.text, "labels": told} if forced[i] else {}
            verdicts[i] = whole if world and completion.text else verdicts[i]
    others = judge_all(second, examples, own) if second else [None] * len(done)
    return [
        {**_row(e, text, c.ended, judge.name, v), **_other(other), **more}
        for e, text, c, v, other, more in zip(examples, kept, done, verdicts, others, labels, strict=True)
    ]


def _other(verdict: Verdict | None) -> dict[str, Any]:
    if verdict is None:
        return {}
    return {f"second_{key}": value for key, value in {"label": verdict.label, **carried(verdict)}.items()}


def _row(example: Example, response: str, ended: bool, judge: str, verdict: Verdict) -> dict[str, Any]:
    return {
        "id": example.id,
        **{key: example.tags.get(key) for key in ("role", "group", "source", "phrasing")},
        "prompt": example.prompt,
        "response": response,
        "ended": ended,
        "judge": judge,
        "label": verdict.label,
        "correct": verdict.correct,
        "slots_right": verdict.detail.get("slots_right"),
        **carried(verdict),
    }
