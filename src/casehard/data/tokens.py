"""Tokenise a rendered chat so that control tokens come from the template only, never from the text of a row.

A control token is an added token that is flagged as special or that the template writes by itself. Tokenizers cut a
text at every one they find (``<|im_end|>``, ``</s>``), whoever wrote it, so a row that spells one out could end its own
turn or open another. Such a spelling is replaced by one stand-in character before the template is rendered; the
rendering is then cut at the control tokens that remain, which are the template's, and each stretch between them,
stand-ins turned back, is tokenised as plain text by a twin of the tokenizer that knows no control tokens.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from casehard.errors import DataError, is_panic

# Private-use planes: no template and hardly any text gives these characters a meaning.
_BASES = (0xF0000, 0xF8000, 0x100000, 0x108000)
# What the tokenizers library calls white space, which is not what str.strip() does.
_BLANKS = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


@contextlib.contextmanager
def _no_panic() -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if not is_panic(error):
            raise
        hint = "a pattern in tokenizer.json takes too long on this text, or is wrong"
        raise DataError(f"the tokenizer gives up: {error}", hint=hint) from None


class Hidden(NamedTuple):
    """Texts in which stand-ins, characters from ``base`` on, replace ``pieces``; ``base`` is 0 when there are none."""

    texts: list[str]
    base: int = 0
    pieces: tuple[str, ...] = ()
    literal: int = 0
    """Control tokens that the texts spell out."""

    def show(self, text: str) -> str:
        """Turn stand-ins back into what they stand for."""
        if not self.base:
            return text
        return text.translate({self.base + i: piece for i, piece in enumerate(self.pieces)})

    def bare(self, text: str) -> str:
        """Leave out the stand-ins."""
        return text.translate({self.base + i: None for i in range(len(self.pieces))})


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


def _finder(names: Iterable[str]) -> re.Pattern[str]:
    """Return what finds the names, the longest first; without names, what finds nothing."""
    ordered = sorted(names, key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


class Controls:
    """The control tokens of a fast tokenizer, and tokenisation that respects where they came from.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        written: what its template writes around texts that hold nothing.
    """

    def __init__(self, tokenizer: Any, written: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        added = {t.content: (i, t) for i, t in tokenizer.added_tokens_decoder.items() if t.content}
        finder = _finder(added)
        emitted = {name for text in written for name in finder.findall(text)}
        self._token = {name: (i, t) for name, (i, t) in added.items() if t.special or name in emitted}
        self._ordinary = {name: pair for name, pair in added.items() if name not in self._token}
        self._find = _finder(self._token)
        ids = {i for i, _ in self._token.values()}
        # An unknown word gives the unk token without anybody having written it.
        no_unk = getattr(tokenizer.backend_tokenizer.model, "unk_token", "") is None
        if not no_unk and tokenizer.unk_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id):
            ids.discard(tokenizer.unk_token_id)
        self._ids = ids

    # -- hiding --------------------------------------------------------------------------------------------

    def hide(self, texts: Sequence[str]) -> Hidden:
        """Replace every spelled-out control token by a stand-in character."""
        found = [name for text in texts for name in self._find.findall(text)]
        if not found:
            return Hidden(list(texts))
        base, number = self._stand_ins(texts, found)
        hidden = [self._find.sub(lambda m: chr(base + number[m.group()]), text) for text in texts]
        return Hidden(hidden, base, tuple(number), len(found))

    def hide_edges(self, hidden: Hidden) -> Hidden | None:
        """Replace what might become a control token beside the template's text, or beside another turn.

        That is the start of a name at the end of a text, the end of one at its start, and a text that is part of one.
        Returns None if there is nothing of the kind.
        """
        pieces = [self._edges(text.strip()) for text in hidden.texts]
        if not any(map(any, pieces)):
            return None
        shown = [hidden.show(text) for text in hidden.texts]
        known = [*hidden.pieces, *(piece for edges in pieces for piece in edges if piece)]
        base, number = self._stand_ins(shown, known)
        texts = []
        for text, (first, last) in zip(hidden.texts, pieces, strict=True):
            core = text.strip()
            before, after = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
            middle = core[len(first) : len(core) - len(last)]
            middle = middle.translate({hidden.base + i: base + number[p] for i, p in enumerate(hidden.pieces)})
            texts.append(
                before + "".join(chr(base + number[p]) for p in (first,) if p) + middle
                + "".join(chr(base + number[p]) for p in (last,) if p) + after
            )  # fmt: skip
        return Hidden(texts, base, tuple(number), hidden.literal)

    def _edges(self, core: str) -> tuple[str, str]:
        """Return what to hide at the start and at the end of a text without blanks around it."""
        longest = self._longest
        if len(core) < longest and any(core in name for name in self._token):
            return core, ""
        first = next((core[:k] for k in range(min(longest, len(core)), 0, -1) if core[:k] in self._tails), "")
        rest = len(core) - len(first)
        last = next((core[-k:] for k in range(min(longest, rest), 0, -1) if core[-k:] in self._heads), "")
        return first, last

    @functools.cached_property
    def _longest(self) -> int:
        return max(map(len, self._token), default=0)

    @functools.cached_property
    def _heads(self) -> frozenset[str]:
        return frozenset(name[:k] for name in self._token for k in range(1, len(name)))

    @functools.cached_property
    def _tails(self) -> frozenset[str]:
        return frozenset(name[k:] for name in self._token for k in range(1, len(name)))

    def _stand_ins(self, texts: Sequence[str], pieces: Sequence[str]) -> tuple[int, dict[str, int]]:
        """Return the first stand-in character, and the number of each piece."""
        number = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
        whole = set("".join(texts))
        for base in _BASES:
            if not any(base <= ord(c) < base + len(number) for c in whole):
                return base, number
        raise DataError("text with control tokens and with characters of every private-use plane cannot be tokenised")

    def written(self, text: str) -> list[str]:
        """Return the control tokens that a rendering holds, in order."""
        return self._find.findall(text)

    # -- tokenising ----------------------------------------------------------------------------------------

    def tokenise(self, text: str, hidden: Hidden) -> Tokens:
        """Tokenise a rendering.

        Args:
            text: the rendering, with stand-ins.
            hidden: what they stand for.

        Returns:
            Ids with character spans into the shown text.

        Raises:
            DataError: this tokenizer cannot keep the spelled-out control tokens as text, or the text is no Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"the rendered chat holds half a character, {text[error.start]!a}") from None
        if not hidden.base:
            whole = self._whole(text)
            if self._as_written(whole, text):
                return whole
            # Something that reads otherwise became a control token (case, full width), or one was not taken for one.
            alike = self._can_be_cut
        else:
            bare = hidden.bare(text)
            alike = self._pieces(bare, Hidden([])).ids == self._whole(bare).ids or self._can_be_cut
        out = self._pieces(text, hidden) if alike else None
        # Some vocabularies hold a control token as a word of its own.
        if out is None or sum(i in self._ids for i in out.ids) != len(out.control):
            raise DataError(
                "the text spells out a control token, and this tokenizer cannot tokenise around it",
                hint="remove the row, or the control token from its text",
            )
        return out

    def _as_written(self, tokens: Tokens, text: str) -> bool:
        """Return whether the control tokens among ``tokens`` are those that stand in ``text``, each in its place."""
        there = [m for m in self._find.finditer(text) if self._token[m.group()][0] in self._ids]
        return len(there) == len(tokens.control) and all(
            tokens.ids[i] == self._token[m.group()][0]
            and tokens.offsets[i][0] <= m.start()
            and m.end() <= tokens.offsets[i][1]
            for i, m in zip(tokens.control, there, strict=True)
        )

    @functools.cached_property
    def _can_be_cut(self) -> bool:
        """Whether a text cut at control tokens gives the tokens of the whole; not where its very start is marked."""
        for name, (_, token) in self._token.items():
            if not (token.lstrip or token.rstrip or token.single_word):
                text = f"a b{name}c d{name} e{name}\nf {name}"
                return self._pieces(text, Hidden([])).ids == self._whole(text).ids
        return False

    @_no_panic()
    def _whole(self, text: str) -> Tokens:
        # What the tokenizer's own call comes to, without what makes it twice as slow.
        own = self._tokenizer.backend_tokenizer
        if own.truncation is not None:
            own.no_truncation()
        if own.padding is not None:
            own.no_padding()
        own.encode_special_tokens = False
        out = own.encode(text, add_special_tokens=False)
        ids = out.ids
        return Tokens(ids, out.offsets, [i for i, token in enumerate(ids) if token in self._ids])

    @functools.cached_property
    def _plain(self) -> tuple[Any, dict[int, int]]:
        """The tokenizer's twin without control tokens, and the ids by which it calls ordinary added tokens."""
        from tokenizers import Tokenizer

        own = self._tokenizer.backend_tokenizer
        twin = Tokenizer(own.model)
        for part in ("normalizer", "pre_tokenizer", "post_processor"):
            if getattr(own, part) is not None:
                setattr(twin, part, getattr(own, part))
        twin.add_tokens([token for _, token in self._ordinary.values()])
        pairs = [(twin.token_to_id(name), old) for name, (old, _) in self._ordinary.items()]
        return twin, {new: old for new, old in pairs if new is not None and new != old}

    @_no_panic()
    def _pieces(self, text: str, hidden: Hidden) -> Tokens:
        """Cut at the control tokens of ``text`` and tokenise what lies between as plain text."""
        twin, names = self._plain
        out = Tokens([], [], [])
        at = shift = 0
        eat_left = False
        for match in [*self._find.finditer(text), None]:
            stretch = text[at : match.start()] if match else text[at:]
            shown = hidden.show(stretch)
            token = self._token[match.group()][1] if match else None
            piece = shown.lstrip(_BLANKS) if eat_left else shown
            lead = len(shown) - len(piece)
            piece = piece.rstrip(_BLANKS) if token is not None and token.lstrip else piece
            if piece:
                begin = at + shift + lead
                part = twin.encode(piece, add_special_tokens=False)
                out.ids.extend(names.get(i, i) for i in part.ids)
                out.offsets.extend((a + begin, b + begin) for a, b in part.offsets)
            shift += len(shown) - len(stretch)
            if match and token is not None:
                if self._token[match.group()][0] in self._ids:
                    out.control.append(len(out.ids))
                out.ids.append(self._token[match.group()][0])
                out.offsets.append((match.start() + shift, match.end() + shift))
                at, eat_left = match.end(), token.rstrip
        return out
