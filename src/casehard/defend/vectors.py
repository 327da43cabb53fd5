"""The attack vectors of one run: ordered, awaited, adopted, drawn from, and made again after a resume.

A unit is a set of attackers whose vectors are adopted together: all of them where rounds are counted, each by itself
under the ``async`` schedule. Attack vectors live in memory only; what a checkpoint holds are the clean weights that
each attack in use started from (``copies``).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from casehard.defend.attackers import Arrival, AttackSide, LocalSide, Order
from casehard.defend.copies import CleanCopies, Kept, Round, round_from_state, round_to_state, rounds_from_state
from casehard.defend.protocol import StateValue, Stopped
from casehard.defend.timetable import Timetable
from casehard.errors import Lost
from casehard.maths.bilevel import AttackVector
from casehard.maths.seats import compare
from casehard.maths.sharded import masters, seat
from casehard.maths.tensors import wide
from casehard.seeds import generator

RESTART = "start the command again: it goes on from its last checkpoint, with attackers"


@dataclass
class Unit:
    """Attackers whose vectors come into use together, and the rounds they are at, oldest first."""

    members: tuple[int, ...]
    active: Round | None = None
    finished: list[Round] = field(default_factory=list)
    running: list[Round] = field(default_factory=list)
    held: Round | None = None
    """The newest round that found its attackers busy (reference_parallel); older ones are skipped for good."""
    newest: int = -1
    """Step of the last start."""

    @property
    def in_use(self) -> int | None:
        """Step at which the attack behind the vector in use started."""
        return self.active.source_step if self.active else None

    def orders(self, entry: Round) -> list[Order]:
        """Return the orders that make up a round."""
        return [Order(i, entry.number, entry.source_step) for i in self.members]

    def named(self) -> list[tuple[str, Round | None]]:
        """Return every round under the name it has in a checkpoint."""
        lists = (("finished", self.finished), ("running", self.running))
        many = [(f"{role}{n}", entry) for role, entries in lists for n, entry in enumerate(entries)]
        return [("active", self.active), *many, ("held", self.held)]


class Vectors:
    """Keep the pool of attack vectors up to date, one call of :meth:`advance` before every step.

    Args:
        table: when what happens.
        side: who attacks.
        local: carries out what a lost attacker of the ``lockstep`` schedule leaves undone; the result is the same.
        copies: clean copies of weights.
        current: whether a vector is measured from the weights at adoption (else from those the attack began with).
        count: number of attackers.
        log: telemetry.
        stop: whether the run was asked to stop; looked at while waiting, by all processes of the defender alike.
    """

    def __init__(
        self,
        table: Timetable,
        side: AttackSide,
        local: LocalSide,
        copies: CleanCopies,
        *,
        current: bool,
        count: int,
        seed: int,
        log: Callable[[Mapping[str, float]], None],
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.table, self.side, self.local, self.copies = table, side, local, copies
        self.current, self.seed, self.log, self.stop = current, seed, log, stop
        together = [tuple(range(count))] if table.repeatable else [(i,) for i in range(count)]
        self.units = [Unit(members) for members in together]
        self.pool: list[AttackVector | None] = [None] * count
        self.arrived: dict[Order, Arrival] = {}
        self.passes = 0
        self.ever = False
        """Whether any vector has been in use, in this process or before a resume."""
        self.ages: list[int] = []
        """Age of the vector used, of each step since the last report."""
        self.adoptions: list[tuple[int, int]] = []
        """(step, source step) of every adoption of this process."""
        self.oldest = 0
        """Largest age of all vectors used, before a resume too."""
        self._told: set[int] = set()
        self._owed: set[int] = set()
        """Source steps of attacks that were under way when the run was stopped."""
        self._kept: tuple[int, Kept] = (-1, {})
        self._again = False
        self._restored: dict[str, Any] = {}

    # -- one step ------------------------------------------------------------------------------------------

    def advance(self, model: nn.Module, step: int) -> None:
        """Order, wait and adopt whatever is due before update ``step`` + 1.

        Raises:
            Lost: no attacker is left and the settings allow none of the vectors that are there.
        """
        self._catch_up(model)
        self._collect(model)
        for unit in self.units:
            self._order(model, unit, step)
            self._await(model, lambda unit=unit: self._waits(unit, step))  # type: ignore[misc]
            self._adopt(model, unit, step)
            self._order(model, unit, step)  # one whose vector just came is idle: on with the newest weights
        self._require_hope(step)
        self._again, self._kept = False, (-1, {})

    def _await(self, model: nn.Module, waits: Callable[[], bool]) -> None:
        """Collect until ``waits`` says no more.

        Raises:
            Stopped: the run was asked to stop meanwhile.
        """
        self._collect(model)
        while waits():
            if self.stop():
                raise Stopped
            self.side.wait()
            self._collect(model)

    def draw(self, step: int) -> AttackVector | None:
        """Return the vector of this step, one of the pool at random; None before the first is adopted."""
        there = [vector for vector in self.pool if vector is not None]
        if len(there) > 1:
            pick = torch.randint(len(there), (), generator=generator(self.seed, step, "patcher-pool"))
            there = [there[int(pick)]]
        if there:
            self.ages.append(step - there[0].source_step)
            self.oldest = max(self.oldest, self.ages[-1])
        return there[0] if there else None

    def drain_ages(self) -> dict[str, float]:
        """Return mean and largest age of the vectors drawn since the last call."""
        ages, self.ages = self.ages, []
        return {"attack_age": sum(ages) / len(ages), "attack_age_max": float(max(ages))} if ages else {}

    def clear(self) -> None:
        """Drop every vector."""
        self.pool = [None] * len(self.pool)
        self.arrived.clear()

    # -- ordering -------------------------------------------------------------------------------------------

    def _order(self, model: nn.Module, unit: Unit, step: int) -> None:
        """Start an attack on the weights at ``step``, if one may start."""
        repeatable, busy = self.table.repeatable, bool(unit.running)
        if not (self._again or self.table.starts(step)) or step == unit.newest or (busy and not repeatable):
            return
        if self.table.schedule != "lockstep" and not self._alive(unit):
            return
        held_back = busy and self.table.schedule == "reference_parallel"
        # Read again when it was held back, when the drift since is subtracted, or to stand in for a lost attacker.
        again = held_back or self.table.first > self.table.round_steps or (self.current and not repeatable)
        if self._kept[0] != step:  # units that start at the same step share the copy
            self._kept = (step, self.copies.keep(f"source-{step}", model, in_memory=again, lasting=repeatable))
        kept = self._kept[1]
        entry = Round(step // self.table.round_steps if repeatable else step, step, kept)
        unit.newest = step
        if held_back:
            if unit.held is not None:
                self.copies.discard(unit.held.source)
            unit.held = entry
        else:
            stable = kept if isinstance(kept, dict) and self.side is not self.local else {}
            self._submit(unit, entry, stable or masters(model), stable=bool(stable))

    def _submit(self, unit: Unit, entry: Round, source: Mapping[str, torch.Tensor], *, stable: bool) -> None:
        unit.running.append(entry)
        for order in unit.orders(entry):
            self.side.submit(order, source, stable=stable)

    def _collect(self, model: nn.Module) -> None:
        """Take what arrived; move complete rounds on, and let attackers that became free begin what was held back."""
        self.arrived |= {arrival.order: arrival for arrival in self.side.collect()}
        self._tell_lost()
        for unit in self.units:
            while unit.running and self._complete(model, unit, unit.running[0]):
                unit.finished.append(unit.running.pop(0))
            if not unit.running and unit.held is not None:
                entry, unit.held = unit.held, None
                self._submit(unit, entry, self.copies.tensors(entry.source, model), stable=True)

    def _complete(self, model: nn.Module, unit: Unit, entry: Round) -> bool:
        """Return whether nothing more will come for the round; do here what a lost attacker of lockstep left undone.

        Raises:
            Stopped: the run was asked to stop and there is something to do here; the resumed run does it.
        """
        lost = self.side.lost()
        absent = [order for order in unit.orders(entry) if order not in self.arrived]
        if not absent:
            return True
        if self.table.schedule == "lockstep" and all(order.attacker in lost for order in absent):
            if self.stop():
                raise Stopped
            source = self.copies.tensors(entry.source, model)
            for order in absent:
                self.local.submit(order, source, stable=True)
            self.arrived |= {arrival.order: arrival for arrival in self.local.collect()}
        return all(order in self.arrived or order.attacker in lost for order in absent)

    # -- adopting -------------------------------------------------------------------------------------------

    def _overdue(self, unit: Unit, step: int) -> bool:
        """Return whether the bound on the age, or a resumed run that had vectors, makes adoption due at any step."""
        in_use = unit.active.source_step if unit.active else None
        return not self.table.repeatable and (self._again or self.table.waits(step, step, in_use))

    def _waits(self, unit: Unit, step: int) -> bool:
        if not unit.running or (unit.finished and not self.table.repeatable):
            return False
        source_step = unit.running[0].source_step
        if source_step in self._owed and self.table.adopts(step, source_step):
            return True  # uninterrupted, it would have been there by now
        return self._overdue(unit, step) or self.table.waits(step, source_step, unit.in_use)

    def _adopt(self, model: nn.Module, unit: Unit, step: int) -> None:
        due = self._overdue(unit, step)
        ready = [entry for entry in unit.finished if due or self.table.adopts(step, entry.source_step)]
        for entry in ready:
            unit.finished.remove(entry)
            if entry is not ready[-1] or not any(order in self.arrived for order in unit.orders(entry)):
                self._forget(unit, entry)
            else:
                self._use(model, unit, entry, step)

    def _forget(self, unit: Unit, entry: Round) -> None:
        for order in unit.orders(entry):
            self.arrived.pop(order, None)
        self.copies.discard(entry.source)

    def _use(self, model: nn.Module, unit: Unit, entry: Round, step: int) -> None:
        reference: Kept | None = None
        if self.current and step > entry.source_step and self.table.repeatable:
            reference = self.copies.keep(f"reference-{step}", model, in_memory=False)
        before, previous = unit.active, list(self.pool)
        unit.active = entry._replace(adopted_step=step, reference=reference)
        arrivals = self._install(model, unit, unit.active, masters(model))
        self.adoptions.append((step, entry.source_step))
        self.passes += sum(arrival.steps for arrival in arrivals)
        self._announce(model, previous, arrivals)
        if before is not None:
            self.copies.discard(before.source, before.reference)
        if self.copies.scratch is None or not self.table.repeatable:
            # No resumed run will read it, so the copy in memory has served.
            unit.active = unit.active._replace(source={}, reference=None)

    def _install(
        self, model: nn.Module, unit: Unit, entry: Round, reference: Mapping[str, torch.Tensor]
    ) -> list[Arrival]:
        """Put the round's vectors into the pool, the defender's drift since its source subtracted if asked (eq. 3)."""
        arrivals = [self.arrived.pop(order) for order in unit.orders(entry) if order in self.arrived]
        drifted = self.current and entry.adopted_step > entry.source_step
        source = self.copies.tensors(entry.source, model) if drifted else {}
        live = masters(model)
        for arrival in arrivals:
            for name, p in live.items():
                d = arrival.delta[name].to(p.device)
                moved = (wide(d) + (source[name] - reference[name].detach())).to(d.dtype) if drifted else d
                arrival.delta[name] = moved
            vector = AttackVector.of(arrival.delta, source_step=entry.source_step, attack_steps=arrival.steps)
            self.pool[arrival.order.attacker] = vector
            self.ever = True
        return arrivals

    def _announce(self, model: nn.Module, previous: Sequence[AttackVector | None], arrivals: Sequence[Arrival]) -> None:
        self.log({"tokens": sum(arrival.tokens for arrival in arrivals)})
        for arrival in arrivals:
            i = arrival.order.attacker
            vector, old = self.pool[i], previous[i]
            assert vector is not None
            names = list(vector.delta)
            before = None if old is None else [old.delta[name] for name in names]
            size, cosine = compare([vector.delta[name] for name in names], before, seat(model))
            self.pool[i] = replace(vector, norm=size)
            tag = "" if len(self.pool) == 1 else f"_{i}"
            values = {f"attack_norm{tag}": size, f"attack_steps{tag}": float(arrival.steps)}
            if arrival.losses:
                values |= {f"attack_loss_first{tag}": arrival.losses[0], f"attack_loss_last{tag}": arrival.losses[-1]}
            if cosine is not None:
                values[f"attack_cosine{tag}"] = cosine
            self.log(values)

    # -- lost attackers -------------------------------------------------------------------------------------

    def _alive(self, unit: Unit) -> list[int]:
        lost = self.side.lost()
        return [i for i in unit.members if i not in lost]

    def _tell_lost(self) -> None:
        for i, reason in self.side.lost().items():
            if i not in self._told:
                self._told.add(i)
                what = "its attacks are run here" if self.table.schedule == "lockstep" else "its last vector stays"
                warnings.warn(f"attacker {i} of {len(self.pool)} is lost ({reason}); {what}", stacklevel=2)
                self.log({"attackers_lost": float(len(self._told))})

    def _require_hope(self, step: int) -> None:
        if self.table.schedule == "lockstep":
            return
        for unit in self.units:
            if self._overdue(unit, step) and not self._alive(unit):
                for i in unit.members:
                    self.pool[i] = None  # too old, and nobody will bring a younger one
        if any(self._alive(unit) for unit in self.units):
            return
        if self.ever and all(vector is None for vector in self.pool):
            raise Lost(f"every attacker is lost and at step {step} all vectors are older than max_age", hint=RESTART)
        if all(vector is None for vector in self.pool):
            raise Lost(
                f"every attacker was lost by step {step}, before any vector arrived: this would be plain fine-tuning",
                hint=RESTART,
            )

    # -- resume ---------------------------------------------------------------------------------------------

    def state(self) -> dict[str, StateValue]:
        """Return numbers and files of clean weights; never an attack vector."""
        out: dict[str, StateValue] = {
            "passes": self.passes,
            "adopted": self.ever,
            "ages": list(self.ages),
            "oldest": self.oldest,
        }
        if self.table.repeatable:
            unit = self.units[0]
            out["newest"] = unit.newest
            for role, entry in unit.named():
                out |= round_to_state(role, entry)
        return out

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take a saved state; attacks are repeated at the next step, with the running model."""
        self._restored = dict(state)
        self.passes, self.ever, self.ages = int(state["passes"]), bool(state["adopted"]), list(state["ages"])
        self.oldest = int(state["oldest"])

    def _catch_up(self, model: nn.Module) -> None:
        """Finish a restore: link clean copies back, repeat the attacks in use or finished, restart those under way."""
        if not self._restored:
            return
        state, self._restored = self._restored, {}
        if not self.table.repeatable:
            self._again = self.ever
            return
        unit = self.units[0]
        unit.newest = int(state["newest"])
        active = round_from_state("active", state, self.copies)
        finished = rounds_from_state("finished", state, self.copies)
        running = rounds_from_state("running", state, self.copies)
        for entry in [*([active] if active else []), *finished, *running]:
            self._submit(unit, entry, self.copies.tensors(entry.source, model), stable=True)
        self._owed = {entry.source_step for entry in running}
        done = len(finished) + (active is not None)
        self._await(model, lambda: len(unit.finished) < done)
        if active is not None:
            unit.active = unit.finished.pop(0)
            reference = active.reference
            self._install(model, unit, active, self.copies.tensors(reference, model) if reference else {})
        unit.held = round_from_state("held", state, self.copies)
        self.passes = int(state["passes"])
