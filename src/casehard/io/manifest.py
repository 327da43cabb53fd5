"""A folder's manifest: size and digest of every file, written with it and compared before it is used."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from casehard.errors import Corrupt

MANIFEST = "manifest.json"
_FORMAT = 1
_LARGE = 1 << 24


def file_digest(path: Path) -> str:
    """Return the SHA-256 (hex) of a file; of the names and contents of every file when it is a folder."""
    if path.is_dir():
        sha = hashlib.sha256()
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            sha.update(f"{file.relative_to(path)}\0{file_digest(file)}\n".encode())
        return sha.hexdigest()
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _digests(paths: list[Path]) -> list[str]:
    """Return the SHA-256 of each file; of several large ones at a time, as a good disk is faster than one hash."""
    if sum(path.stat().st_size > _LARGE for path in paths) < 2:
        return [file_digest(path) for path in paths]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(file_digest, paths))


def plain_files(folder: Path) -> dict[str, Path]:
    """Return every file below ``folder`` but the manifest, by POSIX relative name; refuse what is no plain file."""
    found: dict[str, Path] = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root, name)
            relative = path.relative_to(folder).as_posix()
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode) or not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                raise Corrupt(f"{folder}: {relative} is not a plain file", hint="links and devices are never trusted")
            if stat.S_ISREG(mode) and relative != MANIFEST:
                found[relative] = path
    return found


def _serialise(files: dict[str, dict[str, Any]]) -> str:
    body = json.dumps(files, sort_keys=True)
    whole = {"format": _FORMAT, "files": files, "sha256": hashlib.sha256(body.encode()).hexdigest()}
    return json.dumps(whole, indent=1, sort_keys=True) + "\n"


def write_manifest(folder: Path) -> None:
    """Write the SHA-256 and size of every file of ``folder`` into its manifest.

    Raises:
        Corrupt: the folder holds a link or a device.
    """
    found = sorted(plain_files(folder).items())
    digests = _digests([path for _, path in found])
    files = {n: {"bytes": path.stat().st_size, "sha256": d} for (n, path), d in zip(found, digests, strict=True)}
    (folder / MANIFEST).write_text(_serialise(files), encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Return ``{relative name: {"bytes", "sha256"}}`` of a manifest that is itself intact.

    Raises:
        Corrupt: no manifest, or one whose own bytes were changed.
    """
    path = folder / MANIFEST
    try:
        if folder.is_symlink() or path.is_symlink():
            raise Corrupt(
                f"{folder}: the folder or its manifest is a symbolic link",
                hint="links are not followed: give the folder itself",
            )
        if path.exists() and not path.is_file():
            raise Corrupt(f"{path}: not a plain file", hint="restore it from a copy")
        text = path.read_bytes().decode("utf-8")
        files: dict[str, dict[str, Any]] = json.loads(text)["files"]
        expected = _serialise(files)
        if not all(type(e["bytes"]) is int and isinstance(e["sha256"], str) for e in files.values()):
            raise TypeError("files need a size and a digest")
    except (FileNotFoundError, NotADirectoryError):
        raise Corrupt(f"{folder}: no {MANIFEST}", hint="it was never completed, or not written by casehard") from None
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise Corrupt(f"{path}: not a readable manifest: {error}", hint="restore it from a copy") from None
    # Comparing the whole text, not only the digest inside, also catches a flipped bit in white space or key names.
    if text != expected:
        actual, wanted = (hashlib.sha256(t.encode()).hexdigest() for t in (text, expected))
        raise Corrupt(
            f"{path}: the manifest was changed: expected sha256 {wanted}, actual {actual}",
            hint="restore it from a copy",
        )
    return files


def verify(folder: Path) -> None:
    """Check a folder against its manifest, file by file.

    Raises:
        Corrupt: names the first file that is missing, extra, a link or different, with expected and actual digest.
    """
    folder = Path(folder)
    expected = read_manifest(folder)
    found = plain_files(folder)
    hint = "do not use it; take another copy or an earlier checkpoint"
    for name, entry in expected.items():
        if name not in found:
            raise Corrupt(f"{folder}: {name} is missing (expected sha256 {entry['sha256']})", hint=hint)
    digests = dict(zip(expected, _digests([found[name] for name in expected]), strict=True))
    for name, entry in expected.items():
        size, actual = found[name].stat().st_size, digests[name]
        if size != entry["bytes"] or actual != entry["sha256"]:
            raise Corrupt(
                f"{folder}: {name} differs from the manifest: expected sha256 {entry['sha256']} "
                f"({entry['bytes']} bytes), actual {actual} ({size} bytes)",
                hint=hint,
            )
    for name in found:
        if name not in expected:
            raise Corrupt(f"{folder}: {name} is not in the manifest", hint=hint)
