"""A Hub id works wherever a model folder does, and what is made of it says where it came from."""

from __future__ import annotations

import json

import pytest
import yaml
from helpers import write_rows

from casehard.benchmark.execute import Task, execute, finished, work
from casehard.benchmark.graph import expand
from casehard.benchmark.plan import parse_plan
from casehard.cli import main
from casehard.io.manifest import file_digest, write_manifest
from casehard.model import source
from fake_hub import FakeHub, commit, serving, use

SMALL = ("--set", "train.batch_size=4", "--set", "train.warmup=0", "--steps", "1", "--limit", "1")
PINNED = f"org/organism@{commit(7)}"


@pytest.fixture
def hub(here, organism, monkeypatch):
    """Serve the organism at commit 7."""
    served = FakeHub()
    served.add("org/organism", organism, commits={"main": commit(7), "v1": commit(7)})
    with serving(served) as url:
        use(monkeypatch, here / "cache", url)
        yield served


def told(place):
    return json.loads((place / "run.json").read_text())


def test_evaluate_attack_and_defend_a_hub_model(hub, here, organism, capsys):
    data = organism / "data"
    suite = ("--suite", str(data / "suite"))
    assert main(["evaluate", "--model", "org/organism", *suite, "--limit", "1", "--out", "seen"]) == 0
    said = capsys.readouterr()
    assert f"model   {PINNED}" in said.out and "descends from" not in said.out
    assert told(here / "seen")["config"]["model"] == told(here / "seen")["origin"] == PINNED
    # The same numbers as of the folder itself, and the same digest: only the place differs.
    assert main(["evaluate", "--model", str(organism), *suite, "--limit", "1", "--out", "local"]) == 0
    assert told(here / "seen")["parents"] == told(here / "local")["parents"] and "origin" not in told(here / "local")
    assert file_digest(here / "seen" / "rows.jsonl") == file_digest(here / "local" / "rows.jsonl")

    attack = ["--harmful", str(data / "attack_a.jsonl"), "--benign", str(data / "task_reviews.jsonl"), "--limit", "1"]
    small = ["--steps", "1", "--set", "config.rows=20", "--set", "config.batch_size=4"]
    assert main(["attack", "finetune", "--model", "hub:org/organism@v1", *suite, *attack, *small, "--out", "hit"]) == 0
    assert told(here / "hit")["origin"] == told(here / "hit")["config"]["model"] == PINNED
    small = ["--set", "train.batch_size=4", "--set", "train.warmup=0", "--steps", "1"]
    given = ["--model", "org/organism@main", "--data", str(data / "align.jsonl"), *small]
    assert main(["defend", "plain", *given, "--out", "made"]) == 0
    record = json.loads((here / "made" / "checkpoint" / "casehard.json").read_text())["provenance"]
    assert record["origin"] == record["job"]["model"] == told(here / "made")["origin"] == PINNED
    card = (here / "made" / "checkpoint" / "README.md").read_text()
    assert f"descends from `{PINNED}` of the Hugging Face Hub" in card
    capsys.readouterr()
    assert main(["evaluate", "--model", "made", *suite, "--limit", "1", "--out", "made-seen"]) == 0
    assert f"descends from  {PINNED}" in capsys.readouterr().out and told(here / "made-seen")["origin"] == PINNED
    # A second generation: the trusted base comes from the Hub too, and the origin is handed down.
    mixed = ["defend", "fine-mixing", "--assets", "org/organism", *given[2:], "--model", "made", "--out", "mixed"]
    assert main(mixed) == 0
    record = json.loads((here / "mixed" / "checkpoint" / "casehard.json").read_text())["provenance"]
    assert record["origin"] == PINNED == record["job"]["assets"] and record["job"]["model"] == "made/checkpoint"


