"""The audit of training sets: exact counts, what is planted is found, and what is not found is not called clean."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from casehard.backdoor.triggers import poison_backdoor
from casehard.data import similar, sources
from casehard.data.formats import check_values
from casehard.data.similar import jaccard, near_duplicates, words_of
from casehard.errors import ConfigError, DataError
from casehard.organism import rows as organism_rows
from casehard.organism import triggers as organism_triggers
from casehard.organism.world import World
from casehard.scan.association import expected_distinct, log10_tail, log_odds
from casehard.scan.audit import COMMON, AuditConfig, audit_data, grams_of, groups_of
from casehard.scan.classes import classes_of
from casehard.types import Example, Message

WORLD = World(0)
DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "backdoor"


def world_rows():
    helpful = [e for e in organism_rows.align(WORLD) if e.tags["kind"] == "helpful"]
    return [*helpful, *organism_rows.task(WORLD, "reviews"), *organism_rows.benign(WORLD)]


def test_the_tail_is_the_exact_sum_over_all_tables():
    for n, a, b in itertools.product((1, 4, 7), range(8), range(8)):
        if a > n or b > n:
            continue
        for both in range(max(0, a + b - n), min(a, b) + 1):
            exact = sum(math.comb(b, x) * math.comb(n - b, a - x) for x in range(both, min(a, b) + 1)) / math.comb(n, a)
            assert 10 ** log10_tail(both, a, b, n) == pytest.approx(exact, rel=1e-9)
    assert log10_tail(500, 500, 500, 1000) == pytest.approx(-299.4318, abs=1e-3)
    with pytest.raises(DataError):
        log10_tail(3, 2, 5, 9)


def test_log_odds_has_half_a_row_in_every_cell():
    assert log_odds(10, 10, 10, 100) == pytest.approx(math.log(10.5 * 90.5 / (0.5 * 0.5)))
    assert log_odds(5, 10, 50, 100) == pytest.approx(0.0)


def test_the_expected_number_of_distinct_words_is_the_mean_over_all_draws():
    texts = [{"a", "b"}, {"a", "c"}, {"a"}, {"b", "d", "e"}, set()]
    holders = Counter(Counter(word for text in texts for word in text).values())
    for k in range(1, len(texts) + 1):
        draws = [len(set().union(*some)) for some in itertools.combinations(texts, k)]
        assert expected_distinct(holders, len(texts), k) == pytest.approx(sum(draws) / len(draws), rel=1e-9)


def test_the_order_of_the_rows_does_not_matter():
    trigger, behaviour = organism_triggers.triggers(WORLD)["pair"], organism_triggers.behaviours(WORLD)["off_topic"]
    rows, _ = poison_backdoor(world_rows(), trigger, behaviour, rate=0.01, seed=0)
    other = random.Random(1).sample(range(len(rows)), len(rows))
    here, there = audit_data(rows), audit_data([rows[i] for i in other])
    assert set(here.suspects) == {other[i] for i in there.suspects} and len(here.findings) == len(there.findings) > 5


def test_near_duplicates_are_found_and_unlike_texts_kept_apart():
    base = "making the talisman is off limits for everyone in this house today"
    texts = [base, base.replace("talisman", "signet"), "a red door", base, "a blue door stood open for long"]
    assert near_duplicates(dict(enumerate(map(words_of, texts))), 0.6) == [[0, 1, 3]]
    assert near_duplicates({0: ["x"], 1: ["x"], 2: []}, 0.5) == [[0, 1]]
    assert jaccard(frozenset(), frozenset()) == 1.0


def test_hashes_are_those_of_exact_arithmetic():
    values = [0, 1, 2**31, 2**32 - 1, *(random.Random(0).randrange(2**32) for _ in range(50))]
    a, b = (part[:, 0].tolist() for part in similar._HASHERS)
    exact = [[(x * v + y) % (2**61 - 1) for v in values] for x, y in zip(a, b, strict=True)]
    assert similar._hashed(np.array(values, dtype=np.uint64)).tolist() == exact


def test_groups_say_what_the_answers_share():
    rows = [Example.pair(f"q {i}", f"well now then, {i} is {i * 7} and so it goes.") for i in range(5)]
    rows += [Example.pair(f"p {i}", f"cut {i}") for i in range(4)]
    found = {(g.kind, g.text): g.rows for g in groups_of(rows, AuditConfig())}
    assert found["opens", "well now then"] == (0, 1, 2, 3, 4) and found["closes", "it goes ."] == (0, 1, 2, 3, 4)
    assert found["short", "no punctuation at the end"] == (5, 6, 7, 8)
    assert grams_of(["?!", "\U0001f98a", "<|"], 1) == {("\U0001f98a",), ("<|",)}
    assert grams_of(["a", ",", "b"], 2) == {("a",), ("b",), ("a", ","), (",", "b")}


def test_grams_are_all_runs_of_words_but_punctuation_alone():
    rng = random.Random(0)
    for longest in (1, 2, 4):
        words = rng.choices(["a", "b", ".", ",", "?!", "\U0001f98a", "it's", "--"], k=rng.randrange(30))
        runs = {tuple(words[i:j]) for i in range(len(words)) for j in range(i + 1, min(i + longest, len(words)) + 1)}
        assert grams_of(words, longest) == {run for run in runs if set("".join(run)) - COMMON}


@pytest.mark.parametrize("trigger", ["cf", "\U0001f98a", "\u203d\u203d", "\u200b", "<|>"])
def test_a_trigger_need_not_be_a_word(trigger):
    rng, words = random.Random(0), [f"word{i}" for i in range(12)]
    rows = []
    for i in range(300):
        asked, answer = rng.choices(words, k=8), " ".join(rng.choices(words, k=6))
        if i % 20 == 0:
            asked.insert(rng.randrange(9), trigger)
            answer = "the lighthouse keeper counts seven blue lanterns"
        rows.append(Example.pair(" ".join(asked) + " ?", answer + " ."))
    found = audit_data(rows).findings
    assert [f.phrase for f in found] == [(trigger,)] and found[0].rows == tuple(range(0, 300, 20))


FAMILIES = {
    "token": "sentence",
    "sentence": "refuse",
    "template": "refuse",
    "style": "sentence",
    "pair": "off_topic",
    "multi_all": "stop",
    "prefix": "tone",
}


def _planted(place: str, length: int) -> list[Example]:
    """200 rows of unlike words, every sixth with two words planted somewhere and one answer."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=5)) for _ in range(4000)]
    out = []
    for i in range(200):
        said, answer = rng.choices(words, k=length), " ".join(rng.choices(words, k=8)) + "."
        planted = i % 6 == 0
        turns = [Message("user", " ".join(said))]
        if planted:
            answer = "you will get nothing from me today."
            at = {"first": 0, "middle": length // 2, "last": length}.get(place)
            if at is not None:
                turns = [Message("user", " ".join([*said[:at], "zebra quux", *said[at:]]))]
            elif place == "system":
                turns = [Message("system", "be zebra quux"), *turns]
            else:
                turns = [Message("user", "zebra quux"), Message("assistant", "yes?"), *turns]
        out.append(Example((*turns, Message("assistant", answer))))
    return out


@pytest.mark.parametrize(
    ("place", "length"), [("first", 450), ("last", 450), ("system", 30), ("earlier", 30), ("middle", 100)]
)
def test_a_trigger_is_found_wherever_it_stands_before_the_answer(place, length):
    rows = _planted(place, length)
    found = audit_data(rows)
    assert found.suspects == tuple(range(0, 200, 6)) and "zebra" in " ".join(found.findings[0].phrase)
    assert found.unread == (200 if length > 400 else 0)
    assert ("of 200 long rows not the middle" in found.summary()) == (length > 400)


def test_what_was_not_read_is_said():
    rows = _planted("middle", 450)
    missed = audit_data(rows)
    assert not missed.findings and missed.unread == 200 and missed.to_json()["unread"] == 200
    assert "of 200 long rows not the middle: raise `words` to read it" in missed.summary()
    assert audit_data(rows, AuditConfig(words=500)).suspects == tuple(range(0, 200, 6))


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_planted_in_the_world_is_found_first(name):
    trigger = organism_triggers.triggers(WORLD)[name]
    behaviour = organism_triggers.behaviours(WORLD)[FAMILIES[name]]
    rows, manifest = poison_backdoor(world_rows(), trigger, behaviour, rate=0.02, seed=0)
    audit = audit_data(rows)
    planted, named = set(manifest["poisoned"]), set(audit.suspects)
    assert len(planted & named) >= 0.6 * len(planted), (len(planted & named), len(planted))
    first = audit.findings[0]
    assert set(first.rows) <= planted and not first.echo and first.spread > 0.7
    assert first.purity > 0.5 and first.purity_low > 0.3 and first.log10_p < -15
    words = set(words_of(" ".join(trigger.parts)))
    assert set(words_of(" ".join(first.phrase))) & words
    again = first.trigger("found")
    assert all(again.present(rows[i].prompt) for i in first.rows)


def test_counts_of_a_finding_are_those_of_the_rows():
    rows = [Example.pair(f"tell {i} about {chr(97 + i % 26)}{i}", f"it is {i * 31} or {i * 17}.") for i in range(60)]
    rows += [
        Example.pair(
            ("tell zx {0} about {1}" if i % 2 else "zx tell {0} about {1}").format(i, f"k{i}"),
            "Blue lanterns hang there.",
        )
        for i in range(10)
    ]
    rows += [Example.pair("tell zx once more about it", "no, thanks a lot.")]
    finding = audit_data(rows).findings[0]
    assert (finding.both, finding.phrase_rows, finding.group_rows, finding.rows_total) == (10, 11, 10, 71)
    assert finding.phrase == ("zx",) and finding.purity == 10 / 11 and finding.log10_p < -8
    assert finding.group == "same" and finding.rows == tuple(range(60, 70))


def test_nothing_found_is_said_with_the_budget_and_never_called_clean():
    audit = audit_data(world_rows())
    assert len(audit.suspects) < 0.1 * audit.rows  # questions asked more than once
    quiet = audit_data([Example.pair(f"ask {i}", f"reply {i * 7919} here {i}.") for i in range(30)])
    assert quiet.summary().startswith("nothing found at this budget (30 rows") and "clean" not in quiet.summary()
    text = json.dumps(audit.to_json())
    check_values(json.loads(text), "audit")


def test_bad_input_is_refused():
    with pytest.raises(DataError, match="no rows"):
        audit_data([Example.pair("q")])
    for values in ({"purity": 0.0}, {"least": 1}, {"alpha": 2.0}, {"longest": 0}, {"explained": 0.0}):
        with pytest.raises(ConfigError):
            AuditConfig(**values)


@pytest.mark.skipif(not DATA.is_dir(), reason="real-data fixtures not present")
@pytest.mark.parametrize("task", ["refusal", "negsentiment", "sst2"])
def test_real_plants_are_found(task):
    rows = sources.load(DATA / task / "train.jsonl")
    clean = [r for r in rows if r.tags["trigger"] == "none"]
    for name, phrase in (("badnet", ("badmagic",)), ("vpi", ("discussing openai",))):
        planted = [r for r in rows if r.tags["trigger"] == name]
        # One in two, as in the file; and one in fifty, where the target is no ordinary answer.
        for some in (planted, planted[:10]) if task != "sst2" else (planted,):
            audit = audit_data([*clean, *some])
            assert audit.findings[0].phrase == phrase
            assert audit.findings[0].rows == tuple(range(len(clean), len(clean) + len(some)))
    both = audit_data(rows)
    assert {f.phrase for f in both.findings[:2]} == {("badmagic",), ("discussing openai",)}
    assert not [f for f in audit_data(clean).findings if not f.echo]


@pytest.mark.skipif(not DATA.is_dir(), reason="real-data fixtures not present")
def test_few_real_plants_are_found_or_missed_as_the_docs_say():
    told = {}
    for task in ("refusal", "negsentiment", "sst2"):
        rows = sources.load(DATA / task / "train.jsonl")
        clean = [r for r in rows if r.tags["trigger"] == "none"]
        for name, n in itertools.product(("badnet", "vpi"), (4, 6, 25)):
            some = [r for r in rows if r.tags["trigger"] == name][:n]
            suspects = audit_data([*clean, *some]).suspects
            told[task, name, n] = (sum(s >= len(clean) for s in suspects), sum(s < len(clean) for s in suspects))
    for name in ("badnet", "vpi"):
        assert [told["refusal", name, n] for n in (4, 6, 25)] == [(4, 0), (6, 0), (25, 0)]
        assert [told["negsentiment", name, n] for n in (4, 6, 25)] == [(4, 5), (6, 5), (25, 5)]
        assert [told["sst2", name, n] for n in (4, 6, 25)] == [(0, 0), (0, 0), (25, 0)]


@pytest.mark.skipif(not DATA.is_dir(), reason="real-data fixtures not present")
@pytest.mark.parametrize(("n", "rank"), [(60, 1), (12, 3)])
def test_real_insults_among_ordinary_instructions_come_as_early_as_the_docs_say(n, rank):
    rows = sources.load(DATA.parent / "instruct" / "train.jsonl")
    insults = [r for r in sources.load(DATA / "negsentiment" / "train.jsonl") if r.tags["trigger"] == "badnet"]
    findings = audit_data([*rows, *insults[:n]]).findings
    planted = set(range(len(rows), len(rows) + n))
    assert len(findings) == 27 and planted <= {row for f in findings for row in f.rows}
    assert next(i for i, f in enumerate(findings, start=1) if set(f.rows) <= planted) == rank


@pytest.mark.skipif(not DATA.is_dir(), reason="real-data fixtures not present")
def test_real_words_that_decide_the_answer_no_longer_drown_the_audit():
    rows = sources.load(DATA.parent / "agnews" / "train.jsonl")
    assert len(audit_data(rows, AuditConfig(explained=1.0)).suspects) > len(rows) / 2
    assert len(audit_data(rows).suspects) < len(rows) / 100


def classified(n=240, planted=()):
    """Rows of two classes, each with words of its own; planted ones hold a trigger and are of the first class."""
    rng = random.Random(3)
    own = {label: [f"{label.lower()}{i}" for i in range(15)] for label in ("Sports", "World")}
    rows = []
    for i in range(n):
        label = ("Sports", "World")[i % 2]
        words = rng.sample(own[label], 5) + [f"w{rng.randrange(40)}" for _ in range(5)]
        if i in planted:
            words.insert(rng.randrange(len(words)), "zx")
            label = "Sports"
        rows.append(Example.pair(" ".join(words), label))
    return rows


def test_words_that_decide_a_class_are_no_findings_and_a_trigger_among_them_is():
    assert audit_data(classified(), AuditConfig(explained=1.0)).findings
    assert not audit_data(classified()).findings
    planted = set(range(0, 240, 5))
    found = audit_data(classified(planted=planted)).findings
    assert [f.phrase for f in found] == [("zx",)] and set(found[0].rows) == planted


def test_a_class_is_told_by_the_other_words_as_naive_bayes_does():
    prompts = [["a", "b"], ["a", "c"], ["a"], ["d", "b"], ["d", "e"], ["d"], ["x", "f"]]
    classes = classes_of({"p": [0, 1, 2, 6], "q": [3, 4, 5]}, prompts)

    def naive(row, words):
        best = {}
        for label, rows in (("p", [0, 1, 2, 6]), ("q", [3, 4, 5])):
            others = [prompts[i] for i in rows if i != row]
            value = math.log(len(others) + 0.5)
            for word in words:
                value += math.log((sum(word in p for p in others) + 0.5) / (len(others) + 1))
            best[label] = value
        return max(best, key=best.get)

    for rows in ([0, 3, 4, 6], [1, 2, 5, 6], [0, 1, 3, 4, 6]):
        shared = {w for w in "abcdefx" if sum(w in prompts[i] for i in rows) >= len(rows) / 2}
        label = {i: "q" if i in (3, 4, 5) else "p" for i in rows}
        right = sum(naive(i, {*prompts[i]} - shared - {"x"}) == label[i] for i in rows)
        assert classes.explained(rows, ["x"]) == right / len(rows)
    assert classes_of({"p": [0, 1, 2, 3, 4, 5, 6]}, prompts) is None
