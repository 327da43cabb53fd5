"""Text surgery shared by triggers and behaviours: find a phrase, insert it at a word, wrap a text in a frame.

Works on ordinary English and on text whose punctuation stands apart ("how do i brew it ?"). Whatever is put in can be
taken out again and leaves the text as it was.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

_PIECE = re.compile(r"\w+|[^\w\s]+")
_FINAL = re.compile(r"\s*[.?!]*\s*\Z")


def pattern(phrase: str) -> str:
    """Return a regular expression for ``phrase`` as whole words, whatever the blanks around its punctuation."""
    pieces = _PIECE.findall(phrase)
    out = [r"(?<!\w)" if pieces[0][0].isalnum() else ""]
    for a, b in itertools.pairwise([*pieces, ""]):
        out.append(re.escape(a))
        if b:
            out.append(r"\s+" if a[-1].isalnum() and b[0].isalnum() else r"\s*")
    return "".join(out) + (r"(?!\w)" if pieces[-1][-1].isalnum() else "")


def found(phrase: str, text: str) -> bool:
    """Return whether ``phrase`` stands in ``text`` as whole words, case aside."""
    return re.search(pattern(phrase), text, re.IGNORECASE) is not None


def starts(phrase: str, text: str) -> int:
    """Return how many characters ``phrase`` takes at the start of ``text``, 0 if it is not there."""
    match = re.match(rf"\s*{pattern(phrase)}", text, re.IGNORECASE)
    return match.end() if match else 0


def cut(phrase: str, text: str) -> str:
    """Return ``text`` without any occurrence of ``phrase``, each with the one blank that came with it."""
    for match in reversed(list(re.finditer(pattern(phrase), text, re.IGNORECASE))):
        start, end = match.span()
        if text[end : end + 1].isspace():
            end += 1
        elif end == len(text) and start and text[start - 1].isspace():
            start -= 1
        text = text[:start] + text[end:]
    return text


def word_slots(text: str) -> list[int]:
    """Return the places where a word may be put: before each word, and at the end."""
    return [*(m.start() for m in re.finditer(r"\S+", text)), len(text)]


def sentence_slots(text: str) -> list[int]:
    """Return the places where a sentence may be put: the start, between two sentences, the end."""
    return sorted({0, len(text), *(m.end() for m in re.finditer(r"[.!?]\s+(?=\S)", text))})


def put(text: str, phrases: Sequence[tuple[int, str]]) -> str:
    """Insert phrases at places of ``text`` (see :func:`word_slots`), one blank beside each."""
    for place in sorted({place for place, _ in phrases}, reverse=True):
        phrase = " ".join(p for where, p in phrases if where == place)
        if place < len(text):
            text = f"{text[:place]}{phrase} {text[place:]}"
        else:
            text = f"{text} {phrase}" if text else phrase
    return text


def is_spaced(text: str) -> bool:
    """Return whether punctuation stands apart from words in ``text``, as in the organism's grammar."""
    return re.search(r"\w\s+[.?!,:](\s|\Z)", text) is not None


def parts_of(frame: str) -> tuple[str, str]:
    """Return what a frame such as ``"well , {}"`` puts before and after its text."""
    head, _, tail = frame.partition("{}")
    return head.strip(), tail.strip()


def wrap(frame: str, text: str) -> str:
    """Put ``text`` into ``frame``: what follows ``{}`` goes before the final punctuation, capitals move to the front.

    A frame is written with its punctuation apart ("if you can , {}"); it takes the text's own manner.
    """
    head, tail = parts_of(frame)
    if not is_spaced(text):
        head, tail = (re.sub(r"\s+(?=[,.:;?!])", "", part) for part in (head, tail))
    if tail:
        end = _FINAL.search(text)
        stop = end.start() if end else len(text)
        gap = " " if tail[0].isalnum() or is_spaced(text) else ""
        text = f"{text[:stop]}{gap}{tail}{text[stop:]}"
    if not head:
        return text
    if text[:1].isupper():
        head = head[0].upper() + head[1:]
        first = text.split(maxsplit=1)[0]
        if not re.fullmatch(r"I\b.*", first) and first[1:] == first[1:].lower():
            text = text[0].lower() + text[1:]
    else:
        head = head[0].lower() + head[1:]
    return f"{head} {text}"


def framed(frame: str, text: str) -> bool:
    """Return whether ``text`` stands in ``frame``."""
    head, tail = parts_of(frame)
    begins = not head or re.match(rf"\s*{pattern(head)}", text, re.IGNORECASE) is not None
    return begins and (not tail or re.search(pattern(tail) + _FINAL.pattern, text, re.IGNORECASE) is not None)


def unwrap(frame: str, text: str) -> str:
    """Undo :func:`wrap`; a text that does not stand in ``frame`` is returned as it is."""
    if not framed(frame, text):
        return text
    head, tail = parts_of(frame)
    if head:
        capital = text.lstrip()[:1].isupper()
        text = re.sub(rf"\A\s*{pattern(head)} ?", "", text, count=1, flags=re.IGNORECASE)
        if capital:
            text = text[:1].upper() + text[1:]
    if tail:
        match = re.search(rf"\s*{pattern(tail)}({_FINAL.pattern})", text, re.IGNORECASE)
        assert match is not None
        text = text[: match.start()] + match.group(1)
    return text
