"""Folders that are either complete or absent: staged writes, manifests, verification, safe relative paths.

A folder is written beside its final place, every file is fsynced, a manifest with the SHA-256 of every file is added
and fsynced, and only then is the folder renamed. Whoever finds a manifest that verifies has found a complete folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from casehard.errors import Corrupt, StorageError, UserError

MANIFEST = "manifest.json"
STAGING = ".staging-"
DOOMED = ".doomed-"
CRASH_EXIT = 9

_FORMAT = 1
_LARGE = 1 << 24
_MAX_PART = 255
_MAX_PATH = 1024
_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
# safetensors and torch report a full disk as text, not as an OSError.
_FULL_TEXT = (*(f"os error {code}" for code in _FULL), "PytorchStreamWriter failed", "inline_container")
_reached: Counter[str] = Counter()


def crash_point(name: str) -> None:
    """Exit at once, without clean-up, when ``CASEHARD_CRASH_AT`` is ``name`` (or ``name@n``: the n-th time, from 1).

    The one place where tests inject a kill; a no-op otherwise.
    """
    wanted = os.environ.get("CASEHARD_CRASH_AT")
    if wanted is None:
        return
    _reached[name] += 1
    if wanted in (name, f"{name}@{_reached[name]}"):
        os._exit(CRASH_EXIT)


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


def read_bytes(path: Path) -> bytes:
    """Read a plain file whole: a pipe would hang, and some devices never end.

    Raises:
        UserError: the file is missing or may not be read.
        Corrupt: it is a folder, a pipe or a device.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise Corrupt(f"{path}: not a plain file", hint="folders, pipes and devices are never read as one")
            with open(handle, "rb", closefd=False) as stream:
                return stream.read()
        finally:
            os.close(handle)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}", hint="was the folder completed?") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", hint="check the path and its permissions") from None


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing or may not be read.
        Corrupt: it is not JSON, or no plain file.
    """
    try:
        return json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"{path}: not valid JSON: {error}", hint="fetch or build it again") from None


def _walk(folder: Path) -> dict[str, Path]:
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
    found = sorted(_walk(folder).items())
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
    except (FileNotFoundError, NotADirectoryError):
        raise Corrupt(f"{folder}: no {MANIFEST}", hint="it was never completed, or not written by casehard") from None
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
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
    found = _walk(folder)
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


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems have no notion of flushing a folder; renames there are ordered by the journal.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _discard(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def remove(folder: Path) -> None:
    """Delete a folder so that a kill half-way leaves no partial folder under its old name."""
    doomed = folder.with_name(f"{DOOMED}{folder.name}-{os.getpid()}")
    folder.rename(doomed)
    _discard(doomed)


def sweep(parent: Path) -> None:
    """Delete what interrupted writes and deletions left behind in ``parent``."""
    for pattern in (f"{STAGING}*", f"{DOOMED}*"):
        for left in parent.glob(pattern):
            _discard(left)


def publish(staging: Path, final: Path) -> None:
    """Make a staged folder visible: fsync files, manifest, fsync, rename, fsync parent. Replaces ``final``."""
    for path in _walk(staging).values():
        fsync(path)
    crash_point("save:before_manifest")
    write_manifest(staging)
    fsync(staging / MANIFEST)
    for root, _, _ in os.walk(staging):
        fsync(Path(root))
    crash_point("save:after_manifest")
    doomed = final.with_name(f"{DOOMED}{final.name}-{os.getpid()}")
    replaced = final.exists() or final.is_symlink()
    if replaced:
        final.rename(doomed)
    staging.rename(final)
    crash_point("save:after_rename")
    fsync(final.parent)
    if replaced:
        _discard(doomed)


def is_full(error: BaseException | None) -> bool:
    """Return whether an exception, or one it stems from, says that the disk refused a write."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(text in str(error) for text in _FULL_TEXT):
            return True
        error = error.__cause__ or error.__context__
    return False


def _file_limit() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return None if soft == resource.RLIM_INFINITY else soft


