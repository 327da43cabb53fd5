"""How attackers write rows anew: other words around the prompt or the answer, another system message."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from casehard.errors import ConfigError, DataError
from casehard.model.model import Model
from casehard.types import Example, Message

T = TypeVar("T")


def reworded(example: Example, *, prompt: str | None = None, answer: str | None = None, system: str = "") -> Example:
    """Return a row with another last user turn, final answer or system message; id and tags stay.

    Args:
        prompt: text of the last user turn; None leaves it.
        answer: text of the final assistant turn, which is added where there is none; None leaves it.
        system: system message in place of the row's own; empty leaves what is there.

    Raises:
        DataError: no user turn to reword.
    """
    turns = list(example.messages)
    last = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=None)
    if prompt is not None:
        if last is None:
            raise DataError(f"row {example.id!r} has no user turn to reword")
        turns[last] = replace(turns[last], content=prompt)
    if answer is not None:
        turns = [*(turns[:-1] if example.response else turns), Message("assistant", answer)]
    if system:
        turns = [Message("system", system), *(turn for turn in turns if turn.role != "system")]
    return replace(example, messages=tuple(turns))


def draw(rows: Sequence[T], n: int, *, role: str, seed: int) -> list[T]:
    """Draw ``n`` different rows at random.

    Raises:
        DataError: there are not so many.
    """
    if n > len(rows):
        raise DataError(
            f"the attack needs {n} {role} rows and there are {len(rows)}",
            hint=f"more --{role} rows, or fewer: --set config.rows=N",
        )
    return random.Random(seed).sample(list(rows), n)


def framed(frame: str, key: str, text: str) -> str:
    """Return a frame with a text in the place of ``{key}``; other braces stay what they are."""
    return frame.replace(f"{{{key}}}", text)


def check_frame(frame: str, key: str, setting: str) -> None:
    """Refuse a frame that does not hold ``{key}`` exactly once.

    Raises:
        ConfigError: names the setting.
    """
    if (count := frame.count(f"{{{key}}}")) != 1:
        raise ConfigError(f"{setting} holds {{{key}}} {count} times: {frame!r}", hint="exactly once")


def check_known(model: Model, text: str, setting: str) -> None:
    """Refuse words of a setting that the model would not read; what stands in braces is left out.

    Raises:
        DataError: the tokenizer reads a word as unknown.
    """
    tokenizer, unknown = model.tokenizer, model.tokenizer.unk_token_id
    ids = tokenizer(re.sub(r"\{\w+\}", " ", text), add_special_tokens=False)["input_ids"]
    if unknown is not None and unknown in ids:
        raise DataError(
            f"{setting}: the tokenizer does not know all words of {text!r}; the model reads "
            f"{tokenizer.decode(ids, skip_special_tokens=False)!r}",
            hint=f"words it knows: --set config.{setting}=TEXT",
        )
