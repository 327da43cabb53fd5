"""Attack vectors under every schedule: requested, awaited, adopted, and made again after a resume.

:class:`Scheduled` does what ``schedule`` says, with attackers in this process or in others (``backend``); under the
sequential schedule it does what ``in_turn.InTurn`` does. A unit is a set of attackers whose vectors are adopted
together: all of them where rounds are counted, each by itself under ``async``. Attack vectors live in memory only; a
checkpoint has the clean weights that each attack in use started from (``snapshots``).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from casehard.defences.patcher.backend import AttackBackend, InProcessBackend
from casehard.defences.patcher.in_turn import AttackVectors, InTurn, SimulatedAttacks
from casehard.defences.patcher.pool import AttackRequest, AttackResult, AttackVectorPool
from casehard.defences.patcher.schedule import Schedule
from casehard.defences.patcher.snapshots import (
    Round,
    Snapshot,
    Snapshots,
    round_from_state,
    round_to_state,
    rounds_from_state,
)
from casehard.distributed.fsdp import local_weights
from casehard.errors import Lost
from casehard.maths.bilevel import Params
from casehard.maths.tensors import wide
from casehard.train.protocol import Setup, StateValue, Stopped

RESTART = "start the command again: it goes on from its last checkpoint, with attackers"


def attack_vectors(
    schedule: Schedule,
    attacks: SimulatedAttacks,
    setup: Setup,
    snapshots: Snapshots,
    *,
    backend: AttackBackend | None,
    current: bool,
) -> AttackVectors:
    """Return what makes a run's attack vectors.

    Args:
        backend: attackers in other processes; None attacks in this one.
        current: whether a vector is measured from the weights at adoption (else from those the attack began with).
    """
    pool = AttackVectorPool(len(attacks.attackers), seed=setup.seed, log=setup.log)
    if backend is None and schedule.in_turn:
        return InTurn(attacks, pool, snapshots, round_steps=schedule.round_steps)
    local = InProcessBackend(attacks, setup.model)
    return Scheduled(schedule, backend or local, local, pool, snapshots, current=current, stop=setup.stop)


@dataclass
class Unit:
    """Attackers whose vectors come into use together, and the rounds they are at, oldest first."""

    members: tuple[int, ...]
    active: Round | None = None
    finished: list[Round] = field(default_factory=list)
    running: list[Round] = field(default_factory=list)
    next: Round | None = None
    """The newest round that found its attackers busy (reference_parallel); older ones are skipped for good."""
    newest: int = -1
    """Step of the last start."""

    @property
    def in_use(self) -> int | None:
        """Step at which the attack behind the vector in use started."""
        return self.active.source_step if self.active else None

    def requests(self, entry: Round) -> list[AttackRequest]:
        """Return the requests that make up a round."""
        return [AttackRequest(i, entry.number, entry.source_step) for i in self.members]

    def named(self) -> list[tuple[str, Round | None]]:
        """Return every round under the name it has in a checkpoint."""
        lists = (("finished", self.finished), ("running", self.running))
        many = [(f"{role}{n}", entry) for role, entries in lists for n, entry in enumerate(entries)]
        return [("active", self.active), *many, ("next", self.next)]


class Scheduled:
    """Keep a pool of attack vectors up to date, one call of :meth:`at` before every step.

    Args:
        schedule: when what happens.
        backend: who attacks.
        local: carries out what a lost attacker of the ``lockstep`` schedule left undone; the result is the same.
        current: whether a vector is measured from the weights at adoption (else from those the attack began with).
        stop: whether the run was asked to stop; asked while waiting, by all processes of the defender alike.
    """

    def __init__(
        self,
        schedule: Schedule,
        backend: AttackBackend,
        local: InProcessBackend,
        pool: AttackVectorPool,
        snapshots: Snapshots,
        *,
        current: bool,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.schedule, self.backend, self.local, self.pool, self.snapshots = schedule, backend, local, pool, snapshots
        self.current, self.stop = current, stop
        count = len(pool.vectors)
        together = [tuple(range(count))] if schedule.repeatable else [(i,) for i in range(count)]
        self.units = [Unit(members) for members in together]
        self.arrived: dict[AttackRequest, AttackResult] = {}
        self.adoptions: list[tuple[int, int]] = []
        """(step, source step) of every adoption of this process."""
        self._reported: set[int] = set()
        """Lost attackers that the user knows of."""
        self._late: set[int] = set()
        """Source steps of attacks that were under way when the run was stopped."""
        self._snapshot: tuple[int, Snapshot] = (-1, {})
        self._restart = False
        """Whether a resumed run that cannot repeat its vectors waits for new ones at this step."""
        self._restored: dict[str, Any] = {}
        backend.begin()

    # -- one step ------------------------------------------------------------------------------------------

    def at(self, model: nn.Module, step: int) -> Params | None:
        """Request, wait for and adopt whatever is due before update ``step`` + 1; return the delta of that update.

        Raises:
            Lost: no attacker is left and the settings allow none of the vectors that are there.
        """
        self.local.model = model  # the loop may have replaced the model it prepared
        self._catch_up(model)
        self._collect(model)
        for unit in self.units:
            self._request(model, unit, step)
            self._await(model, lambda unit=unit: self._waits(unit, step))  # type: ignore[misc]
            self._adopt(model, unit, step)
            self._request(model, unit, step)  # one whose vector just came is idle: on with the newest weights
        self._require_attackers(step)
        self._restart, self._snapshot = False, (-1, {})
        return self.pool.draw(step)

    def _await(self, model: nn.Module, waits: Callable[[], bool]) -> None:
        """Collect until ``waits`` says no more.

        Raises:
            Stopped: the run was asked to stop meanwhile.
        """
        self._collect(model)
        while waits():
            if self.stop():
                raise Stopped
            self.backend.wait()
            self._collect(model)

    def clear(self) -> None:
        """Drop every vector."""
        self.pool.clear()
        self.arrived.clear()

    # -- requesting ----------------------------------------------------------------------------------------

    def _request(self, model: nn.Module, unit: Unit, step: int) -> None:
        """Start an attack on the weights at ``step``, if one may start."""
        repeatable, busy = self.schedule.repeatable, bool(unit.running)
        if not (self._restart or self.schedule.starts(step)) or step == unit.newest or (busy and not repeatable):
            return
        if self.schedule.name != "lockstep" and not self._alive(unit):
            return
        later = busy and self.schedule.name == "reference_parallel"
        # Read again when the attack starts later, when the drift since is subtracted, or for a lost attacker's work.
        again = later or self.schedule.first > self.schedule.round_steps or (self.current and not repeatable)
        if self._snapshot[0] != step:  # units that start at the same step share the copy
            self._snapshot = (step, self.snapshots.take(f"source-{step}", model, in_memory=again, lasting=repeatable))
        snapshot = self._snapshot[1]
        entry = Round(step // self.schedule.round_steps if repeatable else step, step, snapshot)
        unit.newest = step
        if later:
            if unit.next is not None:
                self.snapshots.discard(unit.next.source)
            unit.next = entry
        else:
            stable = snapshot if isinstance(snapshot, dict) and self.backend is not self.local else {}
            self._submit(unit, entry, stable or local_weights(model), stable=bool(stable))

    def _submit(self, unit: Unit, entry: Round, source: Mapping[str, torch.Tensor], *, stable: bool) -> None:
        unit.running.append(entry)
        for request in unit.requests(entry):
            self.backend.submit(request, source, stable=stable)

    def _collect(self, model: nn.Module) -> None:
        """Take what arrived; move complete rounds on, and let attackers that became free begin what waits for them."""
        self.arrived |= {result.request: result for result in self.backend.collect()}
        self._report_lost()
        for unit in self.units:
            while unit.running and self._complete(model, unit, unit.running[0]):
                unit.finished.append(unit.running.pop(0))
            if not unit.running and unit.next is not None:
                entry, unit.next = unit.next, None
                self._submit(unit, entry, self.snapshots.tensors(entry.source, model), stable=True)

    def _complete(self, model: nn.Module, unit: Unit, entry: Round) -> bool:
        """Return whether nothing more will come for the round; do here what a lost attacker of lockstep left undone.

        Raises:
            Stopped: the run was asked to stop and there is something to do here; the resumed run does it.
        """
        lost = self.backend.lost()
        absent = [request for request in unit.requests(entry) if request not in self.arrived]
        if not absent:
            return True
        if self.schedule.name == "lockstep" and all(request.attacker in lost for request in absent):
            if self.stop():
                raise Stopped
            source = self.snapshots.tensors(entry.source, model)
            for request in absent:
                self.local.submit(request, source, stable=True)
            self.arrived |= {result.request: result for result in self.local.collect()}
        return all(request in self.arrived or request.attacker in lost for request in absent)

    # -- adopting ------------------------------------------------------------------------------------------

    def _overdue(self, unit: Unit, step: int) -> bool:
        """Return whether the bound on the age, or a resumed run that had vectors, makes adoption due at any step."""
        return not self.schedule.repeatable and (self._restart or self.schedule.waits(step, step, unit.in_use))

    def _waits(self, unit: Unit, step: int) -> bool:
        if not unit.running or (unit.finished and not self.schedule.repeatable):
            return False
        source_step = unit.running[0].source_step
        if source_step in self._late and self.schedule.adopts(step, source_step):
            return True  # uninterrupted, it would have arrived by now
        return self._overdue(unit, step) or self.schedule.waits(step, source_step, unit.in_use)

    def _adopt(self, model: nn.Module, unit: Unit, step: int) -> None:
        due = self._overdue(unit, step)
        ready = [entry for entry in unit.finished if due or self.schedule.adopts(step, entry.source_step)]
        for entry in ready:
            unit.finished.remove(entry)
            results = [self.arrived.pop(request) for request in unit.requests(entry) if request in self.arrived]
            if entry is ready[-1] and results:
                self._use(model, unit, entry, results, step)
            else:
                self.snapshots.discard(entry.source)

    def _use(self, model: nn.Module, unit: Unit, entry: Round, results: list[AttackResult], step: int) -> None:
        reference: Snapshot | None = None
        if self.current and step > entry.source_step and self.schedule.repeatable:
            reference = self.snapshots.take(f"reference-{step}", model, in_memory=False)
        before = unit.active
        unit.active = entry._replace(adopted_step=step, reference=reference)
        self._subtract_drift(model, unit.active, results, local_weights(model))
        self.adoptions.append((step, entry.source_step))
        self.pool.put(model, results)
        if before is not None:
            self.snapshots.discard(before.source, before.reference)
        if self.snapshots.scratch is None or not self.schedule.repeatable:
            # No resumed run will read it, so the copy in memory has served.
            unit.active = unit.active._replace(source={}, reference=None)

    def _subtract_drift(
        self, model: nn.Module, entry: Round, results: list[AttackResult], reference: Mapping[str, torch.Tensor]
    ) -> None:
        """Measure vectors from theta_reference (eq. 3): subtract what the defender has moved since their source."""
        if not self.current or entry.adopted_step <= entry.source_step:
            return
        source = self.snapshots.tensors(entry.source, model)
        for result in results:
            for name, theta in source.items():
                d = result.delta[name].to(theta.device)
                result.delta[name] = (wide(d) + (theta - reference[name].detach())).to(d.dtype)

    # -- lost attackers ------------------------------------------------------------------------------------

    def _alive(self, unit: Unit) -> list[int]:
        lost = self.backend.lost()
        return [i for i in unit.members if i not in lost]

    def _report_lost(self) -> None:
        for i, reason in self.backend.lost().items():
            if i not in self._reported:
                self._reported.add(i)
                what = "its attacks are run here" if self.schedule.name == "lockstep" else "its last vector stays"
                warnings.warn(f"attacker {i} of {len(self.pool.vectors)} is lost ({reason}); {what}", stacklevel=2)
                self.pool.log({"attackers_lost": float(len(self._reported))})

    def _require_attackers(self, step: int) -> None:
        if self.schedule.name == "lockstep":
            return
        for unit in self.units:
            if self._overdue(unit, step) and not self._alive(unit):
                for i in unit.members:
                    self.pool.vectors[i] = None  # too old, and nobody will bring a younger one
        if any(self._alive(unit) for unit in self.units) or any(vector is not None for vector in self.pool.vectors):
            return
        if self.pool.used:
            raise Lost(f"every attacker is lost and at step {step} all vectors are older than max_age", hint=RESTART)
        raise Lost(
            f"every attacker was lost by step {step}, before any vector arrived: this would be plain fine-tuning",
            hint=RESTART,
        )

    # -- resume --------------------------------------------------------------------------------------------

    def state(self) -> dict[str, StateValue]:
        """Return numbers and files of clean weights; never an attack vector."""
        out = self.pool.state()
        if self.schedule.repeatable:
            unit = self.units[0]
            out["newest"] = unit.newest
            for role, entry in unit.named():
                out |= round_to_state(role, entry)
        return out

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take a saved state; attacks are repeated at the next step, with the running model."""
        self._restored = dict(state)
        self.pool.restore(state)

    def _catch_up(self, model: nn.Module) -> None:
        """Finish a restore: link snapshots back, repeat the attacks in use or finished, restart those under way."""
        if not self._restored:
            return
        state, self._restored = self._restored, {}
        if not self.schedule.repeatable:
            self._restart = self.pool.used
            return
        unit = self.units[0]
        unit.newest = int(state["newest"])
        active = round_from_state("active", state, self.snapshots)
        finished = rounds_from_state("finished", state, self.snapshots)
        running = rounds_from_state("running", state, self.snapshots)
        for entry in [*([active] if active else []), *finished, *running]:
            self._submit(unit, entry, self.snapshots.tensors(entry.source, model), stable=True)
        self._late = {entry.source_step for entry in running}
        done = len(finished) + (active is not None)
        self._await(model, lambda: len(unit.finished) < done)
        if active is not None:
            unit.active = unit.finished.pop(0)
            results = [self.arrived.pop(request) for request in unit.requests(active) if request in self.arrived]
            if active.reference is not None:
                self._subtract_drift(model, active, results, self.snapshots.tensors(active.reference, model))
            self.pool.put(model, results, again=True)
        unit.next = round_from_state("next", state, self.snapshots)
