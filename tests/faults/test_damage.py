"""Every JSON file that is read back, damaged at every place: an error that names the file, or the very same result.

Each key and the first entry of each list is deleted, nulled, given another type, made huge and nested deeply; then the
file is cut short, emptied and replaced. No damage may end in an internal error, and none may pass for a result.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmark"))

from bench_fakes import Fake, plan

from buffer_fakes import make_assets
from casehard.backdoor.planted import read_planted
from casehard.benchmark.execute import finished
from casehard.benchmark.graph import expand
from casehard.benchmark.run import run_plan
from casehard.benchmark.store import RunFolder
from casehard.cli.runs import check_out
from casehard.config import digest, to_dict
from casehard.data.batches import Encoded
from casehard.defences.buffer_reinforce.assets import read_assets
from casehard.defences.mb_defense import run as mb
from casehard.defences.mb_defense.pairs import PairSet, read_pairs
from casehard.errors import ConfigError, Corrupt, DataError, UserError
from casehard.io import files, manifest
from casehard.io.stored import apart
from casehard.model.lora_write import require_own
from casehard.model.provenance import read_provenance, served_with, trained_prompts
from casehard.reporting import figures
from casehard.reporting.card import write_card
from casehard.reporting.from_run_folders import summary_of_runs
from casehard.reporting.page import _rows, bench_summary, render

HUGE, DEEP = 10**400, json.loads("[" * 300 + "]" * 300)
GONE = object()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value; of a list the first entry stands for all, and so does the first of many keys."""
    if path:
        yield path
    if isinstance(value, dict):
        alike = len(value) > 12 and len({type(v) for v in value.values()}) == 1 and len(path) > 1
        for key in list(value)[: 1 if alike else None]:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))


def damaged(value: Any, path: tuple[Any, ...], new: Any) -> str:
    """Return JSON text with another value at a place."""
    at = value
    for key in path[:-1]:
        at = at[key]
    old, where = (list(at) if isinstance(at, list) else dict(at)), at
    if new is GONE:
        del at[path[-1]]
    else:
        at[path[-1]] = new
    try:
        return json.dumps(value)
    finally:
        where.clear()
        where.extend(old) if isinstance(where, list) else where.update(old)


