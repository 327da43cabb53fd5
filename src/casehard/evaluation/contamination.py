"""Whether something that is to be measured was trained on the prompts it would be measured with."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from casehard.data.mix import has_mark, is_marked
from casehard.errors import DataError
from casehard.evaluation.suite import Suite


def require_unseen(suite: Suite, known: Collection[str], what: Path | str) -> None:
    """Check that no prompt of ``suite`` is among the marks ``known``.

    Marks of the first form know no signs: to them ``5 - 3`` is ``5 + 3``. Rather than miss what was trained, a prompt
    that is no more than alike is refused as well, and the hint says so.

    Raises:
        DataError: ``what`` was trained on prompts of the suite; names the first.
    """
    seen = [(example, example.id or f"row {i + 1}") for i, example in enumerate(suite.examples)]
    seen = [(example, name) for example, name in seen if is_marked(example, known)]
    if seen:
        hint = "a score on them would measure memory: evaluate on prompts that no training row contains"
        if not any(has_mark(example, known) for example, _ in seen):
            hint += "; its record is of an earlier version, to which prompts that differ in signs alone (5 + 3, 5 - 3) "
            hint += "are the same: where they are not, train it again"
        raise DataError(
            f"{what} was trained on {len(seen)} of the {len(suite.examples)} prompts of suite {suite.name!r}, "
            f"first {seen[0][1]}",
            hint=hint,
        )
