"""Count the passes of Patcher for some k1 and k2: python benchmarks/patcher_passes.py

A run of 300 steps on a random model of a few thousand parameters, as the loop counts them; ratios are to plain SFT.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from casehard.data.batches import Encoded, EncodedSet
from casehard.defences.patcher import Patcher, PatcherConfig
from casehard.maths.bilevel import Attacker
from casehard.train.fit import fit
from casehard.train.recipe import TrainConfig

STEPS = 300
CASES = ((10, 10), *((k1, k2) for k2 in (20, 50, 100) for k1 in (10, 50, 100, 200)))


def passes(k1: int, k2: int) -> int:
    """Return the passes of one run."""
    torch.manual_seed(0)
    size = {
        "vocab_size": 16,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
    }
    rows = EncodedSet(tuple(Encoded([3 + i, 4, 5], [-100, 4, 5]) for i in range(8)), pad_id=0)
    settings = PatcherConfig(round_steps=k2, attackers=(Attacker(steps=k1, lr=1e-3, batch_size=1),))
    config = TrainConfig(steps=STEPS, batch_size=1, lr=1e-3, precision="fp32")
    model = LlamaForCausalLM(LlamaConfig(**size))
    return fit(model, None, rows, config=config, method=Patcher(settings, unsafe=rows), seed=0).budget.passes


def main() -> None:
    """Print one row a case."""
    print("| k1 | k2 | passes | ratio |")
    for k1, k2 in CASES:
        count = passes(k1, k2)
        expected = STEPS + (STEPS - k2) + (STEPS // k2 - 1) * k1
        assert count == expected, (count, expected)
        print(f"| {k1} | {k2} | {count:,} | {count / STEPS:.1f} |", flush=True)


if __name__ == "__main__":
    main()
