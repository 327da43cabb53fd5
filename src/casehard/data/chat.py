"""Chat rendering and completion-only labels.

The whole chat is rendered by the tokenizer's own template and tokenised in one go. What is trained is the final
assistant turn up to and including its end-of-turn token:

- a template with ``{% generation %}`` markers says itself where that turn stands;
- otherwise the turn begins where the rendering of the chat before it, with generation prompt, ends; if that is not
  a prefix of the whole rendering, it begins where a stand-in answer appears;
- the span ends with the template's last control token; without one, the tokenizer's EOS is appended.

The first trained token is the one after the tokens of the text before the turn, so that training and generation see
the same prompt. Where those are no prefix of the row's tokens (newlines that merge with what follows), prompt and turn
are tokenised apart, if that spells the same text; else character offsets decide and the row is counted as straddling.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, NoReturn

from casehard.data import tool_turns
from casehard.data.batches import IGNORE, Encoded, EncodedSet
from casehard.data.tokens import Controls, Tokens
from casehard.errors import DataError, Unsupported, UserError
from casehard.types import Example, Message

FALLBACK_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n' }}"
    "{% else %}{{ 'Assistant:' }}"
    "{% generation %}{{ ' ' + message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|reserved_special_token_0|>")
_ANSWER = "\U0010fffd"  # stands in for an answer: private use, so no template gives it a meaning
# Llama 3 templates print today's date unless given one; the same row must give the same tokens tomorrow.
_FIXED = {"date_string": "26 Jul 2024"}


class Details(NamedTuple):
    """One encoded row and what an audit wants to know about it; ``start`` and ``end`` count tokens."""

    encoded: Encoded
    start: int
    end: int
    split: bool
    """Prompt and answer were tokenised apart, as a token would have held the end of one and the start of the other."""
    straddles: bool
    """Such a token could not be avoided; it is trained."""
    appended_eos: bool
    """The template ends the turn with no control token, so the tokenizer's EOS was added."""
    literal_controls: int
    """Control tokens spelled out in the row's text and kept as text."""


class _Rendering(NamedTuple):
    text: str
    spans: list[tuple[int, int]]


