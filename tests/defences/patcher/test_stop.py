"""A run told to stop while its method waits for somebody: it ends at the step it reached, and goes on from there."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from test_patcher import SAFE, UNSAFE, llama, same, weights

from casehard.defences.patcher import Patcher, PatcherConfig
from casehard.distributed.ranks import RankInfo
from casehard.errors import Interrupted, Lost
from casehard.maths.bilevel import Attacker
from casehard.train.fit import fit
from casehard.train.protocol import Stopped
from casehard.train.recipe import TrainConfig

CONFIG = TrainConfig(steps=9, batch_size=2, lr=1e-2, warmup=0, log_every=2, precision="fp32")


def patcher(delay: int = 0) -> Patcher:
    attackers = (Attacker(steps=2, lr=1e-2, batch_size=2),)
    return Patcher(PatcherConfig(round_steps=3, delay=delay, attackers=attackers), unsafe=UNSAFE)


def leaving(at: int, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make step ``at`` end before it begins, once: by a signal that arrives while waiting, or by a lost attacker."""
    from casehard.defences.patcher.in_turn import InTurn
    from casehard.defences.patcher.scheduled import Scheduled

    def patch(kind: type) -> None:
        usual = kind.at

        def instead(self: InTurn | Scheduled, model: object, step: int) -> object:
            if step == at:
                monkeypatch.setattr(kind, "at", usual)
                if what == "lost":
                    raise Lost("every attacker is lost")
                stop = getattr(self, "stop", None)  # who attacks in turn never waits, and need not ask
                assert stop is None or not stop()
                os.kill(os.getpid(), signal.SIGTERM)
                assert stop is None or stop()
                raise Stopped
            return usual(self, model, step)

        monkeypatch.setattr(kind, "at", instead)

    patch(InTurn)
    patch(Scheduled)


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize(("what", "error"), [("signal", Interrupted), ("lost", Lost)])
@pytest.mark.parametrize("at", [1, 3, 7])
def test_the_step_is_saved_and_the_run_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, what: str, error: type, at: int, delay: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, model = llama(), llama()
    log = fit(whole, None, SAFE, config=CONFIG, method=patcher(delay), seed=1).log
    leaving(at, what, monkeypatch)
    with pytest.raises(error):
        fit(model, None, SAFE, config=CONFIG, method=patcher(delay), seed=1, out=tmp_path)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{at}"]
    again = llama()
    done = fit(again, None, SAFE, config=CONFIG, method=patcher(delay), seed=1, out=tmp_path)
    assert same(weights(whole), weights(again))
    assert done.log == log


@pytest.mark.parametrize("delay", [0, 1])
def test_told_to_stop_before_a_resumed_run_caught_up_it_keeps_the_checkpoint_it_came_from(
    tmp_path: Path, delay: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, model = llama(), llama()
    fit(whole, None, SAFE, config=CONFIG, method=patcher(delay), seed=1)
    for _ in range(2):  # interrupted at step 4, resumed, and interrupted there again
        leaving(4, "signal", monkeypatch)
        with pytest.raises(Interrupted):
            fit(model, None, SAFE, config=CONFIG, method=patcher(delay), seed=1, out=tmp_path)
        model = llama()
    fit(model, None, SAFE, config=CONFIG, method=patcher(delay), seed=1, out=tmp_path)
    assert same(weights(whole), weights(model))


class Dying:
    """An attacker that dies while it is waited for, and takes the run with it: the signal comes in the same moment."""

    def __init__(self, *, dead: bool = False) -> None:
        self.dead = dead

    place = RankInfo()

    def begin(self) -> None: ...

    def submit(self, order: object, source: object, *, stable: bool) -> None: ...

    def collect(self) -> list:
        return []

    def wait(self) -> None:
        self.dead = True
        os.kill(os.getpid(), signal.SIGTERM)

    def lost(self) -> dict[int, str]:
        return {0: "killed"} if self.dead else {}


@pytest.mark.filterwarnings("ignore:attacker 0")
def test_an_attack_that_a_dying_attacker_left_to_a_run_that_stops_is_made_by_the_resumed_one(tmp_path: Path) -> None:
    whole, model, again = llama(), llama(), llama()
    log = fit(whole, None, SAFE, config=CONFIG, method=patcher(), seed=1).log

    def lockstep(backend: Dying) -> Patcher:
        config = PatcherConfig(schedule="lockstep", round_steps=3, attackers=patcher().config.attackers)
        return Patcher(config, unsafe=UNSAFE, backend=backend)

    with pytest.raises(Interrupted):
        fit(model, None, SAFE, config=CONFIG, method=lockstep(Dying()), seed=1, out=tmp_path)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    resumed = lockstep(Dying(dead=True))
    done = fit(again, None, SAFE, config=CONFIG, method=resumed, seed=1, out=tmp_path)
    assert resumed.vectors is not None and resumed.vectors.adoptions == [(3, 3), (6, 6)]
    assert same(weights(whole), weights(again))
    assert [row["loss"] for row in done.log] == [row["loss"] for row in log]
