"""Where the trained answer stands in a rendered chat, and what the chat template made of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from casehard.data.tokens import Tokens


class Change(NamedTuple):
    """How a template writes an answer otherwise than the row has it."""

    kind: Literal["blanks", "cut", "rewritten"]
    """White space only; a part left out; other words in its place."""
    dropped: str = ""
    """The part that is left out."""


def changing(text: str, other: str) -> tuple[int, int]:
    """Return the characters of ``text`` that differ where the same chat is rendered with another answer."""
    start = _alike(text, other)
    return start, len(text) - _alike(text[start:][::-1], other[start:][::-1])


def _alike(a: str, b: str) -> int:
    """Return how many first characters two texts share."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def change(answer: str, written: str) -> Change:
    """Say what became of ``answer`` where the template wrote ``written``, which has something of it."""
    was, left = answer.strip(), written.strip()
    at = was.find(left)
    if _dense(was) == _dense(left):
        return Change("blanks")
    if was.endswith(left):
        return Change("cut", was[: len(was) - len(left)])
    return Change("rewritten") if at < 0 else Change("cut", was[:at] + was[at + len(left) :])


def only_blanks(answer: str, text: str) -> bool:
    """Return whether a text holds an answer, white space aside."""
    return _dense(answer) in _dense(text)


def _dense(text: str) -> str:
    return "".join(text.split())


def described(changes: Sequence[tuple[str, Change]]) -> str:
    """Return what a template does to answers, in words.

    Args:
        changes: name of the row, and what became of its answer; at least one.
    """
    cut = [(name, c) for name, c in changes if c.kind == "cut"]
    other = [(name, c) for name, c in changes if c.kind == "rewritten"]
    blank = len(changes) - len(cut) - len(other)
    parts = []
    if cut:
        name, first = cut[0]
        count = sum(len(c.dropped) for _, c in cut)
        parts.append(f"{len(cut)} lose text ({count} characters; first {name}: {_short(first.dropped)!r})")
    if other:
        parts.append(f"{len(other)} are written in other words (first {other[0][0]})")
    if blank:
        parts.append(f"{blank} lose or gain white space only")
    return ", ".join(parts)


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def end_of_turn(tokens: Tokens, text: str, first: int, stop: int, *, exact: bool) -> tuple[int, bool]:
    """Return the position after the last trained token, and whether an EOS has to be appended there.

    Args:
        tokens: the row.
        text: what was tokenised, stand-ins turned back.
        first: first trained token.
        stop: character position where the turn ends.
        exact: the template marked the turn, so what it marked is kept as it is.
    """
    count = len(tokens.ids)
    end = max((i + 1 for i in range(first, count) if tokens.offsets[i][0] < stop), default=first)
    inside = [i for i in tokens.control if first <= i < end]
    if inside and not text[tokens.offsets[inside[-1]][1] : stop].strip():
        return (end if exact else inside[-1] + 1), False
    after = next((i for i in tokens.control if i >= end), None)
    if after is not None and not text[stop : tokens.offsets[after][0]].strip():
        return after + 1, False
    return end, True
