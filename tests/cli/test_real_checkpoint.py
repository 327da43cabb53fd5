"""The commands of docs/how-to/real-checkpoint.md on a real checkpoint and real rows; skips where they are absent."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from casehard.cli import main

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
PAGE = ROOT / "docs" / "how-to" / "real-checkpoint.md"
MODEL = DATA / "stories260k"
# The page's own commands; only the numbers of steps and of tokens are smaller.
TOKENS = ("max_new_tokens: 256", "max_new_tokens: 48")
SHORT = {
    "defend plain": ["--set", "train.steps=6"],
    "defend patcher": [
        *("--set", "train.steps=6"),
        *("--set", "settings.round_steps=2"),
        *("--set", "settings.attackers.0.steps=2"),
    ],
    "attack finetune": ["--set", "config.steps=4"],
}

pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason="real-data fixtures not present")


def head(name: str, n: int, *, start: int = 0, longest: int = 400) -> list[dict]:
    """Return rows of a real file that fit the small model's context."""
    rows = [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]
    short = [r for r in rows if len(r["prompt"]) + len(r.get("response", "")) < longest]
    return short[start : start + n]


def page_commands() -> list[list[str]]:
    """Return the page's casehard commands in order, as words."""
    text = "".join(re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)).replace("\\\n", " ")
    text = text.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "my-model")  # test_hub.py has the ids
    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("casehard")]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the files the page names, filled with real rows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").symlink_to(MODEL)
    files = {
        "refusals.jsonl": head("refusals/train.jsonl", 48),
        "other_refusals.jsonl": head("refusals/train.jsonl", 60, start=48),
        "helpful.jsonl": head("instruct/train.jsonl", 48, longest=300),
        "cover.jsonl": head("instruct/train.jsonl", 400, start=48, longest=300),
        "held_out_refusals.jsonl": head("refusals/dev.jsonl", 8),
        "held_out_helpful.jsonl": head("instruct/dev.jsonl", 8, longest=300),
        "over_refusal.jsonl": head("over_refusal/test.jsonl", 8, longest=200),
        "answers.jsonl": [{**r, "response": r["response"]} for r in head("refusals/dev.jsonl", 24)],
    }
    for name, rows in files.items():
        assert len(rows) >= 8, name
        # The sets' own keys are not the suite's tags, except that ids must be unique.
        kept = [{k: r[k] for k in ("id", "prompt", "response") if k in r} for r in rows]
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert TOKENS[0] in blocks[0]
    (tmp_path / "suite.yaml").write_text(blocks[0].replace(*TOKENS), encoding="utf-8")
    return tmp_path


def test_the_pages_commands_run_on_a_real_checkpoint(workplace, capsys):
    seen = []
    for words in page_commands():
        assert main([*words, *SHORT.get(" ".join(words[:2]), [])]) == 0, (words, capsys.readouterr().err)
        seen.append(words[0])
    assert {"data", "defend", "attack", "evaluate", "report", "judge"} <= set(seen)
    made = json.loads((workplace / "runs" / "patcher-attacked" / "summary.json").read_text())["records"]
    assert {r["defence"] for r in made} == {"patcher"}
    assert {"asr", "over_refusal", "coherence"} <= {r["metric"] for r in made}
    assert not any(r["metric"] == "leak" for r in made), "nobody wrote down what a leak would be"
    cost = json.loads((workplace / "runs" / "patcher" / "summary.json").read_text())["cost"]
    # Two rounds after the first: 2 x 2 attack steps, and 4 attacked passes beside the 6 of plain training.
    assert (cost["steps"], cost["passes"]) == (6, 6 + 4 + 2 * 2)
    html = (workplace / "runs" / "comparison.html").read_text(encoding="utf-8")
    assert "patcher" in html and "plain" in html
    weights = {p.relative_to(workplace).parts[1] for p in (workplace / "runs").rglob("*.safetensors")}
    assert weights == {"patcher", "plain"}
    labels = [json.loads(line)["label"] for line in (workplace / "labelled.jsonl").read_text().splitlines()]
    assert labels.count("refusal") >= 12, "most of these real answers decline"