def pad_id(tokenizer: Any) -> int:
    """Return a token id to pad with that needs no new embedding row: pad, a reserved token, unk, or EOS.

    Padding is masked by length in attention and labels, so sharing the id with a real token is harmless.

    Raises:
        Unsupported: the tokenizer has none of them.
    """
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    known = tokenizer.get_vocab()
    for name in _PAD_NAMES:
        if name in known:
            return int(known[name])
    for candidate in (tokenizer.unk_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    raise Unsupported(
        "the tokenizer has no pad, reserved, unk or EOS token to pad with",
        hint="set pad_token in tokenizer_config.json to a token of the vocabulary",
    )


def _name(example: Example) -> str:
    return f"row {example.id!r}" if example.id else f"row with prompt {example.prompt[:40]!r}"


class ChatFormat:
    """Render examples with a tokenizer's chat template and label the final assistant turn.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        system: system message for examples that have none.
        max_length: longest row in tokens; longer ones are an error or are dropped and counted, never cut.

    Raises:
        Unsupported: a tokenizer without character offsets, or without pad, unk and EOS.

    Attributes:
        warnings: what the user was warned about, in order, each once.
        dropped: rows left out by ``encode_all(overlong="drop")`` so far.
        uses_fallback: whether the tokenizer brought no template of its own.
        has_markers: whether the template marks assistant turns itself.
    """

    def __init__(self, tokenizer: Any, *, system: str | None = None, max_length: int | None = None) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise Unsupported(
                f"{type(tokenizer).__name__} gives no character offsets, which exact labels need",
                hint="use a tokenizer saved with tokenizer.json",
            )
        self.tokenizer = tokenizer
        self.system = system
        self.max_length = max_length
        self.pad_id = pad_id(tokenizer)
        self.warnings: list[str] = []
        self.dropped = 0
        self.uses_fallback = not tokenizer.chat_template
        if self.uses_fallback:
            self.template = FALLBACK_TEMPLATE
            self._warn(
                "the tokenizer has no chat template: using a plain 'User: ... Assistant: ...' layout. A model tuned "
                "on another layout will look worse than it is; save its template with the tokenizer"
            )
        else:
            self.template = str(tokenizer.get_chat_template())
        self.has_markers = _MARKER.search(self.template) is not None
        self._controls = Controls(tokenizer)

    @property
    def stop_ids(self) -> list[int]:
        """Token ids that end an assistant turn: what the template puts after an answer, and the tokenizer's EOS."""
        detail = self.details(Example.pair("a", "b"))
        ids = {detail.encoded.input_ids[detail.end - 1]}
        if self.tokenizer.eos_token_id is not None:
            ids.add(int(self.tokenizer.eos_token_id))
        return sorted(ids)

    def encode(self, example: Example) -> Encoded:
        """Tokenise one example; labels are IGNORE outside the final assistant turn.

        Raises:
            DataError: no final assistant turn, longer than ``max_length``, or the template refuses the chat.
        """
        encoded = self.details(example).encoded
        if self.too_long(encoded):
            self._refuse_long(example, encoded)
        return encoded

    def encode_all(self, examples: Sequence[Example], *, overlong: Literal["error", "drop"] = "error") -> EncodedSet:
        """Tokenise examples in order.

        Args:
            examples: rows with a final assistant turn.
            overlong: what to do with rows longer than ``max_length``: stop, or leave out, count and warn.

        Raises:
            DataError: see :meth:`encode`, or no row is left.
        """
        if overlong not in ("error", "drop"):
            raise UserError(f"overlong must be 'error' or 'drop', got {overlong!r}")
        rows: list[Encoded] = []
        long: list[tuple[Example, Encoded]] = []
        straddling = 0
        for example in examples:
            detail = self.details(example)
            if self.too_long(detail.encoded):
                long.append((example, detail.encoded))
                continue
            straddling += detail.straddles
            rows.append(detail.encoded)
        if long and overlong == "error":
            self._refuse_long(*long[0], count=len(long))
        self.dropped += len(long)
        if long:
            self._warn(f"left out {len(long)} of {len(examples)} rows longer than {self.max_length} tokens")
        if straddling:
            self._warn(
                f"in {straddling} of {len(examples)} rows one token holds the end of the prompt and the start of the "
                "answer; it is trained, although generation starts after that prompt"
            )
        if not rows:
            raise DataError(f"no rows left to encode (of {len(examples)})", hint="check max_length and the filter")
        return EncodedSet(tuple(rows), self.pad_id)

    def prompt_ids(self, example: Example) -> list[int]:
        """Return the tokens before the final assistant turn, generation prompt included.

        Raises:
            DataError: longer than ``max_length``, or the template refuses the chat.
        """
        turns, base, _ = self._turns(example)
        before = turns[:-1] if turns[-1].role == "assistant" else turns
        text = self._render(before, example, prompt=True).text
        ids = self._tokenise(text, base, example).ids
        if self.max_length is not None and len(ids) > self.max_length:
            raise DataError(f"{_name(example)}: prompt of {len(ids)} tokens, more than max_length={self.max_length}")
        return ids

    def too_long(self, encoded: Encoded) -> bool:
        """Return whether a row exceeds ``max_length``."""
        return self.max_length is not None and len(encoded.input_ids) > self.max_length

    def details(self, example: Example) -> Details:
        """Encode one example whatever its length, and say how its span was found."""
        turns, base, literal = self._turns(example)
        if turns[-1].role != "assistant":
            raise DataError(f"{_name(example)}: no final assistant turn to learn from")
        rendering = self._render(turns, example, prompt=False)
        begin, stop = self._span(turns, rendering, example)
        tokens = whole = self._tokenise(rendering.text, base, example)
        before = self._tokenise(rendering.text[:begin], base, example)
        text = self._controls.show(rendering.text, base)
        start = len(self._controls.show(rendering.text[:begin], base))
        stop = len(self._controls.show(rendering.text[:stop], base))
        first, split, straddles = len(before.ids), False, False
        if whole.ids[:first] != before.ids:
            apart = before.then(self._tokenise(rendering.text[begin:], base, example), start)
            split = self.tokenizer.decode(apart.ids) == self.tokenizer.decode(whole.ids)
            straddles = not split
            if split:
                tokens = apart
            else:
                first = next((i for i, (_, b) in enumerate(whole.offsets) if b > start), len(whole.ids))
        end, needs_eos = _end_of_turn(tokens, text, first, stop, exact=self.has_markers)
        if end <= first:
            raise DataError(f"{_name(example)}: the template leaves nothing of the answer to train on")
        ids = tokens.ids
        if needs_eos:
            ids = [*ids[:end], self._eos()]
            end += 1
        labels = [token if first <= i < end else IGNORE for i, token in enumerate(ids)]
        return Details(Encoded(ids, labels), first, end, split, straddles, needs_eos, literal)

    def _turns(self, example: Example) -> tuple[list[Message], int, int]:
        """Return the turns with the default system message and with control tokens in their text hidden."""
        messages = list(example.messages)
        if self.system is not None and messages[0].role != "system":
            messages.insert(0, Message("system", self.system))
        hidden = self._controls.hide([text for m in messages for text in tool_turns.texts(m)])
        rest = iter(hidden.texts)
        turns = [tool_turns.with_texts(m, rest) for m in messages]
        if not any(m.role == "user" for m in turns):
            raise DataError(f"{_name(example)}: no user turn")
        tool_turns.require_place(turns, lambda t: self._render(t, example, prompt=False).text, _name(example))
        return turns, hidden.base, hidden.literal

    def _render(self, turns: Sequence[Message], example: Example, *, prompt: bool) -> _Rendering:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        chat = [{"role": m.role, "content": m.content, **(m.extra or {})} for m in turns]
        variables: dict[str, Any] = {**_FIXED, **self.tokenizer.special_tokens_map}
        try:
            rendered: Any = render_jinja_template(
                conversations=[chat],
                chat_template=self.template,
                return_assistant_tokens_mask=self.has_markers,
                add_generation_prompt=prompt,
                **variables,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"{_name(example)}: the chat template refuses this chat: {error}") from None
        texts, spans = rendered
        return _Rendering(texts[0], list(spans[0]) if self.has_markers else [])

    def _tokenise(self, text: str, base: int, example: Example) -> Tokens:
        try:
            return self._controls.tokenise(text, base)
        except DataError as error:
            raise DataError(f"{_name(example)}: {error.message}", hint=error.hint) from None

    def _span(self, turns: Sequence[Message], rendering: _Rendering, example: Example) -> tuple[int, int]:
        """Return the characters of the final assistant turn, end-of-turn token included where that is known."""
        text = rendering.text
        if self.has_markers:
            earlier = 0
            if any(m.role == "assistant" for m in turns[:-1]):
                earlier = len(self._render(turns[:-1], example, prompt=False).spans)
            final = rendering.spans[earlier:]
            if not final:
                raise DataError(f"{_name(example)}: the template marks no generation in the final turn")
            begin, stop = final[0][0], final[-1][1]
        else:
            before = self._render(turns[:-1], example, prompt=True).text
            begin, stop = len(before), len(text)
            if not text.startswith(before):
                begin = self._answer_start(turns, text, example)
        # Templates may rework an answer (strip it, cut reasoning off its front), never its last words.
        if turns[-1].content.strip()[-32:] not in text[begin:stop]:
            raise DataError(
                f"{_name(example)}: the chat template hides the answer, or marks something else as generated",
                hint="mark the assistant's content with {% generation %} ... {% endgeneration %}",
            )
        return begin, stop

    def _answer_start(self, turns: Sequence[Message], text: str, example: Example) -> int:
        self._warn(
            "the chat template writes a finished turn differently from its generation prompt; the trained span "
            "begins at the answer's own text"
        )
        other = self._render([*turns[:-1], Message("assistant", _ANSWER)], example, prompt=False).text
        at = other.find(_ANSWER)
        if at < 0 or text[:at] != other[:at] or not text.endswith(other[at + 1 :]):
            raise DataError(
                f"{_name(example)}: the answer cannot be located in the rendered chat",
                hint="mark the assistant's content with {% generation %} ... {% endgeneration %} in the template",
            )
        return at

    def _eos(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise Unsupported(
                "neither the chat template nor the tokenizer has an end-of-turn token: a model trained so never stops",
                hint="set eos_token in tokenizer_config.json",
            )
        return int(self.tokenizer.eos_token_id)

    def _refuse_long(self, example: Example, encoded: Encoded, *, count: int = 1) -> NoReturn:
        others = f"; so are {count - 1} others" if count > 2 else "; so is another" if count > 1 else ""
        raise DataError(
            f"{_name(example)}: {len(encoded.input_ids)} tokens, more than max_length={self.max_length}{others}",
            hint="`casehard data audit --fitting FILE` writes the rows that fit; or raise max_length where the model's "
            "context is longer; rows are never cut",
        )

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)
            warnings.warn(text, stacklevel=3)


def _end_of_turn(tokens: Tokens, text: str, first: int, stop: int, *, exact: bool) -> tuple[int, bool]:
    """Return the position after the last trained token, and whether an EOS has to be appended there.

    Args:
        tokens: the row.
        text: what was tokenised, stand-ins turned back.
        first: first trained token.
        stop: character position where the turn ends.
        exact: the template marked the turn, so what it marked is kept as it is.
    """
    count = len(tokens.ids)
    end = max((i + 1 for i in range(first, count) if tokens.offsets[i][0] < stop), default=first)
    inside = [i for i in tokens.control if first <= i < end]
    if inside and not text[tokens.offsets[inside[-1]][1] : stop].strip():
        return (end if exact else inside[-1] + 1), False
    after = next((i for i in tokens.control if i >= end), None)
    if after is not None and not text[stop : tokens.offsets[after][0]].strip():
        return after + 1, False
    return end, True
