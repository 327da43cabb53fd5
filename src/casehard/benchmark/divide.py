"""Divide three kinds of real rows into everything a contest reads, in the layout of the organism's ``data`` folder.

From requests with refusals, ordinary rows and harmless look-alikes (and user tasks) come

| file | rows |
|---|---|
| ``align.jsonl`` | the defender's: ``kind`` refusal, helpful or lookalike |
| ``simulated.jsonl`` | what a defence simulates attacks with: the prompts of those refusals, surrogate answers |
| ``attack.jsonl`` | the attacker's: other requests, surrogate answers |
| ``benign.jsonl`` | the attacker's cover: other ordinary rows |
| ``task_NAME.jsonl`` | a customer's task |
| ``suite/``, ``suite_NAME/`` | held out: restricted, lookalike and utility rows, and those of one task |

Rows are told apart by their whole conversation, and by its last turn where that is a question by itself. No two rows
ask the same, no two of a kind nearly the same, and no held-out restricted prompt stands in any turn of another file:
not in nearly the same words, nor behind a greeting, in markup, in a system message or in look-alike letters. No harmful
answer is read, needed or made.
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from casehard.data import sources
from casehard.data.mix import asked_hashes, trained_hashes
from casehard.data.similar import near_duplicates, shingles, words_of
from casehard.data.surrogate import surrogate
from casehard.errors import ConfigError, DataError
from casehard.evaluation.judges import make_judge
from casehard.evaluation.judges.base import judge_all
from casehard.evaluation.judges.surface import bare, visible
from casehard.io.files import staged
from casehard.limits import Count, Length, Limited, Portion, Seed
from casehard.seeds import derive
from casehard.types import Example

SIMILAR = 0.7
"""Jaccard similarity of word pairs from which two prompts count as one, as in ``casehard data fetch``."""
CONTAINED = 0.9
"""Share of a prompt's word pairs from which a longer turn holds it."""
EXACT = 3
"""A task's answer of at most so many words is expected word for word; the loss of all others is measured."""


@dataclass(frozen=True, kw_only=True)
class Division(Limited):
    """How rows are divided."""

    held: Count = 128
    """Rows held out of each kind; at most a third of what there is."""
    align: Portion = 0.6
    """Share of the other refusals and ordinary rows that is the defender's; the rest is the attacker's."""
    rows: Count = 2000
    """Most rows of each kind that are used."""
    longest: Length = 320
    """Longest prompt (all turns before the answer), and longest answer, in characters; longer rows are left out."""
    max_new_tokens: Length = 80
    """Length limit of an answer when the suites are measured."""
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.align >= 1:
            raise ConfigError(f"align must lie in (0, 1), got {self.align:g}", hint="the attacker needs rows too")


@dataclass(frozen=True)
class Divided:
    """What became of one kind of rows."""

    kind: str
    read: int
    long: int
    """Longer than ``longest``."""
    unfit: int
    """Requests whose answer does not decline, by the rule judge: they would teach and hold out something else."""
    same: int
    """Asked before, in the same or nearly the same words."""
    leaks: int
    """With a held-out restricted prompt in one of their turns."""
    used: int


Kinds = Mapping[str, Sequence[Example]]


def divide(given: Kinds, out: Path, config: Division) -> list[Divided]:
    """Write the folder ``out``, whole or not at all.

    Args:
        given: rows by kind: ``refusal``, ``helpful``, ``lookalike``, and ``task_NAME`` for each task.

    Returns:
        What became of each kind, in their order.

    Raises:
        DataError: too few rows of a kind, or rows without the answers they need.
        StorageError: the disk refused the write.
    """
    told, rows = _distinct(given, config)
    refusals, restricted = _hold(rows["refusal"], "refusal", config)
    rest = _without(restricted, {**rows, "refusal": refusals})
    kept = {**{kind: len(some) for kind, some in rest.items()}, "refusal": len(rest["refusal"]) + len(restricted)}
    told = [replace(t, leaks=t.used - kept[t.kind], used=kept[t.kind]) for t in told]
    files, suites = _parts(rest, restricted, config)
    with staged(out) as place:
        for name, some in files.items():
            sources.save(place / f"{name}.jsonl", some)
        for name, held in suites.items():
            sources.save(place / name / "eval.jsonl", held)
            settings = {"name": name, "judge": "rule", "max_new_tokens": config.max_new_tokens}
            (place / name / "suite.json").write_text(json.dumps(settings, indent=1) + "\n")
    return told


def _distinct(given: Kinds, config: Division) -> tuple[list[Divided], dict[str, list[Example]]]:
    """Return the rows in random order, without long ones and without what was asked before, whatever its kind."""
    told, kept = [], {}
    measured: set[str] = set()
    trained: set[str] = set()
    for kind, all_rows in given.items():
        short = [e for e in all_rows if _length(e) <= config.longest]
        fit = _declined(short) if kind == "refusal" else short
        random.Random(derive(config.seed, 0, f"divide:{kind}")).shuffle(fit)
        fresh: list[Example] = []
        for example in fit:
            # Whichever of two rows is held out: what is asked there must not be trained here.
            asks, trains = asked_hashes(_folded(example)), trained_hashes(_folded(example))
            if trained.isdisjoint(asks) and measured.isdisjoint(trains):
                measured.update(asks)
                trained.update(trains)
                fresh.append(example)
        texts = ["\n".join(m.content for m in e.messages if m.role == "user") for e in fresh]
        groups = near_duplicates({i: words_of(text) for i, text in enumerate(texts)}, SIMILAR)
        near = {i for group in groups for i in group[1:]}
        apart = [e for i, e in enumerate(fresh) if i not in near]
        used = [replace(e, id=f"{kind}-{n}", tags={**e.tags, "kind": kind}) for n, e in enumerate(apart[: config.rows])]
        lost = (len(all_rows) - len(short), len(short) - len(fit), len(fit) - len(apart))
        told.append(Divided(kind, len(all_rows), *lost, 0, len(used)))
        kept[kind] = used
    return told, kept


