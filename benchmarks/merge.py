"""Time the factor-space merge of two adapter folders of 8B shape against the dense way; print one JSON object last.

160 layers (32 blocks: q, v, gate, up and down of a Llama-3-8B: 4096, 1024 and 14336 wide), rank 32 and 32.
Ours: the whole job, folders in, folder out, with every check, digest and fsync of `casehard merge reinforce`.
Dense: the published way, on one layer of each of the five shapes, in memory (nothing read or written), times 32.
Both run in one process, with the same threads, equally often; times are medians.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from casehard.maths.merge import LoraPair, MergeConfig, dense_parity, merge_pair
from casehard.model.lora_files import AdapterReader, LayerShape
from casehard.model.lora_write import write_adapter
from casehard.model.merge import merge_folders

WIDE, NARROW, HIDDEN, BLOCKS, RANK = 4096, 1024, 14336, 32, 32
SHAPES = {
    "self_attn.q_proj": (WIDE, WIDE),
    "self_attn.v_proj": (NARROW, WIDE),
    "mlp.gate_proj": (HIDDEN, WIDE),
    "mlp.up_proj": (HIDDEN, WIDE),
    "mlp.down_proj": (WIDE, HIDDEN),
}


def write(folder: Path, *, blocks: int, seed: int) -> Path:
    """Write a random adapter, layer by layer."""
    shapes = {f"model.layers.{i}.{n}": LayerShape(*s, RANK) for i in range(blocks) for n, s in SHAPES.items()}
    g = torch.Generator().manual_seed(seed)

    def pairs() -> Iterator[tuple[str, LoraPair]]:
        for name, (d_out, d_in, r) in shapes.items():
            a = torch.randn(r, d_in, generator=g) / d_in**0.5
            yield name, LoraPair(a, 1e-3 * torch.randn(d_out, r, generator=g), 2.0)

    folder.mkdir()
    targets = {name.rpartition(".")[2] for name in SHAPES}
    write_adapter(folder, shapes, pairs(), rank=RANK, target_modules=targets)
    return folder


def error(user: LoraPair, reinforce: LoraPair, merged: LoraPair, config: MergeConfig, rows: int = 256) -> float:
    """Return the relative Frobenius error of a merged layer against the dense float64 one, a few rows at a time."""
    u, r, m = user.wide(), reinforce.wide(), merged.wide()
    q = torch.linalg.qr(u.b).Q
    seen = q.T @ r.b @ r.a
    wrong = whole = 0.0
    for at in range(0, len(u.b), rows):
        part = slice(at, at + rows)
        left = r.b[part] @ r.a - config.alpha * (q[part] @ seen)
        want = config.c_user * u.scale * (u.b[part] @ u.a) + config.c_reinforce * r.scale * left
        served = m.scale * (m.b[part] @ m.a)
        if config.form == "absorb":
            served += config.c_reinforce * r.scale * (r.b[part] @ r.a)
        wrong += float((served - want).square().sum())
        whole += float(want.square().sum())
    return (wrong / whole) ** 0.5


def flops(user: LoraPair, reinforce: LoraPair, config: MergeConfig) -> tuple[float, float]:
    """Return the FLOPs of one layer, ours and dense: products as counted by torch, factorisations by formula."""
    counts = []
    for call in (lambda: merge_pair(user, reinforce, config), lambda: dense_parity(user, reinforce)):
        with FlopCounterMode(display=False) as counter:
            call()
        counts.append(float(counter.get_total_flops()))
    d_out, d_in, r = len(user.b), user.a.shape[1], user.rank
    # QR with Q: 4 d r^2; R only: 2 d r^2; SVD of the core: about 22 r^3.
    return counts[0] + 4 * d_out * r * r + 2 * d_in * r * r + 22 * r**3, counts[1] + 4 * d_out * r * r


def peak_gb() -> float:
    """Return the peak resident memory of the process since the last reset, in GB."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--form", default="concat", choices=["concat", "absorb"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = MergeConfig(form=args.form, c_user=0.5, alpha=0.1, protect_safety=False)

    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        user, reinforce = (write(home / n, blocks=args.blocks, seed=s) for s, n in enumerate(("user", "reinforce")))
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        samples, busy = [], []
        for _ in range(args.repeats):
            start, processor = time.perf_counter(), time.process_time()
            made = merge_folders(user, reinforce, home / "out", config)
            samples.append(time.perf_counter() - start)
            busy.append(time.process_time() - processor)
        seconds, peak = statistics.median(samples), peak_gb()

        dense_samples, ours, dense, worst = [0.0] * args.repeats, 0.0, 0.0, 0.0
        with AdapterReader(user) as u, AdapterReader(reinforce) as r, AdapterReader(home / "out") as m:
            for kind, (d_out, d_in) in SHAPES.items():
                name = f"model.layers.0.{kind}"
                one, two = u.pair(name), r.pair(name)
                base = torch.randn(d_out, d_in).half()
                for i in range(args.repeats):
                    start = time.perf_counter()
                    dense_parity(one, two, base=base, alpha=config.alpha)
                    dense_samples[i] += args.blocks * (time.perf_counter() - start)
                counted = flops(one, two, config)
                ours, dense = ours + args.blocks * counted[0], dense + args.blocks * counted[1]
                worst = max(worst, error(one, two, m.pair(name), config))
    dense_seconds = statistics.median(dense_samples)
    result = {
        "seconds": round(seconds, 2),
        "peak_gb": round(peak, 3),
        "speedup_vs_dense": round(dense_seconds / seconds, 1),
        "max_rel_error": worst,
        "flops_ratio": round(dense / ours, 1),
        "processor_seconds": round(statistics.median(busy), 2),  # what other work on the machine disturbs less
        "gflop": round(ours / 1e9, 1),
        "dense_seconds": round(dense_seconds, 1),
        "dense_from_layers": len(SHAPES),
        "seconds_all": [round(s, 2) for s in samples],
        "dense_seconds_all": [round(s, 1) for s in dense_samples],
        "layers": made.layers,
        "form": config.form,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
