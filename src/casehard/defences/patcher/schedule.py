"""When a simulated attack may start, when its vector is adopted, and when the defender waits: no tensors, no clock.

Steps are outer steps counted from 0; "at step i" means with the weights after i updates, before update i + 1. A vector
whose attack started at step v has age i - v at step i.

| schedule | attacks start | adopted | the defender waits |
|---|---|---|---|
| sequential, lockstep | at every round from step k2 on | ``delay`` steps later | until it has arrived |
| async | whenever an attacker is idle, from step k2 on | when it arrives, or at the next round (boundary) | never, |
|  |  |  | or when the vector in use is older than ``max_age`` |
| reference_parallel | at every round, skipped while the attacker is busy | one step before a round | never |

Source: Wen et al., arXiv 2606.07970. ``sequential`` is its first algorithm and ``reference_parallel`` has the timing of
the published parallel one: with k2 = 1000 updates 1 to 1999 are plain, and the attack on the weights after v updates is
used from update v + 1000 to update v + 1999 (ages 999 to 1998 in the count above). ``async`` is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from casehard.errors import ConfigError

ScheduleName = Literal["sequential", "lockstep", "async", "reference_parallel"]
Adopt = Literal["immediate", "boundary"]

NEEDS_ATTACKERS = ("lockstep", "async")
"""Schedules that need attackers in processes of their own."""


@dataclass(frozen=True)
class Schedule:
    """The rules of one run."""

    name: ScheduleName
    round_steps: int
    """k2."""
    last: int
    """Steps of the whole run."""
    delay: int = 0
    adopt: Adopt = "immediate"
    max_age: int | None = None

    def check(self) -> None:
        """Refuse settings that contradict each other.

        Raises:
            ConfigError: a setting that the schedule would ignore, or a bound on the age below 1.
        """
        if self.delay and self.name not in ("sequential", "lockstep"):
            raise ConfigError(f"delay {self.delay} with schedule {self.name!r}", hint="its attacks take their time")
        if self.name != "async" and (self.adopt != "immediate" or self.max_age is not None):
            raise ConfigError(
                f"adopt {self.adopt!r} and max_age {self.max_age} with schedule {self.name!r} would be ignored",
                hint="they belong to schedule=async",
            )
        if self.max_age is not None and self.max_age < 1:
            raise ConfigError(f"max_age {self.max_age} must be at least 1", hint="leave it out to never wait")

    def check_length(self) -> None:
        """Refuse a run that is too short for a single attack: it would be plain fine-tuning under another name.

        Raises:
            ConfigError: no vector could come into use before the run ends.
        """
        if self.first >= self.last:
            raise ConfigError(
                f"the first simulated attack would come at step {self.first} and the run ends after {self.last}",
                hint=f"more train.steps, or fewer settings.round_steps (now {self.round_steps}); "
                "the published setting is 1000 of 15000",
            )

    @property
    def in_turn(self) -> bool:
        """Whether every attack is over, and its vector in use, before the defender's next step: ``in_turn.py``."""
        return self.name == "sequential" and self.delay == 0

    @property
    def repeatable(self) -> bool:
        """Whether starts and adoptions are functions of the step, so that a resumed run can repeat them."""
        return self.name != "async"

    @property
    def first(self) -> int:
        """The earliest step at which a vector can be in use."""
        if self.name == "reference_parallel":
            return 2 * self.round_steps - 1
        if self.name == "async":
            return self.round_steps * (1 if self.anywhere else 2)
        return self.round_steps + self.delay

    @property
    def anywhere(self) -> bool:
        """Whether an async vector may come into use at any step, not only where a round begins."""
        return self.adopt == "immediate" or self.max_age is not None

    def starts(self, step: int) -> bool:
        """Return whether the weights at ``step`` may be attacked; not when the vector would come after the end."""
        k2 = self.round_steps
        if step < k2 or (self.repeatable and step % k2):
            return False
        if self.name == "reference_parallel":
            return step + k2 - 1 < self.last
        if self.name == "async":
            return (step + 1 if self.anywhere else (step // k2 + 1) * k2) < self.last
        return step + self.delay < self.last

    def adopts(self, step: int, source_step: int) -> bool:
        """Return whether a finished vector from ``source_step`` may come into use at ``step``."""
        if self.name == "reference_parallel":
            return (step + 1) % self.round_steps == 0
        if self.name == "async":
            return self.adopt == "immediate" or step % self.round_steps == 0
        return step >= source_step + self.delay

    def waits(self, step: int, source_step: int, in_use: int | None) -> bool:
        """Return whether the defender stops at ``step`` for the attack that started at ``source_step``.

        Args:
            in_use: step at which the attack behind the vector in use started; None before the first.
        """
        if self.name == "async":
            if self.max_age is None:
                return False
            # Before the first vector the attack on the weights of step k2 is the one waited for; it ages too.
            return step - self.round_steps >= self.max_age if in_use is None else step - in_use > self.max_age
        return self.name != "reference_parallel" and step >= source_step + self.delay
