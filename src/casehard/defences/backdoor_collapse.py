"""Backdoor collapse: plant known backdoors so that unknown ones gather with them, then unlearn the known ones.

    h(x)   hidden state of the last layer at the last prompt token,  u = h / |h|
    A      = 1 - | mean over the rows of a batch of u(x_d) |        0 when all triggered prompts look alike       (1)
    L_1    = CE(x, y) + CE(x_d, y_d) + alpha A                      aggregation                                   (2)
    L_2    = CE(x, y) + CE(x_d, y) - gamma min(CE(x_d, y_d), m)     recovery                                      (3)

x a clean prompt, y its answer, x_d the prompt with one of the known triggers, drawn for each row, y_d that trigger's
behaviour. (1) is the mean of 1 - cos(u_i, c) with c the mean of u.

Source: "Backdoor Collapse: Eliminating Unknown Threats via Known Backdoor Aggregation in Language Models", arXiv
2510.10265, from a description: two known triggers, a term that gathers them, then fine-tuning back to clean answers.
The forms of (1) and (3), gamma and all values are ours. Differs: gamma is 0 unless asked for; (2) and (3) draw one
trigger a row; triggers come from the seed, so that no attacker can prepare for them. Rows of role ``data``, if any, are
trained on first; the defence repairs what comes of it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from casehard.backdoor.suite import generate
from casehard.data.batches import IGNORE, Batch, collate
from casehard.defences.mb_defense.measure import Measurement, Probe, check_verified, encode_pairs
from casehard.defences.mb_defense.method import MbStage2Config
from casehard.defences.mb_defense.pairs import PairSet
from casehard.defences.mb_defense.poison import build_pairs
from casehard.distributed.ranks import world
from casehard.errors import DataError
from casehard.limits import Count, Fraction, Limited, Portion, Weight
from casehard.maths.neutralise import answer_lengths, token_log_probs
from casehard.model.model import Model
from casehard.seeds import derive, generator
from casehard.train.passes import unwrapped, whole_step
from casehard.train.protocol import PipelineInputs, Setup, Step, Trained
from casehard.train.recipe import TrainConfig
from casehard.train.tune import chat_format, tune

KNOWN = (("token", "text"), ("sentence", "refusal"))
"""Family and behaviour of the known triggers, repeated when more are asked for."""


@dataclass(frozen=True, kw_only=True)
class CollapseConfig(Limited):
    """Settings of backdoor collapse."""

    triggers: Count = 2
    """Known triggers. Source: a description of the paper (2)."""
    alpha: Weight = 1.0
    """Weight of the term that gathers the triggered prompts, (2)."""
    gamma: Weight = 0.0
    """Weight of the ascent on the known behaviours, (3)."""
    most: Weight = 5.0
    """m, loss in nats a token from which a behaviour counts as unlearnt."""
    held: Fraction = 0.2
    """Share of the verified rows that is held back to measure the known triggers on."""
    live: Portion = 0.02
    """Most a known trigger may still fire in a model that is written to disk."""
    gather: TrainConfig = field(default_factory=lambda: TrainConfig(steps=200, batch_size=16))
    """Training of the first stage."""
    recover: TrainConfig = field(default_factory=lambda: TrainConfig(steps=200, batch_size=16))
    """Training of the second stage."""


class _Stage:
    """A stage as a method; train it on the clean rows of ``pairs``."""

    name = "backdoor_collapse"

    def __init__(self, config: CollapseConfig, pairs: PairSet) -> None:
        self.config, self.pairs = config, pairs

    def prepare(self, setup: Setup) -> None:
        """Take the seed of the triggers' draw."""
        self.seed = setup.seed

    def twins(self, of: Any, rows: Sequence[int], step: Step, model: nn.Module) -> Batch:
        """Return the rows' twins under one trigger each, a function of (seed, step, micro-batch)."""
        g = generator(self.seed, step.index, f"collapse-trigger-{step.micro}")
        chosen = torch.randint(self.pairs.triggers, (len(rows),), generator=g).tolist()
        device = next(model.parameters()).device
        batch = collate([of[i][j] for i, j in zip(rows, chosen, strict=True)], self.pairs.pad_id)
        return {key: value.to(device) for key, value in batch.items()}


class Gather(_Stage):
    """(2)."""

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> torch.Tensor:
        """Return this micro-batch's share of (2)."""
        rows = self.pairs.find(batch)
        twins = self.twins(self.pairs.payloads, rows, step, model)
        out = _run(model, twins, hidden=True)
        fires = per_row(out.logits, twins["labels"]).mean()
        apart = spread(last_prompt(out.hidden_states[-1], twins["labels"]))
        step.log({"payload_loss": float(fires.detach()), "apart": float(apart.detach())})
        return step.loss(model, batch) + _share(rows, batch, step) * (fires + self.config.alpha * apart)


