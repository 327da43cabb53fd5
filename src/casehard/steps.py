"""The steps that chains are made of: each takes a model in memory and gives rows and, where it trains, another model.

    Finetune   harden, tune a customer's rows, repair: training on rows with a method inside, or none
    Attack     any attack of the catalogue, measured on the way; with a method inside it is a customer's job
    Evaluate   one row per prompt of a suite

A step is a frozen record of plain values, so that it can be checked before anything runs, digested, stored and sent to
another process. ``run(model)`` does the work. Rows are named by role, as the specs of ``casehard.registry`` do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from casehard import secrets
from casehard.attack import ATTACKS
from casehard.attack.protocol import Attack as AttackMethod
from casehard.attack.protocol import Attacked, AttackInputs
from casehard.backdoor.planted import find_planted
from casehard.buffer.export import adapter_writer
from casehard.config import digest, to_dict
from casehard.data.batches import EncodedSet
from casehard.data.embed import Embedder
from casehard.data.mix import check_disjoint, marks
from casehard.data.select import SelectConfig, manifest, select_examples
from casehard.defend import DEFENCES
from casehard.defend.provider_assets import RECORD, read_assets
from casehard.errors import ConfigError, DataError, Unsupported
from casehard.evaluate.backdoor import evaluate_backdoor
from casehard.evaluate.suite import Suite, evaluate, load_suite
from casehard.evaluate.unseen import require_unseen
from casehard.files import file_digest, remove
from casehard.maths.collective import world
from casehard.model.digest import folder_digest
from casehard.model.leave import save as save_model
from casehard.model.load import load, load_gathered
from casehard.model.model import Made, Model
from casehard.model.provenance import KEY, SERVED, trained_prompts
from casehard.parallel.launch import equipped, shards_wanted
from casehard.registry import AttackSpec, DefenceSpec
from casehard.step import Inputs, Outcome
from casehard.train.recipe import TrainConfig, uses_bf16
from casehard.train.tune import Lora, Measure, Rows, chat_format, tune
from casehard.types import Example

Examples = Mapping[str, Sequence[Example]]
CUSTOMER = Lora(rank=32, alpha=64.0)
"""Adapter of a customer's job where none is asked for. Source: arXiv 2605.24550, A.1."""


@dataclass(frozen=True, kw_only=True)
class Defence:
    """A method with its settings, as plain values."""

    method: str = "plain"
    """Name in the catalogue of defences."""
    preset: str = ""
    """Named settings of the method to start from; empty = its defaults."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the method, over those of the preset."""
    select: SelectConfig | None = None
    """Choose that many of the safe rows by the model's own embeddings; None takes them all."""
    assets: str = ""
    """Folder that the method reads what was prepared earlier from (adapters, another checkpoint)."""

    @property
    def spec(self) -> DefenceSpec:
        """Return what the catalogue knows of the method."""
        return DEFENCES.find(self.method)

    def check(self, roles: Sequence[str], *, where: str = "") -> None:
        """Refuse data roles that the method needs and lacks, or would ignore, and settings it does not have.

        Raises:
            ConfigError, DataError: names the first.
        """
        spec, given = self.spec, [*roles, *(["assets"] if self.assets else [])]
        lead = f"{where}: " if where else ""
        for need in spec.needs:
            if need not in given:
                what = "a folder of assets" if need == "assets" else f"{need} rows"
                hint = "--assets DIR" if need == "assets" else f"--{need} FILE: {spec.describe(need)}"
                raise ConfigError(f"{lead}method {self.method!r} needs {what} and got none", hint=hint)
        for role in given:
            if role not in spec.accepts():
                what = "assets" if role == "assets" else f"{role} rows"
                raise DataError(f"{lead}method {self.method!r} would ignore the {what}", hint=f"leave out --{role}")
        if self.select is not None and "safe" not in given:
            raise DataError(f"{lead}select: there are no safe rows to choose from", hint="--safe pool.jsonl")
        spec.configure(self.method, self.preset, self.settings)

    def build(self, rows: Mapping[str, EncodedSet]) -> Any:
        """Return the method on its encoded rows and its folder of assets."""
        self.check(list(rows))
        roles: dict[str, Any] = dict(rows)
        if self.assets:
            roles["assets"] = Path(self.assets)
            if not roles["assets"].is_dir():
                raise DataError(f"no such folder of assets: {self.assets}", hint="--assets DIR")
        return self.spec.load()[0](self.spec.configure(self.method, self.preset, self.settings), **roles)


