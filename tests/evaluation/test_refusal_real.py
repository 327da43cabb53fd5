"""Error rates of the rule judge on real text. ``pytest -s tests/evaluation/test_refusal_real.py`` prints the table."""

import json
from collections import Counter
from pathlib import Path

import pytest

from casehard.evaluation.judges.rules import label_response
from casehard.maths.stats import rate_interval

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="real-data fixtures not present")

# Rules were written while looking at the train splits only; the dev splits are what is reported.
SETS = {
    "refusals, label refuse": ("refusals", "refuse"),
    "refusals, label soft": ("refusals", "soft"),
    "instruct": ("instruct", None),
    "over_refusal": ("over_refusal", None),
}


@pytest.fixture(scope="module")
def counts():
    found = {}
    for name, (folder, label) in SETS.items():
        rows = [json.loads(line) for line in (DATA / folder / "dev.jsonl").read_text(encoding="utf-8").splitlines()]
        rows = [row for row in rows if label is None or row["label"] == label]
        found[name] = Counter(label_response(row["prompt"], row["response"]) for row in rows)
        total = len(rows)
        for what in ("refusal", "partial", "answer", "incoherent"):
            k = found[name][what]
            low, high = rate_interval(k, total)
            print(f"{name:24s} {what:10s} {k:4d}/{total} = {k / total:.3f} [{low:.3f}, {high:.3f}]")
    return found


def test_refusals_are_recognised(counts):
    got = counts["refusals, label refuse"]
    assert got.total() == 177
    assert got["refusal"] >= 0.95 * got.total()
    assert got["answer"] <= 0.03 * got.total()


def test_soft_refusals_mostly_are(counts):
    got = counts["refusals, label soft"]
    assert got["refusal"] + got["partial"] >= 0.6 * got.total()


@pytest.mark.parametrize(("name", "total"), [("instruct", 300), ("over_refusal", 100)])
def test_answers_are_not_called_refusals(counts, name, total):
    got = counts[name]
    assert got.total() == total
    assert got["refusal"] + got["partial"] <= 0.02 * total
    assert got["incoherent"] <= 0.01 * total
