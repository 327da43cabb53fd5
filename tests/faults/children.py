"""What the child processes of the fault tests run; a fork server imports all this once, so children start quickly."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from casehard.errors import UserError
from casehard.train import progress
from casehard.train.fit import fit
from casehard.train.recipe import TrainConfig
from fakes import Averaging, tiny_llama, tiny_rows

gc.collect()
gc.freeze()


def endless(out, steps=3_000):
    """Train, saving after every step, until killed; exit with the error's own code otherwise."""
    progress.set_quiet(True)
    config = TrainConfig(steps=steps, batch_size=2, lr=1e-3, save_every=1, log_every=1000, precision="fp32")
    try:
        fit(tiny_llama(layers=1), None, tiny_rows(8), config=config, seed=0, out=Path(out), method=Averaging())
    except UserError as error:
        os._exit(error.exit_code)


def crash(out, point):
    """Train six steps, saving every second one, and die at ``point``."""
    os.environ["CASEHARD_CRASH_AT"] = point
    short(out)


def short(out):
    """Train six steps, saving every second one; return the weights."""
    from fakes import weights

    config = TrainConfig(steps=6, batch_size=2, lr=1e-2, warmup=0, save_every=2, log_every=1, precision="fp32")
    model = tiny_llama(layers=1, dropout=0.2)
    fit(model, None, tiny_rows(8), config=config, seed=0, out=Path(out) if out else None, method=Averaging())
    return weights(model)


def ranked(rank, ranks, port, batch_size, accumulation, out):
    """Train 12 steps as one of several gloo processes; rank 0 writes the losses."""
    import json

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    progress.set_quiet(True)
    losses, moved = layout(batch_size, accumulation)
    if rank == 0:
        Path(out).write_text(json.dumps([losses, moved]))


def layout(batch_size, accumulation):
    """Return the 12 losses and a checksum of the weights of a run with this layout; no dropout, unequal rows."""
    config = TrainConfig(
        steps=12,
        batch_size=batch_size,
        accumulation=accumulation,
        lr=1e-2,
        warmup=2,
        log_every=1,
        precision="fp32",
    )
    model = tiny_llama()
    log = fit(model, None, tiny_rows(40), config=config, seed=0).log
    return [row["loss"] for row in log], sum(p.detach().double().abs().sum().item() for p in model.parameters())