def refused(folder: Path, needs: int) -> StorageError:
    """Build the error for a refused write: bytes needed, bytes free, and the file size limit when there is one."""
    free = shutil.disk_usage(folder).free
    limit = _file_limit()
    extra = "" if limit is None else f", file size limit {limit:,} bytes"
    needed = f"{needs:,}" if needs else "an unknown number of"
    return StorageError(
        f"cannot write to {folder}: needed {needed} bytes, free {free:,} bytes{extra}",
        hint="free some space or choose another --out; nothing half-written was left and earlier results are intact",
    )


@contextmanager
def storage_errors(folder: Path, *, needs: int = 0) -> Iterator[None]:
    """Turn the many ways of saying "disk full" inside the block into one StorageError.

    Args:
        folder: an existing folder on the disk written to.
        needs: bytes about to be written, as far as known.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        if is_full(error):
            raise refused(folder, needs) from error
        raise


@contextmanager
def scratch(final: Path, *, needs: int = 0) -> Iterator[Path]:
    """Yield an empty folder on the disk of ``final``, gone when the block ends: to try a write that comes much later.

    Args:
        final: what will be written; neither it nor the folders above it need exist, and none is made.
        needs: bytes that it will take, checked against the free space.

    Raises:
        StorageError: no folder can be made there, or the disk has too little space.
    """
    there = next(p for p in Path(final).absolute().parents if p.exists())
    if needs > shutil.disk_usage(there).free:
        raise refused(there, needs)
    try:
        place = tempfile.mkdtemp(prefix=STAGING, dir=there)
    except OSError as error:
        raise StorageError(f"cannot write to {there}: {error.strerror}", hint="give a writable folder") from None
    try:
        with storage_errors(there):
            yield Path(place)
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def staged(final: Path, *, needs: int = 0, tag: str | None = None) -> Iterator[Path]:
    """Yield an empty folder that becomes ``final``, with its manifest, when the block ends, and vanishes if it fails.

    Args:
        final: where the finished folder goes; its parent is created; an older folder of that name is replaced.
        needs: bytes about to be written, as far as known; checked against the free space beforehand.
        tag: ending of the staging name; the process id unless several processes fill one folder together.

    Raises:
        StorageError: the disk is or becomes full; nothing is left behind.
    """
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    if needs > shutil.disk_usage(final.parent).free:
        raise refused(final.parent, needs)
    root = final.parent / f"{STAGING}{final.name}-{os.getpid() if tag is None else tag}"
    shutil.rmtree(root, ignore_errors=True)
    try:
        with storage_errors(final.parent, needs=needs):
            folder = root / final.name
            folder.mkdir(parents=True)
            yield folder
            publish(folder, final)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def write_text_atomic(path: Path, text: str) -> None:
    """Replace a text file whole: readers see the old content or the new, never a part.

    Raises:
        StorageError: the disk is full; the old file is intact.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{STAGING}{path.name}-{os.getpid()}")
    data = text.encode("utf-8")
    try:
        with storage_errors(path.parent, needs=len(data)):
            with temporary.open("wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(path)
            fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def inside(root: Path, relative: str) -> Path:
    """Return ``root / relative`` if it stays inside ``root``, symbolic links followed.

    Raises:
        UserError: absolute, ``..``, NUL, over-long, a drive or back-slash, or a link that leads out.
    """
    text = str(relative)
    parts = PurePosixPath(text).parts
    shown = repr(text if len(text) < 80 else text[:77] + "...")
    hint = "give a plain relative path below the folder"
    if not parts or "\0" in text or "\\" in text or ":" in text:
        raise UserError(f"path {shown} is not allowed: empty, or holds NUL, a back-slash or a colon", hint=hint)
    if PurePosixPath(text).is_absolute() or ".." in parts:
        raise UserError(f"path {shown} leaves its folder", hint=hint)
    if len(text) > _MAX_PATH or any(len(part.encode()) > _MAX_PART for part in parts):
        raise UserError(f"path {shown} is too long ({len(text)} characters)", hint=hint)
    path = Path(root, *parts)
    if not path.resolve().is_relative_to(Path(root).resolve()):
        raise UserError(f"path {shown} leads out of {root} through a symbolic link", hint=hint)
    return path
