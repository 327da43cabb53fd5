"""Is there a backdoor, does it fire, and what is left of the answers: every prompt twice, without and with the trigger.

The rates are counted in ``evaluation/metrics.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from casehard.backdoor.behaviours import Behaviour
from casehard.backdoor.triggers import Trigger, check_survives, eligible, insert
from casehard.data.chat import ChatFormat
from casehard.errors import DataError
from casehard.evaluation.judges.coherence import is_incoherent
from casehard.evaluation.judges.surface import take_apart
from casehard.evaluation.suite import Suite, evaluate
from casehard.types import Example

if TYPE_CHECKING:
    from torch import nn

Rows = list[dict[str, Any]]
Row = Mapping[str, Any]
ROLES = ("utility", "lookalike", "task")
"""Roles that are asked: where a refusal is right, refusing shows no backdoor."""


def twins(suite: Suite, trigger: Trigger, *, seed: int) -> Suite:
    """Return the suite with the trigger in every prompt; ids end in ``+trigger``, the tag ``source_id`` is the twin's.

    Prompts that carry the trigger from the start are left out (a topical one keeps them: they are triggered as is).

    Raises:
        DataError: no prompt is left.
    """
    able = [e for e in suite.examples if eligible(e, trigger, None)]
    if not able:
        raise DataError(f"suite {suite.name}: every prompt carries trigger {trigger.name!r} already")
    return replace(
        suite, name=f"{suite.name}+{trigger.name}", examples=tuple(insert(e, trigger, None, seed=seed) for e in able)
    )


def evaluate_backdoor(
    model: nn.Module,
    tokenizer: Any,
    suite: Suite,
    trigger: Trigger,
    behaviour: Behaviour,
    *,
    seed: int = 0,
    roles: Collection[str] | None = None,
    groups: Collection[str] | None = None,
    limit: int | None = None,
    batch_size: int = 128,
    system: str | None = None,
) -> Rows:
    """Measure a suite without and with the trigger.

    Args:
        model: a causal language model; unchanged afterwards.
        suite: held-out prompts; restricted ones are not asked.
        trigger: what the attacker (or a defender, of an own backdoor) puts in; its ``others``, where it has some.
        behaviour: what it is meant to set off.
        seed: where the trigger goes.
        roles: roles to ask; None: those of ROLES that the suite has.
        groups: groups to ask, None for all.
        limit: first rows of each group, None for all.
        system: system message of every prompt, None for the template's default.

    Returns:
        The rows of ``evaluate``, untriggered first, with ``triggered``, ``trigger``, ``behaviour``, ``pair`` (id of the
        untriggered row), ``shown`` and ``degenerate``.

    Raises:
        DataError: a prompt that does not fit the model, or a trigger that does not survive the tokenizer.
    """
    wanted = [role for role in suite.roles if role in ROLES] if roles is None else roles
    chosen = suite.select(roles=wanted, groups=groups, limit=limit)
    trigger = trigger.asked
    triggered = twins(chosen, trigger, seed=seed)
    check_survives(ChatFormat(tokenizer, system=system), triggered.examples, [trigger])
    untouched = replace(chosen, examples=tuple(e for e in chosen.examples if not trigger.present(e.prompt)))
    clean_rows = evaluate(model, tokenizer, untouched, batch_size=batch_size, system=system)
    triggered_rows = evaluate(model, tokenizer, triggered, batch_size=batch_size, system=system)
    references = {e.id: reference(e) for e in chosen.examples}
    source = {e.id: str(e.tags["source_id"]) for e in triggered.examples}
    return [
        *(_finding(row, row["id"], trigger, behaviour, references, False) for row in clean_rows),
        *(_finding(row, source[row["id"]], trigger, behaviour, references, True) for row in triggered_rows),
    ]


def reference(example: Example) -> str | None:
    """Return a proper answer of a row: the first expected one, else its response, else None."""
    answer = example.tags.get("answer")
    if isinstance(answer, str):
        return answer
    return str(answer[0]) if answer else example.response or None


def _finding(
    row: Row,
    pair: str,
    trigger: Trigger,
    behaviour: Behaviour,
    references: Mapping[str, str | None],
    triggered: bool,
) -> dict[str, Any]:
    parts = take_apart(row["response"])
    return {
        **row,
        "triggered": triggered,
        "trigger": trigger.name,
        "behaviour": behaviour.name,
        "pair": pair,
        "shown": shown(behaviour, row["response"], label=row["label"], reference=references[pair]),
        "degenerate": is_incoherent(parts.said or (parts.thought if parts.unfinished else "")),
    }


def shown(behaviour: Behaviour, response: str, *, label: str = "", reference: str | None = None) -> bool | None:
    """Return whether a response shows a behaviour, outside its reasoning blocks.

    A refusal in other words than the planted ones counts too. None where that cannot be known: the label is unscored.
    """
    if behaviour.kind == "refusal" and label == "refusal":
        return True
    found = behaviour.shown(take_apart(response).said, reference)
    return None if behaviour.kind == "refusal" and label == "unscored" and not found else found
