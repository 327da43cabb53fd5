"""A node's digest covers the sources its result depends on: nothing stale is reused after a change."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from casehard.bench import matrix

PACKAGE = Path(matrix.__file__).resolve().parents[1]

# What decides no number: names, messages, locks, how files are read back, and that settings hold no secret.
NO_RESULT = {"__init__.py", "errors.py", "secrets.py", "locks.py", "disk.py", "stored.py", "leash.py"}
# These import for all kinds at once; what each kind runs of them is named in the matrix.
FOR_ALL = {"jobs.py", "bench/execute.py"}
# kind -> (file, what it imports) that the kind never runs.
NEVER_RUN = {
    "base": {
        ("train/shell.py", "defend/protocol.py"),  # built with a loop of its own
        ("organism/judge.py", "evaluate/judge.py"),  # judged later, by nodes that cover it
    },
    "defend": {("evaluate/unseen.py", "evaluate/suite.py")},  # for what it asks when a model is measured
    "evaluate": {("train/shell.py", "defend/protocol.py")},
    "harden": {("backdoor_jobs.py", "scan")},  # the cell asks it for what was planted, not for a scan
}


def files(sources: tuple[str, ...]) -> list[Path]:
    out = []
    for place in (PACKAGE / name for name in sources):
        out += sorted(place.rglob("*.py")) if place.is_dir() else [place]
    return out


def imported(path: Path) -> set[str]:
    """Return the files of the package that a file imports, also inside functions."""
    out = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("casehard"):
            continue
        folder = PACKAGE.joinpath(*str(node.module).split(".")[1:])
        for place in [folder / f"{a.name}.py" for a in node.names] + [
            folder.with_suffix(".py"),
            folder / "__init__.py",
        ]:
            if place.is_file() and place.is_relative_to(PACKAGE):
                out.add(place.relative_to(PACKAGE).as_posix())
    return out


@pytest.mark.parametrize("kind", sorted(matrix.SOURCES))
def test_what_the_sources_of_a_kind_import_is_among_them(kind: str) -> None:
    sources = matrix.SOURCES[kind]
    never = NEVER_RUN.get(kind, set())
    missing = set()
    for path in files(sources):
        name = path.relative_to(PACKAGE).as_posix()
        for target in imported(path) if name not in FOR_ALL else ():
            covered = any(target == s or target.startswith(f"{s}/") for s in sources)
            skipped = any((name, part) in never for part in (target, target.partition("/")[0]))
            if not covered and not skipped and target not in NO_RESULT:
                missing.add((name, target))
    assert not missing


def test_what_a_job_runs_outside_its_rooms_is_among_its_sources() -> None:
    assert "parallel" in matrix.SOURCES["defend"], "where Patcher's attackers run"
    assert "evaluate/unseen.py" in matrix.SOURCES["defend"], "what the checkpoint says it was trained on"
    for kind in ("evaluate", "attack", "prepare", "tune", "harden"):
        assert {"evaluate", "organism"} <= set(matrix.SOURCES[kind]), f"{kind} is judged"
