"""Time of one SPAG step against one plain fine-tuning step, alternating in one run.

    python benchmarks/spard_step.py [--model organism|llama25m] [--device cpu|cuda] [--rounds 40] [--lora]

Prints a table and, as its last line, one JSON object:
    ratio_wall             step at the trigger rate of a run that holds its constraint / plain step (bar: 1.05)
    trigger_rate           share of the timed checks of that run that triggered
    ratio_satisfied        step whose check finds the constraint satisfied / plain step
    ratio_triggered        step that projects every time / plain step
128 user rows and 4 safe rows a step. Ratios are medians over rounds in which every side takes one step, in turn.
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
from casehard.defences.spard import Spard, SpardConfig
from casehard.train.protocol import Setup, Step

TOKENS = {"organism": 32, "llama25m": 64}
"""Tokens a row."""
USER, SAFE = 128, 4
ALWAYS = {"tau": 0.0, "delta": 0.0}


def build(name: str, device: str, lora: bool) -> tuple[nn.Module, EncodedSet, EncodedSet]:
    """Return a random model and rows of one length, user rows and safe rows."""
    model: nn.Module = random_llama.model(name, device)
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=32, lora_alpha=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
        )
    rows = random_llama.rows(name, 8 * USER, TOKENS[name])
    return model, EncodedSet(rows[64:], 0), EncodedSet(rows[:64], 0)


class Loop:
    """A bare training loop: what the training shell does, without its bookkeeping."""

    def __init__(self, name: str, device: str, lora: bool, settings: dict[str, float] | None) -> None:
        self.model, self.rows, safe = build(name, device, lora)
        self.device = device
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=3e-4, fused=True)
        self.method = None if settings is None else Spard(SpardConfig(batch_size=SAFE, **settings), safe=safe)
        self.index = 0
        if self.method is not None:
            self.method.prepare(Setup(self.model, seed=0, max_steps=10**6))

    def step(self) -> float:
        """Take one step and return its seconds."""
        batch = self.rows.batch_at(USER, seed=0, step=self.index, purpose="outer")
        batch = {key: value.to(self.device) for key, value in batch.items()}
        start = time.perf_counter()
        self.model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        if self.method is not None:
            step = Step(self.index, 0, 1, lambda m, b: m(**b).loss, lambda loss: loss.backward())
            self.method.after_step(self.model, self.optimizer, step)
        self.optimizer.zero_grad(set_to_none=True)
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.index += 1
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(TOKENS), default="organism")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--lora", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    sides = {"plain": None, "satisfied": {"tau": 100.0}, "triggered": ALWAYS, "wall": {"delta": 0.0}}
    loops = {name: Loop(args.model, args.device, args.lora, settings) for name, settings in sides.items()}
    samples: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(args.rounds + 2):
        for name, loop in loops.items():
            samples[name].append(loop.step())
    plain = samples["plain"][2:]
    ratio = {n: statistics.median(a / b for a, b in zip(samples[n][2:], plain, strict=True)) for n in samples}
    # A median would show one branch or the other; what a run pays is the mean of both.
    paid = [ratio["satisfied"], ratio["triggered"]]
    held = loops["wall"].method
    assert held is not None
    rate = held.trigger_rate
    result = {
        "model": args.model,
        "device": args.device,
        "lora": args.lora,
        "threads": torch.get_num_threads(),
        "plain_step_ms": round(1000 * statistics.median(plain), 2),
        "ratio_wall": round((1 - rate) * paid[0] + rate * paid[1], 4),
        "trigger_rate": round(rate, 3),
        "ratio_satisfied": round(paid[0], 4),
        "ratio_triggered": round(paid[1], 4),
    }
    for key, value in result.items():
        print(f"{key:24s} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
