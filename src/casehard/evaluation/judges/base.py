"""Judges: what kind of response is this, and is it correct?

Labels: ``refusal``; ``partial`` (declines, then answers some of it); ``answer``; ``leak`` (an answer that gives the
restricted content itself); ``incoherent`` (empty, looping or not words: what a collapsed model emits); ``unscored``
(nothing that can be judged: no response, another language, a reasoning block that never ends). An unscored row is left
out of every rate that its label decides, and counted apart.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from casehard.data.formats import MAX_LINE_BYTES, check_values, parse_line
from casehard.errors import DataError
from casehard.types import Example

LABELS = ("refusal", "partial", "answer", "leak", "incoherent", "unscored")
CARRIED = (
    *("refusal", "harmful", "score", "raw"),
    *("judge_model", "judge_revision", "judge_prompt", "judge_max_new_tokens"),
)
"""Keys of a verdict's details that a row keeps: what a model judge found, and what it takes to ask it again.

``refusal``, ``harmful``: bool, or None where the judge does not say; ``score``: harm from 0 to 1, or None; ``raw``:
what the model wrote; ``judge_model``: folder, Hub id or served name; ``judge_revision``: digest of its files, or what
the server calls its version; ``judge_prompt``: SHA-256 of the prompt around request and response;
``judge_max_new_tokens``: limit of its output, 0 where it writes none.
"""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge says about one response."""

    label: str
    correct: bool | None = None
    """Whether the response is the expected answer; None where the example expects none."""
    detail: Mapping[str, Any] = field(default_factory=dict)
    """Further findings; ``slots_right`` (0..1) where the example lists content items; ``unscored``, why it is; those of
    :data:`CARRIED` where a model judged."""


@runtime_checkable
class Judge(Protocol):
    """Anything that labels responses, a batch at a time; built from its configuration alone."""

    name: str

    def judge(self, examples: Sequence[Example], responses: Sequence[str | None]) -> list[Verdict]:
        """Label the response to each example, in order.

        Args:
            examples: what was asked, with tags that say what is expected.
            responses: one for each example; None means there is none: ``unscored``.
        """
        ...


def judge_all(judge: Judge, examples: Sequence[Example], responses: Sequence[str | None]) -> list[Verdict]:
    """Have a judge label a batch, and refuse what nobody could count. All callers ask judges through this.

    Raises:
        DataError: another number of verdicts than responses, or a label that is none of :data:`LABELS`.
    """
    verdicts = list(judge.judge(examples, responses)) if responses else []
    if len(verdicts) != len(responses):
        raise DataError(
            f"judge {judge.name!r} gave {len(verdicts)} verdicts on {len(responses)} responses",
            hint="a judge gives one verdict for each response, in order",
        )
    for verdict in verdicts:
        if not isinstance(verdict, Verdict):
            raise DataError(f"judge {judge.name!r} gave a {type(verdict).__name__}", hint="a judge gives Verdicts")
        if verdict.label not in LABELS:
            raise DataError(
                f"judge {judge.name!r} gave the label {verdict.label!r}", hint=f"labels: {', '.join(LABELS)}"
            )
    return verdicts


def reason(verdict: Verdict) -> dict[str, str]:
    """Return what an unscored row says beside its label: the key ``unscored`` with why; nothing for other labels."""
    return {"unscored": str(verdict.detail.get("unscored", "no response"))} if verdict.label == "unscored" else {}


def carried(verdict: Verdict) -> dict[str, Any]:
    """Return what a row says beside its label: :func:`reason`, and the :data:`CARRIED` findings of a model judge."""
    return {**reason(verdict), **{key: verdict.detail[key] for key in CARRIED if key in verdict.detail}}


def judge_file(path: Path, out: Path, judge: Judge) -> dict[str, int]:
    """Label every row of a JSONL file of ``{"prompt", "response"}`` and write the rows to ``out`` with ``label`` added.

    Other keys are kept; a ``label`` already there moves to ``given_label``. Where the label is ``unscored``, the key
    ``unscored`` says why: a response that is null or no text, another language, unfinished reasoning. What a model
    judge found stands beside it (:data:`CARRIED`). Nothing is written unless every row can be read.

    Returns:
        How often each label occurs, every label included.

    Raises:
        DataError: a line is not a JSON object or lacks a key, with its number; or the file has no rows.
    """
    if path.resolve() == out.resolve():
        raise DataError(f"{out}: the output would replace the input", hint="give another --out")
    rows = list(read_responses(path))
    responses = [row["response"] if isinstance(row["response"], str) else None for row in rows]
    verdicts = judge_all(judge, [Example.pair(row["prompt"]) for row in rows], responses)
    counts = Counter(verdict.label for verdict in verdicts)
    lines = []
    for row, verdict in zip(rows, verdicts, strict=True):
        kept = {("given_label" if key == "label" else key): value for key, value in row.items()}
        lines.append(json.dumps({**kept, "label": verdict.label, **carried(verdict)}, ensure_ascii=False))
    from casehard.io.files import write_text_atomic

    write_text_atomic(out, "".join(line + "\n" for line in lines))
    return {label: counts[label] for label in LABELS}


def read_responses(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSONL file, checked to be objects with a text ``prompt`` and a ``response``.

    Raises:
        DataError: as :func:`judge_file`.
    """
    empty = True
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 2), b""), start=1):
                raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                if raw.strip():
                    empty = False
                    yield _row(raw.rstrip(b"\r\n"), f"{path}:{number}")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", hint="expected a JSONL file") from None
    if empty:
        raise DataError(f"{path}: no rows", hint='write one {"prompt": ..., "response": ...} per line')


def _row(raw: bytes, where: str) -> dict[str, Any]:
    row = parse_line(raw, where)
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}")
    check_values(row, where)
    for key in ("prompt", "response"):
        if key not in row:
            raise DataError(f"{where}: the key {key!r} is missing", hint=f"keys seen: {', '.join(row) or 'none'}")
    if not isinstance(row["prompt"], str):
        raise DataError(f"{where}: 'prompt' must be text, got {type(row['prompt']).__name__}")
    return row
