"""Children that end when their parent does, however it ends: they watch a pipe whose other end only the parent holds.

``python -m casehard.io.leash HANDLE FOLDER MODULE ...`` runs a module so, from its first line on: what the module
imports may take seconds.
"""

from __future__ import annotations

import os
import runpy
import shutil
import sys
import threading

ORPHANED = 1
"""Exit code of a child whose parent is gone: nobody reads it."""


def end_with(handle: int, *, folder: str = "") -> None:
    """End this process, at once and without clean-up, when the writing end of a pipe is closed.

    Args:
        handle: the reading end, on which nothing ever arrives.
        folder: what the parent would have removed.
    """

    def watch() -> None:
        while os.read(handle, 1):
            pass
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(ORPHANED)

    threading.Thread(target=watch, name="leash", daemon=True).start()


if __name__ == "__main__":
    end_with(int(sys.argv[1]), folder=sys.argv[2])
    sys.argv = sys.argv[3:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
