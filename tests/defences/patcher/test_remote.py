"""Attackers in processes of their own against the defender alone: the same weights, whatever fails on the way."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from crew import threads
from test_patcher import ATTACKER, SAFE, UNSAFE, drive, llama, same, weights

from casehard.defences.patcher import Patcher, PatcherConfig
from casehard.defences.patcher.workers.launch import start_attackers
from casehard.defences.patcher.workers.remote import RemoteBackend
from casehard.defences.patcher.workers.spec import AttackerSpec, spec_for
from casehard.defences.patcher.workers.transport import Channel
from casehard.errors import ConfigError, Diverged, Unsupported
from casehard.maths.bilevel import Attacker

OTHER = Attacker(steps=2, lr=2e-2, batch_size=3)


def patcher(schedule: str, **settings: object) -> Patcher:
    settings = {"round_steps": 3, "attackers": (ATTACKER,)} | settings
    return Patcher(PatcherConfig(schedule=schedule, **settings), unsafe=UNSAFE)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"delay": 2},
        {"delay": 4, "reference": "source"},
        {"attackers": (ATTACKER, OTHER), "reset_optimizer": True},
        {"attackers": (Attacker(steps=4, steps_min=1, lr=1e-2, batch_size=2, lora_rank=2),), "delta_dtype": "float32"},
    ],
)
def test_lockstep_is_sequential_bit_for_bit(settings: dict) -> None:
    """Property 10, dropout included: the attacker's masks come from its own stream on either side."""
    # An attacker that is a thread shares this process's generator, which a real one does not: dropout only where
    # nothing else draws meanwhile.
    rate = 0.0 if settings else 0.2
    alone, helped = llama(rate), llama(rate)
    torch.manual_seed(7)
    log = drive(patcher("sequential", **settings), alone, 12)
    method = patcher("lockstep", **settings)
    with threads(method, helped):
        torch.manual_seed(7)
        assert drive(method, helped, 12) == log
    assert same(weights(alone), weights(helped))


@pytest.mark.parametrize("stop", [3, 4, 8])
def test_lockstep_resumes_to_the_uninterrupted_run(tmp_path: Path, stop: int) -> None:
    """Property 17: with an attack under way, within a round, and right before one."""
    settings = {"delay": 4}
    whole = llama()
    drive(patcher("sequential", **settings), whole, 12)
    first, again = llama(), llama()
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    head, tail = patcher("lockstep", **settings), patcher("lockstep", **settings)
    with threads(head, first):
        drive(head, first, 12, stop=stop, scratch=tmp_path / "one")
        state = head.state()
    again.load_state_dict(first.state_dict())
    with threads(tail, again):
        drive(tail, again, 12, start=stop, scratch=tmp_path / "two", state=state)
    assert same(weights(whole), weights(again))
    for file in tmp_path.rglob("*.safetensors"):
        assert file.name.startswith(("patcher-source-", "patcher-reference-"))


def test_bfloat16_weights_in_transport_halve_what_is_sent_and_stay_close() -> None:
    norms, sent = [], []
    for dtype in ("float32", "bfloat16"):
        method, model = patcher("lockstep", weights_dtype=dtype), llama()
        with threads(method, model) as backend:
            log = drive(method, model, 6)
            sent.append(backend.bytes_out)
        norms += [row["attack_norm"] for row in log if "attack_norm" in row]
    parameters = sum(p.numel() for p in llama().parameters())
    assert sent == [4 * parameters, 2 * parameters]
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


def test_vectors_come_back_in_the_dtype_they_are_stored_in() -> None:
    method, model = patcher("lockstep"), llama()
    with threads(method, model) as backend:
        drive(method, model, 6, stop=5)
        assert {d.dtype for d in method.vectors.pool.vectors[0].delta.values()} == {torch.bfloat16}
        assert backend.bytes_in == 2 * sum(p.numel() for p in model.parameters())


def test_async_trains_on_while_attacked_and_every_vector_is_of_real_weights() -> None:
    method, model = patcher("async", max_age=4), llama()
    with threads(method, model):
        log = drive(method, model, 40)
    adoptions = method.vectors.adoptions
    assert len(adoptions) >= 5 and all(3 <= source <= step <= source + 4 for step, source in adoptions)
    assert [s for _, s in adoptions] == sorted({s for _, s in adoptions})
    assert max(row["attack_age_max"] for row in log if "attack_age_max" in row) <= 4


