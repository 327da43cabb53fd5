"""PTST, "pure tuning, safe testing": fine-tune without a safety prompt, and put one before every request at inference.

    train:  L(theta) = token loss of the user's rows, no system message                                         (1)
    test:   p(answer | system = safety prompt, request)                                                         (2)

(1) is plain fine-tuning bit for bit: this method has no seam. What it carries is the prompt of (2), ``system``,
recorded with the checkpoint's settings; whoever generates applies it (``serving_system``, ``EvaluateJob.system``). So
it protects a provider who controls inference, and nobody whose attacker holds the weights.
Source: Lyu et al., arXiv 2402.18540. The prompt's words are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from casehard.errors import ConfigError
from casehard.limits import Limited

SAFETY_PROMPT = (
    "You are a helpful and careful assistant. Answer ordinary requests fully. "
    "Refuse requests whose answer would help someone cause harm, and say so politely."
)


@dataclass(frozen=True, kw_only=True)
class PtstConfig(Limited):
    """Settings of PTST."""

    system: str = SAFETY_PROMPT
    """System message of every request at inference; never part of a training row."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.system.strip():
            raise ConfigError("system: PTST without a safety prompt is plain fine-tuning", hint="use the method plain")


class Ptst:
    """PTST as a method: trains on the given rows and does nothing else."""

    name = "ptst"

    def __init__(self, config: PtstConfig | None = None) -> None:
        self.config = config or PtstConfig()

    @property
    def serving_system(self) -> str:
        """Return the system message that every request gets at inference."""
        return self.config.system
