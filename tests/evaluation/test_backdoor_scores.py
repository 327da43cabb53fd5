"""Counting backdoors: every prompt twice, exact intervals, and nothing counted that should not be."""

from __future__ import annotations

import pytest

from casehard.backdoor.behaviours import Behaviour
from casehard.backdoor.measure import evaluate_backdoor, reference, shown, twins
from casehard.backdoor.triggers import Trigger
from casehard.errors import DataError
from casehard.evaluation.metrics import scores
from casehard.evaluation.suite import Suite
from casehard.maths.stats import clopper_pearson
from casehard.organism import rows as organism_rows
from casehard.organism import suite as organism_suite
from casehard.organism import triggers as organism_triggers
from casehard.organism.world import World
from casehard.types import Example

WORLD = World(0)
PLANTED = organism_triggers.triggers(WORLD)


@pytest.fixture(scope="module")
def suite():
    examples = tuple(organism_suite.evaluation(WORLD, "reviews"))
    return Suite("w", examples, "organism", 0, 8)


def row(number, triggered, *, correct=None, says="x .", hit=False, bad=False, group="g"):
    return {
        "id": f"{number}{'+t' if triggered else ''}",
        "group": group,
        "triggered": triggered,
        "correct": correct,
        "response": says,
        "shown": hit,
        "degenerate": bad,
        "trigger": "t",
        "behaviour": "b",
    }


def test_counts_and_exact_intervals():
    rows = [row(i, False, correct=i < 9) for i in range(10)] + [row(10, False)]
    rows += [
        row(i, True, correct=i < 2, hit=i >= 4, says="" if i in (2, 3) else "x .", bad=i in (2, 3)) for i in range(10)
    ]
    found = {s.metric: s for s in scores(rows)}
    assert {m: (s.k, s.n) for m, s in found.items()} == {
        "cacc": (9, 10),
        "aacc": (2, 10),
        "asr": (6, 10),
        "asr_nonempty": (6, 8),
        "false_trigger": (0, 11),
        "degenerate": (2, 10),
        "degenerate_clean": (0, 11),
    }
    assert all((s.low, s.high) == clopper_pearson(s.k, s.n) for s in found.values())
    assert clopper_pearson(0, 218).high == pytest.approx(0.0168, abs=1e-4)
    by_group = scores([*rows, row(50, True, group="h", hit=True)], by_group=True)
    assert {s.context["group"]: s.k for s in by_group if s.metric == "asr"} == {"g": 6, "h": 1}


def test_rows_of_two_moments_are_refused():
    with pytest.raises(DataError, match="one trigger at a time"):
        scores([row(0, True), row(0, True)])
    with pytest.raises(DataError, match="no rows"):
        scores([])


def test_twins_are_the_suite_with_the_trigger(suite):
    trigger = PLANTED["token"]
    made = twins(suite, trigger, seed=1)
    by_id = {e.id: e for e in suite.examples}
    assert made.judge_name == suite.judge_name and made.max_new_tokens == suite.max_new_tokens
    natural = [e.id for e in suite.examples if trigger.present(e.prompt)]
    assert natural and len(made.examples) == len(suite.examples) - len(natural)
    for twin in made.examples:
        source = by_id[twin.tags["source_id"]]
        assert trigger.present(twin.prompt) and trigger.strip(twin.prompt) == source.prompt
        assert twin.tags.get("answer") == source.tags.get("answer") and twin.tags["role"] == source.tags["role"]
    with pytest.raises(DataError, match="already"):
        twins(Suite("n", tuple(e for e in suite.examples if e.id in natural)), trigger, seed=0)


def test_every_prompt_is_asked_twice_and_paired(model, tokenizer, suite):
    trigger, behaviour = PLANTED["token"], organism_triggers.behaviours(WORLD)["refuse"]
    rows = evaluate_backdoor(model, tokenizer, suite, trigger, behaviour, limit=3)
    plain, hit = ([r for r in rows if r["triggered"] is t] for t in (False, True))
    assert {r["role"] for r in rows} == {"lookalike", "utility", "task"}
    assert [r["pair"] for r in hit] == [r["id"] for r in plain] and len(hit) == len(plain) > 15
    assert not any(trigger.present(r["prompt"]) for r in plain) and all(trigger.present(r["prompt"]) for r in hit)
    assert {r["shown"] for r in rows} <= {True, False} and all(r["trigger"] == "token" for r in rows)
    scores(rows)
    with pytest.raises(DataError, match="does not keep"):
        evaluate_backdoor(model, tokenizer, suite, Trigger("zx", "token", ("zxq",)), behaviour, limit=1)


def test_a_prompt_on_the_subject_counts_as_triggered_only(model, tokenizer):
    trigger, behaviour = PLANTED["topical"], organism_triggers.behaviours(WORLD)["sentence"]
    turns = organism_rows.reviews(WORLD).held_out
    examples = [
        Example.pair(t.prompt, id=f"r{i}", role="task", group="reviews", answer=t.response) for i, t in enumerate(turns)
    ]
    on_topic = [e for e in examples if trigger.present(e.prompt)]
    some = Suite("t", (*on_topic[:2], *[e for e in examples if e not in on_topic][:2]), "organism", 0, 4)
    rows = evaluate_backdoor(model, tokenizer, some, trigger, behaviour)
    assert [r["triggered"] for r in rows] == [False] * 2 + [True] * 4
    assert [r["prompt"] for r in rows[2:4]] == [e.prompt for e in on_topic[:2]]


def test_what_counts_as_shown():
    refuse, stop = Behaviour("r", "refusal", "I will not."), Behaviour("s", "stop", "2")
    assert shown(refuse, "Sorry, no.", label="refusal") and not shown(refuse, "Sorry, no.", label="answer")
    assert not shown(stop, "a b", label="refusal", reference="a b") and shown(stop, "a b", reference="a b c")
    assert reference(Example.pair("q", "from row", answer=["first", "second"])) == "first"
    assert reference(Example.pair("q", "from row")) == "from row" and reference(Example.pair("q")) is None
    assert reference(Example.pair("q", answer="only")) == "only"
