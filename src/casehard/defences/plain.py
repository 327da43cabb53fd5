"""Plain fine-tuning: no seam at all, so the stock training step runs. The control every defence is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from casehard.limits import Limited


@dataclass(frozen=True, kw_only=True)
class PlainConfig(Limited):
    """Plain fine-tuning has no settings of its own."""


class Plain:
    """Train on the given rows and do nothing else."""

    name = "plain"

    def __init__(self, config: PlainConfig | None = None) -> None:
        self.config = config or PlainConfig()

    def __repr__(self) -> str:
        return "Plain()"