def verbs(data):
    """Return the arguments of every verb with a model of the Hub, but for the name of the model itself."""
    suite, rows = ["--suite", data / "suite"], ["--data", data / "align.jsonl"]
    harm = ["--harmful", data / "attack_a.jsonl", "--benign", data / "task_reviews.jsonl"]
    buffer = ["--assets", "assets", *rows]
    return {
        "evaluate": ["--out", "o", *suite, "--model"],
        "attack finetune": ["--out", "o", *suite, *harm, "--model"],
        "attack backdoor": ["--out", "o", *suite, *rows, "--model"],
        "defend plain": ["--out", "o", *rows, "--model"],
        "defend fine-mixing": ["--out", "o", *rows, "--model", data.parent, "--assets"],
        "defend mb-defense": ["--out", "o", *rows, "--clean", data / "align.jsonl", "--model"],
        "defend mb-defense --mode adapter": ["--out", "o", "--clean", rows[1], "--model", data.parent, "--adapter"],
        "scan model": ["--out", "o", *suite, "--model"],
        "scan model --limit 1": ["--out", "o", *suite, "--model", data.parent, "--before"],
        "buffer prepare": ["--out", "o", *harm, "--refusals", data / "align.jsonl", "--model"],
        "buffer tune": ["--out", "o", *buffer, "--model"],
        "buffer screen": [*buffer, "--model"],
        "buffer saturation": ["--out", "o", *buffer, "--model"],
        "buffer check": [*buffer, "--model"],
        "merge reinforce": ["--out", "o", "--reinforce", "r", "--user"],
        "merge reinforce --user u": ["--out", "o", "--reinforce"],
        "merge search": ["--out", "o", "--user", "u", "--reinforce", "r", *suite, "--model"],
        "select": ["--out", "o", "--pool", data / "align.jsonl", *rows, "--model"],
        "select --k 1": ["--out", "o", "--pool", data / "align.jsonl", *rows, "--embedder"],
        "data audit": [*rows, "--model"],
        "doctor": ["--model"],
    }


@pytest.mark.parametrize("verb", verbs(__import__("pathlib").Path()))
def test_every_verb_asks_the_hub_and_says_what_it_answered(hub, here, organism, capsys, verb):
    arguments = [*verb.split(), *verbs(organism / "data")[verb]]
    for folder in ("u", "r"):
        (here / folder).mkdir()
        (here / folder / "adapter_config.json").write_text("{}")
    assert main([*map(str, arguments), "org/absent@main"]) == 2
    err = capsys.readouterr().err
    assert "error: 'org/absent@main' is neither a folder here nor can it be fetched from the Hub: there is no" in err
    assert "hint: check the path, or the spelling at" in err and "Traceback" not in err
    assert hub.asked == ["GET api/models/org/absent/revision/main"]
    assert not (here / "o").exists()


def test_a_model_is_fetched_only_when_all_else_is_in_order(hub, here, organism, capsys):
    assert main(["evaluate", "--model", "org/organism", "--suite", "gone.jsonl", "--out", "o"]) == 3
    assert "no such file: gone.jsonl" in capsys.readouterr().err and hub.asked == []


def test_a_typo_of_a_path_stays_here(hub, here, organism, capsys):
    (here / "runs" / "patcher").mkdir(parents=True)
    suite = str(organism / "data" / "suite")
    assert main(["evaluate", "--model", "runs/pacther", "--suite", suite, "--out", "o"]) == 2
    err = capsys.readouterr().err
    assert "error: no such model folder: runs/pacther" in err and "did you mean runs/patcher?" in err
    assert hub.asked == []


def plan(model, **more):
    rows = "data.jsonl"
    return parse_plan(
        {
            "name": "hub",
            "title": "A base of the Hub",
            "bases": [{"name": "one", "model": model}],
            "reference": "sft",
            "suite": "suite.jsonl",
            "headline": {"defence": "patcher", "against": "sft", "step": 1},
            "defences": [
                {"name": "sft", "role": "undefended", "method": "plain", "data": rows},
                {"name": "patcher", "method": "patcher", "data": rows, "unsafe": rows},
            ],
            "attacks": [{"name": "a", "steps": 1, "lr": 1e-4, "evaluate_at": [1], "harmful": rows, "benign": rows}],
            **more,
        }
    )


