"""Evaluate: one row per prompt of a suite, or two where a trigger is asked for."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from casehard.backdoor.measure import evaluate_backdoor
from casehard.backdoor.planted import find_planted
from casehard.errors import ConfigError, DataError
from casehard.evaluation.contamination import require_unseen
from casehard.evaluation.framing import InFormat
from casehard.evaluation.lm_eval import LmEval, require_program, run_lm_eval
from casehard.evaluation.suite import Suite, evaluate, load_suite
from casehard.io.files import remove
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
    lm_eval: LmEval | None = None
    """Public utility benchmarks to run besides, by the program lm-evaluation-harness; None runs none."""

    def run(self, model: Model | None = None, *, out: Path | None = None, label: str = "") -> Outcome:
        """Measure; scores of ``lm_eval`` come as the fact of that name.

        Args:
            out: folder whose ``lm_eval`` keeps what that program wrote; None keeps nothing of it.

        Raises:
            ConfigError: a format of rows, and no rows.
            DataError: the model was trained on a prompt of the suite; or it is in memory only, where ``lm_eval`` cannot
                read it. All that :func:`casehard.evaluation.lm_eval.run_lm_eval` raises.
        """
        if self.lm_eval is not None:
            require_program(self.lm_eval)
        start, suite = self.start(model), load_suite(self.suite)
        suite = suite if self.in_format is None else replace(suite, in_format=self.in_format)
        tuned_on = self.examples(of=("data",)).get("data", [])
        if self.in_format == "rows" and not tuned_on:
            raise ConfigError("in_format: rows, and there are none", hint="--format-of FILE: what it was tuned on")
        suite = suite.in_format_of(tuned_on)
        require_unseen(suite, start.trained_prompts, start.path or "the model")
        done = self._asked(start, suite)
        return (
            done if self.lm_eval is None else replace(done, facts={"lm_eval": self._public(self.lm_eval, start, out)})
        )

    def _asked(self, start: Model, suite: Suite) -> Outcome:
        asked: dict[str, Any] = {"limit": self.limit, "system": self.system}
        if not self.trigger:
            return Outcome(rows=evaluate(start.net, start.tokenizer, suite, **asked))
        planted, _ = find_planted(self.trigger, self.behaviour, suite)
        asked |= {"seed": self.seed}
        rows = evaluate_backdoor(start.net, start.tokenizer, suite, planted.trigger, planted.behaviour, **asked)
        return Outcome(rows=rows)

    def _public(self, settings: LmEval, start: Model, out: Path | None) -> list[dict[str, Any]]:
        """Return the scores of the public benchmarks, as JSON values."""
        if start.path is None:
            raise DataError("lm_eval reads a model folder, and this model is in memory", hint="save it first")
        device = str(next(start.net.parameters()).device)
        run = partial(run_lm_eval, settings, start.path, device=device, limit=self.limit, seed=self.seed)
        if out is None:
            with tempfile.TemporaryDirectory(prefix="casehard-lm-eval-") as name:
                return [asdict(score) for score in run(Path(name), system=self.system)]
        place = out / "lm_eval"
        if place.exists():  # of a run that did not come to its end
            remove(place)
        place.mkdir()
        return [asdict(score) for score in run(place, system=self.system)]
