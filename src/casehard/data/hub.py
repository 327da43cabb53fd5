"""Data sets from the Hugging Face Hub; the only file that imports ``datasets``. No loading script is ever run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from casehard.errors import DataError, MissingExtra
from casehard.io import hub

_SPEC = re.compile(r"hub:(?P<name>\w[\w.-]*/\w[\w.-]*)(?:/(?P<config>\w[\w.-]*))?:(?P<split>[\w.-]+(?:\[[\d:%]*\])?)")

_HINT = "check the name and the network, or download the rows and pass a .jsonl or .parquet file"


def rows(spec: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of ``hub:org/name[/config]:split`` as plain dicts.

    Raises:
        DataError: the spec is malformed, or the data set cannot be fetched.
        MissingExtra: ``datasets`` is not installed.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise DataError(f"{spec!r} is not of the form hub:org/name:split", hint="example: hub:org/name:train[:500]")
    try:
        from datasets import load_dataset
    except ImportError:
        raise MissingExtra("datasets", "data", purpose="reading Hub data sets") from None
    try:
        with hub.answers():
            table = load_dataset(match["name"], match["config"], split=match["split"])
        yield from table
    except hub.Silence:
        raise DataError(f"{spec}: the Hub does not answer", hint=_HINT) from None
    except Exception as error:  # the Hub client and its decoders of pictures and sounds raise many unrelated types
        raise DataError(
            f"{spec}: cannot be fetched ({type(error).__name__}: {str(error)[:200]})",
            hint=_HINT,
        ) from None
