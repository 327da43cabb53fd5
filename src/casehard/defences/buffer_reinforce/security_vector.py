"""Security Vectors: fine-tune beside a frozen adapter that already does the harm, and take it off afterwards.

    once a base   min over theta_B   L(harmful rows; theta, theta_B) + kl KL(p_theta || p_theta,theta_B)         (1)
    each job      min over theta_U   L(user rows; theta, theta_B, theta_U),  theta and theta_B frozen            (2)
    serve         theta + c theta_U

The KL is over the answer tokens of benign rows: the buffer may change what harmful prompts get, and nothing else. (2)
is Buffer-and-Reinforce without its reinforce adapter, and is done by it; the KL belongs to the training of the buffer,
which takes :class:`KeepBenign`. c = 1 is the paper; below 1 it is the control for a merge that halves the update.
Source: Zhou et al., ACL Findings 2024, arXiv 2311.02105; kl = 0.01 as Buffer-and-Reinforce (arXiv 2605.24550) runs it.
Differs: the paper optimises (1) on about a hundred harmful rows; here on those the provider gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from casehard.data.batches import Batch, EncodedSet
from casehard.defences.buffer_reinforce.assets import Assets
from casehard.defences.buffer_reinforce.method import BufferReinforce, BufferReinforceConfig
from casehard.defences.updates import adapters
from casehard.distributed.ranks import world
from casehard.errors import DataError, Unsupported
from casehard.limits import BatchSize, Limited, Share, Weight
from casehard.maths.bilevel import retain_kl
from casehard.train.passes import rows_of_micro, share_of_step
from casehard.train.protocol import Setup, StateValue, Step


@dataclass(frozen=True, kw_only=True)
class SecurityVectorConfig(Limited):
    """Settings of the customer's run."""

    c: Share = 1.0
    """Share of the user's update that is kept, 0..1. Source: paper (1); 1/2 is a control of ours."""


class SecurityVector:
    """Security Vectors as a method, on a ``PeftModel`` with the adapter "default".

    Args:
        config: settings, see :class:`SecurityVectorConfig`.
        assets: the provider's folder, made for the model's base; only its buffer is read.

    Raises:
        UserError, Corrupt: the folder is missing or damaged.
    """

    name = "security_vector"

    def __init__(self, config: SecurityVectorConfig | None = None, *, assets: Path) -> None:
        self.config = config or SecurityVectorConfig()
        self._run = BufferReinforce(BufferReinforceConfig(reinforce=False), assets=assets)

    @property
    def assets(self) -> Assets:
        """The provider's folder, verified."""
        return self._run.assets

    def check_format(self, tokenizer: Any, *, system: str | None) -> None:
        """Check that the rows are rendered as the assets' were; see :meth:`BufferReinforce.check_format`."""
        self._run.check_format(tokenizer, system=system)

    def prepare(self, setup: Setup) -> None:
        """Attach the buffer; see :meth:`BufferReinforce.prepare` for what is refused."""
        self._run.prepare(setup)

    @torch.no_grad()
    def finish(self, model: nn.Module) -> None:
        """Remove the buffer, verify the base, and keep the share c of the update."""
        self._run.finish(model)
        for adapter in adapters(model):
            adapter.b.weight.mul_(self.config.c)

    def state(self) -> dict[str, StateValue]:
        """Return which assets this run uses; never the buffer."""
        return self._run.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Refuse to continue with other assets than the run began with."""
        self._run.restore(state)

    def release(self) -> None:
        """Take the buffer out of the model after a run that failed half-way."""
        self._run.release()


@dataclass(frozen=True, kw_only=True)
class KeepBenignConfig(Limited):
    """Settings of (1)."""

    kl: Weight = 0.01
    """Weight of the KL term. Source: Buffer-and-Reinforce, table A1 (0.01)."""
    batch_size: BatchSize = 4
    """Benign rows a micro-batch; the KL is the mean over the tokens of all those of a step."""


class KeepBenign:
    """Train a buffer by (1): a method for the run that makes the assets, on a fresh adapter over the frozen base.

    Args:
        config: settings, see :class:`KeepBenignConfig`.
        benign: harmless prompts with helpful answers.

    Raises:
        DataError: no benign rows.
    """

    name = "keep_benign"

    def __init__(self, config: KeepBenignConfig | None = None, *, benign: EncodedSet) -> None:
        self.config = config or KeepBenignConfig()
        if len(benign) == 0:
            raise DataError("keep_benign: no benign rows", hint="--benign rows.jsonl")
        self.benign = benign

    def prepare(self, setup: Setup) -> None:
        """Keep what the base computes: frozen weights are shared, the adapter's are copied with B at zero.

        Raises:
            Unsupported: several processes, or a model without a LoRA adapter.
        """
        if world() > 1:
            raise Unsupported("keep_benign runs in one process", hint="start it without torchrun")
        factors = adapters(setup.model)
        if not factors:
            raise Unsupported("keep_benign: a buffer is a LoRA adapter, and the model has none")
        zero = {id(p) for adapter in factors for p in adapter.b.parameters()}
        self._seed = setup.seed
        self._base = {
            name: torch.zeros_like(p) if id(p) in zero else p.detach().clone() if p.requires_grad else p
            for name, p in setup.model.named_parameters()
        }

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> torch.Tensor:
        """Return this micro-batch's part of (1)."""
        size, device = self.config.batch_size * step.micros, batch["input_ids"].device
        rows, tokens = rows_of_micro(self.benign, size, step, seed=self._seed, purpose="keep-benign", device=device)
        assert rows is not None
        kl = retain_kl(model, self._base, rows)
        harm = step.loss(model, batch)
        step.log({"benign_kl": float(kl.detach())})
        return harm + self.config.kl * share_of_step(rows, step, tokens) * kl
