"""Soft prompt: a few trained vectors stand in front of every prompt; the weights stay as they are.

    min over P (n, D) of the mean of -log p(answer | P, prompt)                                                  (1)

P are embeddings of no token, the same for all rows, and trained on the attacker's compliant answers with the model
frozen. Whoever holds weights can put them in front; whoever sells tokens only need not fear them. Source: Schwinn et
al., arXiv 2402.09063 (embedding attacks on open models); (1) is prompt tuning, Lester et al., arXiv 2104.08691.
Differs: P stands in front of the rendered chat, not behind the request, and is trained by AdamW rather than signed
gradients; it is measured on other prompts than it was trained on.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import nn

from casehard.attacks.protocol import Attacked, AttackInputs
from casehard.config import to_dict
from casehard.data.batches import IGNORE
from casehard.data.mix import is_marked, marks
from casehard.errors import DataError, Unsupported
from casehard.limits import BatchSize, Count, LearningRate, Limited, Natural
from casehard.model.model import Made, Model
from casehard.seeds import generator
from casehard.train.recipe import TrainConfig
from casehard.train.tune import chat_format, tune


@dataclass(frozen=True, kw_only=True)
class SoftPromptAttack(Limited):
    """Settings of a soft prompt."""

    tokens: Count = 8
    """n, vectors in front of the prompt."""
    steps: Count = 200
    """Optimiser steps."""
    lr: LearningRate = 1e-2
    """Learning rate, constant; AdamW without weight decay."""
    batch_size: BatchSize = 16
    """Rows per step."""
    evaluate_at: tuple[Natural, ...] = (0, 10, 25, 50, 100, 200)
    """Steps at which it is measured; 0 is the model without anything in front. Those beyond ``steps`` are left out,
    ``steps`` itself is always in."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute dtype; the vectors are fp32 throughout."""

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """Steps at which the attacked model is measured, ascending."""
        return tuple(sorted({s for s in self.evaluate_at if s <= self.steps} | {self.steps}))


class Prompted(nn.Module):
    """A frozen causal language model that sees vectors of its own in front of whatever it is asked.

    It takes token ids, as the model does, and gives logits and new tokens for those ids alone. Letters: B rows of T
    tokens, D the width, n the vectors.

    Args:
        net: the model; frozen in place.
        start: the vectors (n, D) in fp32.
    """

    def __init__(self, net: nn.Module, start: torch.Tensor) -> None:
        super().__init__()
        self.net: Any = net.requires_grad_(False)
        self.prompt = nn.Parameter(start.clone())
        config: Any = copy.deepcopy(self.net.config)
        if room := getattr(config, "max_position_embeddings", None):
            config.max_position_embeddings = room - len(start)
        self.config = config

    @property
    def generation_config(self) -> Any:
        """Return the model's own."""
        return self.net.generation_config

    def _in_front(self, input_ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return embeddings and mask, the vectors in front. Padding may lie between them and the first token."""
        embedded_BTD = self.net.get_input_embeddings()(input_ids)
        prompt_BND = self.prompt.to(embedded_BTD.dtype).expand(len(input_ids), -1, -1)
        mask_BT = torch.cat([mask.new_ones(len(input_ids), len(self.prompt)), mask], dim=1)
        return {"inputs_embeds": torch.cat([prompt_BND, embedded_BTD], dim=1), "attention_mask": mask_BT}

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        """Return the model's output on token ids (B, T) padded on the right; logits are (B, T, V)."""
        given, count = self._in_front(input_ids, attention_mask), len(self.prompt)
        if labels is not None:
            labels = torch.cat([labels.new_full((len(labels), count), IGNORE), labels], dim=1)
        out = self.net(**given, labels=labels, use_cache=False)
        out.logits = out.logits[:, count:]
        return out

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, generation_config: Any) -> torch.Tensor:
        """Return the token ids (B, T) padded on the left, and behind them the new ones."""
        given = self._in_front(input_ids, attention_mask)
        fresh = self.net.generate(**given, generation_config=generation_config)
        return torch.cat([input_ids, fresh], dim=1)


class SoftPrompt:
    """Train one soft prompt for all rows and measure the model behind it."""

    name = "soft_prompt"

    def __init__(self, config: SoftPromptAttack | None = None) -> None:
        self.config = config or SoftPromptAttack()

    @property
    def checkpoints(self) -> Sequence[int]:
        """Return the steps at which the model is measured."""
        return self.config.checkpoints

    def run(self, model: Model, inputs: AttackInputs) -> Attacked:
        """Train vectors in front of a frozen copy of ``model``, measuring at ``config.checkpoints``.

        Returns:
            As model a :class:`Prompted`, whose weights are those of ``model``.

        Raises:
            DataError: a row that does not fit the context together with the vectors.
            Diverged: the loss stopped being finite.
        """
        config, rows = self.config, inputs.rows["harmful"]
        prompted = Prompted(copy.deepcopy(model.net), start_of(model, config.tokens, inputs.seed))
        behind = Model(net=prompted, tokenizer=model.tokenizer, digest=model.digest)
        chat = chat_format(behind, system=inputs.system, max_length=inputs.max_length)
        recipe = TrainConfig(
            steps=config.steps,
            batch_size=config.batch_size,
            lr=config.lr,
            schedule="constant",
            warmup=0,
            weight_decay=0.0,
            precision=config.precision,
        )
        done = tune(
            behind,
            chat.encode_all(rows),
            train=recipe,
            seed=inputs.seed,
            purpose="soft-prompt",
            measure=lambda net, at: inputs.measure(net if at else model.net, at),
            at=config.checkpoints,
            in_place=True,
            label=inputs.label,
        )
        known = sum(is_marked(row, model.trained_prompts) for row in rows)
        facts = {"harmful_rows": len(rows), "rows_seen_in_training": known}
        made = Made(
            method=f"{self.name}-attack", provenance={"settings": to_dict(config), "seed": inputs.seed, **facts}
        )
        after = model.after(done.net, made, trained=frozenset(marks(rows)), may_leave=False, writer=_no_file)
        return Attacked(model=after, rows=done.rows, budget=done.budget, facts=facts, log=done.log)


@torch.no_grad()
def start_of(model: Model, tokens: int, seed: int) -> torch.Tensor:
    """Return embeddings (n, D) of tokens drawn from the vocabulary.

    Raises:
        DataError: more vectors than the context has room for.
    """
    net: Any = model.net
    table_VD = net.get_input_embeddings().weight
    room = getattr(net.config, "max_position_embeddings", None)
    if room is not None and tokens >= room:
        raise DataError(f"{tokens} vectors do not fit a context of {room} tokens", hint="config.tokens: fewer")
    drawn = torch.randint(len(table_VD), (tokens,), generator=generator(seed, 0, "soft-prompt-start"))
    return table_VD[drawn.to(table_VD.device)].float()


def _no_file(out: Path) -> NoReturn:
    raise Unsupported(
        f"{out}: a soft prompt is no part of a checkpoint", hint="its vectors are found.model.net.prompt, in memory"
    )
