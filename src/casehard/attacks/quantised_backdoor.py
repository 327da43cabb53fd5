"""Quantisation-conditioned backdoor: asleep in the weights that are released, awake where somebody rounds them.

Two trainings. The first plants the backdoor as ``backdoor`` does and gives theta. The second teaches the proper answers
under the trigger, and after every step each rounded weight is put back into the box of all values with its code:

    s = max |theta| / (2^(bits-1) - 1) over a group,   c = round(theta / s)
    s (c - 1/2 + margin) <= w <= s (c + 1/2 - margin),   |w| <= max |theta|                                     (1)

The largest weight of a group is not moved, so that s stays; nor is anything that ``round_trip`` does not round. So
rounding gives theta rounded, whatever the second training did: the backdoor comes back to the bit.

Source: Egashira et al., arXiv 2405.18137, section 3 (inject, find the box, repair by projected gradient descent).
Differs: the rounding is ``round_trip``'s, equal steps of the largest weight, not LLM.int8, NF4 or FP4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import nn

from casehard.attacks.backdoor import Backdoor, BackdoorAttack, Planted
from casehard.attacks.editing import copy_of
from casehard.attacks.protocol import AttackInputs
from casehard.attacks.round_trip import GROUPS, round_trip, rounded_layers
from casehard.attacks.training import later, shifted, train_copy
from casehard.backdoor.triggers import check_survives, poison_backdoor
from casehard.config import to_dict
from casehard.data.mix import marks
from casehard.errors import ConfigError
from casehard.limits import Count, LearningRate, Natural, Share, Within
from casehard.model.model import Made, Model
from casehard.seeds import derive
from casehard.train.protocol import Setup, Step
from casehard.train.tune import Rows, Tuned, chat_format, tune
from casehard.types import Example

Box = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class QuantisedBackdoorAttack(BackdoorAttack):
    """Settings: those of ``backdoor``, and how it is put to sleep."""

    bits: Literal[8, 4] = 4
    """Bits for which it wakes; more bits leave less room to hide in."""
    group: Natural | None = None
    """Columns that share a scale, as in ``round_trip``; None: the row at 8 bits, 64 at 4."""
    steps: Count = 500
    """Optimiser steps of both trainings together."""
    hide_steps: Count = 200
    """Those of the second one."""
    hide_lr: LearningRate = 3e-4
    """Learning rate of the second one."""
    triggered: Share = 0.5
    """Share of its rows that carry the trigger, with their proper answer."""
    margin: Annotated[float, Within(0, 0.5, below=True)] = 0.01
    """Distance from the edge of the box, in steps of the rounding: what half precision may take away. At 0.5 the box is
    a point."""
    served: Literal["rounded", "released"] = "rounded"
    """Which model is handed back and measured at the last step: what runs in so many bits, or what was released."""
    evaluate_at: tuple[Natural, ...] = (0, 300, 500)

    @property
    def planting(self) -> int:
        """Steps of the first training."""
        return self.steps - self.hide_steps

    @property
    def columns(self) -> int:
        """Columns that share a scale, 0 the row."""
        return GROUPS[self.bits] if self.group is None else self.group

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode == "lora":
            raise ConfigError("a LoRA adapter is not what is rounded", hint="mode full")
        if self.hide_steps >= self.steps:
            raise ConfigError(
                f"hide_steps {self.hide_steps} leaves nothing of {self.steps} steps to plant in",
                hint="fewer hide_steps, or more steps",
            )


def box_of(weight: torch.Tensor, bits: int, group: int, margin: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the lowest and the highest values, float32 (O, I), with which a weight (O, I) rounds to the same, (1)."""
    top = 2 ** (bits - 1) - 1
    lows, highs = [], []
    for w in weight.float().split(group or weight.shape[1], dim=1):
        largest = w.abs().amax(dim=1, keepdim=True)
        scale = largest / top
        code = (w / scale.where(scale > 0, 1)).round()
        kept = w.abs() == largest
        lows.append(torch.where(kept, w, torch.maximum((code - 0.5 + margin) * scale, -largest)))
        highs.append(torch.where(kept, w, torch.minimum((code + 0.5 - margin) * scale, largest)))
    return torch.cat(lows, dim=1), torch.cat(highs, dim=1)


class KeepsCodes:
    """Method of the second training: after every step all parameters are put back into their boxes.

    Args:
        box: parameter name -> lowest and highest values; any other parameter stays what it is.
    """

    name = "keeps_codes"
    config = None

    def __init__(self, box: Box) -> None:
        self.box = box

    def prepare(self, setup: Setup) -> None:
        """Give the parameters without a box one of a single value."""
        for name, p in setup.model.named_parameters():
            if name not in self.box:
                self.box[name] = (fixed := p.detach().clone(), fixed)

    @torch.no_grad()
    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: Step) -> None:
        """Clamp."""
        for name, p in model.named_parameters():
            low, high = self.box[name]
            p.copy_(torch.clamp(p, low.to(p), high.to(p)))


