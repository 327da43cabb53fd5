"""Rows as a caller gives them: a source, several, or examples."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from casehard.data import sources
from casehard.data.formats import parse_row
from casehard.data.layouts import Reader
from casehard.errors import DataError, Note
from casehard.types import Example

Data = str | Path | Example | Mapping[str, Any] | Sequence[str | Path | Example | Mapping[str, Any]]
"""Rows: a source (a file, or ``hub:...``), an example, a row as a file has it, or several of them; see
``casehard.data.sources``."""
_ONE = (str, Path, Example, Mapping)


def _items(data: Data) -> list[Any]:
    """Return what was given as a list.

    Raises:
        DataError: something that cannot hold rows.
    """
    if isinstance(data, _ONE):
        return [data]
    if isinstance(data, bytes) or not isinstance(data, Iterable):
        raise DataError(f"rows are given as {type(data).__name__}", hint=_FORMS)
    return list(data)


_FORMS = 'a file, or a list of {"prompt": ..., "response": ...} or casehard.Example.pair(prompt, response)'


def rows(data: Data, *, require_response: bool = False) -> list[Example]:
    """Read rows from files and other sources; examples pass as they are.

    Args:
        data: what to read.
        require_response: refuse rows without a final assistant turn, from which nothing can be learnt.

    Raises:
        DataError: no such file, or a row that cannot be read; names file and line, or the row's place, never its text.
    """
    out: list[Example] = []
    reader = Reader("the rows", {})
    for place, item in enumerate(_items(data), start=1):
        if isinstance(item, Example):
            out.append(item)
        elif isinstance(item, Mapping):
            where = f"row {place}"
            out.append(parse_row(reader.read(item, where), where, require_response=require_response))
        elif isinstance(item, str | Path):
            out += sources.load(str(item), require_response=require_response)
        else:
            raise DataError(f"row {place} is a {type(item).__name__}", hint=_FORMS)
    if line := reader.line:
        warnings.warn(line, Note, stacklevel=2)
    return out


def by_role(given: Mapping[str, Data | None]) -> dict[str, list[Example]]:
    """Return the rows of each data role that there are some of; rows to learn from, each with an answer."""
    read = {role: rows(data, require_response=True) for role, data in given.items() if data is not None}
    return {role: found for role, found in read.items() if found}


def named(data: Data) -> list[str]:
    """Return the names of the sources that rows come from; none where some of them are rows themselves."""
    items = _items(data)
    return [str(item) for item in items] if all(isinstance(item, str | Path) for item in items) else []
