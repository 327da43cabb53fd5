"""Run folders say how a run ended, keep rows private and hold no secrets."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from casehard.benchmark.store import RunFolder, read_json, read_rows
from casehard.errors import Corrupt, Interrupted, MissingExtra, UserError


def test_a_run_that_ends_well(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", "attack", {"lr": 1e-4}, seeds=[3], parents={"model": "abc"}) as run:
        assert read_json(tmp_path / "run" / "run.json")["status"] == "running"
        run.event("step", {"loss": 0.5})
        run.rows([{"id": "a", "prompt": "p"}, {"id": "b", "prompt": "q"}])
        run.summary({"k": 1})
    info = read_json(tmp_path / "run" / "run.json")
    assert info["status"] == "ok"
    assert info["seeds"] == [3]
    assert info["parents"] == {"model": "abc"}
    assert info["wall_seconds"] >= 0
    assert info["peak_bytes"] > 10**6
    assert {"python", "torch"} <= info["packages"].keys()
    assert info["hardware"]["cores"] >= 1
    assert "dirty" in info["code"]
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events] == ["started", "step", "ok"]
    assert [row["id"] for row in read_rows(tmp_path / "run" / "rows.jsonl")] == ["a", "b"]


def test_rows_are_readable_by_the_owner_only(tmp_path: Path) -> None:
    with RunFolder(tmp_path, "evaluate", {}) as run:
        run.rows([{"id": "a"}])
        run.rows([{"id": "b"}])
    assert stat.S_IMODE((tmp_path / "rows.jsonl").stat().st_mode) == 0o600
    assert not list(tmp_path.glob("*.part"))


def test_rows_that_cannot_be_made_leave_the_old_ones(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, "evaluate", {})
    run.rows([{"id": "a"}])

    def broken() -> object:
        yield {"id": "b"}
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        run.rows(broken())  # type: ignore[arg-type]
    assert [row["id"] for row in read_rows(tmp_path / "rows.jsonl")] == ["a"]
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("error", "status"),
    [(UserError("bad"), "failed"), (Interrupted("stop"), "interrupted"), (KeyboardInterrupt(), "interrupted")],
)
def test_a_run_that_ends_badly_says_so(tmp_path: Path, error: BaseException, status: str) -> None:
    with pytest.raises(type(error)), RunFolder(tmp_path, "attack", {}):
        raise error
    info = read_json(tmp_path / "run.json")
    assert info["status"] == status
    assert info["error"]


def test_a_run_may_reach_its_end_and_still_be_a_failure(tmp_path: Path) -> None:
    with RunFolder(tmp_path, "bench", {}) as run:
        run.fail("1 of 3 nodes did not finish")
    assert read_json(tmp_path / "run.json")["status"] == "failed"


def test_secrets_of_the_environment_are_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecretvalue")
    monkeypatch.setenv("JUDGE_API_KEY", "sk-another-secret")
    config = {"hub_token": "typed by hand", "note": "uses hf_verysecretvalue", "lr": 1}
    with pytest.raises(UserError), RunFolder(tmp_path, "attack", config) as run:
        run.event("x", {"url": "http://u:sk-another-secret@host"})
        run.rows([{"prompt": "hf_verysecretvalue"}])
        run.summary({"list": [{"deep": "hf_verysecretvalue"}]})
        raise UserError("refused sk-another-secret")
    for file in tmp_path.iterdir():
        text = file.read_text()
        assert "verysecret" not in text
        assert "another-secret" not in text
        assert "typed by hand" not in text
    assert read_json(tmp_path / "run.json")["config"]["lr"] == 1


def test_times_live_in_run_json_and_events_only(tmp_path: Path) -> None:
    written = []
    for name in ("a", "b"):
        with RunFolder(tmp_path / name, "evaluate", {"lr": 1}) as run:
            run.rows([{"id": "a"}])
            run.summary({"k": 1})
        written.append([(tmp_path / name / f).read_bytes() for f in ("rows.jsonl", "summary.json")])
    assert written[0] == written[1]


def test_damage_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"id": 1}\n{"id": \n')
    with pytest.raises(Corrupt, match="line 2"):
        list(read_rows(tmp_path / "rows.jsonl"))
    with pytest.raises(UserError, match="no such file"):
        read_json(tmp_path / "gone.json")
    assert MissingExtra("matplotlib", "report").exit_code == 8
