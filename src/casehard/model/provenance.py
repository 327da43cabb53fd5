"""What a checkpoint says about itself: ``casehard.json``, and whether it belongs to the weights beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from casehard.errors import Corrupt
from casehard.io.files import read_json

PROVENANCE = "casehard.json"
SERVED = "serving_system"
"""Key under which a checkpoint records the system message that is its defence (PTST)."""


KEY = "trained_prompts"
RECORDS = ("job.json", "assets.json")
"""Where adapters and provider assets say what they were trained on; checkpoints do in ``casehard.json``."""


def read_provenance(path: str | Path) -> dict[str, Any]:
    """Return what ``model.save.save`` recorded in ``casehard.json``; empty for a folder of other origin.

    Raises:
        Corrupt: the file is not what ``save`` writes.
    """
    file = Path(path) / PROVENANCE
    if not file.is_file():
        return {}
    record = read_json(file)
    texts = ("digest", "parent", "method")
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in texts):
        raise Corrupt(f"{file}: digest, parent or method is missing")
    return record


def trained_prompts(*folders: Path | str) -> set[str]:
    """Return the marks of the prompts that these folders are known to have been trained on; nothing where none tells.

    Args:
        folders: checkpoints, adapters of a customer's job, provider assets or the adapters inside them.
    """
    found: set[str] = set()
    for folder in map(Path, folders):
        found.update(read_provenance(folder).get("provenance", {}).get(KEY, ()))
        for file in (folder / name for name in RECORDS):
            record: Any = read_json(file) if file.is_file() else {}
            found.update(record.get(KEY, ()) if isinstance(record, dict) else ())
    return found


def served_with(model: str | Path) -> str:
    """Return the system message without which a checkpoint is not the defence it was made as; empty for none."""
    return str(read_provenance(model).get("provenance", {}).get(SERVED, ""))


def require_same_content(folder: Path, digest: str) -> None:
    """Check that the content digest of a folder is the one its provenance records.

    Raises:
        Corrupt: names both digests.
    """
    record = read_provenance(folder)
    if record and record["digest"] != digest:
        raise Corrupt(
            f"{folder}: {PROVENANCE} records the content digest {record['digest']}, actual {digest}",
            hint="weights or provenance were exchanged",
        )
