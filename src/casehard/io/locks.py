"""One run at a time in a folder: a lock the operating system releases when its holder dies, however it dies."""

from __future__ import annotations

import contextlib
import errno
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from casehard.errors import ConfigError
from casehard.io.disk import make_folder, storage_errors

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
# File systems that cannot lock, some network ones among them.
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


def take(path: Path, *, create: bool = True, mode: int = 0o644) -> int | None:
    """Lock a file and return its handle, which holds it until it is closed; None when somebody else holds it.

    Args:
        create: make the file if it is missing, readable to whom ``mode`` says.

    Raises:
        OSError: no such file, or one of :data:`NO_LOCKS`.
    """
    while True:
        handle = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0) | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, "no file locks on this system")
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before us may have removed the file between our open and our lock.
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                return handle
            os.close(handle)
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError:
            os.close(handle)
            raise


def _acquire(path: Path) -> int | None:
    """Return the handle of the locked file, None where there is no locking."""
    try:
        handle = take(path)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warnings.warn(f"{path.parent} cannot be locked ({error.strerror}): start nothing else in it", stacklevel=4)
        return None
    if handle is None:
        holder = path.read_bytes()[:32].decode("ascii", "replace").strip() if path.exists() else ""
        raise ConfigError(
            f"{path.parent} is in use by another run" + (f", process {holder}" if holder else ""),
            hint="wait for it to end, stop it, or give another output folder",
        )
    with contextlib.suppress(OSError):  # who holds it is a courtesy that a full disk may refuse
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
    return handle


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a folder for the block; it is made if missing, and removed again if the block leaves it empty.

    A lock file left by a process that was killed blocks nobody: what counts is the lock on it, which died with it. A
    folder that holds nothing else was made by that process, and counts as missing.

    Raises:
        ConfigError: another process, or another run of this one, holds the folder; the message names the process.
        StorageError: nobody may write there, or the disk is full.
    """
    folder = Path(folder)
    new = not folder.exists() or [p.name for p in folder.iterdir()] == [LOCK]
    make_folder(folder)
    path = folder / LOCK
    try:
        with storage_errors(folder):
            handle = _acquire(path)
        try:
            yield
        finally:
            # Removed while still held, so that nobody is left holding a file without a name.
            path.unlink(missing_ok=True)
            if handle is not None:
                os.close(handle)
    finally:
        if new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
