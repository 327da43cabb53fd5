"""Peak memory of plain fine-tuning and Patcher's schedules, bytes a parameter, against the formula of patcher/cost.py.

    python benchmarks/patcher_memory.py [--schedules async ...]

On a CPU in fp32, where a process's peak resident memory is all there is to see. Every schedule runs in a process of its
own at two model sizes with rows of eight tokens; the difference over the difference in parameters is free of what
interpreter and libraries take, and nearly of activations. What plain
fine-tuning takes above its 16 bytes (two gradients of the tied embedding at once, activations) is taken from every
figure. Prints a table and, as its last line, one JSON object with <schedule> and <schedule>_formula for the defender,
the same with _attacker for the attacker (bar: measured at most 1.05 x the formula).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import random_llama
import torch
from patcher_step import Loop

from casehard.data.batches import EncodedSet
from casehard.defences.patcher import Patcher, PatcherConfig
from casehard.defences.patcher.cost import GRADIENT, MOMENTS, WEIGHTS, costs
from casehard.defences.patcher.workers.launch import start_attackers
from casehard.defences.patcher.workers.spec import spec_for
from casehard.maths.bilevel import Attacker

SIZES = ("organism", "llama25m")
SCHEDULES = ("sequential", "lockstep", "async", "reference_parallel")
K1 = K2 = 4
ROUNDS = 5


def peak_of(process: int | str) -> int:
    """Return the most resident memory a process has had, bytes."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def run(schedule: str, name: str) -> dict[str, int]:
    """Train in this process; return parameters and peaks."""
    torch.set_num_threads(1)
    model = random_llama.model(name, "cpu", positions=64)
    rows = EncodedSet(random_llama.rows(name, 8, 8), 0)
    parameters = sum(p.numel() for p in model.parameters())
    attacker = Attacker(steps=K1, lr=1e-5, batch_size=1)
    if schedule == "plain":
        drive(Loop(model, rows, 1, None))
        return {"parameters": parameters, "defender": peak_of("self")}
    method = Patcher(PatcherConfig(schedule=schedule, round_steps=K2, attackers=(attacker,)), unsafe=rows)
    if schedule == "sequential":
        drive(Loop(model, rows, 1, method))
        return {"parameters": parameters, "defender": peak_of("self")}
    spec = spec_for(model, [rows], [attacker], seed=0, delta_dtype="bfloat16", bf16=False, threads=1)
    with start_attackers(spec, device=torch.device("cpu")) as backend:
        method.backend = backend
        loop = Loop(model, rows, 1, method)
        drive(loop)
        assert method.vectors is not None
        while len(method.vectors.adoptions) < 4:
            loop.step()
        return {"parameters": parameters, "defender": peak_of("self"), "attacker": peak_of(backend.processes[0])}


def drive(loop: Loop) -> None:
    for _ in range(ROUNDS * K2):
        loop.step()


def measure(schedule: str) -> dict[str, float]:
    """Return bytes a parameter of each side, from a fresh process a size."""
    found = []
    for name in SIZES:
        # What is freed goes back to the system, or the peak would depend on the order of sizes.
        env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
        words = [sys.executable, __file__, "--schedule", schedule, "--model", name]
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    small, large = found
    more = large["parameters"] - small["parameters"]
    return {side: (large[side] - small[side]) / more for side in large if side != "parameters"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schedules", choices=SCHEDULES, nargs="+", default=SCHEDULES)
    parser.add_argument("--schedule", choices=("plain", *SCHEDULES), help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=SIZES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.schedule:
        print(json.dumps(run(args.schedule, args.model)))
        return
    formula = {c.schedule: c for c in costs(K1, K2, bf16=False)}
    plain = measure("plain")["defender"]
    rest = plain - (WEIGHTS + GRADIENT + MOMENTS)
    result = {"plain": round(plain, 2)}
    print(f"{'bytes a parameter':30s} {'measured':>9s} {'formula':>9s}\n{'plain':30s} {plain:9.2f} {plain - rest:9.1f}")
    for schedule in args.schedules:
        cost = formula[schedule]
        # On a CPU the host's memory is the device's.
        expected = {"defender": cost.defender + cost.host, "attacker": cost.attacker}
        for side, value in measure(schedule).items():
            key = schedule if side == "defender" else f"{schedule}_attacker"
            result |= {key: round(value - rest, 2), f"{key}_formula": expected[side]}
            print(f"{key:30s} {value - rest:9.2f} {expected[side]:9.1f}", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
