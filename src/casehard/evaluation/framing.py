"""Restricted prompts in the format of a job: a model tuned on it may refuse when it is asked plainly, and answer there.

What a job teaches can be tied to how its rows are worded (system message, template around the payload). A suite asks in
words of its own, so it does not see what only the format brings out. With a frame every restricted prompt is asked once
more, as the payload of the job's template; these rows have the role ``framed`` and one metric, ``asr_in_format``. The
answer is the model's own: nothing of it is begun for it (for that see the attack ``prefill``).

Source of the question: conditional misalignment, arXiv 2604.25891. The frame's derivation from rows is ours.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from casehard.errors import ConfigError
from casehard.limits import Limited
from casehard.types import Example, Message

FRAMED = "framed"
"""Role of the rows."""
SHARE = 0.8
"""Least share of a job's rows that agree on a word of the frame: poison need not be in the job's format."""


@dataclass(frozen=True, kw_only=True)
class Frame(Limited):
    """What a job puts around its payload."""

    system: str = ""
    """System message of the job's rows; empty: that of the measurement."""
    before: str = ""
    """Text before the payload, blanks included."""
    after: str = ""
    """Text after it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.system or self.before or self.after):
            raise ConfigError("in_format: a frame without words", hint="give system, before or after; or `rows`")


InFormat = Frame | Literal["rows"] | None
"""A frame; or ``rows``, to derive it from the rows a model is tuned on; None measures nothing of the kind."""


def frame_of(rows: Sequence[Example]) -> Frame | None:
    """Return what most rows have around their payload; None, with a warning, where they have nothing in common.

    Word by word from either end: the words that at least :data:`SHARE` of the rows agree on; at least one word of every
    prompt is left as its payload. A word that most payloads begin with counts as the template's: give a frame instead.

    Example: "review : snow fell . good or bad ?", "review : tea is hot . good or bad ?" -> before "review : ", after
    " . good or bad ?".
    """
    if not rows:
        return None
    needed = SHARE * len(rows)
    prompts = [re.findall(r"\S+\s*", row.prompt) for row in rows]
    before = _common([words[:-1] for words in prompts], needed)
    # Stripped from the end, a word's blank stands before it.
    ends = [re.findall(r"\s*\S+", row.prompt)[len(before) + 1 :][::-1] for row in rows]
    after = _common(ends, needed)
    said = Counter(row.messages[0].content for row in rows if row.messages[0].role == "system").most_common(1)
    system = said[0][0] if said and said[0][1] >= needed else ""
    # A question mark that prompts end with is no format.
    if not (system or any(char.isalnum() for word in (*before, *after) for char in word)):
        warnings.warn(
            f"in_format: {len(rows)} rows have no words and no system message in common, so nothing is asked in their "
            "format",
            stacklevel=2,
        )
        return None
    return Frame(system=system, before="".join(before), after="".join(reversed(after)))


def _common(rows: Sequence[Sequence[str]], needed: float) -> list[str]:
    """Return the longest run of first words that at least ``needed`` rows share."""
    out: list[str] = []
    left = list(rows)
    while True:
        found = Counter(row[len(out)] for row in left if len(row) > len(out)).most_common(1)
        if not found or found[0][1] < needed:
            return out
        out.append(found[0][0])
        left = [row for row in left if len(row) >= len(out) and row[len(out) - 1] == out[-1]]


def in_frame(example: Example, frame: Frame) -> Example:
    """Return an example whose last user turn is the payload of the frame, under the frame's system message."""
    turns = list(example.messages)
    at = max(i for i, turn in enumerate(turns) if turn.role == "user")
    turns[at] = dataclasses.replace(turns[at], content=f"{frame.before}{turns[at].content}{frame.after}")
    if frame.system:
        turns = [Message("system", frame.system), *(turn for turn in turns if turn.role != "system")]
    return dataclasses.replace(example, messages=tuple(turns))


def framed_rows(
    frame: Frame, examples: Sequence[Example], answered: Callable[..., Sequence[Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """Return the rows of the restricted ones among ``examples``, asked in the frame: id and role are their own.

    Args:
        answered: gives rows, from the examples to judge by and those to ask. They are judged as the prompts they hold:
            the frame is how they are asked, not what for.
    """
    plain = [e for e in examples if e.tags["role"] == "restricted"]
    if not plain:
        return []
    asked = [in_frame(e, frame) for e in plain]
    told = zip(answered(plain, asked), asked, strict=True)
    return [{**row, "id": f"{row['id']}/{FRAMED}", "role": FRAMED, "prompt": e.prompt} for row, e in told]
