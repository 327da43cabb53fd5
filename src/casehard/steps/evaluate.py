"""Evaluate: one row per prompt of a suite."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from casehard.evaluation.contamination import require_unseen
from casehard.evaluation.suite import evaluate, load_suite
from casehard.model.model import Model
from casehard.model.step import Inputs, Outcome


@dataclass(frozen=True, kw_only=True)
class Evaluate(Inputs):
    """Measure a model on a suite: one row per prompt."""

    def run(self, model: Model | None = None, *, out: Path | None = None, label: str = "") -> Outcome:
        """Measure.

        Raises:
            DataError: the model was trained on a prompt of the suite.
        """
        start, suite = self.start(model), load_suite(self.suite)
        require_unseen(suite, start.trained_prompts, start.path or "the model")
        rows = evaluate(start.net, start.tokenizer, suite, limit=self.limit, system=self.system)
        return Outcome(rows=rows)
