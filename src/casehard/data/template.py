"""A tokenizer's chat template, rendered as transformers would, with a clock that stands still and at a bounded cost.

A template is a program, and the rows it reads come from strangers too (:mod:`casehard.data.sandbox`). Why it pays
instead of running against a timer or in a child process: docs/decisions/0008-templates-pay.md.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import Template, TemplateError

from casehard.data.account import Account, Refused, TooCostly
from casehard.data.sandbox import CLOCK, ENVIRONMENT, PaidContext, Payer
from casehard.errors import DataError, Unsupported
from casehard.types import Message, Role

FALLBACK_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n' }}"
    "{% else %}{{ 'Assistant:' }}"
    "{% generation %}{{ ' ' + message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
SOURCE = 100_000
"""Longest template, in characters; those in use have some thousands."""
_PATIENCE = 4
"""Renderings that are too costly, and none that is not, before a template is not tried again."""
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_STAND_INS = range(0x10FFFD, 0x10F000, -1)  # for an answer: private use, so no template gives them a meaning
STAND_IN = chr(_STAND_INS[0])
# Templates print today's date unless given one; the same row must give the same tokens tomorrow.
_FIXED = {"date_string": CLOCK.strftime("%d %b %Y")}
_PROBES: tuple[tuple[Role, ...], ...] = (
    ("user",),
    ("user", "assistant"),
    ("system", "user"),
    ("system", "user", "assistant"),
    ("user", "assistant", "user"),
    ("user", "assistant", "user", "assistant"),
)


class Rendering(NamedTuple):
    """A rendered chat, and the characters that ``{% generation %}`` marks."""

    text: str
    spans: list[tuple[int, int]]


class _Program:
    """A template ready to run, or what is wrong with it."""

    def __init__(self, source: str) -> None:
        self.template: Template | None = None
        self.problem = ""
        self.lasts = False
        """Whether it has rendered anything."""
        self.refused = 0
        """How often a rendering was too costly."""
        try:
            if len(source) > SOURCE:
                raise Refused(f"it has {len(source)} characters, more than {SOURCE}")
            tree = Payer().visit(ENVIRONMENT.parse(source))
            self.template = Template.from_code(ENVIRONMENT, ENVIRONMENT.compile(tree), dict(ENVIRONMENT.globals))
        except Exception as error:  # a stranger's program: Python's compiler, too, has limits of many kinds
            self.problem = _said(error)

    def run(self, values: Mapping[str, Any], account: Account) -> str:
        """Return what the template writes."""
        assert self.template is not None
        context = self.template.new_context(dict(values))
        assert isinstance(context, PaidContext)
        context.account = account
        pieces = []
        for piece in self.template.root_render_func(context):
            pieces.append(piece)
            account.wrote(len(piece))
        return "".join(pieces)


@functools.lru_cache(maxsize=32)
def _program(source: str) -> _Program:
    return _Program(source)


def _said(error: Exception) -> str:
    text = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:300])  # on a terminal, in a log
    return shown if len(text) <= 300 else shown + "..."


class ChatTemplate:
    """The template of a tokenizer, or a plain layout for one that has none.

    Args:
        tokenizer: a Hugging Face tokenizer.

    Raises:
        Unsupported: several templates, none of them the default.

    Attributes:
        source: the template.
        uses_fallback: whether the tokenizer brought none.
        has_markers: whether it marks assistant turns itself.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.uses_fallback = not tokenizer.chat_template
        try:
            self.source = FALLBACK_TEMPLATE if self.uses_fallback else str(tokenizer.get_chat_template())
        except ValueError as error:
            raise Unsupported(
                f"the tokenizer has several chat templates and no default: {error}",
                hint="name one of them 'default' in the tokenizer's files",
            ) from None
        self.has_markers = _MARKER.search(self.source) is not None

    def render(self, turns: Sequence[Message], *, prompt: bool) -> Rendering:
        """Render a chat; ``prompt`` asks for the start of an answer after it.

        Raises:
            DataError: the template is damaged, refuses the chat, or costs more than a chat of this length may.
        """
        program = _program(self.source)
        if program.refused >= _PATIENCE and not program.lasts:
            raise DataError(f"the chat template refuses every chat: {program.problem}")
        if program.template is None:
            raise DataError(f"the chat template cannot be used: {program.problem}")
        account = Account(sum(len(turn.content) for turn in turns), len(turns))
        chat = [{"role": turn.role, "content": turn.content, **(turn.extra or {})} for turn in turns]
        special = self._tokenizer.special_tokens_map.items()
        values = {
            **_FIXED,
            **{name: x if isinstance(x, str) else [*map(str, x)] for name, x in special},
            "messages": chat,
            "tools": None,
            "documents": None,
            "add_generation_prompt": prompt,
        }
        try:
            account.pay(len(self.source))
            text = program.run(values, account)
        except Exception as error:  # a stranger's program may fail in any way
            if isinstance(error, TooCostly):
                program.refused, program.problem = program.refused + 1, _said(error)
            raise DataError(f"the chat template refuses this chat: {_said(error)}") from error
        program.lasts = True
        return Rendering(text, account.spans)

    def with_other_answer(self, turns: Sequence[Message], text: str) -> str:
        """Render the chat with a stand-in, a character that ``text`` does not hold, for the final answer.

        Raises:
            DataError: see :meth:`render`.
        """
        stand_in = next(c for c in map(chr, _STAND_INS) if c not in text)
        return self.render([*turns[:-1], Message("assistant", stand_in)], prompt=False).text

    @functools.cached_property
    def frames(self) -> tuple[str, ...]:
        """What the template writes around turns that hold a stand-in; chats it refuses are left out."""

        def frames() -> Iterator[str]:
            for roles in _PROBES:
                for prompt in (False, True):
                    try:
                        yield self.render([Message(role, STAND_IN) for role in roles], prompt=prompt).text
                    except DataError:
                        continue  # no system turn, say

        return tuple(frames())
