"""Perturbed views of a model and simulated fine-tuning attacks, without ever writing to the model's weights.

Symbols (Patcher, arXiv 2606.07970): theta the weights, A_k(theta) the weights after k attack steps, delta the attack
vector A_k(theta_source) - theta_reference, alpha the share of the attacked loss.

A *view* is a dict of substitute parameters installed for the duration of one call. The tensors theta + delta are
composed from the fp32 masters and hand their gradients to them, so a backward through the view adds to ``theta.grad``
and restoring is exact by construction: there is nothing to restore, also when the call raises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

import torch
from torch import nn

from casehard.errors import ConfigError, Diverged, Unsupported
from casehard.limits import BatchSize, Large, Limited, Natural, Within
from casehard.maths.tensors import norm, same_keys
from casehard.seeds import generator

R = TypeVar("R")
Batch = Mapping[str, torch.Tensor]
Params = dict[str, torch.Tensor]


class _Call(nn.Module):
    """Turn "run this function on the model" into a module call, so that a backward can run inside the view."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self) -> Any:
        return self.function(self.model)


def parameters(model: nn.Module) -> Params:
    """Return the model's parameters by name, tied ones once.

    Raises:
        Unsupported: a parameter is stored in half precision (updates of size lr would be lost in rounding), or frozen.
    """
    found: Params = dict(model.named_parameters())
    for name, p in found.items():
        if p.dtype in (torch.bfloat16, torch.float16):
            raise Unsupported(
                f"parameter {name!r} is stored in {p.dtype}: small updates vanish in rounding",
                hint="load the model in float32 and let autocast compute in bfloat16 (precision='bf16')",
            )
        if not p.requires_grad:
            raise Unsupported(
                f"parameter {name!r} is frozen: the simulated attack is full-parameter",
                hint="pass the plain model, not a PEFT model or one with frozen layers",
            )
    return found


def linear_only(model: nn.Module) -> set[str]:
    """Return the names of parameters used by ``nn.Linear`` modules alone.

    These are what autocast would cast to its compute dtype anyway, so a view may hold them in that dtype at no change
    in numbers and half the memory. A weight tied to an embedding is not among them.
    """
    users: dict[int, set[bool]] = {}
    names = {id(p): name for name, p in model.named_parameters()}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            users.setdefault(id(p), set()).add(isinstance(module, nn.Linear))
    return {names[key] for key, kinds in users.items() if kinds == {True}}


def with_view(model: nn.Module, view: Mapping[str, torch.Tensor], function: Callable[[nn.Module], R]) -> R:
    """Run ``function(model)`` while ``view`` replaces the parameters of the same names; tied weights follow.

    The function may run forward *and* backward: gradient checkpointing then recomputes with the same view.

    Raises:
        Unsupported: a name of the view is not a parameter of the model, or one is missing.
    """
    odd = same_keys(view, dict(model.named_parameters()))
    if odd:
        raise Unsupported(f"view and model disagree on {len(odd)} parameters, first {odd[0]!r}")
    substituted = {f"model.{name}": value for name, value in view.items()}
    return torch.func.functional_call(_Call(model, function), substituted, ())


def perturbed_view(
    params: Mapping[str, torch.Tensor],
    delta: Mapping[str, torch.Tensor],
    *,
    compute_dtype: torch.dtype | None = None,
    castable: set[str] | None = None,
) -> Params:
    """Compose theta + delta from the master weights (eq. 2 of docs/methods/patcher.md), which stay as they are.

    Gradients are handed to the masters as soon as each is complete. Were theta + delta a part of the graph, autograd,
    which runs the youngest nodes first, would hold all of them until the backward pass ends: 4 bytes a parameter.

    Args:
        params: master weights theta, fp32.
        delta: attack vector of the same names and shapes, any float dtype; no gradient flows to it.
        compute_dtype: autocast's dtype, if the loop computes in one.
        castable: names to hold in ``compute_dtype`` (see :func:`linear_only`).

    Returns:
        Substitute parameters for :func:`with_view`; a backward pass accumulates into ``params[name].grad``.
    """
    odd = same_keys(params, delta)
    if odd:
        raise Unsupported(f"attack vector and model disagree on {len(odd)} parameters, first {odd[0]!r}")
    out: Params = {}
    for name, p in params.items():
        shifted = p.detach() + delta[name].detach()
        if compute_dtype is not None and castable is not None and name in castable:
            shifted = shifted.to(compute_dtype)
        out[name] = in_place_of(p, shifted)
    return out


