"""Whether something that is to be measured was trained on the prompts it would be measured with."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from casehard.data.mix import mark
from casehard.errors import DataError
from casehard.evaluate.suite import Suite
from casehard.model.provenance import read_provenance
from casehard.stored import read

KEY = "trained_prompts"
RECORDS = ("job.json", "assets.json")
"""Where adapters and provider assets say what they were trained on; checkpoints do in ``casehard.json``."""


@dataclass(frozen=True)
class _Record:
    trained_prompts: list[str] = field(default_factory=list)


def trained_prompts(*folders: Path | str) -> set[str]:
    """Return the marks of the prompts that these folders are known to have been trained on; nothing where none tells.

    Args:
        folders: checkpoints, adapters of a customer's job, provider assets or the adapters inside them.
    """
    found: set[str] = set()
    for folder in map(Path, folders):
        found.update(read_provenance(folder).get("provenance", {}).get(KEY, ()))
        for file in (folder / name for name in RECORDS):
            found.update(read(file, _Record).get(KEY, ()) if file.is_file() else ())
    return found


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
