"""How a worker of a benchmark starts: before anything heavy is imported, so keep this module light."""

from __future__ import annotations

import multiprocessing
import os
import signal

from casehard.leash import end_with
from casehard.train import progress


def start_worker(threads: int) -> None:
    """Prepare a worker process: on a leash, thread counts before torch is imported, no progress lines of its own."""
    if (parent := multiprocessing.parent_process()) is not None:
        end_with(parent.sentinel)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    # The parent decides when to stop and tells the workers; a Ctrl-C reaches the whole group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    progress.set_quiet()
