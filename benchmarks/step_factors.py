"""Time of a step of every method that changes the step, over a plain step, alternating in one run; fails where it rots.

    OMP_NUM_THREADS=1 python benchmarks/step_factors.py [--rounds 30] [--store]

Prints a table and, as its last line, one JSON object with the factors: medians over rounds in which every side takes
one step, in turn. Exit code 1 where one is more than 20 % above the factor stored in step_factors.json (reliability
promise "speed does not rot"); --store writes that file instead. Factors, unlike times, carry over from one machine to
another roughly: judge on a machine with an idle core, and store only on one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import buffer_step
import mb_stage2
import random_llama
import torch
from torch import nn

from casehard.data.batches import EncodedSet
from casehard.defences.buffer_reinforce.frozen_lora import FrozenLora
from casehard.defences.crow import Crow
from casehard.defences.lisa import Lisa
from casehard.defences.mb_defense.method import PRESETS, MbStage2
from casehard.defences.patcher import Patcher, PatcherConfig
from casehard.defences.safegrad import SafeGrad
from casehard.defences.spard import Spard, SpardConfig
from casehard.maths.bilevel import Attacker
from casehard.train.protocol import Setup, Step, has

STORED = Path(__file__).with_suffix(".json")
MARGIN = 1.2
SHAPE, SIZE, TOKENS = "organism", 16, 32
PLAIN, PLAIN_LORA, PLAIN_PAIRS = "plain", "plain LoRA", "plain, longer rows"
CONTROLS = (PLAIN, PLAIN_LORA, PLAIN_PAIRS)


class Loop:
    """A bare training loop over a method's seams: what the training shell does, without its bookkeeping."""

    def __init__(self, model: nn.Module, rows: EncodedSet, method: Any = None, *, start: int = 0) -> None:
        self.model, self.rows, self.method, self.index = model, rows, method, start
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
        if method is not None and has(method, "prepare"):
            method.prepare(Setup(model, seed=0, max_steps=10**6))

    def step(self) -> float:
        """Take one step and return its seconds."""
        batch = self.rows.batch_at(SIZE, seed=0, step=self.index, purpose="train")
        step = Step(self.index, 0, 1, lambda m, b: m(**b).loss, lambda loss: loss.backward())
        start = time.perf_counter()
        if has(self.method, "backward"):
            self.method.backward(self.model, batch, step)
        elif has(self.method, "loss"):
            step.backward(self.method.loss(self.model, batch, step))
        else:
            step.backward(step.loss(self.model, batch))
        nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
        self.optimizer.step()
        if has(self.method, "after_step"):
            self.method.after_step(self.model, self.optimizer, step)
        self.optimizer.zero_grad(set_to_none=True)
        self.index += 1
        return time.perf_counter() - start


def sides() -> dict[str, tuple[str, Callable[[], Loop]]]:
    """Return for each side its control and how to build it."""
    drawn = random_llama.rows(SHAPE, 8 * SIZE, TOKENS)
    rows, safe = EncodedSet(drawn[2 * SIZE :], 0), EncodedSet(drawn[: 2 * SIZE], 0)

    def full(method: Any = None, **more: int) -> Loop:
        return Loop(random_llama.model(SHAPE, "cpu"), rows, method, **more)

    def patcher() -> Loop:
        attacker = Attacker(steps=1, lr=1e-5, batch_size=SIZE)
        loop = full(Patcher(PatcherConfig(round_steps=10**5, attackers=(attacker,)), unsafe=safe), start=10**5)
        loop.step()  # makes the vector that all the steps after it share
        return loop

    def pairs(stage2: bool) -> Loop:
        model, pairs = mb_stage2.build(SHAPE, "cpu")
        return Loop(model, pairs.rows, MbStage2(PRESETS["default"], pairs=pairs) if stage2 else None)

    def lora(buffered: bool) -> Loop:
        model, customer = buffer_step.build(SHAPE, "cpu", 32)
        if buffered:
            FrozenLora(buffer_step.random_buffer(model)).attach(model)
        return Loop(model, customer)

    return {
        PLAIN: (PLAIN, full),
        "patcher, attacked step": (PLAIN, patcher),
        "spard, check only": (PLAIN, lambda: full(Spard(SpardConfig(batch_size=4, tau=100.0), safe=safe))),
        "spard, projection": (PLAIN, lambda: full(Spard(SpardConfig(batch_size=4, tau=0.0, delta=0.0), safe=safe))),
        "lisa": (PLAIN, lambda: full(Lisa(safe=safe))),
        "safegrad": (PLAIN, lambda: full(SafeGrad(safe=safe))),
        "crow": (PLAIN, lambda: full(Crow())),
        PLAIN_LORA: (PLAIN_LORA, lambda: lora(False)),
        "buffer-reinforce, customer's step": (PLAIN_LORA, lambda: lora(True)),
        PLAIN_PAIRS: (PLAIN_PAIRS, lambda: pairs(False)),
        "mb-defense, stage 2": (PLAIN_PAIRS, lambda: pairs(True)),
    }


def measure(rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return the factor of each method and the median milliseconds of each control."""
    built = {name: (control, build()) for name, (control, build) in sides().items()}
    names, samples = list(built), {name: [] for name in built}
    for i in range(rounds + 2):
        # Who goes first rotates: the next finds warmer caches.
        for name in names[i % len(names) :] + names[: i % len(names)]:
            samples[name].append(built[name][1].step())
    kept = {name: taken[2:] for name, taken in samples.items()}
    factors = {
        name: round(statistics.median(a / b for a, b in zip(kept[name], kept[control], strict=True)), 3)
        for name, (control, _) in built.items()
        if name != control
    }
    return factors, {name: round(1e3 * statistics.median(kept[name]), 2) for name in CONTROLS}


def slower(measured: dict[str, float], stored: dict[str, float]) -> list[str]:
    """Return one sentence for each factor that rotted, is not stored, or is stored and was not measured."""
    out = [f"{name}: stored, but no such side is measured" for name in stored if name not in measured]
    for name, factor in measured.items():
        if name not in stored:
            out.append(f"{name}: no stored factor to hold {factor} against; run with --store")
        elif not factor <= MARGIN * stored[name]:
            out.append(f"{name}: {factor}, {factor / stored[name] - 1:+.0%} over the stored {stored[name]}")
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--store", action="store_true", help="write step_factors.json")
    args = parser.parse_args()
    factors, controls = measure(args.rounds)
    for name, value in {**controls, **factors}.items():
        print(f"{name:36s} {value}{' ms' if name in controls else ''}")
    bad: list[str] = []
    if args.store:
        told = {"date": date.today().isoformat(), "torch": torch.__version__, "threads": torch.get_num_threads()}
        STORED.write_text(json.dumps({**told, "rounds": args.rounds, "factors": factors}, indent=1) + "\n")
    else:
        bad = slower(factors, json.loads(STORED.read_text())["factors"])
        for line in bad:
            print(f"rotted: {line}", file=sys.stderr)
    print(json.dumps(factors))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
