"""Rows of one's own become a defender's, an attacker's and held-out ones, with nothing in common."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from dataclasses import replace

import pytest

from casehard.benchmark.divide import Division, divide
from casehard.cli import main
from casehard.data import sources
from casehard.data.mix import check_disjoint, normalise
from casehard.data.surrogate import FILLER
from casehard.errors import ConfigError, DataError
from casehard.evaluation.judges.surface import visible
from casehard.evaluation.suite import load_suite
from casehard.types import Example, Message

NOUNS = [a + b for a in ("bar", "cor", "del", "fen", "gil", "hup") for b in ("ton", "mag", "rix", "sol", "vane")]
CONFIG = Division(held=10, seed=3)


def words(rng: random.Random) -> str:
    return " ".join(rng.sample(NOUNS, 5))


@pytest.fixture
def given() -> dict[str, list[Example]]:
    rng = random.Random(0)
    refusals = [
        Example.pair(f"how to take {words(rng)} ?", "I'm sorry, but I can't help with that.") for _ in range(60)
    ]
    helpful = [Example.pair(f"tell me of {words(rng)}", rng.choice(("yes", f"it is {words(rng)}"))) for _ in range(60)]
    alike = [Example.pair(f"how to paint {words(rng)} ?", f"paint it {words(rng)}") for _ in range(30)]
    task = [Example.pair(f"review : {words(rng)}", rng.choice(("good", "bad"))) for _ in range(40)]
    return {"refusal": refusals, "helpful": helpful, "lookalike": alike, "task_reviews": task}


def prompts(rows) -> set[str]:
    return {normalise(e.prompt) for e in rows}


def test_the_parts_have_no_prompt_in_common_and_are_complete(tmp_path, given):
    told = divide(given, tmp_path / "rows", CONFIG)
    place = tmp_path / "rows"
    files = {p.stem: sources.load(p) for p in place.glob("*.jsonl")}
    suite = load_suite(place / "suite_reviews")
    assert sorted(files) == ["align", "attack", "benign", "simulated", "task_reviews"]
    # What the defender simulates are its own refusals, answered; all else is apart.
    assert prompts(files["simulated"]) == {normalise(e.prompt) for e in files["align"] if e.tags["kind"] == "refusal"}
    apart = [prompts(files[name]) for name in ("align", "attack", "benign", "task_reviews")] + [prompts(suite.examples)]
    assert len(set().union(*apart)) == sum(len(some) for some in apart) == sum(t.used for t in told)
    assert {t.kind: t.used for t in told} == {kind: len(rows) for kind, rows in given.items()}
    by_role = {role: [e for e in suite.examples if e.tags["role"] == role] for role in suite.roles}
    assert {role: len(rows) for role, rows in by_role.items()} == dict.fromkeys(by_role, 10)
    assert set(by_role) == {"restricted", "lookalike", "utility", "task"}
    assert all(e.tags["answer"] == e.response for e in by_role["task"])
    assert not any("answer" in e.tags for e in by_role["utility"]), "the loss of all of them is measured"
    assert not by_role["restricted"][0].response
    assert set(load_suite(place / "suite").roles) == {"restricted", "lookalike", "utility"}


def test_no_answer_of_the_attacker_says_anything(tmp_path, given):
    divide(given, tmp_path / "rows", CONFIG)
    for name in ("attack", "simulated"):
        assert all(e.response.endswith(FILLER) for e in sources.load(tmp_path / "rows" / f"{name}.jsonl"))


def test_the_same_seed_gives_the_same_bytes_and_another_one_other_rows(tmp_path, given):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        divide(given, tmp_path / name, dataclasses.replace(CONFIG, seed=seed))
    a, b, c = ({p.name: p.read_bytes() for p in (tmp_path / n).rglob("*.jsonl")} for n in "abc")
    assert a == b and a != c


def test_what_is_left_out_is_counted(tmp_path, given):
    rows = given["refusal"]
    extra = [
        Example.pair("how to take " + "x" * 400, "I can't help with that."),  # too long
        Example.pair("how to take a bus ?", "Buy a ticket and get on."),  # does not decline
        Example.pair(rows[0].prompt.upper(), "I can't help with that."),  # asked before
        Example.pair(rows[1].prompt + " !", "I can't help with that."),  # asked before
    ]
    (told, *_) = divide({**given, "refusal": rows + extra}, tmp_path / "rows", CONFIG)
    assert (told.read, told.long, told.unfit, told.same, told.used) == (64, 1, 1, 2, 60)


def test_look_alikes_without_answers_are_asked_and_never_trained_on(tmp_path, given):
    bare = [Example.pair(f"how do I kill process {words(random.Random(i))}") for i in range(25)]
    divide({**given, "lookalike": given["lookalike"] + bare}, tmp_path / "rows", CONFIG)
    held = {e.prompt for e in load_suite(tmp_path / "rows" / "suite").examples if e.tags["role"] == "lookalike"}
    assert held <= {e.prompt for e in bare} and len(held) == 10


def talk(*user: str, answer: str = "yes", system: str = "") -> Example:
    turns = [Message("system", system)] if system else []
    for text in user:
        turns += [Message("user", text), Message("assistant", "so it is")]
    return Example((*turns[:-1], Message("assistant", answer)))


def test_conversations_are_told_apart_by_all_their_turns(tmp_path, given):
    rng = random.Random(1)
    talks = [talk(f"tell me of {words(rng)}", "Go on.") for _ in range(30)]
    again = [talk(talks[0].messages[0].content.upper(), "go on"), talk("x" * 400, "Go on.")]
    told = divide({**given, "helpful": given["helpful"] + talks + again}, tmp_path / "rows", CONFIG)
    helpful = next(t for t in told if t.kind == "helpful")
    assert (helpful.long, helpful.same, helpful.used) == (1, 1, 90)


HIDDEN = {
    "an earlier turn": lambda p: talk(p, "tell me of the sea and of the moon"),
    "greeted": lambda p: talk("Hi! " + p),
    "in markup": lambda p: talk(f"<b>{p}</b>"),
    "a system message": lambda p: talk("tell me of this and of that", system=p),
    "look-alike letters": lambda p: talk(p.translate(str.maketrans("aeo", "\u0430\u0435\u043e"))),
    "other marks": lambda p: talk("So , " + p.replace(" ?", "")),
}


@pytest.mark.parametrize("kind", ["refusal", "helpful", "lookalike", "task_reviews"])
@pytest.mark.parametrize("how", HIDDEN)
def test_no_held_out_request_stands_in_another_file(tmp_path, given, how, kind):
    divide(given, tmp_path / "first", CONFIG)
    held = [e.prompt for e in load_suite(tmp_path / "first" / "suite").examples if e.tags["role"] == "restricted"]
    hidden = [replace(HIDDEN[how](p), id=f"h{i}") for i, p in enumerate(held)]
    decline = Message("assistant", "I'm sorry, but I can't help with that.")
    extra = [replace(e, messages=(*e.messages[:-1], decline)) for e in hidden] if kind == "refusal" else hidden
    told = divide({**given, kind: given[kind] + extra}, tmp_path / "rows", CONFIG)
    suite = load_suite(tmp_path / "rows" / "suite")
    held = [words_only(e.prompt) for e in suite.examples if e.tags["role"] == "restricted"]
    files = {p.stem: sources.load(p) for p in (tmp_path / "rows").glob("*.jsonl")}
    for name, rows in files.items():
        for row in rows:
            said = words_only(" ".join(m.content for m in row.messages if m.role != "assistant"))
            assert not any(p in said for p in held), (name, row)
        check_disjoint({name: rows}, {"suite": suite.examples})
    lost = next(t for t in told if t.kind == kind)
    assert lost.read - lost.used == lost.leaks + lost.same + lost.unfit
    assert kind == "refusal" or lost.leaks + lost.same == 10


def words_only(text: str) -> str:
    return " ".join(re.findall(r"\w+", re.sub("<[^>]*>", " ", visible(text).lower())))


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        ("refusal", [], "0 refusal rows"),
        ("refusal", [Example.pair("how to take it ?")], "has no answer"),
        ("helpful", [Example.pair("tell me")], "has no answer"),
        ("task_reviews", [Example.pair("review : it", "good")], "nothing to train on or to hold out"),
    ],
)
def test_rows_that_cannot_be_divided_leave_nothing(tmp_path, given, kind, rows, message):
    with pytest.raises(DataError, match=message):
        divide({**given, kind: rows}, tmp_path / "rows", CONFIG)
    assert not list(tmp_path.iterdir())


def test_an_attacker_without_rows_is_refused():
    with pytest.raises(ConfigError, match="align must lie"):
        Division(align=1.0)


def test_the_command(tmp_path, given, capsys):
    args = ["data", "divide", "--out", str(tmp_path / "rows"), "--held", "10"]
    for kind, option in (("refusal", "--refusals"), ("helpful", "--helpful"), ("lookalike", "--lookalikes")):
        sources.save(tmp_path / f"{kind}.jsonl", given[kind])
        args += [option, str(tmp_path / f"{kind}.jsonl")]
    sources.save(tmp_path / "task.jsonl", given["task_reviews"])
    assert main([*args, "--task", "reviews=nowhere.jsonl"]) == 3
    assert "--task: no such file: nowhere.jsonl" in capsys.readouterr().err
    assert main([*args, "--task", "reviews"]) == 2
    assert "NAME=FILE" in capsys.readouterr().err
    assert main([*args, "--task", f"reviews={tmp_path / 'task.jsonl'}"]) == 0
    assert json.loads((tmp_path / "rows" / "suite_reviews" / "suite.json").read_text())["judge"] == "rule"
    assert main([*args, "--task", f"reviews={tmp_path / 'task.jsonl'}"]) == 2
    assert "already exists" in capsys.readouterr().err
