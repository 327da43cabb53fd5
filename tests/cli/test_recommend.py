"""``casehard recommend``: the stored winners, held to the pages of evidence, the catalogue and the commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import casehard as ch
from casehard.advice import REAL, table
from casehard.cli import main
from casehard.defences import DEFENCES
from casehard.errors import ConfigError
from command_lines import Line, commands, faults

ROOT = Path(__file__).resolve().parents[2]
STAGES, ENTRIES = table()
EACH = [pytest.param(entry, id=f"{entry.stage}-{entry.method}-{i}") for i, entry in enumerate(ENTRIES)]


def numbers(text):
    return set(re.findall(r"\d+(?:\.\d+)?", text))


@pytest.mark.parametrize("entry", EACH)
def test_every_number_stands_on_the_page_of_evidence(entry):
    page = " ".join((ROOT / entry.page).read_text(encoding="utf-8").split())
    assert entry.says
    for text in entry.says:
        assert text in page, f"{entry.page} does not say: {text}"
    assert (ROOT / entry.plan).is_file()
    plan = (ROOT / entry.plan).read_text(encoding="utf-8")
    worlds, seeds = re.findall(r"world_seed: (\d+)", plan), re.findall(r"^seeds: \[(.*)\]", plan, re.MULTILINE)
    assert entry.worlds == ", ".join(worlds) and [entry.seeds] == seeds
    assert entry.runs == len(worlds) * len(entry.seeds.split(","))
    # Rates of the reason are among the words quoted from the page.
    rates = numbers(" ".join(re.findall(r"[\d.]+ ?(?:%|\([^)]*\))", entry.why)))
    assert rates <= numbers(" ".join(entry.says)), rates - numbers(" ".join(entry.says))


@pytest.mark.parametrize("entry", EACH)
def test_what_a_real_model_did_stands_on_its_page(entry):
    page = " ".join((ROOT / REAL).read_text(encoding="utf-8").split())
    assert bool(entry.real) == bool(entry.real_says)
    for text in entry.real_says:
        assert text in page, f"{REAL} does not say: {text}"
    assert numbers(entry.real) <= numbers(" ".join(entry.real_says))


@pytest.mark.parametrize("entry", EACH)
def test_every_entry_is_a_method_and_its_command_can_be_typed(entry):
    stage = STAGES[entry.stage]
    assert entry.method in DEFENCES and set(entry.needs) <= set(stage.have)
    for command in (entry.command, stage.check):
        assert commands(f"    {command}") == [Line(command, whole=True)] and faults(Line(command, whole=True)) == []
    assert DEFENCES.name(entry.command.split()[2]) == entry.method


@pytest.mark.parametrize(
    ("stage", "have", "passes", "wins"),
    [
        ("release", ("refusals", "unsafe", "retain"), None, "Patcher, preset holds"),
        ("release", ("refusals", "unsafe", "retain"), 3, "Patcher, k1 = 10"),
        ("release", ("refusals",), None, None),
        ("tune", ("safe",), None, "SafeGrad"),
        ("tune", ("safe",), 1.5, "safe rows in every batch"),
        ("service", ("assets", "safe"), None, "Buffer-and-Reinforce"),
        ("service", ("safe",), None, "safe rows in every batch"),
        ("scraped", ("verified", "base"), None, "fine-mixing"),
        ("scraped", ("verified",), None, "CROW"),
        ("scraped", (), None, None),
    ],
)
def test_the_winner_is_the_first_that_can_be_used(stage, have, passes, wins, capsys):
    found = ch.recommend(stage, have, passes=passes)
    assert (found.winner.title if found.winner else None) == wins
    if found.winner is None:
        assert len(found.better) == sum(e.stage == stage for e in ENTRIES)
    given = [part for thing in have for part in ("--have", thing)] + (["--passes", str(passes)] if passes else [])
    assert main(["recommend", stage, *given]) == 0
    told = capsys.readouterr().out
    assert len(told.splitlines()) <= 20 and max(map(len, told.splitlines())) <= 150
    for word in ("run", "why", "costs", "doubt", "evidence", "real", "measure") if wins else ("next",):
        assert f"  {word} " in told
    assert (wins or "nothing that was measured") in told.splitlines()[0]


def test_stages_are_listed_and_mistakes_are_named(capsys):
    assert main(["recommend"]) == 0
    told = capsys.readouterr().out
    assert all(f"  {name} " in told for name in STAGES) and len(told.splitlines()) <= 20
    wrong = ((["tuning"], "tune"), (["tune", "--have", "save"], "safe"), (["tune", "--passes", "0"], "2 is"))
    for arguments, hint in wrong:
        assert main(["recommend", *arguments]) == 2
        assert hint in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no stage"):
        ch.recommend("x")