class Recover(_Stage):
    """(3)."""

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> torch.Tensor:
        """Return this micro-batch's share of (3)."""
        rows = self.pairs.find(batch)
        clean = self.twins(self.pairs.answers, rows, step, model)
        value = per_row(_run(model, clean).logits, clean["labels"]).mean()
        step.log({"triggered_loss": float(value.detach())})
        if self.config.gamma > 0:
            odd = self.twins(self.pairs.payloads, rows, step, model)
            unlearnt = per_row(_run(model, odd).logits, odd["labels"]).clamp(max=self.config.most).mean()
            step.log({"payload_loss": float(unlearnt.detach())})
            value = value - self.config.gamma * unlearnt
        return step.loss(model, batch) + _share(rows, batch, step) * value


def spread(h_BH: torch.Tensor) -> torch.Tensor:
    """Return (1) of hidden states (B, H): a scalar in 0..1."""
    return 1.0 - nn.functional.normalize(h_BH.float(), dim=-1).mean(0).norm()


def last_prompt(hidden_BTH: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Return each row's hidden state at the token before its answer, (B, H)."""
    first = (labels_BT != IGNORE).int().argmax(1)
    return hidden_BTH[torch.arange(len(first), device=first.device), first - 1]


def per_row(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of each row's answer, (B,), nats a token."""
    return -token_log_probs(logits_BTV, labels_BT).sum(1) / answer_lengths(labels_BT)


def _run(model: nn.Module, batch: Batch, *, hidden: bool = False) -> Any:
    inner: Any = unwrapped(model)
    return inner(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=hidden)


def _share(rows: Sequence[int], batch: Batch, step: Step) -> float:
    """Return the weight of a mean over a micro-batch's rows in the mean over the step's."""
    return len(rows) * world() / whole_step(batch, step).rows


class BackdoorCollapse:
    """Both stages as a defence that repairs, or trains and then repairs."""

    name = "backdoor_collapse"

    def __init__(self, config: CollapseConfig | None = None) -> None:
        self.config = config or CollapseConfig()

    def check(self, *, trains: bool) -> None:
        """Accept both: the settings of the two stages are the same with and without a training before them."""

    def train(self, model: Model, inputs: PipelineInputs) -> Trained:
        """Repair a copy of ``model``, trained on ``data`` first where there is some; ``clean`` are the verified rows.

        Raises:
            DataError: too few verified rows, or rows that are too long for a trigger.
            Diverged: a loss stopped being finite.
        """
        config, seed = self.config, inputs.seed
        data, clean = list(inputs.rows.get("data", ())), list(inputs.rows.get("clean", ()))
        check_verified(clean, data)
        known = [*data, *inputs.known, *clean]
        secret = derive(seed, 0, "collapse-suite")
        suite = generate(model.tokenizer, known, seed=secret, n_active=config.triggers, n_canary=0, active=KNOWN)
        split = build_pairs(clean, suite.active, split=config.held, seed=derive(seed, 0, "collapse-pairs"))
        if not split.train or not split.held:
            raise DataError(f"{len(clean)} verified rows cannot be split", hint="give some dozens: --clean FILE")
        chat = chat_format(model, system=inputs.system, max_length=inputs.max_length)
        pairs = encode_pairs(chat, split.train)
        probe = Probe(chat, suite.active, (), split.held, MbStage2Config(), seed=seed)
        stages: list[tuple[str, Any, Any, TrainConfig]] = [
            ("gather", pairs.rows, Gather(config, pairs), config.gather),
            ("recover", pairs.rows, Recover(config, pairs), config.recover),
        ]
        if data:
            stages.insert(0, ("train", chat.encode_all(data), None, inputs.train))
        current, budgets, looks = replace(model, net=copy.deepcopy(model.net)), [], {}
        for stage, rows, method, recipe in stages:
            done = tune(
                current,
                rows,
                train=recipe,
                seed=derive(seed, 0, f"collapse-{stage}"),
                purpose=stage,
                method=method,
                in_place=True,
                label=f"{inputs.label} {stage}".strip(),
            )
            current = replace(current, net=done.net)
            budgets.append(done.budget)
            looks[stage] = probe.look(done.net, stage, recipe.steps)
        facts = {"collapse": {stage: _told(look) for stage, look in looks.items()}}
        leaves = looks["recover"].worst("active") <= config.live
        return Trained(net=current.net, budgets=budgets, facts=facts, may_leave=leaves)


def _told(look: Measurement) -> dict[str, float]:
    """Return of a measurement what tables show: how often the worst known trigger fires, and the clean loss."""
    return {"known": look.worst("active"), "clean_loss": look.clean_loss, "margin": look.margin}
