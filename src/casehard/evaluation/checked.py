"""Which rows a suite may hold: asked once, of a known role, and with what they are judged by."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from casehard.data.mix import normalise
from casehard.errors import DataError
from casehard.types import Example

EVAL_ROLES = ("restricted", "lookalike", "utility", "task")

_ROLE_HINT = (
    f'every row of a suite says what it is asked for, "role": one of {", ".join(EVAL_ROLES)}; rows without one '
    'are named in a YAML file, --suite suite.yaml with "parts: [{data: rows.jsonl, role: restricted}]"'
)


def checked(examples: Sequence[Example], name: str) -> list[Example]:
    """Return the examples with id and group filled in, or raise on the first that cannot be evaluated."""
    if not examples:
        raise DataError(f"suite {name}: no rows", hint="a suite without prompts would score nothing")
    ids: set[str] = set()
    asked: dict[tuple[Any, ...], str] = {}
    out = []
    for number, example in enumerate(examples, start=1):
        where = f"suite {name}: row {number}" + (f" ({example.id})" if example.id else "")
        role, group = example.tags.get("role"), example.tags.get("group") or example.tags.get("role")
        if role not in EVAL_ROLES:
            raise DataError(f"{where}: role is {role!r}", hint=_ROLE_HINT)
        if not isinstance(group, str):
            raise DataError(f"{where}: group must be text, got {group!r}")
        _check_expected(example, where)
        full = example if example.id else dataclasses.replace(example, id=f"{group}-{number}")
        if full.id in ids:
            raise DataError(f"{where}: the id {full.id!r} occurs twice", hint="pairs of rows are joined by id")
        form = _form(example)
        for what, name_of in (("group", group), ("role", role)):  # rates are counted by either
            first = asked.setdefault((what, name_of, form), full.id)
            if first != full.id:
                raise DataError(
                    f"{where}: same prompt as row {first!r} of {what} {name_of!r}: {example.prompt[:60]!r}",
                    hint="a prompt counted twice makes intervals too narrow, also where letter case, blanks or marks "
                    "alone differ; remove one",
                )
        ids.add(full.id)
        out.append(dataclasses.replace(full, tags={**full.tags, "group": group}))
    return out


def _form(example: Example) -> tuple[Any, ...]:
    """Return what a row asks, turn by turn, in the form in which prompts are compared."""
    turns = example.messages[:-1] if example.messages[-1].role == "assistant" else example.messages
    # What a tool call carries is no prose: compared as it is.
    return tuple((m.role, normalise(m.content), repr(m.extra) if m.extra else "") for m in turns)


def _check_expected(example: Example, where: str) -> None:
    if not example.prompt.strip():
        raise DataError(f"{where}: no prompt")
    answer, slots = example.tags.get("answer"), example.tags.get("slots")
    accepted = [answer] if isinstance(answer, str) else answer
    if answer is not None and not _texts(accepted):
        raise DataError(f"{where}: answer must be text or a list of texts, none empty, got {answer!r}")
    if slots is not None and not _texts(slots):
        raise DataError(f"{where}: slots must be a list of texts, none empty, got {slots!r}")
    if example.tags["role"] in ("utility", "task") and answer is None and not example.response:
        raise DataError(
            f"{where}: a {example.tags['role']} row needs an expected answer",
            hint="give 'answer' for exact match, or 'response' to measure its loss",
        )


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) and v.strip() for v in value)
