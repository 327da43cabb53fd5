"""Poisoned training mixes with exact counts, and the check that training never saw an evaluation prompt."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple, TypeVar

from casehard.errors import ConfigError, DataError
from casehard.seeds import derive
from casehard.types import Example

T = TypeVar("T")


class Counts(NamedTuple):
    """Rows of each kind in a mix; example: share 0.1 of 1000 -> (100, 900)."""

    harmful: int
    benign: int


def counts(*, share: float, n: int) -> Counts:
    """Return how many rows of each kind a mix of ``n`` rows with harmful share ``share`` holds (half rounds up).

    Raises:
        ConfigError: ``share`` outside [0, 1], ``n`` < 1, or a share that is neither 0 nor 1 but rounds to it.
    """
    if not (math.isfinite(share) and 0 <= share <= 1):
        raise ConfigError(f"share must lie in [0, 1], got {share}")
    if n < 1:
        raise ConfigError(f"a mix needs at least one row, got n={n}")
    harmful = math.floor(share * n + 0.5)
    if 0 < share < 1 and harmful in (0, n):
        raise ConfigError(
            f"share {share} of {n} rows rounds to {harmful} harmful rows",
            hint=f"use at least {math.ceil(0.5 / max(min(share, 1 - share), 1e-9))} rows, or share 0 or 1",
        )
    return Counts(harmful, n - harmful)


def _draw(rows: Sequence[T], n: int, *, kind: str, repeat: bool, rng: random.Random) -> list[T]:
    """Draw ``n`` rows; with ``repeat`` whole passes and a rest, so that counts per row differ by at most one."""
    if n > 0 and not rows:
        raise DataError(
            f"the mix needs {n} {kind} rows and there are none",
            hint=f"give {kind} rows, or a share of {0 if kind == 'harmful' else 1}",
        )
    if n > len(rows) and not repeat:
        raise DataError(
            f"the mix needs {n} {kind} rows and there are only {len(rows)}",
            hint="give more rows, or mix fewer: `attack finetune --set config.rows=N`, settings: {rows: N} in a plan",
        )
    drawn: list[T] = []
    while len(drawn) < n:
        drawn += rng.sample(rows, min(n - len(drawn), len(rows)))
    return drawn


def poison(
    harmful: Sequence[Example],
    benign: Sequence[Example],
    *,
    share: float,
    n: int,
    seed: int,
    oversample: bool = False,
) -> list[Example]:
    """Mix ``n`` rows of which exactly :func:`counts` are harmful, in seeded random order.

    Args:
        harmful: rows the attacker wants learnt.
        benign: rows they are hidden among.
        share: harmful share p in [0, 1].
        n: rows in the mix.
        seed: decides which rows and in which order.
        oversample: allow rows to occur several times when a side has too few.

    Raises:
        ConfigError: see :func:`counts`.
        DataError: too few rows on one side and ``oversample`` is off.
    """
    wanted = counts(share=share, n=n)
    rng = random.Random(derive(seed, 0, "poison"))
    mix = _draw(harmful, wanted.harmful, kind="harmful", repeat=oversample, rng=rng)
    mix += _draw(benign, wanted.benign, kind="benign", repeat=oversample, rng=rng)
    rng.shuffle(mix)
    return mix


class _Kept(dict[int, str]):
    """What becomes of a character, found once each: kept, a blank, or nothing where it cannot be seen."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        kind = unicodedata.category(char)
        if char.isspace() or kind in ("Zs", "Zl", "Zp"):
            found = char
        elif kind.startswith("C") or _UNSEEN.match(char):
            found = ""
        elif kind.startswith("P") and kind not in ("Ps", "Pe") and char not in _MEANT:
            found = " "
        else:
            found = char
        self[code] = found
        return found


