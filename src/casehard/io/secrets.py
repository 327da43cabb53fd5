"""Secrets of the environment: find them, refuse them in settings, blank them in everything that is written.

A variable counts as secret by its name (HF_TOKEN, OPENAI_API_KEY, DB_PASSWORD) when its value has at least 12
characters; shorter values occur in ordinary text by chance. A value is found only as a whole: bounded by
something other than a letter or digit, so a word that merely contains it is left alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from casehard.errors import ConfigError

REDACTED = "[redacted]"
SHORTEST = 12
_PLAIN = (bool, int, float)
_NAME = re.compile(
    r"(?:^|[^A-Z])(?:(?:(?:API|AUTH|ACCESS)?TOKEN|(?:API|ACCESS|PRIVATE|SECRET)?KEY)S?$|(?:SECRET|PASSWORD|PASSWD)S?(?:_|$))"
)
# Setting names of tokenizers and trainers that end like a secret and hold none.
_HARMLESS = re.compile(r"(?:^|_)(?:PAD|EOS|BOS|UNK|SEP|CLS|MASK|IMAGE)_TOKEN$|(?:^|_)(?:FOREIGN|SORT|PRIMARY)_KEY$")


@cache  # the names of columns come back with every row
def is_secret_name(name: str) -> bool:
    """Return whether a variable or setting of this name is expected to hold a secret."""
    upper = name.upper()
    return bool(_NAME.search(upper)) and not _HARMLESS.search(upper)


def environment() -> dict[str, str]:
    """Return the secret variables of this process, longest value first."""
    found = {k: v for k, v in os.environ.items() if len(v.strip()) >= SHORTEST and is_secret_name(k)}
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def _whole(value: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![A-Za-z0-9]){re.escape(value.strip())}(?![A-Za-z0-9])")


class Redactor:
    """Blank secrets; the environment is read once, so use one for many rows."""

    def __init__(self) -> None:
        self._known = {name: _whole(value) for name, value in environment().items()}

    def text(self, value: str) -> str:
        """Return text without secret values."""
        for pattern in self._known.values():
            value = pattern.sub(REDACTED, value)
        return value

    def names_in(self, value: str) -> Iterator[str]:
        """Yield the variables whose value occurs in a text."""
        return (name for name, pattern in self._known.items() if pattern.search(value))

    def values(self, value: Any) -> Any:
        """Return JSON-ready values without secret values, and without what stands under a secret name."""
        if isinstance(value, str):
            return self.text(value)
        if value is None or isinstance(value, _PLAIN):
            return value
        if isinstance(value, Mapping):
            return {str(key): self._under(str(key), item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.values(item) for item in value]
        return self.text(str(value))

    def _under(self, key: str, item: Any) -> Any:
        # Plain values first, by their very type: a benchmark writes millions of them.
        if type(item) in _PLAIN:
            return item
        return REDACTED if isinstance(item, str) and item and is_secret_name(key) else self.values(item)


def redact(value: Any) -> Any:
    """Return JSON-ready values without secrets, see :class:`Redactor`."""
    return Redactor().values(value)


def refuse(settings: Any, *, where: str) -> None:
    """Check settings before they are used, and so written down.

    Args:
        settings: JSON values.
        where: what they are, for the message.

    Raises:
        ConfigError: names the setting and the variable, never the value.
    """
    redactor = Redactor()
    for path, text in _leaves(settings, where):
        for name in redactor.names_in(text):
            raise ConfigError(
                f"{path} holds the value of the environment variable {name}",
                hint="settings are stored beside the result: remove the secret from them",
            )


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{path}.{i}")
    elif isinstance(value, str):
        yield path, value
