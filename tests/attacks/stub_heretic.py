"""What heretic 1.4 asks, and what it makes of the answers: the stub of a program in an environment of its own."""

import os
import shutil
import sys
import tomllib
from pathlib import Path

from safetensors.numpy import load_file, save_file

FRONT = {
    "broken": "3/4, KL divergence: 2.1000",
    "good": "1/4, KL divergence: 0.3000",
    "idle": "4/4, KL divergence: 0.0001",
}


def choose(question: str, choices: list[str]) -> str:
    print(f"\n{question}")
    for number, text in enumerate(choices, 1):
        print(f"[{number}] {text}")
    return choices[int(input("Enter number: ")) - 1]


told = tomllib.loads(Path("config.toml").read_text(encoding="utf-8"))
counts = {
    kind: len(Path(told[kind]["dataset"]).read_text(encoding="utf-8").splitlines())
    for kind in told
    if "_prompts" in kind
}
print("settings", told["seed"], told["export_strategy"], counts, sys.argv[1:], os.environ["HF_HUB_OFFLINE"])
if "--fail" in sys.argv:
    sys.exit("no such device")
if "--ask" in sys.argv:
    choose("Where were we?", ["go on", "begin again"])
trials = {f"[Trial {at:>3}] Refusals: {text}": name for at, (name, text) in enumerate(FRONT.items())}
while (
    picked := choose("Which trial do you want to use?", [*trials, "Run additional trials", "Exit program"])
) != "Exit program":
    while (
        action := choose("What now?", ["Save the model to a local folder", "Chat with the model", "Return to the menu"])
    ) != "Return to the menu":
        out = Path(input("Path to the folder:: "))
        shutil.copytree(told["model"], out)
        weights = load_file(out / "model.safetensors")
        factor = {"broken": 0.0, "good": 0.5, "idle": 1.0}[trials[picked]]
        halved = {n: w * w.dtype.type(factor) if n.endswith("o_proj.weight") else w for n, w in weights.items()}
        save_file(halved, out / "model.safetensors", metadata={"format": "pt"})
        print(f"saved {action} {out.name}")
