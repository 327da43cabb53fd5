"""The cost model against the specification's figures, and against the schedules it speaks of."""

from __future__ import annotations

import pytest
from test_schedule import Clocked, ages, run

from casehard.defences.patcher.cost import advice, costs


def by_name(k1: int, k2: int, **more: object) -> dict:
    return {c.schedule: c for c in costs(k1, k2, **more)}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("k1", "k2", "expected"), [(300, 1000, 1.15), (500, 1000, 1.25), (1000, 1000, 1.5), (2000, 1000, 2)]
)
def test_ideal_speed_up_is_one_plus_k1_over_2_k2(k1: int, k2: int, expected: float) -> None:
    assert by_name(k1, k2)["async"].speedup == pytest.approx(expected)
    assert by_name(4 * k2, k2)["async"].speedup == pytest.approx(1.5)  # the attacker is the bottleneck


@pytest.mark.parametrize(("schedule", "k1"), [("async", 500), ("async", 1000), ("reference_parallel", 500)])
def test_ages_are_those_of_the_simulated_schedule(schedule: str, k1: int) -> None:
    _, used = run(Clocked([k1 / 2]), 15_000, name=schedule)
    mean = sum(ages(used)) / len(ages(used))
    assert by_name(k1, 1000)[schedule].age == pytest.approx(mean, rel=0.01)


def test_memory_in_bytes_a_parameter() -> None:
    fp32, bf16 = by_name(300, 1000, bf16=False), by_name(300, 1000)
    assert (bf16["sequential"].defender, fp32["async"].defender, bf16["async"].defender) == (30, 22, 20)
    assert bf16["async"].attacker == 20 and bf16["sequential"].attacker == 0
    assert by_name(300, 1000, attackers=3)["async"].defender == 24  # a vector each


@pytest.mark.parametrize(
    ("devices", "memory", "parameters", "word"),
    [
        (1, 80e9, 1.5e9, "schedule=sequential"),
        (1, 40e9, 1.5e9, "a second device"),
        (2, 80e9, 1.5e9, "schedule=async with --attackers 1"),
        (2, 80e9, 1.5e9, "sequential on all devices (torchrun --nproc-per-node 2), up to 2 times"),
        (8, 80e9, 8e9, "shard it over at least 4 devices"),
        (1, 24e9, 0, "schedule=sequential"),
    ],
)
def test_advice(devices: int, memory: float, parameters: float, word: str) -> None:
    assert word in advice(300, 1000, devices=devices, device_bytes=memory, parameters=parameters)


def test_cores_are_not_devices_to_split_a_batch_over() -> None:
    said = advice(300, 1000, devices=2, device_bytes=24e9, parameters=1e6, bf16=False)
    assert said.startswith("schedule=async with --attackers 1") and "torchrun" not in said