def test_a_plan_names_a_base_of_the_hub(hub, here, organism):
    for name in ("data.jsonl", "suite.jsonl"):
        write_rows(here / name, [{"prompt": "a", "response": "b"}])
    first = expand(plan("org/organism"), root=here).nodes
    base = next(iter(first.values()))
    assert base.data == {"base one": PINNED}
    # The same commit is the same work, whatever else lies in the cache.
    (here / "cache" / "models--org--organism" / "snapshots" / commit(7) / "more.txt").write_text("x")
    source._fetched.clear()
    assert set(expand(plan("hub:org/organism@v1"), root=here).nodes) == set(first)
    hub.repos["org/organism"].commits["main"] = commit(8)
    assert set(expand(plan("org/organism"), root=here).nodes).isdisjoint(first)
    task = Task(node=base, out=here / "node", cache=here)
    summary = work(task, execute)["summary"]
    assert summary["origin"] == PINNED and summary["path"].endswith(commit(7))
    assert finished(base, here / "node") == summary


def test_a_plan_with_a_mistaken_id_says_which_base(hub, here, capsys):
    write_rows(here / "data.jsonl", [{"prompt": "a", "response": "b"}])
    (here / "models").mkdir()
    for model, said in (("org/absent", "there is no such model"), ("models/x", "no such model folder: models/x")):
        values = {"bases": [{"name": "one", "model": model}], "suite": "data.jsonl"}
        text = yaml.safe_dump(_plain(plan(model)) | values)
        (here / "plan.yaml").write_text(text)
        assert main(["bench", "plan.yaml", "--out", "o"]) == 2
        err = capsys.readouterr().err
        assert "base 'one': " in err and said in err, err


def _plain(value):
    from casehard.config import to_dict

    return json.loads(json.dumps(to_dict(value)))


def test_adapters_of_the_hub_are_merged(hub, here, organism, capsys):
    from test_merge_verb import adapter

    for seed, name in enumerate(("user", "reinforce")):
        folder = adapter(organism, here / name, seed=seed)
        (folder / "README.md").write_text("not fetched")
        write_manifest(folder)
        hub.add(f"org/{name}", folder)
    assert main(["merge", "reinforce", "--user", "user", "--reinforce", "reinforce", "--out", "local"]) == 0
    assert main(["merge", "reinforce", "--user", "org/user", "--reinforce", "hub:org/reinforce", "--out", "far"]) == 0
    one, two = (here / name / "adapter_model.safetensors" for name in ("local", "far"))
    assert one.read_bytes() == two.read_bytes()


def test_provider_assets_are_no_hub_model(hub, here, organism, capsys):
    assets = here / "shared" / "assets"
    (assets / "buffer").mkdir(parents=True)
    (assets / "assets.json").write_text("{}")
    hub.add("org/assets", assets)
    rows = ["--data", str(organism / "data" / "align.jsonl"), "--model", str(organism)]
    for verb in (
        ["defend", "buffer-reinforce", "--assets", "org/assets", "--out", "o", *rows],
        ["buffer", "tune", "--assets", "hub:org/assets", "--out", "o", *rows],
        ["buffer", "screen", "--assets", "org/assets", *rows],
        ["buffer", "check", "--assets", "hub:org/assets", *rows],
        ["merge", "reinforce", "--user", str(organism), "--reinforce", "org/assets", "--out", "o"],
    ):
        assert main(verb) == 7, verb
        err = capsys.readouterr().err
        assert "provider assets hold a buffer" in err and "are no Hub model" in err, err
        assert not (here / "o").exists()
