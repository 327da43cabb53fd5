"""ONION-style filtering as a defence: train on rows without the words that surprise the model it starts from.

The words of the verified rows say how much surprise is ordinary: the threshold lets ``keep`` of them pass. Drops are of
log perplexity: a model that was only ever shown chats gives plain text perplexities of any size.

Source: Qi et al., EMNLP 2021 (``casehard.backdoor.onion`` has the equation). Differs: their threshold is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from casehard.backdoor.onion import onion, perplexities, suspicions
from casehard.errors import ConfigError, DataError
from casehard.limits import Limited, Share
from casehard.model.model import Model
from casehard.train.protocol import PipelineInputs, Trained
from casehard.train.tune import chat_format, tune


@dataclass(frozen=True, kw_only=True)
class OnionConfig(Limited):
    """Settings of the filter."""

    keep: Share = 0.97
    """Share of the words of verified rows that its threshold lets pass."""


class Onion:
    """Filter the rows, then train on them."""

    name = "onion"

    def __init__(self, config: OnionConfig | None = None) -> None:
        self.config = config or OnionConfig()

    def check(self, *, trains: bool) -> None:
        """Refuse to repair: there is nothing to filter."""
        if not trains:
            raise ConfigError("onion filters rows before a training, and there are none", hint="give rows to train on")

    def train(self, model: Model, inputs: PipelineInputs) -> Trained:
        """Train a copy of ``model`` on the rows of role ``data`` without their suspicious words.

        Raises:
            DataError: no verified rows.
        """
        data, clean = inputs.rows.get("data", ()), inputs.rows.get("clean", ())

        def scorer(texts: Sequence[str]) -> list[float]:
            return [math.log(value) for value in perplexities(model.net, model.tokenizer, texts)]

        drops = sorted(drop for row in clean for _, drop in suspicions(row.prompt, scorer))
        if not drops:
            raise DataError("onion takes its threshold from verified rows, and there are none", hint="--clean FILE")
        threshold = max(0.0, drops[min(len(drops) - 1, int(self.config.keep * len(drops)))])
        rows, changes = onion(data, scorer, threshold=threshold)
        chat = chat_format(model, system=inputs.system, max_length=inputs.max_length)
        done = tune(
            model,
            chat.encode_all(rows),
            train=inputs.train,
            seed=inputs.seed,
            purpose="finetune",
            label=inputs.label,
        )
        found = {"threshold": threshold, "rows_changed": [change["row"] for change in changes]}
        return Trained(net=done.net, budgets=[done.budget], facts={"onion": found})
