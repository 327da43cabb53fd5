"""Read rows that are laid out in another known way: Alpaca, ShareGPT, question and answer, TRL, named columns.

The columns of a row say what it is. Where exactly one reading is complete, the row is turned into the form of
:mod:`casehard.data.formats` and :attr:`Reader.line` says once what was mapped; where more than one is, or none, the
row is refused with the columns named. A file holds rows of one layout. Rows that are in that form already pass
untouched, whatever other keys they have.

What was meant can be said: a map ``{"Frage": "prompt"}`` renames columns first, and a column so named wins over others.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

from casehard.data.formats import RESERVED, shown
from casehard.errors import ConfigError, DataError

ASK = ("prompt", "instruction", "question", "query")
CONTEXT = ("input", "context")
"""What an instruction is about, in a column of its own."""
ANSWER = ("response", "output", "answer", "completion", "chosen")
CHAT = ("messages", "conversations", "conversation")
SYSTEM = ("system", "system_prompt")
KEYS = ("id", *ASK, *CONTEXT, *ANSWER, *CHAT, *SYSTEM)
"""Columns with a meaning, and what a map may rename to."""

_TO_PROMPT = ("response", "completion", "chosen")
"""Answers to a column ``prompt``; beside it, ``answer`` and ``output`` are tags, as in suites."""
_OTHER = ("history", "image", "images", "audio", "audios", "video", "videos")
"""Columns that would change what the model sees, and are not read."""
_NAMES = {"instruction": "Alpaca", "question": "question and answer", "query": "query and response"}
_ROLES = {
    "human": "user",
    "user": "user",
    "system": "system",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}


class _Layout(NamedTuple):
    """How one row is read: the columns, by the names they have in the file."""

    name: str
    ask: str = ""
    context: str = ""
    answer: str = ""
    chat: str = ""
    system: str = ""


_FORMS = _Layout("rows of the two forms")


def _said(layout: _Layout) -> str:
    columns = ", ".join(filter(None, (layout.ask, layout.answer, layout.chat)))
    return f"{layout.name} ({columns})" if columns else layout.name


def check_map(columns: Mapping[str, str]) -> None:
    """Check a map of columns.

    Raises:
        ConfigError: a key that means nothing, or one that two columns are mapped to.
    """
    for column, key in columns.items():
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(KEYS)}"
            raise ConfigError(f"map: {column!r} cannot be read as {key!r}", hint=hint)
    twice = [key for key in columns.values() if list(columns.values()).count(key) > 1]
    if twice:
        both = " and ".join(repr(column) for column, key in columns.items() if key == twice[0])
        raise ConfigError(f"map: {both} are both read as {twice[0]!r}", hint="name one column for each key")


def _there(value: Any) -> bool:
    """Return whether a cell holds anything."""
    return value is not None and value != [] and not (isinstance(value, str) and not value.strip())


def _plain(key: str) -> str:
    return key.strip().casefold()


def _in_the_forms(row: Mapping[str, Any]) -> bool:
    """Return whether a row is accepted as it is: messages, or a prompt whose response no other column holds."""
    if row.get("messages") is not None:
        return True
    prompt = row.get("prompt")
    if prompt is None or isinstance(prompt, list):
        return False
    return row.get("response") is not None or not (_there(row.get("completion")) or _there(row.get("chosen")))


class Reader:
    """Turns the rows of one file into rows of the two accepted forms.

    Args:
        name: what messages call the file.
        columns: column -> key, see :func:`check_map`.
        nulls: drop null columns: a table has every column in every row.
    """

    def __init__(self, name: str, columns: Mapping[str, str], *, nulls: bool = False) -> None:
        check_map(columns)
        self._name, self._columns, self._nulls = name, dict(columns), nulls
        self._first: _Layout | None = None
        self._found: set[str] = set()
        """Columns of the map that some row had."""
        self._used: dict[str, set[str]] = {"context": set(), "answer": set(), "system": set()}
        self._left: set[str] = set()
        """Columns left out, as others were named in the map."""

    def read(self, row: Any, where: str) -> Any:
        """Return the row in a form that :func:`casehard.data.formats.parse_row` takes.

        Raises:
            DataError: no reading is complete, several are, or the rows before were laid out otherwise.
        """
        if not isinstance(row, Mapping):
            return row
        named = self._renamed(row, where) if self._columns else row
        layout = _FORMS if not self._columns and _in_the_forms(row) else self._layout(named, where)
        if layout is not self._first:
            self._same(layout, where)
        out = named if layout is _FORMS else self._built(named, layout, where)
        return {key: value for key, value in out.items() if value is not None} if self._nulls else out

    @property
    def line(self) -> str:
        """What was mapped, for the user; empty where nothing was.

        Raises:
            DataError: a column of the map that no row has.
        """
        missing = [column for column in self._columns if column not in self._found]
        if missing:
            raise DataError(
                f"{self._name}: no row has the column {missing[0]!r} that is to be read as "
                f"{self._columns[missing[0]]!r}",
                hint=f"a map for one file of several is written behind it: FILE?map:{missing[0]}=...",
            )
        first = self._first
        if first is None or not (first.ask or first.chat or self._columns):
            return ""
        back = {key: column for column, key in self._columns.items()}

        def joined(columns: Iterable[str]) -> str:
            return " + ".join(back.get(column, column) for column in columns)

        used = {part: sorted(columns) for part, columns in self._used.items() if columns}
        said = [f"{joined([first.ask, *used.get('context', [])])} -> prompt"] if first.ask else []
        said += [f"{joined(used['answer'])} -> response"] if "answer" in used else []
        said += [f"{joined([first.chat])} -> messages"] if first.chat else []
        said += [f"{joined(used['system'])} -> system message"] if "system" in used else []
        said += [f"{back['id']} -> id"] if "id" in back else []
        said += [f"left out: {', '.join(sorted(self._left))}"] if self._left else []
        return f"{self._name}: read as {first.name}: {', '.join(said)}"

    def _renamed(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Return the row with its columns called what the map calls them."""
        here = {column: key for column, key in self._columns.items() if column in row}
        self._found.update(here)
        lost = {key for column, key in here.items() if key in row and key not in here}
        self._left |= lost
        return {here.get(key, key): value for key, value in row.items() if key not in lost}

    def _layout(self, row: Mapping[str, Any], where: str) -> _Layout:
        """Return how a row is read; without columns, it is in one of the accepted forms (or in none)."""
        forced = set(self._columns.values()) & set(row)
        chat, pair = forced & {*CHAT}, forced & {*ASK, *ANSWER, *CONTEXT}
        if not forced - {"id"} and _in_the_forms(row):
            return _FORMS
        names = self._names(row, where)
        chats = [] if pair and not chat else self._pick(row, names, CHAT, forced)
        found = None if chat else self._pair(row, names, forced, where)
        if chats and found and found.answer and not pair:
            self._ambiguous([*chats, found.ask, found.answer], where)
        if len(chats) > 1:
            self._ambiguous(chats, where)
        if chats:
            name = "messages" if _plain(chats[0]) == "messages" else "ShareGPT"
            found = _Layout(name, chat=chats[0])
        if found is None:
            if "prompt" in row or "messages" in row:
                return _FORMS  # null: what is wrong with it is said there
            self._unknown(row, where)
        systems = self._pick(row, names, SYSTEM, forced)
        if len(systems) > 1:
            self._ambiguous(systems, where)
        other = next((key for key in row if _plain(key) in _OTHER and _there(row[key])), None)
        if other is not None:
            raise DataError(
                f"{where}: the column {other!r} belongs to what the model sees, and is not read",
                hint="leave these rows out, or write them as messages of text",
            )
        return found._replace(system=systems[0] if systems else "")

    def _pair(self, row: Mapping[str, Any], names: Mapping[str, str], forced: set[str], where: str) -> _Layout | None:
        """Return the reading as prompt and response, None where it is not complete."""
        asks = self._pick(row, names, ASK, forced)
        if not asks:
            return None
        if "prompt" in asks:  # beside it, the others are tags
            asks = ["prompt"]
        kind = _plain(asks[0])
        group = _TO_PROMPT if kind == "prompt" and not forced & {*ANSWER} else ANSWER
        answers = self._pick(row, names, group, forced)
        known = answers or [names[key] for key in group if key in names]  # a null answer is an absent one
        if not known and kind != "prompt":
            return None
        contexts = self._pick(row, names, CONTEXT, forced)
        wanted = bool(forced & {*CONTEXT})
        if kind == "prompt" and not wanted:
            contexts = []
        if len(asks) > 1 or len(answers) > 1 or len(contexts) > 1:
            self._ambiguous([*asks, *contexts, *answers], where)
        if contexts and kind != "instruction" and not wanted:
            self._ambiguous([asks[0], contexts[0]], where, f"--map {asks[0]}=instruction --map {contexts[0]}=input")
        context = contexts[0] if contexts else ""
        name = "Dolly" if _plain(context) == "context" else _NAMES.get(kind, "prompt and response")
        if kind == "prompt" and known and _plain(known[0]) != "response":
            name = {"completion": "prompt and completion", "chosen": "preference pairs"}.get(_plain(known[0]), name)
        return _Layout(name, asks[0], context, known[0] if known else "")

    def _names(self, row: Mapping[str, Any], where: str) -> dict[str, str]:
        """Return known key -> column; upper case and blanks around a name do not count, an exact name goes first."""
        names: dict[str, str] = {}
        for column in row:
            key = _plain(column)
            if key not in KEYS or names.get(key) == key:
                continue
            if key in names and column != key:
                self._ambiguous([names[key], column], where)
            names[key] = column
        return names

    @staticmethod
    def _pick(row: Mapping[str, Any], names: Mapping[str, str], group: tuple[str, ...], forced: set[str]) -> list[str]:
        """Return the columns of a group that hold anything; those of the map alone, where it names any."""
        said = [key for key in group if key in forced]
        return [c for c in said or [names[key] for key in group if key in names] if _there(row[c])]

    def _same(self, layout: _Layout, where: str) -> None:
        first = self._first
        if first is None:
            first = self._first = layout
        answers = not (first.answer and layout.answer) or first.answer == layout.answer
        if (first.ask, first.chat) != (layout.ask, layout.chat) or not answers:
            raise DataError(
                f"{where}: reads as {_said(layout)}, the rows before as {_said(first)}",
                hint="a file holds rows of one layout: split it",
            )
        for part, used in self._used.items():
            if column := getattr(layout, part):
                used.add(column)

    def _built(self, row: Mapping[str, Any], layout: _Layout, where: str) -> dict[str, Any]:
        """Return a row of one of the two forms; columns without a meaning stay as they are."""
        used = {*filter(None, layout[1:])}
        rest = {
            key: value
            for key, value in row.items()
            if key not in used and (_there(value) or key == "id" or _plain(key) not in KEYS)
        }
        for key in RESERVED[1:]:
            if key in rest:
                if not self._columns:
                    self._ambiguous([key, *used], where)
                self._left.add(key)
                del rest[key]
        system = row[layout.system] if layout.system else None
        if layout.chat:
            return {"messages": _with_system(_chat(row[layout.chat], layout.chat, where), system, where), **rest}
        prompt, answer = row[layout.ask], row.get(layout.answer) if layout.answer else None
        if layout.context:
            prompt = _text(prompt, layout.ask, where) + "\n\n" + _text(row[layout.context], layout.context, where)
        if isinstance(prompt, list) or isinstance(answer, list):
            turns = _joined(_turns(prompt, "user", layout.ask, where), answer, layout.answer, where)
            return {"messages": _with_system(turns, system, where), **rest}
        pair = {"prompt": _text(prompt, layout.ask, where)}
        if answer is not None:
            pair["response"] = _text(answer, layout.answer, where)
        if system is None:
            return {**pair, **rest}
        roles = zip(("user", "assistant"), pair.values(), strict=False)
        turns = [{"role": role, "content": text} for role, text in roles]
        return {"messages": _with_system(turns, system, where), **rest}

    def _ambiguous(self, columns: list[str], where: str, hint: str = "") -> NoReturn:
        raise DataError(
            f"{where}: can be read in more than one way: {', '.join(map(repr, dict.fromkeys(columns)))}",
            hint=f"say what is meant: {hint or '--map COLUMN=prompt --map COLUMN=response'}",
        )

    def _unknown(self, row: Mapping[str, Any], where: str) -> NoReturn:
        asks = [key for key in row if _plain(key) in (*ASK, "input")]
        answers = [key for key in row if _plain(key) in ANSWER]
        told = f"--map {(asks or ['COLUMN'])[0]}=prompt --map {(answers or ['COLUMN'])[0]}=response"
        raise DataError(
            f"{where}: neither 'prompt' nor 'messages'; keys: {', '.join(map(shown, list(row)[:8])) or 'none'}",
            hint=f"say what is meant: {told}, or behind the file: FILE?map:COLUMN=prompt",
        )


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {column!r} must be text, got {type(value).__name__}")
    return value


