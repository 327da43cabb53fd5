"""TAR, tampering attack resistance: what a simulated attack gains is taken back at several points of its way.

    theta_k = attack of k steps on the unsafe rows, from theta                             maths.bilevel.simulate_attack
    g_TR    = mean over the points k of grad L_TR(theta_k; x_TR)        x_TR: other unsafe rows, one draw a step     (1)
    L_R     = L_s(theta) + w_r mean ||h_theta(x_r) - h_start(x_r)||^2   x_r: harmless rows, one draw a step          (2)
    g       = lambda_TR g_TR + lambda_R grad L_R(theta)                                                              (3)

    L_TR = - entropy of the next token on answers of x_TR   ("entropy", the paper's for dangerous knowledge)
           - cross-entropy on them                          ("loss", which the paper argues against)

L_s is the loss on the rows trained on (refusals, harmless rows), h the hidden states behind every layer; the mean in
(2) is over layers and tokens. The attack's Jacobian is taken as the identity. One attacker is drawn for each step.
Source: Tamirisa et al., arXiv 2408.00761 (TAR), algorithm 1, from memory of the paper.
Differs: no random remapping beforehand and no preference loss (their objective for refusals); the rows trained on take
the place of their retain set in L_s, so that alignment and resistance are trained together. It shares Patcher's
simulated attack; Patcher, beside it, attacks once in many steps and looks at the last point alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from casehard.data.batches import IGNORE, Batch, EncodedSet
from casehard.defences.updates import from_state, to_state
from casehard.distributed.ranks import require_one_process
from casehard.errors import ConfigError, DataError
from casehard.limits import BatchSize, Count, Limited, Weight
from casehard.maths.bilevel import Attacker, Params, in_place_of, parameters, simulate_attack, with_view
from casehard.seeds import derive, generator
from casehard.train.passes import quiet, rows_of_rank, unwrapped
from casehard.train.protocol import Setup, StateValue, Step


@dataclass(frozen=True, kw_only=True)
class TarConfig(Limited):
    """Settings of TAR; ``paper`` among the presets has the published ones."""

    attackers: tuple[Attacker, ...] = (Attacker(steps=8, lr=4e-4, batch_size=16),)
    """Simulated attackers, one drawn for each step. Ours, at the size of the organism."""
    every: Count = 4
    """Attack steps between the points of (1); the last step is always one."""
    objective: Literal["entropy", "loss"] = "entropy"
    """L_TR. Source: TAR."""
    tamper_weight: Weight = 1.0
    """lambda_TR of (3); 0 runs no attack. Source: tries on the organism; 4 in the paper, from memory."""
    tamper_batch_size: BatchSize = 16
    """Rows x_TR."""
    retain_weight: Weight = 1.0
    """lambda_R of (3). Source: TAR, from memory."""
    representation: Weight = 0.02
    """w_r of (2); 0 leaves the hidden states free. Source: tries on the organism; 1 in the paper, from memory."""
    retain_batch_size: BatchSize = 16
    """Rows x_r."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.attackers or any(a.steps == 0 for a in self.attackers):
            raise ConfigError("attackers: at least one is needed, of at least one step", hint="attackers: [{steps: 8}]")
        if any(a.steps is None for a in self.attackers):
            raise ConfigError("attackers: an attack has no steps", hint="attackers: [{steps: 8, lr: 4e-4}]")


PRESETS: dict[str, TarConfig] = {
    "paper": TarConfig(
        attackers=tuple(Attacker(steps=64, lr=lr, batch_size=8) for lr in (2e-6, 2e-5, 4e-5)),
        every=4,
        tamper_weight=4.0,
        representation=1.0,
        tamper_batch_size=8,
        retain_batch_size=8,
    )
}


