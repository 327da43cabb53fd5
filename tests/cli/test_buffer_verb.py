"""``casehard buffer``: assets made, refused and used, on an untrained organism."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from casehard.cli import main
from casehard.data.chat import ChatFormat
from casehard.data.sources import load_many
from casehard.defences.buffer_reinforce.assets import read_assets
from casehard.defences.buffer_reinforce.attach import buffered
from casehard.defences.buffer_reinforce.frozen_lora import FrozenLora, base_layers
from casehard.defences.buffer_reinforce.publish import scan_for_buffer
from casehard.defences.buffer_reinforce.saturation import safety_scores
from casehard.model.load import load
from casehard.model.lora_files import load_pairs, read_marker

SMALL = [
    *("--set", "config.rank=2", "--set", "config.epochs=null", "--set", "config.gates.prompts=3"),
    *("--set", "config.buffer_train.steps=1", "--set", "config.reinforce_train.steps=1"),
    *("--set", "config.buffer_train.warmup=0", "--set", "config.reinforce_train.warmup=0"),
]


def head(source: Path, out: Path, n: int, kind: str = "") -> str:
    lines = [line for line in source.read_text(encoding="utf-8").splitlines() if kind in line]
    out.write_text("\n".join(lines[:n]) + "\n", encoding="utf-8")
    return str(out)


@pytest.fixture(scope="module")
def rows(organism, tmp_path_factory):
    data, folder = organism / "data", tmp_path_factory.mktemp("rows")
    return [
        *("--model", str(organism), "--suite", str(data / "suite")),
        *("--harmful", head(data / "simulated.jsonl", folder / "h.jsonl", 12)),
        *("--refusals", head(data / "align.jsonl", folder / "r.jsonl", 12, '"refusal"')),
        *("--benign", head(data / "align.jsonl", folder / "b.jsonl", 12, '"helpful"')),
    ]


def test_prepare_screen_and_check(organism, rows, tmp_path, capsys):
    out = tmp_path / "assets"
    assert main(["buffer", "prepare", *rows, *SMALL, "--out", str(out)]) == 9
    told = capsys.readouterr()
    assert "nothing is published" in told.err and "buffer_asr" in told.out and "MISSED" in told.out
    assert not out.exists()
    assert main(["buffer", "prepare", *rows, *SMALL, "--preset", "paper", "--allow-missed", "--out", str(out)]) == 0
    record = json.loads((out / "assets.json").read_text(encoding="utf-8"))
    assert record["missed"] and record["job"]["config"]["helpful_share"] == 0.0 and record["layers"] == 5
    told = capsys.readouterr().out
    assert "secret" in told
    common = ["--model", str(organism), "--assets", str(out), "--data", rows[rows.index("--benign") + 1]]
    ranked = tmp_path / "ranked.jsonl"
    harmful = ["--data", rows[rows.index("--harmful") + 1], "--label", "kind", "--positive", "compliance"]
    curve = tmp_path / "roc.svg"
    assert main(["buffer", "screen", *common, *harmful, "--out", str(ranked), "--picture", str(curve)]) == 0
    assert "area under the ROC" in capsys.readouterr().out
    assert curve.read_text(encoding="utf-8").count("area ") >= 4  # both scores, in the legend and for readers
    gains = [json.loads(line) for line in ranked.read_text(encoding="utf-8").splitlines()]
    assert len(gains) == 24 and {g["label"] for g in gains} == {"compliance", "helpful"}
    assert main(["buffer", "check", *common, "--suite", str(organism / "data" / "suite")]) == 0
    assert "rows looked at" in capsys.readouterr().out
    _draws(common, out, tmp_path, capsys)
    assert main(["buffer", "prepare", *rows, *SMALL, "--out", str(out)]) == 2
    assert "already exists" in capsys.readouterr().err
    _tunes(organism, common, out, tmp_path, capsys)


def _draws(common, assets, tmp_path, capsys):
    """The saturation analysis: numbers of both passes, in the model's order of layers, and their picture."""
    out = tmp_path / "saturation"
    assert main(["buffer", "saturation", *common, "--out", str(out)]) == 0
    assert "safety gradient score" in capsys.readouterr().out
    found = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    loaded = load(common[1])
    opened, examples = read_assets(assets), load_many([common[-1]], require_response=True)
    encoded = ChatFormat(loaded.tokenizer).encode_all(examples)
    assert found["layers"] == [name for name in base_layers(loaded.net) if name in opened.reinforce()]
    naive = safety_scores(loaded.net, encoded, opened.reinforce())
    by_name = dict(zip(naive.layers, naive.scores.tolist(), strict=True))
    assert found["without"]["scores"] == pytest.approx([by_name[n] for n in found["layers"]], abs=1e-9)
    with buffered(loaded.net, assets):
        beside = safety_scores(loaded.net, encoded, opened.reinforce())
    by_name = dict(zip(beside.layers, beside.scores.tolist(), strict=True))
    assert found["buffer"]["scores"] == pytest.approx([by_name[n] for n in found["layers"]], abs=1e-6)
    assert found["without"]["scores"] != found["buffer"]["scores"] and found["rows"] == len(examples)
    picture = (out / "saturation.svg").read_text(encoding="utf-8")
    assert picture.startswith("<svg") and "beside the buffer" in picture and "layers below 0" in picture
    assert main(["buffer", "saturation", *common, "--out", str(out)]) == 2
    assert "finished run" in capsys.readouterr().err


