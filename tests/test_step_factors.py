"""The stored speed factors: every timed method has one, and a slower one is told (the timing itself is not a test)."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import step_factors

sys.path.pop(0)


def test_every_side_has_a_stored_factor():
    stored = json.loads(step_factors.STORED.read_text())["factors"]
    assert set(stored) == {name for name, (control, _) in step_factors.sides().items() if name != control}
    assert all(0.8 < factor < 4 for factor in stored.values())
    assert step_factors.slower(stored, stored) == []


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        ({"a": 2.39}, []),
        ({"a": 2.5}, ["a: 2.5, +25% over the stored 2.0"]),
        ({"a": math.nan}, ["a: nan"]),
        ({"a": 2.0, "b": 1.0}, ["b: no stored factor"]),
        ({}, ["a: stored, but no such side"]),
    ],
)
def test_what_rotted_is_named(measured, said):
    found = step_factors.slower(measured, {"a": 2.0})
    assert len(found) == len(said) and all(f.startswith(s) for f, s in zip(found, said, strict=True))


@pytest.mark.slow
def test_a_side_runs_its_method_and_a_slow_one_fails(monkeypatch, capsys, tmp_path):
    kept = ("plain", "patcher, attacked step")
    some = {name: side for name, side in step_factors.sides().items() if name in kept}
    monkeypatch.setattr(step_factors, "sides", lambda: some)
    monkeypatch.setattr(step_factors, "CONTROLS", kept[:1])
    monkeypatch.setattr(step_factors, "STORED", tmp_path / "stored.json")
    monkeypatch.setattr(sys, "argv", ["step_factors.py", "--rounds", "1", "--store"])
    assert step_factors.main() == 0
    written = json.loads((tmp_path / "stored.json").read_text())
    written["factors"]["patcher, attacked step"] = 1e-3
    (tmp_path / "stored.json").write_text(json.dumps(written))
    monkeypatch.setattr(sys, "argv", ["step_factors.py", "--rounds", "1"])
    assert step_factors.main() == 1
    assert "rotted: patcher, attacked step" in capsys.readouterr().err
