"""Show what is really trained: the exact token span of each row, and counts over all rows."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from casehard.data.answers import described
from casehard.data.chat import ChatFormat, Details, name_of
from casehard.errors import DataError, UserError, visible
from casehard.types import Example

OPEN, CLOSE = ">>>", "<<<"


class _Row(NamedTuple):
    example: Example
    detail: Details | None
    differs: bool = False
    problem: str = ""


def printable(text: str) -> str:
    """Return ``text`` with control characters spelled out, so that a row cannot drive the reader's terminal."""
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _look(example: Example, chat: ChatFormat) -> _Row:
    try:
        detail = chat.details(example)
        prompt = chat.prompt_ids(example) if not chat.too_long(detail.encoded) else None
    except DataError as error:
        return _Row(example, None, problem=error.message)
    return _Row(example, detail, prompt is not None and prompt != detail.encoded.input_ids[: detail.start])


def fitting(examples: Sequence[Example], chat: ChatFormat) -> list[Example]:
    """Return the examples that training takes: whole spans, no longer than the limit, in their order."""
    looks = ((example, _look(example, chat).detail) for example in examples)
    return [example for example, detail in looks if detail is not None and not chat.too_long(detail.encoded)]


def _show(number: int, row: _Row, chat: ChatFormat) -> str:
    title = f"row {number}" + (f" (id {visible(row.example.id)})" if row.example.id else "")
    if row.detail is None:
        return f"{title}: NOT TRAINABLE: {visible(row.problem)}"
    ids, start, end = row.detail.encoded.input_ids, row.detail.start, row.detail.end
    before, trained, after = (
        printable(chat.tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for part in (ids[:start], ids[start:end], ids[end:])
    )
    body = f"{before}{OPEN}{trained}{CLOSE}{after}".replace("\n", "\n    ")
    mark = "; LONGER THAN max_length" if chat.too_long(row.detail.encoded) else ""
    return f"{title}: {len(ids)} tokens, trained {start}..{end - 1} ({end - start}){mark}\n    {body}"


def _spread(what: str, values: Sequence[int]) -> str:
    ordered = sorted(values)
    high = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    middle = statistics.median(ordered)
    return f"{what}: min {ordered[0]}, median {middle:g}, 95 % {high}, max {ordered[-1]}, sum {sum(ordered)}"


def _stops(chat: ChatFormat) -> str:
    try:
        return _named(chat.stop_ids, chat)
    except UserError as error:
        return f"not known: {printable(error.message)}"


def _named(ids: Iterable[int], chat: ChatFormat) -> str:
    return ", ".join(f"{printable(chat.tokenizer.convert_ids_to_tokens(i))} ({i})" for i in sorted(ids)[:5])


def audit(examples: Sequence[Example], chat: ChatFormat, n: int = 3) -> str:
    """Describe how ``examples`` are trained on, as plain text.

    Args:
        examples: rows; those that cannot be trained on are counted and named, not raised.
        chat: the format they are trained in.
        n: rows to print in full, trained tokens between ``>>>`` and ``<<<``.

    Raises:
        DataError: no examples.
    """
    if not examples:
        raise DataError("no rows to audit")
    rows = [_look(example, chat) for example in examples]
    good = [row.detail for row in rows if row.detail is not None]
    bad = [(number, row) for number, row in enumerate(rows, start=1) if row.detail is None]
    changed = [(name_of(row.example), row.detail.change) for row in rows if row.detail and row.detail.change]
    lines = [_show(number, row, chat) for number, row in enumerate(rows[:n], start=1)]
    lines.append(f"rows: {len(rows)}")
    if good:
        lines.append(_spread("tokens per row", [len(d.encoded.input_ids) for d in good]))
        lines.append(_spread("trained tokens per row", [d.end - d.start for d in good]))
        lines.append(f"last trained token: {_named({d.encoded.input_ids[d.end - 1] for d in good}, chat)}")
        lines.append(f"generation stops at: {_stops(chat)}")
    how = "generation markers" if chat.has_markers else "prompt prefix"
    lines += [
        f"spans found by: {how}" + (" of the built-in fallback template" if chat.uses_fallback else ""),
        f"rows without trained tokens: {len(bad)}"
        + (f" (first: row {bad[0][0]}: {visible(bad[0][1].problem)})" if bad else ""),
        f"rows longer than max_length ({chat.max_length}): {sum(chat.too_long(d.encoded) for d in good)}; truncated: 0",
        f"rows whose answer the template changes: {len(changed)}"
        + (f" ({visible(described(changed))})" if changed else ""),
        f"rows with EOS appended by us: {sum(d.appended_eos for d in good)}",
        f"rows with prompt and answer tokenised apart: {sum(d.split for d in good)}; "
        f"with a token across both: {sum(d.straddles for d in good)}",
        f"rows trained after another prompt than generation starts from: {sum(row.differs for row in rows)}",
        f"rows that spell out control tokens (kept as text): {sum(d.literal_controls > 0 for d in good)}",
    ]
    lines += [f"warning: {visible(text)}" for text in chat.warnings]
    return "\n".join(lines) + "\n"
