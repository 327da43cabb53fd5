"""What a save needs is tried before the first step: no run ends with weights that cannot be written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_model_load import edit, words
from transformers import GenerationConfig, PreTrainedTokenizerFast

import casehard
from buffer_fakes import make_assets
from casehard.cli import attack as planting
from casehard.defences.buffer_reinforce import prepare as preparing
from casehard.defences.buffer_reinforce.frozen_lora import fingerprints
from casehard.defences.mb_defense import run as mending
from casehard.errors import StorageError, Unsupported, UserError
from casehard.io.files import scratch
from casehard.model.digest import tokenizer_digests
from casehard.model.generation import mend_generation
from casehard.model.load import load
from casehard.model.save import rehearse, save
from casehard.steps import Finetune, harden
from casehard.train.recipe import TrainConfig
from fakes import tiny_llama

WORLD = Path(casehard.__file__).parent / "organism" / "assets" / "world0-tiny"
ROWS, ALIGN, SUITE = f"{WORLD}/data/benign.jsonl", f"{WORLD}/data/align.jsonl", f"{WORLD}/data/suite"
GREEDY = {"eos_token_id": 2, "temperature": 0.6, "top_p": 0.9}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def plain(model: Path, out: Path) -> Any:
    rows = out.parent / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"w{i}", "response": "world"}) + "\n" for i in range(10, 20)))
    train = TrainConfig(steps=2, warmup=0, batch_size=2)
    step = Finetune(model=str(model), method="plain", rows={"data": (str(rows),)}, train=train, device="cpu")
    return harden(step, out)[1]


@pytest.mark.parametrize(
    "extra", [{}, {"do_sample": False}, {"pad_token_id": None, "bos_token_id": 1}], ids=["plain", "greedy", "no-pad"]
)
def test_sampling_options_without_do_sample_do_not_end_a_run(
    folder: Path, tmp_path: Path, extra: dict[str, Any]
) -> None:
    (folder / "generation_config.json").write_text(json.dumps(GREEDY | extra))
    with pytest.warns(UserWarning, match="sets sampling options without do_sample: do_sample is set to true"):
        made = plain(folder, tmp_path / "out")
    written = json.loads((made.path / "generation_config.json").read_text())
    assert written["do_sample"] is True and written["temperature"] == 0.6 and written["eos_token_id"] == 2
    assert load(made.path).digest == made.digest


@pytest.mark.parametrize(
    ("settings", "dropped"),
    [
        ({"length_penalty": 2.0, "early_stopping": True}, {"length_penalty", "early_stopping"}),
        ({"temperature": 0.6, "length_penalty": 2.0}, {"temperature", "length_penalty"}),
        ({"cache_implementation": "no-such-thing", "top_k": 5, "do_sample": True}, {"cache_implementation"}),
        ({"num_beams": 2, "num_return_sequences": 3}, {"num_return_sequences"}),
        ({"max_new_tokens": -4, "repetition_penalty": 1.1}, {"max_new_tokens"}),
        ({"pad_token_id": -1}, {"pad_token_id"}),
    ],
    ids=["beams", "penalty", "cache", "sequences", "length", "pad"],
)
def test_a_generation_config_at_odds_keeps_all_that_goes_together(settings: dict[str, Any], dropped: set[str]) -> None:
    model = SimpleNamespace(generation_config=GenerationConfig())
    vars(model.generation_config).update(settings)
    (note,) = mend_generation(model)
    assert f": {', '.join(sorted(dropped))} left out" in note
    model.generation_config.validate(strict=True)
    for key in settings.keys() - dropped:
        assert getattr(model.generation_config, key) == settings[key]
    assert not list(mend_generation(model))


def test_a_good_generation_config_is_left_alone() -> None:
    settings = GenerationConfig(do_sample=True, temperature=0.6, eos_token_id=[1, 2])
    model = SimpleNamespace(generation_config=settings)
    assert not list(mend_generation(model)) and model.generation_config is settings


# -- before the first step ------------------------------------------------------------------------------------------


def never(*_: object, **__: object) -> None:
    raise AssertionError("a step was taken")


def defend(out: Path) -> None:
    harden(Finetune(model=str(WORLD), method="plain", rows={"data": (ROWS,)}, device="cpu"), out)


def mend(out: Path) -> None:
    rows = {"clean": (f"{WORLD}/data/task_reviews.jsonl",), "data": (ROWS,)}
    mending.run_mb(mending.MbRun(model=str(WORLD), rows=rows), out)


def prepare(out: Path) -> None:
    rows = {"harmful": f"{WORLD}/data/simulated.jsonl", "refusals": f"{ALIGN}?kind=refusal"}
    files = {name: (file,) for name, file in (rows | {"benign": f"{ALIGN}?kind=helpful"}).items()}
    preparing.prepare(preparing.Prepare(model=str(WORLD), device="cpu", rows=files), out / "assets")


def tune(out: Path) -> None:
    loaded = load(WORLD)
    digests = dict(zip(("tokenizer_digest", "template_digest"), tokenizer_digests(loaded.tokenizer), strict=True))
    place = out.parent if out.parent.is_dir() else out.parent.parent
    make_assets(place / "given", base_fingerprints=fingerprints(loaded.net), **digests)
    given = {"assets": str(place / "given"), "rows": {"data": (ROWS,)}}
    step = Finetune(model=str(WORLD), method="buffer_reinforce", device="cpu", **given)
    step.run(out=out / "training", place=out / "adapter")


def plant(out: Path) -> None:
    values = {"model": str(WORLD), "rows": {"data": [f"{WORLD}/data/benign.jsonl"]}, "suite": SUITE, "device": "cpu"}
    planting.run("backdoor", values, out, keep_model=True)


@pytest.fixture
def no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((mending, "harden"), (preparing, "_both")):
        monkeypatch.setattr(module, name, never)
    monkeypatch.setattr("casehard.train.tune.fit", never)


@pytest.mark.parametrize("run", [defend, mend, prepare, tune], ids=lambda f: f.__name__)
def test_a_place_that_takes_no_folder_is_told_first(
    run: Callable[[Path], None], tmp_path: Path, no_steps: None
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write to .*file: Not a directory"):
        run(tmp_path / "file" / "out")


@pytest.mark.parametrize("run", [defend, mend, tune, plant], ids=lambda f: f.__name__)
def test_a_disk_without_room_is_told_first(
    run: Callable[[Path], None], tmp_path: Path, no_steps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage
    # Room for the weights, but not for those and a checkpoint of the training.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=1_600_000))
    with pytest.raises(StorageError, match="free 1,600,000 bytes"):
        run(tmp_path / "out")


@pytest.mark.parametrize("run", [defend, mend, plant], ids=lambda f: f.__name__)
def test_a_tokenizer_that_cannot_be_written_is_told_first(
    run: Callable[[Path], None], tmp_path: Path, no_steps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("no such vocabulary")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", broken)
    with pytest.raises(Unsupported, match="could not be saved once it is trained: no such vocabulary"):
        run(tmp_path / "out")
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".staging")]


def test_a_configuration_that_cannot_be_written_is_told_first(folder: Path, tmp_path: Path, no_steps: None) -> None:
    edit(folder / "config.json", to_json_file="a word that is also a method")
    with pytest.raises(Unsupported, match="could not be saved once it is trained"):
        plain(folder, tmp_path / "out")


def test_a_taken_place_is_told_first(folder: Path, tmp_path: Path, no_steps: None) -> None:
    (tmp_path / "out" / "checkpoint").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="exists and was not made by casehard"):
        plain(folder, tmp_path / "out")
    (tmp_path / "assets").write_text("")
    with pytest.raises(UserError, match="holds no provider assets"):
        prepare(tmp_path)


def test_a_rehearsal_leaves_nothing_and_changes_nothing(folder: Path, tmp_path: Path) -> None:
    loaded = load(folder)
    whence: dict[str, Any] = {"parent": "", "provenance": {"seed": 1}}
    first = save(loaded.net, loaded.tokenizer, tmp_path / "a", method="m", **whence)
    before = sorted(tmp_path.rglob("*"))
    rehearse(loaded.net, loaded.tokenizer, tmp_path / "deep" / "er" / "b", **whence)
    assert sorted(tmp_path.rglob("*")) == before
    second = save(loaded.net, loaded.tokenizer, tmp_path / "b", method="m", **whence)
    assert first.digest == second.digest
    with scratch(tmp_path / "c") as place:
        assert place.parent == tmp_path
    assert not place.exists() and not (tmp_path / "c").exists()


def test_a_generation_config_with_values_of_nothing_is_told_on_loading(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"max_new_tokens": -4}')
    with pytest.raises(Unsupported, match="`max_new_tokens` must be greater than 0"):
        load(folder)