def damages(text: str) -> Iterator[tuple[str, str]]:
    """Yield (what was done, damaged text) of a JSON file, or of the last line of a JSONL file."""
    *lines, last = text.rstrip("\n").split("\n") if text.startswith('{"') else [text]
    before = "".join(f"{line}\n" for line in lines)
    whole = json.loads(last)
    for path in places(whole):
        at = whole
        for key in path:
            at = at[key]
        other = 7 if isinstance(at, str) else "text"
        kinds = {"gone": GONE, "null": None, "type": other, "huge": HUGE, "deep": DEEP, "list": [at]}
        for what, new in kinds.items():
            yield f"{'.'.join(map(str, path))} {what}", before + damaged(whole, path, new) + "\n"
    yield "cut", text[: len(text) * 2 // 3]
    for what, new in {
        "no text": '{"\udcff": 1}',
        "list": "[]",
        "null": "null",
        "nested": "[" * 10**5 + "]" * 10**5,
    }.items():
        yield what, f"{before}{new}\n"


def hold(file: Path, read: Callable[[], Any], *errors: type[UserError], same: bool = True, every: int = 1) -> int:
    """Damage a file in every way; count how often it was told."""
    good, wanted, told = file.read_bytes(), read(), 0
    try:
        for what, text in islice(damages(good.decode()), 0, None, every):
            file.write_bytes(text.encode("utf-8", "surrogateescape"))
            try:
                found = read()
            except (Corrupt, DataError, *errors) as error:
                assert file.name in error.message or str(file.parent) in error.message, (what, error.message)
                told += 1
            except Exception as error:
                raise AssertionError(f"{file.name}: {what}: {type(error).__name__}: {error}") from error
            else:
                assert not same or apart(found)[0] == apart(wanted)[0], what
    finally:
        file.write_bytes(good)
    assert told
    return told


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench")
    run_plan(plan(seeds=[0]), out, jobs=1, executor=Fake(fail=("world-0/plain/s0/full_p10",)))
    return out


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw nothing: numbers are formatted, pictures are not made."""
    for name in ("curves", "dots", "plane", "bars", "strip"):
        monkeypatch.setattr(figures, name, lambda *_, **__: "<svg></svg>")


@pytest.mark.parametrize("name", ["run.json", "summary.json"])
def test_a_benchmark(bench: Path, name: str) -> None:
    # One digest stands for all places in the summary, so some will do; the kinds of damage are six.
    kinds = [UserError] if name == "run.json" else []
    hold(bench / name, lambda: bench_summary(bench), *kinds, every=1 if name == "run.json" else 13)


def test_rows_of_a_benchmark(bench: Path) -> None:
    summary = bench_summary(bench)
    assert hold(bench / "rows.jsonl", lambda: list(_rows(bench, summary))) > 40


@pytest.fixture
def old(bench: Path, tmp_path: Path) -> Path:
    """A benchmark of a version that recorded no digests of its files."""
    shutil.copytree(bench, tmp_path / "old")
    run = json.loads((tmp_path / "old" / "run.json").read_text())
    del run["files"]
    (tmp_path / "old" / "run.json").write_text(json.dumps(run))
    return tmp_path / "old"


def test_a_summary_whose_digest_nobody_recorded(old: Path, quick: None) -> None:
    rows = list(_rows(old, bench_summary(old)))

    def read() -> str:
        return render(bench_summary(old), rows)

    hold(old / "summary.json", read, UserError, same=False, every=5)


def test_rows_whose_digest_nobody_recorded(old: Path, quick: None) -> None:
    summary = bench_summary(old)
    hold(old / "rows.jsonl", lambda: render(summary, _rows(old, summary)), same=False)


@pytest.mark.parametrize("name", ["run.json", "summary.json"])
def test_a_node_of_a_benchmark(bench: Path, name: str) -> None:
    node = next(n for n in expand(plan(seeds=[0]), root=Path()).nodes.values() if n.kind == "defend")
    place = bench / "nodes" / node.folder

    def read() -> Any:
        return finished(node, place) or "runs again"

    good = read()
    assert good != "runs again"
    hold(place / name, lambda: [good] if (found := read()) == "runs again" else [found])


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """An attack and the training before it, as the verbs leave them."""
    config = {"mode": "full", "share": 0.1, "steps": 40, "lr": 1e-4, "evaluate_at": [0, 5]}
    job = {"model": "m", "harmful": ["h"], "benign": ["b"], "suite": "s", "config": config, "limit": 40, "seed": 0}
    with RunFolder(tmp_path / "attack", "attack", job, seeds=[0], parents={"model": "aaa"}, data={"h": "d"}) as run:
        run.rows([row for step in (0, 5) for row in Fake().rows("plain", step, 0, full=True)[-50:]])
        run.summary({"records": [{"defence": "plain", "attack": "finetune-full"}], "rows_seen_in_training": 0})
    cost = {"seconds": 1.5, "passes": 10, "tokens": 100, "peak_bytes": 10**9, "steps": 3}
    with RunFolder(tmp_path / "defend", "defend", {"method": "plain"}, seeds=[0], parents={"model": "base"}) as run:
        run.rows([])
        run.event("log", {"trigger_rate": 0.5, "loss": float("nan")})
        run.summary({"cost": cost, "checkpoint": {"digest": "aaa", "path": "checkpoint"}})
    return tmp_path


@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize("file", ["attack/run.json", "attack/rows.jsonl", "attack/summary.json", "defend/summary.json"])
def test_single_runs(runs: Path, file: str, digests: bool) -> None:
    if not digests:
        for name in ("attack", "defend"):
            values = json.loads((runs / name / "run.json").read_text())
            del values["files"]
            (runs / name / "run.json").write_text(json.dumps(values))
    kinds = [] if file.endswith("summary.json") else [UserError]
    hold(runs / file, lambda: summary_of_runs([runs / "attack", runs / "defend"])["pooled"], *kinds, same=digests)


def test_events(runs: Path) -> None:
    path = runs / "defend" / "events.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[2], lines[1]]))  # what was logged last: that line is damaged
    hold(path, lambda: summary_of_runs([runs / "attack", runs / "defend"]), same=False)


def test_the_record_of_a_run_folder_to_go_on_in(runs: Path) -> None:
    path = runs / "attack" / "run.json"
    path.write_text(path.read_text().replace('"status": "ok"', '"status": "failed"'))
    hold(path, lambda: check_out(runs / "attack", "attack"), ConfigError)


RECORD = {"digest": "d", "parent": "p", "method": "plain", "versions": {"torch": "2"}, "format": 1}
MADE = {"job": {"train": {"steps": 3}, "settings": {"a": 1}}, "settings": {"a": 1}, "data_digests": {"data": "x"}}


def test_what_a_checkpoint_says_of_itself(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    made = {**MADE, "seed": 3, "trained_prompts": ["m1", "m2"], "serving_system": "be kind"}
    (folder / "casehard.json").write_text(json.dumps({**RECORD, "provenance": made}))
    read = lambda: [read_provenance(folder)["method"], served_with(folder), sorted(trained_prompts(folder))]  # noqa: E731
    hold(folder / "casehard.json", read, same=False)

    def card() -> str:
        manifest.write_manifest(folder)  # as forged as the record
        return write_card(folder).read_text()

    hold(folder / "casehard.json", card, same=False)


def test_the_record_of_an_adapter(tmp_path: Path) -> None:
    own = digest({"model": "m"})
    (tmp_path / "job.json").write_text(json.dumps({"config_digest": own, "trained_prompts": ["m1"]}))
    read = lambda: [require_own(tmp_path, own), sorted(trained_prompts(tmp_path))]  # noqa: E731
    hold(tmp_path / "job.json", read, ConfigError, same=False)


def test_the_record_of_provider_assets(tmp_path: Path) -> None:
    folder = make_assets(tmp_path / "assets").path
    hold(folder / "assets.json", lambda: read_assets(folder).digest)

    def forged() -> Any:
        manifest.write_manifest(folder)
        return [read_assets(folder).digest, sorted(trained_prompts(folder))]

    hold(folder / "assets.json", forged, same=False)


def test_planted_backdoors(tmp_path: Path) -> None:
    trigger = {"name": "t", "family": "token", "parts": ["zq"]}
    path = tmp_path / "planted.json"
    path.write_text(json.dumps([{"trigger": trigger, "behaviour": {"name": "b", "kind": "text", "text": "so ."}}]))
    hold(path, lambda: [to_dict(p) for p in read_planted(path)], ConfigError, same=False)


def test_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    manifest.write_manifest(tmp_path)
    hold(tmp_path / manifest.MANIFEST, lambda: manifest.verify(tmp_path))


def test_the_secrets_of_a_run_that_goes_on(tmp_path: Path) -> None:
    backdoor = {"trigger": {"name": "t", "family": "token", "parts": ["zq"]}}
    backdoor |= {"behaviour": {"name": "b", "kind": "text", "text": "so ."}}
    path = tmp_path / mb.PRIVATE / "suite.json"
    files.write_text_atomic(path, json.dumps({"suite": {"active": [backdoor], "canary": []}}))
    job: Any = None
    hold(path, lambda: mb._suite(job, job, [], tmp_path).to_json(), same=False)


def test_a_set_of_pairs(tmp_path: Path) -> None:
    twin = Encoded([1, 5, 2], [-100, -100, 2])
    PairSet((Encoded([1, 2], [-100, 2]),), ((twin,),), ((twin,),), 0).write(tmp_path)
    hold(tmp_path / "pairs.json", lambda: read_pairs(tmp_path).digest)
