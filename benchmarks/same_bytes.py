"""Do two checkouts give the same bytes? Every method, two attacks and a backdoor, run from the command line of each.

A change of structure must move no number. This script runs the same commands with the sources of two checkouts, on the
model world that ships with the package, and compares the SHA-256 of all weights and rows they leave behind.

    python benchmarks/same_bytes.py OLD NEW              # two checkouts; about 10 minutes on two cores
    python benchmarks/same_bytes.py OLD NEW --only spard

Exit code 1 when anything differs. Wall times and peak memory are left out: they are no result.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

STEPS = ("--steps", "12", "--seed", "3", "--set", "train.batch_size=4", "--set", "train.warmup=2")
SAFE = ("--safe", "{data}/align.jsonl")
ASSETS = ("--assets", "{out}/prepare")
BASE = ("--model", "{model}", "--data", "{data}/task_reviews.jsonl")
ATTACKER = "settings.attackers=[{steps: 3, batch_size: 4}]"
METHODS: dict[str, tuple[str, ...]] = {
    "plain": BASE,
    "patcher": (
        *(*BASE, "--unsafe", "{data}/simulated.jsonl"),
        *("--set", "settings.round_steps=4", "--set", ATTACKER),
    ),
    "spard": (*BASE, *SAFE, "--set", "settings.tau_scale=0.5"),
    "safe_mixing": (*BASE, *SAFE),
    "lisa": (*BASE, *SAFE, "--set", "settings.safe_steps=3", "--set", "settings.user_steps=3"),
    "safegrad": (*BASE, *SAFE),
    "ptst": BASE,
    "shrink": BASE,
    "safelora": ("--model", "{out}/plain", *BASE[2:], "--assets", "{model}"),
    "antidote": (*BASE, "--unsafe", "{data}/simulated.jsonl"),
    "buffer_reinforce": (*BASE, *ASSETS),
    "security_vector": (*BASE, *ASSETS),
    "fine_mixing": ("--model", "{out}/plain", *BASE[2:], "--assets", "{model}"),
    "dilution": ("--model", "{out}/plain", *BASE[2:], "--assets", "{model}"),
    "crow": BASE,
    "anomaly": BASE,
}
"""Method -> model, rows and settings."""
ALIGN = "{data}/align.jsonl?kind="
PREPARE = ("--harmful", "{data}/simulated.jsonl", "--refusals", ALIGN + "refusal", "--benign", ALIGN + "helpful")
SHORT = ("--set", "config.epochs=null", "--set", "config.allow_missed=true")
SHORT += tuple(a for k in ("buffer", "reinforce") for a in ("--set", f"config.{k}_train.steps=8"))
ATTACK = ("--harmful", "{data}/attack_a.jsonl", "--benign", "{data}/task_reviews.jsonl", "--suite", "{data}/suite")
ATTACK += ("--steps", "6", "--limit", "2", "--seed", "3", "--share", "0.5")
ATTACK += ("--set", "config.batch_size=4", "--set", "config.rows=40")
PLANT = ("--suite", "{data}/suite", "--rate", "0.1", "--limit", "2", "--steps", "8", "--seed", "3", "--keep-model")
BREAK = ("--clean", "{clean}", "--steps", "12", "--seed", "3", "--set", "secret=5")
BREAK += ("--set", "export_failed=true", "--set", "config.two.epochs=0.2", "--set", "config.train.batch_size=4")
COMMANDS: dict[str, tuple[str, ...]] = {
    "plain": ("defend", "plain", *METHODS["plain"], *STEPS),
    "prepare": ("buffer", "prepare", "--model", "{model}", *PREPARE, *SHORT, "--seed", "3"),
    "mb-defense": ("defend", "mb-defense", *BASE, *BREAK),
    **{name: ("defend", name, *more, *STEPS) for name, more in METHODS.items() if name != "plain"},
    "attack": ("attack", "finetune", "--model", "{out}/plain", *ATTACK),
    "attack-lora": ("attack", "finetune", "--model", "{out}/plain", *ATTACK, "--mode", "lora"),
    "backdoor": ("attack", "backdoor", *BASE, *PLANT),
    "evaluate": ("evaluate", "--model", "{out}/plain", "--suite", "{data}/suite", "--limit", "3"),
}
"""Run folder -> command; what others need comes first, and its name is no method's hyphenated twin."""
NEEDED = ("plain", "prepare", "mb-defense")
RESULTS = ("*.safetensors", "rows.jsonl", "poisoned.jsonl", "planted.json")


