"""Make the provider's assets, once for each base: BufferLoRA, then ReinforceLoRA on top of it.

    buffer      min over theta_B  -E_{harmful + some helpful} log p(y | x; theta, theta_B)                        (2)
    reinforce   min over theta_R  -E_{refusals + helpful}     log p(y | x; theta, g theta_B, theta_R)             (3)

theta is frozen in both, theta_B in (3). The paper's buffer sees compliance only and g = 1; the default adds helpful
rows and switches g between 1 and 0, because the plain form over-refuses once the buffer is gone (see the docs page).
Source: arXiv 2605.24550, equations 2 and 3, appendix A.3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from torch import nn

from casehard import __version__
from casehard.compat import version_of
from casehard.config import to_dict
from casehard.data.batches import EncodedSet
from casehard.data.chat import ChatFormat
from casehard.data.mix import check_disjoint, content_hash, marks, poison
from casehard.defences.buffer_reinforce.assets import Assets
from casehard.defences.buffer_reinforce.frozen_lora import BaseWatch, FrozenLora, fingerprints
from casehard.defences.buffer_reinforce.gates import Gate, GateLimits, Held, measure
from casehard.defences.buffer_reinforce.publish import require_place, write_assets
from casehard.defences.buffer_reinforce.saturation import Residual, residual
from casehard.defences.buffer_reinforce.security_vector import KeepBenign, KeepBenignConfig
from casehard.errors import ConfigError, DataError, Refused
from casehard.evaluation.judges import make_judge
from casehard.evaluation.suite import Suite, load_suite
from casehard.io import secrets
from casehard.io.stored import apart
from casehard.limits import Factor, Fraction, Limited, Rank, Weight, Within
from casehard.maths.merge import LoraPair
from casehard.model.adapters import add_lora
from casehard.model.digest import tokenizer_digests
from casehard.model.lora_files import live_pairs
from casehard.model.model import Model
from casehard.model.provenance import KEY
from casehard.model.source import ORIGIN
from casehard.model.step import Inputs, Outcome
from casehard.seeds import derive
from casehard.train.fit import FitResult, fit
from casehard.train.protocol import Step
from casehard.train.recipe import TrainConfig
from casehard.types import Example

Pairs = Mapping[str, LoraPair]


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Limited):
    """How the two adapters are made."""

    rank: Rank = 32
    """Rank of both. Source: paper A.1."""
    alpha: Factor = 64.0
    """lora_alpha of both, scale alpha / rank. Source: paper A.1."""
    target: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Layers. The paper takes five kinds by name (preset ``paper``), which not every architecture has."""
    dropout: Fraction = 0.1
    """On the input of the adapter being trained; a frozen adapter has none. Source: published code."""
    helpful_share: Annotated[float, Within(0, 0.99)] = 0.5
    """Helpful rows among the buffer's; 0 = compliance only (paper)."""
    kl: Weight = 0.0
    """Weight of KL(base || base + buffer) on benign rows while the buffer trains. Source: Security Vectors, 0.01."""
    refusal_share: Annotated[float, Within(0.01, 0.99)] = 0.5
    """Refusals among the reinforce rows, the rest helpful, without which it refuses everything. Source: paper, 2,500 of
    5,000."""
    buffer_gate: Literal["alternate", "on", "uniform"] = "alternate"
    """The buffer while reinforce trains: every other step, always (paper), or scaled by a draw from 0..1."""
    epochs: tuple[Factor, Factor] | None = (3.0, 3.0)
    """Passes over the buffer's and the reinforce rows; None takes the steps and warm-up of the two recipes below. With
    epochs the warm-up is 5 % of the steps. Source: paper, code."""
    buffer_train: TrainConfig = field(default_factory=lambda: TrainConfig(lr=1e-4, batch_size=8))
    """Recipe of the buffer. The paper's 1e-5 (preset ``paper``) is for its 1,856 steps on an 8B model."""
    reinforce_train: TrainConfig = field(default_factory=lambda: TrainConfig(lr=1e-4, batch_size=8))
    """Recipe of reinforce."""
    holdout: Annotated[float, Within(0, 0.5, above=True)] = 0.1
    """Share of the provider's prompts kept from training, for the gates and as reference of later checks."""
    gates: GateLimits = field(default_factory=GateLimits)
    """What must hold before anything is published."""
    allow_missed: bool = False
    """Publish although gates are missed; the record says so."""


