"""Recipes of tuning methods hold the numbers that the papers and their scripts give."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from casehard.config import build, read_yaml
from casehard.data.select import SelectConfig
from casehard.steps import Finetune
from casehard.train.tune import Lora

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
BUFFERED = ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
ROWS = {"data": ["d.jsonl"], "safe": ["s.jsonl"]}


def step(name: str) -> Finetune:
    values = read_yaml(RECIPES / f"{name}.yaml")
    method = "spard" if name.startswith("spard") else "buffer_reinforce"
    rows = ROWS if method == "spard" else {"data": ["d.jsonl"]}
    assets = {} if method == "spard" else {"assets": "provider"}
    made: Finetune = build(Finetune, {"method": method, "model": "m", "rows": rows, **assets, **values}, where=name)
    made.check([role for role in made.rows if role != "data"])
    return made


def epochs(made: Finetune, rows: int) -> float:
    return made.train.steps * made.train.batch_size * made.train.accumulation / rows


@pytest.mark.parametrize(
    ("name", "alpha", "passes", "rows", "warmup", "mode", "seed"),
    [
        ("spard_gsm8k", 4.0, 10, 7473 + 747, 100, "adam", 0),
        ("spard_gsm8k_published_code", 8.0, 10, 7473 + 747, 100, "reference", 43),
        ("spard_openbookqa", 4.0, 3, 4957 + 496, 20, "adam", 0),
    ],
)
def test_spard_has_the_published_adapter_loop_and_constraint(
    name: str, alpha: float, passes: int, rows: int, warmup: int, mode: str, seed: int
) -> None:
    made = step(name)
    assert made.lora == Lora(rank=32, alpha=alpha, dropout=0.05, target=ATTENTION)
    assert made.select == SelectConfig(share=0.03, beta=4.0, strategy="rd-dpp") and made.seed == seed
    assert epochs(made, rows) == pytest.approx(passes, rel=0.01)
    loop = made.train
    assert (loop.lr, loop.schedule, loop.warmup, loop.optimizer) == (5e-5, "linear", warmup, "adamw")
    assert (loop.batch_size, loop.accumulation, loop.weight_decay, loop.clip) == (32, 4, 0.01, 1.0)
    config: Any = made.spec.configure(made.method, made.preset, made.settings)
    assert (config.tau, config.delta, config.batch_size, config.mode) == (0.2, 0.1, 4, mode)
    assert config.eta_safe == "lr" and made.system is None


@pytest.mark.parametrize(("name", "lr", "passes"), [("llama3_8b", 1e-5, 3), ("qwen3_4b", 5e-5, 2)])
def test_buffer_and_reinforce_has_the_published_adapter_loop_and_merge(name: str, lr: float, passes: int) -> None:
    made = step(f"buffer_reinforce_{name}")
    assert made.lora == Lora(rank=32, alpha=64.0, dropout=0.1, target=BUFFERED)
    assert epochs(made, 1000) == passes and made.train.lr == lr and made.max_length == 512 and made.seed == 42
    assert made.train.warmup == math.ceil(0.05 * made.train.steps) and made.train.schedule == "cosine"
    assert (made.train.batch_size * made.train.accumulation, made.train.weight_decay) == (8, 0.01)
    config: Any = made.spec.configure(made.method, made.preset, made.settings)
    merge = config.merge
    assert (merge.c_user, merge.c_reinforce, merge.alpha, merge.tau, merge.basis) == (0.5, 0.5, 0.1, 0.01, "paper")
