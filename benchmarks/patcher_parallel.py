"""Patcher with an attacker beside it against the sequential algorithm, at equal outer steps, one thread a side.

    OMP_NUM_THREADS=1 python benchmarks/patcher_parallel.py [--model organism|llama25m] [--k2 8] [--rounds 3]

Only steps that use an attack vector are timed, in alternating blocks of --rounds rounds: the sequential side runs its
k1 attack steps between rounds, the async side never waits. Prints a table and, as its last line, one JSON object with,
for each r = k1 / k2 of --ratio (keys end in _k1_<r>k2):
    speedup_vs_sequential  median over blocks of sequential time / async time (bar: 90 % of the ideal)
    ideal                  (2 k2 + k1) / max(2 k2, k1)
    mean_age               outer steps, of the vectors the async side used
    bytes_sent_per_round   weights to the attacker and vectors back, per k2 outer steps
Memory: patcher_memory.py. Needs two idle cores: on one, both sides share what the sequential side has alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from patcher_step import BATCHES, Loop, build

from casehard.defences.patcher import Patcher, PatcherConfig
from casehard.defences.patcher.workers.launch import start_attackers
from casehard.defences.patcher.workers.spec import spec_for
from casehard.maths.bilevel import Attacker


def block(loop: Loop, steps: int) -> float:
    """Return the seconds that ``steps`` outer steps take."""
    start = time.perf_counter()
    for _ in range(steps):
        loop.step()
    return time.perf_counter() - start


def compare(name: str, k1: int, k2: int, rounds: int, blocks: int) -> dict[str, float]:
    """Run both sides in turn and return the figures of one ratio."""
    model, rows, size = build(name, "cpu")
    twin, _, _ = build(name, "cpu")
    attacker = Attacker(steps=k1, lr=1e-5, batch_size=size)
    sequential = Patcher(PatcherConfig(round_steps=k2, attackers=(attacker,)), unsafe=rows)
    method = Patcher(PatcherConfig(schedule="async", round_steps=k2, attackers=(attacker,)), unsafe=rows)
    spec = spec_for(twin, [rows], [attacker], seed=0, delta_dtype="bfloat16", bf16=False, threads=1)
    with start_attackers(spec, device=torch.device("cpu")) as backend:
        method.backend = backend
        one, two = Loop(model, rows, size, sequential), Loop(twin, rows, size, method)
        one.index = two.index = k2
        while not method.vectors.adoptions:
            two.step()
        one.step()
        one.index = 2 * k2  # a block begins with its round's attack
        method.vectors.pool.ages()
        took: dict[str, list[float]] = {"sequential": [], "async": []}
        sent = backend.bytes_out + backend.bytes_in
        for _ in range(blocks):
            while not backend.idle():  # an attack under way would slow the sequential side down
                time.sleep(0.05)
            took["sequential"].append(block(one, rounds * k2))
            seen = len(method.vectors.adoptions) + 2
            while len(method.vectors.adoptions) < seen:
                two.step()  # the attack that was finished meanwhile came too early
            took["async"].append(block(two, rounds * k2))
        sent = backend.bytes_out + backend.bytes_in - sent
        age = method.vectors.pool.ages()["attack_age"]
    return {
        "speedup_vs_sequential": statistics.median(
            a / b for a, b in zip(took["sequential"], took["async"], strict=True)
        ),
        "ideal": (2 * k2 + k1) / max(2 * k2, k1),
        "mean_age": age,
        "bytes_sent_per_round": sent / (blocks * rounds),
        "sequential_s": statistics.median(took["sequential"]),
        "async_s": statistics.median(took["async"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(BATCHES), default="organism")
    parser.add_argument("--k2", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--ratio", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, float | str] = {"model": args.model, "k2": args.k2}
    for ratio in args.ratio:
        found = compare(args.model, ratio * args.k2, args.k2, args.rounds, args.blocks)
        for key, value in found.items():
            result[f"{key}_k1_{ratio}k2"] = round(value, 3)
    for key, value in result.items():
        print(f"{key:36s} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
