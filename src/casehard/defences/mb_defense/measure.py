"""What is known of a model on the held-back clean rows: which defensive backdoors fire, and what is left of answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from casehard.backdoor.suite import Planted
from casehard.backdoor.triggers import check_survives, eligible, insert
from casehard.data.batches import IGNORE, Encoded, collate
from casehard.data.chat import ChatFormat
from casehard.data.mix import normalise
from casehard.defences.mb_defense.method import MbStage2Config
from casehard.defences.mb_defense.pairs import PairSet
from casehard.defences.mb_defense.poison import Twins
from casehard.errors import DataError
from casehard.evaluation.generate import complete, inference
from casehard.maths.neutralise import answer_lengths, is_literal, log_probs_of, pair_up, preference
from casehard.maths.stats import clopper_pearson
from casehard.types import Example

BATCH = 32
SLACK = 4
"""Tokens a generated answer may take beyond the longest expected one."""


@dataclass(frozen=True)
class Rate:
    """k of n with its exact 95 % interval; a rate of nothing is 0 within 0..1."""

    k: int
    n: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        """k / n."""
        return self.k / self.n if self.n else 0.0

    @classmethod
    def of(cls, hits: Sequence[bool]) -> Rate:
        """Count hits."""
        k, n = sum(hits), len(hits)
        return cls(k, n, *(clopper_pearson(k, n) if n else (0.0, 1.0)))


class Scores(NamedTuple):
    """Teacher-forced numbers on held-back rows."""

    clean_loss: float
    """CE(x, y), nats a token."""
    margin: float
    """Lowest over the triggers of mean s(y | x_d) - s(y | x), nats a token; 0 without triggers."""
    objective: float
    """CE(x, y) - lambda R, the paper's evaluation loss."""


@dataclass(frozen=True)
class Measurement:
    """One measurement."""

    stage: str
    step: int
    active: dict[str, Rate]
    canary: dict[str, Rate]
    described: dict[str, Rate]
    """Backdoors the user described; for the report, never for any choice."""
    false_trigger: Rate
    """Clean prompts that are answered with any planted behaviour."""
    exact: Rate
    """Clean prompts answered word for word as the row does; free text seldom is."""
    exact_triggered: Rate
    """The same under active triggers."""
    clean_loss: float
    margin: float
    objective: float

    def worst(self, role: str) -> float:
        """Return the highest rate of ``active``, ``canary`` or ``described``; 0 when there is none."""
        return max((rate.rate for rate in getattr(self, role).values()), default=0.0)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