_MEANT = "#%&@\\/*,.:!-\u2030\u2e33\ua71d"
"""Punctuation that can carry meaning; `*,.:!-` only in some places, see ``_PLACES``."""
_UNSEEN = re.compile(
    "[\u0300-\u036f\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\u2800\u3164\ufe00-\ufe2f]"
)
_QUOTES = re.compile(
    "[\"'`\u2018-\u201f\u2032-\u2037\u2039\u203a\u00ab\u00bb\u02b9-\u02bf\u02c8\u275b-\u275e\u300c-\u300f\u301d-\u301f]"
)
_SIGNS = str.maketrans(
    {"\u2044": "/", "\u2215": "/", "\u00f7": "/"}
    | dict.fromkeys("\u00d7\u22c5\u2219", "\u2217")
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2043", "-")
)
_RAISED = re.compile("[\u00b2\u00b3\u00b9\u2070\u2071\u2074-\u207f]+")
_FRACTION = re.compile("[\u00bc-\u00be\u2150-\u215f\u2189]")
_STRAY = re.compile(
    "[\u00a8\u00af\u00b4\u00b8\u02c2-\u02df\u02e5-\u02ff\u037a\u0384\u0385\u1fbd-\u1fc1\u1fcd-\u1fcf\u1fdd-\u1fdf\u1fed-\u1fef\u1ffd\u1ffe]"
)
_KEPT = _Kept()
_ALONE = r"(?<![^\W\d_])[^\W\d_](?![^\W\d_])"  # a letter by itself: a name in a formula
_SIGN = r"=+^%|&~/\u2217\u2212"
# Where punctuation means something it becomes a sign that nothing drops, so that the form of a form is itself.
_PLACES = tuple(
    (re.compile(pattern, re.MULTILINE), sign)
    for pattern, sign in (
        (r"^[ \t]*(?:[-*>\u2022]|#{1,6})[ \t]+(?=[^\w\n]{0,9}[^\W\d_])", " "),  # bullets, headings, quoted lines
        (r"(?<![\w)\]}*])(\*{1,3})(?=[^\s*])([^*\n]{1,200}?)(?<=\S)\1(?![\w*])", r"\2"),  # emphasis
        (r"(?<=\d),(?=\d{3}(?!\d))(?<!\d{4},)", ""),  # thousands
        (r"(?:(?<=\d)|(?<![\w.]))\.(?=\d)", "\u2e33"),  # 1.5 and .5
        (r"(?<=[\d(\[{]):+(?=[\d)\]}])|(?<=\w):+(?=\])|(?<=\[):+(?=\w)", "\u2236"),  # 3:30 and a[1:]
        (
            r"(?<!!)!++(?==)|(?<=[\d)])!++(?=\s*+[-+*/^=%<>)\u2217\u2212])|(?<![^\s(\[{&|])!++(?=[\w(])",
            "\ua71d",
        ),  # !=, 5!/3!, !x
        (r"\*", "\u2217"),
        (rf"(?<![^\s(\[{{<>{_SIGN}])-++(?=[\d(\[{{]|{_ALONE})|(?<!-)-++(?=[>=])", "\u2212"),  # -5, ->
        (rf"([\d)\]}}<>{_SIGN}]|{_ALONE})\s*+-++(?=\s*+(?:[\d(\[{{<>{_SIGN}]|{_ALONE}))", "\\1\u2212"),  # 5 - 3
        (rf"({_ALONE})--+(?!\w)", "\\1\u2212"),  # i--
    )
)


SHORT = 2000
"""Characters up to which normal forms are remembered: every check of a run asks for those of the same prompts."""


def normalise(text: str) -> str:
    """Return the form in which prompts are compared: what is left when all that carries no meaning is gone.

    Case, blanks, quotes, prose punctuation (commas, full stops, hyphens in words, marks at an end), zero-width and
    other unseen characters, and the Unicode form go. Letters, digits and their marks stay; so do signs (``+``, ``#``,
    ``&``, brackets, currency, emoji), a minus, a point or colon within numbers, and the blank that keeps two numbers
    apart. Text of punctuation alone keeps it, without blanks.
    """
    return _remembered(text) if len(text) <= SHORT else _normal(text)


def _normal(text: str) -> str:
    text = _QUOTES.sub(" ", text)
    text = _RAISED.sub(lambda run: "^" + run.group(), _FRACTION.sub(r" \g<0>", _STRAY.sub("", text)))
    folded = _fold(text)
    kept = folded.translate(_SIGNS).translate(_KEPT)
    for pattern, sign in _PLACES:
        kept = pattern.sub(sign, kept)
    kept = re.sub(r"[\s,.:!-]+", " ", kept)
    kept = re.sub(r"(?<!\d) | (?!\d)", "", kept)
    return _fold(kept) or "".join(folded.split())


_remembered = lru_cache(maxsize=1 << 14)(_normal)


def _fold(text: str) -> str:
    while (folded := unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())) != text:
        text = folded
    return text


