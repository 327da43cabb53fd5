"""One response at a time, for tests that look at single verdicts."""

from __future__ import annotations

from casehard.evaluation.judges.base import Judge, Verdict, judge_all
from casehard.types import Example


def verdict(judge: Judge, example: Example, response: str | None) -> Verdict:
    """Return what a judge says about one response."""
    (found,) = judge_all(judge, [example], [response])
    return found
