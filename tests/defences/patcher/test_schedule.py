"""Schedules under a clock of our own: ages, adoption steps, skipped versions, waiting, lost attackers, the end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from casehard.defences.patcher import PatcherConfig
from casehard.defences.patcher.backend import InProcessBackend
from casehard.defences.patcher.in_turn import SimulatedAttacks
from casehard.defences.patcher.pool import AttackRequest, AttackResult, AttackVectorPool
from casehard.defences.patcher.schedule import Schedule
from casehard.defences.patcher.scheduled import Scheduled
from casehard.defences.patcher.snapshots import Snapshots
from casehard.distributed.ranks import RankInfo
from casehard.errors import ConfigError, Lost
from casehard.maths.bilevel import Attacker
from casehard.train.protocol import Stopped


class Clocked:
    """Attackers that take ``durations`` of a clock that a step of the defender moves by one."""

    def __init__(self, durations: list[float]) -> None:
        self.now = 0.0
        self.durations = durations
        self.free = [0.0] * len(durations)
        self.due: list[tuple[float, AttackRequest]] = []
        self.dead_from = [float("inf")] * len(durations)
        self.waited = 0.0

    place = RankInfo()

    def begin(self) -> None: ...

    def submit(self, request: AttackRequest, source: Mapping[str, torch.Tensor], *, stable: bool) -> None:
        i = request.attacker
        self.free[i] = max(self.now, self.free[i]) + self.durations[i]
        if self.free[i] < self.dead_from[i]:
            self.due.append((self.free[i], request))

    def collect(self) -> list[AttackResult]:
        done = [request for when, request in self.due if when <= self.now]
        self.due = [(when, request) for when, request in self.due if when > self.now]
        return [AttackResult(request, {"weight": torch.ones(1, 1)}, 5, [], 0) for request in done]

    def wait(self) -> None:
        coming = [when for when, _ in self.due] + [t for t in self.dead_from if self.now < t < float("inf")]
        if not coming:
            raise AssertionError("waits for ever")
        self.waited += min(coming) - self.now
        self.now = min(coming)

    def lost(self) -> dict[int, str]:
        return {i: "it died" for i, t in enumerate(self.dead_from) if t <= self.now}


def run(
    backend: Clocked,
    last: int,
    *,
    start: int = 0,
    stop: int | None = None,
    state: dict | None = None,
    scratch: Path | None = None,
    **rules: object,
) -> tuple[Scheduled, list[int | None]]:
    """Run the schedule alone and return it with the source step of the vector used at each step, None for none."""
    rules = {"name": "async", "round_steps": 1000, "last": last} | rules
    model = nn.Linear(1, 1, bias=False)
    count = len(backend.durations)
    vectors = Scheduled(
        Schedule(**rules),  # type: ignore[arg-type]
        backend,
        InProcessBackend(SimulatedAttacks((), (Attacker(),) * count, 0, torch.float32), model),
        AttackVectorPool(count, seed=0),
        Snapshots(scratch, "t"),
        current=False,
    )
    if state is not None:
        vectors.restore(state)
    used: list[int | None] = []
    for step in range(start, stop or last):
        delta, vector = vectors.at(model, step), vectors.pool.choose(step)
        assert delta is (None if vector is None else vector.delta)
        used.append(None if vector is None else vector.source_step)
        backend.now += 1
    return vectors, used


def ages(used: list[int | None]) -> list[int]:
    return [step - source for step, source in enumerate(used) if source is not None]


@pytest.mark.parametrize("duration", [1, 250, 998])
def test_reference_parallel_has_the_published_timing(duration: float) -> None:
    """Updates 1..1999 plain, refresh one step before a round, the attack on v used for updates v + 1000 .. v + 1999."""
    vectors, used = run(Clocked([duration]), 15_000, name="reference_parallel")
    assert used[:1999] == [None] * 1999 and None not in used[1999:]
    assert vectors.adoptions == [(v + 999, v) for v in range(1000, 14_001, 1000)]
    assert all(step % 1000 == 999 for step, _ in vectors.adoptions)
    by_update = [(step + 1, source) for step, source in enumerate(used) if source is not None]
    assert {update - source for update, source in by_update} == set(range(1000, 2000))  # as the paper's code counts
    assert sum(ages(used)) / len(ages(used)) == pytest.approx(1498.5, abs=1)
    assert used.count(14_000) == 1  # the last attack serves one update, and there is none on 15 000


def test_reference_parallel_skips_versions_a_slow_attacker_never_saw() -> None:
    vectors, used = run(Clocked([2300]), 9000, name="reference_parallel")
    # Attacked: 1000 until 3300; then 3000 (not 2000) until 5600; then 5000 until 7900.
    assert vectors.adoptions == [(3999, 1000), (5999, 3000), (7999, 5000)]
    assert None not in used[3999:]


@pytest.mark.parametrize("delay", [0, 3, 1000, 2500])
@pytest.mark.parametrize("schedule", ["sequential", "lockstep"])
def test_rounds_are_adopted_after_their_delay_and_not_a_step_later(schedule: str, delay: int) -> None:
    backend = Clocked([400])
    vectors, used = run(backend, 6000, name=schedule, delay=delay)
    starts = range(1000, 6000 - delay, 1000)
    assert vectors.adoptions == [(v + delay, v) for v in starts]
    assert backend.waited == pytest.approx(max(0, 400 - delay) * len(starts))
    assert min(ages(used)) == delay and max(ages(used)) == delay + 999


def test_async_adopts_at_once_and_starts_again_from_the_newest_weights() -> None:
    """k1 = 500 at two passes a step lasts 250 steps: ages 250 to 500 instead of 999 to 1998."""
    backend = Clocked([250])
    vectors, used = run(backend, 15_000)
    assert vectors.adoptions == [(v + 250, v) for v in range(1000, 14_750, 250)]
    assert backend.waited == 0
    assert min(ages(used)) == 250 and max(ages(used)) <= 500
    assert sum(ages(used)) / len(ages(used)) == pytest.approx(374.5, abs=2)
    assert used[:1250] == [None] * 1250


def test_async_boundary_adopts_the_newest_finished_at_a_round() -> None:
    vectors, _ = run(Clocked([300]), 5000, adopt="boundary")
    assert vectors.adoptions == [(2000, 1600), (3000, 2500), (4000, 3700)]
    assert all(step % 1000 == 0 for step, _ in vectors.adoptions)


@pytest.mark.parametrize("adopt", ["immediate", "boundary"])
@pytest.mark.parametrize("duration", [50, 700, 5000])
def test_max_age_is_honoured(adopt: str, duration: float) -> None:
    backend = Clocked([duration])
    _, used = run(backend, 6000, max_age=600, adopt=adopt)
    assert max(ages(used)) <= 600
    assert (backend.waited > 0) == (duration > 300 or (adopt == "boundary" and duration > 600))
    assert used[: 1000 + 600].count(None) == len([u for u in used if u is None])  # plain for no longer than the bound


def test_several_attackers_keep_a_slot_each() -> None:
    vectors, used = run(Clocked([100, 333]), 5000)
    sources = [[s for step, s in vectors.adoptions if (step - s) == d] for d in (100, 333)]
    assert sources[0][:3] == [1000, 1100, 1200] and sources[1][:3] == [1000, 1333, 1666]
    assert {age < 200 for age in ages(used)[1000:]} == {True, False}  # both slots are drawn from


def test_a_dead_attacker_leaves_its_last_vector_and_is_reported() -> None:
    backend = Clocked([250])
    backend.dead_from[0] = 1800
    with pytest.warns(UserWarning, match=r"attacker 0 of 1 is lost \(it died\); its last vector stays"):
        vectors, used = run(backend, 4000)
    assert vectors.adoptions[-1] == (1750, 1500)
    assert set(used[1750:]) == {1500}


def test_nothing_ever_arrived_is_an_error_and_so_is_a_bound_nobody_can_keep() -> None:
    backend = Clocked([250])
    backend.dead_from[0] = 1100
    with pytest.warns(UserWarning, match="lost"), pytest.raises(Lost, match="would be plain fine-tuning"):
        run(backend, 4000)
    backend = Clocked([250])
    backend.dead_from[0] = 1800
    with pytest.warns(UserWarning, match="lost"), pytest.raises(Lost, match="older than max_age"):
        run(backend, 4000, max_age=600)


def test_one_of_two_attackers_lost_in_rounds_does_not_hold_up_the_other() -> None:
    backend = Clocked([100, 100])
    backend.dead_from[1] = 1500
    with pytest.warns(UserWarning, match="attacker 1 of 2"):
        vectors, _ = run(backend, 4000, name="reference_parallel")
    assert [v.source_step for v in vectors.pool.vectors if v is not None] == [3000, 1000]


@pytest.mark.parametrize(
    "bad",
    [
        {"schedule": "async", "delay": 3},
        {"schedule": "sequential", "max_age": 5},
        {"schedule": "lockstep", "adopt": "boundary"},
        {"schedule": "async", "max_age": 0},
        {"delay": -1},
    ],
)
def test_settings_that_would_be_ignored_are_refused(bad: dict) -> None:
    with pytest.raises(ConfigError):
        PatcherConfig(**bad)


# -- resume, partial losses, being told to stop -------------------------------------------------------------------


def test_max_age_is_kept_when_one_of_two_attackers_is_lost() -> None:
    backend = Clocked([250, 250])
    backend.dead_from[1] = 1800
    with pytest.warns(UserWarning, match="attacker 1 of 2"):
        vectors, used = run(backend, 5000, max_age=600)
    assert max(ages(used)) <= 600
    assert vectors.pool.vectors[1] is None and vectors.pool.vectors[0] is not None


@pytest.mark.parametrize("at", [1500, 2500, 5100])
def test_reference_parallel_resumes_with_the_adoptions_of_the_uninterrupted_run(tmp_path: Path, at: int) -> None:
    rules = {"name": "reference_parallel", "scratch": tmp_path}
    whole, used = run(Clocked([900]), 6000, **rules)
    head, early = run(Clocked([900]), 6000, stop=at, **rules)
    later = Clocked([900])
    later.now = float(at)
    tail, late = run(later, 6000, start=at, state=head.state(), **rules)
    assert head.adoptions + tail.adoptions == whole.adoptions
    assert early + late == used


@pytest.mark.parametrize("adopt", ["immediate", "boundary"])
def test_async_resumed_near_its_end_is_still_attacked(adopt: str) -> None:
    head, _ = run(Clocked([250]), 6000, stop=5100, adopt=adopt)
    later = Clocked([250])
    later.now = 5100.0
    tail, used = run(later, 6000, start=5100, state=head.state(), adopt=adopt)
    assert tail.adoptions[0] == (5100, 5100) and None not in used


def test_a_run_too_short_for_a_boundary_is_known_beforehand() -> None:
    assert Schedule("async", 1000, 9999, adopt="boundary").first == 2000
    assert Schedule("async", 1000, 9999, adopt="boundary", max_age=5).first == 1000
    vectors, _ = run(Clocked([1]), 2000, adopt="boundary")
    assert not vectors.pool.used


def test_waiting_ends_when_the_run_is_asked_to_stop() -> None:
    backend = Clocked([400])
    model = nn.Linear(1, 1, bias=False)
    asked: list[int] = []
    vectors = Scheduled(
        Schedule("lockstep", 10, 100),
        backend,
        InProcessBackend(SimulatedAttacks((), (Attacker(),), 0, torch.float32), model),
        AttackVectorPool(1, seed=0),
        Snapshots(None, "t"),
        current=False,
        stop=lambda: bool(asked.append(1) or True),
    )
    for step in range(10):
        vectors.at(model, step)
    assert not asked
    with pytest.raises(Stopped):
        vectors.at(model, 10)
    assert asked and backend.waited == 0
