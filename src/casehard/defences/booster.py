"""Booster: align, and keep one step of harmful tuning from bringing harmful loss down much.

    F(w)  = f(w) + lambda (h(w) - h(w - alpha grad h(w) / ||grad h(w)||))                                            (1)
    g     = grad f(w) + lambda (grad h(w) - grad h(w'))        w' = w - alpha grad h(w) / ||grad h(w)||              (2)

f is the loss on the rows trained on (refusals, harmless rows), h the loss on harmful rows (restricted prompts with
compliant answers), both cross-entropy on answers. (2) leaves out how w' depends on w: three gradients a step, two of
them on the same harmful rows. Norms are over all trained weights as one vector.
Source: Huang et al., arXiv 2409.01586 (Booster), equations 1 and 3 and algorithm 1, from memory of the paper.
Differs: one draw of harmful rows for each optimiser step, whatever the accumulation; lambda = 0 runs no harmful pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from casehard.data.batches import Batch, EncodedSet
from casehard.distributed.ranks import require_one_process
from casehard.errors import DataError, Unsupported
from casehard.limits import BatchSize, Large, Limited, Weight
from casehard.maths.bilevel import perturbed_view, with_view
from casehard.maths.tensors import norm
from casehard.train.passes import rows_of_rank, unwrapped
from casehard.train.protocol import Setup, Step


@dataclass(frozen=True, kw_only=True)
class BoosterConfig(Limited):
    """Settings of Booster."""

    weight: Weight = 1.0
    """lambda of (1); 0 is plain SFT bit for bit. Source: tries on the organism; 5 in the paper, from memory."""
    alpha: Large = 0.1
    """Length of the simulated step over all trained weights. Source: Booster, from memory."""
    batch_size: BatchSize = 10
    """Harmful rows a step. Source: Booster, from memory."""


PRESETS: dict[str, BoosterConfig] = {"paper": BoosterConfig(weight=5.0, alpha=0.1, batch_size=10)}


class Booster:
    """Booster as a method, for all weights or for LoRA.

    Args:
        config: settings, see :class:`BoosterConfig`.
        unsafe: harmful rows (restricted prompt, compliant answer).

    Raises:
        DataError: no harmful rows.
    """

    name = "booster"

    def __init__(self, config: BoosterConfig | None = None, *, unsafe: EncodedSet) -> None:
        self.config = config or BoosterConfig()
        if len(unsafe) == 0:
            raise DataError("booster: no unsafe rows", hint="--unsafe simulated.jsonl")
        self.unsafe = unsafe

    def prepare(self, setup: Setup) -> None:
        """Check the model.

        Raises:
            Unsupported: several processes, whose gradients are not averaged where (2) needs them; or trained weights
                in half precision, in which w' would be w.
        """
        require_one_process("booster")
        for name, p in setup.model.named_parameters():
            if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16):
                raise Unsupported(
                    f"trained parameter {name!r} is stored in {p.dtype}: a short step would vanish in rounding",
                    hint="load the model in float32 and let autocast compute in bfloat16 (precision='bf16')",
                )
        self._seed = setup.seed

    def backward(self, model: nn.Module, batch: Batch, step: Step) -> torch.Tensor:
        """Accumulate grad f; with the last micro-batch, add the rest of (2)."""
        loss = step.loss(model, batch)
        step.backward(loss)
        if step.last and self.config.weight > 0:
            self._add_harmful(unwrapped(model), step, batch["input_ids"].device)
        return loss.detach()

    def _add_harmful(self, model: nn.Module, step: Step, device: torch.device) -> None:
        """Add lambda (grad h(w) - grad h(w')) to the gradients."""
        size = self.config.batch_size
        rows = rows_of_rank(self.unsafe, size, seed=self._seed, step=step.index, purpose="booster", device=device)
        named = dict(model.named_parameters())
        trained = {name: p for name, p in named.items() if p.requires_grad}
        own = {name: p.grad for name, p in trained.items()}
        for p in trained.values():
            p.grad = None
        before = step.loss(model, rows) * step.micros
        step.backward(before)
        slope = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trained.items()}
        for name, p in trained.items():  # the user's part of (2), and lambda grad h(w)
            kept = own[name]
            p.grad = (
                self.config.weight * slope[name] if kept is None else kept.add_(slope[name], alpha=self.config.weight)
            )
        length = norm(slope.values())
        shift = {name: (-self.config.alpha / length if length > 0 else 0.0) * g for name, g in slope.items()}
        view = {**named, **perturbed_view(trained, shift)}

        def ahead(inner: nn.Module) -> torch.Tensor:
            after = step.loss(inner, rows) * step.micros
            step.backward(-self.config.weight * after)  # handed to the weights' own gradients
            return after.detach()

        after = with_view(model, view, ahead)
        step.log(
            {
                "tokens": 2 * int(rows["attention_mask"].sum()),
                "harmful_loss": float(before.detach()),
                "harmful_drop": float(before.detach() - after),
            }
        )
