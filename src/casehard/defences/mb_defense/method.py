"""MB-Defense, stage 2: unlearn the defender's own backdoors so that the attacker's, merged with them, goes too.

Stage 1 planted T backdoors of the defender's own (data/defensive) beside whatever the training data held. Stage 2:

    for each batch of clean rows (x, y), with k triggers drawn for each row:
        back-propagate CE(x, y) + kappa KL(p_ref(. | x) || p(. | x))                                   one graph
        s_d <- s(y_d | x_d)                                                                            forward only
        s   <- s(y | x_d);  w <- lambda beta sigmoid(-beta (s - s_d))
        back-propagate mu CE(x_d, y) - w s                                                             one graph
        back-propagate + w s(y_d | x_d)                                                                one graph

which is the gradient of  CE(x, y) + mu CE(x_d, y) - lambda log sigmoid(beta (s - s_d)) + kappa KL  at the memory of
plain fine-tuning (maths/neutralise, eq. (5)). x_d is x with the trigger, y_d the trigger's behaviour, p_ref the model
that stage 2 started from.

Source: Kim & Lee, arXiv 2601.04448 (ACL 2026), section on backdoor neutralization. Differs: the ratio is a log-ratio
(the printed one has no gradient where backdoors live), CE(x, y) counts once a row and not once a trigger, mu and kappa
are ours (preset "paper" has both at 0). The triggered passes run without dropout, so that s and w belong together.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from casehard.data.batches import IGNORE, Batch, Encoded, collate
from casehard.defences.mb_defense.pairs import PairSet, read_pairs
from casehard.distributed.ranks import rank, world
from casehard.errors import ConfigError, DataError, Diverged
from casehard.limits import Count, Factor, Length, Limited, Natural, Weight
from casehard.maths.bilevel import with_view
from casehard.maths.neutralise import (
    Normalisation,
    TopK,
    anchor_kl,
    is_literal,
    log_probs_of,
    pair_up,
    preference,
    top_k,
    weighted_terms,
)
from casehard.seeds import generator
from casehard.train.passes import quiet, reshard, share_of_step, unwrapped, whole_step
from casehard.train.protocol import Setup, Step


@dataclass(frozen=True, kw_only=True)
class MbStage2Config(Limited):
    """Settings of stage 2; the paper does not print lambda, the learning rate or the batch size."""

    normalisation: Normalisation = "mean"
    """How a score counts its tokens; mean keeps lambda and beta free of length. "literal" is the printed formula."""
    lam: Weight = 1.0
    """lambda, weight of the log-ratio term. With sum use about 0.05, with prefix about 0.3."""
    beta: Factor = 1.0
    """Sharpness inside the sigmoid, 1 / nats."""
    mu: Weight = 1.0
    """Weight of CE(x_d, y), the right answer under the trigger. Not in the paper: 0 there."""
    kappa: Weight = 1.0
    """Weight of the KL anchor to the model stage 2 starts from, on clean prompts. Not in the paper: 0 there."""
    triggers: Natural = 1
    """Triggers drawn for each row of a batch; 0 takes all of them, as the paper's tuples do."""
    prefix: Length = 10
    """K, most tokens that count with normalisation prefix."""
    top_k: Count = 64
    """Likeliest tokens of the reference that the KL tells apart at each position; all others count as one class."""


PRESETS: dict[str, MbStage2Config] = {
    "default": MbStage2Config(),
    "paper": MbStage2Config(mu=0.0, kappa=0.0, triggers=0),
    "paper_literal": MbStage2Config(normalisation="literal", mu=0.0, kappa=0.0, triggers=0),
}


