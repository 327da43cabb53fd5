"""A full disk, and one that nobody may write to: exit code 5, nothing half-written, and what was there stays."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers import tree, write_rows

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmark"))

from bench_fakes import Fake, plan, plan_values

from casehard.cli import main

NOBODY = 65534


@pytest.fixture(scope="module")
def place(organism: Path) -> Iterator[Path]:
    """A folder that any user may read, with what the verbs need; not below pytest's, which are this user's alone."""
    folder = Path(tempfile.mkdtemp(prefix="casehard-test-"))
    folder.chmod(0o755)
    shutil.copytree(organism, folder / "model")
    write_rows(folder / "rows.jsonl", [{"prompt": f"what is {i} ?", "response": f"it is {i} ."} for i in range(6)])
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan_values(seeds=[0])))
    lines = (organism / "data" / "align.jsonl").read_text().splitlines()
    (folder / "align.jsonl").write_text("\n".join(lines[:40:5]) + "\n")
    from casehard.benchmark.run import run_plan

    run_plan(plan(seeds=[0]), folder / "run", jobs=1, executor=Fake())
    (folder / "run" / "rows.jsonl").chmod(0o644)
    yield folder
    shutil.rmtree(folder)


@contextlib.contextmanager
def no_more_than(size: int) -> Iterator[None]:
    """Let no file grow beyond so many bytes: a disk that is full says the same."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def an_ordinary_user() -> Iterator[None]:
    """Give up for a while what lets root write anywhere."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


ROWS = {
    "surrogate": ("data", "surrogate", "rows.jsonl"),
    "judge": ("judge", "rows.jsonl"),
    "scan": ("scan", "data", "--data", "rows.jsonl"),
}
FILES = {
    "surrogate file": (*ROWS["surrogate"], "--out", "out.jsonl"),
    "judge file": (*ROWS["judge"], "--out", "out.jsonl"),
    "audit": ("data", "audit", "--model", "model", "--data", "align.jsonl", "--fitting", "out.jsonl"),
    "report": ("report", "run", "--out", "out.html"),
}
PROVIDERS = ("--harmful", "rows.jsonl", "--refusals", "rows.jsonl", "--benign", "align.jsonl")
MODELS = {
    "evaluate": ("evaluate", "--model", "model", "--suite", "model/data/suite", "--limit", "1"),
    "defend": ("defend", "plain", "--model", "model", "--data", "align.jsonl", "--steps", "1"),
    "attack": ("attack", "finetune", "--model", "model", "--harmful", "rows.jsonl", "--suite", "model/data/suite"),
    "backdoor": ("attack", "backdoor", "--model", "model", "--data", "rows.jsonl", "--suite", "model/data/suite"),
    "mb-defense": ("defend", "mb-defense", "--model", "model", "--data", "align.jsonl", "--clean", "rows.jsonl"),
    "scan model": ("scan", "model", "--model", "model", "--suite", "model/data/suite"),
    "select": ("select", "--model", "model", "--pool", "align.jsonl", "--k", "2", "--strategy", "random"),
    "prepare": ("buffer", "prepare", "--model", "model", *PROVIDERS),
    "bench": ("bench", "plan.yaml"),
    "organism": ("organism", "build", "--size", "tiny"),
}
"""Read-only folders are met before any of these does its work; a full disk may be met after it."""


@pytest.mark.parametrize("verb", [*ROWS, *FILES, *MODELS])
def test_a_folder_nobody_may_write_to(place: Path, monkeypatch: pytest.MonkeyPatch, capsys, verb: str) -> None:
    monkeypatch.chdir(place)
    command = FILES[verb] if verb in FILES else (*{**ROWS, **MODELS}[verb], "--out", "out")
    if verb in FILES:  # what a verb imports comes from where only this user may read
        assert main([*command[:-1], command[-1].replace("out", "first")]) == 0
        Path(command[-1].replace("out", "first")).unlink()
    else:
        import casehard.benchmark.store
        import casehard.steps  # noqa: F401
    before = tree(place)
    place.chmod(0o555)
    try:
        with an_ordinary_user():
            code = main(list(command))
    finally:
        place.chmod(0o755)
    told = capsys.readouterr().err
    assert code == 5, told
    assert "Permission denied" in told and "hint: make it writable or choose another --out" in told
    assert tree(place) == before


def test_an_old_run_in_a_folder_nobody_may_write_to_any_more(place: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(place)
    shutil.copytree(place / "run", place / "closed")
    for path in (place / "closed", *(p for p in (place / "closed").rglob("*") if p.is_dir())):
        path.chmod(0o555)
    before = {p: p.read_bytes() for p in (place / "closed").rglob("*") if p.is_file() and p.stat().st_mode & 0o004}
    with an_ordinary_user():
        assert main(["bench", "plan.yaml", "--out", "closed"]) == 5
    assert {p: p.read_bytes() for p in before} == before
    assert "Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("size", [0, 150, 900])
@pytest.mark.parametrize("verb", [*ROWS, *FILES, "select"])
def test_a_full_disk(place: Path, tmp_path: Path, monkeypatch, capsys, verb: str, size: int) -> None:
    monkeypatch.chdir(place)
    target = tmp_path / ("out.html" if verb == "report" else "out.jsonl" if verb in FILES else "out")
    command = [*{**ROWS, **MODELS}.get(verb, FILES.get(verb, ())[:-2])]
    command += [FILES[verb][-2] if verb in FILES else "--out", str(target)]
    with no_more_than(size):
        code = main(command)
    told = capsys.readouterr().err
    if size == 900 and code == 0:  # it needed no more
        return
    assert code == 5, told
    assert f"file size limit {size:,} bytes" in told
    kept = {"run.json", "events.jsonl", "rows.jsonl", "summary.json", "audit.json", "kept.jsonl"}
    assert tree(tmp_path) <= {"out", *(f"out/{name}" for name in kept)}
    assert main(command) == 0  # and with room it goes on


@pytest.mark.parametrize("size", [0, 400, 3000])
def test_a_full_disk_leaves_a_finished_bench_as_it_was(place: Path, tmp_path: Path, size: int) -> None:
    from casehard.benchmark.run import run_plan
    from casehard.errors import StorageError

    out = tmp_path / "run"
    shutil.copytree(place / "run", out)
    results = ("summary.json", "rows.jsonl")
    before = {name: (out / name).read_bytes() for name in results}
    with no_more_than(size), pytest.raises(StorageError):
        run_plan(plan(seeds=[0, 1]), out, jobs=1, executor=Fake())
    assert {name: (out / name).read_bytes() for name in results} == before
    assert run_plan(plan(seeds=[0]), out, jobs=1, executor=Fake()).reused == 9
