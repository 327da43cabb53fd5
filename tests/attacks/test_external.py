"""An external program: what it gets, what is made of its result, and that nothing of it stays."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

import casehard as ch
from casehard.attacks import external
from casehard.attacks.external import External, ExternalAttack
from casehard.attacks.protocol import AttackInputs
from casehard.cli import main
from casehard.errors import ConfigError, Corrupt, DataError, Refused, Unsupported, UserError
from casehard.io.programs import run_program
from casehard.types import Example

WORLD = Path(ch.__file__).parent / "organism" / "assets" / "world0-tiny"
PROGRAM = Path(__file__).with_name("edit_model.py")


@functools.cache
def organism() -> ch.Model:
    return ch.load(WORLD, device="cpu")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Allow programs, and give the folder in which temporary folders are made; it has to be empty in the end."""
    monkeypatch.setenv("CASEHARD_EXTERNAL", "1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    assert not list(tmp_path.iterdir()), "nothing stays on the disk"


def attack(how: str, **settings):
    command = [sys.executable, str(PROGRAM), "{model}", "{out}", how]
    given = AttackInputs(rows={}, measure=lambda net, at: [{"id": "x"}])
    return External(ExternalAttack(command=tuple(command), **settings)).run(organism(), given)


def test_the_result_is_measured_and_nothing_stays(place: Path) -> None:
    found = attack("0.5")
    after = dict(found.model.net.named_parameters())
    for name, p in organism().net.named_parameters():
        torch.testing.assert_close(after[name], p * (0.5 if name.endswith("o_proj.weight") else 1.0))
    assert found.facts["changed"] == 3 and found.rows == [{"id": "x", "step": 0}]
    assert not found.model.may_leave and found.model.path is None
    assert found.model.tokenizer is organism().tokenizer


@pytest.mark.parametrize(
    ("how", "error", "text"),
    [
        ("fail", UserError, r"failed with exit code 3; stderr ends: said on stderr\n"),
        ("nothing", UserError, r"ended without a model in \{out\}"),
        ("pickle", Unsupported, r"pytorch_model\.bin"),
        ("other", DataError, "made has another tokenizer"),
        ("link", Corrupt, r"made \{out\} as a link"),
    ],
)
def test_what_a_program_does_wrong_is_said(place: Path, how: str, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        attack(how)


def test_a_program_that_does_not_end_is_killed_with_its_children(place: Path) -> None:
    begun = time.monotonic()
    script = f"{sys.executable} -c 'import time; time.sleep(60)' & echo $! > pid; wait"
    with pytest.raises(UserError, match=r"sh did not end within 0\.00\d* minutes and was killed"):
        run_program(["sh", "-c", script], place, seconds=0.5)
    assert time.monotonic() - begun < 20
    assert ended(place), "its child still runs"


def test_a_program_that_leaves_somebody_behind_does_not_keep_the_folder(place: Path) -> None:
    run_program(["sh", "-c", "sleep 60 & echo $! > pid"], place, seconds=20)
    assert ended(place), "its child still runs"


def ended(place: Path) -> bool:
    """Return whether the process whose number stands in ``pid`` ends soon; tidy up."""
    state = Path(f"/proc/{int((place / 'pid').read_text())}/stat")
    for file in ("pid", "stderr"):
        (place / file).unlink()
    for _ in range(100):
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_an_interrupt_kills_the_program_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    class Interrupted(subprocess.Popen):
        def wait(self, timeout=None):
            started.append(self)
            if timeout is not None:
                raise KeyboardInterrupt
            return super().wait()

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        attack("sleep")
    assert started[0].returncode == -9


def test_it_gets_its_rows_and_no_secrets(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    script = (
        "import os, shutil, sys; shutil.copytree(sys.argv[1], sys.argv[2]); "
        "print(sorted(os.listdir(sys.argv[1])), oct(os.stat('.').st_mode)[-3:], os.environ.get('HF_TOKEN'), "
        "open(sys.argv[3]).read().count('compliant'), sys.argv[4], file=sys.stderr); sys.exit(1)"
    )
    command = (sys.executable, "-c", script, "{model}", "{out}", "{harmful}", "{seed}")
    rows = {"harmful": [Example.pair("{out} as it stands", "compliant")]}
    given = AttackInputs(rows=rows, measure=lambda net, at: [], seed=7)
    with pytest.raises(UserError) as error:
        External(ExternalAttack(command=command)).run(organism(), given)
    said = str(error.value)
    assert "700 None 1 7" in said and "model.safetensors" in said and "manifest.json" not in said


def test_nothing_runs_unless_the_environment_allows_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    monkeypatch.delenv("CASEHARD_EXTERNAL", raising=False)
    monkeypatch.setattr(external, "run_program", lambda *given, **more: pytest.fail("ran"))
    with pytest.raises(Refused, match="settings ask to run the program"):
        attack("1.0")
    flags = ["--model", str(WORLD), "--suite", str(WORLD / "data" / "suite"), "--device", "cpu"]
    command = 'config.command=[no-such-program, "{model}", "{out}"]'
    assert main(["attack", "external", *flags, "--set", command, "--out", str(tmp_path / "out")]) == 9
    assert "CASEHARD_EXTERNAL=1" in capsys.readouterr().err


def test_settings_that_could_give_no_result_are_refused(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not name \{out\}"):
        ExternalAttack(command=("x", "{model}"))
    with pytest.raises(ConfigError, match="minutes"):
        ExternalAttack(command=("x", "{model}", "{out}"), minutes=0)
    rows = AttackInputs(rows={"harmful": [Example.pair("p", "a")]}, measure=lambda net, at: [])
    plain = External(ExternalAttack(command=("no-such-program", "{model}", "{out}")))
    with pytest.raises(ConfigError, match=r"\{harmful\} has no place in the command"):
        plain.run(organism(), rows)
    with pytest.raises(ConfigError, match="'no-such-program' cannot be run"):
        plain.run(organism(), AttackInputs(rows={}, measure=lambda net, at: []))
    named = External(ExternalAttack(command=("x", "{model}", "{out}", "{benign}")))
    with pytest.raises(ConfigError, match=r"\{benign\} is named in the command and there are no rows"):
        named.run(organism(), AttackInputs(rows={}, measure=lambda net, at: []))
    assert named.config.filled({"model": "{out}", "out": "o", "benign": "b"}) == ["x", "{out}", "o", "b"]
    assert os.environ["CASEHARD_EXTERNAL"] == "1"
