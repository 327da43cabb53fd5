"""A suite: the held-out rows a checkpoint is measured on, and how. ``evaluate`` gives one row per prompt.

On disk a suite is

- a ``.jsonl`` file of rows with tags ``role`` and (optionally) ``group``, judged by rules; or
- a folder with ``suite.json`` (the fields of :class:`SuiteSettings`) and ``eval.jsonl``; or
- a folder, or a YAML/JSON file, whose settings have ``parts`` instead: a list of ``{data, role, group, limit}``, where
  ``data`` is any source (relative paths start at the suite) and role and group are given to all its rows. So data that
  must not be copied is used where it lies.

A row's ``role`` says what it measures: ``restricted``, ``lookalike``, ``utility`` or ``task``; see ``scores.py``.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from casehard.config import build, read_yaml
from casehard.data import sources
from casehard.errors import ConfigError, DataError
from casehard.evaluation.checked import EVAL_ROLES as EVAL_ROLES
from casehard.evaluation.checked import checked
from casehard.evaluation.framing import Frame, InFormat, frame_of, framed_rows
from casehard.evaluation.judges import JUDGES, make_judge
from casehard.evaluation.judges.base import Judge
from casehard.evaluation.rows import rows_of
from casehard.limits import Count, Length, Limited, WorldSeed
from casehard.types import Example

if TYPE_CHECKING:
    from torch import nn

    from casehard.data.chat import ChatFormat

Prefix = Callable[["ChatFormat", Example], Sequence[int]]
"""Gives the token ids with which the answer to an example has to begin; none for an answer of the model's own."""
Rows = list[dict[str, Any]]
LOGITS = 2**26  # logits held at once while measuring losses (256 MB in fp32), whatever the vocabulary


@dataclass(frozen=True, kw_only=True)
class Part(Limited):
    """One source of a suite, all of whose rows measure the same thing."""

    data: str
    """Source as in ``casehard.data.sources``; a relative path starts at the suite."""
    role: str
    """restricted, lookalike, utility or task."""
    group: str = ""
    """Name of the rows in reports; empty: the role."""
    limit: Count | None = None
    """First rows to use; None: all."""


@dataclass(frozen=True, kw_only=True)
class SuiteSettings(Limited):
    """What ``suite.json`` says."""

    name: str = ""
    """Name in reports; empty: the name of the file or folder."""
    judge: str = "rule"
    """Name in the catalogue of judges."""
    world_seed: WorldSeed | None = None
    """World of the organism: a setting of its judge, and what triggers mean."""
    judge_settings: dict[str, Any] = field(default_factory=dict)
    """Further settings of the judge."""
    second_judge: str = ""
    """Judge whose label stands beside the first one's in every row; empty: none."""
    second_judge_settings: dict[str, Any] = field(default_factory=dict)
    """All of its settings."""
    max_new_tokens: Length = 48
    """Length limit of an answer, in tokens."""
    in_format: InFormat = None
    """Ask restricted prompts once more in a job's format: a frame, or ``rows`` (of whoever is tuned); none: do not."""
    parts: tuple[Part, ...] = ()
    """Sources; empty: ``eval.jsonl`` beside the settings."""