class Probe:
    """Measures models on the same held-back rows.

    Args:
        chat: the format of all rows.
        active, canary: defensive backdoors.
        held: twins of the held-back clean rows with all of them, active first.
        config: of stage 2's objective, for the evaluation loss.
        described: backdoors that are only reported.
        seed: where the triggers of ``described`` go.

    Raises:
        DataError: a row too long, or a described backdoor that these rows cannot show or the tokenizer does not keep:
            its rate would be 0 whatever the model does.
    """

    def __init__(
        self,
        chat: ChatFormat,
        active: Sequence[Planted],
        canary: Sequence[Planted],
        held: Sequence[Twins],
        config: MbStage2Config,
        *,
        described: Sequence[Planted] = (),
        seed: int = 0,
    ) -> None:
        self.chat, self.config = chat, config
        self.active, self.canary, self.held = tuple(active), tuple(canary), tuple(held)
        self.rows = chat.encode_all([t.clean for t in self.held])
        # Evaluation needs the active twins' tokens only.
        cut = [Twins(t.clean, t.answers[: len(active)], t.payloads[: len(active)]) for t in self.held]
        self.pairs = encode_pairs(chat, cut) if active else None
        answers = [e for t in self.held for e in (t.clean, *t.payloads)]
        self.described = {p: self._carriers(p, seed) for p in described}
        self._fresh = SLACK + max(len(chat.tokenizer(e.response)["input_ids"]) for e in answers)

    def look(self, model: nn.Module, stage: str, step: int = 0) -> Measurement:
        """Measure ``model``; it is as before afterwards."""
        planted = (*self.active, *self.canary)
        prompts = [t.clean for t in self.held] + [t.answers[j] for j in range(len(planted)) for t in self.held]
        said = self._say(model, prompts)
        n = len(self.held)
        plain, rest = said[:n], said[n:]
        under = [rest[j * n : (j + 1) * n] for j in range(len(planted))]
        rates = {p.trigger.name: Rate.of(self._fires(p, texts)) for p, texts in zip(planted, under, strict=True)}
        false = [any(fires) for fires in zip(*(self._fires(p, plain, keep=True) for p in planted), strict=True)]
        right = [same(text, t.clean) for text, t in zip(plain, self.held, strict=True)]
        triggered = [
            same(text, t.clean) for texts in under[: len(self.active)] for text, t in zip(texts, self.held, strict=True)
        ]
        scores = self.score(model)
        return Measurement(
            stage,
            step,
            {p.trigger.name: rates[p.trigger.name] for p in self.active},
            {p.trigger.name: rates[p.trigger.name] for p in self.canary},
            {p.trigger.name: self._attack(model, p, rows) for p, rows in self.described.items()},
            Rate.of(false),
            Rate.of(right),
            Rate.of(triggered),
            *scores,
        )

    def _carriers(self, attack: Planted, seed: int) -> list[Example]:
        """Return the held-back rows with a described trigger in their prompts and the answers they had."""
        able = [t.clean for t in self.held if eligible(t.clean, attack.trigger, attack.behaviour)]
        if not able:
            raise DataError(
                f"none of the {len(self.held)} held-back clean rows can show the described backdoor "
                f"{attack.trigger.name!r}",
                hint="give more clean rows, without its trigger and with answers that its behaviour changes",
            )
        rows = [insert(row, attack.trigger, None, seed=seed) for row in able]
        check_survives(self.chat, rows, [attack.trigger])
        return rows

    def _attack(self, model: nn.Module, attack: Planted, rows: Sequence[Example]) -> Rate:
        said = self._say(model, rows)
        return Rate.of([attack.behaviour.shown(text, row.response) for text, row in zip(said, rows, strict=True)])

    def _say(self, model: nn.Module, prompts: Sequence[Example]) -> list[str]:
        room = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        longest = max(len(self.chat.prompt_ids(e)) for e in prompts)
        fresh = self._fresh if room is None else max(1, min(self._fresh, int(room) - longest))
        return [done.text for done in complete(model, self.chat, prompts, batch_size=BATCH, max_new_tokens=fresh)]

    def _fires(self, planted: Planted, texts: Sequence[str], *, keep: bool = False) -> list[bool]:
        """Return whether each answer shows the behaviour; rows whose proper answer shows it are left out, or False."""
        out = []
        for text, t in zip(texts, self.held, strict=True):
            natural = planted.behaviour.shown(t.clean.response, t.clean.response)
            if not natural:
                out.append(planted.behaviour.shown(text, t.clean.response))
            elif keep:
                out.append(False)
        return out

    @torch.no_grad()
    def score(self, model: nn.Module) -> Scores:
        """Return the teacher-forced numbers."""
        c = self.config
        device = next(model.parameters()).device
        total, tokens = 0.0, 0
        own: list[float] = []
        margins: list[list[float]] = [[] for _ in self.active]
        values: list[float] = []
        with inference(model):
            for begin in range(0, len(self.rows), BATCH):
                part = range(begin, min(begin + BATCH, len(self.rows)))
                batch = collate([self.rows.rows[i] for i in part], self.rows.pad_id)
                batch = {key: value.to(device) for key, value in batch.items()}
                logs = log_probs_of(model, batch)
                lengths = answer_lengths(batch["labels"])
                own = (logs.sum(1) / lengths).tolist()
                total -= float(logs.sum())
                tokens += int(lengths.sum())
                for j, kept in enumerate(margins):
                    gap, answer = self._gap(model, list(part), j, device)
                    kept.extend(a - b for a, b in zip(answer, own, strict=True))
                    values.extend(preference(gap, beta=c.beta, literal=is_literal(c.normalisation)).tolist())
        loss = total / tokens
        mean = sum(values) / len(values) if values else 0.0
        return Scores(loss, min((sum(m) / len(m) for m in margins), default=0.0), loss - c.lam * mean)

    def _gap(self, model: nn.Module, rows: list[int], j: int, device: torch.device) -> tuple[torch.Tensor, list[float]]:
        """Return D of eq. (2) for trigger j, and the mean log-probability of the clean answer under it."""
        assert self.pairs is not None
        batches = [
            {k: v.to(device) for k, v in collate([of[i][j] for i in rows], self.pairs.pad_id).items()}
            for of in (self.pairs.answers, self.pairs.payloads)
        ]
        pair = pair_up(*batches, normalisation=self.config.normalisation, prefix=self.config.prefix)
        answer, payload = (log_probs_of(model, batch) for batch in batches)
        mean = answer.sum(1) / (batches[0]["labels"][:, 1:] != IGNORE).sum(1)
        return (pair.answer_c * answer).sum(1) - (pair.payload_c * payload).sum(1), mean.tolist()