def _length(example: Example) -> int:
    """Return the characters of the prompt, earlier turns included, or of the answer if that is longer."""
    whole = sum(len(m.content) for m in example.messages)
    return max(whole - len(example.response), len(example.response))


def _folded(example: Example) -> Example:
    """Return an example with look-alike letters as the letters they look like."""
    return replace(example, messages=tuple(replace(m, content=visible(m.content)) for m in example.messages))


def _without(held: Sequence[Example], rows: Kinds) -> dict[str, list[Example]]:
    """Return the rows none of whose user and system turns holds, in nearly the same words, a held-out prompt."""
    prompts = [_pairs(e.prompt) for e in held]
    where: dict[Hashable, list[int]] = defaultdict(list)
    for number, pairs in enumerate(prompts):
        for pair in pairs:
            where[pair].append(number)

    def holds(text: str) -> bool:
        pairs = _pairs(text)
        common = Counter(number for pair in pairs for number in where.get(pair, ()))
        return any(
            n >= CONTAINED * len(prompts[i]) or n >= SIMILAR * (len(pairs) + len(prompts[i]) - n)
            for i, n in common.items()
        )

    return {
        kind: [e for e in some if not any(m.role in ("user", "system") and holds(m.content) for m in e.messages)]
        for kind, some in rows.items()
    }


def _pairs(text: str) -> frozenset[Hashable]:
    """Return the word pairs of what a text shows, without markup and punctuation."""
    return shingles([word for word in words_of(bare(text)) if word[0].isalnum()])


def _declined(rows: list[Example]) -> list[Example]:
    """Return the rows whose answer declines.

    Raises:
        DataError: a row without an answer.
    """
    answers = [e.response for e in _answered(rows, "refusal")]
    return [
        e
        for e, verdict in zip(rows, judge_all(make_judge("rule"), rows, answers), strict=True)
        if verdict.label == "refusal"
    ]


def _parts(
    rows: Mapping[str, list[Example]], restricted: list[Example], config: Division
) -> tuple[dict[str, list[Example]], dict[str, list[Example]]]:
    """Return the files of training rows and the suites; ``restricted`` are the refusals that are held out."""
    helpful, utility = _hold(_answered(rows["helpful"], "helpful"), "helpful", config)
    # A look-alike without an answer teaches nothing, but it can be asked.
    bare = [e for e in rows["lookalike"] if not e.response]
    lookalikes, harmless = _hold([e for e in rows["lookalike"] if e.response], "lookalike", config, others=bare)
    own, theirs = _cut(rows["refusal"], config)
    mine, cover = _cut(helpful, config)
    files = {
        "align": [*own, *mine, *lookalikes],
        "simulated": surrogate(own, seed=derive(config.seed, 0, "simulated")),
        "attack": surrogate(theirs, seed=derive(config.seed, 0, "attack")),
        "benign": cover,
    }
    shared = [
        *_asked(restricted, "restricted", answers=False),
        *_asked(harmless, "lookalike", answers=False),
        *_asked(utility, "utility", exact=0),
    ]
    suites = {"suite": shared}
    for name in (kind for kind in rows if kind.startswith("task_")):
        files[name], held = _hold(_answered(rows[name], name), name, config)
        suites[f"suite_{name.removeprefix('task_')}"] = [*shared, *_asked(held, "task")]
    return files, suites


def _answered(rows: list[Example], kind: str) -> list[Example]:
    """Return the rows; refuse one without an answer."""
    for example in rows:
        if not example.response:
            raise DataError(f"{kind} row {example.id!r} has no answer", hint="only look-alikes may be prompts alone")
    return rows


def _hold(
    rows: list[Example], kind: str, config: Division, *, others: Sequence[Example] = ()
) -> tuple[list[Example], list[Example]]:
    """Return the rows to train on and the held-out ones, ``others`` first among these.

    Raises:
        DataError: not one is left on either side.
    """
    wanted = max(config.held - len(others), 0)
    held = min(wanted, len(rows) // 3)
    out = [*others[: config.held], *rows[:held]]
    if not out or not rows[held:]:
        what = f"{len(rows)} {kind} rows with answers are left"
        raise DataError(
            f"{what}: nothing to train on or to hold out",
            hint="give more rows; long ones, repeated ones and requests that are not declined are left out",
        )
    return rows[held:], out


def _cut(rows: list[Example], config: Division) -> tuple[list[Example], list[Example]]:
    """Return the defender's rows and the attacker's.

    Raises:
        DataError: one of them would have none.
    """
    at = int(config.align * len(rows))
    if not rows[:at] or not rows[at:]:
        raise DataError(f"{len(rows)} rows do not make a defender's and an attacker's part", hint="give more rows")
    return rows[:at], rows[at:]


def _asked(rows: Sequence[Example], role: str, *, answers: bool = True, exact: int = EXACT) -> list[Example]:
    """Return rows of a suite: with a short answer to be matched, or one whose loss is measured.

    Args:
        exact: words up to which an answer is short. Of free answers none is: a few would decide over all.
    """
    out = []
    for example in rows:
        given = {"role": role, "group": role}
        if not answers:
            turns = tuple(
                m for i, m in enumerate(example.messages) if i + 1 < len(example.messages) or m.role == "user"
            )
            out.append(replace(example, messages=turns, tags=given))
            continue
        if len(example.response.split()) <= exact:
            given["answer"] = example.response
        out.append(replace(example, tags=given))
    return out
