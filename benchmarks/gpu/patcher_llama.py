"""Patcher on one GPU against plain fine-tuning and the published code's way of shifting weights, in one run.

    python benchmarks/gpu/patcher_llama.py [--model llama500m llama1500m] [--steps 10] [--rounds 5]

Random Llamas, fp32 masters, bf16 autocast on a GPU; `--device cpu --model organism` tries the script without one. Sides
take turns, --steps outer steps each, one after the other in memory:
    plain       one pass over a batch
    patcher     a pass at theta and one at theta + delta, composed as a view; delta on the device
    shifted     the same two passes as published: delta on the host, added to the weights in place, then subtracted
Prints a table and, as its last line, one JSON object with, for each side: steps/s, peak bytes a parameter, achieved
FLOP/s (6 x parameters x tokens a pass) and the largest change that shifting there and back makes to a weight ("drift").
On a CPU the peaks include interpreter and libraries; patcher_memory.py is the one to read there.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from patcher_step import BATCHES, Loop, autocast, build, peak, timed

from casehard.defences.patcher import Patcher, PatcherConfig
from casehard.maths.bilevel import Attacker, parameters

ALPHA = 0.5
K2 = 1000


class Shifted(Loop):
    """Add the vector to the weights, run the pass, subtract it again."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        g = torch.Generator().manual_seed(0)
        self.delta = {
            name: (1e-4 * torch.randn(p.shape, generator=g)).to(torch.bfloat16)
            for name, p in parameters(self.model).items()
        }

    def shift(self, sign: int) -> None:
        with torch.no_grad():
            for name, p in parameters(self.model).items():
                p.add_(self.delta[name].to(p.device), alpha=sign)

    def step(self) -> None:
        batch = self.rows.batch_at(self.size, seed=0, step=self.index, purpose="outer")
        batch = {key: value.to(self.device) for key, value in batch.items()}
        ((1 - ALPHA) * self.autocast_loss(self.model, batch)).backward()
        self.shift(1)
        (ALPHA * self.autocast_loss(self.model, batch)).backward()
        self.shift(-1)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.index += 1

    def drift(self) -> float:
        """Return the largest change that a shift there and back makes to any weight."""
        before = {name: p.detach().clone() for name, p in parameters(self.model).items()}
        self.shift(1)
        self.shift(-1)
        return max(float((p.detach() - before[name]).abs().max()) for name, p in parameters(self.model).items())


def side(name: str, shape: str, device: str) -> Loop:
    model, rows, size = build(shape, device)
    autocast(model)
    if name == "plain":
        return Loop(model, rows, size, None)
    if name == "shifted":
        return Shifted(model, rows, size, None)
    attacker = Attacker(steps=1, lr=1e-5, batch_size=size)
    loop = Loop(model, rows, size, Patcher(PatcherConfig(round_steps=K2, attackers=(attacker,)), unsafe=rows))
    loop.index = K2  # the next step runs the round's attack; the steps after it share its vector
    return loop


def measure(shape: str, device: str, steps: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return the figures of every side."""
    out = {}
    for name in ("plain", "patcher", "shifted"):
        loop = side(name, shape, device)
        loop.step()
        seconds = statistics.median([timed(loop.step, steps, device) for _ in range(rounds + 1)][1:])
        count = sum(p.numel() for p in loop.model.parameters())
        passes, tokens = 1 if name == "plain" else 2, BATCHES[shape][0] * BATCHES[shape][1]
        out[name] = {
            "steps_per_s": round(1 / seconds, 3),
            "peak_bytes_per_param": round(peak(loop.step, device) / count, 2),
            "flops_per_s": round(passes * 6 * count * tokens / seconds),
            "drift": loop.drift() if isinstance(loop, Shifted) else 0.0,
        }
        del loop
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=sorted(BATCHES), default=["llama500m", "llama1500m"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    result: dict[str, object] = {"device": where, "torch": torch.__version__}
    for shape in args.model:
        found = measure(shape, args.device, args.steps, args.rounds)
        result[shape] = found
        print(f"{shape:12s} {'steps/s':>9s} {'bytes/param':>12s} {'TFLOP/s':>9s} {'drift':>9s}")
        for name, row in found.items():
            rate = row["flops_per_s"] / 1e12
            print(
                f"{name:12s} {row['steps_per_s']:9.2f} {row['peak_bytes_per_param']:12.2f} {rate:9.3f} "
                f"{row['drift']:9.1e}"
            )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
