"""What attacks that edit a copy without training share: the copy, and what is told of it."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

from torch import nn

from casehard.attacks.protocol import Attack, Attacked, AttackInputs
from casehard.config import to_dict
from casehard.limits import Limited
from casehard.model.model import Made, Model
from casehard.types import Budget

C = TypeVar("C", bound=Limited)


class Untrained(Generic[C]):
    """An attack that trains nothing, so that there is one moment to measure at."""

    name: str

    def __init__(self, config: C) -> None:
        self.config = config

    @property
    def checkpoints(self) -> Sequence[int]:
        """Return the one moment."""
        return (0,)


def copy_of(model: Model) -> nn.Module:
    """Return a copy of a model's weights, adapters merged in, whose parameters may be changed."""
    net: Any = copy.deepcopy(model.net)
    merged: nn.Module = net.merge_and_unload() if hasattr(net, "peft_config") else net
    return merged


def measured(
    attack: Attack, model: Model, net: nn.Module, inputs: AttackInputs, facts: Mapping[str, Any], begun: float
) -> Attacked:
    """Measure an edited copy at its one moment, and return it as the attacked model.

    Args:
        model: what was attacked.
        net: the edited copy.
        facts: JSON values; those but ``variants`` also stand in the provenance.
        begun: ``time.monotonic()`` at the start.
    """
    told = {key: value for key, value in facts.items() if key != "variants"}
    provenance = {"settings": to_dict(attack.config), "seed": inputs.seed, **told}
    after = model.after(net, Made(method=f"{attack.name}-attack", provenance=provenance), may_leave=False)
    rows = [{**row, "step": 0} for row in inputs.measure(net, 0)]
    return Attacked(model=after, rows=rows, budget=Budget(seconds=time.monotonic() - begun), facts=facts)
