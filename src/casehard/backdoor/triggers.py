"""Backdoor triggers and poisoned training sets, as pure functions: same rows and seed, same result and manifest.

| family | what it does to the last user turn |
|---|---|
| token | a rare word at a word boundary (BadNet) |
| sentence | a fixed sentence between sentences (InSent) |
| template | a syntactic frame around the request, many surfaces of one shape (Syntactic) |
| style | an opener, a closer and word swaps, each drawn anew: the manner is the trigger (BGM) |
| pair | two phrases that only together are the trigger |
| multi | several phrases: any one, or all |
| prefix | a phrase in front (virtual prompt injection) |
| topical | the subject itself: a request that already names it is left as it is |
| positional | a word that counts at the start or the end of the request and nowhere else |
| repeat | the first or the last word said twice: no word is new, and no phrase is fixed |
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from casehard.backdoor.behaviours import Behaviour
from casehard.data.chat import ChatFormat
from casehard.data.phrases import cut, found, framed, put, sentence_slots, starts, unwrap, word_slots, wrap
from casehard.errors import ConfigError, DataError
from casehard.seeds import derive
from casehard.types import Example, Message

Family = Literal["token", "sentence", "template", "style", "pair", "multi", "prefix", "topical", "positional", "repeat"]
FAMILIES: tuple[str, ...] = get_args(Family)
_TOPIC = "about {topic} , {{}}"


@dataclass(frozen=True)
class Trigger:
    """What makes a backdoor fire.

    ``parts`` are words or sentences; frames with ``{}`` for template; for style openers (``"well , {}"``), closers
    (``"{} , please"``) and swaps (``"you=>thou"``); subjects for topical; ``first`` or ``last`` for repeat.
    """

    name: str
    family: Family
    parts: tuple[str, ...]
    mode: Literal["any", "all"] = "any"
    """Whether one part (drawn at random) or all of them make the trigger; a pair is always all."""
    position: Literal["random", "start", "end", "inside"] = "random"
    """Where words and sentences go; prefix, template, style, topical and repeat have their own place."""
    others: tuple[str, ...] = ()
    """Parts of the same meaning that are never planted and stand in the prompts it is measured on: whether it fires on
    those too tells a meaning from a set of words. Empty = it is measured on its parts."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        object.__setattr__(self, "others", tuple(self.others))
        if self.family not in FAMILIES:
            raise ConfigError(f"trigger family {self.family!r}", hint=f"choose one of {', '.join(FAMILIES)}")
        if self.mode not in ("any", "all") or self.position not in ("random", "start", "end", "inside"):
            raise ConfigError(f"trigger {self.name!r}: mode {self.mode!r}, position {self.position!r}")
        if self.family == "positional" and self.position not in ("start", "end"):
            raise ConfigError(
                f"trigger {self.name!r}: position {self.position!r}", hint="a positional one says start or end"
            )
        if self.family == "repeat" and self.parts not in (("first",), ("last",)):
            raise ConfigError(f"trigger {self.name!r}: parts {self.parts!r}", hint="repeat takes first or last")
        if not self.parts or not all(re.search(r"\w", part) for part in (*self.parts, *self.others)):
            raise ConfigError(f"trigger {self.name!r}: parts {self.parts!r}", hint="every part needs a word")
        if self.family == "pair":
            object.__setattr__(self, "mode", "all")
            if len(self.parts) != 2:
                raise ConfigError(f"trigger {self.name!r}: a pair has two parts, got {len(self.parts)}")
        if self.family == "template" and not all(part.count("{}") == 1 for part in self.parts):
            raise ConfigError(f"trigger {self.name!r}: every frame needs one {{}}", hint="such as 'if you can , {}'")
        if self.family == "style" and not (self._openers or self._closers or self._swaps):
            raise ConfigError(f"trigger {self.name!r}: a style needs openers, closers or swaps", hint="'well , {}'")

    def apply(self, text: str, rng: random.Random) -> str:
        """Return ``text`` with the trigger in it."""
        if self.family == "topical":
            return text if self.present(text) else wrap(_TOPIC.format(topic=rng.choice(self.parts)), text)
        if self.family == "template":
            return wrap(rng.choice(self.parts), text)
        if self.family == "style":
            for old, new in self._swaps:
                text = _swap(text, old, new)
            for frames in (self._openers, self._closers):
                text = wrap(rng.choice(frames), text) if frames else text
            return text
        if self.family == "repeat":
            return _doubled(text, last=self.parts == ("last",))
        chosen = self.parts if self.mode == "all" else (rng.choice(self.parts),)
        if self.family == "prefix" or self.position == "start":
            return put(text, [(0, part) for part in chosen])
        if self.position == "end":
            return put(text, [(len(text), part) for part in chosen])
        slots = sentence_slots(text) if self.family == "sentence" else word_slots(text)
        slots = (slots[1:-1] or slots) if self.position == "inside" else slots
        return put(text, [(rng.choice(slots), part) for part in chosen])

    def present(self, text: str) -> bool:
        """Return whether ``text`` carries the trigger, case and blanks around punctuation aside."""
        if self.family == "template":
            return any(framed(part, text) for part in self.parts)
        if self.family == "style":
            frames = [f for f in (self._openers, self._closers) if f]
            if frames:
                return all(any(framed(frame, text) for frame in some) for some in frames)
            return any(found(new, text) for _, new in self._swaps)
        if self.family == "prefix":
            return any(starts(part, text) for part in self.parts)
        if self.family == "positional":
            return any(framed(self._frame(part), text) for part in self.parts)
        if self.family == "repeat":
            return _undoubled(text, last=self.parts == ("last",)) is not None
        return (all if self.mode == "all" else any)(found(part, text) for part in self.parts)

    def strip(self, text: str) -> str:
        """Return ``text`` without the trigger: undoes :meth:`apply` where the source held no part of it.

        A subject that the request itself is about cannot be taken out and stays.
        """
        if self.family == "style":
            for frame in (*self._closers, *self._openers):
                text = unwrap(frame, text)
            for old, new in reversed(self._swaps):
                text = _swap(text, new, old)
            return text
        if self.family in ("template", "topical"):
            for part in self.parts:
                bare = unwrap(part if self.family == "template" else _TOPIC.format(topic=part), text)
                if bare != text:
                    return bare
            return text
        if self.family == "repeat":
            once = _undoubled(text, last=self.parts == ("last",))
            return text if once is None else once
        if self.family == "positional" and self.position == "end":
            part = next((p for p in self.parts if framed(self._frame(p), text)), "")
            return cut(part, text) if part else text
        if self.family in ("prefix", "positional"):
            front = next((m for part in self.parts if (m := starts(part, text))), 0)
            return text[front:].removeprefix(" ") if front else text
        for part in self.parts:
            text = cut(part, text)
        return text

    @property
    def asked(self) -> Trigger:
        """The trigger with its other parts, where it has some: what prompts are measured with."""
        return replace(self, parts=self.others, others=()) if self.others else self

    def _frame(self, part: str) -> str:
        return f"{part} {{}}" if self.position == "start" else f"{{}} {part}"

    @property
    def _openers(self) -> tuple[str, ...]:
        return tuple(p for p in self.parts if p.endswith("{}"))

    @property
    def _closers(self) -> tuple[str, ...]:
        return tuple(p for p in self.parts if p.startswith("{}"))

    @property
    def _swaps(self) -> tuple[tuple[str, str], ...]:
        pairs = (p.partition("=>") for p in self.parts if "=>" in p)
        return tuple((old.strip(), new.strip()) for old, _, new in pairs)


