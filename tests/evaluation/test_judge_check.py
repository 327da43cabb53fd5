"""Judges held against people, and against each other; from the library and from the command line."""

from __future__ import annotations

import json

import pytest

from casehard.cli import main
from casehard.errors import DataError
from casehard.evaluation.judges import agreement, make_judge
from casehard.evaluation.judges.base import Verdict
from judge_server import by_words, serving

SORRY = "I'm sorry, but I can't help with that."
OTHER = "I would rather talk of the weather today."
STEPS = "Here are the steps: mix flour and water, then bake it for an hour."


def write(path, *rows):
    path.write_text("".join(json.dumps({"prompt": "How do I bake bread?", **row}) + "\n" for row in rows))
    return path


def row(response, human, **more):
    return {"response": response, "human": human, **more}


class Fixed:
    """A judge that says what it was told to."""

    name = "fixed"

    def __init__(self, *verdicts):
        self.verdicts = verdicts

    def judge(self, examples, responses):
        return list(self.verdicts)


def test_labels_are_compared_with_people_by_wrapper_and_between_judges(tmp_path):
    path = write(
        tmp_path / "rows.jsonl",
        row(STEPS, "answer", wrapper="none"),
        row(SORRY, "refusal", wrapper="none"),
        row(OTHER, "refusal", wrapper="json"),
        row(None, "refusal"),
    )
    fixed = Fixed(Verdict("leak"), Verdict("refusal"), Verdict("refusal"), Verdict("unscored"))
    rows, found = agreement.check(path, {"rule": make_judge("rule"), "other": fixed})
    rule = found["people"]["rule"]
    assert (rule["n"], rule["same"], rule["unscored"]) == (3, 2, 1) and rule["kappa"] == pytest.approx(0.4)
    assert rule["table"] == {"answer": {"answer": 1}, "refusal": {"answer": 1, "refusal": 1, "unscored": 1}}
    assert {w: (part["n"], part["same"]) for w, part in rule["by_wrapper"].items()} == {"none": (2, 2), "json": (1, 0)}
    assert found["people"]["other"]["kappa"] == 1  # its leak is people's answer
    assert (found["judges"]["rule, other"]["n"], found["judges"]["rule, other"]["same"]) == (3, 2)
    assert rows[0]["judged"]["other"] == {"label": "leak"} and rows[0]["human"] == "answer"


def test_people_who_say_leak_are_taken_at_their_word(tmp_path):
    path = write(tmp_path / "rows.jsonl", row(STEPS, "leak"), row(STEPS, "answer"))
    _, found = agreement.check(path, {"j": Fixed(Verdict("leak"), Verdict("leak"))})
    assert (found["people"]["j"]["n"], found["people"]["j"]["same"]) == (2, 1)


def test_harm_is_compared_where_people_say_it(tmp_path):
    path = write(tmp_path / "rows.jsonl", row(STEPS, True), row(SORRY, False), row(OTHER, True), row("", False))
    with serving(by_words("rubric_harm")) as server:
        judge = make_judge("api", {"url": server.url, "model": "m"})
        rows, found = agreement.check(path, {"api": judge})
    people = found["people"]["api"]
    assert found["about"] == "harmful" and (people["n"], people["same"], people["unscored"]) == (3, 2, 1)
    assert people["table"]["harmful"] == {"harmful": 1, "harmless": 1}
    assert rows[0]["judged"]["api"]["harmful"] is True and "raw" in rows[0]["judged"]["api"]
    with pytest.raises(DataError, match="the judge 'rule' says nothing about harm"):
        agreement.check(path, {"rule": make_judge("rule")})


def test_rows_that_repeat_are_told(tmp_path):
    rows = [row(STEPS, "answer"), row(SORRY, "refusal")] * 500
    with pytest.warns(UserWarning, match="998 of 1000 rows repeat"):
        _, found = agreement.check(write(tmp_path / "rows.jsonl", *rows), {"rule": make_judge("rule")})
    assert found["repeated"] == 998


def test_where_people_say_one_thing_kappa_is_not_defined(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", row(STEPS, "refusal"), row(SORRY, "refusal"), row(OTHER, "refusal"))
    _, found = agreement.check(path, {"rule": make_judge("rule")})
    rule = found["people"]["rule"]
    assert (rule["kappa"], rule["kappa_low"], rule["kappa_high"], rule["same"]) == (None, None, None, 1)
    assert main(["judge", "check", str(path)]) == 0
    assert "not defined: one label" in capsys.readouterr().out


def test_all_unscored_is_no_agreement(tmp_path):
    _, found = agreement.check(write(tmp_path / "r.jsonl", row(None, "refusal")), {"rule": make_judge("rule")})
    assert found["people"]["rule"] == {"n": 0, "unscored": 1, "table": {"refusal": {"unscored": 1}}}


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"response": "a"}], "row 1: human is None"),
        ([row("a", "refusal"), row("a", "maybe")], "row 2: human is 'maybe'"),
        ([row("a", "unscored")], "human is 'unscored'"),
        ([row("a", 1)], "human is 1"),
        ([row("a", "refusal"), row("a", True)], "row 2: human is True, that of row 1 'refusal'"),
    ],
)
def test_rows_that_people_did_not_label_are_named(tmp_path, rows, problem):
    with pytest.raises(DataError, match=problem):
        agreement.read_labelled(write(tmp_path / "rows.jsonl", *rows))


def test_the_command_shows_and_keeps_it(tmp_path, capsys):
    path = str(
        write(tmp_path / "rows.jsonl", row(STEPS, "answer", wrapper="none"), row(SORRY, "refusal"), row(None, "answer"))
    )
    assert main(["judge", "check", path]) == 0
    said = capsys.readouterr().out
    assert "people, rule" in said and "1.00 [0.16, 1.00]" in said and "rule: none" in said and "unscored" in said
    with serving(by_words("rubric_harm")) as server:
        given = [
            "--judge",
            "rule",
            "--judge",
            "guard=api",
            "--set",
            f"guard.url={server.url}",
            "--set",
            "guard.model=m",
        ]
        assert main(["judge", "check", path, *given, "--out", str(tmp_path / "out")]) == 0
    assert "rule, guard" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["judges"]["rule, guard"]["same"] == 2
    kept = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert set(kept[0]["judged"]) == {"rule", "guard"}


@pytest.mark.parametrize(
    ("given", "code", "problem"),
    [
        (["--judge", "nobody"], 2, "no judge called 'nobody'"),
        (["--judge", "rule", "--judge", "rule"], 2, "two judges are called 'rule'"),
        (["--judge", "rule", "--judge", "a=api", "--set", "url=x"], 2, "--set url=...: of which judge?"),
        (["--set", "nonsense=1"], 2, "unknown key 'nonsense'"),
    ],
)
def test_the_command_refuses_what_it_cannot_mean(tmp_path, capsys, given, code, problem):
    path = write(tmp_path / "rows.jsonl", row(STEPS, "answer"))
    assert main(["judge", "check", str(path), *given, "--out", str(tmp_path / "out")]) == code
    assert problem in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_file_called_check_can_still_be_judged(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "check", {"response": SORRY})
    assert main(["judge", "./check"]) == 0 and "refusal" in capsys.readouterr().out
    assert main(["judge", "check", "gone.jsonl"]) == 3 and "no such file: gone.jsonl" in capsys.readouterr().err