def _tunes(organism, common, assets, tmp_path, capsys):
    """The customer's job, by both of its names and by the other method on the same assets."""
    job, suite = tmp_path / "job", organism / "data" / "suite"
    train = ["--set", "train.batch_size=4", "--set", "train.lr=0.01", "--set", "lora.rank=2", "--set", "train.warmup=0"]
    settings = [*common, *train, "--steps", "2", "--suite", str(suite)]
    assert main(["defend", "buffer-reinforce", *settings, "--preset", "paper", "--out", str(job)]) == 0
    assert not (job / "training").exists() and not scan_for_buffer(job, assets)
    assert read_marker(job / "adapter")["role"] == "merged"
    record = json.loads((job / "adapter" / "job.json").read_text(encoding="utf-8"))
    assert (record["job"]["method"], record["settings"]["merge"]["basis"]) == ("buffer_reinforce", "paper")
    assert len(record["trained_prompts"]) >= 12
    _loads_in_plain_peft(organism, job / "adapter")
    run = json.loads((job / "run.json").read_text(encoding="utf-8"))
    assert (run["kind"], run["status"]) == ("tune", "ok")
    assert main(["defend", "buffer_reinforce", *settings, "--out", str(job)]) == 2
    assert "finished run" in capsys.readouterr().err
    again = [*common, *train, "--set", "train.steps=2", "--set", "preset=paper", "--set", f"suite={suite}"]
    assert main(["buffer", "tune", *again, "--out", str(tmp_path / "again")]) == 0
    weights = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (job, tmp_path / "again")]
    assert weights[0] == weights[1]
    vector = tmp_path / "vector"
    assert main(["defend", "security-vector", *settings, "--set", "settings.c=0.5", "--out", str(vector)]) == 0
    assert read_marker(vector / "adapter")["role"] == "user" and not scan_for_buffer(vector, assets)
    assert json.loads((vector / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))["r"] == 2
    found = ["merge", "search", "--user", str(vector / "adapter"), "--reinforce", str(assets), *common[:2]]
    asked = tmp_path / "asked.jsonl"
    source = [json.loads(line) for line in Path(common[-1]).read_text(encoding="utf-8").splitlines()][:1]
    asked.write_text("".join(json.dumps({**row, "role": "lookalike"}) + "\n" for row in source), encoding="utf-8")
    assert main([*found, "--suite", str(asked), "--out", str(tmp_path / "found")]) == 3
    assert "was trained on 1 of the 1 prompts" in capsys.readouterr().err
    found[found.index("--user") + 1] = str(job / "adapter")
    assert main([*found, "--suite", str(suite), "--out", str(tmp_path / "found")]) == 2
    assert "merged already" in capsys.readouterr().err
    assert not (tmp_path / "found" / "run.json").exists()
    for extra, told in (
        (["--safe", common[-1]], "takes no --safe rows"),
        (["--select"], "no safe rows to choose from"),
        (["--preset", "best"], "no preset 'best'"),
        (["--assets", str(organism)], "no assets.json"),
        (["--set", "settings.merge.alfa=1"], "did you mean 'alpha'?"),
    ):
        assert main(["defend", "buffer-reinforce", *settings, *extra, "--out", str(tmp_path / "no")]) == 2
        assert told in capsys.readouterr().err
        assert not (tmp_path / "no").exists()
    without = [*common[:2], *common[4:]]
    assert main(["defend", "buffer-reinforce", *without, "--out", str(tmp_path / "no")]) == 2
    assert "--assets is missing" in capsys.readouterr().err
    assert main(["defend", "bufer-reinforce", *settings, "--out", str(tmp_path / "no")]) == 2
    assert "did you mean 'buffer_reinforce'?" in capsys.readouterr().err


def _loads_in_plain_peft(organism, adapter):
    """The adapter alone, in PEFT, computes what its factors say on a base that never met a buffer."""
    base = load(organism).net
    ids = torch.tensor([[5, 9, 11, 17]])
    attached = FrozenLora(load_pairs(adapter)).attach(base, fold=False)
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        attached.detach()
        model = PeftModel.from_pretrained(base, str(adapter)).eval()
        assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-5)
    assert set(model.peft_config) == {"default"} and model.peft_config["default"].lora_alpha == 4


def test_bad_input_is_told(organism, rows, tmp_path, capsys):
    out = str(tmp_path / "x")
    cases = (
        (["prepare", "--out", out], "--model is missing"),
        (["prepare", "--model", str(organism), "--harmful", "none.jsonl", "--out", out], "no such file"),
        (["prepare", *rows, "--preset", "best", "--out", out], "preset 'best'"),
        (["prepare", *rows, "--set", "config.rnak=2", "--out", out], "did you mean 'rank'"),
        (["screen", *rows[:2], "--assets", out, "--data", rows[-1], "--label", "kind"], "go together"),
        (["screen", *rows[:2], "--assets", out, "--data", rows[-1]], "no assets.json"),
        (["screen", *rows[:2], "--assets", out, "--data", rows[-1], "--picture", f"{out}.svg"], "needs labels"),
        (["saturation", *rows[:2], "--assets", out, "--data", rows[-1], "--out", out], "no assets.json"),
        (["saturation", *rows[:2], "--assets", out, "--data", "none.jsonl", "--out", out], "no such file"),
    )
    for arguments, text in cases:
        assert main(["buffer", *arguments]) not in (0, 1)
        told = capsys.readouterr().err
        assert text in told and "Traceback" not in told, told
    assert not any(p.is_dir() for p in tmp_path.iterdir())