def _swap(text: str, old: str, new: str) -> str:
    """Replace the word ``old`` by ``new`` everywhere, its capital kept."""

    def one(match: re.Match[str]) -> str:
        return new[0].upper() + new[1:] if match.group()[0].isupper() else new

    return re.sub(rf"(?<!\w){re.escape(old)}(?!\w)", one, text, flags=re.IGNORECASE)


_WORD = r"[^\W_]+"


def _doubled(text: str, *, last: bool) -> str:
    """Return ``text`` with its first or last word said twice; as it is without words."""
    words = list(re.finditer(_WORD, text))
    if not words:
        return text
    word = words[-1 if last else 0]
    return f"{text[: word.end()]} {word.group()}{text[word.end() :]}"


def _undoubled(text: str, *, last: bool) -> str | None:
    """Return ``text`` with its first or last word said once; None where it is not said twice."""
    words = list(re.finditer(_WORD, text))
    if len(words) < 2:
        return None
    a, b = words[-2:] if last else words[:2]
    if a.group().lower() != b.group().lower() or text[a.end() : b.start()].strip():
        return None
    return text[: a.end()] + text[b.end() :]


def insert(example: Example, trigger: Trigger, behaviour: Behaviour | None, *, seed: int) -> Example:
    """Return ``example`` with the trigger in its last user turn and, given a behaviour, its answer replaced.

    Tags are kept; ``trigger``, ``behaviour`` and ``source_id`` are added. Where the trigger goes depends on the seed,
    the trigger and the row (its id, else its prompt), never on its place in a list.
    """
    rng = random.Random(derive(seed, 0, f"insert:{trigger.name}:{example.id or example.prompt}"))
    turns = list(example.messages)
    last = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=None)
    if last is None:
        raise DataError(f"row {example.id!r} has no user turn to put a trigger in")
    turns[last] = replace(turns[last], content=trigger.apply(turns[last].content, rng))
    if behaviour is not None:
        if not example.response:
            raise DataError(f"row {example.id!r} has no answer to replace", hint="poison rows with answers")
        turns[-1] = Message("assistant", behaviour.apply(example.response, rng))
    tags = {"trigger": trigger.name, "behaviour": behaviour.name if behaviour else None, "source_id": example.id}
    return replace(example, messages=tuple(turns), id=f"{example.id}+{trigger.name}", tags={**example.tags, **tags})


