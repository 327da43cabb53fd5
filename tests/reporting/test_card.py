"""Model cards say what a checkpoint is, what was measured and what it is not; the checkpoint still verifies."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from bench_fakes import Fake, plan

from casehard.benchmark.execute import Outcome, Task
from casehard.benchmark.run import run_plan
from casehard.defences import DEFENCES
from casehard.errors import Corrupt, UserError
from casehard.io import files
from casehard.io.files import staged
from casehard.io.manifest import verify, write_manifest
from casehard.reporting import card
from casehard.reporting.card import model_card, write_card
from casehard.reporting.page import write_report

RECORD = {
    "digest": "d" * 64,
    "parent": "p" * 64,
    "method": "patcher",
    "versions": {"torch": "2.13.0"},
    "provenance": {
        "seed": 3,
        "data_digests": {"data": "a" * 64, "unsafe": "b" * 64},
        "settings": {"alpha": 0.5, "attackers": [{"steps": 10}]},
        "job": {"train": {"steps": 300}},
    },
}


class Maker(Fake):
    """A fake whose checkpoints carry a record, as real ones do."""

    def __call__(self, task: Task) -> Outcome:
        """Add casehard.json to what the fake made."""
        done = super().__call__(task)
        if task.node.kind == "defend":
            with staged(Path(done.path)) as folder:
                (folder / "casehard.json").write_text(json.dumps(RECORD))
        return done


def checkpoint(folder: Path) -> Path:
    with staged(folder) as staging:
        (staging / "casehard.json").write_text(json.dumps(RECORD))
        (staging / "sub").mkdir()
        (staging / "sub" / "weights").write_text("w")
    return folder


def test_a_card_says_that_weights_were_attacked_on_their_way() -> None:
    told = model_card(RECORD | {"provenance": {"attacked": ["patcher", "finetune-attack"]}})
    assert "was attacked on its way: patcher, then finetune-attack" in told
    assert "attacked on its way" not in model_card(RECORD)


def test_a_card_names_everything_a_sceptic_asks_for() -> None:
    measured = [
        {"attack": "a", "steps": 25, "metric": "leak", "k": 3, "n": 96, "rate": 3 / 96, "low": 0.01, "high": 0.09}
    ]
    text = model_card(RECORD, measured, titles={"a": "full-parameter attack"})
    for words in (
        "**patcher**",
        "p" * 64,
        "a" * 64,
        "seed: 3 (single seed)",
        "alpha: 0.5",
        "train.steps: 300",
        "| full-parameter attack, step 25 | leaked restricted content | 3.1 % | 1.0 to 9.0 % | 3/96 |",
        "does not prevent it",
        "jailbreaks without training",
    ):
        assert words in text, words
    assert "Nothing was measured" in model_card(RECORD)


def test_a_card_says_which_rates_are_unreliable_and_what_was_half_refused() -> None:
    base = {"attack": "none", "steps": 0, "k": 0, "n": 3, "rate": 0.0, "low": 0.0, "high": 0.7}
    doubted = {**base, "metric": "asr", "unreliable": "97 of 100 rows are unscored | so"}
    half = {**base, "metric": "partial", "k": 2, "rate": 2 / 3}
    text = model_card(RECORD, [doubted, half, {**base, "metric": "leak"}, {**half, "k": 0, "rate": 0.0}])
    rows = [line for line in text.splitlines() if line.startswith("| before any attack")]
    assert rows == [
        "| before any attack | answered restricted prompts | 0 % (unreliable: 97 of 100 rows are unscored \\| so) "
        "| 0 to 70 % | 0/3 |",
        "| before any attack | restricted prompts declined, then answered in part | 67 % | 0 to 70 % | 2/3 |",
        "| before any attack | leaked restricted content | 0 % | 0 to 70 % | 0/3 |",
    ]


@pytest.mark.parametrize(
    ("method", "title", "said"),
    [
        ("patcher", "# Hardened with patcher", "keep its refusals longer"),
        ("spard", "# Hardened with spard", "kept its parent's refusals"),
        ("plain", "# Made with plain", "no defence in it"),
        ("ptst", "# Made with ptst", "has to be put before every request"),
        ("crow", "# Made with crow", "was not hardened against fine-tuning"),
    ],
)
def test_a_card_promises_only_what_the_method_is_for(method: str, title: str, said: str) -> None:
    text = model_card({**RECORD, "method": method})
    assert text.startswith(title)
    assert said in text


@pytest.mark.parametrize("method", DEFENCES)
def test_every_method_says_what_it_is_for(method: str) -> None:
    assert DEFENCES[method].purpose in model_card({**RECORD, "method": method})


def test_a_method_that_nobody_here_knows_is_not_called_hardening() -> None:
    text = model_card({**RECORD, "method": "somebodys"})
    assert text.startswith("# Made with somebodys") and "not known here" in text


def test_a_card_cannot_be_written_by_its_data() -> None:
    text = model_card({**RECORD, "method": "<script>x</script> | [a](javascript:b)\n# Title"})
    assert "<script>" not in text
    assert "\n# Title" not in text
    assert "\\[a]" in text


def test_a_card_is_covered_by_the_manifest(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    path = write_card(folder)
    verify(folder)
    assert "patcher" in path.read_text()
    assert (folder / "sub" / "weights").read_text() == "w"
    write_card(folder, "# Another")
    verify(folder)
    assert path.read_text() == "# Another"
    path.write_text("# Tampered")
    with pytest.raises(Corrupt):
        write_card(folder)


@pytest.mark.parametrize("system", ["all it can", "no exchange", "no links"])
def test_a_checkpoint_is_never_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    folder = checkpoint(tmp_path / "model")
    (folder / "sub" / "README.md").write_text("another readme")
    write_manifest(folder)
    whole: list[bool] = []

    def watch(point: str) -> None:
        whole.append((folder / "casehard.json").is_file() and (folder / "sub" / "weights").is_file())

    def no_links(*paths: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(files, "crash_point", watch)
    if system == "no exchange":
        monkeypatch.setattr(files, "swap", lambda fresh, old: False)
    if system == "no links":
        monkeypatch.setattr(card.os, "link", no_links)
    write_card(folder, "# Card")
    verify(folder)
    assert (folder / "README.md").read_text() == "# Card"
    assert (folder / "sub" / "README.md").read_text() == "another readme"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert len(whole) > 2
    assert all(whole) == (system != "no exchange" and sys.platform in ("linux", "darwin"))


def test_a_failed_exchange_leaves_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(tmp_path / "model")
    monkeypatch.setattr(files, "swap", lambda fresh, old: False)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.parent.name == f".staging-model-{os.getpid()}" and target == folder:
            raise OSError("pulled out")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="pulled out"):
        write_card(folder, "# Card")
    verify(folder)
    assert not (folder / "README.md").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_foreign_folder_gets_no_card(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no casehard\.json"):
        write_card(tmp_path)


def test_a_benchmark_writes_the_cards_of_its_checkpoints(tmp_path: Path) -> None:
    run_plan(plan(seeds=[0]), tmp_path, jobs=1, executor=Maker())
    write_report(tmp_path)
    cards = list((tmp_path / "nodes").glob("defend-*/checkpoint/README.md"))
    assert len(cards) == 2
    assert all("before any attack | utility" in path.read_text() for path in cards)
    again = run_plan(plan(seeds=[0]), tmp_path, jobs=1, executor=Maker())
    assert again.ran == 0