PAPER_TARGETS = ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
_PAPER_TRAIN = TrainConfig(lr=1e-5, batch_size=8, schedule="cosine", precision="bf16")
PRESETS: dict[str, PrepareConfig] = {
    "default": PrepareConfig(),
    "paper": PrepareConfig(
        target=PAPER_TARGETS,
        helpful_share=0.0,
        buffer_gate="on",
        buffer_train=_PAPER_TRAIN,
        reinforce_train=_PAPER_TRAIN,
    ),
    "security_vector": PrepareConfig(kl=0.01, helpful_share=0.0),
}


@dataclass(frozen=True, kw_only=True)
class Prepare(Inputs):
    """Make assets for one base: the aligned model that customers tune.

    Roles: ``harmful``, restricted prompts with compliant answers; ``refusals``, restricted prompts with refusals;
    ``benign``, harmless prompts with helpful answers. The suite gives judge and answer length to the gates; its prompts
    must not occur in the rows, and none of them is used. ``system`` is the message that customers' rows get.
    """

    config: PrepareConfig = field(default_factory=PrepareConfig)

    def run(self, model: Model | None = None, *, out: Path | None = None, label: str = "") -> Outcome:
        """Make the assets and publish them in ``out``."""
        assert out is not None
        done = prepare(self, out, model=model)
        made = done.assets
        facts = {"gates": made.record["gates"], "missed": made.record["missed"], "digest": made.digest}
        return Outcome(cost=dict(done.cost), facts=facts)


ROLES = ("harmful", "refusals", "benign")


class PrepareResult(NamedTuple):
    """Published assets and what their gates measured."""

    assets: Assets
    gates: list[Gate]
    cost: dict[str, Any]
    """What training each adapter spent."""


class _Rows(NamedTuple):
    """Rows to train on and rows kept from it."""

    harmful: list[Example]
    refusals: list[Example]
    benign: list[Example]
    held: Held


class Gated:
    """Train beside a frozen buffer whose gate follows the step: equation (3)."""

    name = "gated-buffer"

    def __init__(self, buffer: FrozenLora, mode: Literal["alternate", "on", "uniform"], seed: int) -> None:
        self.buffer, self.mode, self.seed = buffer, mode, seed
        self.config = mode

    def gate_at(self, step: int) -> float:
        """Return g of step ``step``."""
        if self.mode == "alternate":
            return float(step % 2 == 0)
        return 1.0 if self.mode == "on" else derive(self.seed, step, "buffer-gate") / 2**63

    def loss(self, model: nn.Module, batch: dict[str, Any], step: Step) -> Any:
        """Return the plain loss with the buffer at this step's gate."""
        self.buffer.gate = self.gate_at(step.index)
        return step.loss(model, batch)

    def finish(self, model: nn.Module) -> None:
        """Leave the buffer fully on."""
        self.buffer.gate = 1.0


def split(harmful: Sequence[Example], refusals: Sequence[Example], benign: Sequence[Example], *, share: float) -> _Rows:
    """Keep a share of the prompts, restricted and benign apart, from training: a prompt with all its answers.

    Raises:
        DataError: too few prompts, or a prompt that is both restricted and benign.
    """
    check_disjoint({"restricted": [*harmful, *refusals]}, {"benign": benign})
    parts = []
    for what, rows in (("restricted", [*harmful, *refusals]), ("benign", list(benign))):
        prompts = sorted({content_hash(row) for row in rows})
        kept = math.ceil(share * len(prompts))
        if len(prompts) < 2:
            raise DataError(f"{len(prompts)} {what} prompts: too few to train on some and measure on others")
        parts.append(set(prompts[:kept]))  # in the order of their hashes: at random, and the same for every seed
    out, inn = [], []
    for some, held in ((harmful, parts[0]), (refusals, parts[0]), (benign, parts[1])):
        out.append([row for row in some if content_hash(row) in held])
        inn.append([row for row in some if content_hash(row) not in held])
    for name, left in zip(("harmful", "refusals", "benign"), inn, strict=True):
        if not left:
            raise DataError(f"no {name} rows are left to train on", hint="give more rows, or a smaller holdout")
    restricted = list({content_hash(row): row for row in [*out[1], *out[0]]}.values())
    if not out[0]:
        raise DataError("no compliant row was held out", hint="give more harmful rows, or a larger holdout")
    return _Rows(inn[0], inn[1], inn[2], Held(restricted, out[0], out[2]))


def buffer_rows(rows: _Rows, config: PrepareConfig, *, seed: int) -> list[Example]:
    """Return the buffer's training rows: every harmful row, and helpful rows up to their share."""
    if config.helpful_share == 0:
        return list(rows.harmful)
    n = round(len(rows.harmful) / (1 - config.helpful_share))
    return _mix(rows.harmful, rows.benign, 1 - config.helpful_share, n, seed)