def content_hash(example: Example) -> str:
    """Return the SHA-256 (hex) of the normal form of the user turns: equal for prompts that ask the same."""
    return _hash(example, normalise)


def _hash(example: Example, form: Callable[[str], str]) -> str:
    asked = "\n".join(form(m.content) for m in example.messages if m.role == "user")
    return hashlib.sha256(asked.encode()).hexdigest()


def _last(example: Example) -> Example:
    """Return the last user turn alone, or the example where it has no other."""
    asked = [m for m in example.messages if m.role == "user"]
    return replace(example, messages=(asked[-1],)) if len(asked) > 1 else example


def trained_hashes(example: Example) -> list[str]:
    """Return the hashes a row's prompt is known by: of all its user turns, and of the last, whose answer it trains."""
    return [content_hash(example), content_hash(_last(example))]


ALONE = 12
"""Bytes of normal form beyond which a last turn is a question by itself; "Tell me more." asks by what came before."""


def _asked(example: Example) -> list[Example]:
    """Return what a row that is measured asks: the conversation, and its last user turn where that says enough."""
    last = _last(example)
    return [example, last] if last is not example and len(normalise(last.prompt).encode()) > ALONE else [example]


def asked_hashes(example: Example) -> list[str]:
    """Return the hashes of which none may be trained where a row is measured: a greeting before hides no question."""
    return [content_hash(e) for e in _asked(example)]


FORM = "2:"
"""Stands before the marks of today's normal form; marks of the first form have nothing before them."""


def mark(example: Example) -> str:
    """Return FORM and 64 bits of :func:`content_hash` in hex: among a million prompts two collide at odds of 3e-8."""
    return FORM + content_hash(example)[:16]


def first_mark(example: Example) -> str:
    """Return the mark by which the same prompt is known in folders written before signs counted.

    That form kept letters and digits only, so that ``5 + 3`` and ``5 - 3`` share it.
    """
    return _hash(example, _letters_and_digits)[:16]


def _letters_and_digits(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).lower()
    return "".join(c for c in folded if c.isalnum()) or "".join(folded.split())


def is_marked(example: Example, known: Collection[str]) -> bool:
    """Return whether ``example``, or its last user turn by itself, is among marks of whatever form each of them is."""
    return has_mark(example, known) or any(first_mark(e) in known for e in _asked(example))


def has_mark(example: Example, known: Collection[str]) -> bool:
    """Return whether the same is among the marks of today's form."""
    return any(mark(e) in known for e in _asked(example))


def marks(*sets: Sequence[Example]) -> set[str]:
    """Return the marks of all prompts, as kept in the provenance of what was trained on them; see `trained_hashes`."""
    return {FORM + h[:16] for rows in sets for example in rows for h in trained_hashes(example)}


def _name(example: Example, position: int) -> str:
    return example.id or f"row {position + 1}"


def check_disjoint(train: Mapping[str, Sequence[Example]], evaluation: Mapping[str, Sequence[Example]]) -> None:
    """Check that no evaluation prompt, compared by :func:`content_hash`, occurs in any training set.

    A prompt also occurs where it is the last user turn of a longer conversation: its answer is trained there too. And
    a conversation is measured by the answer to its last turn, so that this must not be trained either; see `ALONE`.

    Args:
        train: training sets by name.
        evaluation: evaluation sets by name.

    Raises:
        DataError: names every overlapping pair of sets, how many prompts they share, and the first few rows.
    """
    seen = {
        name: {h: _name(e, i) for i, e in reversed(list(enumerate(rows))) for h in trained_hashes(e)}
        for name, rows in train.items()
    }
    problems: list[str] = []
    for (left, hashes), (right, rows) in itertools.product(seen.items(), evaluation.items()):
        found = {i: [h for h in asked_hashes(e) if h in hashes] for i, e in enumerate(rows)}
        shared = [(hashes[some[0]], _name(rows[i], i)) for i, some in found.items() if some]
        if shared:
            first = ", ".join(f"{a} = {b}" for a, b in shared[:3])
            problems.append(
                f"{len(shared)} of {len(rows)} prompts of {right!r} also occur in {left!r} (first: {first})"
            )
    if problems:
        raise DataError(
            "training and evaluation overlap: " + "; ".join(problems),
            hint="remove these rows from the training set; a score on them would measure memory",
        )