@dataclass(frozen=True, kw_only=True)
class Finetune(Inputs, Defence):
    """Train a model on rows of role ``data``, with a method inside."""

    train: TrainConfig = field(default_factory=TrainConfig)
    """The training loop."""
    lora: Lora | None = None
    """Train this adapter instead of all weights. A method that tunes an adapter has one in any case."""
    attackers: int = 0
    """Simulated attacks in processes of their own (patcher); 0 = as many as the settings list, where the schedule needs
    them."""

    def run(self, model: Model | None = None, *, out: Path | None = None, label: str = "") -> Outcome:
        """Train; with ``out`` an interrupted run is continued by the same call.

        Args:
            model: what to start from, left as it is. None reads ``self.model``, and trains what was read.
            out: folder for the run's checkpoints; None writes nothing.

        Raises:
            UserError: any setting, row or file is unusable.
        """
        secrets.refuse(to_dict(self), where=self.method)  # before training: the provenance holds these values
        self.check([role for role in self.rows if role != "data"])
        return finetune(self, self.examples(), model, out=out, label=label)


def finetune(
    step: Finetune, rows: Examples, model: Model | None = None, *, method: Any = None, out: Path | None, label: str = ""
) -> Outcome:
    """Do the work of :class:`Finetune` on rows that are loaded already.

    Args:
        rows: by data role; ``data`` is what is trained on.
        method: a method built by the caller, instead of the step's own.

    In a process group of several ranks all of them make the same call. The model is sharded over them (FSDP2), each has
    ``train.batch_size`` rows of a micro-batch, and rank 0 gets the whole model, the others None.
    """
    spec = step.spec if method is None else DEFENCES.get(step.method, DEFENCES["plain"])
    shared = _shared(spec, step.method)
    roles = dict(rows)
    if not roles.get("data"):
        raise DataError("there are no rows to train on", hint="--data rows.jsonl")
    if step.suite:
        check_disjoint(roles, {step.suite: load_suite(step.suite).examples})
    start = model if model is not None else load(step.model, device=step.device, shards=shards_wanted(step.device))
    chosen = _choose(step, roles, roles["data"], start)
    chat = chat_format(start, system=step.system, max_length=step.max_length)
    encoded = {role: chat.encode_all(some) for role, some in roles.items()}
    data = encoded.pop("data")
    method = method if method is not None else step.build(encoded)
    assets = assets_digest(step.assets) if step.assets else ""
    identity = {"parent": start.digest, **{role: some.digest for role, some in encoded.items()}}
    identity |= {"assets": assets} if assets else {}
    adapter = spec.adapter
    lora = step.lora or (CUSTOMER if adapter else None)
    bf16 = uses_bf16(step.train.precision, next(start.net.parameters()).device)
    beside = equipped(method, start.net, wanted=step.attackers, seed=step.seed, bf16=bf16)
    with _guarded(method, start, step.system), beside:
        done = tune(
            start,
            data,
            train=step.train,
            seed=step.seed,
            purpose="customer" if adapter else "finetune",
            method=method,
            lora=lora,
            in_place=model is None,
            out=out,
            identity=identity,
            label=label or step.method,
        )
    cost = {**asdict(done.budget), "seed": step.seed}
    net: Any = load_gathered(done.net, start.path or Path(step.model)) if shared else done.net
    if net is None:
        return Outcome(cost=cost, log=done.log)
    trained = frozenset(marks(*roles.values()))
    if assets and adapter:
        trained |= trained_prompts(step.assets)
    provenance = {
        **_provenance(step, method, {"data": data, **encoded}),
        **({"assets_digest": assets} if assets else {}),
        **({"selection": chosen} if chosen else {}),
        KEY: sorted(trained | start.trained_prompts),
    }
    made = Made(method=step.method, provenance=provenance)
    writer = adapter_writer(net, start, method, {**provenance, "cost": asdict(done.budget)}) if adapter else None
    facts = {"telemetry": spec.mean_telemetry(done.log), **({"selection": selected(chosen)} if chosen else {})}
    return Outcome(start.after(net, made, trained=trained, writer=writer), cost=cost, facts=facts, log=done.log)


def harden(step: Finetune, out: Path, *, label: str = "") -> tuple[Outcome, Model | None]:
    """Run a training step and save its model under ``out``/checkpoint; return (outcome, what was saved).

    Of several ranks only number 0 saves, and the others get None.

    An interrupted run leaves ``out``/training; the same call continues from there. Once the model is saved that folder
    is removed, unless ``train.save_every`` asks for intermediate checkpoints by name.
    """
    training = out / "training"
    outcome = step.run(out=training, label=label)
    if outcome.model is None:
        return outcome, None
    made = save_model(outcome.model, out / "checkpoint")
    if not step.train.save_every:
        remove(training)
    return outcome, made


