"""Patcher inside the real Trainer on two ranks: FSDP2 by transformers and by accelerate, and DDP.

accelerate shards on accelerators only (on CPU it would run DDP without a word), so its test names the two processes a
multi-GPU run before the Trainer asks; everything after that is accelerate's own.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, TrainingArguments

from casehard.data.batches import collate
from casehard.defences.patcher import Patcher, PatcherConfig
from casehard.distributed.fsdp import local_weights
from casehard.distributed.ranks import local
from casehard.errors import Unsupported
from casehard.maths.bilevel import Attacker
from casehard.train.trainer import HardenedTrainer
from fakes import tiny_llama, tiny_rows
from forks import spawn

USER, UNSAFE, RETAIN = tiny_rows(32, seed=1), tiny_rows(8, seed=2), tiny_rows(9, seed=3)
ATTACKER = Attacker(steps=2, lr=1e-2, batch_size=4)
FILES = ["args.json", "manifest.json", "method.json", "method_files", "rng_state_0.pth"]
FILES += ["rng_state_1.pth", "scheduler.pt", "shards", "shell.json", "trainer_state.json"]
KINDS = ("transformers", "accelerate", "ddp")


def patcher() -> Patcher:
    """Plain at step 0; attacks at steps 1 and 2.

    The gradient of a KL term is rounding alone at step 0, and AdamW would make whole steps of it: cross-entropy here.
    """
    config = PatcherConfig(round_steps=1, attackers=(ATTACKER,), delta_dtype="float32", retain="ce")
    return Patcher(config, unsafe=UNSAFE, retain=RETAIN)


def trainer(model, out: Path, batch_size: int, *, save: bool = False, **options) -> HardenedTrainer:
    args = TrainingArguments(
        output_dir=str(out),
        use_cpu=True,
        max_steps=3,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        save_strategy="steps" if save else "no",
        save_steps=2,
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        **options,
    )
    if "fsdp" in options and "fsdp_config" in options:
        from accelerate.state import PartialState
        from accelerate.utils import DistributedType

        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return HardenedTrainer(
        model=model,
        args=args,
        train_dataset=list(USER.rows),
        data_collator=lambda rows: collate(rows, 0),
        method=patcher(),
    )


def losses(run: HardenedTrainer) -> list[float]:
    return [float(row["loss"]) for row in run.state.log_history if "loss" in row]


def tied_refused(out: Path) -> str:
    """transformers shards a tied output embedding before it ties it: with odd rows, a copy that nobody would train."""
    from transformers.distributed import DistributedConfig

    model = LlamaForCausalLM.from_pretrained(out / "tied", distributed_config=DistributedConfig(fsdp_size=2))
    try:
        local_weights(model)
    except Unsupported as error:
        return error.message
    return ""


def made(kind: str, out: Path) -> HardenedTrainer:
    """Return a trainer of one kind at the starting weights, accelerate knowing nothing of the one before."""
    from accelerate.state import AcceleratorState
    from transformers.distributed import DistributedConfig

    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # arguments with fsdp leave it behind
    if kind == "transformers":
        config = DistributedConfig(fsdp_size=2)
        model = LlamaForCausalLM.from_pretrained(out / "start", distributed_config=config, dtype=torch.float32)
        return trainer(model, out / kind, 2, save=True)
    if kind == "ddp":
        return trainer(tiny_llama(), out / kind, 2, save=True)
    wrap = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    return trainer(tiny_llama(), out / kind, 2, save=True, fsdp=True, fsdp_config=wrap)


def resumed(kind: str, out: Path, step: int, last: dict[str, torch.Tensor]) -> list[str]:
    """Continue from a checkpoint; return the weights that end up different."""
    later = made(kind, out)
    later.train(resume_from_checkpoint=str(out / kind / f"checkpoint-{step}"))
    return [name for name, p in later.model.state_dict().items() if not torch.equal(local(p), last[name])]


def _rank(rank: int, out: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # asked for, not used: the group stands already
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
    seen = {"tied": tied_refused(out)}
    for kind in KINDS:
        run = made(kind, out)
        run.train()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        full = get_model_state_dict(run.model, options=options)
        run.save_model(str(out / kind))
        shards = sum(hasattr(p, "full_tensor") for p in run.model.parameters())
        seen[kind] = {"losses": losses(run), "full": full, "sharded": shards, "fsdp": run.is_fsdp_enabled}
        seen[kind] |= {"passes": run.method.passes, "bent": [], "files": []}
        last = {name: local(p).clone() for name, p in run.model.state_dict().items()}
        # From within, and after the last step, when nothing is left to train.
        seen[kind]["bent"] = resumed(kind, out, 2, last) + resumed(kind, out, 3, last)
        seen[kind]["files"] = sorted(p.name for p in (out / kind / "checkpoint-2").iterdir())
        if kind == "ddp":
            with pytest.raises(Unsupported, match="FSDP was asked for and accelerate left it off"):
                trainer(tiny_llama(), out / "refused", 2, fsdp=True)
    torch.save(seen, out / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("ranks")
    tiny_llama().save_pretrained(out / "start")
    tied = tiny_llama(vocab=63)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(out / "tied")
    spawn(_rank, (out,), nprocs=2)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_patcher_on_two_ranks_equals_one_process(two_ranks, tmp_path, kind):
    one = trainer(tiny_llama(), tmp_path, 4)
    one.train()
    expected = {n: p.detach() for n, p in one.model.state_dict().items()}
    for rank in range(2):
        seen = torch.load(two_ranks / f"{rank}.pt")[kind]
        assert seen["losses"] == pytest.approx(losses(one), abs=1e-5)
        assert seen["passes"] == one.method.passes == 2 * 2 + 2 * 2 + 3  # attacks, attacked passes, retain
        assert seen["sharded"] == (0 if kind == "ddp" else 21) and seen["fsdp"] == (kind == "accelerate")
        assert set(seen["full"]) == (set(expected) if rank == 0 else set())
        for name, value in seen["full"].items():
            torch.testing.assert_close(value, expected[name], atol=2e-5, rtol=0)
        assert seen["bent"] == []
        if kind in ("transformers", "accelerate"):  # the same files whoever sharded the model, and none of theirs
            assert seen["files"] == FILES
    saved = LlamaForCausalLM.from_pretrained(two_ranks / kind)
    for name, value in saved.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=2e-5, rtol=0)


@pytest.mark.slow
def test_a_tied_weight_that_fsdp_holds_twice_is_refused(two_ranks):
    for rank in range(2):
        assert "a tied weight of 63 rows was sharded twice" in torch.load(two_ranks / f"{rank}.pt")["tied"]
