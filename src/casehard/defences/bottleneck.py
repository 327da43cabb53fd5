"""Safety bottleneck regularisation: what the model thinks at the end of a restricted prompt stays as it was.

    h(x; theta) = hidden state of ``layer`` at the last position of prompt x, from which the answer begins        (1)
    L(theta) = L(user rows) + weight mean over x of ||h(x; theta) - h(x; start)||^2                               (2)

x runs over a few restricted prompts, one by default. The last layer is what the unembedding reads: behind the final
norm, V numbers of the answer's first token are a linear function of these H. So every answer has to pass through (1).
Source: arXiv 2605.05995 (Safety Bottleneck Regularization), known to us from a description: one prompt, the last layer
before the unembedding and an L2 penalty are from it; the square and the mean over prompts are our reading.
The prompts are those of the rows given as ``safe``, which must all be restricted; their answers are not read. The
penalty counts once an optimiser step, however it is cut up, and is computed without dropout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import nn

from casehard.data.batches import IGNORE, Batch, Encoded, EncodedSet, collate, indices_at
from casehard.distributed.ranks import require_one_process
from casehard.errors import ConfigError, DataError
from casehard.limits import BatchSize, Limited, Weight, Within
from casehard.train.passes import quiet
from casehard.train.protocol import Setup, StateValue, Step


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig(Limited):
    """Settings of the bottleneck."""

    layer: Annotated[int, Within(-(2**10), 2**10)] = -1
    """Of (1): 0 the embeddings, n behind block n, -1 the last, behind the final norm. Source: description (last)."""
    weight: Weight = 1.0
    """Of the penalty in (2), nats for a squared distance of 1; 0 is plain fine-tuning. Ours."""
    prompts: BatchSize = 1
    """Prompts that are held, drawn by the seed from the safe rows. Source: description (one)."""


class Bottleneck:
    """The bottleneck as a method.

    Args:
        config: settings, see :class:`BottleneckConfig`.
        safe: rows with restricted prompts; their answers are not read.

    Raises:
        DataError: fewer rows than prompts to hold, or a row without prompt or answer.
    """

    name = "bottleneck"

    def __init__(self, config: BottleneckConfig | None = None, *, safe: EncodedSet) -> None:
        self.config = config or BottleneckConfig()
        if len(safe) < self.config.prompts:
            hint = "--safe refusals.jsonl, or a smaller --set settings.prompts"
            raise DataError(f"bottleneck: {self.config.prompts} prompts to hold and {len(safe)} safe rows", hint=hint)
        self.safe = EncodedSet(tuple(_prompt(row) for row in safe.rows), safe.pad_id)

    def prepare(self, setup: Setup) -> None:
        """Draw the prompts and measure (1) on the starting model.

        Raises:
            ConfigError: the model has no such layer.
            Unsupported: several processes.
        """
        require_one_process("bottleneck")
        count = self.config.prompts
        drawn = indices_at(len(self.safe), count, seed=setup.seed, step=0, purpose="bottleneck")
        self._prompts = collate([self.safe.rows[i] for i in drawn], self.safe.pad_id)
        with quiet(setup.model), torch.no_grad():
            self._held = last_states(setup.model, self._prompts, self.config.layer)

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> torch.Tensor:
        """Return this micro-batch's part of (2); the penalty is the last one's."""
        user = step.loss(model, batch)
        if self.config.weight == 0 or not step.last:  # the weights do not move within a step
            return user
        with quiet(model):
            now = last_states(model, self._prompts, self.config.layer)
        if step.index == 0 and step.compute_dtype is not None:
            self._held = (
                now.detach()
            )  # still the start, rounded as the loop rounds: rounding must not count as distance
        penalty = (now - self._held).square().sum(-1).mean()
        step.log({"bottleneck_loss": float(penalty.detach()), "tokens": int(self._prompts["attention_mask"].sum())})
        return user + self.config.weight * penalty

    def state(self) -> dict[str, StateValue]:
        """Return the states held, (prompts, H): whoever resumes may have loaded the checkpoint, not the start."""
        return {"held": self._held}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` returned."""
        self._held = state["held"].to(self._held.device)


def _prompt(row: Encoded) -> Encoded:
    """Return a row's tokens up to its answer.

    Raises:
        DataError: there are none, or no answer begins.
    """
    first = next((i for i, label in enumerate(row.labels) if label != IGNORE), 0)
    if first == 0:
        raise DataError("bottleneck: a safe row has no prompt or no answer", hint="rows of a prompt and a response")
    return Encoded(row.input_ids[:first], row.labels[:first])


def last_states(model: nn.Module, prompts: Batch, layer: int) -> torch.Tensor:
    """Return (1), fp32 of shape (B, H), for prompts (B, T) padded on the right.

    Raises:
        ConfigError: the model has no such layer.
    """
    device = next(model.parameters()).device
    mask = prompts["attention_mask"].to(device)
    found = model(input_ids=prompts["input_ids"].to(device), attention_mask=mask, output_hidden_states=True)
    states = found.hidden_states
    if not -len(states) <= layer < len(states):
        raise ConfigError(f"layer is {layer}", hint=f"0 (embeddings) to {len(states) - 1}, or -1 for the last")
    out: torch.Tensor = states[layer][torch.arange(len(mask), device=device), mask.sum(1) - 1]
    return out.float()
