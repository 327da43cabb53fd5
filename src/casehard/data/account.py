"""What the operations of a chat template cost, and the account out of which a rendering pays before it does them.

A unit is about a character looked at. An account depends on the length of the chat alone, so a row is rendered on
every machine or on none.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

from jinja2 import TemplateError
from jinja2.utils import Namespace

_ACCOUNT, _PER_CHARACTER, _PER_TURN = 2_000_000, 128, 8_192
_OUTPUT, _OUTPUT_PER_CHARACTER = 262_144, 8
STEP, _ITEM = 16, 8  # for an operation, and for each thing that it looks at
DEPTH = 64  # calls within calls, lists within lists
_NUMBER = 2**60  # beyond it numbers are slow, and can be made to collide as keys
VIEWS: tuple[type[Collection[object]], ...] = (type({}.keys()), type({}.values()), type({}.items()))
SIZED: tuple[type[Collection[object]], ...] = (str, list, tuple, dict, range, set, *VIEWS)
_WIDTHS = frozenset({"center", "ljust", "rjust", "zfill"})
_SLOW = frozenset({"strip", "lstrip", "rstrip", "rfind", "rindex", "rsplit", "rpartition"})  # length x length


class Refused(TemplateError):
    """The template asks for what it cannot have."""


class TooCostly(Refused):
    """The account is empty."""


class Account:
    """What is left to pay with, and what was written so far.

    Args:
        characters: length of the chat's texts.
        turns: their number.
    """

    __slots__ = ("depth", "left", "room", "spans", "written")

    def __init__(self, characters: int, turns: int) -> None:
        self.left = _ACCOUNT + _PER_CHARACTER * characters + _PER_TURN * turns
        self.room = _OUTPUT + _OUTPUT_PER_CHARACTER * characters
        self.written = self.depth = 0
        self.spans: list[tuple[int, int]] = []

    def pay(self, cost: int) -> None:
        """Pay so many units.

        Raises:
            TooCostly: there are fewer.
        """
        self.left -= cost
        if self.left < 0:
            raise TooCostly("it takes too many steps or makes too much text")

    def wrote(self, characters: int) -> None:
        """Note that so many characters were written.

        Raises:
            TooCostly: there are too many of them.
        """
        self.written += characters
        if self.written > self.room:
            raise TooCostly(f"it writes more than {self.room} characters")

    def walk(self, value: object, level: int = 0) -> None:
        """Pay for all that a value holds: shared parts count as often as a walk through it comes by."""
        if isinstance(value, str):
            self.pay(_ITEM + len(value))
            return
        self.pay(_ITEM)
        if isinstance(value, int):
            if not -_NUMBER < value < _NUMBER:
                raise Refused("it computes with numbers of more than 60 bits")
        elif (parts := _parts(value)) is not None:
            if level == DEPTH:
                raise Refused(f"it nests lists more than {DEPTH} deep")
            for part in parts:
                self.walk(part, level + 1)

    def made(self, value: object) -> None:
        """Pay for a new value, once more: a character for each of its own, eight for each thing it refers to."""
        if isinstance(value, int):
            self.walk(value)
        elif isinstance(value, SIZED):
            self.pay(len(value) * (1 if isinstance(value, str) else 8))

    def skim(self, value: object) -> None:
        """Pay for the length of a value, or for one item."""
        self.pay(len(value) + 1 if isinstance(value, SIZED) else 1)


def _parts(value: object) -> Iterator[object] | None:
    """Return what printing or comparing a value looks at, None if that is the value alone."""
    if isinstance(value, dict):
        return iter([*value, *value.values()])
    if isinstance(value, SIZED):
        return iter(value)
    if isinstance(value, Namespace):
        held: dict[str, object] = object.__getattribute__(value, "_Namespace__attrs")
        return iter(held.values())
    return None


def pay_for_method(account: Account, text: str, name: str, given: Sequence[object]) -> None:
    """Pay for a method of a text: what it reads, and what it makes where that can be longer."""
    account.pay(len(text))
    first, second = (*given, None, None)[:2]
    if name in _WIDTHS and isinstance(first, int):
        account.pay(max(first, 0))
    elif name == "expandtabs":
        account.pay(text.count("\t") * (max(first, 0) if isinstance(first, int) else 8))
    elif name == "replace" and isinstance(first, str) and isinstance(second, str):
        account.pay(text.count(first) * len(second))
    elif name == "join" and isinstance(first, SIZED):
        account.pay(len(first) * len(text))
    elif name in _SLOW and isinstance(first, str):
        account.pay(len(text) * len(first))


def pay_for_percent(account: Account, text: str, given: object) -> None:
    """Pay for ``text % given``; widths of four digits, and those that come with the values, are refused."""
    if re.search(r"%[^%]*?(\d{4}|\*)", text):
        raise Refused(f"a field in the format {text[:40]!r}")
    before = account.left
    account.walk(given)
    account.pay(text.count("%") * (1000 + before - account.left))


def pay_for_filter(account: Account, name: str, value: object, given: Sequence[object]) -> None:
    """Pay for what a filter makes beyond what it reads."""
    texts = sum(len(x) for x in given if isinstance(x, str))
    if name == "format" and isinstance(value, str):
        pay_for_percent(account, value, given)
    elif name == "replace" and isinstance(value, str):
        pay_for_method(account, value, name, given)
    elif name == "indent" and isinstance(value, str):
        wide = next((x for x in given if isinstance(x, int) and not isinstance(x, bool)), 4)
        account.pay((1 + len(value.splitlines())) * (max(wide, 0) + texts))
    elif name == "tojson":
        before = account.left
        account.walk(value)
        wide = sum(len(y) for x in given if isinstance(x, (list, tuple)) for y in x if isinstance(y, str))
        wide += sum(abs(x) for x in given if isinstance(x, int) and not isinstance(x, bool)) + texts
        account.pay((before - account.left) * (12 + DEPTH * wide))
    elif name == "round" or name == "sum":
        if any(not isinstance(x, (int, float, str)) or (isinstance(x, int) and abs(x) > 100) for x in given):
            raise Refused(f"the filter {name} with {str(given)[:40]}")
    elif isinstance(value, SIZED) and not isinstance(value, str):
        account.pay(len(value) * texts)
