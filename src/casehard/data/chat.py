"""Chat rendering and completion-only labels.

The whole chat is rendered by the tokenizer's own template and tokenised in one go. What is trained is the final
assistant turn up to and including its end-of-turn token:

- a template with ``{% generation %}`` markers says itself where that turn stands;
- otherwise the turn begins where the rendering of the chat before it, with generation prompt, ends; if that is not
  a prefix of the whole rendering, it begins where a stand-in answer appears;
- the span ends with the template's last control token; without one, the tokenizer's EOS is appended.

What the template writes is what is trained. Where that is not the row's answer (a part left out, blanks stripped) the
row is counted and the loss told, whatever the length of the answer; where nothing of it is left, the row is refused.

The first trained token is the one after the tokens of the text before the turn, so that training and generation see
the same prompt. Where those are no prefix of the row's tokens (newlines that merge with what follows), prompt and turn
are tokenised apart, if that spells the same text; else character offsets decide and the row is counted as straddling.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, NoReturn

from casehard.data import tool_turns
from casehard.data.answers import Change, change, changing, described, end_of_turn, only_blanks
from casehard.data.batches import IGNORE, Encoded, EncodedSet
from casehard.data.template import FALLBACK_TEMPLATE as FALLBACK_TEMPLATE
from casehard.data.template import ChatTemplate, Rendering
from casehard.data.tokens import Controls, Hidden, Tokens
from casehard.errors import DataError, Unsupported, UserError
from casehard.types import Example, Message

_PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|reserved_special_token_0|>")


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
    change: Change | None = None
    """What the template did to the answer, None where it wrote it as it is."""


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


def name_of(example: Example) -> str:
    """Return what messages call a row."""
    return f"row {example.id!r}" if example.id else f"row with prompt {example.prompt[:40]!r}"


class _Layout(NamedTuple):
    """A row rendered and tokenised; ``first`` and ``end`` count tokens of the trained span."""

    turns: list[Message]
    text: str
    tokens: Tokens
    first: int
    end: int
    needs_eos: bool
    split: bool
    straddles: bool
    literal: int
    change: Change | None


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
        self._told = False
        self._template = ChatTemplate(tokenizer)
        self.template, self.has_markers = self._template.source, self._template.has_markers
        self.uses_fallback = self._template.uses_fallback
        if self.uses_fallback:
            self._warn(
                "the tokenizer has no chat template: using a plain 'User: ... Assistant: ...' layout. A model tuned "
                "on another layout will look worse than it is; save its template with the tokenizer"
            )

    @property
    def stop_ids(self) -> list[int]:
        """Token ids that end an assistant turn: the control tokens the template writes after an answer, and the EOS."""
        layout = self._lay_out(Example.pair("a", "b"))
        close = changing(layout.text, self._template.with_other_answer(layout.turns, layout.text))[1]
        tokens = layout.tokens
        ids = {tokens.ids[i] for i in tokens.control if i < layout.end and tokens.offsets[i][0] >= close}
        if self.tokenizer.eos_token_id is not None:
            ids.add(int(self.tokenizer.eos_token_id))
        return sorted(ids)

    def encode(self, example: Example) -> Encoded:
        """Tokenise one example; labels are IGNORE outside the final assistant turn.

        Raises:
            DataError: no final assistant turn, longer than ``max_length``, or the template refuses the chat.
        """
        detail = self.details(example)
        if self.too_long(detail.encoded):
            self._refuse_long(example, detail.encoded)
        if detail.change and not self._told:
            self._tell([(name_of(example), detail.change)], 1)
        return detail.encoded

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
        changes: list[tuple[str, Change]] = []
        straddling = 0
        for example in examples:
            detail = self.details(example)
            if self.too_long(detail.encoded):
                long.append((example, detail.encoded))
                continue
            straddling += detail.straddles
            if detail.change:
                changes.append((name_of(example), detail.change))
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
        self._tell(changes, len(examples))
        if not rows:
            raise DataError(f"no rows left to encode (of {len(examples)})", hint="check max_length and the filter")
        return EncodedSet(tuple(rows), self.pad_id)

    def prompt_ids(self, example: Example, *, whole: bool = False) -> list[int]:
        """Return the tokens before the final assistant turn, generation prompt included.

        Args:
            whole: keep that turn: the prompt is for another turn after it.

        Raises:
            DataError: longer than ``max_length``, or the template refuses the chat.
        """
        turns, hidden = self._turns(example)
        before = turns[:-1] if turns[-1].role == "assistant" and not whole else turns
        text = self._render(before, example, prompt=True).text
        ids = self._tokenise(text, hidden, example).ids
        if self.max_length is not None and len(ids) > self.max_length:
            raise DataError(f"{name_of(example)}: prompt of {len(ids)} tokens, more than max_length={self.max_length}")
        return ids

    def too_long(self, encoded: Encoded) -> bool:
        """Return whether a row exceeds ``max_length``."""
        return self.max_length is not None and len(encoded.input_ids) > self.max_length

    def details(self, example: Example) -> Details:
        """Encode one example whatever its length, and say how its span was found."""
        layout = self._lay_out(example)
        first, end, ids = layout.first, layout.end, layout.tokens.ids
        if layout.needs_eos:
            ids = [*ids[:end], self._eos()]
            end += 1
        labels = [token if first <= i < end else IGNORE for i, token in enumerate(ids)]
        encoded = Encoded(ids, labels)
        return Details(
            encoded, first, end, layout.split, layout.straddles, layout.needs_eos, layout.literal, layout.change
        )

    def _lay_out(self, example: Example) -> _Layout:
        """Render and tokenise a row and find its trained tokens."""
        turns, hidden = self._turns(example)
        if turns[-1].role != "assistant":
            raise DataError(f"{name_of(example)}: no final assistant turn to learn from")
        rendering = self._render(turns, example, prompt=False)
        begin, stop = self._span(turns, rendering, example)
        changed = self._change(turns, rendering.text, begin, stop, hidden, example)
        tokens = whole = self._tokenise(rendering.text, hidden, example)
        before = self._tokenise(rendering.text[:begin], hidden, example)
        text = hidden.show(rendering.text)
        start = len(hidden.show(rendering.text[:begin]))
        stop = len(hidden.show(rendering.text[:stop]))
        first, split, straddles = len(before.ids), False, False
        if whole.ids[:first] != before.ids:
            apart = before.then(self._tokenise(rendering.text[begin:], hidden, example), start)
            split = self.tokenizer.decode(apart.ids) == self.tokenizer.decode(whole.ids)
            straddles = not split
            if split:
                tokens = apart
            else:
                first = next((i for i, (_, b) in enumerate(whole.offsets) if b > start), len(whole.ids))
        end, needs_eos = end_of_turn(tokens, text, first, stop, exact=self.has_markers)
        if end <= first:
            raise DataError(f"{name_of(example)}: the template leaves nothing of the answer to train on")
        return _Layout(turns, text, tokens, first, end, needs_eos, split, straddles, hidden.literal, changed)

    def _turns(self, example: Example) -> tuple[list[Message], Hidden]:
        """Return the turns with the default system message and with control tokens in their text hidden."""
        messages = list(example.messages)
        if self.system is not None and messages[0].role != "system":
            messages.insert(0, Message("system", self.system))
        if not any(m.role == "user" for m in messages):
            raise DataError(f"{name_of(example)}: no user turn")

        def hold(hidden: Hidden) -> list[Message]:
            rest = iter(hidden.texts)
            return [tool_turns.with_texts(m, rest) for m in messages]

        hidden = self._controls.hide([text for m in messages for text in tool_turns.texts(m)])
        edges = self._controls.hide_edges(hidden)
        if edges is not None and self._written(hold(hidden), example) != self._written(hold(edges), example):
            # Beside the template's own text, or that of another turn, a part of a control token became a whole one.
            hidden = edges
        turns = hold(hidden)
        tool_turns.require_place(turns, lambda t: self._render(t, example, prompt=False).text, name_of(example))
        return turns, hidden

    def _written(self, turns: Sequence[Message], example: Example) -> list[str]:
        """Return the control tokens of a chat, asked for an answer where it ends without one."""
        prompt = turns[-1].role != "assistant"
        try:
            return self._controls.written(self._render(turns, example, prompt=prompt).text)
        except DataError:
            return []  # the row's own rendering says why

    @functools.cached_property
    def _controls(self) -> Controls:
        return Controls(self.tokenizer, self._template.frames)

    def _render(self, turns: Sequence[Message], example: Example, *, prompt: bool) -> Rendering:
        try:
            return self._template.render(turns, prompt=prompt)
        except DataError as error:
            raise DataError(f"{name_of(example)}: {error.message}", hint=error.hint) from error

    def _tokenise(self, text: str, hidden: Hidden, example: Example) -> Tokens:
        try:
            return self._controls.tokenise(text, hidden)
        except DataError as error:
            raise DataError(f"{name_of(example)}: {error.message}", hint=error.hint) from None

    def _span(self, turns: Sequence[Message], rendering: Rendering, example: Example) -> tuple[int, int]:
        """Return the characters of the final assistant turn, end-of-turn token included where that is known."""
        text = rendering.text
        if self.has_markers:
            earlier = 0
            if any(m.role == "assistant" for m in turns[:-1]):
                earlier = len(self._render(turns[:-1], example, prompt=False).spans)
            final = rendering.spans[earlier:]
            if not final:
                raise DataError(f"{name_of(example)}: the template marks no generation in the final turn")
            return final[0][0], final[-1][1]
        before = self._render(turns[:-1], example, prompt=True).text
        if text.startswith(before):
            return len(before), len(text)
        return self._answer_start(turns, text, example), len(text)

    def _change(
        self, turns: Sequence[Message], text: str, begin: int, stop: int, hidden: Hidden, example: Example
    ) -> Change | None:
        """Return what the template made of the answer; None where it stands in the trained span as it is."""
        answer, span = turns[-1].content, text[begin:stop]
        there = answer in span
        # A short answer can stand there by chance, in a word of the template's.
        if there and not (len(answer) < 16 and any(answer in frame for frame in self._template.frames)):
            return None
        try:
            other = self._template.with_other_answer(turns, text)
        except DataError:
            # It takes answers of some kind only; the last words must do.
            other = text[:begin] + text[stop:] if answer.strip()[-32:] in span else text
        start, end = changing(text, other)
        written = text[max(start, begin) : min(end, stop)]
        if text == other or start > stop or end < begin or (start < end and not written):
            raise DataError(
                f"{name_of(example)}: the chat template hides the answer, or marks something else as generated",
                hint="mark the assistant's content with {% generation %} ... {% endgeneration %}",
            )
        if there:
            return None
        if not written.strip():
            raise DataError(f"{name_of(example)}: the template leaves nothing of the answer to train on")
        return Change("blanks") if only_blanks(answer, span) else change(hidden.show(answer), hidden.show(written))

    def _answer_start(self, turns: Sequence[Message], text: str, example: Example) -> int:
        self._warn(
            "the chat template writes a finished turn differently from its generation prompt; the trained span "
            "begins at the answer's own text"
        )
        try:
            start, end = changing(text, self._template.with_other_answer(turns, text))
        except DataError:
            start = end = 0
        if start >= end:
            raise DataError(
                f"{name_of(example)}: the answer cannot be located in the rendered chat",
                hint="mark the assistant's content with {% generation %} ... {% endgeneration %} in the template",
            )
        return start

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
            f"{name_of(example)}: {len(encoded.input_ids)} tokens, more than max_length={self.max_length}{others}",
            hint="`casehard data audit --fitting FILE` writes the rows that fit; or raise max_length where the model's "
            "context is longer; rows are never cut",
        )

    def _tell(self, changes: Sequence[tuple[str, Change]], total: int) -> None:
        if changes:
            self._told = True
            self._warn(
                f"the chat template changes the answer in {len(changes)} of {total} rows, and what it writes is "
                f"trained: {described(changes)}"
            )

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)
            warnings.warn(text, stacklevel=3)
