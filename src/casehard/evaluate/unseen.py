"""Whether something that is to be measured was trained on the prompts it would be measured with."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from casehard.data.mix import mark
from casehard.errors import DataError
from casehard.evaluate.suite import Suite


def require_unseen(suite: Suite, known: Collection[str], what: Path | str) -> None:
    """Check that no prompt of ``suite`` is among the marks ``known``.

    Raises:
        DataError: ``what`` was trained on prompts of the suite; names the first.
    """
    seen = [example.id or f"row {i + 1}" for i, example in enumerate(suite.examples) if mark(example) in known]
    if seen:
        raise DataError(
            f"{what} was trained on {len(seen)} of the {len(suite.examples)} prompts of suite {suite.name!r}, "
            f"first {seen[0]}",
            hint="a score on them would measure memory: evaluate on prompts that no training row contains",
        )