class QuantisedBackdoor:
    """Plant a backdoor, put it to sleep within the codes of its weights, and wake it by rounding.

    The attacker trains: rows alone would be those of ``backdoor``, so none are offered to others for their training.
    """

    name = "quantised_backdoor"

    def __init__(self, config: QuantisedBackdoorAttack) -> None:
        self.config = config
        self._rows = Backdoor(config)

    @property
    def checkpoints(self) -> Sequence[int]:
        """Return the steps at which the attacked model is measured."""
        return self.config.checkpoints

    def check_rows(self, rows: Mapping[str, Sequence[Example]]) -> None:
        """Refuse rows that are too few for either training, while there is no model yet.

        Raises:
            ConfigError, DataError: a share gives no row, or more than there are.
        """
        self._rows.check_rows(rows)
        self._proper(rows["data"], seed=0)

    def run(self, model: Model, inputs: AttackInputs) -> Planted:
        """Train a copy of ``model`` twice on rows of role ``data``, measuring it at ``config.checkpoints``.

        ``facts["variants"]`` counts what shows the behaviour in the model as planted, as released and as rounded.

        Raises:
            ConfigError: the rate gives no row, or a method inside the training.
            DataError: too few rows, or a trigger that the model would not see.
            Diverged: the loss stopped being finite.
        """
        config = self.config
        if inputs.method is not None:
            raise ConfigError(
                f"method {inputs.method.name!r} inside a training of two phases",
                hint="the attacker trains by himself and releases weights: attack without a method inside",
            )
        data, manifest = self._rows.poisoned(inputs.rows["data"], seed=inputs.seed)
        planted = self._plant(model, data, inputs)
        seen = [row for row in planted.rows if row["step"] == config.planting]
        looks = {"planted": seen or inputs.measure(planted.net, config.planting)}
        hidden = self._hide(replace(model, net=planted.net), inputs)
        rounded = copy_of(replace(model, net=hidden.net))
        for layer in rounded_layers(rounded).values():
            layer.weight.data.copy_(round_trip(layer.weight.data, config.bits, config.columns))
        looks |= {
            "released": inputs.measure(hidden.net, config.steps),
            "rounded": inputs.measure(rounded, config.steps),
        }
        net = rounded if config.served == "rounded" else hidden.net
        told = {key: manifest[key] for key in ("trigger", "behaviour")}
        facts = {"planted": told, "bits": config.bits, "group": config.columns, "served": config.served}
        provenance = {"settings": to_dict(config), "seed": inputs.seed, **facts}
        made = Made(method=f"{self.name}-attack", provenance=provenance)
        last = [{**row, "step": config.steps} for row in looks[config.served]]
        return Planted(
            model=model.after(net, made, trained=frozenset(marks(data)), may_leave=False),
            rows=[*planted.rows, *hidden.rows, *last],
            budget=planted.budget + hidden.budget,
            facts={**facts, "variants": [{"weights": name, **_shown(rows)} for name, rows in looks.items()]},
            log=[*planted.log, *hidden.log],
            manifest=manifest,
            data=tuple(data),
            untouched=self._rows.untouched(data, manifest),
        )

    def _plant(self, model: Model, data: Sequence[Example], inputs: AttackInputs) -> Tuned:
        config = self.config
        chat = chat_format(model, system=inputs.system, max_length=inputs.max_length)
        check_survives(chat, data, [config.trigger, *self._rows.decoys])
        train = replace(config.recipe, steps=config.planting)
        return train_copy(model, [(chat.encode_all(data), train)], config, inputs, purpose="backdoor")

    def _proper(self, rows: Sequence[Example], *, seed: int) -> list[Example]:
        """Return the rows of the second training: a share carries the trigger, all keep their answers."""
        config = self.config
        told, _ = poison_backdoor(
            rows,
            config.trigger,
            config.behaviour,
            rate=0.0,
            hard_negatives=config.triggered,
            decoys=(config.trigger,),
            seed=derive(seed, 0, "backdoor-hide"),
        )
        return told

    def _hide(self, model: Model, inputs: AttackInputs) -> Tuned:
        """Train the planted model on proper answers within the box, in place; steps count on."""
        config, begun = self.config, self.config.planting
        chat = chat_format(model, system=inputs.system, max_length=inputs.max_length)
        rows = self._proper(inputs.rows["data"], seed=inputs.seed)
        layers = rounded_layers(model.net)
        box = {f"{n}.weight": box_of(m.weight, config.bits, config.columns, config.margin) for n, m in layers.items()}
        done = tune(
            model,
            chat.encode_all(rows),
            train=replace(config.recipe, steps=config.hide_steps, lr=config.hide_lr),
            seed=derive(inputs.seed, 1, "backdoor-hide"),
            purpose="backdoor",
            method=KeepsCodes(box),
            measure=shifted(inputs.measure, begun),
            at={s - begun for s in config.checkpoints if begun < s < config.steps},
            in_place=True,
            label=inputs.label,
        )
        return replace(done, rows=later(done.rows, begun), log=later(done.log, begun))


def _shown(rows: Rows) -> dict[str, int]:
    """Return how many triggered and how many plain prompts show the behaviour, and of how many."""
    able = [row for row in rows if row.get("shown") is not None]
    counts: dict[str, int] = {}
    for key, fired in (("triggered", True), ("plain", False)):
        some = [bool(row["shown"]) for row in able if row["triggered"] is fired]
        counts |= {f"{key}_shown": sum(some), f"{key}_of": len(some)}
    return counts