class MbStage2:
    """Stage 2 as a method; train it on ``pairs.rows``.

    Args:
        config: settings, see :class:`MbStage2Config`.
        pairs: clean rows with their twins.
        assets: folder to read them from instead.

    Raises:
        DataError: neither or both of them, or no clean rows.
    """

    name = "mb_stage2"

    def __init__(
        self, config: MbStage2Config | None = None, *, pairs: PairSet | None = None, assets: Path | None = None
    ) -> None:
        self.config = config or MbStage2Config()
        if (pairs is None) == (assets is None):
            raise DataError("mb_defense needs clean rows with triggered twins", hint="pairs=, or --assets DIR")
        self.pairs = pairs if pairs is not None else read_pairs(Path(str(assets)))
        if is_literal(self.config.normalisation):
            warnings.warn(
                "normalisation literal puts the probability ratio itself into the sigmoid: where a backdoor is alive "
                "its gradient is close to zero and the term does nothing",
                stacklevel=2,
            )
        self.sequences = self.forwards = 0
        """Rows run forward and backward, and rows run forward only, so far and in this process."""
        self._reference: list[TopK] = []
        self._start: dict[str, torch.Tensor] = {}

    # -- seams ---------------------------------------------------------------------------------------------

    def prepare(self, setup: Setup) -> None:
        """Remember the model as it stands for the KL anchor: adapter weights as a copy, else its likeliest tokens."""
        self._seed = setup.seed
        self._reference, self._start = [], {}
        if self.config.kappa == 0:
            return
        named = dict(setup.model.named_parameters())
        if all(p.requires_grad for p in named.values()):
            self._reference = self._answers(setup.model)
        else:
            self._start = {n: p.detach().clone() if p.requires_grad else p for n, p in named.items()}

    def backward(self, model: nn.Module, batch: Batch, step: Step) -> torch.Tensor:
        """Accumulate the gradient of (4) for this micro-batch and return its loss."""
        rows = self.pairs.find(batch)
        total = self._clean(model, batch, rows, step)
        drawn = self._draw(len(rows), step)
        if self.config.lam == 0 and self.config.mu == 0:
            return total
        share = len(rows) * world() / (len(drawn) * whole_step(batch, step).rows)
        for chosen in drawn:
            total = total + self._twins(model, rows, chosen, step, share=share)
        return total

    # -- parts ---------------------------------------------------------------------------------------------

    def _clean(self, model: nn.Module, batch: Batch, rows: list[int], step: Step) -> torch.Tensor:
        """Back-propagate CE(x, y) and the anchor from one forward pass of the loop's own loss."""
        self.sequences += len(rows)
        with _logits(model) as seen:
            loss = step.loss(model, batch)
        if self.config.kappa > 0:
            kl = self._anchor(model, batch, rows, seen[0])
            step.log({"kl": float(kl.detach())})
            loss = loss + self.config.kappa * share_of_step(batch, step, whole_step(batch, step).tokens) * kl
        seen.clear()
        step.backward(loss)
        return loss.detach()

    def _anchor(self, model: nn.Module, batch: Batch, rows: list[int], logits: torch.Tensor) -> torch.Tensor:
        """Return KL(reference || model) in nats a token over the answers of the batch."""
        keep = nn.functional.pad(batch["labels"][:, 1:] != IGNORE, (0, 1))
        if self._reference:
            kept = [self._reference[i] for i in rows]
            target = TopK(*(torch.cat(part).to(logits.device) for part in zip(*kept, strict=True)))
        else:
            self.forwards += len(rows)
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
            with quiet(model), torch.no_grad():
                start = with_view(unwrapped(model), self._start, lambda m: m(**inputs).logits)[keep]
            target = top_k(start, self.config.top_k)
        return anchor_kl(target, logits, keep)

    def _twins(self, model: nn.Module, rows: list[int], chosen: list[int], step: Step, *, share: float) -> torch.Tensor:
        """Back-propagate mu CE(x_d, y) - lambda R for one trigger a row; ``share`` of the step's loss."""
        c = self.config
        device = next(model.parameters()).device

        def twins(of: tuple[tuple[Encoded, ...], ...]) -> Batch:
            batch = collate([of[i][j] for i, j in zip(rows, chosen, strict=True)], self.pairs.pad_id)
            return {key: value.to(device) for key, value in batch.items()}

        answer, payload = twins(self.pairs.answers), twins(self.pairs.payloads)
        pair = pair_up(answer, payload, normalisation=c.normalisation, prefix=c.prefix)
        literal = is_literal(c.normalisation)
        with quiet(model):
            low = self._score(model, payload, pair.payload_c) if c.lam > 0 else torch.zeros(len(rows)).to(device)
            answers = log_probs_of(model, answer)
            gap = (pair.answer_c * answers.detach()).sum(1) - low
            if not bool(torch.isfinite(gap).all()):
                raise Diverged(f"mb_defense: a score under the trigger is not finite at step {step.index}")
            terms = weighted_terms(pair, gap, lam=c.lam, beta=c.beta, mu=c.mu, literal=literal)
            step.backward((share * terms.answer_c * answers).sum())
            own = (answer["labels"][:, 1:] != IGNORE).sum(1)
            overwrite = -(answers.detach().sum(1) / own).mean()
            del answers
            if c.lam > 0:
                step.backward((share * terms.payload_c * log_probs_of(model, payload)).sum())
        self.sequences += (2 if c.lam > 0 else 1) * len(rows)
        self.forwards += len(rows) if c.lam > 0 else 0
        value = preference(gap, beta=c.beta, literal=literal).mean()
        step.log({"log_ratio": float(gap.mean()), "preference": float(value), "triggered_loss": float(overwrite)})
        return share * (c.mu * overwrite - c.lam * value)

    def _score(self, model: nn.Module, batch: Batch, c: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            score = (c * log_probs_of(model, batch)).sum(1)
        reshard(model)
        return score

    def _draw(self, n: int, step: Step) -> list[list[int]]:
        """Return, for each pass, one trigger a row: a function of (seed, step), without repeats within a step."""
        triggers = self.pairs.triggers
        wanted = min(self.config.triggers or triggers, triggers)
        if wanted == triggers:
            return [[j] * n for j in range(triggers)]
        g = generator(self._seed, step.index, "mb-trigger-0")
        # Rows of the micro-batches and ranks before this one draw first, so how a step is cut up does not matter.
        so_far = n * (step.micro * world() + rank() + 1)
        order = [torch.randperm(triggers, generator=g)[:wanted].tolist() for _ in range(so_far)][-n:]
        return [list(chosen) for chosen in zip(*order, strict=True)]

    @torch.no_grad()
    def _answers(self, model: nn.Module) -> list[TopK]:
        """Return what the model says at the answer positions of every clean row."""
        device = next(model.parameters()).device
        out = []
        with quiet(model):
            for row in self.pairs.clean:
                batch = {k: v.to(device) for k, v in collate([row], self.pairs.pad_id).items()}
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                kept = top_k(logits[:, :-1][batch["labels"][:, 1:] != IGNORE], self.config.top_k)
                out.append(TopK(*(part.cpu() for part in kept)))
        self.forwards += len(out)
        return out


@contextlib.contextmanager
def _logits(model: nn.Module) -> Iterator[list[Any]]:
    """Collect the logits of every forward pass of ``model`` inside the block, graph and all."""
    seen: list[Any] = []
    handle = model.register_forward_hook(lambda _module, _inputs, output: seen.append(output["logits"]))
    try:
        yield seen
    finally:
        handle.remove()


def preset(name: str, **changes: Any) -> MbStage2Config:
    """Return a named preset with changes applied: ``default``, ``paper`` or ``paper_literal``."""
    if name not in PRESETS:
        raise ConfigError(f"mb_defense preset {name!r} is unknown", hint=f"one of {sorted(PRESETS)}")
    return replace(PRESETS[name], **changes)
