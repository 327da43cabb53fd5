"""A model sharded over two gloo ranks stops and goes on: each rank writes its own shards, and nothing is lost or bent.

The two ranks run every case once and leave what they saw in files. The tied embedding has 63 rows, which two ranks
share as 32 and 31, and one small model leaves a rank without a row.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainingArguments

from casehard.data.batches import collate
from casehard.defences.patcher import Patcher, PatcherConfig
from casehard.defences.patcher.snapshots import Snapshots
from casehard.distributed.fsdp import local_weights
from casehard.distributed.ranks import local
from casehard.errors import ConfigError, Corrupt, Interrupted, StorageError, Unsupported, UserError
from casehard.io.locks import lock
from casehard.maths.bilevel import Attacker
from casehard.train import checkpoint, shards
from casehard.train import fit as fitting
from casehard.train import trainer as shell
from casehard.train.fit import fit
from casehard.train.recipe import TrainConfig
from casehard.train.trainer import HardenedTrainer
from fakes import tiny_llama, tiny_rows
from forks import spawn

pytestmark = pytest.mark.slow
STEPS, STOP = 6, 3
LONG = datetime.timedelta(seconds=90)  # two ranks that wait for each other without end must fail, not hang
ROWS, UNSAFE, RETAIN = tiny_rows(24, vocab=63, seed=1), tiny_rows(8, vocab=63, seed=2), tiny_rows(9, vocab=63, seed=3)


def model():
    from casehard.model.shard import shard

    whole = tiny_llama(vocab=63, dropout=0.1)
    whole.config.tie_word_embeddings = True
    whole.tie_weights()
    if torch.distributed.is_initialized():
        shard(whole, 2, torch.device("cpu"))
    return whole


def run(out: Path | None, *, steps: int = STEPS, save_every: int = 0, on_step=None) -> dict:
    """Harden a fresh model, or go on in ``out``; log rows of four steps, so that a stop at step 3 falls inside one."""
    settings = {"round_steps": 2, "attackers": (Attacker(steps=2, lr=1e-2, batch_size=3),), "retain": "kl"}
    patcher = Patcher(PatcherConfig(**settings, delta_dtype="float32"), unsafe=UNSAFE, retain=RETAIN)
    config = TrainConfig(steps=steps, batch_size=2, lr=1e-3, warmup=2, save_every=save_every, keep=3, log_every=4)
    done = fit(model(), None, ROWS, config=config, method=patcher, seed=0, out=out, on_step=on_step)
    weights = {name: p.clone() for name, p in local_weights(done.model).items()}
    return {"weights": weights, "log": done.log, "tokens": done.budget.tokens, "passes": done.budget.passes}


def stop_one(inner: nn.Module, step: int) -> None:
    """A signal that reaches one rank only."""
    if step == STOP and torch.distributed.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)


def stopped_at_the_end(out: Path) -> list[list[dict]]:
    """Stop after the last step, in the middle of a round; return the logs of the resumed run and of an unbroken one."""
    try:
        run(out, steps=STOP, on_step=stop_one)
    except Interrupted:
        return [run(out, steps=STOP)["log"], run(None, steps=STOP)["log"]]
    return []


def full_disk(out: Path) -> str:
    """Rank 1 cannot write its optimiser; return what this rank hears."""
    kept = shards.save_optimizer

    def refuse(*args: object) -> None:
        raise OSError(28, "No space left on device")

    if torch.distributed.get_rank() == 1:
        shards.save_optimizer = refuse
    try:
        run(out, save_every=2)
    except StorageError as error:
        return error.message
    finally:
        shards.save_optimizer = kept
    return ""


def watched(out: Path) -> HardenedTrainer:
    """Three steps that track a metric: the loss, the higher the better, so that the first step stays the best."""
    args = TrainingArguments(
        output_dir=str(out),
        use_cpu=True,
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
        report_to=[],
        disable_tqdm=True,
    )
    rows = list(ROWS.rows)
    return HardenedTrainer(
        model=model(),
        args=args,
        train_dataset=rows,
        eval_dataset=rows[:4],
        data_collator=lambda batch: collate(batch, 0),
    )


def best_of(out: Path) -> dict:
    """What is kept of the best step, and what is heard when rank 1 does not find it."""
    trainer = watched(out)
    trainer.train()
    part = out / "checkpoint-1" / "shards" / f"rank-{trainer.args.process_index}-of-2"
    then = load_file(part / "weights-00000.safetensors")
    held = trainer.model.named_parameters()
    seen = {"bent": [name for name, p in held if not torch.equal(local(p.detach()), then[f"parameter/{name}"])]}
    seen["path"] = trainer.state.best_model_checkpoint
    if trainer.args.process_index:
        trainer.state.best_model_checkpoint += "0"
    return seen | {"missing": heard(trainer._load_best_model)}


def heard(act: Callable[[], object]) -> str:
    """Return the name of what stops an act, and what it says."""
    try:
        act()
    except (UserError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def one_fails(rank: int, out: Path) -> dict[str, str]:
    """One rank fails, or is told to stop, where the others do not; return what this rank hears each time."""
    said = {}

    def refuse(*args: object, **more: object) -> None:
        raise Corrupt("refused")

    def fail_at(step: int) -> None:
        trainer, kept = watched(out / "weights"), shards.save_weights

        def save(inner: nn.Module, folder: Path) -> None:
            if rank == 1 and trainer.state.global_step == step:
                raise OSError(28, "No space left on device")
            kept(inner, folder)

        patch.setattr(shards, "save_weights", save)
        trainer.train()

    def stop_in_the_last_save() -> None:
        trainer, kept = watched(out / "last"), shards.save_weights

        def save(inner: nn.Module, folder: Path) -> None:
            kept(inner, folder)
            if rank == 1 and trainer.state.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(shards, "save_weights", save)
        trainer.train()

    def fit_anew() -> None:
        fit(model(), None, ROWS, config=TrainConfig(steps=3, batch_size=2), seed=0, out=out / "last", resume=False)

    with pytest.MonkeyPatch.context() as patch:
        said["weights"] = heard(lambda: fail_at(2))
    with pytest.MonkeyPatch.context() as patch:
        said["last"] = heard(stop_in_the_last_save)
    for place, name in ((checkpoint, "prune"), (shell, "sweep"), (fitting, "remove")):
        with pytest.MonkeyPatch.context() as patch:
            if rank == 0:
                patch.setattr(place, name, refuse)
            said[name] = heard(fit_anew if place is fitting else watched(out / name).train)
    if rank == 0:
        with lock(out / "held"):
            said["lock"] = heard(watched(out / "held").train)
    else:
        said["lock"] = heard(watched(out / "held").train)
    return said


def little(mesh: object = None) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    small = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    fully_shard(small, mesh=mesh)
    return small


def round_trip(out: Path, mesh: object = None) -> list[bool]:
    """Save, take a step, load, take it again; of a layer with one row, of two ranks that shard it one has none."""
    out.mkdir()
    small = little(mesh)
    optimizer = torch.optim.AdamW(small.parameters(), lr=0.1, fused=True)

    def step() -> None:
        small(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def state() -> dict[str, torch.Tensor]:
        found = {name: p.clone() for name, p in local_weights(small).items()}
        for name, p in small.named_parameters():
            found |= {f"{name} {key}": local(value).clone() for key, value in optimizer.state[p].items()}
        return found

    def same(one: dict, other: dict) -> bool:
        return one.keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in one.items())

    step()
    shards.save_weights(small, out)
    shards.save_optimizer(small, optimizer, out)
    snapshots = Snapshots(out, "test")
    kept = snapshots.take("all", small, in_memory=True)
    assert isinstance(kept, Path)
    before = state()
    step()
    after = state()
    shards.load_weights(small, out)
    shards.load_optimizer(small, optimizer, out)
    back = state()
    again = snapshots.tensors(kept, small)
    step()
    return [
        any(t.numel() == 0 for t in before.values()),
        same(back, before) and not same(before, after),
        all(torch.equal(again[name], before[name]) for name in local_weights(small)),
        same(state(), after),
    ]


def refusals(out: Path, mesh: object) -> list[str]:
    """What does not fit: shards of another mesh, a state that is no number, groups of another recipe."""
    small = little(mesh)
    odd = torch.optim.SGD(small.parameters(), lr=0.1)
    odd.state[next(small.parameters())]["history"] = [1, 2]
    groups = torch.optim.SGD([{"params": [p]} for p in small.parameters()], lr=0.1)
    said = []
    for attempt in (
        lambda: shards.load_weights(small, out),
        lambda: shards.save_optimizer(small, odd, out),
        lambda: shards.load_optimizer(small, groups, out),
    ):
        try:
            attempt()
        except (ConfigError, Unsupported) as error:
            said.append(error.message)
    return said


def plain_sgd(out: Path) -> dict:
    """An optimiser without any state, a whole number kept as such, and a rate that a schedule has lowered."""
    small = little()
    first, second = (torch.optim.SGD(small.parameters(), lr=0.1) for _ in range(2))
    first.param_groups[0]["lr"] = 0.1 / 3
    out.mkdir()
    shards.save_optimizer(small, first, out)
    shards.load_optimizer(small, second, out)
    empty = len(second.state)
    first.state[next(small.parameters())]["step"] = 7
    shards.save_optimizer(small, first, out)
    shards.load_optimizer(small, second, out)
    return {"empty": empty, "step": second.state[next(small.parameters())]["step"], "lr": second.param_groups[0]["lr"]}


def damage(out: Path) -> None:
    """Take a rank's part away from the newest checkpoint and change a byte of a part of the one before."""
    (out / f"checkpoint-{STEPS}/shards/rank-1-of-2/weights-00000.safetensors").unlink()
    file = out / "checkpoint-4/shards/rank-1-of-2/optimizer-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _rank(rank: int, out: Path) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # asked for, not used: the group stands already
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2, timeout=LONG)
    seen: dict[str, object] = {"memory": run(None), "straight": run(out / "straight", save_every=2)}
    try:
        run(out / "stopped", on_step=stop_one)
    except Interrupted as error:
        seen["code"] = error.exit_code
    seen["resumed"] = run(out / "stopped")
    seen["finished"] = run(out / "straight")
    seen["at the end"] = stopped_at_the_end(out / "end")
    if rank == 0:
        damage(out / "straight")
    dist.barrier()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        seen["older"] = run(out / "straight", save_every=2)
    seen["told"] = [str(w.message) for w in told if "skipped" in str(w.message)]
    seen["disk"] = full_disk(out / "full")
    seen["best"] = best_of(out / "best")
    seen["one"] = one_fails(rank, out)
    seen["needs"] = checkpoint.bytes_needed(model())
    replicas = dist.device_mesh.init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    seen["two shards"] = round_trip(out / f"shards-{rank}")
    shards._CHUNK = 1  # a file for each tensor
    seen["two replicas"] = round_trip(out / f"replicas-{rank}", replicas)
    seen["needs little"] = [checkpoint.bytes_needed(little(mesh)) for mesh in (None, replicas)]
    seen["refused"] = refusals(out / f"shards-{rank}", replicas)
    seen["sgd"] = plain_sgd(out / f"sgd-{rank}")
    torch.save(seen, out / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, list[dict]]:
    out = tmp_path_factory.mktemp("ranks")
    spawn(_rank, (out,), nprocs=2)
    return out, [torch.load(out / f"{rank}.pt") for rank in range(2)]


