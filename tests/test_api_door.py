"""What a caller of the library gets wrong is said at the door, before any work; nothing is written over or let out."""

from __future__ import annotations

import dataclasses
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import casehard as ch
from casehard.errors import ConfigError, DataError, Refused, Unsupported, UserError

WORLD = Path(ch.__file__).parent / "organism" / "assets" / "world0-tiny"
DATA, SUITE = WORLD / "data", WORLD / "data" / "suite"
TASK = DATA / "task_reviews.jsonl"
SHORT = {"steps": 1, "batch_size": 2, "warmup": 0}


@pytest.fixture(scope="module")
def base() -> ch.Model:
    return ch.load(WORLD, device="cpu")


@pytest.fixture(scope="module")
def closed(base: ch.Model) -> ch.Model:
    """A model as an attack leaves it."""
    return dataclasses.replace(base, may_leave=False)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"seed": [0, 1]}, "defend.seed"),
        ({"seed": 1.5}, "defend.seed"),
        ({"lora": 8}, "defend.lora"),
        ({"lora": {"ranks": 2}}, "did you mean 'rank'"),
        ({"select": {"k": "many"}}, "defend.select"),
        ({"settings": ["a"]}, "settings is a list"),
        ({"more": 3}, "more is a int"),
        ({"more": {"data": TASK}}, "'data' are given twice"),
        ({"system": 4}, "defend.system"),
        ({"max_length": "long"}, "defend.max_length"),
        ({"save_as": "adaptor", "lora": {"rank": 2}}, "defend.save_as"),
        ({"out": WORLD / "config.json"}, "is a file"),
        ({"out": WORLD}, "holds config.json"),
        ({"model": None}, "model is None"),
        ({"data": 5}, "rows are given as int"),
        ({"data": b"x"}, "rows are given as bytes"),
        ({"data": [3]}, "row 1 is a int"),
        ({"data": [{"prompt": "a secret", "respones": "b"}]}, "row 1: no response to learn from"),
    ],
)
def test_what_defend_is_given_wrong(base: ch.Model, wrong: dict, says: str) -> None:
    given = {"model": base, "data": TASK, "train": SHORT, **wrong}
    before = sorted(WORLD.iterdir())
    with pytest.raises(UserError) as told:
        ch.defend(given.pop("model"), "plain", **given)
    said = f"{told.value.message} {told.value.hint}"
    assert says in said and "a secret" not in said
    assert sorted(WORLD.iterdir()) == before


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: ch.attack(m, "round_trip", suite=None), "suite is None"),
        (lambda m: ch.attack(m, "round_trip", suite=[SUITE]), "suite is a list"),
        (lambda m: ch.attack(m, "round_trip", suite=SUITE, full_at=3), "attack.full_at"),
        (lambda m: ch.attack(m, "round_trip", suite=SUITE, limit="few"), "attack.limit"),
        (lambda m: ch.attack(m, "round_trip", suite=SUITE, seed=[1]), "attack.seed"),
        (lambda m: ch.evaluate(m, SUITE, limit=2.5), "evaluate.limit"),
        (lambda m: ch.evaluate(m, None), "suite is None"),
        (lambda m: ch.bench(None, out="x"), "plan is None"),
        (lambda m: ch.bench({}, out="x"), "plan is a dict"),
        (lambda m: ch.bench("plan.yaml", out=WORLD / "config.json"), "is a file"),
        (lambda m: ch.report(["a", "b"]), "run is a list"),
        (lambda m: ch.rows(None), "rows are given as NoneType"),
        (lambda m: ch.save("folder", "out"), "a str, not a Model"),
        (lambda m: ch.save(m, WORLD / "config.json" / "x"), "config.json: Not a directory"),
        (lambda m: ch.save(m, "out", attacked="no"), "attacked is 'no'"),
        (lambda m: ch.audit(m, data=TASK, out="x", method=None), "method is None"),
        (lambda m: ch.audit(m, data=TASK, out="x", base=m), "base is a Model"),
        (lambda m: ch.audit(m, data=TASK, out="x", base="nowhere/at/all"), "nowhere/at/all"),
        (lambda m: ch.audit(m, data=TASK, out="x", settings={"seed": 5}), "settings name 'seed'"),
        (lambda m: ch.audit(m, data=TASK, out="x", settings={"repair": True}), "settings name 'repair'"),
        (lambda m: ch.recommend(None), "no stage None"),
        (lambda m: ch.recommend("tune", passes="3"), "passes: 3"),
    ],
)
def test_what_other_verbs_are_given_wrong(
    base: ch.Model, call: Callable, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as told:
        call(base)
    assert says in f"{told.value.message} {told.value.hint}"
    assert not list(tmp_path.iterdir())


def test_what_an_attack_gave_is_no_model(base: ch.Model) -> None:
    found = ch.attack(base, "round_trip", suite=SUITE, limit=1)
    with pytest.raises(ConfigError, match="model is a Attacked") as told:
        ch.evaluate(found, SUITE)
    assert ".model" in told.value.hint
    with pytest.raises(ConfigError, match="not a Model") as told:
        ch.save(found, "out")
    assert ".model" in told.value.hint


def test_attacked_weights_are_kept_in_no_checkpoint(closed: ch.Model, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="kept in memory"):
        ch.defend(closed, "plain", data=TASK, train=SHORT, out=tmp_path / "kept")
    assert not list(tmp_path.iterdir())
    assert not ch.defend(closed, "plain", data=TASK, train=SHORT).may_leave


def test_a_checkpoint_of_a_training_says_that_it_has_no_history(base: ch.Model, tmp_path: Path) -> None:
    ch.defend(base, "plain", data=TASK, train=SHORT, out=tmp_path)
    with pytest.warns(UserWarning, match="checkpoint-1 is a checkpoint of a training on its way"):
        found = ch.load(tmp_path / "checkpoint-1")
    assert not found.lineage and found.notes


def test_checkpoints_are_written_into_no_model(base: ch.Model, tmp_path: Path) -> None:
    saved = ch.save(base, tmp_path / "model")
    with pytest.raises(UserError, match=r"config\.json"):
        ch.defend(saved, "plain", data=TASK, train=SHORT, out=tmp_path / "model")
    ch.load(tmp_path / "model")  # whole


def test_a_report_writes_over_nothing_but_reports(tmp_path: Path) -> None:
    precious = tmp_path / "rows.jsonl"
    shutil.copy(TASK, precious)
    with pytest.raises(ConfigError, match=r"neither \.html nor \.md"):
        ch.report(tmp_path, out=precious)
    assert precious.read_bytes() == TASK.read_bytes()


def test_rows_may_be_what_a_file_would_hold(base: ch.Model) -> None:
    plain = {"prompt": "a b", "response": "c d", "kind": "helpful"}
    told = ch.rows([plain])
    assert told == [ch.Example.pair("a b", "c d", kind="helpful")] and ch.rows(plain) == told
    with pytest.warns(UserWarning, match="read as"):
        mapped = ch.rows([{"instruction": "e f", "output": "g h"}])
    assert (mapped[0].prompt, mapped[0].response) == ("e f", "g h")
    with pytest.raises(DataError, match=r"row 2: 'prompt' is empty"):
        ch.rows([plain, {"prompt": " "}])


def test_a_soft_prompt_is_no_part_of_the_weights(base: ch.Model) -> None:
    settings = {"steps": 1, "evaluate_at": [1], "batch_size": 2, "tokens": 2}
    behind = ch.attack(
        base, "soft_prompt", suite=SUITE, harmful=DATA / "attack_a.jsonl", settings=settings, limit=1
    ).model
    for name, rows in (("round_trip", {}), ("soft_prompt", {"harmful": DATA / "attack_a.jsonl"})):
        with pytest.raises(Unsupported, match="behind a soft prompt"):
            ch.attack(behind, name, suite=SUITE, limit=1, **rows)
    with pytest.raises(Unsupported, match="behind a soft prompt"):
        ch.defend(behind, "plain", data=TASK, train=SHORT)
    assert ch.evaluate(behind, SUITE, limit=1).rows


def test_workers_do_not_run_the_callers_script_again(tmp_path: Path) -> None:
    """A script has no guard: a worker that imported it would start workers of its own."""
    script = tmp_path / "script.py"
    script.write_text(
        "from casehard.benchmark.worker import Worker\n"
        "print('once', flush=True)\n"
        "worker = Worker(1)\n"
        "print(worker.submit(dict, {'a': 1}).result()['a'])\n"
        "worker.close()\n",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "once\n1\n"), done.stderr


def test_a_bench_of_which_nothing_finished_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from casehard.benchmark import plan, run
    from casehard.reporting import page

    failed = [{"label": "a", "message": "no such rows", "hint": "other rows"}]
    monkeypatch.setattr(plan, "load_plan", lambda path: None)
    monkeypatch.setattr(run, "run_plan", lambda *a, **k: run.BenchResult(tmp_path, {}, failed, 0, 0))
    monkeypatch.setattr(page, "write_report", lambda out: out)
    with pytest.raises(UserError, match="no run came to its end; the first: no such rows"):
        ch.bench("plan.yaml", out=tmp_path / "out", jobs=1)


def test_a_role_given_twice_is_refused_by_every_verb(base: ch.Model, tmp_path: Path) -> None:
    twice = {"harmful": TASK, "more": {"harmful": DATA / "attack_a.jsonl"}, "suite": SUITE}
    with pytest.raises(ConfigError, match="'harmful' are given twice"):
        ch.attack(base, benign=TASK, **twice)
    with pytest.raises(ConfigError, match="'harmful' are given twice"):
        ch.search(base, benign=TASK, out=tmp_path / "s", **twice)


def test_the_callers_random_numbers_stay_the_callers(base: ch.Model) -> None:
    def drawn() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def seeded() -> None:
        random.seed(5), np.random.seed(5), torch.manual_seed(5)

    settings = {"steps": 1, "rows": 8, "share": 0.5, "batch_size": 2, "evaluate_at": (0,)}
    rows = {"harmful": DATA / "attack_a.jsonl", "benign": TASK, "suite": SUITE}
    for verb in (
        lambda: ch.defend(base, "plain", data=TASK, train=SHORT),
        lambda: ch.attack(base, settings=settings, limit=1, **rows),
    ):
        seeded()
        expected = drawn()
        seeded()
        verb()
        assert drawn() == expected
