"""Peak memory and sequence passes of MB-Defense's stage 2 against plain fine-tuning on the same clean rows.

    python benchmarks/mb_stage2.py [--model organism|llama25m] [--device cpu|cuda] [--batch 16]

Prints a table and, as its last line, one JSON object:
    ratio_peak_memory      stage 2 (recommended settings) / plain fine-tuning, each in a process of its own (bar: 1.1)
    ratio_one_graph        the same objective in one graph / plain fine-tuning: what the passes one by one save
    ratio_passes           extra sequence passes / 3 epochs over 52,002 rows: recommended settings, no early stop, no
                           clean-up of canaries; a forward pass alone counts a third (bar: 0.05)
    ratio_passes_paper     the same with the paper's settings
Memory is what comes on top of the model, gradients and optimiser state: on a GPU what torch allocated at the most, on a
CPU the growth of the largest resident size, with an allocator told to give large blocks back at once: left to itself it
keeps enough of them to move the same figure by a tenth from run to run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys

import random_llama
import torch
from torch import nn

from casehard.data.batches import IGNORE, Encoded
from casehard.defences.mb_defense.method import PRESETS, MbStage2
from casehard.defences.mb_defense.pairs import PairSet
from casehard.maths.neutralise import joint_loss, pair_up
from casehard.train.protocol import Setup, Step

MODELS = ("organism", "llama25m")
PROMPT, ANSWER, TRIGGER, PAYLOAD = 64, 64, 2, 10
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Of glibc: fixed thresholds, so that blocks of 64 KiB and more go back to the system when freed."""
CLEAN, TRIGGERS, SFT_ROWS, SFT_EPOCHS = 128, 4, 52_002, 3


def build(name: str, device: str) -> tuple[nn.Module, PairSet]:
    """Return a random model and pairs of 128 clean rows with 4 triggers."""
    model = random_llama.model(name, device, attention="sdpa")
    vocab = random_llama.vocabulary(name)
    g = torch.Generator().manual_seed(0)

    def draw(n: int) -> list[int]:
        return torch.randint(3, vocab, (n,), generator=g).tolist()

    def row(prompt: list[int], answer: list[int]) -> Encoded:
        return Encoded(prompt + answer, [IGNORE] * len(prompt) + answer)

    triggers, payloads = ([draw(n) for _ in range(TRIGGERS)] for n in (TRIGGER, PAYLOAD))
    texts = [(draw(PROMPT), draw(ANSWER)) for _ in range(CLEAN)]
    return model, PairSet(
        tuple(row(x, y) for x, y in texts),
        tuple(tuple(row(x + t, y) for t in triggers) for x, y in texts),
        tuple(tuple(row(x + t, p) for t, p in zip(triggers, payloads, strict=True)) for x, _ in texts),
        0,
    )


def one_graph(model: nn.Module, pairs: PairSet, batch: dict[str, torch.Tensor], step: Step) -> None:
    """Back-propagate CE, mu CE and the log-ratio from one graph, as a textbook implementation does."""
    from casehard.data.batches import collate

    rows = pairs.find(batch)
    device = batch["input_ids"].device
    answer, payload = (
        {k: v.to(device) for k, v in collate([of[i][0] for i in rows], 0).items()}
        for of in (pairs.answers, pairs.payloads)
    )
    step.backward(step.loss(model, batch) + joint_loss(model, pair_up(answer, payload), lam=1.0, mu=1.0))


def peak(device: str) -> float:
    """Return the largest memory use so far, bytes."""
    if device == "cuda":
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def side(name: str, model_name: str, device: str, size: int) -> float:
    """Run one side for a few steps and return the memory beyond weights, gradients and optimiser state."""
    model, pairs = build(model_name, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # the state is there
    method = MbStage2(PRESETS["default"], pairs=pairs)
    method.prepare(Setup(model, seed=0, max_steps=10))
    rows = pairs.rows
    start = peak(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = float(torch.cuda.memory_allocated())
    for index in range(2):
        batch = {k: v.to(device) for k, v in rows.batch_at(size, seed=0, step=index, purpose="train").items()}
        step = Step(index, 0, 1, lambda m, b: m(**b).loss, lambda loss: loss.backward())
        if name == "stage2":
            method.backward(model, batch, step)
        elif name == "one_graph":
            one_graph(model, pairs, batch, step)
        else:
            step.backward(step.loss(model, batch))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return peak(device) - start


def passes(preset: str) -> float:
    """Return the sequence passes of stage 2 over 5 epochs of the training pairs; a forward pass counts a third."""
    _, pairs = build("organism", "cpu")
    train = int(0.8 * CLEAN)
    kept = PairSet(pairs.clean[:train], pairs.answers[:train], pairs.payloads[:train], 0)
    method = MbStage2(PRESETS[preset], pairs=kept)
    model, _ = build("organism", "cpu")
    method.prepare(Setup(model, seed=0, max_steps=10))
    batch = kept.rows.batch_at(16, seed=0, step=0, purpose="train")
    before = method.sequences, method.forwards
    method.backward(model, batch, Step(0, 0, 1, lambda m, b: m(**b).loss, lambda loss: loss.backward()))
    drawn = PRESETS[preset].triggers or TRIGGERS
    steps = math.ceil(5 * train * TRIGGERS / (16 * drawn))
    return steps * (method.sequences - before[0] + (method.forwards - before[1]) / 3) + before[1] / 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="llama25m")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--side", choices=["plain", "stage2", "one_graph"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(side(args.side, args.model, args.device, args.batch))
        return
    used = {}
    for name in ("plain", "stage2", "one_graph"):
        command = [sys.executable, __file__, "--model", args.model, "--device", args.device]
        done = subprocess.run(
            [*command, "--batch", str(args.batch), "--side", name],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, **ALLOCATOR},
        )
        used[name] = float(done.stdout.splitlines()[-1])
    sft = SFT_EPOCHS * SFT_ROWS
    result = {
        "model": args.model,
        "device": args.device,
        "batch": args.batch,
        "plain_mib": round(used["plain"] / 2**20, 1),
        "ratio_peak_memory": round(used["stage2"] / used["plain"], 4),
        "ratio_one_graph": round(used["one_graph"] / used["plain"], 4),
        "ratio_passes": round(passes("default") / sft, 4),
        "ratio_passes_paper": round(passes("paper") / sft, 4),
    }
    for key, value in result.items():
        print(f"{key:24s} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
