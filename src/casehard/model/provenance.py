"""What a checkpoint says about itself: ``casehard.json``, and whether it belongs to the weights beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from casehard.errors import Corrupt
from casehard.io.stored import read

PROVENANCE = "casehard.json"
SERVED = "serving_system"
"""Key under which a checkpoint records the system message that is its defence (PTST)."""


ATTACKED = "attacked"
"""Key under which a checkpoint that descends from attacked weights records what was done to it up to then, by name."""
KEY = "trained_prompts"
RECORDS = ("job.json", "assets.json")
"""Where adapters and provider assets say what they were trained on; checkpoints do in ``casehard.json``."""


@dataclass(frozen=True)
class _Made:
    """What is read of how a checkpoint was made."""

    trained_prompts: list[str] = field(default_factory=list)
    serving_system: str | None = None
    attacked: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Known:
    """What is read of the record of an adapter or of assets."""

    trained_prompts: list[str] = field(default_factory=list)
    serving_system: str | None = None


@dataclass(frozen=True)
class _Checkpoint:
    """What is read of ``casehard.json``."""

    digest: str
    parent: str
    method: str
    provenance: _Made = field(default_factory=_Made)


def read_provenance(path: str | Path) -> dict[str, Any]:
    """Return what ``model.save.save`` recorded in ``casehard.json``; empty for a folder of other origin.

    Raises:
        Corrupt: the file is not what ``save`` writes.
    """
    file = Path(path) / PROVENANCE
    if not file.is_file():
        return {}
    return read(file, _Checkpoint)


def trained_prompts(*folders: Path | str) -> set[str]:
    """Return the marks of the prompts that these folders are known to have been trained on; nothing where none tells.

    Args:
        folders: checkpoints, adapters of a customer's job, provider assets or the adapters inside them.
    """
    found: set[str] = set()
    for folder in map(Path, folders):
        found.update(read_provenance(folder).get("provenance", {}).get(KEY, ()))
        for file in (folder / name for name in RECORDS):
            found.update(read(file, _Known).get(KEY, ()) if file.is_file() else ())
    return found


def served_with(model: str | Path) -> str:
    """Return the system message without which a checkpoint, or an adapter, is not the defence it was made as."""
    known = [read(file, _Known) for name in RECORDS if (file := Path(model) / name).is_file()]
    found = [made.get(SERVED) for made in (read_provenance(model).get("provenance", {}), *known)]
    return next((str(said) for said in found if said), "")


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
