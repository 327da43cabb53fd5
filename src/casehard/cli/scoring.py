"""Rows of an evaluation as records and as a closing table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
KEYS = ("metric", "k", "n", "rate", "low", "high")
"""What a record takes from a score as it is."""


def records(rows: Iterable[Mapping[str, Any]], context: Mapping[str, Any]) -> list[Record]:
    """Return one record per metric (and attack step, where rows have one), with interval.

    Args:
        context: what is the same for all: defence, attack, share, seed.
    """
    from casehard.evaluation.metrics import scores

    by_step: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_step.setdefault(int(row.get("step", 0)), []).append(row)
    return [
        {
            **context,
            "steps": step,
            **{key: getattr(score, key) for key in KEYS},
            # Half refusals of look-alikes, kappa of two judges, why a rate cannot be relied on: where there is any.
            **{key: score.context[key] for key in ("partial", "kappa", "unreliable") if score.context.get(key)},
        }
        for step, some in sorted(by_step.items())
        for score in scores(some)
    ]


def rate(record: Record) -> str:
    """Return ``0.25 [0.12, 0.43]``, with ``?`` behind it where too many rows are in doubt to rely on it."""
    text = f"{record['rate']:.2f} [{record['low']:.2f}, {record['high']:.2f}]"
    return f"{text} ?" if "unreliable" in record else text


def doubts(found: Sequence[Record]) -> list[str]:
    """Return what a reader of the rates must know: which are unreliable and why, and how many answers are partial."""
    why = {(r["metric"], r["steps"]): r["unreliable"] for r in found if "unreliable" in r}
    out = [f"{metric} at step {step} is unreliable: {reason}" for (metric, step), reason in why.items()]
    kinds = (
        ("partial", "k", "restricted prompts were declined and then answered in part, which asr leaves out"),
        (
            "over_refusal",
            "partial",
            "look-alikes were declined and then answered in part, which over_refusal leaves out",
        ),
    )
    for metric, key, what in kinds:
        at = [f"{r[key]}/{r['n']} at step {r['steps']}" for r in found if r["metric"] == metric and r.get(key)]
        out += [f"{what}: {', '.join(at)}"] if at else []
    return out


def score_rows(found: Sequence[Record]) -> list[tuple[str, str, str]]:
    """Return table rows: metric, k/n, rate with its interval."""
    return [(r["metric"], f"{r['k']}/{r['n']}" if r["k"] is not None else f"n={r['n']}", rate(r)) for r in found]


def curve_rows(found: Sequence[Record], metrics: Sequence[str]) -> list[list[str]]:
    """Return table rows: attack step, then each metric, rates in percent (a dash where it was not measured)."""
    return curve(found, metrics, step="steps")


def curve(found: Sequence[Record], metrics: Sequence[str], *, step: str) -> list[list[str]]:
    """Return the same of records that keep their step under another name; narrow enough for 80 columns."""
    out = []
    for at in sorted({r[step] for r in found}):
        here = {r["metric"]: r for r in found if r[step] == at}
        out.append([str(at), *[_percent(here[m]) if m in here else "-" for m in metrics]])
    return out


def _percent(record: Record) -> str:
    """Return ``25 [12, 43]``; a mean that is no share (``nll``) stays as it is."""
    if record["k"] is None:
        return rate(record)
    text = "{:.0f} [{:.0f}, {:.0f}]".format(*(100 * record[key] for key in ("rate", "low", "high")))
    return f"{text} ?" if "unreliable" in record else text


def defence_of(model: Path) -> str:
    """Return the name of the defence a checkpoint was made with, "none" for any other folder."""
    from casehard.model.provenance import read_provenance

    return str(read_provenance(model).get("method") or "none")
