"""What coefficients, projection and basis of the merge change: one customer's adapter a case, measured often.

    python benchmarks/merge_grid.py --cache DIR [--worlds 0 1 2] [--cases weak,wide] [--out grid.json]

Per world (small organism, aligned by plain SFT): a provider's reinforce adapter, and customers' LoRAs on translation
rows, half of them harmful (400 steps, the job of plans/buffer_reinforce_merges.yaml):
    weak   rank 8, tuned beside a buffer of 20 steps, which alone does not hold: the merge has something to do
    wide   rank 64, beside the same buffer: its output space covers half of every layer, so the projection takes a lot
    open   rank 8, no buffer: the merge has to do everything (not by default)
Every point is measured in memory on the suite (restricted prompts, look-alikes, the customer's task). Differences are
paired by prompt, with the interval of the benchmark's report. Attacked weights are never written.
Prints tables and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from casehard.attacks.finetune import Finetune as FinetuneAttack
from casehard.attacks.finetune import FinetuneAttack as FinetuneSettings
from casehard.attacks.protocol import AttackInputs
from casehard.benchmark.contrasts import contrast
from casehard.data.sources import load_many
from casehard.defences.buffer_reinforce.gates import GateLimits
from casehard.defences.buffer_reinforce.merge_search import search
from casehard.defences.buffer_reinforce.method import BufferReinforce, BufferReinforceConfig
from casehard.defences.buffer_reinforce.prepare import Prepare, PrepareConfig, prepare
from casehard.evaluation.metrics import find
from casehard.evaluation.suite import evaluate, load_suite
from casehard.io.files import write_text_atomic
from casehard.maths.merge import LoraPair, MergeConfig, merge_states
from casehard.maths.pareto import Coefficients
from casehard.maths.stats import seed_band
from casehard.model.load import load
from casehard.model.lora_files import live_pairs
from casehard.organism.build import ensure
from casehard.steps import Finetune, harden
from casehard.train import progress
from casehard.train.recipe import TrainConfig

METRICS = ("asr", "over_refusal", "twin_knowledge", "fine_tunability")
CASES = {"weak": (8, 20), "wide": (64, 20), "open": (8, 0)}
"""Case -> (rank of the customer's adapter, steps of the buffer beside it; 0 = none)."""
FULL_BUFFER = 60

Pairs = dict[str, LoraPair]
Key = tuple[str, float, float, float, str]
"""Case, c_U, c_R, alpha, basis."""


def grid(case: str) -> list[tuple[Coefficients, MergeConfig]]:
    """Return the points of a case: the c x alpha grid (its edge for ``wide``), and at full projection every basis."""
    weights, alphas = ((1.0,), (0.0, 1.0)) if case == "wide" else ((0.5, 1.0), (0.0, 0.1, 1.0))
    out = [(Coefficients(c, 0.0, 0.0), MergeConfig(protect_safety=False)) for c in weights]
    for c_user in weights:
        for c_reinforce in (0.5, 1.0):
            out += [(Coefficients(c_user, c_reinforce, alpha), MergeConfig(protect_safety=False)) for alpha in alphas]
    out.append((Coefficients(1.0, 0.5, 1.0), MergeConfig(basis="paper", protect_safety=False)))
    out.append((Coefficients(1.0, 0.5, 1.0), MergeConfig()))
    return out


def provider(base: Path, model: Path, out: Path, steps: int) -> Any:
    """Make assets with a buffer of ``steps`` steps, whatever the gates say."""
    data = base / "data"
    config = PrepareConfig(
        rank=8,
        alpha=16.0,
        dropout=0.0,
        epochs=None,
        buffer_train=TrainConfig(steps=steps, batch_size=16, lr=1e-3, warmup=5 if steps > 10 else 0),
        reinforce_train=TrainConfig(steps=150, batch_size=16, lr=2e-3, warmup=5),
        gates=GateLimits(prompts=100),
        allow_missed=True,
    )
    rows = {
        "harmful": (f"{data}/simulated.jsonl",),
        "refusals": (f"{data}/align.jsonl?kind=refusal",),
        "benign": (f"{data}/align.jsonl?kind=helpful",),
    }
    return prepare(Prepare(model=str(model), rows=rows, config=config, suite=f"{data}/suite"), out).assets


def customer(base: Path, loaded: Any, assets: Any, case: str, share: float) -> Pairs:
    """Train the customer's adapter of a case and return its factors."""
    rank, steps = CASES[case]
    settings = FinetuneSettings(
        mode="lora", share=share, rows=380, steps=400, lr=5e-4, rank=rank, alpha=2.0 * rank, evaluate_at=()
    )
    method = BufferReinforce(BufferReinforceConfig(buffer=steps > 0, reinforce=False), assets=assets)
    rows = {
        role: load_many([f"{base}/data/{name}.jsonl"], require_response=True)
        for role, name in (("harmful", "attack_a"), ("benign", "task_translation"))
    }
    done = FinetuneAttack(settings).run(
        loaded, AttackInputs(rows=rows, measure=lambda net, step: [], seed=0, method=method)
    )
    return live_pairs(done.model.net)


def overlap(user: Pairs, reinforce: Pairs, config: MergeConfig) -> float:
    """Return the share of the reinforcing update's energy that the basis can take, over all layers."""
    reports = merge_states(user, reinforce, config).reports.values()
    whole = [(r.norm_user if config.protect_safety else r.norm_reinforce) ** 2 for r in reports]
    return sum(w * r.removed for w, r in zip(whole, reports, strict=True)) / sum(whole)


def one_world(world: int, cases: list[str], share: float, cache: Path, scratch: Path) -> dict[Key, dict[str, Any]]:
    """Measure every case of a world: point -> what was answered, prompt by prompt, and the overlap."""
    base = ensure(world, "small", cache)
    align = Finetune(
        model=str(base),
        method="plain",
        rows={"data": (f"{base}/data/align.jsonl",)},
        train=TrainConfig(steps=300, batch_size=16, lr=4e-4),
        suite=f"{base}/data/suite",
    )
    model = harden(align, scratch / "aligned")[1].path
    loaded, suite = load(str(model)), load_suite(f"{base}/data/suite_translation")
    made = {n: provider(base, model, scratch / f"buffer-{n}", n) for n in {CASES[c][1] or FULL_BUFFER for c in cases}}
    out: dict[Key, dict[str, Any]] = {}
    for case in cases:
        assets = made[CASES[case][1] or FULL_BUFFER]
        user, reinforce = customer(base, loaded, assets, case, share), dict(assets.reinforce())

        def measure(model: Any) -> list[dict[str, Any]]:
            return evaluate(model, loaded.tokenizer, suite, roles={"restricted", "lookalike", "task"})

        for at, config in grid(case):
            name = "protect_safety" if config.protect_safety else config.basis
            found = next(iter(search(loaded.net, user, reinforce, [at], measure, config=config)))
            outcomes = {m: {r["id"]: find(m).outcome(r) for r in found.rows} for m in METRICS}
            told = {m: {i: float(v) for i, v in rows.items() if v is not None} for m, rows in outcomes.items()}
            out[(case, *at, name)] = {"outcomes": told, "overlap": overlap(user, reinforce, config)}
    return out


def summary(worlds: dict[int, dict[Key, dict[str, Any]]], twin: Key, key: Key) -> dict[str, Any]:
    """Return means over worlds with intervals, and the paired differences to ``twin``."""
    entry: dict[str, Any] = {
        "point": key,
        "overlap": statistics.fmean(w[key]["overlap"] for w in worlds.values()),
        "against": twin if twin != key else None,
    }
    for metric in METRICS:
        rates = [statistics.fmean(w[key]["outcomes"][metric].values()) for w in worlds.values()]
        band = seed_band(rates, bounds=(0.0, 1.0))
        entry[metric] = {"mean": band.mean, "low": band.low, "high": band.high, "worlds": rates}
        if twin != key:
            mine, other = (
                {(str(n), i, 0): v for n, w in worlds.items() for i, v in w[k]["outcomes"][metric].items()}
                for k in (key, twin)
            )
            found = contrast(mine, other)
            assert found is not None
            entry[metric] |= {k: found[k] for k in ("difference", "no_difference")}
            entry[metric] |= {"difference_low": found["low"], "difference_high": found["high"]}
    return entry


def show(entry: dict[str, Any]) -> str:
    """Return one line of the printed table."""
    case, c_user, c_reinforce, alpha, basis = entry["point"]
    cells = [f"{case:5} {c_user:g} U {c_reinforce:g} R alpha {alpha:<4g} {basis:15} taken {entry['overlap']:.3f}"]
    for metric in METRICS:
        m = entry[metric]
        text = f"{metric} {100 * m['mean']:5.1f} ({100 * m['low']:.0f} to {100 * m['high']:.0f})"
        if "difference" in m:
            low, high = m["difference_low"], m["difference_high"]
            text += f" [{100 * m['difference']:+.1f}, {100 * low:+.1f} to {100 * high:+.1f}]"
        cells.append(text)
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="folder of built organisms")
    parser.add_argument("--worlds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cases", default="weak,wide")
    parser.add_argument("--share", type=float, default=0.5, help="harmful share of the customer's rows")
    parser.add_argument("--out", type=Path, help="JSON file for the entries")
    args = parser.parse_args()
    progress.set_quiet()
    cases = args.cases.split(",")
    started, worlds = time.perf_counter(), {}
    for world in args.worlds:
        with tempfile.TemporaryDirectory() as scratch:
            worlds[world] = one_world(world, cases, args.share, args.cache, Path(scratch))
        print(f"world {world} done after {time.perf_counter() - started:.0f} s", flush=True)
    # Every point is compared with the plain sum of the same coefficients: what the projection adds.
    keys = list(worlds[args.worlds[0]])
    entries = [summary(worlds, (*key[:3], 0.0, "output"), key) for key in keys]
    for entry in entries:
        print(show(entry))
    facts = {"worlds": args.worlds, "share": args.share, "threads": torch.get_num_threads()}
    text = json.dumps({**facts, "seconds": round(time.perf_counter() - started), "entries": entries})
    if args.out:
        write_text_atomic(args.out, text + "\n")
    print(text)


if __name__ == "__main__":
    main()
