"""``casehard verify DIR``: check every manifest and every run record below a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from casehard.cli import console
from casehard.errors import ConfigError, Corrupt

RUN = "run.json"
Found = tuple[str, str, str]
"""Folder, files checked, state."""


def verify(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to check.")]) -> None:
    """Check every file against its manifest, and results against the record of the run that wrote them.

    All manifests (models, checkpoints) and all run.json (runs) in DIR and below are used; the exit code is 6 when a
    file differs, is missing or was added. Files that no record names are told. Records say what was written, not by
    whom: who can rewrite them as well is not found out.
    """
    from casehard.io import manifest

    if not folder.is_dir():
        raise ConfigError(f"no such folder: {folder}", hint="give a model, checkpoint or run folder")
    places = sorted(p.parent for p in folder.rglob(manifest.MANIFEST))
    # A manifest covers all that lies below it.
    runs = sorted(p.parent for p in folder.rglob(RUN) if not any(p.is_relative_to(place) for place in places))
    if not places and not runs:
        raise Corrupt(f"{folder}: no {manifest.MANIFEST} or {RUN} here or below", hint="only complete folders have one")
    given = {"folder": folder, "manifests": len(places), "runs": len(runs)}
    console.plan("check files against their manifests and run records", given)
    rows: list[Found] = []
    found: list[Corrupt] = []
    for check, some in ((_whole, places), (_results, runs)):
        for place in some:
            try:
                rows.append((console.shown(place), *check(place)))
            except Corrupt as error:
                found.append(error)
                rows.append((console.shown(place), "-", "CORRUPT"))
    console.table("verified", ["folder", "files", "state"], rows)
    if found:
        message = "\n".join(error.message for error in found)
        raise Corrupt(message, hint=found[0].hint)
    _tell(folder, places, runs)
    ended = all(state in ("ok", "unchanged") for _, _, state in rows)
    console.made("complete and unchanged" if ended else "unchanged as far as there are records", folder)


def _whole(place: Path) -> tuple[str, str]:
    """Return how many files a manifest vouches for, and the state of the folder."""
    from casehard.io import manifest

    manifest.verify(place)
    return f"{len(manifest.read_manifest(place)):,}", "ok"


def _results(place: Path) -> tuple[str, str]:
    """Return how many results the record of a run vouches for, and how the run ended."""
    from casehard.benchmark.store import read_finished, read_run, unchanged

    run = read_run(place)
    if (status := run.get("status")) == "ok" and "config" in run:
        run = read_finished(place)
    files = _named(place, run)
    for name in files:
        unchanged(place, run, name)
    state = "unchanged" if files else "no digests"
    return f"{len(files):,}", state if status == "ok" else f"run {status or 'not ended'}"


def _named(place: Path, run: dict[str, object]) -> list[str]:
    """Return the names of the files whose digests a run recorded."""
    files = run.get("files", {})
    # What a name leads out of the folder to is no result of the run.
    if not isinstance(files, dict) or any(Path(name).name != name for name in files):
        raise Corrupt(f"{place / RUN}: files: no names of files in this folder", hint="take another copy of it")
    return list(files)


def _tell(folder: Path, places: list[Path], runs: list[Path]) -> None:
    """Say how many files nothing vouches for; a report is made from the others again at any time."""
    from casehard.benchmark.store import read_run

    known = {place / name for place in runs for name in (RUN, *_named(place, read_run(place)))}
    loose = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path not in known and not any(path.is_relative_to(place) for place in places)
    ]
    if loose:
        first = ", ".join(str(path.relative_to(folder)) for path in loose[:3])
        console.note(
            f"not checked, as no record names them: {len(loose):,} files ({first}{', ...' * (len(loose) > 3)})"
        )
