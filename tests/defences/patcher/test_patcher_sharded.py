"""Patcher on two ranks, sharded by FSDP2 or replicated by DDP, against Patcher in one process.

The ranks of a fixture run every case once and leave what they saw in files; the tests compare it with one process.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).parent)]

from test_patcher import ATTACKER, SAFE, UNSAFE, llama  # noqa: E402

from casehard.defences.patcher import Patcher, PatcherConfig  # noqa: E402
from casehard.defences.patcher.backend import InProcessBackend  # noqa: E402
from casehard.defences.patcher.in_turn import SimulatedAttacks  # noqa: E402
from casehard.defences.patcher.pool import AttackRequest  # noqa: E402
from casehard.distributed.fsdp import local_weights  # noqa: E402
from casehard.errors import Unsupported  # noqa: E402
from casehard.maths.bilevel import Attacker  # noqa: E402
from casehard.train.protocol import Setup, Step  # noqa: E402
from forks import spawn  # noqa: E402

STEPS, MICROS, ROWS = 8, 2, 4
OTHER = Attacker(steps=2, lr=2e-2, batch_size=3)
FULL = {"delta_dtype": "float32"}
CASES: dict[str, dict] = {
    "plain rounds": {},
    "stale vector, its own reference": {"delay": 2, "reference": "source", **FULL},
    "stale vector": {"delay": 1, **FULL},
    "pool and moments forgotten": {"attackers": (ATTACKER, OTHER), "reset_optimizer": True, **FULL},
    "kl": {"retain": "kl", "retain_batch_size": 3, **FULL},
    "ce, one row": {"retain": "ce", "retain_batch_size": 1, "alpha": 0.3, **FULL},
    "attacked loss alone": {"alpha": 1.0, **FULL},
}


def patcher(**settings: object) -> Patcher:
    settings = {"round_steps": 3, "attackers": (ATTACKER,)} | settings
    rows = SAFE if settings.get("retain", "none") != "none" else None
    return Patcher(PatcherConfig(**settings), unsafe=UNSAFE, retain=rows)  # type: ignore[arg-type]


def run(
    method: Patcher | None, model: nn.Module, *, rank: int = 0, of: int = 1, steps: int = STEPS
) -> dict[str, object]:
    """Drive the outer loop over this rank's rows; every weight must be the same bits before and after a backward."""
    log: list[dict] = []
    losses: list[float] = []
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    # Some gradients are of the size of the rounding between two orders of a sum, and AdamW at its default epsilon makes
    # whole steps of them, in another direction on another processor.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    if method is not None:
        method.prepare(Setup(inner, seed=0, max_steps=steps, micros=MICROS, log=log.append))
    for index in range(steps):
        total = torch.zeros(())
        for micro in range(MICROS):
            whole = SAFE.batch_at(ROWS, seed=0, step=index * MICROS + micro, purpose="outer")
            batch = {key: value[rank::of] for key, value in whole.items()}
            step = Step(index, micro, MICROS, lambda m, b: m(**b).loss / MICROS, lambda loss: loss.backward())
            if method is None:
                loss = step.loss(model, batch)
                step.backward(loss)
            else:
                before = {name: p.detach().clone() for name, p in local_weights(inner).items()}
                loss = method.backward(model, batch, step)
                after = local_weights(inner)
                assert all(torch.equal(p, after[name].detach()) for name, p in before.items())
            total += loss.detach()
        optimizer.step()
        if method is not None:
            method.after_step(model, optimizer, step)
        optimizer.zero_grad()
        losses.append(float(total))
    if method is not None:
        method.finish(model)
    weights = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in inner.named_parameters()}
    kept = {name: p.detach().clone() for name, p in weights.items()}
    return {"weights": kept, "log": log, "losses": losses, "passes": method.passes if method else 0}


def sharded() -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = llama()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def refusal(function: object) -> str:
    try:
        function()  # type: ignore[operator]
    except Unsupported as error:
        return error.message
    return ""