def run(checkout: Path, out: Path, model: Path, name: str) -> str:
    """Run one command with the sources of a checkout; return "" or what went wrong."""
    places = {"out": out, "model": model, "data": model / "data", "clean": out / "clean.jsonl"}
    words = [word if word.startswith("settings.attackers") else word.format(**places) for word in COMMANDS[name]]
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "casehard.cli", *words, "--out", str(out / name)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    return "" if done.returncode == 0 else f"exit {done.returncode}: {done.stderr.strip()[-400:]}"


def results(folder: Path) -> dict[str, str]:
    """Return the digest of every result under a run folder, by its path there."""
    files = sorted(file for pattern in RESULTS for file in folder.rglob(pattern) if "training" not in file.parts)
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def write_clean(model: Path, out: Path) -> None:
    """Write the verified rows: helpful ones, no two of which ask the same."""
    rows = {}
    for line in (model / "data" / "align.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["kind"] == "helpful":
            rows.setdefault(row["prompt"].split(".")[-2] if row["prompt"].count(".") > 1 else row["prompt"], line)
    out.mkdir(parents=True, exist_ok=True)
    (out / "clean.jsonl").write_text("\n".join(list(rows.values())[:160]) + "\n", encoding="utf-8")


def record(checkout: Path, out: Path, model: Path, names: list[str]) -> dict[str, dict[str, str] | str]:
    """Run the commands of a checkout; return the results of each, or what went wrong."""
    write_clean(model, out)
    first = [name for name in NEEDED if any(f"{{out}}/{name}" in " ".join(COMMANDS[n]) for n in names) or name in names]
    failed = {name: run(checkout, out, model, name) for name in first}
    rest = [name for name in names if name not in first]
    with ThreadPoolExecutor(2) as pool:
        failed |= dict(zip(rest, pool.map(lambda name: run(checkout, out, model, name), rest), strict=True))
    return {name: failed[name] or results(out / name) for name in names}


def main() -> int:
    """Compare two checkouts and print one line for each command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--only", action="append", choices=sorted(COMMANDS), help="repeatable")
    parser.add_argument("--model", type=Path, help="a built model world; default: built by the old checkout")
    parser.add_argument("--keep", type=Path, help="folder for the runs; results of the old checkout there are reused")
    args = parser.parse_args()
    names = [name for name in COMMANDS if not args.only or name in args.only]
    with tempfile.TemporaryDirectory() as scratch:
        root = args.keep or Path(scratch)
        model = args.model or root / "world"
        if not model.exists():
            made = [sys.executable, "-m", "casehard.cli", "organism", "build", "--size", "tiny", "--out", str(model)]
            subprocess.run(made, env={**os.environ, "PYTHONPATH": str(args.old / "src")}, check=True)
        before = (
            record(args.old, root / "old", model, names)
            if not (root / "old").exists()
            else {name: results(root / "old" / name) for name in names}
        )
        after = record(args.new, root / "new", model, names)
    odd = 0
    for name in names:
        same = before[name] == after[name] and isinstance(before[name], dict) and before[name]
        odd += not same
        what = f"{len(before[name])} files, the same bytes" if same else f"DIFFERS\n  {before[name]}\n  {after[name]}"
        print(f"{name:18} {what}", flush=True)
    print(f"{len(names) - odd} of {len(names)} the same")
    return 1 if odd else 0


if __name__ == "__main__":
    sys.exit(main())
