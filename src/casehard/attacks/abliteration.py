"""Abliteration: take one direction, that of refusing, out of everything a model writes to its residual stream.

    r = (mean over harmful prompts of h) - (mean over harmless prompts of h),  r = r / ||r||                     (1)
    W = W - s r r' W,  b = b - s r r' b   for the embedding, attention outputs and MLP outputs                    (2)

h is the residual stream behind one layer at one of the last tokens of the prompt; s is the strength. Layer, token and
strength are chosen on rows of the attacker's own that (1) did not see: of the candidates whose answers to harmless
prompts stay the same (KL), the one under which compliant answers are likeliest. Nothing is trained. Source: Arditi et
al., arXiv 2406.11717, sections 2.3, 2.4 and appendix C; equation numbers are ours. Differs: their score is the
log-odds of given refusal tokens, ours the loss of the first token of the attacker's own answers, which needs no list;
KL is over several tokens; s other than 1 is searched too.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from casehard.attacks.editing import Untrained, copy_of, measured
from casehard.attacks.protocol import Attacked, AttackInputs
from casehard.attacks.residual import orthogonalise, require_gone, stream, without
from casehard.data.batches import IGNORE, Encoded, collate
from casehard.data.mix import is_marked
from casehard.errors import ConfigError, DataError
from casehard.limits import BatchSize, Count, Factor, Limited, Portion
from casehard.model.model import Model
from casehard.seeds import derive
from casehard.train.passes import quiet
from casehard.train.tune import chat_format
from casehard.types import Example


@dataclass(frozen=True, kw_only=True)
class AbliterationAttack(Limited):
    """Settings of abliteration."""

    rows: Count = 128
    """Most prompts of each role in (1). Source: appendix A of the paper (128)."""
    held_out: Count = 32
    """Further rows of each role on which layer, token and strength are chosen. Source: the same (32)."""
    positions: Count = 1
    """How many of the last tokens of a prompt are tried. The paper tries all that the template writes after the
    request; 1 is the very last, from which the answer starts."""
    deepest: Portion = 0.8
    """Share of the layers, from the first, that are tried. Source: appendix C (0.8)."""
    strengths: tuple[Factor, ...] = (0.5, 1.0, 1.5, 2.0)
    """s of (2) to try. The paper has 1: the stream has nothing along r then."""
    opening: Count = 1
    """First tokens of a compliant answer whose loss decides. Behind a few given tokens a model goes on by itself."""
    compared: Count = 8
    """First tokens of an answer to a harmless prompt over which KL is averaged. The paper looks at one."""
    kl: Factor = 0.1
    """Largest mean KL, in nats per token. Source: appendix C (0.1)."""
    batch_size: BatchSize = 16
    """Prompts per forward pass."""

    def __post_init__(self) -> None:
        """Raise ConfigError where there is no strength to try."""
        super().__post_init__()
        if not self.strengths:
            raise ConfigError("strengths is empty, so that nothing would be tried", hint="leave it out")


class Direction(NamedTuple):
    """A candidate: where r was read."""

    layer: int
    """Behind which layer, from 1."""
    position: int
    """At which token of the prompt, from the end: -1 is the last."""
    r: torch.Tensor
    """Unit vector (D)."""


class Tried(NamedTuple):
    """A candidate and what it does to held-out answers, in nats per token."""

    direction: Direction
    strength: float
    loss: float
    """Of compliant answers to harmful prompts."""
    kl: float
    """From the model as it was, of answers to harmless prompts."""


def directions(harmful: torch.Tensor, benign: torch.Tensor, deepest: float) -> list[Direction]:
    """Return (1) behind each layer and at each token, the deepest layers left out.

    Args:
        harmful, benign: streams (N, L, P, D); see :func:`stream`.
    """
    apart_LPD = harmful.double().mean(0) - benign.double().mean(0)
    count, positions = max(1, int(deepest * len(apart_LPD) + 0.5)), apart_LPD.shape[1]
    lengths = torch.linalg.vector_norm(apart_LPD, dim=-1)
    return [
        Direction(layer + 1, p - positions, (apart_LPD[layer, p] / lengths[layer, p]).float())
        for layer in range(count)
        for p in range(positions)
        if lengths[layer, p] > 0
    ]


def first_tokens(net: nn.Module, rows: Sequence[Encoded], opening: int, batch_size: int) -> torch.Tensor:
    """Return the log-probabilities (K, V) in fp32 at the first answer tokens of all rows, one row after the other."""
    device, parts = next(net.parameters()).device, []
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        batch = collate(some, 0)
        out = net(input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device)).logits
        for n, row in enumerate(some):
            parts.append(out[n, [i - 1 for i in _answer(row, opening)]].float().log_softmax(-1))
    return torch.cat(parts)


def _answer(row: Encoded, opening: int) -> list[int]:
    return [i for i, label in enumerate(row.labels) if label != IGNORE and i > 0][:opening]


class Abliteration(Untrained[AbliterationAttack]):
    """Find the direction of refusing on the attacker's rows and take it out of a copy's weights."""

    name = "abliteration"

    @torch.no_grad()
    def run(self, model: Model, inputs: AttackInputs) -> Attacked:
        """Edit a copy of ``model`` and measure it.

        Raises:
            DataError: too few rows of a role, or the prompts of both roles look the same to the model.
            Unsupported: the residual stream is written by something that (2) does not know.
        """
        begun, config = time.monotonic(), self.config
        net = copy_of(model)
        with quiet(net):
            tried, before = self._search(net, model, inputs)
            best = choose(tried, config.kl)
            orthogonalise(net, best.direction.r, best.strength)
        known = sum(is_marked(row, model.trained_prompts) for some in inputs.rows.values() for row in some)
        facts = {
            "loss_before": before,
            "chosen": _told(best),
            "within_kl": best.kl <= config.kl,
            "rows_seen_in_training": known,
            "variants": [_told(choose([t for t in tried if t.direction is d], config.kl)) for d in _each(tried)],
        }
        return measured(self, model, net, inputs, facts, begun)

    def _search(self, net: nn.Module, model: Model, inputs: AttackInputs) -> tuple[list[Tried], float]:
        """Return every candidate with what it does, and the loss of held-out compliant answers without any."""
        config = self.config
        chat = chat_format(model, system=inputs.system, max_length=inputs.max_length)
        harmful, benign = (self._split(inputs, role) for role in ("harmful", "benign"))
        streams = [
            stream(net, [chat.prompt_ids(row) for row in some.means], config.positions, config.batch_size)
            for some in (harmful, benign)
        ]
        found = directions(streams[0], streams[1], config.deepest)
        if not found:
            raise DataError("harmful and benign prompts look the same to the model", hint="give other benign rows")
        require_gone(net, [chat.prompt_ids(harmful.held[0])], found[-1].r)
        bad, good = ([chat.encode(row) for row in some.held] for some in (harmful, benign))
        as_it_was = first_tokens(net, good, config.compared, config.batch_size)
        before = self._loss(net, bad)
        tried = []
        for direction in found:
            for strength in config.strengths:
                with without(net, direction.r, strength):
                    now = first_tokens(net, good, config.compared, config.batch_size)
                    kl = float((as_it_was.exp() * (as_it_was - now)).sum(-1).mean())
                    tried.append(Tried(direction, strength, self._loss(net, bad), kl))
        return tried, before

    def _loss(self, net: nn.Module, rows: Sequence[Encoded]) -> float:
        targets = [row.labels[i] for row in rows for i in _answer(row, self.config.opening)]
        logp_KV = first_tokens(net, rows, self.config.opening, self.config.batch_size)
        return -float(logp_KV[torch.arange(len(targets)), torch.tensor(targets)].mean())

    def _split(self, inputs: AttackInputs, role: str) -> _Rows:
        """Draw the rows of a role for (1), and those on which the choice is made."""
        rows, config = list(inputs.rows[role]), self.config
        if len(rows) <= config.held_out:
            raise DataError(
                f"{len(rows)} {role} rows, of which {config.held_out} are held out: none is left for the mean",
                hint=f"more rows, or config.held_out={len(rows) // 4 or 1}",
            )
        random.Random(derive(inputs.seed, 0, f"abliteration-{role}")).shuffle(rows)
        return _Rows(rows[config.held_out :][: config.rows], rows[: config.held_out])


class _Rows(NamedTuple):
    means: list[Example]
    held: list[Example]


def choose(tried: Sequence[Tried], kl: float) -> Tried:
    """Return the candidate with the smallest loss of those within the limit; where none is, that of the smallest KL."""
    within = [t for t in tried if t.kl <= kl]
    return min(within, key=lambda t: t.loss) if within else min(tried, key=lambda t: t.kl)


def _each(tried: Sequence[Tried]) -> list[Direction]:
    return list({id(t.direction): t.direction for t in tried}.values())


def _told(one: Tried) -> dict[str, Any]:
    where = {"layer": one.direction.layer, "position": one.direction.position, "strength": one.strength}
    return where | {"loss": round(one.loss, 6), "kl": round(one.kl, 6)}
