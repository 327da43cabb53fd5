"""R3, R13, R14, R18: which checkpoint is resumed, which is refused, and what must never be in one."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import warnings

import pytest
import torch

from casehard.errors import ConfigError, Corrupt
from casehard.io.manifest import MANIFEST, verify, write_manifest
from casehard.train.checkpoint import checkpoints, newest, prune, require_complete
from casehard.train.fit import fit
from casehard.train.recipe import TrainConfig, training_arguments
from casehard.train.trainer import HardenedTrainer
from fakes import Averaging, tiny_llama, tiny_rows

ROWS = tiny_rows(8)
CONFIG = TrainConfig(steps=6, batch_size=2, save_every=2, log_every=1, keep=3, precision="fp32")


def run(out, config=CONFIG, seed=0, rows=ROWS, method=None, resume=True, **more):
    return fit(
        tiny_llama(layers=1), None, rows, config=config, seed=seed, out=out, method=method, resume=resume, **more
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    run(out, method=Averaging())
    return out


@pytest.fixture
def out(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "out", symlinks=True)


def _as_newest(out):
    """Return a copy of the newest checkpoint that calls itself a later step."""
    copy = shutil.copytree(out / "checkpoint-6", out / "checkpoint-7")
    state = copy / "trainer_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"global_step": 7}))
    write_manifest(copy)
    return copy


def cut_file(out):
    os.truncate(_as_newest(out) / "optimizer.pt", 100)


def missing_file(out):
    (_as_newest(out) / "scheduler.pt").unlink()


def extra_file(out):
    (_as_newest(out) / "extra.txt").write_text("x")


def flipped_bit(out):
    path = _as_newest(out) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-7] ^= 16
    path.write_bytes(data)


def empty_folder(out):
    (out / "checkpoint-7").mkdir()


def future_step(out):
    _as_newest(out).rename(out / "checkpoint-99")


def symlink(out):
    (out / "checkpoint-7").symlink_to("checkpoint-6")


PLANTS = [cut_file, missing_file, extra_file, flipped_bit, empty_folder, future_step, symlink]


@pytest.mark.parametrize("plant", PLANTS)
def test_the_newest_complete_one_is_chosen(out, plant):
    plant(out)
    planted = checkpoints(out)[0][1].name
    assert planted != "checkpoint-6"
    with pytest.warns(UserWarning, match=planted):
        assert newest(out, last_step=1000) == out / "checkpoint-6"


def test_a_good_later_one_is_chosen_without_a_warning(out):
    copy = _as_newest(out)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert newest(out, last_step=1000) == copy
    with pytest.warns(UserWarning, match="beyond"):
        assert newest(out, last_step=6) == out / "checkpoint-6"


def test_no_complete_one_is_an_error_not_a_fresh_start(out):
    for _, folder in checkpoints(out):
        (folder / MANIFEST).unlink()
    with pytest.raises(Corrupt, match="checkpoint-2"):
        run(out, method=Averaging())
    assert run(out, method=Averaging(), resume=False).budget.steps == 6
    assert newest(out, last_step=6).name == "checkpoint-6"


def test_nothing_there_is_a_fresh_start(tmp_path):
    assert newest(tmp_path / "none", last_step=5) is None


def test_every_flipped_bit_of_a_checkpoint_is_found(out):
    """R4 on a real checkpoint."""
    rng = random.Random(1)
    folder = out / "checkpoint-6"
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for _ in range(50):
        path = rng.choice(files)
        offset, bit = rng.randrange(path.stat().st_size), 1 << rng.randrange(8)
        for _ in range(2):
            with path.open("r+b") as handle:
                handle.seek(offset)
                byte = handle.read(1)[0]
                handle.seek(offset)
                handle.write(bytes([byte ^ bit]))
            if _ == 0:
                with pytest.raises(Corrupt, match=path.name):
                    verify(folder)
    verify(folder)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "shell.json", "trainer_state.json"])
def test_a_checkpoint_without_a_needed_file_is_refused(out, name):
    folder = out / "checkpoint-6"
    (folder / name).unlink()
    write_manifest(folder)
    with pytest.raises(Corrupt, match=name):
        require_complete(folder)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("EVIL",)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("manifest", ["kept", "forged"])
def test_a_planted_pickle_is_never_run(out, name, manifest, monkeypatch):
    monkeypatch.chdir(out)
    for later in ("checkpoint-6", "checkpoint-2"):
        shutil.rmtree(out / later)
    folder = out / "checkpoint-4"
    if name == "optimizer.pt":
        torch.save({"state": Evil()}, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(Evil()))
    if manifest == "forged":
        write_manifest(folder)
    with pytest.raises(Corrupt):
        run(out, method=Averaging())
    assert not (out / "EVIL").exists()


def test_another_run_is_not_continued(out):
    for change in (
        {"seed": 1},
        {"rows": tiny_rows(9)},
        {"config": TrainConfig(steps=6, batch_size=2, save_every=2, lr=1e-5)},
        {"method": None},
    ):
        with pytest.raises(ConfigError, match="another"):
            run(out, **({"method": Averaging()} | change))
    changed = TrainConfig(steps=6, batch_size=2, save_every=3, log_every=1, keep=2, precision="fp32")
    assert run(out, config=changed, method=Averaging()).budget.steps == 6


def test_a_fresh_start_on_top_of_old_checkpoints_is_refused(out):
    arguments = training_arguments(CONFIG, out=out, seed=0)
    made = HardenedTrainer(
        model=tiny_llama(layers=1), args=arguments, train_dataset=ROWS, data_collator=ROWS.collate, method=Averaging()
    )
    with pytest.raises(ConfigError, match="already holds"):
        made.train()
    (out / "checkpoint-6" / "args.json").unlink()
    with pytest.raises(Corrupt, match=r"args\.json"):
        made.train(resume_from_checkpoint=str(out / "checkpoint-6"))


def test_retention_keeps_two_and_verifies_first(out):
    flipped_bit(out)
    with pytest.raises(Corrupt):
        prune(out, keep=2)
    assert len(checkpoints(out)) == 4
    shutil.rmtree(out / "checkpoint-7")
    prune(out, keep=2)
    assert [step for step, _ in checkpoints(out)] == [6, 4]


def test_no_pickled_arguments_and_no_secret_anywhere(tmp_path, monkeypatch):
    """R13, R18: the stock Trainer pickles its arguments, token included, into every checkpoint."""
    secret, key = "hf_ThisIsASecretToken0123", "sk-judge-key-987654321"
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setenv("CASEHARD_JUDGE_API_KEY", key)
    arguments = training_arguments(CONFIG, out=tmp_path, seed=0)
    arguments.hub_token = secret
    arguments.run_name = f"named after {key}"
    made = HardenedTrainer(
        model=tiny_llama(layers=1), args=arguments, train_dataset=ROWS, data_collator=ROWS.collate, method=Averaging()
    )
    made.train()
    made.save_model(str(tmp_path / "export"))
    assert arguments.hub_token == secret
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len([p for p in files if p.name == "model.safetensors"]) == 4
    for path in files:
        assert secret.encode() not in path.read_bytes() and key.encode() not in path.read_bytes(), path
        assert path.suffix not in {".bin", ".pkl"}
    exported = {p.suffix for p in (tmp_path / "export").iterdir()}
    assert exported == {".json", ".safetensors"}
    torch_files = {p.name for p in files if p.suffix in {".pt", ".pth"}}
    assert torch_files == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    kept = json.loads((tmp_path / "checkpoint-6" / "args.json").read_text())
    assert kept["learning_rate"] == CONFIG.lr and "hub_token" not in kept and "run_name" not in kept


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_replicas_go_on_only_as_many_as_saved(out, ranks):
    """Fewer would draw other batches than the run had, more would lack a state of their generator."""
    folder = out / "checkpoint-6"
    for rank in range(4):
        shutil.copy(folder / "rng_state.pth", folder / f"rng_state_{rank}.pth")
    (folder / "rng_state.pth").unlink()
    write_manifest(folder)
    assert require_complete(folder, world_size=4) == 6
    with pytest.raises(ConfigError, match=f"by a run of 4 defending processes, this one has {ranks}"):
        require_complete(folder, world_size=ranks)
