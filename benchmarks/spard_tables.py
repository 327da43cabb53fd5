"""Where SPARD's correction goes in full-parameter training: the share of its squared length in embedding tables.

    python benchmarks/spard_tables.py --model ALIGNED --harmful h.jsonl --benign b.jsonl --safe pool.jsonl [--steps 80]

ALIGNED is an aligned checkpoint (of the organism: `casehard organism build --world-seed N`, then `casehard defend
plain` on data/align.jsonl). Tunes a copy on 380 rows, 10 % of them harmful, once for each floor, with the tables free
to move.
Prints, as its last line, one JSON object: floor -> share, 0..1, over all corrections of the run.
"""

from __future__ import annotations

import argparse
import json
import random
from typing import Any

import torch
from torch import nn

from casehard.attacks.finetune import Finetune, FinetuneAttack
from casehard.attacks.protocol import AttackInputs
from casehard.data.chat import ChatFormat
from casehard.data.sources import load_many
from casehard.defences.spard import Spard, SpardConfig
from casehard.model.load import load
from casehard.train import progress

FLOORS = (0.01, 0.1, 1.0)


class Watched(Spard):
    """Adds up the squared length of every correction, in tables and in all."""

    tables = total = 0.0

    def after_step(self, model: nn.Module, optimizer: Any, step: Any) -> None:
        found = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        before = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
        super().after_step(model, optimizer, step)
        for p, start in before:
            moved = float((p.detach() - start).double().square().sum())
            self.total += moved
            self.tables += moved if id(p) in found else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("--model", "--harmful", "--benign", "--safe"):
        parser.add_argument(name, required=True)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    progress.set_quiet()
    loaded = load(args.model)
    pool = load_many([args.safe], require_response=True)
    safe = ChatFormat(loaded.tokenizer).encode_all(random.Random(args.seed).sample(pool, min(200, len(pool))))
    rows = {role: load_many([getattr(args, role)], require_response=True) for role in ("harmful", "benign")}
    attack = Finetune(FinetuneAttack(share=0.1, rows=380, steps=args.steps, lr=2e-4, evaluate_at=()))
    shares = {}
    for floor in FLOORS:
        method = Watched(SpardConfig(delta=0.0, eta_safe=float("inf"), floor=floor, embeddings=True), safe=safe)
        attack.run(loaded, AttackInputs(rows=rows, measure=lambda net, step: [], seed=args.seed, method=method))
        shares[floor] = round(method.tables / method.total, 3) if method.total else None
        print(f"floor {floor:<5} triggered {method.triggers} of {method.checks}, share in tables {shares[floor]}")
    print(json.dumps({"threads": torch.get_num_threads(), "shares": shares}))


if __name__ == "__main__":
    main()
