"""Time of one LoRA step of a customer's job with the buffer attached against one without, alternating in one run.

    python benchmarks/buffer_step.py [--model organism|llama25m] [--device cpu|cuda] [--rounds 20] [--rank 32]

Prints a table and, as its last line, one JSON object:
    ratio_step             step with the buffer as a job attaches it / plain LoRA step (bar: 1.05)
    ratio_factors          the same with the factors applied one after the other: large or half-precision bases
    attach_seconds         reading nothing, attaching the hooks and hashing the base, once a job
    verify_seconds         taking the buffer out and hashing the base again, once a job
Both adapters have the rank given, on all linear layers. Ratios are medians over rounds in which both take one step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import random_llama
import torch
from torch import nn

from casehard.data.batches import EncodedSet
from casehard.defences.buffer_reinforce.frozen_lora import BaseWatch, FrozenLora
from casehard.maths.merge import LoraPair
from casehard.model.adapters import add_lora
from casehard.model.lora_files import live_pairs

TOKENS = {"organism": 32, "llama25m": 64}
"""Tokens a row."""
ROWS = 16


def build(name: str, device: str, rank: int) -> tuple[nn.Module, EncodedSet]:
    """Return a random model with a fresh user adapter, and rows of one length."""
    base = random_llama.model(name, device)
    model = add_lora(base, rank, 2 * rank, seed=1).train()
    rows = random_llama.rows(name, 8 * ROWS, TOKENS[name])
    return model, EncodedSet(rows, 0)


def random_buffer(model: nn.Module) -> dict[str, LoraPair]:
    """Return a buffer of the user adapter's shape."""
    g = torch.Generator().manual_seed(1)
    return {
        name: LoraPair(pair.a.cpu(), 0.01 * torch.randn(pair.b.shape, generator=g), pair.scale)
        for name, pair in live_pairs(model).items()
    }


class Loop:
    """A bare training loop: what the training shell does, without its bookkeeping."""

    def __init__(self, name: str, device: str, rank: int) -> None:
        self.model, self.rows = build(name, device, rank)
        self.device = device
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4, fused=True)
        self.index = 0

    def step(self) -> float:
        """Take one step and return its seconds."""
        batch = self.rows.batch_at(ROWS, seed=0, step=self.index, purpose="user")
        batch = {key: value.to(self.device) for key, value in batch.items()}
        start = time.perf_counter()
        self.model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.index += 1
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(TOKENS), default="llama25m")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    loops = {name: Loop(args.model, args.device, args.rank) for name in ("plain", "step", "factors")}
    guarded = loops["step"].model
    buffer, factors = (FrozenLora(random_buffer(guarded)) for _ in range(2))
    start = time.perf_counter()
    watch = BaseWatch(guarded)
    buffer.attach(guarded)
    attach = time.perf_counter() - start
    factors.attach(loops["factors"].model, fold=False)
    samples: dict[str, list[float]] = {name: [] for name in loops}
    names = list(loops)
    for i in range(args.rounds + 2):
        # Who goes first rotates: the next finds warmer caches.
        for name in names[i % 3 :] + names[: i % 3]:
            samples[name].append(loops[name].step())
    folds = buffer.folds
    start = time.perf_counter()
    buffer.detach()
    watch.verify(guarded)
    verify = time.perf_counter() - start
    plain = samples["plain"][2:]
    ratio = {n: statistics.median(a / b for a, b in zip(samples[n][2:], plain, strict=True)) for n in samples}
    result = {
        "model": args.model,
        "device": args.device,
        "rank": args.rank,
        "parameters": sum(p.numel() for p in guarded.parameters()),
        "rounds": args.rounds,
        "threads": torch.get_num_threads(),
        "folds": folds,
        "plain_ms": round(1e3 * statistics.median(plain), 2),
        "ratio_step": round(ratio["step"], 4),
        "ratio_factors": round(ratio["factors"], 4),
        "attach_seconds": round(attach, 3),
        "verify_seconds": round(verify, 3),
    }
    for key, value in result.items():
        print(f"{key:16} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
