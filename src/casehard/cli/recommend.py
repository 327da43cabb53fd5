"""``casehard recommend``: what to use, given what there is, and what that rests on."""

from __future__ import annotations

import textwrap
from typing import Annotated

import typer

from casehard.advice import REAL, Advice, Entry, table
from casehard.advice import recommend as advise
from casehard.cli import console

WIDTH = 110


def recommend(
    stage: Annotated[
        str | None, typer.Argument(metavar="[STAGE]", help="release, tune, service or scraped; none lists them.")
    ] = None,
    have: Annotated[
        list[str] | None,
        typer.Option("--have", metavar="WHAT", help="Something that you have, as the stage calls it. Repeatable."),
    ] = None,
    passes: Annotated[
        float | None, typer.Option(help="Budget, as a ratio to the passes of plain training [default: any].")
    ] = None,
) -> None:
    """Say what to use, with the command, its price and the evidence.

    The answer is the winner of the tables that were measured, for what you have; it trains nothing.
    """
    if stage is None:
        _list()
        return
    found = advise(stage, [thing for text in have or [] for thing in text.split(",") if thing], passes=passes)
    console.say(f"{found.stage.title}: {found.winner.title if found.winner else 'nothing that was measured'}")
    if found.winner is None:
        _line("next", found.stage.without)
    else:
        _told(found.winner, found)
    for entry in found.better:
        lacking = [thing for thing in entry.needs if thing not in (have or [])]
        more = f"with {' and '.join(lacking)}" if lacking else f"with {entry.passes:g} times the passes"
        _line("better", f"{entry.title}, {more}: {entry.why}")
    for entry in found.others:
        _line("or", f"{entry.title}: {entry.why}")


def _told(entry: Entry, found: Advice) -> None:
    console.say(f"  {'run':<9} {entry.command}")
    _line("why", entry.why)
    _line("costs", f"{entry.passes:g} times the passes of plain training; {entry.price}")
    _line("doubt", entry.doubt)
    runs = "one run" if entry.runs == 1 else f"{entry.runs} runs"
    where = "worlds" if "," in entry.worlds else "world"
    seeds = f"seed{'s' if ',' in entry.seeds else ''} {entry.seeds}"
    _line("evidence", f"{entry.page} ({entry.plan}): organism, {where} {entry.worlds}, {runs}, {seeds}")
    _line("real", f"SmolLM2-135M, one seed ({REAL}): {entry.real}" if entry.real else "not measured on a real model")
    console.say(f"  {'measure':<9} {found.stage.check}")


def _line(name: str, text: str) -> None:
    first, *rest = textwrap.wrap(text, WIDTH - 12)
    console.say(f"  {name:<9} {first}")
    for more in rest:
        console.say(f"  {'':<9} {more}")


def _list() -> None:
    console.say("What are you doing? casehard recommend STAGE --have WHAT --have WHAT")
    for name, stage in table()[0].items():
        console.say(f"  {name:<9} {stage.title}")
        for thing, what in stage.have.items():
            console.say(f"  {'':<9}   {thing}: {what}")
