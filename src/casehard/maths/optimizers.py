"""What an optimiser's state says: the metric it steps in, and the step it has just taken.

Adam, AdamW (fused, foreach or plain) and SGD of torch are read; nothing of their state is changed.

    v_hat = v / (1 - beta2^t)            M = diag(1 / max(sqrt(v_hat) + eps, floor * rms(sqrt(v_hat))))       (1)
    u = -lr (m_hat / (sqrt(v_hat) + eps) + decay * theta)                                                     (2)

(1) is the metric one RMSprop step would use. M is 0 where v is 0: a coordinate the optimiser has never moved (an
embedding row no user row contains) needs no repair, and 1/eps = 1e8 would put the whole correction there. The floor
bounds M for coordinates that have hardly moved; rms is over all trainable coordinates with v > 0.
(2) is recomputed from m and v, so no copy of the parameters is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from casehard.errors import Unsupported
from casehard.maths.tensors import whole, wide

FLOOR = 0.1
"""Smallest denominator of (1) in units of the root mean square one: M may exceed its typical value 1 / FLOOR times."""


def learning_rate(optimizer: Any) -> float:
    """Return the largest learning rate of the parameter groups, as of the step just taken."""
    return max(float(group["lr"]) for group in optimizer.param_groups)


def _bias(beta: float, step: torch.Tensor | float) -> torch.Tensor | float:
    """Return 1 - beta^t; a count kept on the device (fused Adam) stays there."""
    return 1.0 - beta ** (step.double() if isinstance(step, torch.Tensor) else step)


class OptimizerView:
    """Read-only view of an optimiser for the given trainable parameters.

    Args:
        optimizer: a torch optimiser, or a wrapper that passes ``state`` and ``param_groups`` on.
        parameters: the trainable parameters, in the order all indices below refer to.
        gradients: the gradients the step used, needed for (2) with SGD without momentum; may hold None.
    """

    def __init__(
        self,
        optimizer: Any,
        parameters: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor | None] | None = None,
        *,
        floor: float = FLOOR,
    ) -> None:
        self._parameters = parameters
        self._gradients = gradients
        self._state = optimizer.state
        self._group = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        states = [self._of(i) for i in range(len(parameters))]
        self.adaptive = any("exp_avg_sq" in s for s in states)
        self._least = floor * self._typical() if self.adaptive else 0.0

    def _of(self, i: int) -> dict[str, Any]:
        # Not by index: ``state`` is a defaultdict, and looking a parameter up must not add it.
        state: dict[str, Any] = self._state.get(self._parameters[i], {})
        return state

    def _second(self, i: int) -> torch.Tensor | None:
        """Return v_hat of tensor i, or None when the optimiser never stepped it."""
        state, group = self._of(i), self._group.get(id(self._parameters[i]))
        if group is None or "exp_avg_sq" not in state:
            return None
        v = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
        return wide(v) / _bias(group["betas"][1], state["step"])

    def _typical(self) -> float:
        total: torch.Tensor | None = None
        for i in range(len(self._parameters)):
            if (v := self._second(i)) is not None:
                part = torch.stack([whole(v.sum(dtype=torch.float64)), whole((v > 0).sum(dtype=torch.float64))])
                total = part if total is None else total + part
        if total is None or float(total[1]) == 0:
            return 0.0
        return math.sqrt(float(total[0]) / float(total[1]))

    def metric(self, i: int, gradient: torch.Tensor) -> torch.Tensor:
        """Return M g of (1) for tensor i; zero where the optimiser has never moved."""
        v = self._second(i)
        if v is None:
            return torch.zeros_like(gradient)
        eps = float(self._group[id(self._parameters[i])]["eps"])
        moved = v > 0
        size = v.sqrt_().add_(eps).clamp_(min=self._least)
        return (gradient / size).mul_(moved).to(gradient.dtype)

    @property
    def is_sgd(self) -> bool:
        """Whether this is torch's SGD, with or without momentum."""
        return all("nesterov" in group for group in self._group.values())

    @property
    def knows_step(self) -> bool:
        """Whether (2) can be recomputed for every parameter."""
        if self.adaptive:
            return True
        still = all(not group.get("momentum") for group in self._group.values())
        return self.is_sgd and still and self._gradients is not None

    def last_step(self, i: int) -> torch.Tensor:
        """Return u of (2), the update tensor i has just received; zero for one that received none.

        Raises:
            Unsupported: the optimiser is neither Adam(W) nor SGD without momentum.
        """
        p = self._parameters[i].detach()
        group, state = self._group.get(id(self._parameters[i])), self._of(i)
        if group is None:
            return torch.zeros_like(p)
        lr, decay = float(group["lr"]), float(group["weight_decay"])
        if not self.adaptive:
            if not self.knows_step:
                raise Unsupported(
                    "the last update can be recomputed for Adam, AdamW and SGD without momentum only",
                    hint="use adamw, or leave rho unset",
                )
            assert self._gradients is not None
            g = self._gradients[i]
            # With L2 decay the old weights are those from which p came: p = old - lr (g + decay old).
            return torch.zeros_like(p) if g is None else -lr * (g + decay * (p + lr * g) / (1.0 - lr * decay))
        v = self._second(i)
        if v is None:
            return torch.zeros_like(p)
        m = wide(state["exp_avg"]) / _bias(group["betas"][0], state["step"])
        u = m.div_(v.sqrt_().add_(float(group["eps"]))).mul_(-lr)
        if group.get("decoupled_weight_decay") and decay:
            u.sub_((wide(p) - u) / (1.0 - lr * decay), alpha=lr * decay)
        return u
