"""On one CUDA card: every method steps as on the CPU and resumes with the same bits, and four runs share the card.

Dropout is off where devices are compared, since their generators draw other numbers.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from casehard.cli import main
from casehard.model.adapters import add_lora
from casehard.train.fit import fit
from casehard.train.recipe import TrainConfig
from conformance.table import TABLE
from fakes import largest_difference, tiny_llama, tiny_rows, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROWS, STEPS = tiny_rows(20), 6


class KilledError(Exception):
    """Stands for the process dying."""


def fresh(row, dropout=0.0):
    """Return the model that a method is tried on, the same every time."""
    if row.adapter:
        return add_lora(tiny_llama(), 2, 4.0, seed=1)  # its assets are made for this very model
    return tiny_llama(dropout=dropout, layers=1)


def train(row, device, *, dropout=0.0, out=None, die_at=None):
    """Return the weights after some steps, at least one of them after Patcher's first attack, and the log."""

    def hook(_, step):
        if step == die_at:
            raise KilledError

    model = fresh(row, dropout)
    # sgd: Adam turns the rounding of a gradient near 0 into a step of full size.
    config = TrainConfig(
        steps=STEPS, batch_size=3, lr=1e-2, warmup=0, optimizer="sgd", precision="fp32", save_every=1, log_every=1
    )
    done = fit(
        model.to(device),
        None,
        ROWS,
        config=config,
        method=row.make(),
        seed=3,
        out=out,
        on_step=hook if die_at else None,
    )
    return weights(model.cpu()), done


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_steps_on_the_gpu_are_the_steps_on_the_cpu(row, device="cuda"):
    (here, one), (there, two) = (train(row, where) for where in ("cpu", device))
    losses, others = ([entry["loss"] for entry in done.log if "loss" in entry] for done in (one, two))
    assert len(set(losses)) > 1, "nothing was trained"
    assert others == pytest.approx(losses, rel=1e-4)
    assert largest_difference(here, there) < 1e-4


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_a_resumed_run_on_the_gpu_ends_with_the_same_bits(row, tmp_path, device="cuda"):
    expected, whole = train(row, device, dropout=0.2)
    with pytest.raises(KilledError):
        train(row, device, dropout=0.2, out=tmp_path, die_at=4)
    actual, resumed = train(row, device, dropout=0.2, out=tmp_path)
    assert largest_difference(expected, actual) == 0
    assert resumed.log == whole.log


def test_four_runs_share_one_card(tmp_path):
    plan = str(Path(__file__).resolve().parents[2] / "plans" / "demo.yaml")
    few = ["--set", "seeds=[0]", "--set", "limit=4", "--set", "attacks.full-p10.steps=10"]
    few += ["--set", "attacks.full-p10.evaluate_at=[10]", "--set", "headline.step=10"]
    for name in ("sft", "sft-same-passes", "patcher-k1", "patcher-k10"):
        few += ["--set", f"defences.{name}.train.steps=20"]
    assert main(["bench", plan, "--out", str(tmp_path / "b"), "--jobs", "4", *few]) == 0
    done = [json.loads(line) for line in (tmp_path / "b" / "events.jsonl").read_text().splitlines()]
    assert {event.get("status") for event in done if event["event"] == "node"} == {"ok"}