def test_a_sharded_run_goes_on_as_if_it_had_never_stopped(two) -> None:
    """R1 and R7 for shards: stopped by a signal to one rank in the middle of a round and of a log row."""
    for seen in two[1]:
        assert seen["code"] == 143
        for kind in ("straight", "resumed", "finished", "older"):
            for name, value in seen["memory"]["weights"].items():
                assert torch.equal(value, seen[kind]["weights"][name]), (kind, name)
            assert (seen[kind]["tokens"], seen[kind]["passes"]) == (seen["memory"]["tokens"], seen["memory"]["passes"])
    first, second = (seen["memory"]["weights"] for seen in two[1])
    assert sorted({(a.shape[0], second[n].shape[0]) for n, a in first.items() if a.shape != second[n].shape}) == [
        (32, 31)
    ]
    log = two[1][0]["memory"]["log"]
    assert len(log) == 2 and "attack_norm" in log[0]
    for kind in ("straight", "resumed", "finished", "older"):
        assert two[1][0][kind]["log"] == log, kind


def test_stopped_after_its_last_step_a_run_still_tells_the_means_of_all_ranks(two) -> None:
    resumed, straight = two[1][0]["at the end"]
    assert resumed == straight and "safe_loss" in straight[-1]


def test_a_part_that_is_missing_or_changed_makes_the_older_checkpoint_the_newest(two) -> None:
    """R3 and R4: rank 0 reads and tells; the other ranks follow."""
    (told,) = two[1][0]["told"]
    assert "resuming from" in told and "checkpoint-2; skipped" in told
    assert "rank-1-of-2/weights-00000.safetensors is missing" in told
    assert "rank-1-of-2/optimizer-00000.safetensors differs from the manifest" in told
    assert two[1][1]["told"] == []


