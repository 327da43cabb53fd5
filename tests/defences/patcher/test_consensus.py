"""Processes of one defender, as threads: what reaches them at different moments is seen by all at the same step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from casehard.defences.patcher.pool import AttackRequest, AttackResult
from casehard.defences.patcher.workers.consensus import ConsensusBackend
from casehard.defences.patcher.workers.transport import group
from casehard.distributed.ranks import RankInfo
from casehard.errors import Diverged, Lost


class Local:
    """A process's own backend, of which a test says what has arrived and who is lost at each look."""

    def __init__(self, looks: list[list[AttackResult] | Exception], lost: dict[int, tuple[int, str]]) -> None:
        self.looks, self.when, self.place = list(looks), lost, RankInfo()
        self.look = 0
        self.requested: list[AttackRequest] = []

    def begin(self) -> None:
        self.look = 0

    def submit(self, request: AttackRequest, source: Any, *, stable: bool) -> None:
        self.requested.append(request)

    def collect(self) -> list[AttackResult]:
        self.look += 1
        now = self.looks[self.look - 1] if self.look <= len(self.looks) else []
        if isinstance(now, Exception):
            self.look -= 1  # it stays
            raise now
        return now

    def lost(self) -> dict[int, str]:
        return {i: why for i, (look, why) in self.when.items() if self.look >= look}

    def wait(self) -> None: ...


def result(attacker: int, number: int) -> AttackResult:
    return AttackResult(AttackRequest(attacker, number, number), {"w": torch.zeros(1)}, 1, [], 0)


def both(sides: list[Local], run: Callable[[ConsensusBackend], Any], *, attackers: int = 2) -> list[Any]:
    """Run the same steps on two processes; return what each saw."""
    store, seen = torch.distributed.HashStore(), [None, None]

    def process(i: int) -> None:
        try:
            seen[i] = run(ConsensusBackend(sides[i], group(store, i, 2, loopback=True), attackers))
        except Exception as error:
            seen[i] = error

    workers = [threading.Thread(target=process, args=(i,), daemon=True) for i in range(2)]
    [w.start() for w in workers]
    [w.join(30) for w in workers]
    return seen


def looks(count: int) -> Callable[[ConsensusBackend], Any]:
    return lambda side: [([a.request[:2] for a in side.collect()], side.lost()) for _ in range(count)]


def test_a_vector_is_seen_when_every_process_has_it_in_the_order_of_the_requests() -> None:
    early = Local([[result(0, 1), result(1, 1)], [result(0, 2)], [], []], {})
    late = Local([[], [result(1, 1)], [result(0, 1), result(0, 2)], []], {})
    one, two = both([early, late], looks(4))
    assert one == two == [([], {}), ([(1, 1)], {}), ([(0, 1), (0, 2)], {}), ([], {})]


def test_an_attacker_that_one_process_lost_is_lost_to_all_and_what_came_of_it_since_is_dropped() -> None:
    kept = Local([[result(0, 1)], [result(0, 2)], []], {})
    loser = Local([[result(0, 1)], [], []], {0: (2, "its channel broke")})
    one, two = both([kept, loser], looks(3))
    assert [found for found, _ in one] == [found for found, _ in two] == [[(0, 1)], [], []]
    assert one[0][1] == two[0][1] == {}
    assert one[1][1] == {0: "another process of the defender lost it"} and two[1][1] == {0: "its channel broke"}

    def requests(side: ConsensusBackend) -> None:
        side.collect()
        side.collect()
        side.submit(AttackRequest(0, 3, 3), {}, stable=True)
        side.submit(AttackRequest(1, 3, 3), {}, stable=True)

    both([kept := Local([], {}), Local([], {0: (1, "gone")})], requests)
    assert kept.requested == [AttackRequest(1, 3, 3)]


def test_what_an_attacker_left_at_one_process_only_is_dropped_and_nobody_waits_for_the_rest_of_it() -> None:
    def run(side: ConsensusBackend) -> tuple[int, bool]:
        [side.collect() for _ in range(3)]
        waited = []
        side.local.wait = lambda: waited.append(1)
        side.wait()
        return sum(map(len, side._waiting)), bool(waited)

    crossed = [Local([[result(0, 1)]], {1: (1, "x")}), Local([[result(1, 1)]], {0: (1, "gone")})]
    assert both(crossed, run) == [(0, True), (0, True)]


def test_a_diverged_attack_stops_all_of_them_at_the_same_look() -> None:
    def until(side: ConsensusBackend) -> int:
        for i in range(5):
            try:
                side.collect()
            except Diverged:
                return i
        return -1

    told = Diverged("attacker 0: the simulated attack diverged")
    assert both([Local([told], {}), Local([[], [], told], {})], until) == [2, 2]


def test_an_error_of_one_process_whose_attacker_the_other_lost_is_a_lost_attacker() -> None:
    told = Diverged("attacker 0: the simulated attack diverged")
    one, two = both([Local([told], {}), Local([], {0: (1, "gone")})], looks(3))
    assert [bool(lost) for _, lost in one] == [bool(lost) for _, lost in two] == [True] * 3


def test_a_run_begun_anew_forgets_the_last_one() -> None:
    def again(side: ConsensusBackend) -> list[Any]:
        side.collect()
        side.begin()
        return [a.request[:2] for a in side.collect()]

    early, late = Local([[result(0, 1)]], {}), Local([[result(0, 1)]], {})
    assert both([early, late], again) == [[(0, 1)], [(0, 1)]]


def test_a_process_that_is_gone_is_told() -> None:
    def leave(side: ConsensusBackend) -> Any:
        if side.local.look == -1:
            side._group = None
            return None
        return [side.collect() for _ in range(3)]

    gone = Local([], {})
    gone.look = -1
    gone.begin = lambda: None  # type: ignore[method-assign]
    seen = both([Local([], {}), gone], leave)[0]
    assert isinstance(seen, Lost)
    with pytest.raises(Lost, match="another process of the defender is gone"):
        raise seen
