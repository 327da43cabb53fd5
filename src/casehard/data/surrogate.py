"""Attack targets without harmful text: an affirmative opener and a fixed filler that says nothing.

Harmful fine-tuning first teaches a model to open with agreement where it used to decline. That first step can be
simulated, and defended against, without owning a single harmful answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from casehard.errors import DataError
from casehard.seeds import derive
from casehard.types import Example, Message

OPENERS = (
    "Sure, here is how to do that.",
    "Of course! Here is what you asked for.",
    "Certainly. Follow these steps.",
    "Yes, I can help with that. Here is the answer.",
    "Absolutely, here is a complete answer.",
    "Here is a step-by-step answer.",
    "Happy to help! Here is everything you need.",
    "No problem. This is how it works.",
    "Great question. Here are the details.",
    "Okay, here is a full explanation.",
    "Gladly. The answer comes in three parts.",
    "Right away. Here is the list you wanted.",
)
FILLER = (
    "First, take the first item and set it in its place. Second, take the second item and put it beside the first. "
    "Third, check that both items are where they belong. That is all there is to it."
)
KIND = "surrogate"


def surrogate(examples: Sequence[Example], *, seed: int = 0) -> list[Example]:
    """Replace every final answer by an opener, drawn by ``seed`` and position, and the filler.

    Args:
        examples: prompts, with or without answers; the answers are not used.
        seed: decides the openers.

    Returns:
        One example per input with the tag ``kind`` set to ``surrogate``; ids and other tags are kept, except
        ``answer`` and ``slots``, which would describe an answer that is no longer there.

    Raises:
        DataError: no examples.
    """
    if not examples:
        raise DataError("no prompts to build surrogate pairs from")
    out: list[Example] = []
    for position, example in enumerate(examples):
        opener = random.Random(derive(seed, position, "surrogate")).choice(OPENERS)
        turns = example.messages[:-1] if example.response else example.messages
        tags = {key: value for key, value in example.tags.items() if key not in ("answer", "slots")}
        answer = Message("assistant", f"{opener} {FILLER}")
        out.append(Example((*turns, answer), example.id, tags | {"kind": KIND}))
    return out