def test_what_is_in_a_sharded_checkpoint(two) -> None:
    """R13 and R22: tensors and numbers; of the method the clean weights that its attack in use began with."""
    out, seen = two
    folder = out / "straight" / "checkpoint-6"
    torch_files = {"scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"}
    for file in folder.rglob("*"):
        assert file.is_dir() or file.name in torch_files or file.suffix in (".json", ".safetensors"), file
    assert not list(folder.glob("*.safetensors"))  # nobody gathered the model
    sizes = [f.stat().st_size for f in (folder / "shards").rglob("*.safetensors") if "method" not in str(f)]
    assert 0.9 < sum(sizes) / seen[0]["needs"] < 1.3  # headers weigh something with so small a model
    part = out / "straight" / "checkpoint-4" / "shards" / "rank-1-of-2"
    then = {n.partition("/")[2]: t for n, t in load_file(part / "weights-00000.safetensors").items()}
    later = out / "straight" / "checkpoint-6" / "shards" / "rank-1-of-2"
    (source,) = (f for f in later.rglob("method_files/*/*.safetensors") if "source-4" in f.name)
    assert all(torch.equal(t, then[n]) for n, t in load_file(source).items())


def test_one_rank_that_cannot_write_stops_all(two) -> None:
    """R5: no rank waits for ever, and nothing half-written is left."""
    out, seen = two
    assert "process 1 of 2 could not do its part of a checkpoint" in seen[0]["disk"]
    assert "cannot write to" in seen[1]["disk"] and "needed" in seen[1]["disk"]
    assert not list((out / "full").glob("checkpoint-*")) and not list((out / "full").glob(".staging-*"))