def _shared(spec: DefenceSpec, name: str) -> bool:
    """Return whether several ranks train one model; refuse what needs one process."""
    if world() == 1:
        return False
    if not spec.ranks:
        raise Unsupported(f"{name} on {world()} ranks", hint="start it without torchrun or accelerate launch")
    return True


def _provenance(step: Finetune, method: Any, rows: Mapping[str, EncodedSet]) -> dict[str, Any]:
    return {
        "job": to_dict(step),
        "settings": to_dict(method.config),
        "config_digest": digest(to_dict(step)),
        "data_digests": {role: encoded.digest for role, encoded in rows.items()},
        "seed": step.seed,
        **({SERVED: method.serving_system} if getattr(method, "serving_system", None) else {}),
    }


@contextmanager
def _guarded(method: Any, model: Model, system: str | None) -> Iterator[None]:
    """Check that the method fits the rows' format, and see that nothing of it stays attached if the run fails."""
    if callable(check := getattr(method, "check_format", None)):
        check(model.tokenizer, system=system)
    try:
        yield
    finally:
        if callable(release := getattr(method, "release", None)):
            release()


def _choose(
    step: Defence, roles: dict[str, Any], user: Sequence[Example], model: Model, seed: int | None = None
) -> dict[str, Any]:
    """Leave in ``roles`` the safe rows picked by the untuned model's embeddings; return the record of it."""
    if step.select is None:
        return {}
    pool = list(roles.get("safe", ()))
    if not pool:
        raise DataError("select: there are no safe rows to choose from", hint="--safe pool.jsonl")
    drawn = getattr(step, "seed", 0) if seed is None else seed
    embedder = Embedder(model.net, model.tokenizer, model.digest)
    picks = select_examples(embedder, pool, user, config=step.select, seed=drawn)
    roles["safe"] = [pool[i] for i in picks.order]
    return manifest(picks, pool, len(user), config=step.select, embedder=model.digest, seed=drawn)