def again(model: nn.Module) -> bool:
    """Whether an attack on kept weights, the model having moved on, gives the vector it gave on the live ones."""
    side = backend(model)
    source = {name: p.clone() for name, p in local_weights(model).items()}
    side.submit(AttackRequest(0, 1, 3), local_weights(model), stable=False)
    for p in local_weights(model).values():
        p.add_(0.01)
    side.submit(AttackRequest(0, 1, 3), source, stable=True)
    first, second = side.collect()
    moved = all(torch.equal(p, source[name] + 0.01) for name, p in local_weights(model).items())
    return moved and all(torch.equal(d, second.delta[name]) for name, d in first.delta.items())


def _rank(rank: int, out: Path) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
    place = {"rank": rank, "of": 2}
    seen: dict[str, object] = {}
    for name, settings in CASES.items():
        seen[f"fsdp {name}"] = run(patcher(**settings), sharded(), **place)
        seen[f"ddp {name}"] = run(patcher(**settings), nn.parallel.DistributedDataParallel(llama()), **place)
    for kind in ("fsdp", "ddp"):
        model = (lambda: sharded()) if kind == "fsdp" else (lambda: nn.parallel.DistributedDataParallel(llama()))
        seen[f"{kind} alpha 0"], seen[f"{kind} sft"] = (
            run(patcher(alpha=0.0), model(), **place),
            run(None, model(), **place),
        )
    seen["again"] = again(sharded())
    ddp = nn.parallel.DistributedDataParallel(llama())
    seen["refused"] = {
        "nobody": refusal(lambda: run(patcher(), llama())),
        "lora": refusal(lambda: run(patcher(attackers=(Attacker(steps=1, lr=1e-2, lora_rank=1),)), sharded())),
        "elsewhere": refusal(lambda: run(helped(), ddp)),
    }
    torch.save(seen, out / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def backend(model: nn.Module) -> InProcessBackend:
    return InProcessBackend(SimulatedAttacks((UNSAFE,), (ATTACKER,), 0, torch.float32), model)


def helped() -> Patcher:
    method = patcher()
    method.backend = backend(llama())
    return method


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("ranks")
    spawn(_rank, (out,), nprocs=2)
    return [torch.load(out / f"{rank}.pt") for rank in range(2)]


def close(one: dict, many: dict, atol: float) -> None:
    assert many["passes"] == one["passes"]
    for name, value in one["weights"].items():
        torch.testing.assert_close(many["weights"][name], value, atol=atol, rtol=0)
    assert [sorted(row) for row in many["log"]] == [sorted(row) for row in one["log"]]
    for mine, row in zip(many["log"], one["log"], strict=True):
        assert mine == pytest.approx(row, abs=1e-3, rel=1e-3) or "tokens" in row


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_two_ranks_equal_one_process(ranks: list[dict], kind: str, name: str) -> None:
    """Property 14, eight AdamW steps with two attacks; losses and telemetry are means over the ranks."""
    one = run(patcher(**CASES[name]), llama())
    for seen in ranks:
        close(one, seen[f"{kind} {name}"], 1e-5)
    mean = [sum(pair) / 2 for pair in zip(*(seen[f"{kind} {name}"]["losses"] for seen in ranks), strict=True)]
    assert mean == pytest.approx(one["losses"], abs=1e-5)
    rows = [sum(row.get("tokens", 0) for row in seen[f"{kind} {name}"]["log"]) for seen in ranks]
    attacked = sum(row.get("tokens", 0) for row in one["log"])
    assert rows == ([attacked, 0] if kind == "fsdp" else [attacked, attacked])


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_alpha_zero_is_plain_training(ranks: list[dict], kind: str) -> None:
    for seen in ranks:
        patched, plain = seen[f"{kind} alpha 0"], seen[f"{kind} sft"]
        assert patched["passes"] == 0
        for name, value in plain["weights"].items():
            # DDP sums in the middle of each backward, Patcher once a step.
            torch.testing.assert_close(patched["weights"][name], value, atol=0 if kind == "fsdp" else 1e-6, rtol=0)


def test_an_attack_can_be_repeated_from_kept_shards(ranks: list[dict]) -> None:
    assert [seen["again"] for seen in ranks] == [True, True]


def test_what_cannot_be_is_refused(ranks: list[dict]) -> None:
    for seen in ranks:
        refused = seen["refused"]
        assert "nobody would average gradients" in refused["nobody"]
        assert "LoRA attacker on a sharded model" in refused["lora"]
        assert "attackers in other processes for a defender of 2 replicas" in refused["elsewhere"]
