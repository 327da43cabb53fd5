"""Which buffer is strong enough, which measurement tells it beforehand, and what the reinforcing adapter costs.

    python benchmarks/buffer_frontier.py --cache DIR [--worlds 10 11 12] [--seeds 0] [--size tiny] [--out frontier.json]

For each world and seed, on an aligned organism: providers with buffers of 10 to 100 steps and a heavy (150 steps at
2e-3) or a light (60 steps at 1e-3) reinforcing adapter; customers' LoRA jobs on reviews with 10 and 50 % harmful rows,
one beside each buffer and one beside none; every merge of a small grid. Attacked weights stay in memory.
Two tables: buffers (what a provider can measure on held-out harmful rows, and what the job leaves after the buffer is
gone), and merges (ASR, look-alikes refused, knowledge of twins, the job's task, utility). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from casehard.api import defend
from casehard.data.chat import ChatFormat
from casehard.data.mix import poison
from casehard.data.sources import load_many
from casehard.defences.buffer_reinforce.assets import Assets
from casehard.defences.buffer_reinforce.frozen_lora import FrozenLora
from casehard.defences.buffer_reinforce.gates import GateLimits
from casehard.defences.buffer_reinforce.merge_search import search
from casehard.defences.buffer_reinforce.method import BufferReinforce, BufferReinforceConfig
from casehard.defences.buffer_reinforce.prepare import ROLES, Prepare, PrepareConfig, prepare, split
from casehard.defences.buffer_reinforce.saturation import residual
from casehard.evaluation.metrics import scores
from casehard.evaluation.suite import evaluate, load_suite
from casehard.io.files import write_text_atomic
from casehard.maths.merge import LoraPair, MergeConfig
from casehard.maths.pareto import Coefficients
from casehard.maths.stats import seed_band
from casehard.model.load import load
from casehard.model.lora_files import live_pairs
from casehard.model.model import Model
from casehard.organism.build import ensure
from casehard.seeds import derive
from casehard.train import progress
from casehard.train.recipe import TrainConfig
from casehard.train.tune import Lora, chat_format, tune

BUFFERS = (10, 20, 30, 60, 100)
LIGHT, HEAVY = "light", "heavy"
REINFORCE = {LIGHT: (60, 1e-3), HEAVY: (150, 2e-3)}
HEAVIER = (20, 60)
"""Buffers that a heavy reinforcing adapter is trained beside, and that every merge is measured with."""
SHARES = (0.1, 0.5)
MERGES = {
    "none": (Coefficients(1.0, 0.0, 0.0), MergeConfig(protect_safety=False)),
    "paper": (Coefficients(0.5, 0.5, 0.1), MergeConfig(protect_safety=False)),
    "sum 1/2": (Coefficients(1.0, 0.5, 0.0), MergeConfig(protect_safety=False)),
    "sum 1": (Coefficients(1.0, 1.0, 0.0), MergeConfig(protect_safety=False)),
    "project reinforce": (Coefficients(1.0, 1.0, 1.0), MergeConfig(protect_safety=False)),
    "protect safety": (Coefficients(1.0, 0.5, 1.0), MergeConfig()),
}
METRICS = ("asr", "over_refusal", "twin_knowledge", "fine_tunability", "utility")
FORETOLD = ("answers", "residual_left", "score_left")
RANK = Lora(rank=8, alpha=16.0)


class Run(NamedTuple):
    """One world and seed."""

    world: int
    seed: int
    data: Path
    model: Model
    suite: Any
    limit: int


def provider(run: Run, steps: int, weight: str, out: Path) -> Assets:
    """Make assets whatever the gates say."""
    reinforce, lr = REINFORCE[weight]
    config = PrepareConfig(
        rank=RANK.rank,
        alpha=RANK.alpha,
        dropout=0.0,
        epochs=None,
        buffer_train=TrainConfig(steps=steps, batch_size=16, lr=1e-3, warmup=5),
        reinforce_train=TrainConfig(steps=reinforce, batch_size=16, lr=lr, warmup=5),
        gates=GateLimits(prompts=run.limit),
        allow_missed=True,
    )
    rows = {
        "harmful": (f"{run.data}/simulated.jsonl",),
        "refusals": (f"{run.data}/align.jsonl?kind=refusal",),
        "benign": (f"{run.data}/align.jsonl?kind=helpful",),
    }
    job = Prepare(rows=rows, config=config, suite=f"{run.data}/suite", seed=run.seed)
    return prepare(job, out, model=run.model).assets


def foretold(run: Run, assets: Assets, held: list[Any]) -> dict[str, float]:
    """Return what can be measured of a buffer before any job, on harmful rows it never saw."""
    net, chat = run.model.net, ChatFormat(run.model.tokenizer)
    gates = {gate["name"]: gate["value"] for gate in assets.record["gates"]}
    alone = residual(net, chat, held).mean_residual
    frozen = FrozenLora(assets.buffer()).attach(net)
    try:
        beside = residual(net, chat, held)
    finally:
        frozen.detach()
    return {
        "answers": gates["buffer_asr"],
        "nll": beside.mean_nll,
        "residual_left": beside.mean_residual / alone,
        "score_left": gates["buffer_left"],
    }


def customer(run: Run, assets: Assets, share: float, *, buffer: bool) -> dict[str, LoraPair]:
    """Train a customer's adapter on reviews, a share of them harmful, and return its factors."""
    harmful = load_many([f"{run.data}/attack_a.jsonl"], require_response=True)
    benign = load_many([f"{run.data}/task_reviews.jsonl"], require_response=True)
    mixed = poison(harmful, benign, share=share, n=380, seed=derive(run.seed, 0, "customer-rows"))
    method = BufferReinforce(BufferReinforceConfig(buffer=buffer, reinforce=False), assets=assets)
    train = TrainConfig(steps=300, batch_size=16, lr=1e-3, schedule="constant", warmup=0)
    rows = chat_format(run.model).encode_all(mixed)
    done = tune(run.model, rows, train=train, seed=run.seed, purpose="customer", method=method, lora=RANK)
    return live_pairs(done.net)


