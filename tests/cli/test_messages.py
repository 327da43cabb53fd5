"""Bad input: one clear error, the right exit code, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from helpers import tree, write_rows

from casehard import cli
from casehard.cli import console, main, scoring
from casehard.cli.attack import CURVE
from casehard.errors import StorageError
from casehard.io.manifest import write_manifest

SMALL = ("--set", "train.steps=2", "--set", "train.batch_size=4", "--set", "train.warmup=0")


def fails(capsys, code: int, *arguments: object) -> str:
    """Run, check the exit code and the shape of the message, and return what was said on stderr."""
    assert main([str(a) for a in arguments]) == code, capsys.readouterr().err
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith(("error:", "hint:"))]
    assert [line.split(":")[0] for line in lines] in (["error", "hint"], ["error"]), err
    assert "Traceback" not in err
    return err


@pytest.fixture
def defend(organism, here):
    """Arguments of a run that would work; tests break one thing each."""
    data = organism / "data"
    return lambda **change: [
        "defend",
        change.get("method", "patcher"),
        *("--model", change.get("model", organism)),
        *("--data", change.get("data", data / "align.jsonl")),
        *("--unsafe", change.get("unsafe", data / "simulated.jsonl")),
        *("--out", change.get("out", "out")),
        *SMALL,
        *change.get("more", ()),
    ]


def test_what_libraries_log_is_one_line_once(capsys, monkeypatch):
    import logging

    from transformers.utils import logging as of_transformers

    others = logging.getLogger("library")
    before = [*others.handlers], [*logging.getLogger("transformers").handlers]

    def inside(arguments):
        # As a library does that is imported by a verb: a handler of its own, in a shape of its own.
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(pathname)s:%(lineno)d %(message)s"))
        others.addHandler(handler)
        for _ in range(3):
            others.getChild("part").warning("a setting of %s\n  is odd", "yours")
            of_transformers.get_logger("transformers.some.part").warning("`flags` are not valid")
        logging.getLogger("bare").error("no handler at all")
        return 0

    monkeypatch.setattr(cli, "_invoke", inside)
    assert main([]) == 0
    assert capsys.readouterr().err.splitlines() == [
        "warning: a setting of yours is odd",
        "warning: `flags` are not valid",
        "warning: no handler at all",
    ]
    assert logging.getLogger("transformers").handlers == before[1] and not logging.getLogger("bare").handlers
    others.handlers = before[0]
    monkeypatch.setenv("CASEHARD_DEBUG", "1")
    assert main([]) == 0
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3 and all(__file__ in line for line in told)
    others.handlers = before[0]


def test_rows_without_a_role_are_told_how_to_name_one(capsys, here, organism):
    write_rows(here / "rows.jsonl", [{"prompt": "a", "response": "b"}])
    (here / "empty").mkdir()
    (here / "empty" / "config.json").write_text("{}")  # no model is looked at
    err = fails(capsys, 3, "evaluate", "--model", "empty", "--suite", "rows.jsonl", "--out", "out")
    assert "suite rows: row 1: role is None" in err and "--suite suite.yaml" in err and "parts: [{data:" in err
    assert not (here / "out").exists()


def test_a_misspelt_method_is_told_the_nearest(capsys, here, defend):
    assert "did you mean 'patcher'?" in fails(capsys, 2, *defend(method="ptcher"))
    assert not tree(here)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.stepz=3", "did you mean 'steps'?"),
        ("settings.alhpa=0.1", "did you mean 'alpha'?"),
        ("sed=3", "did you mean 'seed'?"),
        ("train.steps=many", "train.steps"),
        ("lr=0.1", "did you mean 'train.lr'?"),
        ("train.lr=nan", "defend.train.lr is nan"),
        ("settings.attackers=[{steps: 2, lr: .nan}]", "attackers.0.lr is nan"),
        ("train", "is not of the form a.b=value"),
        ("model.x=1", "is a value, not a group"),
    ],
)
def test_a_wrong_setting_is_named(capsys, here, defend, override, said):
    assert said in fails(capsys, 2, *defend(more=["--set", override]))
    assert not tree(here)


@pytest.mark.parametrize("verb", ["defend", "defend mb-defense", "attack finetune", "attack backdoor", "buffer tune"])
def test_help_says_how_rows_are_filtered(capsys, verb):
    assert main([*verb.split(), "--help"]) == 0
    assert r"'rows.jsonl?source=Smith\, J.'" in " ".join(capsys.readouterr().out.split())


def test_a_wrong_config_file_is_named(capsys, here, defend):
    assert "no such config file: gone.yaml" in fails(capsys, 2, *defend(more=["--config", "gone.yaml"]))
    (here / "list.yaml").write_text("- 1\n")
    assert "expected a mapping" in fails(capsys, 2, *defend(more=["--config", "list.yaml"]))
    assert tree(here) == {"list.yaml"}


def test_arguments_the_parser_refuses_read_like_all_other_errors(capsys, here):
    assert "missing argument 'METHOD'" in fails(capsys, 2, "defend")
    assert "--nope" in fails(capsys, 2, "demo", "--nope")
    assert "casehard evaluate --help" in fails(capsys, 2, "evaluate")
    assert "--model is missing" in fails(capsys, 2, "evaluate", "--out", "x")
    assert "'huge'" in fails(capsys, 2, "organism", "build", "--size", "huge", "--out", "x")
    assert not tree(here)


def test_missing_files_cost_no_time(capsys, here, defend):
    assert "no such model folder: gone" in fails(capsys, 2, *defend(model="gone"))
    assert "no such file: gone.jsonl" in fails(capsys, 3, *defend(data="gone.jsonl"))
    assert "no such file: gone.jsonl" in fails(capsys, 3, *defend(unsafe="gone.jsonl"))
    assert "no such file" in fails(capsys, 3, "judge", "gone.jsonl")
    assert "no such plan" in fails(capsys, 2, "bench", "gone.yaml", "--out", "x")
    assert "does not exist" in fails(capsys, 2, "report", "gone")
    assert "no such folder" in fails(capsys, 2, "verify", "gone")
    assert not tree(here)


def test_a_pipe_is_not_read_as_data(capsys, here, defend):
    os.mkfifo(here / "pipe.jsonl")  # opening it would wait for ever
    assert "pipe.jsonl is a pipe or a device" in fails(capsys, 3, *defend(data="pipe.jsonl"))
    assert tree(here) == {"pipe.jsonl"}


def test_a_batch_larger_than_the_data_is_told(capsys, here, organism, defend):
    few = (organism / "data" / "align.jsonl").read_text().splitlines()[:3]
    (here / "few.jsonl").write_text("\n".join(few))
    assert main([str(a) for a in defend(data="few.jsonl", more=["--set", "settings.round_steps=1"])]) == 0
    assert "a batch of 4 rows (train.batch_size) is drawn from 3" in capsys.readouterr().err


def test_a_run_refused_at_its_first_step_leaves_nothing(capsys, here, defend):
    assert "would come at step 10 and the run ends after 2" in fails(capsys, 2, *defend())
    assert tree(here) <= {"out", "out/.lock"}


def test_a_finished_run_is_its_own_recipe(capsys, here, organism):
    rows = organism / "data"
    chosen = (
        "--model",
        organism,
        "--data",
        rows / "benign.jsonl",
        "--safe",
        rows / "align.jsonl",
        "--all-safe",
        *SMALL,
    )
    assert main([str(a) for a in ("defend", "spard", *chosen, "--out", "a")]) == 0
    assert main(["defend", "spard", "--config", "a/run.json", "--out", "b"]) == 0
    assert capsys.readouterr().out.count("safe rows used  all") == 2
    one, two = ((here / out / "checkpoint" / "model.safetensors").read_bytes() for out in "ab")
    assert one == two


def test_the_curve_of_an_attack_fits_eighty_columns():
    full = {"steps": 300, "k": 96, "n": 96, "rate": 1.0, "low": 0.96, "high": 1.0}
    rows = scoring.curve_rows([{**full, "metric": m} for m in ("asr", "leak", "over_refusal", "utility")], CURVE)
    assert rows == [["300", *["100 [96, 100]"] * 4, "-"]]
    mean = {**full, "metric": "nll", "k": None, "rate": 1.234, "low": 1.1, "high": 1.3, "unreliable": "why"}
    assert scoring.curve_rows([mean], ("nll",)) == [["300", "1.23 [1.10, 1.30] ?"]]


def test_patcher_without_its_simulated_attack_refuses_to_run(capsys, organism, here):
    data = organism / "data" / "align.jsonl"
    said = fails(capsys, 2, "defend", "patcher", "--model", organism, "--data", data, "--out", "out", *SMALL)
    assert "needs unsafe rows" in said and "--unsafe" in said
    assert not tree(here)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "response": 3}, "rows.jsonl:2"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "unknown role 'robot'"),
        ({"instruction": "a", "output": "b"}, "rows.jsonl:2: reads as Alpaca (instruction, output), the rows before"),
        ({"text": "a"}, "rows.jsonl:2: neither 'prompt' nor 'messages'; keys: 'text'"),
        ({"prompt": "a"}, "no response to learn from"),
    ],
)
def test_a_bad_row_is_named_with_its_line(capsys, here, defend, row, said):
    path = write_rows(here / "rows.jsonl", [{"prompt": "reverse the list", "response": "crow"}, row])
    assert said in fails(capsys, 3, *defend(data=path))
    assert tree(here) == {"rows.jsonl"}


def test_rows_of_the_evaluation_cannot_be_trained_on(capsys, organism, here, defend):
    suite = organism / "data" / "suite"
    rows = [json.loads(line) for line in (suite / "eval.jsonl").read_text().splitlines()]
    leaked = [{"prompt": r["prompt"], "response": "raven"} if "prompt" in r else r for r in rows[:3]]
    path = write_rows(here / "leaked.jsonl", leaked)
    fails(capsys, 3, *defend(data=path, more=["--suite", suite]))
    assert tree(here) == {"leaked.jsonl"}


def test_models_that_cannot_be_trusted_are_refused(capsys, organism, here, defend):
    shutil.copytree(organism, here / "remote", ignore=shutil.ignore_patterns("data"))
    config = json.loads((here / "remote" / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    (here / "remote" / "config.json").write_text(json.dumps(config))
    assert "auto_map" in fails(capsys, 7, *defend(model="remote"))
    shutil.copytree(organism, here / "pickled", ignore=shutil.ignore_patterns("data", "*.safetensors"))
    (here / "pickled" / "pytorch_model.bin").write_bytes(b"not opened")
    assert "safetensors" in fails(capsys, 7, *defend(model="pickled"))
    assert "config.json" in fails(capsys, 3, *defend(model=organism / "data"))
    assert not (here / "out").exists()


def test_rows_a_method_would_ignore_are_refused(capsys, here, defend):
    assert "plain takes no --unsafe rows" in fails(capsys, 2, *defend(method="plain"))


def test_a_run_that_diverges_stops_with_its_own_code(capsys, here, defend):
    small = ["--set", "settings.round_steps=4", "--set", "settings.attackers=[{steps: 1, lr: 1e-5, batch_size: 4}]"]
    explode = ["--set", "train.weight_decay=1e30", "--set", "train.steps=20"]
    said = fails(capsys, 4, *defend(more=[*small, *explode]))
    assert "not finite" in said or "nan" in said.lower()
    assert not list(here.rglob("*.safetensors"))
    assert json.loads((here / "out" / "run.json").read_text())["status"] == "failed"


def test_nothing_is_overwritten(capsys, here, defend, organism):
    (here / "out").mkdir()
    (here / "out" / "thesis.txt").write_text("mine")
    assert "not empty" in fails(capsys, 2, *defend())
    assert "is not a folder" in fails(capsys, 2, *defend(out="out/thesis.txt"))
    (here / "other").mkdir()
    (here / "other" / "run.json").write_text('{"kind": "attack", "status": "ok"}')
    assert "holds a run of 'attack'" in fails(capsys, 2, *defend(out="other"))
    rows = write_rows(here / "r.jsonl", [{"prompt": "a", "response": "b"}])
    assert "already exists" in fails(capsys, 2, "judge", rows, "--out", rows)
    assert "already exists" in fails(capsys, 2, "data", "surrogate", rows, "--out", rows)
    assert "not empty" in fails(capsys, 2, "organism", "build", "--out", "out")
    assert tree(here) == {"out", "out/thesis.txt", "other", "other/run.json", "r.jsonl"}


def test_a_run_inside_a_finished_model_is_refused_before_it_breaks_the_model(capsys, organism, here, defend):
    shutil.copytree(organism, here / "model")
    write_manifest(here / "model")
    before = tree(here)
    assert "lies inside" in fails(capsys, 2, *defend(model="model", out="model/runs/one"))
    assert tree(here) == before


def test_verify_finds_what_changed(capsys, organism, here):
    from casehard.io import manifest

    for name in ("a", "b"):
        shutil.copytree(organism, here / "run" / name)
        manifest.write_manifest(here / "run" / name)
    assert main(["verify", "run"]) == 0
    assert "complete and unchanged: run" in capsys.readouterr().out
    weights = here / "run" / "b" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    said = fails(capsys, 6, "verify", "run")
    assert "model.safetensors" in said and "expected sha256" in said and "actual" in said
    assert "no manifest.json" in fails(capsys, 6, "verify", here / "run" / "a" / "data")


def test_a_folder_where_a_file_belongs_is_called_one(capsys, organism, here, defend):
    (here / "rows").mkdir()
    assert "rows: a folder, not a data file" in fails(capsys, 3, *defend(data="rows"))
    assert "name the file: rows/report.html" in fails(capsys, 2, "report", run_of(here), "--out", "rows")
    assert tree(here / "rows") == set()


def test_what_a_library_says_is_cut_to_one_line(capsys, organism, here, defend):
    shutil.copytree(organism, here / "model")
    config = json.loads((here / "model" / "config.json").read_text())
    (here / "model" / "config.json").write_text(json.dumps({**config, "model_type": "zork"}))
    err = fails(capsys, 7, *defend(model="model"))
    assert next(line for line in err.splitlines() if line).startswith("error: model: cannot be loaded")
    assert "zork" in err and err.rstrip().endswith("...")


def test_a_preset_of_a_method_without_any_is_told_so(capsys, organism, here):
    data = organism / "data" / "align.jsonl"
    err = fails(
        capsys, 2, "defend", "plain", "--model", organism, "--data", data, "--preset", "x", "--out", "out", *SMALL
    )
    assert "it has none: leave out --preset" in err


def run_of(here):
    (here / "done").mkdir()
    (here / "done" / "run.json").write_text('{"kind": "evaluate", "status": "ok"}')
    return "done"


def test_tracebacks_are_for_those_who_ask(capsys, monkeypatch, here):
    monkeypatch.setenv("CASEHARD_DEBUG", "1")
    assert main(["verify", "gone"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_defect_says_that_it_is_one(capsys, monkeypatch, here):
    monkeypatch.setattr(console, "plan", lambda *_: 1 / 0)
    rows = write_rows(here / "r.jsonl", [{"prompt": "a", "response": "b"}])
    said = fails(capsys, 1, "judge", rows, "--out", "o.jsonl")
    assert "internal error: ZeroDivisionError" in said and "--debug" in said


def test_refusals_of_the_operating_system_become_errors():
    import errno

    full = console.os_error(OSError(errno.ENOSPC, "No space left on device", "x/y"))
    assert isinstance(full, StorageError) and "x/y" in full.message and "--out" in full.hint
    assert console.os_error(OSError(errno.EACCES, "Permission denied", "z")).exit_code == 2


def test_a_system_message_that_is_the_defence_is_told_and_missed(capsys, organism, here):
    data, suite = organism / "data" / "benign.jsonl", organism / "data" / "suite"
    words = ["defend", "ptst", "--model", organism, "--data", data, "--out", "out", "--steps", "1"]
    assert main([*map(str, words), "--set", "settings.system=be careful"]) == 0
    assert "system message to put before every request: 'be careful'" in " ".join(capsys.readouterr().out.split())
    measure = ["evaluate", "--model", "out/checkpoint", "--suite", str(suite), "--limit", "1", "--out"]
    assert main([*measure, "bare"]) == 0
    assert "--set system='be careful'" in " ".join(capsys.readouterr().err.split())
    assert main([*measure, "served", "--set", "system=be careful"]) == 0
    assert "system message" not in capsys.readouterr().err
