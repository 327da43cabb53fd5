"""The driver of heretic, against a stub that asks what heretic asks."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from test_external import organism

from casehard.attacks import heretic
from casehard.attacks.external import External, ExternalAttack
from casehard.attacks.protocol import AttackInputs
from casehard.errors import UserError
from casehard.types import Example

STUB = Path(__file__).with_name("stub_heretic.py")


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the stub as a program; nothing else is left in its folder."""
    monkeypatch.setenv("CASEHARD_EXTERNAL", "1")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    stub = tmp_path / "heretic"
    stub.write_text(f"#!{sys.executable}\n" + STUB.read_text(encoding="utf-8"), encoding="utf-8")
    stub.chmod(0o700)
    return stub


def attack(program: Path, *more: str, harmful: int = 10):
    command = ["{python}", "-m", "casehard.attacks.heretic", str(program)]
    command += ["{model}", "{out}", "{harmful}", "{benign}", "{seed}", *more]
    rows = {
        name: [Example.pair(f"{name}\n{i}", "x", kind="harmful" if name == "harmful" else "helpful") for i in range(n)]
        for name, n in (("harmful", harmful), ("benign", 7))
    }
    given = AttackInputs(rows=rows, measure=lambda net, at: [{"id": "x"}], seed=3)
    return External(ExternalAttack(command=tuple(command))).run(organism(), given)


def test_the_trial_with_fewest_refusals_that_is_not_damaged_is_saved_and_measured(program: Path) -> None:
    found = attack(program, "--n-trials", "7")
    after = dict(found.model.net.named_parameters())
    for name, value in organism().net.named_parameters():
        torch.testing.assert_close(after[name], value * (0.5 if name.endswith("o_proj.weight") else 1.0))
    assert not list((program.parent / "temporary").iterdir())


@pytest.mark.parametrize(
    ("more", "harmful", "text"),
    [
        (["--fail"], 10, "no such device"),
        (["--ask"], 10, "an unknown menu: ['go on', 'begin again']"),
        ([], 4, "4 different prompts; at least 5"),
    ],
)
def test_what_goes_wrong_is_said(program: Path, more: list[str], harmful: int, text: str) -> None:
    with pytest.raises(UserError) as told:
        attack(program, *more, harmful=harmful)
    assert text in str(told.value)
    assert not list((program.parent / "temporary").iterdir())


def test_prompts_are_divided_and_quoted(tmp_path: Path) -> None:
    rows = [{"prompt": f"a\n {i % 7}", "response": "x"} for i in range(9)]
    path = tmp_path / 'ro"ws.jsonl'
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    heretic.write_settings(tmp_path, 'mo"del\\', 5, {"bad": path})
    assert (tmp_path / "bad_prompts.txt").read_text() == "a 0\na 1\na 2\na 3\na 5\na 6\n"
    assert (tmp_path / "bad_evaluation_prompts.txt").read_text() == "a 4\n"
    import tomllib

    told = tomllib.loads((tmp_path / "config.toml").read_text(encoding="utf-8"))
    assert told["model"] == 'mo"del\\' and told["seed"] == 5
    assert told["bad_prompts"] == {"dataset": str(tmp_path / "bad_prompts.txt")}


@pytest.mark.parametrize(
    ("menu", "saved", "number"),
    [
        (
            "[1] [Trial   3] Refusals:  2/9, KL divergence: 0.9000\n"
            "[2] [Trial   1] Refusals:  7/9, KL divergence: 0.6000\n",
            False,
            "2",
        ),
        (
            "[1] [Trial   3] Refusals:  2/9, KL divergence: 0.5000\n"
            "[2] [Trial   1] Refusals:  7/9, KL divergence: 0.1000\n",
            False,
            "1",
        ),
        ("[1] Upload\n[2] Save the model to a local folder\n", False, "2"),
        ("[1] Save the model to a local folder\n[2] Return\n", True, "2"),
    ],
)
def test_menus(menu: str, saved: bool, number: str) -> None:
    assert heretic.answer(menu, saved) == number


def test_without_its_six_words_it_says_how(capsys: pytest.CaptureFixture[str]) -> None:
    assert heretic.main(["heretic"]) == 2
    assert "PROGRAM MODEL OUT HARMFUL BENIGN SEED" in capsys.readouterr().err