def reinforce_rows(rows: _Rows, config: PrepareConfig, *, seed: int) -> list[Example]:
    """Return the reinforce rows: every refusal, and helpful rows up to their share."""
    return _mix(
        rows.refusals, rows.benign, config.refusal_share, round(len(rows.refusals) / config.refusal_share), seed
    )


def _mix(first: Sequence[Example], benign: Sequence[Example], share: float, n: int, seed: int) -> list[Example]:
    return poison(first, benign, share=share, n=max(2, n), seed=derive(seed, 0, "provider-mix"), oversample=True)


def _sets(rows: _Rows, chat: ChatFormat, config: PrepareConfig, seed: int) -> dict[str, EncodedSet]:
    return {
        "buffer": chat.encode_all(buffer_rows(rows, config, seed=seed)),
        "reinforce": chat.encode_all(reinforce_rows(rows, config, seed=seed)),
        **({"benign": chat.encode_all(rows.benign)} if config.kl else {}),
    }


def _recipe(train: TrainConfig, epochs: float | None, rows: int) -> TrainConfig:
    if epochs is None:
        return train
    steps = math.ceil(epochs * rows / (train.batch_size * train.accumulation))
    return replace(train, steps=steps, warmup=math.ceil(0.05 * steps))


def _recipes(config: PrepareConfig, sets: Mapping[str, EncodedSet]) -> dict[str, TrainConfig]:
    epochs = config.epochs or (None, None)
    return {
        "buffer": _recipe(config.buffer_train, epochs[0], len(sets["buffer"])),
        "reinforce": _recipe(config.reinforce_train, epochs[1], len(sets["reinforce"])),
    }


def _train(
    base: nn.Module,
    loaded: Model,
    rows: EncodedSet,
    job: Prepare,
    train: TrainConfig,
    role: str,
    method: Any = None,
) -> tuple[dict[str, LoraPair], FitResult]:
    """Train one adapter on the frozen base, take its factors and take the adapter off again."""
    config, seed = job.config, derive(job.seed, 0, f"provider-{role}")
    trainable = [p for p in base.parameters() if p.requires_grad]
    # Each adapter has a first A of its own: shared ones would make the updates overlap.
    target = config.target if isinstance(config.target, str) else list(config.target)
    wrapped: Any = add_lora(base, config.rank, config.alpha, target, config.dropout, seed=seed)
    try:
        result = fit(wrapped, loaded.tokenizer, rows, config=train, method=method, seed=seed, label=role)
        return live_pairs(wrapped), result
    finally:
        wrapped.unload()
        if hasattr(base, "peft_config"):
            del base.peft_config
        for p in trainable:  # PEFT froze the base
            p.requires_grad_(True)


def _both(
    base: nn.Module, loaded: Model, sets: Mapping[str, EncodedSet], recipes: Mapping[str, TrainConfig], job: Prepare
) -> tuple[dict[str, Pairs], dict[str, Any]]:
    """Train the buffer, then reinforce beside it; return their factors and what each cost."""
    keep = KeepBenign(KeepBenignConfig(kl=job.config.kl), benign=sets["benign"]) if job.config.kl else None
    buffer, first = _train(base, loaded, sets["buffer"], job, recipes["buffer"], "buffer", keep)
    frozen = FrozenLora(buffer).attach(base)
    try:
        gated = Gated(frozen, job.config.buffer_gate, job.seed)
        reinforce, second = _train(base, loaded, sets["reinforce"], job, recipes["reinforce"], "reinforce", gated)
    finally:
        frozen.detach()
    cost = {"buffer": asdict(first.budget), "reinforce": asdict(second.budget)}
    return {"buffer": buffer, "reinforce": reinforce}, cost


