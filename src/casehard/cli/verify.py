"""``casehard verify DIR``: check every manifest below a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from casehard.cli import console
from casehard.errors import ConfigError, Corrupt


def verify(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to check.")]) -> None:
    """Check every file against its manifest.

    All manifests in DIR and below are used; the exit code is 6 when a file differs, is missing or was added.
    """
    from casehard.io import manifest

    if not folder.is_dir():
        raise ConfigError(f"no such folder: {folder}", hint="give a model, checkpoint or run folder")
    places = sorted(p.parent for p in folder.rglob(manifest.MANIFEST))
    if not places:
        raise Corrupt(f"{folder}: no {manifest.MANIFEST} here or below", hint="only complete folders have one")
    console.plan("check files against their manifests", {"folder": folder, "manifests": len(places)})
    rows: list[tuple[str, str, str]] = []
    found: list[Corrupt] = []
    for place in places:
        try:
            manifest.verify(place)
            rows.append((console.shown(place), f"{len(manifest.read_manifest(place)):,}", "ok"))
        except Corrupt as error:
            found.append(error)
            rows.append((console.shown(place), "-", "CORRUPT"))
    console.table("verified", ["folder", "files", "state"], rows)
    if found:
        message = "\n".join(error.message for error in found)
        raise Corrupt(message, hint=found[0].hint)
    console.made("complete and unchanged", folder)
