"""Time and memory of one Patcher step against one plain SFT step, alternating in one run.

    python benchmarks/patcher_step.py [--model organism|llama25m|llama500m|llama1500m] [--device cpu|cuda] [--rounds 7]

Prints a table and, as its last line, one JSON object:
    ratio_step_patched     patched step / plain step (bar: 2.1)
    ratio_step_alpha0      Patcher with alpha = 0 / plain step (bar: 1.02)
    extra_bytes_per_param  peak of patched minus peak of plain steps, per parameter (bar: 2.1 = one bf16 delta + 5 %)
    ratio_attack           one simulated attack of k1 steps / k1 plain steps (bar: 1.05)
All ratios are medians over rounds in which every side runs once, in turn.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import random_llama
import torch
from torch import nn
from transformers import LlamaForCausalLM

from casehard.data.batches import EncodedSet
from casehard.defences.patcher import Patcher, PatcherConfig
from casehard.defences.patcher.in_turn import InTurn
from casehard.defences.patcher.pool import AttackRequest
from casehard.maths.bilevel import Attacker
from casehard.maths.bilevel import parameters as parameters_of
from casehard.train.protocol import Setup, Step

BATCHES = {"organism": (32, 32), "llama25m": (8, 128), "llama500m": (8, 512), "llama1500m": (8, 512)}
"""Rows a batch, tokens a row."""
FAR = 1_000_000


def build(name: str, device: str) -> tuple[LlamaForCausalLM, EncodedSet, int]:
    size, tokens = BATCHES[name]
    model = random_llama.model(name, device, positions=1024)
    return model, EncodedSet(random_llama.rows(name, 4 * size, tokens), 0), size


class Loop:
    """A bare outer loop, fp32 masters, bf16 autocast on GPUs: what the training shell does, without its bookkeeping."""

    def __init__(self, model: LlamaForCausalLM, rows: EncodedSet, size: int, method: Patcher | None) -> None:
        self.model, self.rows, self.size, self.method = model, rows, size, method
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        self.index = 0
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else None
        if method is not None:
            method.prepare(Setup(model, seed=0, max_steps=FAR))

    def autocast_loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**batch).loss

    def step(self) -> None:
        batch = self.rows.batch_at(self.size, seed=0, step=self.index, purpose="outer")
        batch = {key: value.to(self.device) for key, value in batch.items()}
        if self.method is None:
            self.autocast_loss(self.model, batch).backward()
        else:
            step = Step(self.index, 0, 1, self.autocast_loss, lambda loss: loss.backward(), compute_dtype=self.dtype)
            self.method.backward(self.model, batch, step)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.index += 1


def autocast(model: LlamaForCausalLM) -> None:
    """Patch forward to compute in bfloat16 on a GPU, as accelerate does; CPUs compute in fp32, as the library does."""
    device = next(model.parameters()).device.type
    if device == "cpu":
        return
    model.forward = torch.autocast(device, torch.bfloat16)(model.forward)  # type: ignore[method-assign]


def timed(function: Callable[[], None], times: int, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        function()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def peak(function: Callable[[], None], device: str) -> int:
    """Peak bytes while ``function`` runs: allocator statistics on a GPU, VmHWM reset beforehand on Linux."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    function()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(BATCHES), default="organism")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--k1", type=int, default=10)
    args = parser.parse_args()

    model, rows, size = build(args.model, args.device)
    autocast(model)
    attacker = Attacker(steps=args.k1, lr=1e-5, batch_size=size)
    loops = {
        "plain": Loop(model, rows, size, None),
        "alpha0": Loop(model, rows, size, Patcher(PatcherConfig(alpha=0.0), unsafe=rows)),
        "patched": Loop(
            model, rows, size, Patcher(PatcherConfig(round_steps=1000, attackers=(attacker,)), unsafe=rows)
        ),
    }
    patched = loops["patched"]
    patched.index = 1000
    patched.step()  # runs the attack of this round; the following 999 steps share its vector
    count = max(1, {"organism": 12}.get(args.model, 3))
    samples: dict[str, list[float]] = {name: [] for name in (*loops, "attack")}

    def one_attack() -> None:
        assert patched.method is not None and isinstance(patched.method.vectors, InTurn)
        patched.method.vectors.attacks.run(model, parameters_of(model), AttackRequest(0, 1, 1000))

    for _ in range(args.rounds + 1):
        for name, loop in loops.items():
            samples[name].append(timed(loop.step, count, args.device))
        samples["attack"].append(timed(one_attack, 1, args.device))
    ratio = {
        name: statistics.median(a / b for a, b in zip(samples[name][1:], samples["plain"][1:], strict=True))
        for name in samples
    }
    parameters = sum(p.numel() for p in model.parameters())
    peaks = {name: min(peak(loops[name].step, args.device) for _ in range(3)) for name in ("plain", "patched")}
    resident = 2 * parameters  # the vector stays allocated while plain steps are measured
    result = {
        "model": args.model,
        "device": args.device,
        "parameters": parameters,
        "threads": torch.get_num_threads(),
        "plain_step_ms": round(1000 * statistics.median(samples["plain"][1:]), 2),
        "ratio_step_patched": round(ratio["patched"], 3),
        "ratio_step_alpha0": round(ratio["alpha0"], 3),
        "extra_bytes_per_param": round((peaks["patched"] - peaks["plain"] + resident) / parameters, 3),
        "ratio_attack": round(ratio["attack"] / args.k1, 3),
    }
    for key, value in result.items():
        print(f"{key:24s} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
