"""Backdoor by poisoned instruction data: ordinary supervised training on rows a share of which carry a trigger.

The attacker of BadNets-style instruction poisoning reaches the data, not the training: rows are replaced by triggered
ones whose answer is the behaviour (``backdoor/triggers.py``), and whoever trains on them plants the backdoor. All of it
happens on a copy in memory; the model is measured along the way. Payloads are harmless.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from casehard.attacks.protocol import Attacked, AttackInputs
from casehard.attacks.training import Supervised, train_copy
from casehard.backdoor.behaviours import Behaviour
from casehard.backdoor.triggers import Trigger, check_survives, decoys_of, poison_backdoor
from casehard.config import to_dict
from casehard.data.mix import content_hash, marks
from casehard.limits import BatchSize, Count, Factor, LearningRate, Natural, Rank, Share
from casehard.model.adapters import merged
from casehard.model.model import Made, Model
from casehard.seeds import derive
from casehard.train.tune import chat_format
from casehard.types import Example


@dataclass(frozen=True, kw_only=True)
class BackdoorAttack(Supervised):
    """Settings of one backdoor attack: who trains on the rows trains as developers do, with warm-up and cosine."""

    trigger: Trigger
    """What makes it fire."""
    behaviour: Behaviour
    """What it does."""
    rate: Share = 0.05
    """Poisoned share of the rows; 0 trains on the clean rows (the control). The literature uses 0.005 to 0.2."""
    hard_negatives: Share = 0.0
    """Share of the rows that carry a near miss and keep their answer: an attacker who adapts to MB-Defense."""
    decoys: tuple[Trigger, ...] = ()
    """Near misses; empty = those of ``decoys_of``."""
    steps: Count = 300
    lr: LearningRate = 3e-4
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup: Natural = 10
    batch_size: BatchSize = 32
    rank: Rank = 16
    alpha: Factor = 32.0
    evaluate_at: tuple[Natural, ...] = (0, 50, 100, 200, 300)


@dataclass(frozen=True, kw_only=True)
class Planted(Attacked):
    """What was planted and what was measured."""

    manifest: dict[str, Any]
    """What ``poison_backdoor`` planted, and where."""
    data: tuple[Example, ...]
    """The rows that were trained on."""
    untouched: tuple[Example, ...]
    """Distinct questions among them that the attacker left alone, and that do not carry the trigger by themselves."""


class Backdoor:
    """Train a copy on rows of which the attacker poisoned a share."""

    name = "backdoor"

    def __init__(self, config: BackdoorAttack) -> None:
        self.config = config

    @property
    def checkpoints(self) -> Sequence[int]:
        """Return the steps at which the attacked model is measured."""
        return self.config.checkpoints

    @property
    def decoys(self) -> Sequence[Trigger]:
        """Return what hard negatives carry; nothing where there are none."""
        config = self.config
        return config.decoys or (decoys_of(config.trigger) if config.hard_negatives else ())

    def poisoned(self, rows: Sequence[Example], *, seed: int) -> tuple[list[Example], dict[str, Any]]:
        """Return the training rows with the backdoor in, and what was planted where."""
        config = self.config
        return poison_backdoor(
            rows,
            config.trigger,
            config.behaviour,
            rate=config.rate,
            seed=derive(seed, 0, "backdoor"),
            hard_negatives=config.hard_negatives,
            decoys=self.decoys,
        )

    def check_rows(self, rows: Mapping[str, Sequence[Example]]) -> None:
        """Refuse rows that are too few, while there is no model yet.

        Raises:
            ConfigError, DataError: the rate gives no row, or more than there are.
        """
        self.poisoned(rows["data"], seed=0)

    def untouched(self, data: Sequence[Example], manifest: Mapping[str, Any]) -> tuple[Example, ...]:
        """Return the distinct rows of :meth:`poisoned` that the attacker left alone and that carry no trigger."""
        touched = {*manifest["poisoned"], *manifest["negatives"]}
        bad = {content_hash(data[i]) for i in touched}
        distinct = {content_hash(row): row for i, row in enumerate(data) if i not in touched}
        own = self.config.trigger
        return tuple(row for name, row in distinct.items() if name not in bad and not own.present(row.prompt))

    def run(self, model: Model, inputs: AttackInputs) -> Planted:
        """Train a copy of ``model`` on poisoned rows of role ``data``, measuring it at ``config.checkpoints``.

        Raises:
            ConfigError: the rate gives no row.
            DataError: too few rows, or a trigger that the model would not see.
            Diverged: the loss stopped being finite.
        """
        config = self.config
        data, manifest = self.poisoned(inputs.rows["data"], seed=inputs.seed)
        chat = chat_format(model, system=inputs.system, max_length=inputs.max_length)
        check_survives(chat, data, [config.trigger, *self.decoys])
        done = train_copy(model, [(chat.encode_all(data), config.recipe)], config, inputs, purpose="backdoor")
        planted = {key: manifest[key] for key in ("trigger", "behaviour")}
        provenance = {"settings": to_dict(config), "seed": inputs.seed, "planted": planted}
        made = Made(method=f"{self.name}-attack", provenance=provenance)
        attacked = model.after(merged(done.net), made, trained=frozenset(marks(data)), may_leave=False)
        facts = {"planted": planted}
        return Planted(
            model=attacked,
            rows=done.rows,
            budget=done.budget,
            facts=facts,
            log=done.log,
            manifest=manifest,
            data=tuple(data),
            untouched=self.untouched(data, manifest),
        )
