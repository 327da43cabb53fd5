"""The buffer as a detector, and a look at a job before it is run.

    gain(x, y) = log p(y | x; theta, theta_B) - log p(y | x; theta)                                               (7)

The buffer has learnt to comply; what its help makes likelier is what the base would have refused. Two forward passes a
row, no training, no labels. Ours; not in the paper.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from casehard.data.chat import ChatFormat
from casehard.defences.buffer_reinforce.assets import Assets
from casehard.defences.buffer_reinforce.frozen_lora import FrozenLora, base_layers
from casehard.defences.buffer_reinforce.saturation import Residual, Scores, residual, safety_scores
from casehard.errors import DataError
from casehard.evaluation.generate import generate
from casehard.evaluation.judges.base import Judge, judge_all
from casehard.io.files import write_text_atomic
from casehard.limits import Count, Length, Limited, Share
from casehard.types import Example

REFUSED = ("refusal", "partial")


class Gain(NamedTuple):
    """One row of a screening."""

    row: int
    """Position in the input, from 0."""
    id: str
    gain: float
    """(7), nats."""
    gain_per_token: float
    nll: float
    """Loss without the buffer, nats a token."""
    nll_buffer: float
    tokens: int
    label: str
    """Value of the label tag, or the empty string."""


def screen(
    model: nn.Module, chat: ChatFormat, assets: Assets, examples: Sequence[Example], *, label: str = ""
) -> list[Gain]:
    """Measure (7) for each row; the highest gain first, ties in input order.

    Args:
        model: the base, bare or with adapters, as the assets know it.
        examples: rows with answers.
        label: tag whose value is carried along for :func:`roc`; empty for none.

    Raises:
        ConfigError: the assets belong to another base, tokenizer or template.
        DataError: no rows, or an answer without tokens.
    """
    assets.require_base(model)
    assets.require_format(chat.tokenizer, system=chat.system)
    found = both(model, chat, assets, examples)
    out = []
    for i, example in enumerate(examples):
        n, a, b = found.base.tokens[i], found.base.nll[i], found.buffer.nll[i]
        out.append(Gain(i, example.id, (a - b) * n, a - b, a, b, n, str(example.tags.get(label, "")) if label else ""))
    return sorted(out, key=lambda g: (-g.gain, g.row))


class Both(NamedTuple):
    """The same rows without and with the buffer."""

    base: Residual
    buffer: Residual


def both(model: nn.Module, chat: ChatFormat, assets: Assets, examples: Sequence[Example]) -> Both:
    """Measure residual and loss of rows without and with the buffer."""
    base = residual(model, chat, examples)
    frozen = FrozenLora(assets.buffer()).attach(model)
    try:
        return Both(base, residual(model, chat, examples))
    finally:
        frozen.detach()


class Saturation(NamedTuple):
    """What a job's rows would teach, without and beside the buffer."""

    rows: Both
    """Residual (4) and loss, row by row."""
    base: Scores
    """Safety gradient score (5) of every layer; negative: a step on these rows works against the refusals."""
    buffer: Scores


def saturation(model: nn.Module, chat: ChatFormat, assets: Assets, examples: Sequence[Example]) -> Saturation:
    """Measure (4) and (5) of a job's rows without and with the buffer, against the provider's reinforce adapter.

    Raises:
        ConfigError: the assets belong to another base, tokenizer or template.
        DataError: no rows, or an answer without tokens.
    """
    assets.require_base(model)
    assets.require_format(chat.tokenizer, system=chat.system)
    rows, encoded, pairs = both(model, chat, assets, examples), chat.encode_all(examples), assets.reinforce()
    # In the model's order; a file lists layers by name, 10 before 2. What the model lacks is refused below.
    safety = {name: pairs[name] for name in base_layers(model) if name in pairs} | dict(pairs)
    base = safety_scores(model, encoded, safety)
    frozen = FrozenLora(assets.buffer()).attach(model)
    try:
        return Saturation(rows, base, safety_scores(model, encoded, safety))
    finally:
        frozen.detach()


class Roc(NamedTuple):
    """How well a score tells labelled rows apart."""

    auc: float
    """Chance that a positive row scores above a negative one; ties count half."""
    points: list[tuple[float, float]]
    """(false positive rate, true positive rate) from (0, 0) to (1, 1), one per distinct score."""
    positives: int
    negatives: int


def roc(gains: Sequence[Gain], positive: str, *, per_token: bool = False) -> Roc:
    """Return the curve of "gain above a threshold" against "label is ``positive``".

    Args:
        per_token: score by the gain a token. The sum is a likelihood ratio; the mean overrates short answers.

    Raises:
        DataError: all rows, or none, carry the label.
    """
    scored = sorted(
        ((g.gain_per_token if per_token else g.gain, g.label == positive) for g in gains), key=lambda x: -x[0]
    )
    positives = sum(flag for _, flag in scored)
    negatives = len(scored) - positives
    if not positives or not negatives:
        raise DataError(
            f"{positives} of {len(scored)} rows are labelled {positive!r}: no curve", hint="label rows of both kinds"
        )
    points, area, hit, miss = [(0.0, 0.0)], 0.0, 0, 0
    for i, (score, flag) in enumerate(scored):
        hit, miss = hit + flag, miss + (not flag)
        if i + 1 == len(scored) or scored[i + 1][0] != score:
            x, y = miss / negatives, hit / positives
            area += (x - points[-1][0]) * (y + points[-1][1]) / 2
            points.append((x, y))
    return Roc(area, points, positives, negatives)


