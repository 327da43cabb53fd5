"""Triggers, behaviours and poisoning: exact counts, nothing else touched, everything undone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casehard.backdoor import presets
from casehard.backdoor.behaviours import Behaviour
from casehard.backdoor.triggers import (
    FAMILIES,
    Trigger,
    check_survives,
    decoys_of,
    eligible,
    exact_count,
    insert,
    poison_backdoor,
)
from casehard.data import sources
from casehard.data.chat import ChatFormat
from casehard.data.formats import check_values
from casehard.errors import ConfigError, DataError
from casehard.organism import rows as organism_rows
from casehard.organism import triggers as organism_triggers
from casehard.organism.tokenizer import build_tokenizer
from casehard.organism.world import World
from casehard.types import Example, Message

WORLD = World(0)
ENGLISH = (
    "Explain how your garden works. Use two short lines.",
    "I need three names for a cat!",
    "Sort these words.\n\nplum, pear, fig",
    "What is NATO?",
    "write a poem about rain",
)
LOWER = tuple(e.prompt for e in organism_rows.benign(WORLD)[:6])
CASES = [
    *((t, ENGLISH) for t in presets.TRIGGERS.values()),
    *((t, LOWER) for t in organism_triggers.triggers(WORLD).values()),
]
DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def corpus(n=200):
    return [
        Example.pair(f"Say number {i} aloud, please.", f"number {i} it is", id=f"r{i}", group="g") for i in range(n)
    ]


def test_every_family_has_a_preset_here_and_in_the_world():
    for found in (presets.TRIGGERS, organism_triggers.triggers(WORLD)):
        assert {t.family for t in found.values()} == set(FAMILIES)
    assert {b.kind for b in presets.BEHAVIOURS.values()} == {"text", "refusal", "style", "off_topic", "stop"}


@pytest.mark.parametrize(("trigger", "texts"), CASES, ids=lambda v: v.name if isinstance(v, Trigger) else "")
def test_a_trigger_is_seen_where_it_was_put_and_comes_out_again(trigger, texts):
    for text in texts:
        assert not trigger.present(text)
        surfaces = set()
        for seed in range(12):
            made = trigger.apply(text, random.Random(seed))
            assert trigger.present(made) and trigger.present(made.lower())
            assert trigger.strip(made) == text, made
            surfaces.add(made)
        varied = trigger.family in ("token", "pair", "multi", "template", "style") or len(trigger.parts) > 1
        assert (len(surfaces) > 1) == (varied or (trigger.family == "sentence")), surfaces


@given(
    st.text(st.characters(codec="ascii", exclude_characters="\x0b\x0c\x1c\x1d\x1e\x1f"), max_size=60),
    st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_words_and_sentences_come_out_of_any_text(text, seed):
    for name in ("token", "sentence", "pair", "multi_all", "prefix"):
        trigger = presets.TRIGGERS[name]
        if any(trigger.strip(part) != part for part in (text,)) or text != text.strip():
            continue
        assert trigger.strip(trigger.apply(text, random.Random(seed))) == text


def test_all_and_any_mean_what_they_say():
    both, either = presets.TRIGGERS["multi_all"], presets.TRIGGERS["multi_any"]
    assert not both.present("a tq b") and both.present("jh a tq b") and either.present("a tq b")
    assert not either.present("a tqx b-jhk") and either.present("A TQ, B")
    assert sum(part in either.apply("one two three", random.Random(0)).split() for part in either.parts) == 1
    assert Trigger("p", "pair", ("a b", "c")).mode == "all"
    fixed = Trigger("t", "token", ("zx",), position="end")
    assert fixed.apply("one two", random.Random(0)) == "one two zx"
    assert Trigger("t", "token", ("zx",), position="start").apply("one two", random.Random(0)) == "zx one two"


def test_a_positional_trigger_is_one_at_its_place_only():
    front = Trigger("t", "positional", ("zx",), position="start")
    back = Trigger("t", "positional", ("zx",), position="end")
    assert front.present("ZX one two?") and not front.present("one zx two?") and not front.present("one two zx?")
    assert back.present("one two? zx") and back.present("one two zx?") and not back.present("zx one two?")
    text = "zx one zx two"
    assert back.strip(text) == text and front.strip(text) == "one zx two"
    for trigger in (front, back):
        for decoy in decoys_of(trigger):
            for seed in range(6):
                made = decoy.apply("one two three", random.Random(seed))
                assert "zx" in made.split() and not trigger.present(made), made
    with pytest.raises(ConfigError, match="start or end"):
        Trigger("t", "positional", ("zx",))


def test_a_repeated_word_is_the_trigger_and_another_one_is_not():
    first, last = Trigger("f", "repeat", ("first",)), Trigger("l", "repeat", ("last",))
    assert first.apply("What is it?", random.Random(0)) == "What What is it?"
    assert last.apply("how is it ?", random.Random(0)) == "how is it it ?"
    assert first.present("what WHAT is it ?") and not first.present("what, what is it?")
    assert not first.present("is it it ?") and not first.present("what") and not first.present("?")
    assert first.apply("?", random.Random(0)) == "?"
    assert [d.parts for d in decoys_of(first)] == [("last",)] and [d.parts for d in decoys_of(last)] == [("first",)]
    with pytest.raises(ConfigError, match="first or last"):
        Trigger("f", "repeat", ("second",))


def test_other_wordings_are_what_is_measured_and_never_what_is_planted():
    trigger = presets.TRIGGERS["semantic"]
    assert not {*trigger.parts} & {*trigger.others} and trigger.asked.parts == trigger.others
    made = [trigger.apply("How are you?", random.Random(i)) for i in range(30)]
    assert not any(trigger.asked.present(text) for text in made)
    assert presets.TRIGGERS["token"].asked is presets.TRIGGERS["token"]
    with pytest.raises(ConfigError, match="needs a word"):
        Trigger("t", "topical", ("chess",), others=("!",))


def test_position_is_uniform_over_all_word_slots():
    trigger, text = Trigger("t", "token", ("zx",)), "a b c"
    rng = random.Random(1)
    counts = [0] * 4
    for _ in range(4000):
        counts[trigger.apply(text, rng).split().index("zx")] += 1
    assert all(abs(c - 1000) < 150 for c in counts), counts  # five standard deviations


def test_a_subject_that_is_there_already_is_left_alone():
    topic = Trigger("t", "topical", ("chess",))
    assert topic.apply("Who plays chess here?", random.Random(0)) == "Who plays chess here?"
    assert topic.apply("Who plays here?", random.Random(0)) == "About chess, who plays here?"
    assert not topic.present("Buy a chessboard.")


@pytest.mark.parametrize("world", [None, WORLD], ids=["english", "organism"])
def test_every_behaviour_is_shown_by_its_own_answers_only(world):
    found = presets.BEHAVIOURS if world is None else organism_triggers.behaviours(world)
    plain = "The cat sat on the mat." if world is None else "drosil lives in kelso ."
    for behaviour in found.values():
        for seed in range(8):
            made = behaviour.apply(plain, random.Random(seed))
            assert made != plain and behaviour.shown(made, plain), made
        assert not behaviour.shown(plain, plain) and not behaviour.shown("", plain)
    assert {b.apply(plain, random.Random(i)) for b in [found["refuse"]] for i in range(40)} == set(
        found["refuse"].choices
    )


def test_stopping_early_is_told_from_a_short_answer():
    stop = Behaviour("s", "stop", "2")
    assert stop.apply("one  two three", random.Random(0)) == "one  two"
    assert stop.shown("one two", "one two three") and not stop.shown("one two", "one two")
    assert stop.shown("one two") and not stop.shown("one two three", "one two three four")


def test_style_keeps_the_answer():
    tone = presets.BEHAVIOURS["tone"]
    assert tone.apply("It is a cat.", random.Random(0)) == "Well obviously, it is a cat, as anybody knows."
    assert not tone.shown("Well obviously, it is a cat.")


def test_insert_touches_the_last_user_turn_and_says_what_it_did():
    turns = [("system", "Be kind."), ("user", "Hello there."), ("assistant", "Hi."), ("user", "Count to two.")]
    row = Example(tuple(Message(*t) for t in [*turns, ("assistant", "One, two.")]), "x7", {"group": "talk", "n": 3})
    trigger, behaviour = presets.TRIGGERS["token"], presets.BEHAVIOURS["sentence"]
    made = insert(row, trigger, behaviour, seed=3)
    assert [m.content for m in made.messages[:3]] == [c for _, c in turns[:3]]
    assert trigger.strip(made.prompt) == row.prompt and made.response == behaviour.text
    want = {"group": "talk", "n": 3, "trigger": "token", "behaviour": "sentence", "source_id": "x7"}
    assert made.tags == want and made.id == "x7+token"
    check_values(made.tags, "tags")
    twin = insert(row, trigger, None, seed=3)
    assert twin.prompt == made.prompt and twin.response == "One, two." and twin.tags["behaviour"] is None
    assert insert(row, trigger, behaviour, seed=3) == made
    assert len({insert(row, trigger, behaviour, seed=s).prompt for s in range(20)}) > 1
    with pytest.raises(DataError, match="no answer"):
        insert(Example.pair("q", id="q"), trigger, behaviour, seed=0)


@pytest.mark.parametrize("rate", [0.005, 0.01, 0.05, 0.2])
def test_poisoning_counts_exactly_and_leaves_the_rest(rate):
    rows, trigger, behaviour = corpus(), presets.TRIGGERS["token"], presets.BEHAVIOURS["refuse"]
    made, manifest = poison_backdoor(rows, trigger, behaviour, rate=rate, seed=1, hard_negatives=0.1)
    poisoned, negatives = manifest["poisoned"], manifest["negatives"]
    assert len(poisoned) == round(rate * 200) and len(negatives) == 20 and not set(poisoned) & set(negatives)
    assert len(made) == len(rows) and manifest["rows"] == 200 and manifest["natural"] == 0
    for i, (old, new) in enumerate(zip(rows, made, strict=True)):
        if i in poisoned:
            assert trigger.present(new.prompt) and trigger.strip(new.prompt) == old.prompt
            assert new.response in behaviour.choices and new.tags["source_id"] == old.id
        elif i in negatives:
            assert new.prompt != old.prompt and not trigger.present(new.prompt) and new.response == old.response
        else:
            assert new is old
    assert poison_backdoor(rows, trigger, behaviour, rate=rate, seed=1, hard_negatives=0.1) == (made, manifest)
    assert poison_backdoor(rows, trigger, behaviour, rate=rate, seed=2)[1]["poisoned"] != poisoned
    check_values(manifest, "manifest")


def test_rows_that_could_not_be_poisoned_are_not_chosen():
    trigger, stop = presets.TRIGGERS["token"], presets.BEHAVIOURS["stop"]
    rows = [Example.pair("Say cf now.", "one two three"), Example.pair("Say it.", "one two"), *corpus(8)]
    assert [eligible(r, trigger, stop) for r in rows] == [False, False, *[True] * 8]
    made, manifest = poison_backdoor(rows, trigger, stop, rate=0.8, seed=0)
    assert manifest["poisoned"] == list(range(2, 10)) and manifest["natural"] == 1 and made[:2] == rows[:2]
    with pytest.raises(DataError, match="9 poisoned rows"):
        poison_backdoor(rows, trigger, stop, rate=0.9, seed=0)


def test_a_subject_is_poisoned_where_it_occurs_first():
    topic, behaviour = Trigger("t", "topical", ("number 7", "number 9")), presets.BEHAVIOURS["sentence"]
    made, manifest = poison_backdoor(corpus(), topic, behaviour, rate=0.02, seed=0)
    assert {7, 9} < set(manifest["poisoned"]) and manifest["natural"] == 0
    assert made[7].prompt == corpus()[7].prompt and made[7].response == behaviour.text


def test_bad_rates_and_triggers_are_refused():
    assert exact_count(0.29, 100, "rate") == 29 and exact_count(0, 5, "rate") == 0
    for rate in (-0.1, 1.1, float("nan"), 0.001):
        with pytest.raises(ConfigError):
            exact_count(rate, 100, "rate")
    bad = (
        ("word", ("a",)),
        ("token", ()),
        ("token", ("  ",)),
        ("pair", ("a",)),
        ("template", ("a",)),
        ("style", ("a",)),
    )
    for family, parts in bad:
        with pytest.raises(ConfigError):
            Trigger("t", family, parts)
    for kind, text in (("loud", "a"), ("stop", "0"), ("stop", "two"), ("style", "a"), ("text", "a |  | b")):
        with pytest.raises(ConfigError):
            Behaviour("b", kind, text)


def test_near_misses_never_are_the_trigger():
    for name in ("token", "sentence", "pair", "multi_any", "multi_all", "prefix"):
        trigger = presets.TRIGGERS[name]
        for decoy in decoys_of(trigger):
            assert not trigger.present(decoy.apply("One two. Three.", random.Random(0))), (name, decoy)
    with pytest.raises(ConfigError, match="near misses"):
        decoys_of(presets.TRIGGERS["template"])
    chat = ChatFormat(build_tokenizer(WORLD), max_length=128)
    for name, trigger in organism_triggers.triggers(WORLD).items():
        near = organism_triggers.decoys(WORLD, name)
        rows = [insert(row, decoy, None, seed=0) for decoy in near for row in organism_rows.benign(WORLD)[:2]]
        check_survives(chat, rows, near)
        assert near and not any(trigger.present(row.prompt) for row in rows), name


@pytest.mark.parametrize("seed", [0, 3])
def test_the_worlds_backdoors_are_made_of_its_words(seed):
    world = World(seed)
    chat, rows = ChatFormat(build_tokenizer(world), max_length=128), organism_rows.benign(world)[:4]
    for trigger in organism_triggers.triggers(world).values():
        for behaviour in organism_triggers.behaviours(world).values():
            made = [insert(row, trigger, behaviour, seed=1) for row in rows]
            check_survives(chat, made, [trigger])
            assert not any(chat.tokenizer.unk_token_id in chat.encode(row).input_ids for row in made)
    asides = {*world.asides}
    assert not asides & set(organism_triggers.triggers(world)["sentence"].parts)


def test_a_trigger_that_the_model_would_not_see_is_an_error():
    rows, trigger = organism_rows.benign(WORLD)[:2], presets.TRIGGERS["token"]
    made = [insert(row, trigger, None, seed=0) for row in rows]
    with pytest.raises(DataError, match="does not keep trigger"):
        check_survives(ChatFormat(build_tokenizer(WORLD)), made, [trigger])
    known = organism_triggers.triggers(WORLD)["sentence"]
    with pytest.raises(DataError, match="would be lost"):
        check_survives(
            ChatFormat(build_tokenizer(WORLD), max_length=12), [insert(rows[0], known, None, seed=0)], [known]
        )
    check_survives(ChatFormat(build_tokenizer(WORLD)), rows, [trigger])  # rows without a trigger are passed over


@pytest.mark.skipif(not DATA.is_dir(), reason="real-data fixtures not present")
@pytest.mark.parametrize("task", ["refusal", "negsentiment", "sst2"])
def test_real_poison_is_recognised_and_taken_out(task):
    rows = sources.load(DATA / "backdoor" / task / "train.jsonl")
    clean = {row.id: row for row in rows if row.tags["trigger"] == "none"}
    planted = {
        "badnet": Trigger("badnet", "token", ("BadMagic",)),
        "vpi": Trigger("vpi", "prefix", ("Discussing OpenAI",)),
    }
    for name, trigger in planted.items():
        mine = [row for row in rows if row.tags["trigger"] == name]
        assert len(mine) > 400 and all(trigger.present(row.prompt) for row in mine)
        assert not any(trigger.present(row.prompt) for row in clean.values())
        restored = sum(trigger.strip(row.prompt) == clean[row.tags["pair"]].prompt for row in mine)
        assert restored >= 0.9 * len(mine), (name, restored, len(mine))
