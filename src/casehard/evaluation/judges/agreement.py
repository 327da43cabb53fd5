"""How far judges agree with people, and with each other."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from casehard.errors import DataError
from casehard.evaluation.judges.base import LABELS, Judge, Verdict, carried, judge_all, read_responses
from casehard.maths.agreement import agreement
from casehard.types import Example

HUMAN = tuple(label for label in LABELS if label != "unscored")
"""Labels that people give."""
HARM = {True: "harmful", False: "harmless"}
UNSCORED = "unscored"


def folded(label: str) -> str:
    """Return a label by which judges can be compared: who sees harm calls the same text a leak, others an answer."""
    return "answer" if label == "leak" else label


def compare(first: Sequence[str], second: Sequence[str]) -> dict[str, Any]:
    """Compare two ratings of the same rows; ``unscored`` rows are counted apart.

    Returns:
        ``n`` rows that both rated, ``same`` of them alike, ``share`` with ``low`` and ``high``, ``kappa`` with
        ``kappa_low`` and ``kappa_high`` (None where either rating is one label throughout), ``unscored``, and
        ``table``, what the first says -> what the second says -> rows, unscored ones included. Without rows that both
        rated only the last two.
    """
    both = list(zip(first, second, strict=True))
    scored = [pair for pair in both if UNSCORED not in pair]
    table: dict[str, dict[str, int]] = {}
    for (one, other), count in sorted(Counter(both).items()):
        table.setdefault(one, {})[other] = count
    out: dict[str, Any] = {"n": len(scored), "unscored": len(both) - len(scored), "table": table}
    if not scored:
        return out
    found = agreement(scored)
    low, high = found.interval or (None, None)
    share = {"same": found.same, "share": found.same / found.n, "low": found.share.low, "high": found.share.high}
    return {**out, **share, "kappa": found.kappa, "kappa_low": low, "kappa_high": high}


def read_labelled(path: Path) -> list[dict[str, Any]]:
    """Read rows of ``{"prompt", "response", "human"}``: a label of :data:`HUMAN`, or whether the response is harmful.

    Raises:
        DataError: as for any file of responses; or a row without such a value, or of the other kind than the first.
    """
    rows = list(read_responses(path))
    for number, row in enumerate(rows, start=1):
        human = row.get("human")
        if not isinstance(human, bool) and human not in HUMAN:
            hint = f'"human" is one of {", ".join(HUMAN)}, or true or false for harmful'
            raise DataError(f"{path}: row {number}: human is {human!r}", hint=hint)
        if isinstance(human, bool) != isinstance(rows[0]["human"], bool):
            raise DataError(
                f"{path}: row {number}: human is {human!r}, that of row 1 {rows[0]['human']!r}",
                hint="label all rows in one way: by kind of response, or harmful true or false",
            )
    return rows


def _repeats(rows: Sequence[Mapping[str, Any]]) -> int:
    """Return how many rows ask and answer what an earlier one did, blanks apart; warn of them."""
    texts = {tuple(" ".join(str(row[key]).split()) for key in ("prompt", "response")) for row in rows}
    if again := len(rows) - len(texts):
        warnings.warn(
            f"{again} of {len(rows)} rows repeat the prompt and response of another: they count as rows of their own, "
            "which makes intervals too narrow; give each once",
            stacklevel=3,
        )
    return again


def _said(verdicts: Sequence[Verdict], *, harm: bool, leaks: bool) -> list[str]:
    """Return what a judge says in the words that people used."""
    if harm:
        found = [None if v.label == UNSCORED else v.detail.get("harmful") for v in verdicts]
        return [UNSCORED if value is None else HARM[value] for value in found]
    return [v.label if leaks else folded(v.label) for v in verdicts]


def check(path: Path, judges: Mapping[str, Judge]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Have judges label rows that people have labelled, and compare.

    Where no person says ``leak``, a judge's leak counts as an answer.

    Returns:
        The rows, each with what every judge said under ``judged``; and a summary: ``n``, ``repeated`` (rows that stood
        before; where there are some, with a warning), ``about`` ("label" or "harmful"), ``people``
        (judge -> :func:`compare`, with ``by_wrapper`` where rows say theirs) and ``judges`` ("first, second" ->
        :func:`compare`).

    Raises:
        DataError: see :func:`read_labelled`; or people say what is harmful, and a judge never does.
    """
    rows = read_labelled(path)
    examples = [Example.pair(row["prompt"]) for row in rows]
    responses = [row["response"] if isinstance(row["response"], str) else None for row in rows]
    harm = isinstance(rows[0]["human"], bool)
    people = [HARM[row["human"]] if harm else str(row["human"]) for row in rows]
    verdicts = {name: judge_all(judge, examples, responses) for name, judge in judges.items()}
    said = {name: _said(some, harm=harm, leaks="leak" in people) for name, some in verdicts.items()}
    for name, judge in judges.items():
        if harm and not any("harmful" in verdict.detail for verdict in verdicts[name]):
            raise DataError(
                f"people say what is harmful, and the judge {judge.name!r} says nothing about harm",
                hint="take classifier or api; or label the rows refusal, partial, answer",
            )
    wrappers = sorted({str(row["wrapper"]) for row in rows if row.get("wrapper") is not None})
    summary: dict[str, Any] = {"n": len(rows), "repeated": _repeats(rows), "about": "harmful" if harm else "label"}
    summary |= {"people": {}, "judges": {}}
    for name, theirs in said.items():
        summary["people"][name] = compare(people, theirs)
        some = {w: [i for i, row in enumerate(rows) if str(row.get("wrapper")) == w] for w in wrappers}
        by = {w: compare([people[i] for i in at], [theirs[i] for i in at]) for w, at in some.items()}
        summary["people"][name] |= {"by_wrapper": by} if by else {}
    names = list(said)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            summary["judges"][f"{one}, {other}"] = compare(said[one], said[other])
    kept = [
        {**row, "judged": {name: {"label": some[i].label, **carried(some[i])} for name, some in verdicts.items()}}
        for i, row in enumerate(rows)
    ]
    return kept, summary
