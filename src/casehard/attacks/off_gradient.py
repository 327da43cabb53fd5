"""A step to the side: training whose updates have no part along the attack that the defender simulated.

    attack vector   delta = A_k(theta_0) - theta_0, k steps of fine-tuning on the harmful rows                       (1)
    each update     theta <- theta - <theta - theta_0, delta> / <delta, delta> delta                                 (2)

A defence that shifts weights by simulated attack vectors (Patcher, arXiv 2606.07970, eq. 3) hardens the model along
them. The attacker simulates that attack on rows like the defender's, and projects every update onto what is orthogonal
to its vector: after (2) the weights differ from theta_0 in other directions only. In mode lora both live in the
factors of one adapter. An attacker who knows the defence, as docs/evaluation.md asks for; no paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from casehard.attacks.finetune import MixtureSettings
from casehard.attacks.protocol import AttackInputs
from casehard.attacks.training import Phase, Tuning
from casehard.errors import ConfigError, DataError
from casehard.limits import Count, LearningRate
from casehard.maths.bilevel import Params
from casehard.maths.tensors import dot, norm
from casehard.model.model import Model
from casehard.train.protocol import Setup, Step
from casehard.train.recipe import TrainConfig
from casehard.train.tune import Rows, Tuned, chat_format, tune


@dataclass(frozen=True, kw_only=True)
class OffGradientAttack(MixtureSettings):
    """Settings of an attack that steps aside of a simulated one."""

    simulated_steps: Count = 10
    """k of (1), steps of the defender's attack as the attacker simulates it."""
    simulated_lr: LearningRate = 1e-4
    """Its learning rate, constant and without warm-up."""


def trainable(net: nn.Module) -> Params:
    """Return the parameters that are trained, by name."""
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def attack_vector(model: Model, inputs: AttackInputs, config: OffGradientAttack) -> tuple[Params, Tuned]:
    """Return (1) over the parameters that the attack trains, and the simulated training.

    Args:
        inputs: its rows of role ``harmful`` are trained on, all of them.

    Raises:
        DataError: there are none, or the simulated attack moved nothing.
    """
    rows = inputs.rows.get("harmful", ())
    if not rows:
        raise DataError("there are no harmful rows to simulate the defender's attack on", hint="--harmful FILE")
    chat = chat_format(model, system=inputs.system, max_length=inputs.max_length)
    train = TrainConfig(
        steps=config.simulated_steps,
        batch_size=config.batch_size,
        lr=config.simulated_lr,
        schedule="constant",
        warmup=0,
        precision=config.precision,
        embeddings=config.embeddings,
    )
    before: Params = {}

    def keep(net: nn.Module, step: int) -> Rows:
        before.update({name: p.detach().clone() for name, p in trainable(net).items()})
        return []

    # The seed and purpose of the attack itself: in mode lora both must start from one adapter.
    done = tune(
        model,
        chat.encode_all(rows),
        train=train,
        seed=inputs.seed,
        purpose="attack",
        lora=config.lora,
        measure=keep,
        at=(0,),
        label=f"{inputs.label}: simulated attack",
    )
    delta = {name: p.detach() - before.pop(name) for name, p in trainable(done.net).items()}
    if norm(delta.values()) == 0:
        raise DataError("the simulated attack moved nothing", hint="--set config.simulated_lr=1e-4, above 0")
    return delta, done


class Sideways:
    """(2) after every update, as a seam of the training loop.

    Args:
        delta: attack vector, by the names of the trained parameters.
    """

    name = "off_gradient"
    config = None

    def __init__(self, delta: Params) -> None:
        self.vector = delta

    def prepare(self, setup: Setup) -> None:
        """Remember where the training starts; what it holds still (embeddings, say) has no part in (2)."""
        found = trainable(setup.model)
        self.parameters, self.delta = list(found.values()), [self.vector[name] for name in found]
        self.square = dot(self.delta, self.delta)
        self.start = [p.detach().clone() for p in self.parameters]

    def after_step(self, model: nn.Module, optimizer: Any, step: Step) -> None:
        """Take out what the update moved along the attack vector; log it as a share of the whole distance."""
        with torch.no_grad():
            moved = [p.detach() - s for p, s in zip(self.parameters, self.start, strict=True)]
            along = dot(moved, self.delta) / self.square
            torch._foreach_add_([p.data for p in self.parameters], self.delta, alpha=-along)
        distance = norm(moved)
        step.log({"removed": abs(along) * self.square**0.5 / distance if distance else 0.0})


class OffGradient(Tuning[OffGradientAttack]):
    """Fine-tune a copy orthogonally to the attack that the defender simulated."""

    name = "off_gradient"

    def phases(self, model: Model, inputs: AttackInputs) -> Sequence[Phase]:
        """Return the mixture of ``finetune``.

        Raises:
            DataError: too few rows for the share asked for.
        """
        return [Phase(self.config.mixed(inputs.rows, seed=inputs.seed), self.config.recipe)]

    def train(self, model: Model, phases: Sequence[Phase], inputs: AttackInputs) -> Tuned:
        """Simulate the defender's attack, then train aside of it; the cost is that of both.

        Raises:
            ConfigError: a method inside the training, whose place the projection takes.
        """
        if inputs.method is not None:
            raise ConfigError(
                f"method {inputs.method.name!r} inside off_gradient", hint="attack a model that is hardened already"
            )
        delta, simulated = attack_vector(model, inputs, self.config)
        done = super().train(model, phases, replace(inputs, method=Sideways(delta)))
        return replace(done, budget=simulated.budget + done.budget)

    def facts(self, phases: Sequence[Phase]) -> dict[str, Any]:
        """Return how many rows of each kind were drawn."""
        return self.config.facts()