class Tar:
    """TAR as a method, for all weights (its attack changes all of them).

    Args:
        config: settings, see :class:`TarConfig`.
        unsafe: harmful rows (restricted prompt, compliant answer), attacked with and measured on.
        retain: harmless rows, on which hidden states are to stay what they were.

    Raises:
        DataError: no harmful rows, or no harmless ones while ``representation`` is above 0.
    """

    name = "tar"

    def __init__(
        self, config: TarConfig | None = None, *, unsafe: EncodedSet, retain: EncodedSet | None = None
    ) -> None:
        self.config = config or TarConfig()
        if len(unsafe) == 0:
            raise DataError("tar: no unsafe rows", hint="--unsafe simulated.jsonl")
        if self.config.representation > 0 and not retain:
            raise DataError("tar: representation needs harmless rows", hint="--retain rows.jsonl")
        if self.config.representation == 0 and retain:
            raise DataError(f"tar: {len(retain)} retain rows would be ignored", hint="--set settings.representation=1")
        self.unsafe, self.retain = unsafe, retain
        self._start: Params = {}

    def prepare(self, setup: Setup) -> None:
        """Keep the weights whose hidden states are retained.

        Raises:
            Unsupported: several processes, half-precision weights, or frozen ones (LoRA), for the attack changes all.
        """
        require_one_process("tar")
        theta = parameters(setup.model)
        self._seed = setup.seed
        self._attackers = tuple(a.within(steps=None, lr=setup.lr) for a in self.config.attackers)
        keep = self.config.representation > 0
        self._start = {name: p.detach().clone() for name, p in theta.items()} if keep else {}

    def backward(self, model: nn.Module, batch: Batch, step: Step) -> torch.Tensor:
        """Accumulate lambda_R grad L_s; with the last micro-batch, the rest of (3). Return the loss L_s."""
        config = self.config
        loss = step.loss(model, batch)
        step.backward(loss if config.retain_weight == 1.0 else loss * config.retain_weight)
        if step.last:
            inner, device = unwrapped(model), batch["input_ids"].device
            if config.tamper_weight > 0:
                self._resist(inner, step, device)
            if config.representation > 0 and config.retain_weight > 0:
                assert self.retain is not None
                size, seed = config.retain_batch_size, self._seed
                rows = rows_of_rank(self.retain, size, seed=seed, step=step.index, purpose="tar-retain", device=device)
                moved = representation_distance(inner, self._start, rows)
                step.backward(moved * (config.retain_weight * config.representation))
                step.log({"moved": float(moved.detach()), "tokens": int(rows["attention_mask"].sum())})
        return loss.detach()

    def _resist(self, model: nn.Module, step: Step, device: torch.device) -> None:
        """Attack from theta and add lambda_TR g_TR (1) on the way."""
        seed = derive(self._seed, step.index, "tar")
        chosen = int(torch.randint(len(self._attackers), (), generator=generator(seed, 0, "attacker")))
        attacker = self._attackers[chosen]
        steps = max(1, attacker.length(seed))
        at = points(steps, self.config.every)
        rows = rows_of_rank(
            self.unsafe,
            self.config.tamper_batch_size,
            seed=self._seed,
            step=step.index,
            purpose="tar-resist",
            device=device,
        )
        theta, gains = parameters(model), []

        def resist(inner: nn.Module) -> torch.Tensor:
            loss = tamper_loss(inner, rows, self.config.objective)
            step.backward(loss * (self.config.tamper_weight / len(at)))
            return loss.detach()

        def visit(i: int, attacked: Params) -> None:
            if i + 1 in at:
                view = {name: in_place_of(theta[name], value) for name, value in attacked.items()}
                gains.append(with_view(model, view, resist))

        batch_at = self.unsafe.stream(attacker.batch_size, seed=seed, purpose="tar-attack")
        run = simulate_attack(model, theta, batch_at, attacker, seed=seed, steps=steps, visit=visit)
        tokens = run.tokens + len(at) * int(rows["attention_mask"].sum())
        step.log(
            {
                "passes": steps,
                "tokens": tokens,
                "tamper_loss": float(torch.stack(gains).mean()),
                "attack_loss": run.losses[-1],
            }
        )

    def state(self) -> dict[str, StateValue]:
        """Return the starting weights."""
        return to_state(self._start)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` returned."""
        self._start = from_state(self._start, state)


def points(steps: int, every: int) -> set[int]:
    """Return the attack steps, counted from 1, after which (1) looks. Example: 10 steps, every 4 -> {4, 8, 10}."""
    return {*range(every, steps + 1, every), steps}


def tamper_loss(model: nn.Module, batch: Batch, objective: Literal["entropy", "loss"]) -> torch.Tensor:
    """Return L_TR in nats a token, averaged over the trained tokens of ``batch`` (B, T); lower is more resistant."""
    if objective == "loss":
        loss: torch.Tensor = model(**batch).loss
        return -loss
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    log_p = model(**inputs).logits.float()[:, :-1].log_softmax(-1)
    keep = batch["labels"][:, 1:] != IGNORE
    return ((log_p.exp() * log_p).sum(-1) * keep).sum() / keep.sum().clamp(min=1)


def representation_distance(model: nn.Module, start: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
    """Return the second term of (2) without its weight: squared distance, mean over layers and real tokens of (B, T).

    Both sides run without dropout.
    """
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}

    def states(net: nn.Module) -> tuple[torch.Tensor, ...]:
        found: tuple[torch.Tensor, ...] = net(**inputs, output_hidden_states=True).hidden_states
        return found[1:]

    with quiet(model):
        with torch.no_grad():
            before = with_view(model, start, states)
        now = states(model)
    real = batch["attention_mask"].bool()
    apart = [(a.float() - b.float()).square().sum(-1)[real].mean() for a, b in zip(now, before, strict=True)]
    return torch.stack(apart).mean()
