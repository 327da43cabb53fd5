"""Settings of Patcher and its presets. Symbols as in ``patcher.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from casehard.defend.timetable import Adopt, Schedule, Timetable
from casehard.errors import ConfigError
from casehard.limits import BatchSize, Count, Limited, Natural, Share, Weight
from casehard.maths.bilevel import Attacker


@dataclass(frozen=True, kw_only=True)
class PatcherConfig(Limited):
    """Settings of Patcher; the defaults are the paper's."""

    alpha: Share = 0.5
    """Share of the attacked loss in eq. 1, 0..1; 0 is plain SFT bit for bit. Source: Patcher scripts."""
    round_steps: Count = 1000
    """k2, outer steps that share one attack vector. Source: Patcher scripts."""
    attackers: tuple[Attacker, ...] = (Attacker(),)
    """Simulated attackers; with several, each round builds a pool and each step draws one vector from it."""
    schedule: Schedule = "sequential"
    """sequential | lockstep | async | reference_parallel, see ``timetable.py``. Source: both published algorithms."""
    adopt: Adopt = "immediate"
    """async: take a vector when it is there, or at the next round (boundary)."""
    max_age: Count | None = None
    """async: wait rather than use a vector more than this many steps old; None never waits. Not in the paper."""
    reference: Literal["current", "source"] = "current"
    """theta_reference in eq. 3: the weights at adoption (as the published code does) or when the attack began."""
    delay: Natural = 0
    """Outer steps between an attack and its adoption (staleness ablation); 0 = at once."""
    reset_optimizer: bool = False
    """Forget the outer optimiser's moments at every round, as separate processes per phase do (paper_sequential)."""
    delta_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Storage of the attack vector: 2 or 4 bytes a parameter; theta + delta is composed in fp32 either way."""
    weights_dtype: Literal["bfloat16", "float32"] = "float32"
    """Weights on their way to an attacker beside; float32 attacks what the defender's own process would attack."""
    retain: Literal["none", "ce", "kl"] = "none"
    """Extra term on harmless rows: cross-entropy, or KL(start model || model). Not in the paper."""
    retain_weight: Weight = 0.5
    """Weight of the retain term, in units of the safe loss."""
    retain_batch_size: BatchSize = 8
    """Rows of the retain term per outer step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_schedule()
        if not self.attackers:
            raise ConfigError("attackers: at least one is needed", hint="attackers: [{steps: 300, lr: 1e-5}]")

    def _check_schedule(self) -> None:
        if self.delay and self.schedule not in ("sequential", "lockstep"):
            raise ConfigError(f"delay {self.delay} with schedule {self.schedule!r}", hint="its attacks take their time")
        if self.schedule != "async" and (self.adopt != "immediate" or self.max_age is not None):
            raise ConfigError(
                f"adopt {self.adopt!r} and max_age {self.max_age} with schedule {self.schedule!r} would be ignored",
                hint="they belong to schedule=async",
            )

    def timetable(self, last: int) -> Timetable:
        """Return the rules of a run of ``last`` steps."""
        return Timetable(self.schedule, self.round_steps, last, self.delay, self.adopt, self.max_age)


PRESETS: dict[str, PatcherConfig] = {
    "default": PatcherConfig(),
    "paper_sequential": PatcherConfig(reset_optimizer=True, delta_dtype="float32"),
}
