"""Rows as a caller gives them: a source, several, or examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from casehard.data import sources
from casehard.types import Example

Data = str | Path | Example | Sequence[str | Path | Example]
"""Rows: a source (a file, or ``hub:...``), several, or examples; see ``casehard.data.sources``."""


def rows(data: Data, *, require_response: bool = False) -> list[Example]:
    """Read rows from files and other sources; examples pass as they are.

    Args:
        data: what to read.
        require_response: refuse rows without a final assistant turn, from which nothing can be learnt.

    Raises:
        DataError: no such file, or a row that cannot be read; names file and line.
    """
    items = [data] if isinstance(data, str | Path | Example) else list(data)
    out: list[Example] = []
    for item in items:
        known = isinstance(item, Example)
        out += [item] if known else sources.load(str(item), require_response=require_response)  # type: ignore[list-item]
    return out


def by_role(given: Mapping[str, Data | None]) -> dict[str, list[Example]]:
    """Return the rows of each data role that there are some of; rows to learn from, each with an answer."""
    read = {role: rows(data, require_response=True) for role, data in given.items() if data is not None}
    return {role: found for role, found in read.items() if found}


def named(data: Data) -> list[str]:
    """Return the names of the sources that rows come from; none where some of them are examples."""
    items = [data] if isinstance(data, str | Path | Example) else list(data)
    return [] if any(isinstance(item, Example) for item in items) else [str(item) for item in items]
