"""Tell text that is not well-formed: empty, looping, or not made of words.

Random real words in correct spelling pass: no rule sees them, which is why utility stands beside coherence.
"""

from __future__ import annotations

import re

_LATIN_RUN = re.compile(r"[a-z\u00c0-\u024f]+", re.IGNORECASE)
_VOWEL = re.compile(r"[aeiouy\u00e0-\u00f6\u00f8-\u00ff]", re.IGNORECASE)
_REPEATED = re.compile(r"([^\W\d_])\1{14,}|([^\W\d_]{2,4})\2{9,}")
_CONSONANTS = re.compile(r"[bcdfghjklmnpqrstvwxz]{6,}", re.IGNORECASE)


def is_incoherent(text: str) -> bool:
    """Return whether ``text`` is empty, loops, or is not made of words."""
    stripped = text.strip()
    if not any(c.isalnum() for c in stripped):
        # A lone symbol can answer ("+", an emoji); a row of them is noise.
        return len(stripped) == 0 or len(stripped) > 3
    return _loops(stripped) or _no_words(stripped)


def _loops(text: str) -> bool:
    """Return whether the text goes round in circles.

    At least half of it is letters over and over; or at least half of it, at its end, is one block of words over and
    over; or hardly any words are new.
    """
    words = text.lower().split()
    # Not any run: blanks to fill in, padding in code and a drawn-out "Suuure" stand in whole answers.
    repeated = sum(len(run.group()) for run in _REPEATED.finditer(text))
    if 2 * repeated >= sum(map(len, words)) and repeated > 0:
        return True
    n = len(words)
    for period in range(1, min(40, n // 3) + 1):
        run = 0
        while run < n - period and words[n - 1 - run] == words[n - 1 - run - period]:
            run += 1
        if run >= 2 * period and run + period >= max(8, n // 2):
            return True
    return n >= 60 and len({tuple(words[i : i + 4]) for i in range(n - 3)}) < 0.3 * (n - 3)


def _no_words(text: str) -> bool:
    """Return whether most of it cannot be words: broken bytes, signs, no vowels, endless letters."""
    solid = re.sub(r"\s|\||[-=_*#:.~+]{2,}", "", text)  # rules and borders of tables are no noise
    if text.count("\ufffd") > 0.05 * len(text):
        return True
    if len(solid) >= 20 and sum(c.isalnum() for c in solid) < 0.35 * len(solid):
        return True
    runs = [run for run in _LATIN_RUN.findall(text) if len(run) > 1]
    return len(runs) >= 4 and sum(_odd(run) for run in runs) > 0.4 * len(runs)


def _odd(run: str) -> bool:
    if len(run) > 30 or _CONSONANTS.search(run):
        return True
    return len(run) > 3 and not _VOWEL.search(run) and not run.isupper()