def prepare(job: Prepare, out: Path | str, *, model: Model | None = None) -> PrepareResult:
    """Train both adapters, measure the gates and publish the assets.

    Args:
        job: what from; see :class:`Prepare`.
        out: the folder of assets to make.
        model: the base, if it is in memory already.

    Raises:
        Refused: a gate is missed and ``allow_missed`` is off; nothing is published. Its ``gates`` lists all of them.
        ConfigError, DataError: unusable settings or rows.
        Diverged: a loss stopped being finite.
    """
    secrets.refuse(to_dict(job), where="buffer prepare")
    require_place(Path(out))
    config = job.config
    roles, suite = _inputs(job)
    rows = split(**roles, share=config.holdout)
    loaded = job.start(model)
    base, limit = loaded.net, job.max_length or getattr(loaded.net.config, "max_position_embeddings", None)
    chat = ChatFormat(loaded.tokenizer, system=job.system, max_length=limit)
    watch, prints = BaseWatch(base), fingerprints(base)
    sets = _sets(rows, chat, config, job.seed)
    recipes = _recipes(config, sets)
    pairs, cost = _both(base, loaded, sets, recipes, job)
    watch.verify(base)
    held = _capped(rows.held, config.gates.prompts)
    gates = _measure(base, chat, held, pairs, config.gates, suite)
    missed = [gate for gate in gates if not gate.passed]
    if missed and not config.allow_missed:
        raise _refusal(missed, gates)
    reference = _reference(base, chat, held, pairs["buffer"])
    watch.verify(base)
    tokenizer, template = tokenizer_digests(loaded.tokenizer)
    record = {
        "base_digest": loaded.digest,
        **({ORIGIN: loaded.origin} if loaded.origin else {}),
        "base_fingerprints": prints,
        "tokenizer_digest": tokenizer,
        "template_digest": template,
        "system": job.system,
        "target_modules": sorted({name.rpartition(".")[2] for name in pairs["buffer"]}),
        "layers": len(pairs["buffer"]),
        "seed": job.seed,
        "job": to_dict(job),
        "recipes": {role: to_dict(recipe) for role, recipe in recipes.items()},
        "data_digests": {role: data.digest for role, data in sets.items()},
        KEY: sorted(marks(rows.harmful, rows.refusals, rows.benign)),
        "rows": {"buffer": len(sets["buffer"]), "reinforce": len(sets["reinforce"])}
        | {f"held_{name}": len(getattr(rows.held, name)) for name in ("restricted", "compliant", "benign")},
        "gates": [gate.record() for gate in gates],
        "missed": [gate.name for gate in missed],
        "reference": reference,
        "cost": apart(cost)[0],
        "versions": {"casehard": __version__, **{name: version_of(name) for name in ("torch", "transformers", "peft")}},
    }
    return PrepareResult(write_assets(Path(out), pairs["buffer"], pairs["reinforce"], record), gates, cost)


def _inputs(job: Prepare) -> tuple[dict[str, list[Example]], Suite | None]:
    """Return the rows by role, none of them a prompt of the suite, and the suite."""
    roles = job.examples(of=ROLES)
    for role in ROLES:
        if role not in roles:
            raise ConfigError(f"buffer prepare needs {role} rows and got none", hint=f"--{role} FILE")
    suite = load_suite(job.suite) if job.suite else None
    if suite:
        check_disjoint(roles, {job.suite: suite.examples})
    return roles, suite


def _capped(held: Held, prompts: int) -> Held:
    return Held(held.restricted[:prompts], held.compliant[:prompts], held.benign[:prompts])


def _measure(
    base: nn.Module, chat: ChatFormat, held: Held, pairs: Mapping[str, Pairs], limits: GateLimits, suite: Suite | None
) -> list[Gate]:
    judge = suite.make_judge() if suite else make_judge("rule")
    length = suite.max_new_tokens if suite else limits.max_new_tokens
    return measure(base, chat, judge, held, pairs, limits, max_new_tokens=length)


def _reference(base: nn.Module, chat: ChatFormat, held: Held, buffer: Pairs) -> dict[str, dict[str, float]]:
    """Measure how far the buffer saturates harmful rows it never saw: what a job's rows are compared with later."""
    found: dict[str, Residual] = {"base": residual(base, chat, held.compliant)}
    frozen = FrozenLora(buffer).attach(base)
    try:
        found["buffer"] = residual(base, chat, held.compliant)
    finally:
        frozen.detach()
    return {state: {"residual": r.mean_residual, "nll": r.mean_nll} for state, r in found.items()}


def _refusal(missed: Sequence[Gate], gates: Sequence[Gate]) -> Refused:
    told = "; ".join(f"{g.name} is {g.value:.3f}, limit {g.limit:g}" for g in missed)
    error = Refused(
        f"{len(missed)} of {sum(g.limit is not None for g in gates)} gates are missed, nothing is published: {told}",
        hint="train longer or on more rows, change the limits (gates.*), or publish as they are with --allow-missed",
    )
    error.gates = [gate.record() for gate in gates]  # type: ignore[attr-defined]
    return error


def preset(name: str, **changes: Any) -> PrepareConfig:
    """Return a named preset with changes applied: ``default``, ``paper`` or ``security_vector``."""
    if name not in PRESETS:
        raise ConfigError(f"buffer preset {name!r} is unknown", hint=f"one of {sorted(PRESETS)}")
    return replace(PRESETS[name], **changes)
