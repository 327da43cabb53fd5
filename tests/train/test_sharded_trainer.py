"""Patcher's passes inside the real Trainer on two FSDP2 ranks, sharded by transformers and by accelerate.

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
from casehard.maths.bilevel import Attacker, difference, parameters, perturbed_view, simulate_attack, with_view
from casehard.maths.sharded import is_sharded, local_parts, shifted, simulate_attack_sharded
from casehard.train.shell import HardenedTrainer
from fakes import tiny_llama, tiny_rows

USER, UNSAFE = tiny_rows(32, seed=1), tiny_rows(8, seed=2)
ATTACKER = Attacker(steps=2, lr=1e-2, batch_size=4)


class Passes:
    """Plain at step 0; from step 1 on eq. 2 of Patcher with one attack vector, whole or sharded."""

    name = "passes"

    def prepare(self, setup):
        self.delta, self.held, self.seen = None, [], []

    def backward(self, model, batch, step):
        split = is_sharded(model)
        if step.micro == 0:
            self.held.clear()
            if step.index == 1:
                self.delta = self.attack(model, split)
        self.held.append(batch)
        share = 0.0 if self.delta is None else 0.5
        loss = step.loss(model, batch)
        step.backward(loss * (1 - share))
        if share and step.last:
            if split:
                with shifted(model, self.delta):
                    for held in self.held:
                        step.backward(step.loss(model, held) * share)
            else:
                for held in self.held:
                    view = perturbed_view(parameters(model), self.delta)
                    with_view(model, view, lambda m, held=held: step.backward(step.loss(m, held) * share))
        self.seen.append(sum(hasattr(p, "full_tensor") for p in model.parameters()))
        return loss.detach()

    def attack(self, model, split):
        rows = UNSAFE.stream(4, seed=0, purpose="attack")
        if split:
            run = simulate_attack_sharded(model, rows, ATTACKER, seed=0)
            return difference(run.weights, local_parts(model), dtype=torch.float32)
        source = {n: p.detach() for n, p in model.named_parameters()}
        return difference(simulate_attack(model, source, rows, ATTACKER, seed=0).weights, source, dtype=torch.float32)


def trainer(model, out: Path, batch_size: int, **options) -> HardenedTrainer:
    args = TrainingArguments(
        output_dir=str(out),
        use_cpu=True,
        max_steps=3,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        **options,
    )
    if "fsdp" in options:
        from accelerate.state import PartialState
        from accelerate.utils import DistributedType

        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return HardenedTrainer(
        model=model,
        args=args,
        train_dataset=list(USER.rows),
        data_collator=lambda rows: collate(rows, 0),
        method=Passes(),
    )


def losses(run: HardenedTrainer) -> list[float]:
    return [float(row["loss"]) for row in run.state.log_history if "loss" in row]


def _rank(rank: int, out: Path) -> None:
    import torch.distributed as dist
    from accelerate.state import AcceleratorState
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from transformers.distributed import DistributedConfig

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # asked for, not used: the group stands already
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
    seen = {}
    for kind in ("transformers", "accelerate"):
        AcceleratorState._reset_state(reset_partial_state=True)
        if kind == "transformers":
            config = DistributedConfig(fsdp_size=2)
            model = LlamaForCausalLM.from_pretrained(out / "start", distributed_config=config, dtype=torch.float32)
            run = trainer(model, out / kind, 2)
        else:
            wrap = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
            run = trainer(tiny_llama(), out / kind, 2, fsdp=True, fsdp_config=wrap)
        run.train()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        full = get_model_state_dict(run.model, options=options)
        run.save_model(str(out / kind))
        seen[kind] = {"losses": losses(run), "full": full, "sharded": run.method.seen, "fsdp": run.is_fsdp_enabled}
    torch.save(seen, out / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    import torch.multiprocessing as mp

    out = tmp_path_factory.mktemp("ranks")
    tiny_llama().save_pretrained(out / "start")
    mp.spawn(_rank, (out,), nprocs=2)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["transformers", "accelerate"])
def test_trainer_on_two_shards_equals_one_process(two_ranks, tmp_path, kind):
    one = trainer(tiny_llama(), tmp_path, 4)
    one.train()
    expected = {n: p.detach() for n, p in one.model.state_dict().items()}
    for rank in range(2):
        seen = torch.load(two_ranks / f"{rank}.pt")[kind]
        assert seen["losses"] == pytest.approx(losses(one), abs=1e-5)
        assert seen["sharded"] == [21] * 6 and seen["fsdp"] == (kind == "accelerate")
        assert set(seen["full"]) == (set(expected) if rank == 0 else set())
        for name, value in seen["full"].items():
            torch.testing.assert_close(value, expected[name], atol=2e-5, rtol=0)
    saved = LlamaForCausalLM.from_pretrained(two_ranks / kind)
    for name, value in saved.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=2e-5, rtol=0)