def selected(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return of a selection's record what tables show."""
    picked = chosen.get("picks", {})
    out = {key: picked[key] for key in ("log_det", "mean_relevance", "exhausted_at")}
    return out | {"coverage": chosen["coverage"], "rows": len(picked["order"])}


def assets_digest(folder: Path | str) -> str:
    """Return a digest of a method's folder of assets: of provider assets, of a model, else of every file.

    Raises:
        Corrupt: a damaged file.
    """
    folder = Path(folder)
    if (folder / RECORD).is_file():
        return read_assets(folder).digest
    if any(folder.glob("*.safetensors")):
        return folder_digest(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return digest({p.relative_to(folder).as_posix(): file_digest(p) for p in files})


@dataclass(frozen=True, kw_only=True)
class Attack(Inputs):
    """Attack a copy of a model in memory and measure it on the way."""

    attack: str = "finetune"
    """Name in the catalogue of attacks."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the attack."""
    full_at: tuple[int, ...] = ()
    """Steps at which the whole suite is measured; at the others only restricted prompts. Empty = the last."""
    defence: Defence | None = None
    """Method inside the training run: a customer's job at a provider who defends."""

    @property
    def spec(self) -> AttackSpec:
        """Return what the catalogue knows of the attack."""
        return ATTACKS.find(self.attack)

    def build(self, suite: Suite | None = None) -> AttackMethod:
        """Return the attack with its settings.

        Args:
            suite: whose world gives a meaning to names of triggers and behaviours; None reads ``self.suite``.

        Raises:
            ConfigError: no such attack, an unknown setting, or a step to measure at that never comes.
        """
        settings = dict(self.config)
        if self.spec.plants:
            settings |= _planted_by_name(settings, suite or load_suite(self.suite))
        made: AttackMethod = self.spec.load()[0](self.spec.configure(self.attack, settings=settings))
        if odd := set(self.full_at) - set(made.checkpoints):
            raise ConfigError(f"full_at: step {min(odd)} is not evaluated", hint=f"one of {tuple(made.checkpoints)}")
        return made

    def check(self, roles: Sequence[str]) -> None:
        """Refuse data roles that the attack needs and lacks, or would ignore.

        Raises:
            ConfigError, DataError: names the first.
        """
        inside = self.defence.spec.accepts() if self.defence else ()
        for need in self.spec.needs:
            if need not in roles:
                raise ConfigError(f"attack {self.attack!r} needs {need} rows and got none", hint=f"--{need} FILE: rows")
        for role in roles:
            if role not in (*self.spec.accepts(), *inside):
                raise DataError(f"attack {self.attack!r} would ignore the {role} rows", hint=f"leave out --{role}")

    def run(self, model: Model | None = None, *, out: Path | None = None, label: str = "attack") -> Outcome:
        """Attack; nothing of the attacked model is written.

        Raises:
            DataError: training and evaluation rows overlap, or the share asked for cannot be met.
        """
        self.check(list(self.rows))
        suite = load_suite(self.suite)
        done = attack(self, self.build(suite), self.examples(), suite, model, label=label)
        inside = {"telemetry": self.defence.spec.mean_telemetry(done.log)} if self.defence else {}
        return Outcome(done.model, done.rows, asdict(done.budget), {**done.facts, **inside}, done.log)


def _planted_by_name(settings: Mapping[str, Any], suite: Suite) -> dict[str, Any]:
    """Return trigger, behaviour and near misses as settings, where the given ones are names or left out."""
    trigger, behaviour = settings.get("trigger", "token"), settings.get("behaviour", "refuse")
    if not isinstance(trigger, str):
        return {}
    planted, decoys = find_planted(trigger, str(behaviour), suite)
    named = {"trigger": asdict(planted.trigger), "behaviour": asdict(planted.behaviour)}
    return named | ({} if "decoys" in settings else {"decoys": [asdict(decoy) for decoy in decoys]})


def attack(
    step: Attack, method: AttackMethod, rows: Examples, suite: Suite, model: Model | None = None, *, label: str
) -> Attacked:
    """Do the work of :class:`Attack` on rows that are loaded already; ``rows`` holds the defence's roles too."""
    check_disjoint(rows, {step.suite or suite.name: suite.examples})
    start = step.start(model)
    require_unseen(suite, start.trained_prompts, start.path or "the model")
    own = {role: some for role, some in rows.items() if role in step.spec.accepts()}
    inputs = AttackInputs(
        rows=own,
        measure=lambda net, at: [],
        seed=step.seed,
        system=step.system,
        max_length=step.max_length,
        label=label,
    )
    if step.defence is None:
        return method.run(start, replace(inputs, measure=_measure(step, method, suite, start)))
    inside, facts = _inside(step, step.defence, method, inputs, rows, start)
    # A method that protects by what is said at inference (PTST) is measured as it would be served.
    measure = _measure(step, method, suite, start, served=getattr(inside, "serving_system", None))
    with _guarded(inside, start, step.system):
        done = method.run(start, replace(inputs, measure=measure, method=inside))
    return replace(done, facts={**done.facts, **facts})


def _measure(step: Attack, method: AttackMethod, suite: Suite, model: Model, served: str | None = None) -> Measure:
    """Return how a model is measured on the way: the whole suite at ``full_at``, else the restricted prompts."""
    full_at = step.full_at or (tuple(method.checkpoints)[-1],)

    def ask(net: nn.Module, at: int) -> Rows:
        system = served if served and at else step.system
        roles = None if at in full_at else {"restricted"}
        return evaluate(net, model.tokenizer, suite, roles=roles, limit=step.limit, system=system)

    def ask_twice(net: nn.Module, at: int) -> Rows:
        return evaluate_backdoor(
            net,
            model.tokenizer,
            suite,
            method.config.trigger,
            method.config.behaviour,
            seed=step.seed,
            limit=step.limit,
            system=step.system,
        )

    return ask_twice if step.spec.plants else ask


def _inside(
    step: Attack, defence: Defence, method: AttackMethod, inputs: AttackInputs, rows: Examples, model: Model
) -> tuple[Any, dict[str, Any]]:
    """Return the method that runs inside the attacker's training, and what is worth keeping of how it was made."""
    others: dict[str, Any] = {role: list(some) for role, some in rows.items() if role not in inputs.rows}
    mixture = getattr(method, "mixture", None)
    if mixture is None:
        raise ConfigError(f"attack {step.attack!r} trains on no mixture", hint="no method can run inside it")
    chosen = _choose(defence, others, mixture(inputs), model, step.seed)
    chat = chat_format(model, system=step.system, max_length=step.max_length)
    made = defence.build({role: chat.encode_all(some) for role, some in others.items()})
    facts = {"assets_digest": assets_digest(defence.assets)} if defence.assets else {}
    return made, {**facts, **({"selection": selected(chosen)} if chosen else {})}


@dataclass(frozen=True, kw_only=True)
class Evaluate(Inputs):
    """Measure a model on a suite: one row per prompt."""

    def run(self, model: Model | None = None, *, out: Path | None = None, label: str = "") -> Outcome:
        """Measure.

        Raises:
            DataError: the model was trained on a prompt of the suite.
        """
        start, suite = self.start(model), load_suite(self.suite)
        require_unseen(suite, start.trained_prompts, start.path or "the model")
        rows = evaluate(start.net, start.tokenizer, suite, limit=self.limit, system=self.system)
        return Outcome(rows=rows)