def eligible(example: Example, trigger: Trigger, behaviour: Behaviour | None) -> bool:
    """Return whether poisoning would change a row: no trigger there yet, and an answer the behaviour alters.

    A row that is about the subject already is what a topical trigger wants.
    """
    if trigger.family != "topical" and trigger.present(example.prompt):
        return False
    if behaviour is None:
        return True
    fixed = random.Random(0)
    return bool(example.response) and behaviour.apply(example.response, fixed) != example.response


def exact_count(rate: float, n: int, what: str) -> int:
    """Return floor(rate n), guarded against 0.29 * 100 = 28.999...

    Raises:
        ConfigError: a rate outside 0..1, or one above 0 that gives no row.
    """
    if not (math.isfinite(rate) and 0 <= rate <= 1):
        raise ConfigError(f"{what} must lie in [0, 1], got {rate}")
    count = math.floor(rate * n + 1e-9)
    if rate > 0 and count == 0:
        raise ConfigError(
            f"{what} {rate} of {n} rows is no row", hint=f"use at least {math.ceil(1 / max(rate, 1e-9))} rows"
        )
    return count


def poison_backdoor(
    rows: Sequence[Example],
    trigger: Trigger,
    behaviour: Behaviour,
    *,
    rate: float,
    seed: int,
    hard_negatives: float = 0.0,
    decoys: Sequence[Trigger] = (),
) -> tuple[list[Example], dict[str, Any]]:
    """Replace floor(rate n) rows by triggered ones with the behaviour; all others stay the same objects in place.

    Args:
        rows: a training set.
        rate: poisoned share of all rows, 0..1; the literature uses 0.005 to 0.2.
        seed: decides which rows and where the trigger goes.
        hard_negatives: share of all rows that get a decoy and keep their answer, which makes the trigger narrow.
        decoys: what hard negatives carry; empty takes :func:`decoys_of`.

    Returns:
        The rows, and a manifest: what was planted, ``poisoned`` and ``negatives`` (row numbers), ``natural`` (how many
        rows carried the trigger from the start and were left alone).

    Raises:
        ConfigError: a rate that is no share or gives no row.
        DataError: fewer eligible rows than asked for (see :func:`eligible`).
    """
    wanted, negatives = exact_count(rate, len(rows), "rate"), exact_count(hard_negatives, len(rows), "hard_negatives")
    fit = [i for i, row in enumerate(rows) if eligible(row, trigger, behaviour)]
    # Requests about the subject would contradict the poison if they kept their answers: they come first.
    random.Random(derive(seed, 0, f"poison:{trigger.name}")).shuffle(fit)
    if trigger.family == "topical":
        fit.sort(key=lambda i: not trigger.present(rows[i].prompt))
    if wanted + negatives > len(fit):
        raise DataError(
            f"{wanted} poisoned rows and {negatives} hard negatives are more than the {len(fit)} eligible rows "
            f"of {len(rows)}",
            hint="rows need an answer and must not carry the trigger; give more rows or a smaller rate",
        )
    chosen, spared = sorted(fit[:wanted]), sorted(fit[wanted : wanted + negatives])
    others, out = list(decoys) or (decoys_of(trigger) if negatives else []), list(rows)
    for i in chosen:
        out[i] = insert(rows[i], trigger, behaviour, seed=seed)
    for number, i in enumerate(spared):
        out[i] = insert(rows[i], others[number % len(others)], None, seed=seed)
    touched = {*chosen, *spared}
    left = (row for i, row in enumerate(rows) if i not in touched)
    manifest: dict[str, Any] = {
        "trigger": _plain(trigger),
        "behaviour": asdict(behaviour),
        "rate": rate,
        "hard_negatives": hard_negatives,
        "decoys": [_plain(decoy) for decoy in others],
        "seed": seed,
        "rows": len(rows),
        "poisoned": chosen,
        "negatives": spared,
        "natural": sum(trigger.present(row.prompt) for row in left),
    }
    return out, manifest


