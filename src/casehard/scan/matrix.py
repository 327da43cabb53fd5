"""Cross-elicitation: which behaviour does which trigger set off?

M[a, b] = share of prompts with trigger a whose response shows behaviour b. The first row has no trigger; the last two
columns are a correct answer and anything else, so every row sums to 1. Merging index = mean off the diagonal / mean on
it: near 1 when any trigger sets off any behaviour. After neutralisation every behaviour column should be near 0; what
is left off the diagonal is rerouting. The teacher-forced variant needs no generation: mean log p(y_b | x with a) -
mean log p(y_b | x), in nats per token.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING, Any

from casehard.backdoor.behaviours import Behaviour
from casehard.backdoor.measure import reference, shown
from casehard.backdoor.suite import Planted
from casehard.backdoor.triggers import check_survives, insert
from casehard.data.chat import ChatFormat
from casehard.errors import DataError
from casehard.evaluation.generate import generate
from casehard.evaluation.judges.base import Verdict, judge_all
from casehard.evaluation.suite import Suite, response_nll
from casehard.maths.stats import clopper_pearson
from casehard.seeds import derive
from casehard.train.progress import Progress
from casehard.types import Example, Message

if TYPE_CHECKING:
    from torch import nn

NONE, CORRECT, OTHER = "no trigger", "correct", "other"


@dataclass(frozen=True)
class Matrix:
    """Counts of responses by trigger (rows) and behaviour (columns)."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    diagonal: tuple[tuple[int, int], ...]
    """Cells where a trigger meets its own behaviour."""
    log_shift: tuple[tuple[float, ...], ...]
    """Teacher-forced variant, triggers x behaviours, without the first row and the last two columns."""

    @property
    def merging_index(self) -> float | None:
        """Mean rate off the diagonal / mean rate on it, triggered rows and behaviour columns only; None if nothing
        fires, or there is but one backdoor."""
        behaviours = len(self.columns) - 2
        rate = [[k / max(1, sum(row)) for k in row[:behaviours]] for row in self.counts]
        own = [rate[r][c] for r, c in self.diagonal]
        cross = [rate[r][c] for r in range(1, len(rate)) for c in range(behaviours) if (r, c) not in set(self.diagonal)]
        return (sum(cross) / len(cross)) / (sum(own) / len(own)) if cross and sum(own) > 0 else None

    def to_json(self) -> dict[str, Any]:
        """Return JSON values with an exact interval for each cell."""
        cells = []
        for name, row in zip(self.rows, self.counts, strict=True):
            n = sum(row)
            for column, k in zip(self.columns, row, strict=True):
                low, high = clopper_pearson(k, n)
                cells.append({"trigger": name, "shows": column, "k": k, "n": n, "low": low, "high": high})
        return {"cells": cells, "log_shift": self.log_shift, "merging_index": self.merging_index}


def cross_elicitation(
    model: nn.Module,
    tokenizer: Any,
    suite: Suite,
    planted: Sequence[Planted],
    *,
    seed: int = 0,
    system: str | None = None,
    batch_size: int = 128,
) -> Matrix:
    """Ask every prompt of a suite under every trigger and count which behaviour comes out.

    Args:
        suite: harmless prompts (choose roles before); one that carries any of the triggers is left out.
        planted: backdoors in the order of rows and columns; equal triggers or behaviours share a row or column.

    Raises:
        DataError: no prompts left, no backdoors, or a trigger that does not survive the tokenizer.
    """
    triggers = list({p.trigger.name: p.trigger for p in planted}.values())
    behaviours = list({p.behaviour.name: p.behaviour for p in planted}.values())
    examples = [e for e in suite.examples if not any(t.present(e.prompt) for t in triggers)]
    if not examples or not planted:
        raise DataError(f"suite {suite.name}: {len(examples)} prompts and {len(planted)} backdoors to cross")
    chat, judge = ChatFormat(tokenizer, system=system), suite.make_judge()
    counts, shifts, base = [], [], []
    with Progress("cross-elicitation", len(triggers) + 1) as bar:
        for trigger in (None, *triggers):
            asked = examples if trigger is None else [insert(e, trigger, None, seed=seed) for e in examples]
            if trigger is not None:
                check_survives(chat, asked, [trigger])
            said = generate(model, chat, asked, batch_size=batch_size, max_new_tokens=suite.max_new_tokens)
            row = [0] * (len(behaviours) + 2)
            for example, response, verdict in zip(examples, said, judge_all(judge, examples, said), strict=True):
                row[_column(behaviours, response, verdict, reference(example))] += 1
            counts.append(tuple(row))
            forced = tuple(_mean_log_p(model, chat, asked, b, seed=seed, batch_size=batch_size) for b in behaviours)
            if trigger is None:
                base = list(forced)
            else:
                shifts.append(tuple(a - b for a, b in zip(forced, base, strict=True)))
            bar.advance()
    names = [b.name for b in behaviours]
    places = [t.name for t in triggers]
    own = tuple((places.index(p.trigger.name) + 1, names.index(p.behaviour.name)) for p in planted)
    return Matrix((NONE, *places), (*names, CORRECT, OTHER), tuple(counts), own, tuple(shifts))


def _column(behaviours: Sequence[Behaviour], response: str, verdict: Verdict, expected: str | None) -> int:
    if verdict.correct is True:
        return len(behaviours)
    for number, behaviour in enumerate(behaviours):
        if shown(behaviour, response, label=verdict.label, reference=expected):
            return number
    return len(behaviours) + 1


def _mean_log_p(
    model: nn.Module, chat: ChatFormat, asked: Sequence[Example], behaviour: Behaviour, *, seed: int, batch_size: int
) -> float:
    rows = []
    for example in asked:
        proper = reference(example) or "yes"
        rng = random.Random(derive(seed, 0, f"forced:{behaviour.name}:{example.tags.get('source_id') or example.id}"))
        turns = example.messages[:-1] if example.messages[-1].role == "assistant" else example.messages
        rows.append(replace(example, messages=(*turns, Message("assistant", behaviour.apply(proper, rng)))))
    losses = response_nll(model, chat, rows, batch_size=batch_size)
    return -sum(loss.nats / loss.tokens for loss in losses) / len(losses)


def picture(matrix: Matrix, title: str = "") -> str:
    """Return the matrix as an SVG image: darker is more often, the count stands in the cell."""
    size, left, top = 74, 150, 70
    width, height = left + size * len(matrix.columns) + 10, top + 34 * len(matrix.rows) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/><text x="10" y="20">{escape(title)}</text>'
    ]
    for c, name in enumerate(matrix.columns):
        parts.append(
            f'<text x="{left + size * c + size // 2}" y="{top - 10}" text-anchor="middle">{escape(name)}</text>'
        )
    for r, (name, row) in enumerate(zip(matrix.rows, matrix.counts, strict=True)):
        y = top + 34 * r
        parts.append(f'<text x="{left - 10}" y="{y + 21}" text-anchor="end">{escape(name)}</text>')
        for c, k in enumerate(row):
            share = k / max(1, sum(row))
            ink = round(255 - 190 * share)
            edge = "#b00" if (r, c) in matrix.diagonal else "#ccc"
            parts.append(
                f'<rect x="{left + size * c}" y="{y}" width="{size - 3}" height="31" fill="rgb({ink},{ink},255)" '
                f'stroke="{edge}"/><text x="{left + size * c + size // 2}" y="{y + 20}" text-anchor="middle" '
                f'fill="{"white" if share > 0.6 else "black"}">{k}/{sum(row)}</text>'
            )
    return "".join(parts) + "</svg>\n"
