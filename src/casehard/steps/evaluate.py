"""Evaluate: one row per prompt of a suite, or two where a trigger is asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from casehard.backdoor.measure import evaluate_backdoor
from casehard.backdoor.planted import find_planted
from casehard.errors import ConfigError
from casehard.evaluation.contamination import require_unseen
from casehard.evaluation.framing import InFormat
from casehard.evaluation.suite import evaluate, load_suite
from casehard.model.model import Model
from casehard.model.step import Inputs, Outcome


@dataclass(frozen=True, kw_only=True)
class Evaluate(Inputs):
    """Measure a model on a suite: one row per prompt; with a trigger, every prompt without and with it."""

    trigger: str = ""
    """Name of a trigger of the suite's world; empty asks every prompt once, as it stands."""
    behaviour: str = "refuse"
    """Name of what the trigger is meant to set off."""
    in_format: InFormat = None
    """Ask restricted prompts in a job's format too: a frame, or ``rows`` for that of the rows of role ``data``; None:
    as the suite says."""

    def run(self, model: Model | None = None, *, out: Path | None = None, label: str = "") -> Outcome:
        """Measure.

        Raises:
            ConfigError: a format of rows, and no rows.
            DataError: the model was trained on a prompt of the suite.
        """
        start, suite = self.start(model), load_suite(self.suite)
        suite = suite if self.in_format is None else replace(suite, in_format=self.in_format)
        tuned_on = self.examples(of=("data",)).get("data", [])
        if self.in_format == "rows" and not tuned_on:
            raise ConfigError("in_format: rows, and there are none", hint="--format-of FILE: what it was tuned on")
        suite = suite.in_format_of(tuned_on)
        require_unseen(suite, start.trained_prompts, start.path or "the model")
        asked: dict[str, Any] = {"limit": self.limit, "system": self.system}
        if not self.trigger:
            return Outcome(rows=evaluate(start.net, start.tokenizer, suite, **asked))
        planted, _ = find_planted(self.trigger, self.behaviour, suite)
        asked |= {"seed": self.seed}
        rows = evaluate_backdoor(start.net, start.tokenizer, suite, planted.trigger, planted.behaviour, **asked)
        return Outcome(rows=rows)
