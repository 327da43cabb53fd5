"""A random model with the organism's real data: a folder that every verb accepts, made in a second."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import forks

HERE = Path(__file__).resolve()


def _fakes():
    spec = importlib.util.spec_from_file_location("casehard_test_fakes", HERE.parents[1] / "fakes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_organism(folder: Path) -> Path:
    """Write an untrained organism: the shape, tokenizer and files of a built one."""
    from casehard.organism.build import write_data
    from casehard.organism.tokenizer import build_tokenizer
    from casehard.organism.world import World

    world = World(0)
    tokenizer = build_tokenizer(world)
    _fakes().tiny_llama(vocab=len(tokenizer), hidden=32, layers=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_data(world, folder / "data")
    return folder


def casehard(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does, in a process of its own, with nothing on stdin."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    if forks.can_fork(env):
        return forks.Command([*arguments], env=env).done()
    return fresh(*arguments, **env)


def fresh(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in an interpreter that has imported nothing yet."""
    return subprocess.run(
        [sys.executable, "-m", "casehard.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        timeout=240,
    )


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Write JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tree(folder: Path) -> set[str]:
    """Return every file and folder below, relative."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}
