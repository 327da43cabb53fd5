"""``casehard select`` and the defence that follows it, on an untrained organism."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers import make_organism

from casehard.cli import main

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="module")
def organism(tmp_path_factory):
    return make_organism(tmp_path_factory.mktemp("organism"))


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_select_then_defend(organism, tmp_path):
    data, chosen = organism / "data", tmp_path / "chosen"
    arguments = ("--model", organism, "--pool", data / "align.jsonl", "--data", data / "attack_a.jsonl", "--k", "6")
    # In this process: starting another takes longer than the work.
    assert main(["select", *map(str, arguments), "--out", str(chosen), "--cache", str(tmp_path / "cache")]) == 0
    picks, record = lines(chosen / "safe.jsonl"), json.loads((chosen / "selection.json").read_text(encoding="utf-8"))
    pool = lines(data / "align.jsonl")
    assert len(picks) == 6 and [pool[i]["prompt"] for i in record["picks"]["order"]] == [p["prompt"] for p in picks]
    assert len(list((tmp_path / "cache").iterdir())) == 2 and (chosen / "manifest.json").is_file()
    assert record["settings"]["strategy"] == "rd-dpp" and record["pool_rows"] == len(pool)

    steps = (
        "--set",
        "train.steps=2",
        "--set",
        "train.batch_size=4",
        "--set",
        "train.warmup=0",
        "--set",
        "settings.tau=0.5",
    )
    out = tmp_path / "guarded"
    rows = ("--data", data / "benign.jsonl", "--safe", chosen / "safe.jsonl")
    assert main(["defend", "spard", "--model", str(organism), *map(str, rows), *steps, "--out", str(out)]) == 0
    events = lines(out / "events.jsonl")
    assert any("trigger_rate" in json.dumps(e) for e in events)


def test_bad_input_ends_with_an_error_and_no_folder(organism, tmp_path, capsys):
    pool, out = organism / "data" / "align.jsonl", tmp_path / "x"
    cases = (
        (("--pool", pool), 2, "--model is missing"),
        (("--pool", tmp_path / "none.jsonl", "--model", organism), 3, "no such file"),
        (("--pool", pool, "--model", organism), 3, "user's rows"),
        (("--pool", pool, "--model", organism, "--strategy", "best"), 2, "strategy"),
        (("--pool", pool, "--embedder", tmp_path, "--strategy", "diversity"), None, "error"),
    )
    for arguments, code, text in cases:
        found = main(["select", *map(str, arguments), "--out", str(out)])
        told = capsys.readouterr().err
        assert found == code if code else found not in (0, 1)
        assert text in told and "Traceback" not in told and not {p.name for p in tmp_path.iterdir()}
    assert main(["defend", "spard", "--model", str(organism), "--data", str(pool), "--out", str(out)]) == 2
    assert "safe" in capsys.readouterr().err and not out.exists()
    out.mkdir()
    assert main(["select", "--model", str(organism), "--pool", str(pool), "--out", str(out)]) == 2
    assert "already exists" in capsys.readouterr().err


def test_select_is_listed_and_refuses_a_secret(organism, tmp_path, capsys, monkeypatch):
    assert main(["--help"]) == 0 and " select " in capsys.readouterr().out
    monkeypatch.setenv("SOME_TOKEN", "abcdef0123456789")
    rows = ["--model", str(organism), "--pool", str(organism / "data" / "align.jsonl")]
    assert main(["select", *rows, "--set", "text=abcdef0123456789", "--out", str(tmp_path / "x")]) == 2
    assert "SOME_TOKEN" in capsys.readouterr().err


@pytest.mark.skipif(not DATA.is_dir(), reason="real-data fixtures not present")
def test_selection_of_real_refusals_follows_the_task(tmp_path):
    from casehard.data.embed import Embedder
    from casehard.data.select import SelectConfig, select_examples
    from casehard.data.sources import load as read
    from casehard.model.load import load

    loaded = load(DATA / "stories260k")
    embedder = Embedder(loaded.net, loaded.tokenizer, loaded.digest)
    short = lambda name, n: [e for e in read(DATA / name) if len(e.prompt) < 300][:n]  # noqa: E731
    pool, user = short("refusals/train.jsonl", 200), short("sst2/train.jsonl", 100)
    made = {
        s: select_examples(embedder, pool, user, config=SelectConfig(strategy=s, k=12), cache=tmp_path)
        for s in ("rd-dpp", "random", "relevance", "diversity")
    }
    assert made["relevance"].mean_relevance >= made["rd-dpp"].mean_relevance > made["random"].mean_relevance - 0.05
    assert made["diversity"].log_det > made["random"].log_det and made["rd-dpp"].log_det > made["relevance"].log_det


def test_an_embedder_is_checked_as_a_model_is(organism, tmp_path, capsys):
    folder = Path(shutil.copytree(organism, tmp_path / "embedder"))
    config = json.loads((folder / "config.json").read_text())
    given = ["--pool", f"{organism}/data/benign.jsonl", "--embedder", str(folder), "--k", "2", "--beta", "0"]
    for asked, code in (("kernels-community/flash-attn2", 7), ("flash_attention_2", 0)):
        (folder / "config.json").write_text(json.dumps(config | {"_attn_implementation": asked}))
        more = ["--data", f"{organism}/data/attack_a.jsonl", "--out", str(tmp_path / "out")]
        assert main(["select", *given, *more]) == code
    assert "a kernel from the Hub" in capsys.readouterr().err


def test_every_strategy_works_from_the_command_line_and_the_record_tells_the_refusals(organism, tmp_path, capsys):
    data = organism / "data"
    rows = [
        "--model",
        str(organism),
        "--pool",
        f"{data}/align.jsonl?group=colour",
        "--pool",
        f"{data}/align.jsonl?source=b",
        "--data",
        f"{data}/task_reviews.jsonl",
    ]
    for strategy in ("rd-dpp", "matched-random", "k-means", "gradient"):
        out = tmp_path / strategy
        assert main(["select", *rows, "--k", "6", "--strategy", strategy, "--out", str(out)]) == 0
        record = json.loads((out / "selection.json").read_text(encoding="utf-8"))
        kinds = [row["kind"] for row in lines(out / "safe.jsonl")]
        assert record["refusals"]["picked"] == kinds.count("refusal") and len(kinds) == 6
        assert record["picks"]["per_direction"] == 6 / record["picks"]["directions"]
    counts = [
        json.loads((tmp_path / s / "selection.json").read_text())["refusals"] for s in ("rd-dpp", "matched-random")
    ]
    assert counts[0] == counts[1]
    assert "k/d" in capsys.readouterr().out
    plain = ["--model", str(organism), "--pool", f"{data}/benign.jsonl", "--data", f"{data}/task_reviews.jsonl"]
    assert main(["select", *plain, "--k", "2", "--strategy", "matched-random", "--out", str(tmp_path / "x")]) == 3
    assert "refusals" in capsys.readouterr().err and not (tmp_path / "x").exists()