def in_place_of(master: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return ``value`` (of the master's shape) as a parameter of a view, whose gradient goes to ``master.grad``."""
    substitute = value.detach().requires_grad_()
    substitute.register_post_accumulate_grad_hook(_handing_on(master))
    return substitute


def _handing_on(master: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def hand_on(view: torch.Tensor) -> None:
        assert view.grad is not None
        gradient, view.grad = view.grad.to(master.dtype), None
        # A caller's own hooks (a mask of frozen rows, say) see every gradient of the master, as autograd would show it.
        for hook in tuple((getattr(master, "_backward_hooks", None) or {}).values()):
            changed = hook(gradient)
            gradient = gradient if changed is None else changed
        if master.grad is None:
            master.grad = gradient
        else:
            master.grad.add_(gradient)
        for hook in tuple((getattr(master, "_post_accumulate_grad_hooks", None) or {}).values()):
            hook(master)

    return hand_on


def difference(attacked: Params, reference: Mapping[str, torch.Tensor], *, dtype: torch.dtype) -> Params:
    """Return delta = attacked - reference, subtracted in the master dtype and cast last.

    Consumes ``attacked`` entry by entry, so that at no time both full copies and the whole delta are alive.
    """
    odd = same_keys(attacked, reference)
    if odd:
        raise Unsupported(f"attacked and reference weights disagree on {len(odd)} parameters, first {odd[0]!r}")
    out: Params = {}
    for name in list(attacked):
        out[name] = (attacked.pop(name).detach() - reference[name].detach()).to(dtype)
    return out


@dataclass(frozen=True, kw_only=True)
class Attacker(Limited):
    """How an attack is simulated. What is None hangs on the training it is part of, see :meth:`within`."""

    steps: Natural | None = None
    """k1, optimiser steps of one attack; None: drawn from 0 to five of Patcher's rounds. The paper: 300."""
    steps_min: Natural | None = None
    """If given, each attack draws its length uniformly from steps_min..steps: half the cost, a spread of strengths."""
    lr: Large | None = None
    """Constant learning rate, no warm-up; None: that of the training. The paper has both at 1e-5."""
    batch_size: BatchSize = 4
    """Rows per attack step (the paper's text; its sequential script uses 2)."""
    optimizer: str = "adamw"
    """adamw | adam | sgd. Source: Patcher (torch AdamW, default betas)."""
    weight_decay: Large = 0.01
    """Weight decay, decoupled for adamw, an L2 term for adam and sgd (torch's default, never set in the paper)."""
    clip: Large = 1.0
    """Global gradient-norm clip; 0 switches it off."""
    lora_rank: Annotated[int, Within(0, 2**16)] = 0
    """0 = full-parameter (the paper); r > 0 = a LoRA attack of that rank on every linear layer, alpha = 2 r."""

    def length(self, seed: int) -> int:
        """Return the steps of the attack with this seed."""
        steps, _ = self.numbers()
        if self.steps_min is None:
            return steps
        return self.steps_min + int(
            torch.randint(steps - self.steps_min + 1, (), generator=generator(seed, 0, "length"))
        )

    def within(self, *, steps: int | None, lr: float | None) -> Attacker:
        """Return the attacker with the training's ``lr`` and 0..``steps`` steps, where it has none of its own."""
        lr = lr if self.lr is None else self.lr
        if self.steps is not None or steps is None:
            return replace(self, lr=lr)
        return replace(self, lr=lr, steps=steps, steps_min=self.steps_min or 0)

    def numbers(self) -> tuple[int, float]:
        """Return steps and learning rate.

        Raises:
            ConfigError: one of them hangs on a training, and nobody said which.
        """
        if self.steps is None or self.lr is None:
            raise ConfigError(
                f"attacker: steps {self.steps}, lr {self.lr}: both are needed",
                hint="attackers: [{steps: 300, lr: 1e-5}], or Patcher.settle(steps, lr) with those of the training",
            )
        return self.steps, self.lr

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer not in OPTIMISERS:
            raise ConfigError(f"attacker.optimizer: {self.optimizer!r} is unknown", hint=f"one of {sorted(OPTIMISERS)}")
        if self.steps_min is not None and not 0 <= self.steps_min <= (math.inf if self.steps is None else self.steps):
            raise ConfigError(f"attacker.steps_min: {self.steps_min} is not within 0..steps ({self.steps})")


OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}


@dataclass(frozen=True)
class AttackRun:
    """Attacked weights of one simulated attack and how it went."""

    weights: Params
    losses: list[float]
    """Loss of each attack step, in nats a token."""
    tokens: int
    """Input tokens the attack saw, padding excluded where the batches carry a mask."""


def _lora_view(source: Mapping[str, torch.Tensor], factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Params:
    # alpha = 2 r, so the delta is (alpha / r) B A = 2 B A.
    return {
        name: p.detach() + 2.0 * (factors[name][1] @ factors[name][0]) if name in factors else p.detach()
        for name, p in source.items()
    }


def _leaves(
    model: nn.Module, source: Mapping[str, torch.Tensor], rank: int
) -> tuple[list[torch.Tensor], Callable[[], Params]]:
    """Return the attack's own trainable tensors and a function composing the view from them."""
    if rank == 0:
        copies = {name: p.detach().clone().requires_grad_() for name, p in source.items()}
        return list(copies.values()), lambda: copies
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name in sorted(linear_only(model)):
        p = source[name]
        if p.dim() == 2:
            down = torch.empty(rank, p.shape[1], dtype=p.dtype)
            nn.init.kaiming_uniform_(down, a=5**0.5)
            up = torch.zeros(p.shape[0], rank, dtype=p.dtype)
            factors[name] = (down.to(p.device).requires_grad_(), up.to(p.device).requires_grad_())
    if not factors:
        raise Unsupported(
            f"lora_rank {rank}: the model has no linear layer of its own to adapt (GPT-2's are transposed, Conv1D)",
            hint="lora_rank: 0 simulates full-parameter attacks",
        )
    return [t for pair in factors.values() for t in pair], lambda: _lora_view(source, factors)


@contextmanager
def forked_rng(seed: int, device: torch.device) -> Iterator[None]:
    """Run a block on its own random stream and leave the global one untouched."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def simulate_attack(
    model: nn.Module,
    source: Mapping[str, torch.Tensor],
    batch_at: Callable[[int], Batch],
    attacker: Attacker,
    *,
    seed: int,
    steps: int | None = None,
    progress: Callable[[int], None] = lambda i: None,
    visit: Callable[[int, Params], None] | None = None,
) -> AttackRun:
    """Fine-tune a copy of ``source`` for k1 steps and return it; the model's own weights are never written.

    Args:
        model: the architecture; it runs in whatever mode (train) and autocast it is in.
        source: theta_source, fp32, by parameter name.
        batch_at: attack batch number i, tokens and labels, shapes (B, T).
        seed: seeds dropout and adapter initialisation; the global random stream is untouched.
        steps: overrides ``attacker.steps``.
        visit: called after step i with the attacked weights of that moment, which the next step overwrites.

    Raises:
        Diverged: a loss or gradient norm of the attack is not finite.
    """
    device, (k1, lr) = next(iter(source.values())).device, attacker.numbers()
    with forked_rng(seed, device):
        leaves, view = _leaves(model, source, attacker.lora_rank)
        options: dict[str, Any] = {"lr": lr, "weight_decay": attacker.weight_decay}
        optimiser = OPTIMISERS[attacker.optimizer](leaves, fused=True, **options)

        def one(inner: nn.Module, batch: Batch) -> torch.Tensor:
            loss = inner(**batch).loss
            loss.backward()
            return loss.detach()

        losses, norms, tokens = [], [], 0
        for i in range(k1 if steps is None else steps):
            batch = batch_at(i)
            tokens += int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum())
            batch = {key: value.to(device) for key, value in batch.items()}
            losses.append(with_view(model, view(), lambda inner, b=batch: one(inner, b)))  # type: ignore[misc]
            limit = attacker.clip if attacker.clip > 0 else float("inf")
            norms.append(nn.utils.clip_grad_norm_(leaves, limit))
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            progress(i)
            if visit is not None:
                visit(i, view())
        if losses and not bool(torch.isfinite(torch.stack([*losses, *norms])).all()):
            raise Diverged(
                f"the simulated attack diverged: losses {[round(float(x), 3) for x in losses[-3:]]}",
                hint=f"lower attacker.lr (now {attacker.lr}) or attacker.steps",
            )
        weights = {name: value.detach() for name, value in view().items()}
    return AttackRun(weights, [float(x) for x in losses], tokens)


@dataclass(frozen=True)
class AttackVector:
    """delta = A_k1(theta_source) - theta_reference, with where it came from."""

    delta: Params
    source_step: int
    """Outer step at which the attack started."""
    attack_steps: int
    norm: float
    """L2 norm of delta over all parameters."""

    @classmethod
    def of(cls, delta: Params, *, source_step: int, attack_steps: int) -> AttackVector:
        """Build the vector and measure its norm."""
        return cls(delta, source_step, attack_steps, norm(delta.values()))


def logits_under(
    model: nn.Module,
    start: Mapping[str, torch.Tensor],
    inputs: Mapping[str, torch.Tensor],
    *,
    under: Callable[..., Any] = with_view,
) -> torch.Tensor:
    """Return the logits (B, T-1, V) of all but the last position under other weights, without dropout or gradient.

    Arguments as of :func:`retain_kl`; ``inputs`` hold no labels.
    """
    dropping = [module for module in model.modules() if module.training]
    try:
        model.eval()  # a target with dropout would be noise
        with torch.no_grad():
            out: torch.Tensor = under(model, start, lambda m: m(**inputs).logits)
            return out.float()[:, :-1]
    finally:
        for module in dropping:
            module.training = True


def retain_kl(
    model: nn.Module,
    start: Mapping[str, torch.Tensor],
    batch: Batch,
    *,
    under: Callable[..., Any] = with_view,
) -> torch.Tensor:
    """Return KL(start || model) in nats a token, averaged over the trained tokens of ``batch`` (B, T).

    Args:
        start: the weights whose behaviour is to be kept, by name; they run without gradient.
        under: ``under(model, start, function)`` calls ``function(model)`` with those weights in place.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    target = logits_under(model, start, inputs, under=under)
    logits = model(**inputs).logits.float()[:, :-1]
    keep = batch["labels"][:, 1:] != -100
    rows = nn.functional.kl_div(logits.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="none").sum(
        -1
    )
    return (rows * keep).sum() / keep.sum().clamp(min=1)