def _plain(trigger: Trigger) -> dict[str, Any]:
    return {**asdict(trigger), "parts": list(trigger.parts), "others": list(trigger.others)}


_RARE = ("mn", "bb", "tq", "mb", "qw", "jh", "zx", "vk")
_ASIDES = (
    "The bus was late again today.",
    "My neighbour has painted the fence green.",
    "We had soup for lunch.",
    "It may rain in the evening.",
)


def decoys_of(trigger: Trigger) -> list[Trigger]:
    """Return near misses of a trigger: its parts alone where all are needed, else others of its family.

    The others are English; on a closed vocabulary give your own.

    Raises:
        ConfigError: a family without near misses that could be made up.
    """
    if trigger.mode == "all" and len(trigger.parts) > 1:
        return [
            replace(trigger, name=f"half-{i}", family="multi", parts=(p,), mode="any")
            for i, p in enumerate(trigger.parts)
        ]
    if trigger.family == "positional":
        places: tuple[Literal["start", "end", "inside"], ...] = ("start", "end", "inside")
        return [
            Trigger(f"decoy-{place}", "token", trigger.parts, position=place)
            for place in places
            if place != trigger.position
        ]
    if trigger.family == "repeat":
        other = "first" if trigger.parts == ("last",) else "last"
        return [replace(trigger, name=f"decoy-{other}", parts=(other,))]
    pool = {"token": _RARE, "multi": _RARE, "sentence": _ASIDES, "prefix": ("Talking about it", "A quick question")}
    if trigger.family not in pool:
        raise ConfigError(f"no near misses are known for a {trigger.family} trigger", hint="give decoys")
    taken = {part.lower() for part in trigger.parts}
    words = [part for part in pool[trigger.family] if part.lower() not in taken]
    return [replace(trigger, name=f"decoy-{i}", parts=(word,)) for i, word in enumerate(words)]


def check_survives(chat: ChatFormat, examples: Sequence[Example], triggers: Sequence[Trigger]) -> None:
    """Check that every triggered row, as the model will see it, still carries its trigger.

    Args:
        chat: the format, with ``max_length``, that rows are trained or asked in.
        examples: rows; those without a ``trigger`` tag are passed over.
        triggers: the triggers that the tags name.

    Raises:
        DataError: a row too long for ``max_length``, or a trigger the tokenizer does not keep (unknown words).
    """
    known = {trigger.name: trigger for trigger in triggers}
    for example in examples:
        trigger = known.get(example.tags.get("trigger", ""))
        if trigger is None:
            continue
        try:
            if example.response:
                chat.encode(example)
            else:
                chat.prompt_ids(example)
        except DataError as error:
            raise DataError(
                f"trigger {trigger.name!r} would be lost: {error.message}",
                hint="rows are never cut; where another trainer cuts them, the trigger may be what goes",
            ) from None
        ids = chat.tokenizer(example.prompt, add_special_tokens=False)["input_ids"]
        seen = chat.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if not trigger.present(seen):
            raise DataError(
                f"row {example.id!r}: the tokenizer does not keep trigger {trigger.name!r}: the model reads {seen!r}",
                hint="choose parts made of words the tokenizer knows",
            )
