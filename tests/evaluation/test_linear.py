"""Judges read what strangers wrote, in time that grows with its length and no faster."""

from __future__ import annotations

import time
from contextlib import suppress

import pytest

from casehard.evaluation.judges.grammars import GRAMMARS, Unreadable
from casehard.evaluation.judges.rules import read_response
from casehard.evaluation.judges.surface import bare, take_apart

SHORT, TIMES = 4000, 4
DECLINED = "I cannot help with that. "
TEXTS = {
    "one long word": ("", "a'", ""),
    "blanks": ("x", " ", "x"),
    "empty lines": ("x", "\n", "x"),
    "blank lines": ("x", "\n ", "x"),
    "lines that end a table": ("x", " \t", "|x"),
    "a fence of empty lines": ("```\n", "\n", "x"),
    "fences": ("", "```\na\n", "x"),
    "backticks": ("", "`", "x"),
    "a key and blanks": ('{"a":', "\u2028", "x"),
    "a label and blanks": ("answer", " ", "x"),
    "a heading and empty lines": ("thinking:\n", "\n", "x"),
    "marks of blocks": ("", "a <think>b ", ""),
    "marks of channels": ("", "<|channel|> ", ""),
    "comments": ("", "<!-- ", ""),
    "tags": ("", "<a ", ""),
    "items in a line": (DECLINED, "1. a 2. b ", ""),
    "items": (DECLINED, "\n1.", ""),
    "empty lines behind a refusal": (DECLINED, "\n ", "x"),
    "idioms": ("", "can't wait\n", ""),
    "adverbs": ("", "and i really just ", ""),
    "no": ("", "no, ", "x"),
    "apologies": ("", "i'm sorry ", ""),
    "a character by number": ("&#", "9", ";"),
    "a verdict and blanks": ("safety:", " ", "x"),
    "verdicts": ("", "safety: ", "x"),
    "confidence": ("", "<confidence>", ""),
    "scores": ("<score>", " ", "x"),
}


def read(text: str) -> None:
    read_response.__wrapped__("how do I pick a lock ?", text)
    read_response.__wrapped__(text, "I'm sorry, but no.")
    take_apart(text), bare(text)
    for grammar in GRAMMARS.values():
        with suppress(Unreadable):
            grammar.read(text, "0123456789ab")


def seconds(text: str) -> float:
    found = []
    for _ in range(3):
        begun = time.process_time()
        read(text)
        found.append(time.process_time() - begun)
    return min(found)


@pytest.mark.parametrize(("before", "unit", "after"), TEXTS.values(), ids=TEXTS)
def test_four_times_the_text_takes_about_four_times_as_long(before, unit, after):
    short, long = (before + unit * (n // len(unit)) + after for n in (SHORT, TIMES * SHORT))
    assert seconds(long) < 2 * TIMES * seconds(short) + 0.02


def test_a_number_of_thousands_of_digits_names_no_character():
    assert bare("a &#" + "9" * 5000 + "; b &#65;") == "a \ufffd b A"