def test_async_resumed_goes_on_with_a_vector_of_its_own_weights() -> None:
    head, model = patcher("async", max_age=4), llama()
    with threads(head, model):
        drive(head, model, 20, stop=11)
        state = head.state()
    assert not [value for value in state.values() if isinstance(value, Path)]
    tail = patcher("async")
    with threads(tail, model):
        drive(tail, model, 20, start=11, state=state)
    assert tail.vectors.adoptions[0] == (11, 11)


def cut_after(backend: object, messages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Break the channel of attacker 0 after that many messages, as a dying process would."""
    seen, receive = [0], Channel.receive

    def counted(self: Channel) -> object:
        if self in backend._couriers[0].channels:  # type: ignore[attr-defined]
            seen[0] += 1
            if seen[0] > messages:
                self.close()
        return receive(self)

    monkeypatch.setattr(Channel, "receive", counted)


def test_a_lost_attacker_of_lockstep_is_replaced_by_the_defender_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, helped = llama(), llama()
    drive(patcher("sequential", delay=1), alone, 14)
    method = patcher("lockstep", delay=1)
    with threads(method, helped) as backend, pytest.warns(UserWarning, match="its attacks are run here"):
        cut_after(backend, 1, monkeypatch)
        log = drive(method, helped, 14)
    assert same(weights(alone), weights(helped))
    assert {"attackers_lost": 1.0} in log


def test_a_lost_attacker_of_async_leaves_its_last_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    method, model = patcher("async", max_age=4), llama()
    with threads(method, model) as backend, pytest.warns(UserWarning, match="its last vector stays"):
        cut_after(backend, 2, monkeypatch)
        with pytest.raises(Exception, match="older than max_age"):
            drive(method, model, 30)
        assert len(method.vectors.adoptions) == 2 and method.vectors.pool.vectors == [None]  # too old to be used


def test_a_diverged_attack_stops_the_defender_before_its_step() -> None:
    method, model = patcher("lockstep", attackers=(Attacker(steps=3, lr=1e38, batch_size=2, clip=0.0),)), llama()
    with threads(method, model):
        drive(method, model, 9, stop=3)
        before = weights(model)
        with pytest.raises(Diverged, match="attacker 0: the simulated attack diverged"):
            method.vectors.at(model, 3)
    assert same(before, weights(model))


def test_a_spec_says_all_and_survives_its_journey() -> None:
    model = llama(0.1)
    spec = spec_for(model, [UNSAFE, SAFE, UNSAFE], [ATTACKER] * 3, seed=5, delta_dtype="float32", bf16=True, threads=1)
    again = AttackerSpec.unpack(*as_sent(spec))
    assert again.rows == (UNSAFE, SAFE, UNSAFE) and again.rows[0] is again.rows[2]
    assert (again.attackers, again.seed, again.bf16, again.threads) == ((ATTACKER,) * 3, 5, True, 1)
    twin = again.model(torch.device("cpu"))
    assert twin.training and twin.config.attention_dropout == 0.1
    assert {n: p.shape for n, p in twin.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    with pytest.raises(Unsupported, match="no transformers configuration"):
        spec_for(torch.nn.Linear(2, 2), [UNSAFE], [ATTACKER], seed=0, delta_dtype="float32", bf16=False)
    with pytest.raises(Unsupported, match=r"defender runs casehard 9\.9"):
        header, tensors = spec.pack()
        AttackerSpec.unpack({**header, "version": "9.9"}, tensors)


def as_sent(spec: AttackerSpec) -> tuple[dict, dict]:
    header, tensors = spec.pack()
    return json.loads(json.dumps(header)), tensors


def deaf(patience: float) -> RemoteBackend:
    """Return a backend whose one attacker joins and then never answers; its process runs on."""
    store = torch.distributed.HashStore()

    def attacker() -> None:
        channel = Channel(store, "deaf", first=False, loopback=True)
        channel.receive()
        channel.send({"kind": "ready"})
        channel.receive()
        time.sleep(30)

    threading.Thread(target=attacker, daemon=True).start()
    model = llama()
    spec = spec_for(model, [UNSAFE], [ATTACKER], seed=0, delta_dtype="float32", bf16=False)
    connect = [lambda: [Channel(store, "deaf", first=True, loopback=True)]]
    backend = RemoteBackend(connect, spec, signs=[lambda: ("", "the same sign")], patience=patience)
    backend.ready()
    return backend


def test_an_attacker_that_falls_silent_in_an_attack_is_lost_and_gets_no_more_requests() -> None:
    backend, alone, model = deaf(0.6), llama(), llama()
    time.sleep(0.8)
    assert not backend.lost()  # idle is not silent
    drive(patcher("sequential"), alone, 12)
    method = patcher("lockstep")
    method.backend = backend
    with pytest.warns(UserWarning, match="no sign of life for 1 s"):
        drive(method, model, 12)
    assert same(weights(alone), weights(model))
    assert backend._couriers[0].requests.empty()  # copies of weights would pile up there


def test_a_request_of_an_earlier_run_is_not_adopted_by_the_next() -> None:
    model = llama()
    first = patcher("async", max_age=None)
    with threads(first, model) as backend:
        drive(first, model, 8, stop=7)
        second = patcher("async", max_age=4)
        second.backend = backend
        other = llama()
        with torch.no_grad():
            [p.mul_(1.5) for p in other.parameters()]
        drive(second, other, 8)
    fresh = second.vectors.adoptions
    assert fresh and all(3 <= source <= step for step, source in fresh)


def test_a_vector_of_the_wrong_shape_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from casehard.defences.patcher.workers import worker

    honest = worker.rows_for
    monkeypatch.setattr(worker, "rows_for", lambda *a: {name: t.flatten()[:1] for name, t in honest(*a).items()})
    method, model = patcher("async", max_age=4), llama()
    with (
        threads(method, model),
        pytest.warns(UserWarning, match=r"has shape \(1,\), expected"),
        pytest.raises(Exception, match="every attacker was lost"),
    ):
        drive(method, model, 30)


def test_attackers_that_nobody_can_use_are_refused() -> None:
    from casehard.defences.patcher.workers.launch import with_attackers
    from casehard.defences.plain import Plain

    model = llama()
    with (
        pytest.raises(Unsupported, match="simulates no attacks"),
        with_attackers(Plain(), model, wanted=1, seed=0, bf16=False),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="3 attackers asked for, and the settings list 1"),
        with_attackers(patcher("async"), model, wanted=3, seed=0, bf16=False),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="attackers in processes of their own with schedule 'sequential'"),
        with_attackers(patcher("sequential"), model, wanted=1, seed=0, bf16=False),
    ):
        pass


# -- real processes ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_attacker_process_changes_nothing_but_a_warning() -> None:
    alone, model = llama(), llama()
    drive(patcher("sequential"), alone, 12)
    method = patcher("lockstep")
    spec = spec_for(model, method.unsafe, [ATTACKER], seed=0, delta_dtype="bfloat16", bf16=False, threads=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with start_attackers(spec, device=torch.device("cpu")) as backend:
        method.backend = backend
        drive(method, model, 12, stop=5, optimizer=optimizer)
        assert backend.bytes_in > 0
        os.kill(backend.processes[0], signal.SIGKILL)
        with pytest.warns(UserWarning, match="killed by signal 9"):
            for index in range(5, 12):
                one_step(method, model, optimizer, index)
    assert same(weights(alone), weights(model))
    assert not running(backend.processes[0])


def one_step(method: Patcher, model: torch.nn.Module, optimizer: torch.optim.Optimizer, index: int) -> None:
    from casehard.train.protocol import Step

    step = Step(index, 0, 1, lambda m, b: m(**b).loss, lambda loss: loss.backward())
    method.backward(model, SAFE.batch_at(2, seed=0, step=index, purpose="outer"), step)
    optimizer.step()
    method.after_step(model, optimizer, step)
    optimizer.zero_grad()


def running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


DEFENDER = """
import sys, time, torch
sys.path.insert(0, sys.argv[1])
from test_patcher import ATTACKER, UNSAFE, llama
from casehard.defences.patcher.workers.spec import spec_for
from casehard.defences.patcher.workers.launch import start_attackers
model = llama()
spec = spec_for(model, [UNSAFE] * 2, [ATTACKER] * 2, seed=0, delta_dtype="bfloat16", bf16=False, threads=1)
with start_attackers(spec, device=torch.device("cpu")) as backend:
    print(*backend.processes, flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_attackers_end_when_their_defender_is_killed_or_they_are_told_to() -> None:
    defender = subprocess.Popen(
        [sys.executable, "-c", DEFENDER, str(Path(__file__).parent)], stdout=subprocess.PIPE, text=True
    )
    assert defender.stdout is not None
    told, orphaned = map(int, defender.stdout.readline().split())
    for attacker, end in ((told, lambda: os.kill(told, signal.SIGTERM)), (orphaned, defender.kill)):
        assert running(attacker)
        end()
        deadline = time.monotonic() + 20
        while running(attacker) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not running(attacker)
    defender.wait()
