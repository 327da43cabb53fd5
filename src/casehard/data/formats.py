"""One row of a data file <-> one :class:`Example`, checked strictly; JSON read with the limits of untrusted input.

A row is ``{"prompt": str, "response": str?}`` or ``{"messages": [{"role", "content"}, ...]}``, with an optional
``id``; a null response counts as absent; every other key becomes a tag. Nothing is guessed here: files laid out in
another known way are turned into such rows by :mod:`casehard.data.layouts`.

A message may be given as parts of text. An assistant turn may call tools (``tool_calls``) where results follow it, as
turns of role ``tool``; both are context: the final assistant turn, which is what is learned, is text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, cast

from casehard.errors import DataError
from casehard.types import ROLES, Example, Message, Role

MAX_LINE_BYTES = 1_000_000
MAX_DEPTH = 32
RESERVED = ("id", "prompt", "response", "messages")
EXTRA = {"assistant": ("tool_calls",), "tool": ("tool_call_id", "name")}
"""Role -> keys a message may have besides ``role`` and ``content``."""

_MEANT = {
    "instruction": "prompt",
    "question": "prompt",
    "input": "prompt",
    "text": "prompt",
    "completion": "response",
    "output": "response",
    "conversations": "messages",
    "conversation": "messages",
    "chat": "messages",
}


def shown(value: Any) -> str:
    """Return a value of a file as messages show it: cut, as it may be a megabyte long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate key {shown(twice)}")
    return out


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {text[:40]} is too large")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_refuse_constant, parse_float=_finite)


def check_values(value: Any, where: str) -> None:
    """Check that ``value`` is plain JSON: no NaN, no lone surrogates, at most MAX_DEPTH levels.

    Raises:
        DataError: names ``where`` and what was seen.
    """
    pending: list[tuple[Any, int]] = [(value, 1)]
    while pending:
        item, depth = pending.pop()
        if isinstance(item, str):
            try:
                item.encode()
            except UnicodeEncodeError:
                raise DataError(f"{where}: text with a lone surrogate, not valid Unicode: {item[:40]!r}") from None
        elif isinstance(item, float) and not math.isfinite(item):
            raise DataError(f"{where}: {item} is not a JSON number", hint="leave the key out, or use null")
        elif isinstance(item, Mapping | list | tuple):
            if depth > MAX_DEPTH:
                raise DataError(f"{where}: nested deeper than {MAX_DEPTH} levels")
            if isinstance(item, Mapping):
                pending.extend((key, depth) for key in item)
                pending.extend((inner, depth + 1) for inner in item.values())
            else:
                pending.extend((inner, depth + 1) for inner in item)
        elif not (item is None or isinstance(item, bool | int | float)):
            raise DataError(f"{where}: a {type(item).__name__} is not a JSON value: {str(item)[:40]!r}")


def parse_line(raw: bytes, where: str) -> Any:
    """Parse one JSON value from ``raw`` under the limits of this module.

    Args:
        raw: at most MAX_LINE_BYTES of UTF-8.
        where: file and line, for the error.

    Raises:
        DataError: too long, not UTF-8, not JSON, duplicate keys, NaN, nested too deep.
    """
    if len(raw) > MAX_LINE_BYTES:
        raise DataError(f"{where}: longer than {MAX_LINE_BYTES:,} bytes", hint="one row may hold at most 1 MB")
    try:
        return DECODER.decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start}: 0x{raw[error.start]:02x})") from None
    except RecursionError:
        raise DataError(f"{where}: nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON: {error}") from None


def _text(value: Any, what: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {what} must be text, got {type(value).__name__}")
    if not value.strip():
        raise DataError(
            f"{where}: {what} is empty", hint="leave the row out; an absent response is allowed, an empty one not"
        )
    return value


def _content(value: Any, where: str) -> str:
    """Return the text of a message given as text or as parts of it, joined by line breaks."""
    if not isinstance(value, list):
        return _text(value, "content", where)
    texts = []
    for part in value:
        keys = {key: item for key, item in part.items() if item is not None} if isinstance(part, Mapping) else {}
        if keys.get("type") != "text" or set(keys) != {"type", "text"}:
            told = f"with the keys {shown(sorted(keys))}" if keys else f"a {type(part).__name__}"
            kind = shown(keys["type"]) if keys.get("type") else told
            raise DataError(
                f"{where}: a part of the content is {kind}, not text",
                hint="only text is trained: leave rows with images, audio or video out",
            )
        texts.append(_text(keys["text"], "a text part of the content", where))
    return _text("\n".join(texts), "content", where)


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Return tool calls in the one form that chat templates expect: arguments as an object, not as text."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: 'tool_calls' must be a non-empty list, got {str(value)[:40]!r}")
    calls = []
    for call in value:
        kept = {key: item for key, item in call.items() if item is not None} if isinstance(call, Mapping) else {}
        function = kept.get("function", kept)
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"{where}: a tool call without the name of a function: {str(call)[:60]!r}")
        given = function.get("arguments")
        if isinstance(given, str):
            given = parse_line(given.encode(), f"{where}, arguments of {shown(name)}") if given.strip() else None
            check_values(given, where)
        if not isinstance(given, Mapping | None):
            raise DataError(f"{where}: the arguments of {shown(name)} must be an object, got {type(given).__name__}")
        outer = {key: item for key, item in kept.items() if key in ("id", "type")} if "function" in kept else {}
        calls.append({"type": "function", **outer, "function": {"name": name, "arguments": dict(given or {})}})
    return calls


