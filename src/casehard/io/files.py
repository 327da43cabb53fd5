"""Folders that are either complete or absent: staged writes, manifests, verification, safe relative paths.

A folder is written beside its final place, every file is fsynced, a manifest with the SHA-256 of every file is added
and fsynced, and only then is the folder renamed. Whoever finds a manifest that verifies has found a complete folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from casehard.errors import Corrupt, StorageError, UserError
from casehard.io.disk import fsync as fsync
from casehard.io.disk import is_full as is_full
from casehard.io.disk import make_folder, refused, storage_errors, swap
from casehard.io.locks import LOCK, NO_LOCKS, take
from casehard.io.manifest import MANIFEST, plain_files, write_manifest

STAGING = ".staging-"
DOOMED = ".doomed-"
TOGETHER = "run"
"""Ends the staging name where several processes fill one folder; elsewhere the process id does."""
CRASH_EXIT = 9

_MAX_PART = 255
_MAX_PATH = 1024
_OURS = re.compile(rf"(?:{re.escape(STAGING)}|{re.escape(DOOMED)})(.+)-(?:\d+|{TOGETHER})", re.DOTALL)
_reached: Counter[str] = Counter()


def crash_point(name: str) -> None:
    """Exit at once, without clean-up, when ``CASEHARD_CRASH_AT`` is ``name`` (or ``name@n``: the n-th time, from 1).

    The name ``*`` is any point. The one place where tests inject a kill; a no-op otherwise.
    """
    wanted = os.environ.get("CASEHARD_CRASH_AT")
    if wanted is None:
        return
    for key in (name, "*"):
        _reached[key] += 1
        if wanted in (key, f"{key}@{_reached[key]}"):
            os._exit(CRASH_EXIT)


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


def _discard(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def remove(folder: Path) -> None:
    """Delete a folder so that a kill half-way leaves no partial folder under its old name."""
    doomed = folder.with_name(f"{DOOMED}{folder.name}-{os.getpid()}")
    folder.rename(doomed)
    crash_point("remove:renamed")
    _discard(doomed)


def is_left_over(name: str, *, of: str | None = None) -> bool:
    """Return whether a name is one that an interrupted write or deletion leaves behind (that of ``of``, if given)."""
    ours = _OURS.fullmatch(name)
    return ours is not None and of in (None, ours[1])


def sweep(folder: Path, *, of: str | None = None, deep: bool = False) -> None:
    """Delete what interrupted writes and deletions left behind in ``folder``, and nothing a living process holds.

    Args:
        of: only what was to become, or had been, the file or folder of this name.
        deep: look below, too.
    """
    for root, folders, files in os.walk(folder):
        left = [name for name in (*folders, *files) if is_left_over(name, of=of)]
        for name in left:
            _sweep(Path(root, name))
        folders[:] = [name for name in folders if name not in left] if deep else []


def _sweep(path: Path) -> None:
    """Delete a left-over; where there are no locks to tell, what looks like one stays."""
    held = path / LOCK if path.is_dir() else path
    if path.is_symlink():  # nothing here makes links
        return
    try:
        handle = take(held, create=False)
    except FileNotFoundError:
        handle = -1  # its owner died before it could lock it, or was deleting it
    except OSError:
        return
    if handle is not None:
        with contextlib.suppress(OSError):  # somebody else's folder, or one nobody may write to
            _discard(path)
        if handle >= 0:
            os.close(handle)


def _claim(path: Path, mode: int = 0o666) -> int:
    """Make a file, and hold it where that is possible: it is this process's until the handle is closed."""
    while True:
        try:
            handle = take(path, mode=mode)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)
        if handle is not None:
            return handle
        time.sleep(0.01)  # somebody takes it for a left-over and is just deleting it


def _replace(fresh: Path, final: Path) -> None:
    """Give a finished folder its name; an older one trades places with it, or goes where there is no trading."""
    if not (final.exists() or final.is_symlink()):
        fresh.rename(final)
        return
    if swap(fresh, final):
        return
    doomed = final.with_name(f"{DOOMED}{final.name}-{os.getpid()}")
    final.rename(doomed)
    crash_point("save:between_renames")
    try:
        fresh.rename(final)
    except BaseException:
        doomed.rename(final)
        raise
    doomed.rename(fresh)


def publish(staging: Path, final: Path) -> None:
    """Make a staged folder visible: fsync files, manifest, fsync, rename, fsync parent.

    An older folder of that name is in ``staging`` afterwards.
    """
    for path in plain_files(staging).values():
        fsync(path)
    crash_point("save:before_manifest")
    write_manifest(staging)
    fsync(staging / MANIFEST)
    for root, _, _ in os.walk(staging):
        fsync(Path(root))
    crash_point("save:after_manifest")
    _replace(staging, final)
    crash_point("save:after_rename")
    fsync(final.parent)


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

    What a killed process left of the same folder is removed first.

    Args:
        final: where the finished folder goes; its parent is created; an older folder of that name is replaced.
        needs: bytes about to be written, as far as known; checked against the free space beforehand.
        tag: ending of the staging name; the process id unless several processes fill one folder together.

    Raises:
        StorageError: the disk is or becomes full, or nobody may write there; nothing is left behind.
    """
    final = Path(final)
    make_folder(final.parent)
    sweep(final.parent, of=final.name)
    if needs > shutil.disk_usage(final.parent).free:
        raise refused(final.parent, needs)
    root = final.parent / f"{STAGING}{final.name}-{os.getpid() if tag is None else tag}"
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        stack.enter_context(storage_errors(final.parent, needs=needs))
        stack.callback(os.close, _hold(root))
        folder = root / final.name
        folder.mkdir()
        crash_point("save:opened")
        yield folder
        publish(folder, final)


def _hold(root: Path) -> int:
    """Make an empty staging folder that nobody takes for a left-over while the handle is open."""
    shutil.rmtree(root, ignore_errors=True)
    while True:
        root.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # swept away before it could be held
            return _claim(root / LOCK)


@contextmanager
def replacing(path: Path, *, needs: int = 0, private: bool = False) -> Iterator[Path]:
    """Yield an empty file to write to, which takes the place of ``path`` when the block ends, and vanishes if it fails.

    Readers see the old content or the new, never a part. What a killed process left of the same file is removed first.

    Args:
        needs: bytes about to be written, as far as known.
        private: readable by the owner only, from the first byte.

    Raises:
        StorageError: the disk is full, or nobody may write there; the old file is intact.
    """
    path = Path(path)
    make_folder(path.parent)
    sweep(path.parent, of=path.name)
    fresh = path.with_name(f"{STAGING}{path.name}-{os.getpid()}")
    with contextlib.ExitStack() as stack:
        stack.enter_context(storage_errors(path.parent, needs=needs))
        stack.callback(os.close, _claim(fresh, 0o600 if private else 0o666))
        stack.callback(fresh.unlink, missing_ok=True)
        crash_point("file:opened")
        yield fresh
        fsync(fresh)
        crash_point("file:written")
        fresh.replace(path)
        crash_point("file:renamed")
        fsync(path.parent)


def write_text_atomic(path: Path, text: str, *, private: bool = False) -> None:
    """Replace a text file whole: readers see the old content or the new, never a part.

    Args:
        private: readable by the owner only.

    Raises:
        StorageError: the disk is full, or nobody may write there; the old file is intact.
    """
    data = text.encode("utf-8")
    with replacing(path, needs=len(data), private=private) as fresh:
        fresh.write_bytes(data)


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