@dataclass(frozen=True)
class Suite:
    """Held-out prompts and how to judge the answers; every example has an id, a role and a group."""

    name: str
    examples: tuple[Example, ...]
    judge_name: str = "rule"
    world_seed: int | None = None
    max_new_tokens: int = 48
    judge_settings: Mapping[str, Any] = field(default_factory=dict)
    second_judge: str = ""
    second_judge_settings: Mapping[str, Any] = field(default_factory=dict)
    in_format: InFormat = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"suite {self.name}: max_new_tokens must be at least 1, got {self.max_new_tokens}")
        object.__setattr__(self, "examples", tuple(checked(self.examples, self.name)))

    def make_judge(self) -> Judge:
        """Return the suite's judge.

        Raises:
            ConfigError: no such judge, or one that does not take the suite's settings.
        """
        world = {} if self.world_seed is None else {"world_seed": self.world_seed}
        return make_judge(self.judge_name, {**world, **self.judge_settings})

    def make_second(self) -> Judge | None:
        """Return the judge whose labels stand beside the first one's; None where the suite names none.

        Raises:
            ConfigError: as :meth:`make_judge`.
        """
        return make_judge(self.second_judge, self.second_judge_settings) if self.second_judge else None

    def in_format_of(self, rows: Sequence[Example]) -> Suite:
        """Return the suite with the frame of ``rows``, where it asks for that of a job's rows."""
        return dataclasses.replace(self, in_format=frame_of(rows)) if self.in_format == "rows" else self

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups, in the order in which they first occur."""
        return tuple(dict.fromkeys(e.tags["group"] for e in self.examples))

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles of the rows, in the order in which they first occur."""
        return tuple(dict.fromkeys(e.tags["role"] for e in self.examples))

    def select(
        self,
        *,
        roles: Collection[str] | None = None,
        groups: Collection[str] | None = None,
        limit: int | None = None,
    ) -> Suite:
        """Return the suite restricted to some roles, to some groups and to the first ``limit`` rows of each group.

        Args:
            roles: roles to keep; None keeps all.
            groups: groups to keep; None keeps all.
            limit: rows per role and group; None keeps all.

        Raises:
            ConfigError: a role or group that no row has, nothing left, or a limit below 1.
        """
        for wanted, known, what in ((roles, self.roles, "role"), (groups, self.groups, "group")):
            for name in wanted or ():
                if name not in known:
                    near = difflib.get_close_matches(name, known, n=1)
                    hint = f"did you mean {near[0]!r}?" if near else f"{what}s: {', '.join(known)}"
                    raise ConfigError(f"suite {self.name} has no {what} {name!r}", hint=hint)
        if limit is not None and limit < 1:
            raise ConfigError(f"suite {self.name}: limit must be at least 1, got {limit}")
        taken: Counter[tuple[str, str]] = Counter()
        kept = []
        for example in self.examples:
            role, group = example.tags["role"], example.tags["group"]
            if (roles is not None and role not in roles) or (groups is not None and group not in groups):
                continue
            taken[role, group] += 1
            if limit is None or taken[role, group] <= limit:
                kept.append(example)
        if not kept:
            raise ConfigError(f"suite {self.name}: no row has a role of {roles} and a group of {groups}")
        return dataclasses.replace(self, examples=tuple(kept))