def _turn(item: Any, where: str) -> Message:
    role = item.get("role") if isinstance(item, Mapping) else None
    known = isinstance(role, str) and role in ROLES
    extra = {k: v for k, v in item.items() if k not in ("role", "content") and v is not None} if known else {}
    calls = "tool_calls" in extra
    needed = {"role"} if calls else {"role", "content"}
    if not isinstance(item, Mapping) or not needed <= set(item) or set(extra) - set(EXTRA.get(str(role), ())):
        seen = shown(sorted(map(str, item))) if isinstance(item, Mapping) else type(item).__name__
        raise DataError(f"{where}: expected exactly the keys 'role' and 'content', got {seen}")
    if not known:
        raise DataError(f"{where}: unknown role {shown(role)}", hint=f"roles: {', '.join(ROLES)}")
    content = item.get("content")
    if calls:
        extra["tool_calls"] = _calls(extra["tool_calls"], where)
    for key in set(extra) - {"tool_calls"}:
        _text(extra[key], repr(key), where)
    text = "" if calls and content in (None, "", []) else _content(content, where)
    return Message(cast(Role, role), text, extra or None)


def _due(before: Message | None) -> tuple[str, ...]:
    """Return the roles that may follow a turn."""
    if before is None:
        return ("user",)
    if before.role == "assistant":
        return ("tool",) if before.extra else ("user", "tool")
    return ("assistant", "tool") if before.role == "tool" else ("assistant",)


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: 'messages' must be a non-empty list, got {str(value)[:40]!r}")
    turns = [_turn(item, f"{where}, message {number}") for number, item in enumerate(value, start=1)]
    talk = turns[1:] if turns[0].role == "system" else turns
    if not talk:
        raise DataError(f"{where}: no user turn after the system message")
    before: Message | None = None
    for position, turn in enumerate(talk, start=1 + len(turns) - len(talk)):
        due = _due(before)
        if turn.role not in due:
            raise DataError(
                f"{where}, message {position}: role {turn.role!r} where {due[0]!r} was due",
                hint="an optional system turn, then user and assistant in turn, beginning with user; "
                "tool turns follow an assistant turn",
            )
        before = turn
    if turns[-1].role == "assistant" and turns[-1].extra:
        raise DataError(
            f"{where}: the last turn calls a tool; what is trained is a final assistant turn of text alone",
            hint="end the row before that turn, or add the tool's result and the answer that was given then",
        )
    return tuple(turns)


def parse_row(row: Any, where: str, *, require_response: bool = False) -> Example:
    """Turn one parsed row into an Example.

    Args:
        row: a JSON object in prompt-completion or messages form.
        where: file and line, for the error.
        require_response: refuse a row without a final assistant turn.

    Raises:
        DataError: names ``where``, the key and the value seen.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: a row must be a JSON object, got {type(row).__name__}")
    check_values(row, where)
    if "messages" in row:
        both = [key for key in ("prompt", "response") if key in row]
        if both:
            raise DataError(f"{where}: both 'messages' and {both[0]!r}; a row has one form")
        messages = _messages(row["messages"], where)
    elif "prompt" in row:
        messages = (Message("user", _text(row["prompt"], "'prompt'", where)),)
        if row.get("response") is not None:
            messages += (Message("assistant", _text(row["response"], "'response'", where)),)
    else:
        meant = next((f"rename {key!r} to {_MEANT[key]!r}" for key in row if key in _MEANT), "")
        raise DataError(
            f"{where}: neither 'prompt' nor 'messages'; keys: {', '.join(map(shown, list(row)[:8])) or 'none'}",
            hint=meant or 'a row is {"prompt": ..., "response": ...} or {"messages": [...]}',
        )
    if require_response and messages[-1].role != "assistant":
        raise DataError(f"{where}: no response to learn from", hint='add "response", or end with an assistant turn')
    name = row.get("id", "")
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise DataError(f"{where}: 'id' must be text or a whole number, got {shown(name)}")
    return Example(messages, str(name), {key: value for key, value in row.items() if key not in RESERVED})


def to_row(example: Example) -> dict[str, Any]:
    """Turn an Example into the row that :func:`parse_row` reads back as the same Example."""
    clash = [key for key in example.tags if key in RESERVED]
    if clash:
        raise DataError(f"example {example.id!r}: the tag {clash[0]!r} has the name of a row key")
    row: dict[str, Any] = {"id": example.id} if example.id else {}
    roles = [message.role for message in example.messages]
    if roles in (["user"], ["user", "assistant"]):
        row["prompt"] = example.messages[0].content
        if len(roles) == 2:
            row["response"] = example.messages[1].content
    else:
        row["messages"] = [{"role": m.role, "content": m.content, **(m.extra or {})} for m in example.messages]
    return row | dict(example.tags)
