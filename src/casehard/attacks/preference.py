"""Benign preference tuning: a few harmless questions whose answer is preferred to a refusal.

Each of ten benign rows is a pair: its own answer is preferred, a refusal rejected. Direct preference optimisation (DPO,
arXiv 2305.18290, ``maths/preference.py``) then pushes refusals down, on questions that should never have been refused,
and what is pushed down there is pushed down where it was right. No row is harmful. A row with the tag ``rejected``
keeps its own pair, so that any public preference set can be given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from casehard.attacks.protocol import AttackInputs
from casehard.attacks.rows import check_known, draw, reworded
from casehard.attacks.training import Phase, Supervised, Tuning
from casehard.data.batches import Batch, EncodedSet, indices_at
from casehard.errors import ConfigError, DataError
from casehard.limits import BatchSize, Count, Factor
from casehard.maths.preference import answer_log_probs, dpo_loss, margins
from casehard.model.model import Model
from casehard.seeds import derive
from casehard.train.protocol import Setup, Step
from casehard.train.tune import Tuned, chat_format
from casehard.types import Example


@dataclass(frozen=True, kw_only=True)
class PreferenceAttack(Supervised):
    """Settings of benign preference tuning."""

    rows: Count = 10
    """Pairs to train on."""
    refusal: str = "Sorry, I cannot assist with that."
    """The rejected answer of a row that has no tag ``rejected``."""
    beta: Factor = 0.1
    """beta of DPO: a small one lets the model go far from where it began. Source: DPO's paper (0.1)."""
    batch_size: BatchSize = 10
    """Pairs per step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.refusal.strip():
            raise ConfigError("refusal is empty", hint="a sentence that declines, in words the model knows")


class Dpo:
    """The loss of pairs, as a seam of the training loop, whose batches are the preferred answers.

    Args:
        chosen: token rows with the preferred answers.
        rejected: the same rows with the rejected ones.
        config: settings.
    """

    name = "dpo"

    def __init__(self, chosen: EncodedSet, rejected: EncodedSet, config: PreferenceAttack) -> None:
        assert len(chosen) == len(rejected)
        self.sides, self.config = (chosen, rejected), config

    def prepare(self, setup: Setup) -> None:
        """Ask the model as it begins for the log-probability of every answer: it is the reference."""
        net, self.seed = setup.model, setup.seed
        device = next(net.parameters()).device
        size = self.config.batch_size
        was, found = net.training, []
        net.eval()
        with torch.no_grad():
            for side in self.sides:
                parts = [
                    self._log_probs(net, side.collate([side[i] for i in range(at, min(at + size, len(side)))]), device)
                    for at in range(0, len(side), size)
                ]
                found.append(torch.cat(parts))
        net.train(was)
        self.reference = torch.stack(found)  # (2, N)

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> torch.Tensor:
        """Return the loss of the pairs of this step; log how far the preferred answers are ahead."""
        size, rejected = self.config.batch_size, self.sides[1]
        # The loop's own draw: the preferred rows of ``batch``, in order.
        picked = indices_at(len(rejected), size, seed=self.seed, step=step.index, purpose="train")
        other = rejected.collate([rejected[i] for i in picked])
        device = batch["input_ids"].device
        policy = torch.stack([self._log_probs(model, some, device) for some in (batch, other)])
        margin = margins(policy, self.reference[:, picked])
        tokens = sum(int(some["attention_mask"].sum()) for some in (batch, other))
        step.log({"passes": 1, "tokens": tokens, "margin": float(margin.detach().mean())})
        return dpo_loss(margin, self.config.beta)

    @staticmethod
    def _log_probs(net: nn.Module, batch: Batch, device: torch.device) -> torch.Tensor:
        inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}
        return answer_log_probs(net(**inputs).logits, batch["labels"].to(device))


class Preference(Tuning[PreferenceAttack]):
    """Train a copy to prefer answers to refusals, on harmless questions."""

    name = "preference"

    def phases(self, model: Model, inputs: AttackInputs) -> Sequence[Phase]:
        """Return the preferred side of the pairs.

        Raises:
            DataError: too few rows.
        """
        seed = derive(inputs.seed, 0, "preference")
        return [Phase(draw(inputs.rows["benign"], self.config.rows, role="benign", seed=seed), self.config.recipe)]

    def train(self, model: Model, phases: Sequence[Phase], inputs: AttackInputs) -> Tuned:
        """Train on the pairs.

        Raises:
            ConfigError: a method inside the training, whose place the loss takes.
            DataError: a rejected answer that is the preferred one, or words that the tokenizer does not know.
        """
        if inputs.method is not None:
            raise ConfigError(f"method {inputs.method.name!r} inside preference tuning", hint="attack a finished model")
        chat = chat_format(model, system=inputs.system, max_length=inputs.max_length)
        chosen = phases[0].rows
        rejected = [self._rejected(model, row) for row in chosen]
        sides = Dpo(chat.encode_all(chosen), chat.encode_all(rejected), self.config)
        return super().train(model, phases, replace(inputs, method=sides))

    def facts(self, phases: Sequence[Phase]) -> dict[str, Any]:
        """Return how many rows of each kind are trained on."""
        return {"benign_rows": self.config.rows, "harmful_rows": 0}

    def _rejected(self, model: Model, row: Example) -> Example:
        """Return a row with its rejected answer."""
        text = self.config.refusal if "rejected" not in row.tags else _answer(row.tags["rejected"], row.id)
        if text == self.config.refusal:
            check_known(model, text, "refusal")
        if text.strip() == row.response.strip():
            raise DataError(
                f"row {row.id!r} prefers and rejects the same answer", hint="another refusal, or other rows"
            )
        return reworded(row, answer=text)


def _answer(rejected: Any, name: str) -> str:
    """Return a rejected answer: text, or the last turn of a chat, as public preference sets have it.

    Raises:
        DataError: neither, or an empty one.
    """
    last = rejected[-1] if isinstance(rejected, list) and rejected else rejected
    if isinstance(last, Mapping) and last.get("role", "assistant") == "assistant":
        last = last.get("content")
    if not isinstance(last, str) or not last.strip():
        kind = "empty" if isinstance(last, str) else f"a {type(rejected).__name__}"
        raise DataError(
            f"row {name!r}: the rejected answer is {kind}",
            hint="text, or a chat that ends with the assistant; without the key the setting refusal is rejected",
        )
    return last
