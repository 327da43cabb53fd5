"""Tokenise a rendered chat so that control tokens come from the template only, never from the text of a row.

Tokenizers cut a text at every control token (``<|im_end|>``, ``</s>``) they find, whoever wrote it. A row that spells
one out could thus end its own turn or open another. Such a spelling is replaced by one stand-in character before the
template is rendered; the rendering is then cut at the control tokens that remain, which are the template's, and each
stretch between them, stand-ins turned back, is tokenised as plain text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from casehard.errors import DataError

# Private-use planes: no template and hardly any text gives these characters a meaning.
_BASES = (0xF0000, 0xF8000, 0x100000, 0x108000)


class Hidden(NamedTuple):
    """Texts with spelled-out control tokens replaced by stand-ins; ``base`` is 0 when there were none."""

    texts: list[str]
    base: int
    literal: int


class Tokens(NamedTuple):
    """Token ids of a text, the character span of each, and the positions of the template's control tokens."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    control: list[int]

    def then(self, other: Tokens, at: int) -> Tokens:
        """Append ``other``, the tokens of the text that begins at character ``at``."""
        moved = [(a + at, b + at) for a, b in other.offsets]
        return Tokens(
            self.ids + other.ids,
            self.offsets + moved,
            self.control + [i + len(self.ids) for i in other.control],
        )


class Controls:
    """The control tokens of a fast tokenizer, and tokenisation that respects where they came from."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        special = {t.content: (i, t) for i, t in tokenizer.added_tokens_decoder.items() if t.special and t.content}
        self._names = sorted(special, key=lambda name: (-len(name), name))
        self._token = special
        self._find = re.compile("|".join(map(re.escape, self._names))) if special else None
        ids = {i for i, _ in special.values()}
        # An unknown word gives the unk token without anybody having written it.
        if tokenizer.unk_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id):
            ids.discard(tokenizer.unk_token_id)
        self._ids = ids

    def hide(self, texts: Sequence[str]) -> Hidden:
        """Replace every spelled-out control token by a stand-in character."""
        count = sum(len(self._find.findall(text)) for text in texts) if self._find else 0
        if self._find is None or not count:
            return Hidden(list(texts), 0, 0)
        whole = "".join(texts)
        for base in _BASES:
            if not any(base <= ord(c) < base + len(self._names) for c in whole):
                number = {name: chr(base + i) for i, name in enumerate(self._names)}
                hidden = [self._find.sub(lambda m: number[m.group()], text) for text in texts]  # noqa: B023
                return Hidden(hidden, base, count)
        raise DataError("text with control tokens and with characters of every private-use plane cannot be tokenised")

    def show(self, text: str, base: int) -> str:
        """Turn stand-ins back into what they stand for."""
        if not base:
            return text
        return text.translate({base + i: name for i, name in enumerate(self._names)})

    def tokenise(self, text: str, base: int) -> Tokens:
        """Tokenise a rendering.

        Args:
            text: the rendering, with stand-ins if ``base`` is not 0.
            base: as returned by :meth:`hide`.

        Returns:
            Ids with character spans into the shown text.

        Raises:
            DataError: this tokenizer cannot keep the spelled-out control tokens as text.
        """
        if not base:
            plain = self._whole(text)
            if len(plain.control) == (len(self._find.findall(text)) if self._find else 0):
                return plain
            return self._pieces(text, 0)
        bare = "".join(c for c in text if not base <= ord(c) < base + len(self._names))
        if self._pieces(bare, 0).ids != self._whole(bare).ids:
            raise DataError(
                "the text spells out a control token, and this tokenizer cannot tokenise around it",
                hint="remove the row, or the control token from its text",
            )
        return self._pieces(text, base)

    def _call(self, text: str, *, literal: bool) -> Tokens:
        out = self._tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            split_special_tokens=literal,
            verbose=False,
        )
        ids = list(out["input_ids"])
        control = [] if literal else [i for i, token in enumerate(ids) if token in self._ids]
        return Tokens(ids, [tuple(pair) for pair in out["offset_mapping"]], control)

    def _whole(self, text: str) -> Tokens:
        return self._call(text, literal=False)

    def _pieces(self, text: str, base: int) -> Tokens:
        """Cut at the control tokens of ``text`` and tokenise what lies between as plain text."""
        out = Tokens([], [], [])
        at = shift = 0
        eat_left = False
        for match in [*(self._find.finditer(text) if self._find else ()), None]:
            stretch = text[at : match.start()] if match else text[at:]
            shown = self.show(stretch, base)
            token = self._token[match.group()][1] if match else None
            piece = shown.lstrip() if eat_left else shown
            lead = len(shown) - len(piece)
            piece = piece.rstrip() if token is not None and token.lstrip else piece
            if piece:
                begin = at + shift + lead
                part = self._call(piece, literal=True)
                out.ids.extend(part.ids)
                out.offsets.extend((a + begin, b + begin) for a, b in part.offsets)
            shift += len(shown) - len(stretch)
            if match and token is not None:
                if self._token[match.group()][0] in self._ids:
                    out.control.append(len(out.ids))
                out.ids.append(self._token[match.group()][0])
                out.offsets.append((match.start() + shift, match.end() + shift))
                at, eat_left = match.end(), token.rstrip
        return out
