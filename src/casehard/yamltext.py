"""The one reader of YAML: plain values from bounded text, so that no file or ``--set`` can hang or surprise a run.

Allowed are text keys, each once in its mapping, and the values that JSON has; anchors and merges too, as far as what
they expand to stays small. A date is read as its text: no setting is a date.
"""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import Any

import yaml

from casehard.errors import ConfigError

BYTES, VALUES, LEVELS = 1 << 20, 100_000, 32
"""Most that a text may hold, aliases expanded; the largest plan has 4 kB, 400 values and 6 levels."""
_DIGITS = 100
_NO_TEXT = re.compile(r"[\0\ud800-\udfff]")
_TAG = "tag:yaml.org,2002:"
_KINDS = {
    "null": "nothing",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "timestamp": "a date",
}
_TAGS = {f"{_TAG}{name}" for name in ("str", "seq", "map", *_KINDS)}
_MERGE = f"{_TAG}merge"


class _Refused(yaml.MarkedYAMLError):
    def __init__(self, mark: Any, problem: str, hint: str) -> None:
        super().__init__(None, None, problem, mark)
        self.hint = hint


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._count = 0
        self._sizes: dict[int, tuple[int, int]] = {}  # of a node by id, aliases expanded: values, levels

    def compose_node(self, parent: Any, index: Any) -> Any:
        reader: Any = super()
        event, self._depth = reader.peek_event(), self._depth + 1
        self._bound(event.start_mark, self._count, self._depth)
        node: Any = super().compose_node(parent, index)
        alias = isinstance(event, yaml.AliasEvent)
        if alias and id(node) not in self._sizes:
            raise _Refused(event.start_mark, f"the anchor {event.anchor!r} holds itself", "write the value out")
        if not alias:
            self._count += 1
            self._check(node)
            inner = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
            sizes = [] if isinstance(node, yaml.ScalarNode) else [self._sizes[id(part)] for part in inner]
            self._sizes[id(node)] = 1 + sum(n for n, _ in sizes), 1 + max((levels for _, levels in sizes), default=0)
        values, levels = self._sizes[id(node)]
        self._bound(event.start_mark, values, self._depth + levels - 1)
        self._depth -= 1
        return node

    def _bound(self, mark: Any, values: int, levels: int) -> None:
        if values > VALUES:
            raise _Refused(
                mark, f"more than {VALUES:,} values, aliases expanded", "settings are few: keep rows in files"
            )
        if levels > LEVELS:
            raise _Refused(mark, f"more than {LEVELS} levels", "no setting lies so deep")

    def _check(self, node: Any) -> None:
        mark, plain = node.start_mark, node.tag in _TAGS or (node.tag == _MERGE and node.value == "<<")
        if not plain:
            raise _Refused(mark, f"the tag {node.tag!r} is not read", "plain values only: leave the tag out")
        if node.tag in (f"{_TAG}int", f"{_TAG}float") and len(node.value) > _DIGITS:
            raise _Refused(mark, f"a number of {len(node.value)} characters", "put it in quotes if it is a text")
        if node.tag in (f"{_TAG}int", f"{_TAG}float") and ":" in node.value:
            raise _Refused(mark, f"YAML reads {node.value} in base sixty", "put it in quotes if it is a text")
        if isinstance(node, yaml.ScalarNode) and _NO_TEXT.search(node.value):
            raise _Refused(mark, "a text with NUL or half a character", "no name and no message holds one")
        lines: dict[str, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            at = key.start_mark
            if not isinstance(key, yaml.ScalarNode):
                raise _Refused(
                    at, f"a key is a {'list' if isinstance(key, yaml.SequenceNode) else 'mapping'}", "give it a name"
                )
            kind = _KINDS.get(key.tag.removeprefix(_TAG))
            if kind:
                raise _Refused(at, f"the key {key.value} is read as {kind}", f"names are texts: '{key.value}'")
            if key.value in lines:
                raise _Refused(
                    at,
                    f"the key {key.value!r} stands there twice, first in line {lines[key.value]}",
                    "keep one of them",
                )
            lines[key.value] = at.line + 1

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, KeyError, IndexError):
            kind = _KINDS.get(node.tag.removeprefix(_TAG), node.tag)
            raise _Refused(
                node.start_mark, f"{node.value!r} is not {kind}", "put it in quotes if it is a text"
            ) from None


_register: Any = _Loader.add_constructor
_register(f"{_TAG}timestamp", yaml.SafeLoader.construct_yaml_str)


def parse(text: str, *, where: str) -> Any:
    """Return the plain value that a YAML text stands for.

    Args:
        where: what the text is, for messages.

    Raises:
        ConfigError: not YAML, more than the bounds, a key twice or not a text, an object; with the line.
    """
    if len(text) > BYTES:
        raise ConfigError(
            f"{where}: more than {BYTES:,} bytes", hint="settings are few: keep rows in files of their own"
        )
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = mark.line + 1 if mark else text.count("\n", 0, getattr(error, "position", 0)) + 1
        if problem is None:  # a character that no YAML holds
            problem = f"a control character, code {getattr(error, 'character', '?')}"
        hint = getattr(error, "hint", "texts with ': ', ' #' or a leading sign need quotes")
        raise ConfigError(f"{where}, line {line}: {_short(problem)}", hint=_short(hint)) from None


def _short(text: str) -> str:
    return text if len(text) <= 300 else text[:297] + "..."


def read(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        ConfigError: no such file, no regular file, not UTF-8, or see :func:`parse`.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConfigError(f"{path} is not a regular file", hint="write the settings to a file first")
        with path.open("rb") as handle:
            data = handle.read(BYTES + 1)
        return parse(data.decode("utf-8"), where=str(path))
    except FileNotFoundError:
        raise ConfigError(f"no such config file: {path}", hint="check the path") from None
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}, line {line}: not readable as UTF-8", hint="save it as UTF-8 text") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path} cannot be read: {reason}", hint="check the path and its permissions") from None
