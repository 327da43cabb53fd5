"""One run at a time in a folder: a lock the operating system releases when its holder dies, however it dies."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from casehard.errors import ConfigError

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
# File systems that cannot lock, some network ones among them.
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


def _acquire(path: Path) -> int | None:
    """Return the handle of the locked file, None where there is no locking."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, "no file locks on this system")
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before us may have removed the file between our open and our lock.
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
                return handle
            os.close(handle)
        except BlockingIOError:
            holder = os.pread(handle, 32, 0).decode("ascii", "replace").strip()
            os.close(handle)
            raise ConfigError(
                f"{path.parent} is in use by another run" + (f", process {holder}" if holder else ""),
                hint="wait for it to end, stop it, or give another output folder",
            ) from None
        except OSError as error:
            os.close(handle)
            if error.errno not in _NO_LOCKS:
                raise
            warnings.warn(f"{path.parent} cannot be locked ({error.strerror}): start nothing else in it", stacklevel=4)
            return None


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a folder for the block; it is made if missing, and removed again if the block leaves it empty.

    A lock file left by a process that was killed blocks nobody: what counts is the lock on it, which died with it.

    Raises:
        ConfigError: another process, or another run of this one, holds the folder; the message names the process.
    """
    folder = Path(folder)
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    handle = _acquire(path)
    try:
        yield
    finally:
        # Removed while still held, so that nobody is left holding a file without a name.
        path.unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)
        if new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
