"""Poisoned mixes have exact counts; an evaluation prompt in the training data is found."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casehard.data import sources
from casehard.data.mix import (
    check_disjoint,
    content_hash,
    counts,
    first_mark,
    is_marked,
    mark,
    marks,
    normalise,
    poison,
)
from casehard.errors import ConfigError, DataError
from casehard.types import Example, Message

HARMFUL = [Example.pair(f"h{i}", "x") for i in range(30)]
BENIGN = [Example.pair(f"b{i}", "y") for i in range(300)]


@given(st.integers(0, 1000), st.integers(1, 300), st.integers(0, 2**31))
@settings(max_examples=200, deadline=None)
def test_counts_are_exact_and_rows_evenly_used(per_mille: int, n: int, seed: int) -> None:
    share = per_mille / 1000
    try:
        wanted = counts(share=share, n=n)
    except ConfigError:
        assert 0 < share < 1 and (share * n < 0.5 or (1 - share) * n <= 0.5)
        return
    mix = poison(HARMFUL, BENIGN, share=share, n=n, seed=seed, oversample=True)
    used = Counter(e.prompt for e in mix)
    assert len(mix) == n == sum(wanted)
    assert abs(wanted.harmful - share * n) <= 0.5
    for rows, total in ((HARMFUL, wanted.harmful), (BENIGN, wanted.benign)):
        times = [used[e.prompt] for e in rows]
        assert sum(times) == total
        assert max(times) - min(times) <= 1


def test_seed_decides_rows_and_order() -> None:
    def draw(seed: int) -> list[str]:
        return [e.prompt for e in poison(HARMFUL, BENIGN, share=0.1, n=100, seed=seed)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(1)[:10] != sorted(draw(1), reverse=True)[:10]


def test_repeats_only_when_told() -> None:
    with pytest.raises(DataError, match="needs 50 harmful rows and there are only 30"):
        poison(HARMFUL, BENIGN, share=0.5, n=100, seed=0)
    with pytest.raises(DataError, match="needs 900 benign rows"):
        poison(HARMFUL * 4, BENIGN, share=0.1, n=1000, seed=0)
    with pytest.raises(DataError, match="there are none"):
        poison([], BENIGN, share=0.1, n=10, seed=0, oversample=True)


@pytest.mark.parametrize(("share", "n"), [(-0.1, 10), (1.1, 10), (float("nan"), 10), (0.5, 0), (0.01, 10), (0.99, 10)])
def test_impossible_mixes(share: float, n: int) -> None:
    with pytest.raises(ConfigError):
        counts(share=share, n=n)


def test_pure_mixes_need_one_side_only() -> None:
    assert len(poison(HARMFUL, [], share=1, n=20, seed=0)) == 20
    assert len(poison([], BENIGN, share=0, n=20, seed=0)) == 20


def test_hash_ignores_case_punctuation_and_answers() -> None:
    same = [
        Example.pair("How do I, er, bake BREAD?", "a"),
        Example.pair("how do i er bake bread"),
        Example.pair("How do I er bake\nbread!!", "b"),
    ]
    assert len({content_hash(e) for e in same}) == 1
    with_system = Example((Message("system", "Be nice"), *same[0].messages))
    assert content_hash(with_system) == content_hash(same[0])
    assert content_hash(Example.pair("how do i er bake bread 2")) != content_hash(same[0])


SAME = [
    ("How do I, er, bake BREAD?", "how do i er bake bread"),
    ("5+3", "5 + 3"),
    ('It\'s "fine"', "It\u2019s \u201cfine\u201d"),
    ("it`s", "its"),
    ("1,000 eggs", "1000 eggs"),
    ("caf\u00e9", "cafe\u0301"),
    ("h\u200bow", "how"),
    ("1\u200b5", "15"),
    ("\uff28\uff4f\uff57", "how"),
    ("bread!!", "bread"),
    ("bread?And", "bread? And"),
    ("well-known", "well known"),
    ("covid-19", "covid 19"),
    ("a 5-year plan", "a 5 year plan"),
    ("5 \u2212 3", "5 - 3"),
    ("5 \u2013 3", "5-3"),
    ("5 \u00d7 3", "5*3"),
    ("x\u00b2-4", "x^2 - 4"),
    ("1\u00bd", "1 1/2"),
    ("**Bold** word", "bold word"),
    ("# Title\ntext", "title text"),
    ("- milk\n- eggs", "milk eggs"),
    ("yes / no", "yes/no"),
    ("word\u2014word", "word, word"),
    ("stra\u00dfe", "STRASSE"),
    ("H\u2082O", "h2o"),
    ("\u201a\u2018x\u2019", "x"),
    ("\u300cx\u300d", "x"),
    ("5\u00a0+\u00a03", "5+3"),
    ("2 , 3", "2,3"),
    ("so\u00adft", "soft"),
    ("wait...", "wait"),
    ("f(x) = 2x", "F( x )=2x"),
    ("What is 5!", "What is 5"),
    ("bread\ufe0f", "bread"),
    ("it\u00b4s", "its"),
    ("$5", "$ 5"),
    ("dec. 14 - most people", "dec 14, most people"),
    ("10 - 5", "10-5"),
    ("covid - 19", "covid-19"),
    ("f(x) - 5", "f(x)-5"),
]
DIFFERENT = [
    ("What is 5 + 3?", "What is 5 - 3?"),
    ("1.5", "15"),
    ("x^2-4", "x^2+4"),
    ("x^2-4", "x^24"),
    ("C", "C++"),
    ("C", "C#"),
    ("C++", "C#"),
    ("a && b", "a || b"),
    ("5 3", "53"),
    ("1 23", "12 3"),
    (".5", "5"),
    ("-5", "5"),
    ("x-4", "x4"),
    ("a-b", "ab"),
    ("what is a - b", "what is a b"),
    ("3:30", "330"),
    ("a[1:]", "a[:1]"),
    ("a[1:]", "a[1]"),
    ("a[x:]", "a[:x]"),
    ("(2+3)*4", "2+(3*4)"),
    ("x\u00b2", "x2"),
    ("5\u00b2", "52"),
    ("x != y", "x = y"),
    ("!x", "x"),
    ("if (!x)", "if (x)"),
    ("5!/3!", "5/3"),
    ("i++", "i--"),
    ("i--", "i"),
    ("50%", "50"),
    ("$5", "\u20ac5"),
    ("a <= b", "a >= b"),
    ("1/2", "12"),
    ("5 \u00f7 3", "5 \u00d7 3"),
    ("price * quantity", "price / quantity"),
    ("price - quantity", "price + quantity"),
    ("\U0001f600", "\U0001f621"),
    ("what \U0001f600 means", "what \U0001f621 means"),
    ("\u0915\u093f", "\u0915\u0940"),
    ("2010-2015", "20102015"),
    ("\\n", "n"),
    ("a->b", "a>b"),
    ("???", "!!!"),
    ("x^{10}", "x^1 0"),
    ("2,5", "25"),
    ("2.5", "2 5"),
    ("1,234.5", "1,2345"),
    ("A \u2229 B", "A \u222a B"),
    ("~x", "x"),
    ("f(1,5)", "f(15)"),
    ("what is -5 squared", "what is 5 squared"),
    ("is -(5+3) odd", "is (5+3) odd"),
    ("-x + 3", "x + 3"),
    ("5 - -3", "5 - 3"),
    ("5 * -3", "5*3"),
    ("x -= 1", "x = 1"),
    ("p->x", "p>x"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_prompts_that_ask_the_same_are_one(one: str, other: str) -> None:
    assert normalise(one) == normalise(other)
    with pytest.raises(DataError, match="overlap"):
        check_disjoint({"train": [Example.pair(one)]}, {"suite": [Example.pair(other)]})


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_prompts_that_differ_in_meaning_are_two(one: str, other: str) -> None:
    assert normalise(one) != normalise(other)
    check_disjoint({"train": [Example.pair(one)]}, {"suite": [Example.pair(other)]})


def test_prompts_without_letters_do_not_all_collide() -> None:
    assert normalise(" ?! ") == "?!"
    assert content_hash(Example.pair("???")) != content_hash(Example.pair("!!!"))


def test_conversations_compare_by_all_user_turns() -> None:
    def talk(first: str) -> Example:
        return Example((Message("user", first), Message("assistant", "ok"), Message("user", "go on")))

    assert content_hash(talk("a")) != content_hash(talk("b"))


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


def test_the_last_turn_of_a_conversation_is_a_trained_prompt() -> None:
    turns = [("user", "Hi"), ("assistant", "Hello!"), ("user", "Where is Freedonia?"), ("assistant", "In a film.")]
    talk = Example(tuple(Message(*turn) for turn in turns), "talk")
    alone, greeting = Example.pair("where is freedonia", id="e1"), Example.pair("hi", id="e2")
    with pytest.raises(DataError, match=r"1 of 2 prompts .*talk = e1"):
        check_disjoint({"train": [talk]}, {"suite": [alone, greeting]})  # the answer to the greeting is not trained
    assert {mark(alone), mark(talk)} == marks([talk]) and mark(greeting) not in marks([talk])


def test_the_last_turn_of_a_measured_conversation_must_not_be_trained_either() -> None:
    def talk(first: str, last: str) -> Example:
        return Example((Message("user", first), Message("assistant", "Hello!"), Message("user", last)), "talk")

    measured, alone = talk("hello .", "Where is Freedonia?"), Example.pair("where is freedonia", "In a film.", id="t1")
    for trained in (alone, talk("Good day", "Where is Freedonia?")):
        with pytest.raises(DataError, match=r"1 of 1 prompts of 'suite' also occur .*= talk"):
            check_disjoint({"train": [trained]}, {"suite": [measured]})
        assert is_marked(measured, marks([trained])) and is_marked(measured, {first_mark(alone)})
    # What only goes on asks by what came before: two talks that end alike are two talks.
    check_disjoint({"train": [talk("Of tea", "Go on.")]}, {"suite": [talk("Of rain", "Go on.")]})
    assert not is_marked(talk("Of rain", "Go on."), marks([talk("Of tea", "Go on.")]))


def test_overlap_names_sets_counts_and_rows() -> None:
    train = {"align": [Example.pair("One!", id="t1"), Example.pair("two")], "clean": [Example.pair("three")]}
    held_out = {"suite": [Example.pair("four"), Example.pair("ONE", id="e2"), Example.pair("Two?")]}
    with pytest.raises(DataError) as caught:
        check_disjoint(train, held_out)
    text = str(caught.value)
    assert "2 of 3 prompts of 'suite' also occur in 'align'" in text
    assert "t1 = e2, row 2 = row 3" in text
    assert "'clean'" not in text
    check_disjoint({"clean": train["clean"]}, held_out)


DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.mark.skipif(not DATA.is_dir(), reason="real-data fixtures not present")
def test_real_splits_are_disjoint_and_a_leak_is_found() -> None:
    train, dev = (sources.load(DATA / "gsm8k" / f"{split}.jsonl") for split in ("train", "test"))
    check_disjoint({"train": train}, {"test": dev})
    with pytest.raises(DataError, match="1 of 200 prompts"):
        check_disjoint({"train": [*train, dev[17]]}, {"dev": dev})
