"""Stands in for the program lm_eval 0.4: leaves results in its layout, or misbehaves as the variable HOW says."""

import argparse
import json
import os
import pathlib
import re
import sys
import time

parser = argparse.ArgumentParser()
for name in (
    "model",
    "model_args",
    "tasks",
    "device",
    "batch_size",
    "seed",
    "limit",
    "system_instruction",
    "output_path",
):
    parser.add_argument(f"--{name}")
parser.add_argument("--apply_chat_template", action="store_true")
asked = parser.parse_args()
how = os.environ.get("HOW", "")
if how == "hangs":
    time.sleep(60)
if how == "fails":
    sys.exit("no data set of that name")
if how == "nothing":
    sys.exit(0)
folder = dict(part.split("=", 1) for part in asked.model_args.split(","))["pretrained"]
assert pathlib.Path(folder, "config.json").is_file()
metrics = {
    "mmlu": {"alias": "mmlu", "acc,none": 0.25, "acc_stderr,none": 0.01},
    "gsm8k": {
        "alias": "gsm8k",
        "exact_match,strict-match": 0.5,
        "exact_match_stderr,strict-match": 0.05,
        "exact_match,flexible-extract": 0.75,
        "exact_match_stderr,flexible-extract": 0.25,
    },
    "ifeval": {"alias": "ifeval", "inst_level_strict_acc,none": 0.4, "inst_level_strict_acc_stderr,none": "N/A"},
}
tasks = asked.tasks.split(",")
results = {name: metrics[name] for name in tasks if name in metrics and how != f"without {name}"}
if "mmlu" in tasks:
    results["mmlu_anatomy"] = {"alias": " - anatomy", "acc,none": 0.1, "acc_stderr,none": 0.02}
if how == "nan":
    results[tasks[0]] = {"alias": tasks[0], "acc,none": float("nan")}
text = json.dumps(
    {
        "results": results,
        "groups": {},
        "n-samples": {name: {"original": 200, "effective": int(asked.limit or 100)} for name in results},
        "config": {"model": asked.model, "argv": sys.argv[1:]},
    }
)
out = pathlib.Path(asked.output_path, re.sub(r"[\"<>:/|\\?*\[\]]+", "__", folder))
out.mkdir(parents=True)
(out / "results_2026-01-01T00-00-00.json").write_text(text[: len(text) // 2] if how == "truncated" else text)
if how == "twice":
    (out / "results_2026-01-02T00-00-00.json").write_text(text)