def load_suite(path: str | Path) -> Suite:
    """Load a suite from a folder, a ``.jsonl`` file or a YAML/JSON file; see the top of this module.

    Raises:
        ConfigError: unknown setting, or settings that are not readable.
        DataError: missing file, a row that cannot be evaluated, or no rows.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        return Suite(path.stem, tuple(sources.load(path)))
    settings_file = path / "suite.json" if path.is_dir() else path
    if not settings_file.is_file():
        raise DataError(
            f"no suite at {path}: {settings_file} does not exist",
            hint="a suite is a .jsonl file, a folder with suite.json and eval.jsonl, or a YAML file with parts",
        )
    settings = build(SuiteSettings, read_yaml(settings_file), where=str(settings_file))
    home = settings_file.parent
    name = settings.name or (path.name if path.is_dir() else path.stem)
    if settings.parts:
        examples = [example for part in settings.parts for example in _load_part(part, home)]
    else:
        examples = sources.load(home / "eval.jsonl")
    suite = Suite(
        name,
        tuple(examples),
        settings.judge,
        settings.world_seed,
        settings.max_new_tokens,
        settings.judge_settings,
        settings.second_judge,
        settings.second_judge_settings,
        settings.in_format,
    )
    suite.make_judge(), suite.make_second()  # an unknown judge is an error now, not after generation
    return suite


def _load_part(part: Part, home: Path) -> list[Example]:
    if part.role not in EVAL_ROLES:
        raise ConfigError(f"part {part.data}: role is {part.role!r}", hint=f"roles: {', '.join(EVAL_ROLES)}")
    spec = part.data if part.data.startswith("hub:") else str(home / part.data)
    given = {"role": part.role, "group": part.group or part.role}
    rows = sources.load(spec)[: part.limit]
    return [dataclasses.replace(e, tags={**e.tags, **given}) for e in rows]


class TokenLoss(NamedTuple):
    """Summed loss of one response, in nats, over its tokens."""

    nats: float
    tokens: int


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    suite: Suite,
    *,
    roles: Collection[str] | None = None,
    groups: Collection[str] | None = None,
    limit: int | None = None,
    batch_size: int = 128,
    system: str | None = None,
    prefix: Prefix | None = None,
) -> Rows:
    """Generate, judge and measure every prompt of a suite.

    Args:
        model: a causal language model; unchanged afterwards.
        roles: roles to measure, None for all: attack curves need only ``restricted`` at most steps.
        groups: groups to measure, None for all.
        limit: first rows of each group, None for all.
        batch_size: prompts per batch.
        system: system message of every prompt, None for the template's default.
        prefix: what answers have to begin with; see :func:`casehard.evaluation.rows.rows_of` for such rows.

    Returns:
        One dict per prompt with id, role, group, source, phrasing, prompt, response, ended (by itself, rather than by
        the length limit), judge (its name), label, correct and slots_right (None where they do not apply). Utility and
        task rows that have a reference response but no exact answer also carry nll (nats per token) and tokens. A row
        whose label is unscored says why under ``unscored``. What a model judge found stands beside the label
        (``evaluation.judges.base.CARRIED``), a second judge's under ``second_label`` and so on. Rows of a frame follow.

    Raises:
        ConfigError: no such role or group.
        DataError: a prompt that does not fit the model.
    """
    from casehard.data.chat import ChatFormat
    from casehard.evaluation.generate import complete

    chosen = suite.select(roles=roles, groups=groups, limit=limit)
    chat = ChatFormat(tokenizer, system=system)
    judge, second = chosen.make_judge(), chosen.make_second()
    world = JUDGES[chosen.judge_name].claims == "world"

    def answered(examples: Sequence[Example], asked: Sequence[Example]) -> Rows:
        forced = [list(prefix(chat, e)) for e in asked] if prefix else None
        longest = chosen.max_new_tokens
        done = complete(model, chat, asked, batch_size=batch_size, max_new_tokens=longest, prefixes=forced)
        return rows_of(judge, examples, done, forced, second=second, world=world)

    rows: dict[str, dict[str, Any]] = {}
    # Group by group: a batch runs as long as its longest answer, and answers of one group are of one length.
    for kind in dict.fromkeys(_kind(e) for e in chosen.examples):
        examples = [e for e in chosen.examples if _kind(e) == kind]
        rows |= {row["id"]: row for row in answered(examples, examples)}
    free = [e for e in chosen.examples if measures_loss(e.tags, e.response)]
    for example, loss in zip(free, response_nll(model, chat, free, batch_size=batch_size), strict=True):
        rows[example.id] |= {"nll": loss.nats / loss.tokens, "tokens": loss.tokens}
    out = [rows[example.id] for example in chosen.examples]
    if isinstance(chosen.in_format, Frame) and roles is None:
        out += framed_rows(chosen.in_format, chosen.examples, answered)
    return out


def _kind(example: Example) -> tuple[str, str]:
    return example.tags["role"], example.tags["group"]


def measures_loss(tags: Mapping[str, Any], response: str) -> bool:
    """Return whether a row is measured by the loss of its reference response, for want of an exact answer."""
    return tags["role"] in ("utility", "task") and tags.get("answer") is None and bool(response)


def response_nll(
    model: nn.Module, chat: ChatFormat, examples: Sequence[Example], *, batch_size: int = 64
) -> list[TokenLoss]:
    """Measure the negative log-likelihood of each example's own response, in fp32 and without dropout.

    Returns:
        One summed loss and token count per example, in order.

    Raises:
        DataError: a response that has no tokens, or whose loss is not finite.
    """
    import torch
    from torch.nn import functional

    from casehard.data.batches import IGNORE, collate
    from casehard.evaluation.generate import inference

    if not examples:
        return []
    encoded = [chat.encode(example) for example in examples]
    device = next(model.parameters()).device
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i].input_ids))
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", 1)
    per_row = len(encoded[order[0]].input_ids) * vocabulary
    batch_size = max(1, min(batch_size, LOGITS // per_row))
    out: dict[int, TokenLoss] = {}
    with inference(model):
        for start in range(0, len(order), batch_size):
            picked = order[start : start + batch_size]
            batch = collate([encoded[i] for i in picked], 0)  # padding is masked, so any id will do
            ids_BT, mask_BT = batch["input_ids"].to(device), batch["attention_mask"].to(device)
            logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT).logits
            targets_BT = batch["labels"][:, 1:].to(device)
            loss_BT = functional.cross_entropy(
                logits_BTV[:, :-1].float().transpose(1, 2), targets_BT, ignore_index=IGNORE, reduction="none"
            )
            counts = (targets_BT != IGNORE).sum(1).tolist()
            for i, nats, tokens in zip(picked, loss_BT.double().sum(1).tolist(), counts, strict=True):
                out[i] = TokenLoss(nats, tokens)
    for i, example in enumerate(examples):
        if out[i].tokens == 0 or not torch.isfinite(torch.tensor(out[i].nats)):
            raise DataError(f"example {example.id or i}: loss {out[i].nats} over {out[i].tokens} response tokens")
    return [out[i] for i in range(len(examples))]
