"""Data as people have it on the command line: one line says how it was read, and --map names columns."""

from __future__ import annotations

import csv
import json

import pytest
from helpers import write_rows

from casehard.benchmark.inputs import resolve
from casehard.cli import main
from casehard.data import sources

SMALL = ("--set", "train.steps=2", "--set", "train.batch_size=4", "--set", "train.warmup=0")
VERBS = [
    ("defend",),
    ("defend", "mb-defense"),
    ("attack", "finetune"),
    ("attack", "backdoor"),
    ("scan", "data"),
    ("scan", "model"),
    ("buffer", "prepare"),
    ("buffer", "tune"),
    ("buffer", "screen"),
    ("buffer", "saturation"),
    ("select",),
    ("data", "audit"),
    ("data", "surrogate"),
]


@pytest.fixture
def rows(organism):
    return [json.loads(line) for line in (organism / "data" / "align.jsonl").read_text().splitlines()][:12]


def notes(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]


def test_a_defence_trains_the_same_rows_whatever_their_layout(capsys, here, organism, rows):
    pairs = [(row["prompt"], row["response"]) for row in rows]
    write_rows(here / "own.jsonl", [{"prompt": p, "response": r} for p, r in pairs])
    write_rows(here / "alpaca.jsonl", [{"instruction": p, "input": "", "output": r} for p, r in pairs])
    talk = [[{"from": "human", "value": p}, {"from": "gpt", "value": r}] for p, r in pairs]
    (here / "chat.json").write_text(json.dumps([{"conversations": turns} for turns in talk]))
    with (here / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("Frage", "Antwort"), *pairs])
    told = {
        "own.jsonl": [],
        "alpaca.jsonl": ["note: alpaca.jsonl: read as Alpaca: instruction -> prompt, output -> response"],
        "chat.json": ["note: chat.json: read as ShareGPT: conversations -> messages"],
        "table.csv": ["note: table.csv: read as prompt and response: Frage -> prompt, Antwort -> response"],
    }
    digests = set()
    for name, lines in told.items():
        more = ["--map", "Frage=prompt", "--map", "Antwort=response"] if name == "table.csv" else []
        out = here / f"out-{name}"
        given = ["defend", "plain", "--model", str(organism), "--data", name, "--out", str(out), *SMALL, *more]
        assert main(given) == 0
        assert notes(capsys) == lines
        made = json.loads((out / "checkpoint" / "casehard.json").read_text())
        digests.add(made["provenance"]["data_digests"]["data"])
    assert len(digests) == 1
    run = json.loads((here / "out-table.csv" / "run.json").read_text())
    spec = "table.csv?map:Frage=prompt&map:Antwort=response"
    assert run["config"]["rows"]["data"] == [spec] and list(run["data"]) == [spec]
    again = ["defend", "plain", "--config", "out-table.csv/run.json", "--out", "again", "--map", "Frage=prompt"]
    assert main(again) == 0
    assert json.loads((here / "again" / "run.json").read_text())["config"]["rows"]["data"] == [spec]


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_that_takes_rows_names_columns(capsys, verb):
    assert main([*verb, "--help"]) == 0
    assert "--map COLUMN=KEY" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (["Frage"], 2, "--map: 'Frage' is not of the form COLUMN=KEY"),
        (["=prompt"], 2, "not of the form COLUMN=KEY"),
        (["Frage=promt"], 2, "did you mean 'prompt'?"),
        (["Frage=prompt", "Frage=response"], 2, "--map: 'Frage' is mapped twice"),
        (["Frage=prompt", "Antwort=prompt"], 2, "both read as 'prompt'"),
        (["Frage=prompt", "Antword=response"], 3, "no row has the column 'Antword'"),
    ],
)
def test_a_map_that_means_nothing_is_refused(capsys, here, organism, given, code, said):
    write_rows(here / "rows.jsonl", [{"Frage": "a", "Antwort": "b"}])
    maps = [part for text in given for part in ("--map", text)]
    assert main(["data", "audit", "--model", str(organism), "--data", "rows.jsonl", *maps]) == code
    assert said in capsys.readouterr().err


def test_maps_of_surrogates_and_of_plans(capsys, here):
    write_rows(here / "rows.jsonl", [{"a=b": "x", "kind": "k"}])
    assert main(["data", "surrogate", "rows.jsonl", "--map", "a=b=prompt", "--out", "made.jsonl"]) == 0
    assert sources.load("made.jsonl")[0].prompt == "x"
    spec = resolve(r"rows.jsonl?map:a\=b=prompt&kind=k", here)
    with pytest.warns(match="a=b -> prompt"):
        assert sources.load(spec)[0].prompt == "x"