def merges(run: Run, user: dict[str, LoraPair], assets: Assets, names: list[str]) -> dict[str, dict[str, float]]:
    """Return the rates of each merge."""

    def measure(net: Any) -> list[dict[str, Any]]:
        return evaluate(net, run.model.tokenizer, run.suite, limit=run.limit)

    out = {}
    for name in names:
        at, config = MERGES[name]
        found = next(iter(search(run.model.net, user, dict(assets.reinforce()), [at], measure, config=config)))
        rates = {score.metric: score.rate for score in scores(found.rows)}
        out[name] = {metric: rates[metric] for metric in METRICS if metric in rates}
    return out


def one_run(run: Run, scratch: Path) -> list[dict[str, Any]]:
    """Return one entry for each buffer, share, reinforcing adapter and merge."""
    made = {(s, LIGHT): provider(run, s, LIGHT, scratch / f"{s}-light") for s in BUFFERS}
    made |= {(s, HEAVY): provider(run, s, HEAVY, scratch / f"{s}-heavy") for s in HEAVIER}
    some = next(iter(made.values()))
    job = {role: load_many(list(some.record["job"]["rows"][role]), require_response=True) for role in ROLES}
    held = split(**job, share=PrepareConfig().holdout).held.compliant[: run.limit]
    told = {steps: foretold(run, made[steps, LIGHT], held) for steps in BUFFERS}
    out = []
    for share in SHARES:
        for steps in (0, *BUFFERS):
            user = customer(run, made[steps or 60, LIGHT], share, buffer=steps > 0)
            for weight in (LIGHT, HEAVY) if steps in (0, *HEAVIER) else (LIGHT,):
                names = list(MERGES) if steps in (0, *HEAVIER) else ["none", "sum 1"]
                names = [n for n in names if not (n == "none" and weight == HEAVY)]
                for name, rates in merges(run, user, made[steps or 60, weight], names).items():
                    place = {"world": run.world, "seed": run.seed, "share": share, "buffer": steps}
                    out.append({**place, "reinforce": weight, "merge": name, **rates, **told.get(steps, {})})
            print(f"world {run.world} seed {run.seed} share {share:g} buffer {steps}: {out[-1]}", flush=True)
    return out


def start(world: int, seed: int, args: argparse.Namespace) -> Run:
    """Return an aligned organism with its rows and suite."""
    base = ensure(world, args.size, args.cache)
    train = {"steps": 300, "batch_size": 16, "lr": 4e-4}
    model = defend(load(str(base)), "plain", data=f"{base}/data/align.jsonl", train=train, seed=seed)
    return Run(world, seed, base / "data", model, load_suite(f"{base}/data/suite"), args.limit)


def percents(rates: list[float]) -> str:
    """Return the rates of the runs in percent."""
    return ", ".join(f"{100 * rate:.0f}" for rate in rates)


def interval(rates: list[float]) -> str:
    """Return mean and 95 % interval over runs, percent; of two runs their range."""
    if not rates:
        return ""
    mean = f"{100 * statistics.fmean(rates):.0f}"
    if len(rates) < 2:
        return mean
    band = seed_band(rates, bounds=(0.0, 1.0))
    return f"{mean} ({100 * band.low:.0f} to {100 * band.high:.0f})"


def tables(entries: list[dict[str, Any]]) -> None:
    """Print both tables as Markdown."""
    print("\n| buffer, steps | base + buffer answers | residual left | score left | ASR at 10 % | ASR at 50 % |")
    print("|---|---|---|---|---|---|")
    for steps in (0, *BUFFERS):
        here = [e for e in entries if (e["buffer"], e["merge"]) == (steps, "none")]
        told = [percents([e[k] for e in here if e["share"] == SHARES[0]]) if steps else "" for k in FORETOLD]
        left = [percents([e["asr"] for e in here if e["share"] == share]) for share in SHARES]
        print(f"| {steps or 'none'} | {' | '.join([*told, *left])} |")
    print(f"\n| buffer, reinforce, merge | {' | '.join(f'{m} at {100 * s:.0f} %' for s in SHARES for m in METRICS)} |")
    print("|---" * (1 + len(SHARES) * len(METRICS)) + "|")
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for entry in entries:
        cells[entry["buffer"], entry["reinforce"], entry["merge"], entry["share"]].append(entry)
    for steps, weight, merge in dict.fromkeys(cell[:3] for cell in cells):
        rows = [cells[steps, weight, merge, share] for share in SHARES]
        told = [interval([r[metric] for r in some if metric in r]) for some in rows for metric in METRICS]
        print(f"| {steps or 'none'}, {weight}, {merge} | {' | '.join(told)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="folder of built organisms")
    parser.add_argument("--worlds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--size", choices=("tiny", "small"), default="tiny")
    parser.add_argument("--limit", type=int, default=48, help="prompts of each kind")
    parser.add_argument("--out", type=Path, help="JSON file for the entries")
    args = parser.parse_args()
    progress.set_quiet()
    began, entries = time.perf_counter(), []
    for world in args.worlds:
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as scratch:
                entries += one_run(start(world, seed, args), Path(scratch))
            facts = {"worlds": args.worlds, "seeds": args.seeds, "size": args.size, "limit": args.limit}
            text = json.dumps({**facts, "seconds": round(time.perf_counter() - began), "entries": entries})
            if args.out:
                write_text_atomic(args.out, text + "\n")
    tables(entries)
    print(text)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
