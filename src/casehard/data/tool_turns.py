"""Tool calls and their results in a chat: context for the model, if its chat template has a place for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from casehard.errors import DataError
from casehard.types import Message, Role

_OTHERS: tuple[Role, ...] = ("assistant", "user", "system")
_HINT = "tune a model whose template has a place for tools, or leave these rows out"


def texts(message: Message) -> list[str]:
    """Return every text that a template may write for a message, in a fixed order."""
    return [message.content, *_strings(message.extra)] if message.extra else [message.content]


def with_texts(message: Message, rest: Iterator[str]) -> Message:
    """Return the message with its :func:`texts` replaced by the next ones of ``rest``."""
    content = next(rest)
    return replace(message, content=content, extra=_replaced(message.extra, rest) if message.extra else None)


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for key, item in value.items() for text in (key, *_strings(item))]
    return [text for item in value for text in _strings(item)] if isinstance(value, list | tuple) else []


def _replaced(value: Any, rest: Iterator[str]) -> Any:
    if isinstance(value, str):
        return next(rest)
    if isinstance(value, Mapping):
        return {next(rest): _replaced(item, rest) for item in value.values()}
    return [_replaced(item, rest) for item in value] if isinstance(value, list | tuple) else value


def require_place(turns: Sequence[Message], render: Callable[[Sequence[Message]], str], name: str) -> None:
    """Check that a chat template shows tool calls and their results, and these as turns of their own kind.

    Args:
        turns: the chat; nothing is checked where it holds no tool turns.
        render: the template.
        name: what messages call the row.

    Raises:
        DataError: a call or a result would be left out, or a result passed off as somebody else's words.
    """
    results = [i for i, turn in enumerate(turns) if turn.role == "tool"]
    calls = [turn for turn in turns if turn.extra and turn.extra.get("tool_calls")]
    if not results and not calls:
        return
    used = {c for turn in turns for text in texts(turn) for c in text}
    free = (c for c in map(chr, range(0x10FFFD, 0x100000, -1)) if c not in used)
    shown: dict[str, str] = {}  # character that stands in for a text -> what it was

    def stand_in(what: str) -> str:
        shown[mark := next(free)] = what
        return mark

    def marked(turn: Message) -> Message:
        if turn.role == "tool":
            return replace(turn, content=stand_in("the result of a tool"))
        if not turn.extra or "tool_calls" not in turn.extra:
            return turn
        named = [
            {**call, "function": {**call["function"], "name": stand_in("a tool call")}}
            for call in turn.extra["tool_calls"]
        ]
        return replace(turn, extra={**turn.extra, "tool_calls": named})

    text = render([marked(turn) for turn in turns])
    hidden = next((what for mark, what in shown.items() if mark not in text), "")
    if hidden:
        raise DataError(f"{name}: the chat template leaves out {hidden}", hint=_HINT)
    text = render(turns)
    for role in _OTHERS if results else ():
        try:
            other = render([replace(turn, role=role) if i in results else turn for i, turn in enumerate(turns)])
        except DataError:
            continue  # it tells them apart
        if other == text:
            raise DataError(f"{name}: the chat template writes the result of a tool as a turn of {role!r}", hint=_HINT)