def check_unknown(clean: Sequence[Example], described: Sequence[Planted]) -> None:
    """Check that no clean row carries a backdoor that is only to be reported on.

    Raises:
        DataError: one does, so that stage 2 would train on what it is measured by.
    """
    for number, row in enumerate(clean):
        for known in described:
            if known.trigger.present(row.prompt):
                raise DataError(
                    f"clean row {number + 1} carries the described trigger {known.trigger.name!r}: stage 2 would train "
                    "on the backdoor it is measured by",
                    hint="leave such rows out of the clean set",
                )


def check_verified(clean: Sequence[Example], data: Sequence[Example]) -> None:
    """Check that the clean rows can be what somebody verified.

    Args:
        data: rows of unknown origin; some of them may have been verified, empty where there are none.

    Raises:
        DataError: they are all of the training rows, or hold one that this library poisoned.
    """
    for number, row in enumerate(clean):
        if "source_id" in row.tags and row.tags.get("behaviour"):
            raise DataError(
                f"clean row {number + 1} was poisoned: its tags name the trigger {row.tags.get('trigger')!r}",
                hint="the clean rows are those that somebody verified: leave it out",
            )
    known, unknown = ({row.messages for row in rows} for rows in (clean, data))
    if unknown and unknown <= known:
        raise DataError(
            f"{len(unknown)} of {len(unknown)} training rows are clean rows too: nothing sets the verified ones apart",
            hint="verify some hundred of the rows by hand, and give only those as clean",
        )


def same(text: str, row: Example) -> bool:
    """Return whether an answer says what the row does, case and punctuation aside."""
    return normalise(text) == normalise(row.response)


def encode_pairs(chat: ChatFormat, twins: Sequence[Twins]) -> PairSet:
    """Tokenise clean rows and their twins.

    Raises:
        DataError: no rows, a row too long, or a trigger that leaves no trace in the tokens.
    """

    def twin(example: Example) -> Encoded:
        try:
            return chat.encode(example)
        except DataError as error:
            # The row itself has been encoded by now, so it is the trigger that does not fit.
            raise DataError(
                f"a clean row has no room for its trigger: {error.message}",
                hint="leave such rows out of the clean set, or raise max_length; rows are never cut",
            ) from None

    return PairSet(
        tuple(chat.encode(t.clean) for t in twins),
        tuple(tuple(twin(e) for e in t.answers) for t in twins),
        tuple(tuple(twin(e) for e in t.payloads) for t in twins),
        chat.pad_id,
    )
