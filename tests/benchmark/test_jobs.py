"""How many runs share a machine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from casehard.benchmark.jobs import at_once, fitting
from fakes import tiny_llama

GIB = 2**30


@pytest.mark.parametrize(
    ("free", "parameters", "cores", "runs"),
    [
        (140 * GIB, 135_000_000, 16, 6),  # a small model: more would wait for each other
        (140 * GIB, 135_000_000, 4, 4),  # ... and each run keeps a core busy
        (24 * GIB, 135_000_000, 16, 3),
        (140 * GIB, 1_500_000_000, 16, 2),
        (24 * GIB, 7_000_000_000, 16, 1),  # it does not fit: the run itself says so
        (0, 0, 1, 1),
    ],
)
def test_the_card_and_the_cores_decide(free, parameters, cores, runs):
    assert at_once(free, parameters, cores=cores) == runs


def plan(*models):
    return SimpleNamespace(bases=[SimpleNamespace(model=model) for model in models])


def test_two_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fitting(plan("nowhere"), tmp_path) == 2


def test_the_largest_model_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (7 * GIB, 8 * GIB))
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    tiny_llama().save_pretrained(tmp_path / "small")
    assert fitting(plan(None, "small"), tmp_path) == 2
    monkeypatch.setattr("casehard.benchmark.jobs.PER_PARAMETER", 10**6)
    assert fitting(plan(None, "small"), tmp_path) == 1