def test_the_best_model_is_loaded_in_all_its_parts(two) -> None:
    """Each rank reads its own shards of it, so that each must know where it is."""
    out, both = two
    for seen in both:
        assert seen["best"]["path"] == str(out / "best" / "checkpoint-1") and seen["best"]["bent"] == []
    state = json.loads((out / "best" / "checkpoint-3" / "trainer_state.json").read_text())
    assert (state["best_global_step"], state["best_model_checkpoint"]) == (1, str(out / "best" / "checkpoint-1"))
    assert {p.name for p in (out / "best").glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (1, 2, 3)}
    assert both[0]["best"]["missing"].startswith("Elsewhere: process 1 of 2")
    assert "checkpoint-10: the best checkpoint is not there" in both[1]["best"]["missing"]


def test_where_one_rank_fails_no_other_waits_for_it(two) -> None:
    out, (first, second) = two[0], (seen["one"] for seen in two[1])
    assert first["weights"].startswith("Elsewhere: process 1 of 2") and "cannot write to" in second["weights"]
    assert [p.name for p in (out / "weights").glob("*checkpoint-*")] == ["checkpoint-1"]
    for name in ("prune", "sweep", "remove"):
        assert first[name].startswith("Corrupt: refused") and second[name].startswith("Elsewhere: process 0 of 2"), name
    assert "is in use by another run" in first["lock"] and second["lock"].startswith("Elsewhere: process 0 of 2")


def test_a_signal_to_one_rank_during_the_last_save_stops_all(two) -> None:
    for seen in two[1]:
        assert seen["one"]["last"].startswith("Interrupted: stopped by a signal after step 3 of 3")


def test_a_rank_without_rows_keeps_its_state(two) -> None:
    assert [seen["two shards"] for seen in two[1]] == [[False, True, True, True], [True, True, True, True]]


def test_replicas_of_shards_keep_theirs_in_as_many_files_as_it_takes(two) -> None:
    out, both = two
    assert [seen["two replicas"] for seen in both] == [[False, True, True, True]] * 2
    assert len(list((out / "replicas-1").glob("weights-*.safetensors"))) == 4
    once, twice = both[0]["needs little"]
    assert (once, twice) == (11 * 4 * 3, 2 * 11 * 4 * 3)


def test_what_an_optimiser_may_keep(two) -> None:
    for seen in two[1]:
        assert seen["sgd"] == {"empty": 0, "step": 7, "lr": 0.1 / 3}
        mesh, state, groups = seen["refused"]
        assert "parameter/0.bias is (1,) of torch.float32, and (2,) of torch.float32 on this rank" in mesh
        assert "optimiser state history/0.weight is a list" in state
        assert "holds 1 parameter groups, this optimiser has 4" in groups


def test_another_number_of_processes_is_refused(two) -> None:
    out, _ = two
    with pytest.raises(ConfigError, match=r"checkpoint-6 was saved by a run of 2 defending processes, this one has 4"):
        checkpoint.newest(out / "straight", last_step=STEPS, world_size=4)
    with pytest.raises(ConfigError, match="of 2 defending processes, this one has 1") as refused:
        run(out / "straight")
    assert "torchrun --nproc-per-node 2 on one machine), plus those that attack beside" in refused.value.hint
