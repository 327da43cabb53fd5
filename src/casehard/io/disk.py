"""What a disk does, and what it refuses: one error for the ways of saying that it is full or closed to writing."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from casehard.errors import StorageError

_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS}
# safetensors and torch report a full disk as text, not as an OSError.
_FULL_TEXT = (*(f"os error {code}" for code in _FULL), "PytorchStreamWriter failed", "inline_container")
_KEPT = "nothing half-written was left and earlier results are intact"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def is_full(error: BaseException | None) -> bool:
    """Return whether an exception, or one it stems from, says that the disk refused a write."""
    return any(
        (isinstance(e, OSError) and e.errno in _FULL) or any(text in str(e) for text in _FULL_TEXT)
        for e in _chain(error)
    )


def _closed(error: BaseException | None, folder: Path) -> OSError | None:
    """Return the refusal to write in ``folder``, or to make it; what forbids reading elsewhere is none."""
    here = folder.resolve()
    for e in _chain(error):
        if isinstance(e, OSError) and e.errno in _CLOSED and isinstance(e.filename, str | os.PathLike):
            there = Path(e.filename).resolve()
            if there.is_relative_to(here) or here.is_relative_to(there):
                return e
    return None


def _file_limit() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return None if soft == resource.RLIM_INFINITY else soft


def refused(folder: Path, needs: int) -> StorageError:
    """Build the error for a write that found no room: bytes needed, bytes free, the file size limit if there is one."""
    there = next(place for place in (folder, *folder.resolve().parents) if place.exists())
    free = shutil.disk_usage(there).free
    limit = _file_limit()
    extra = "" if limit is None else f", file size limit {limit:,} bytes"
    needed = f"{needs:,}" if needs else "an unknown number of"
    return StorageError(
        f"cannot write to {folder}: needed {needed} bytes, free {free:,} bytes{extra}",
        hint=f"free some space or choose another --out; {_KEPT}",
    )


@contextmanager
def storage_errors(folder: Path, *, needs: int = 0) -> Iterator[None]:
    """Turn the many ways of saying "disk full" or "not writable" inside the block into one StorageError.

    Args:
        folder: what is written to, or made.
        needs: bytes about to be written, as far as known.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        if is_full(error):
            raise refused(folder, needs) from error
        if (told := _closed(error, folder)) is not None:
            raise StorageError(
                f"cannot write to {folder}: {told.strerror}: {told.filename}",
                hint=f"make it writable or choose another --out; {_KEPT}",
            ) from error
        raise


def make_folder(folder: Path) -> None:
    """Make a folder and those above it.

    Raises:
        StorageError: the disk is full, or nobody may write there.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


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


def swap(fresh: Path, folder: Path) -> bool:
    """Let two paths trade names at once, where the system can.

    Source: renameat2(2) with RENAME_EXCHANGE on Linux, renameatx_np(2) with RENAME_SWAP on macOS; both flags are 2.
    """
    import ctypes

    name, here = ("renameatx_np", -2) if sys.platform == "darwin" else ("renameat2", -100)
    call = getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
    return call is not None and call(here, os.fsencode(fresh), here, os.fsencode(folder), ctypes.c_uint(2)) == 0