def _turns(value: Any, role: str, column: str, where: str) -> list[Any]:
    if isinstance(value, list):
        return value
    return [{"role": role, "content": _text(value, column, where)}]


def _role(turn: Any) -> Any:
    return turn.get("role") if isinstance(turn, Mapping) else None


def _joined(asked: list[Any], answer: Any, column: str, where: str) -> list[Any]:
    """Return the turns of a prompt and of what follows it; an answer may repeat the prompt, and then must do so."""
    if answer is None:
        if asked and _role(asked[-1]) == "assistant":
            raise DataError(f"{where}: the prompt ends with an assistant turn, and there is no response")
        return asked
    answered = _turns(answer, "assistant", column, where)
    if not answered:
        raise DataError(f"{where}: {column!r} is an empty list")
    if _role(answered[0]) == "assistant":
        return asked + answered
    if answered[: len(asked)] != asked:
        raise DataError(
            f"{where}: {column!r} neither answers the prompt nor begins with it",
            hint="it holds the assistant's turn, or the whole conversation",
        )
    return answered


def _chat(value: Any, column: str, where: str) -> list[Any]:
    """Return ShareGPT turns as messages; what is none of them is left for the strict check to name."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {column!r} must be a non-empty list of turns, got {str(value)[:40]!r}")
    turns: list[Any] = []
    for turn in value:
        if isinstance(turn, Mapping):
            names = {"from": "role", "value": "content"} if "from" in turn or "value" in turn else {}
            turn = {names.get(key, key): item for key, item in turn.items() if item is not None}
            role = turn.get("role")
            if isinstance(role, str):
                turn["role"] = _ROLES.get(_plain(role), role)
        turns.append(turn)
    return turns


def _with_system(turns: list[Any], system: Any, where: str) -> list[Any]:
    if system is None:
        return turns
    if turns and _role(turns[0]) == "system":
        raise DataError(f"{where}: a system column and a system turn", hint="leave one of them out")
    return [{"role": "system", "content": system}, *turns]