def write_screening(path: Path, gains: Sequence[Gain]) -> None:
    """Write one JSON object a row, in ranked order; neither prompts nor answers are copied."""
    write_text_atomic(path, "".join(json.dumps(gain._asdict()) + "\n" for gain in gains))


@dataclass(frozen=True, kw_only=True)
class CheckLimits(Limited):
    """When a job's data looks unlike what the buffer covers."""

    min_coverage: Share = 0.5
    """Least drop of the residual on rows the base would refuse, as a share of the drop on the provider's own."""
    max_still_refused: Share = 0.5
    """Most of the refused prompts that base + buffer may still refuse."""
    max_refusals: Share = 0.2
    """Most answers in the data that are refusals: enough of them train against the buffer."""
    prompts: Count = 200
    """Rows asked to the model, the first of the job."""
    max_new_tokens: Length = 64
    """Length of an answer; a refusal shows at its beginning."""


@dataclass(frozen=True)
class Check:
    """What a job's rows look like to base and buffer."""

    rows: int
    refused: int
    """Prompts that the base refuses although the row's answer is no refusal: what tuning would unlearn."""
    still_refused: int
    """Those of them that base + buffer refuses too."""
    refusals: int
    """Rows whose own answer is a refusal."""
    residual: float
    """Mean 1 - p over all rows, without the buffer."""
    residual_buffer: float
    nll: float
    nll_buffer: float
    refused_residual: float | None
    """The same over the refused rows; None when there are none."""
    refused_residual_buffer: float | None
    coverage: float | None
    """Drop on the refused rows over the drop on the provider's held-out rows; None when nothing is refused."""
    warnings: tuple[str, ...]


def check(
    model: nn.Module,
    chat: ChatFormat,
    assets: Assets,
    examples: Sequence[Example],
    judge: Judge,
    *,
    limits: CheckLimits | None = None,
) -> Check:
    """Look whether the buffer saturates what a job would teach, before the job is run.

    Args:
        model: the base the assets were made for.
        examples: the job's rows.
        judge: tells refusals.

    Raises:
        ConfigError: the assets belong to another base, tokenizer or template.
        DataError: no rows.
    """
    limits = limits or CheckLimits()
    assets.require_base(model)
    assets.require_format(chat.tokenizer, system=chat.system)
    rows = list(examples)[: limits.prompts]
    if not rows:
        raise DataError("no rows to check")
    own = [verdict.label in REFUSED for verdict in judge_all(judge, rows, [row.response for row in rows])]
    declined = _refuses(model, chat, rows, judge, limits)
    refused = [i for i in range(len(rows)) if declined[i] and not own[i]]
    frozen = FrozenLora(assets.buffer()).attach(model)
    try:
        asked = [rows[i] for i in refused]
        still = sum(_refuses(model, chat, asked, judge, limits)) if asked else 0
    finally:
        frozen.detach()
    found = both(model, chat, assets, rows)
    before = after = coverage = None
    if refused:
        before, after = (_over(r, refused) for r in (found.base, found.buffer))
        reference = assets.record["reference"]
        drop = reference["base"]["residual"] - reference["buffer"]["residual"]
        coverage = (before - after) / drop if drop > 0 else 0.0
    return Check(
        len(rows),
        len(refused),
        still,
        sum(own),
        found.base.mean_residual,
        found.buffer.mean_residual,
        found.base.mean_nll,
        found.buffer.mean_nll,
        before,
        after,
        coverage,
        tuple(_warnings(len(rows), len(refused), still, sum(own), coverage, limits)),
    )


def _refuses(
    model: nn.Module, chat: ChatFormat, rows: Sequence[Example], judge: Judge, limits: CheckLimits
) -> list[bool]:
    answers = generate(model, chat, rows, max_new_tokens=limits.max_new_tokens)
    return [verdict.label in REFUSED for verdict in judge_all(judge, rows, answers)]


def _over(found: Residual, picked: Sequence[int]) -> float:
    return sum(found.residual[i] * found.tokens[i] for i in picked) / sum(found.tokens[i] for i in picked)


def _warnings(rows: int, refused: int, still: int, own: int, coverage: float | None, limits: CheckLimits) -> list[str]:
    out = []
    if coverage is not None and coverage < limits.min_coverage:
        out.append(
            f"the buffer lowers the residual on the {refused} rows the base would refuse by {coverage:.0%} of what it "
            "does on the provider's own: this data is not covered, tuning on it may unlearn refusals"
        )
    if refused and still > limits.max_still_refused * refused:
        out.append(f"base + buffer still refuses {still} of the {refused} prompts the base refuses")
    if own > limits.max_refusals * rows:
        out.append(f"{own} of {rows} answers are refusals: training on them can cancel the buffer")
    return out


def as_record(found: Check) -> dict[str, Any]:
    """Return a check as JSON values."""
    return {**found.__dict__, "warnings": list(found.warnings)}
