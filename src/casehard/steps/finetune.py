"""Finetune: harden, tune a customer's rows, repair - training on rows with a method inside, or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from casehard.config import digest, to_dict
from casehard.data.batches import EncodedSet
from casehard.data.mix import check_disjoint, marks
from casehard.defences import DEFENCES
from casehard.defences.buffer_reinforce.export import writer_of
from casehard.defences.buffer_reinforce.frozen_lora import BaseWatch
from casehard.defences.patcher.workers.launch import shards_wanted, with_attackers
from casehard.distributed.ranks import world
from casehard.errors import ConfigError, DataError, Refused, Unsupported, UserError
from casehard.evaluation.suite import load_suite
from casehard.io import secrets
from casehard.io.files import remove, scratch
from casehard.io.manifest import MANIFEST
from casehard.limits import PROCESSES, Within
from casehard.model.adapters import merged
from casehard.model.digest import weights_digest
from casehard.model.leave import save as save_model
from casehard.model.load import load, load_gathered
from casehard.model.lora_write import require_own
from casehard.model.model import Made, Model
from casehard.model.provenance import KEY, PROVENANCE, SERVED, trained_prompts
from casehard.model.save import rehearse
from casehard.model.source import ORIGIN, find_any
from casehard.model.step import Inputs, Outcome
from casehard.registry import DefenceSpec
from casehard.steps.defence import Defence, Examples, assets_digest, choose, guarded, run_pipeline, selected
from casehard.train.checkpoint import bytes_needed
from casehard.train.protocol import PipelineInputs
from casehard.train.recipe import TrainConfig, uses_bf16
from casehard.train.tune import Lora, chat_format, tune
from casehard.types import Budget, Example

CUSTOMER = Lora(rank=32, alpha=64.0)
"""Adapter of a customer's job where none is asked for. Source: arXiv 2605.24550, A.1."""


@dataclass(frozen=True, kw_only=True)
class Finetune(Inputs, Defence):
    """Train a model on rows of role ``data``, with a method inside."""

    train: TrainConfig = field(default_factory=TrainConfig)
    """The training loop."""
    lora: Lora | None = None
    """Train this adapter instead of all weights. A method that tunes an adapter has one in any case."""
    save_as: Literal["merged", "adapter"] | None = None
    """What is saved of a LoRA: an ordinary checkpoint with the adapter merged in, or the adapter alone, as a PEFT
    folder. None is merged, and the adapter for a method that tunes one."""
    attackers: Annotated[int, Within(0, PROCESSES)] = 0
    """Simulated attacks in processes of their own (patcher); 0 = as many as the settings list, where the schedule needs
    them."""

    @property
    def leaves_adapter(self) -> bool:
        """Whether what is saved is the adapter alone."""
        return self.save_as == "adapter" or DEFENCES.get(self.method, DEFENCES["plain"]).adapter

    @property
    def place(self) -> str:
        """Return the name, in a run folder, of what is saved."""
        return "adapter" if self.leaves_adapter else "checkpoint"

    def check(self, roles: Sequence[str], *, where: str = "", trains: bool = True) -> None:
        """Refuse besides what :meth:`Defence.check` does an adapter that the method has no use for.

        Raises:
            ConfigError: names the first.
            DataError: a selection without safe rows.
        """
        super().check(roles, where=where, trains=trains)
        check_adapter(self, self.spec, self.spec.configure(self.method, self.preset, self.settings))

    def run(
        self, model: Model | None = None, *, out: Path | None = None, place: Path | None = None, label: str = ""
    ) -> Outcome:
        """Train; with ``out`` an interrupted run is continued by the same call.

        Args:
            model: what to start from, left as it is. None reads ``self.model``, and trains what was read.
            out: folder for the run's checkpoints; None writes nothing.
            place: where what comes of it will be saved: tried before the first step.

        Raises:
            UserError: any setting, row or file is unusable.
        """
        secrets.refuse(to_dict(self), where=self.method)  # before training: the provenance holds these values
        self.check([role for role in self.rows if role != "data"], trains="data" in self.rows)
        return finetune_on(self, self.examples(), model, out=out, place=place, label=label)


def check_adapter(step: Finetune, spec: DefenceSpec, config: Any) -> None:
    """Refuse what cannot be done with a LoRA, or without one.

    Args:
        config: the method's configuration; its attribute ``moves_base`` says that the method changes, besides what
            trains, the weights that an adapter stands on.

    Raises:
        ConfigError: names the setting.
    """
    if step.lora is not None and (spec.pipeline or not spec.lora):
        why = "trains the model itself, and would ignore lora" if spec.pipeline else "acts on all weights"
        hint = "settings.lora_rank is its own" if hasattr(config, "lora_rank") else "leave out lora"
        raise ConfigError(f"{step.method} {why}", hint=hint)
    if spec.adapter and step.save_as == "merged":
        hint = "leave out save_as; `casehard model import ADAPTER --base MODEL` merges it"
        raise ConfigError(f"{step.method} hands back an adapter, not a checkpoint", hint=hint)
    if step.save_as == "adapter" and step.lora is None and not spec.adapter:
        raise ConfigError("save_as is 'adapter', and all weights are trained", hint="--lora-rank 8, or lora: {rank: 8}")
    if step.save_as == "adapter" and getattr(config, "moves_base", False):
        what = f"{step.method} with these settings changes the base too: its adapter alone would not be the defence"
        raise ConfigError(what, hint="save_as merged, or for antidote settings.prune=factors")


def finetune_on(
    step: Finetune,
    rows: Examples,
    model: Model | None = None,
    *,
    method: Any = None,
    out: Path | None,
    place: Path | None = None,
    label: str = "",
) -> Outcome:
    """Do the work of :class:`Finetune` on rows that are loaded already; ranks that share a model (FSDP2) all call it.

    Args:
        rows: by data role; ``data`` is what is trained on.
        method: a method built by the caller, instead of the step's own.
        out: folder for the run's checkpoints; None writes nothing.
        place: where the caller will save what comes of it: tried before the first step.
    """
    spec = step.spec if method is None else DEFENCES.get(step.method, DEFENCES["plain"])
    if spec.pipeline and method is None:
        return _piped(step, rows, model, place=place, label=label)
    shared = shared_by_ranks(spec, step.method)
    roles = _checked(step, rows, spec, method)
    start = model if model is not None else load(step.model, device=step.device, shards=shards_wanted(step.device))
    _may_train(start, out)
    chosen = choose(step, roles, roles["data"], start, seed=step.seed, system=step.system)
    chat = chat_format(start, system=step.system, max_length=step.max_length)
    encoded = {role: chat.encode_all(some) for role, some in roles.items()}
    data = encoded.pop("data")
    method = _settled(method if method is not None else step.build(encoded), step.train)
    assets = {"assets": assets_digest(step.assets)} if step.assets else {}
    identity = _identity(start, encoded, asis=None not in (model, out) and not shared) | assets
    trained = _trained(step, roles) if spec.adapter else frozenset(marks(*roles.values()))
    provenance = _provenance(step, to_dict(method.config), {"data": data, **encoded}, start)
    provenance |= {**_particular(method, chosen, assets), KEY: sorted(trained | start.trained_prompts)}
    _rehearse(start, place, provenance, adapter=step.leaves_adapter)
    verify = BaseWatch(start.net).verify if step.save_as == "adapter" else lambda net: None
    with guarded(method, start, step.system), _attackers(step, method, start):
        done = tune(
            start,
            data,
            train=step.train,
            seed=step.seed,
            purpose="customer" if spec.adapter else "finetune",
            method=method,
            lora=step.lora or (CUSTOMER if spec.adapter else None),
            in_place=model is None,
            out=out,
            identity=identity,
            label=label or step.method,
        )
    cost = {**asdict(done.budget), "seed": step.seed}
    if (net := _whole(done.net, step, start, shared)) is None:
        return Outcome(cost=cost, log=done.log)
    writer = writer_of(net, start, method, provenance) if step.leaves_adapter else None
    verify(net)
    facts = {"telemetry": spec.mean_telemetry(done.log), **({"selection": selected(chosen)} if chosen else {})}
    made = Made(method=step.method, provenance=provenance)
    after = start.after(merged(net), made, trained=trained, writer=writer)
    return Outcome(after, cost=cost, facts=facts, log=done.log)


def _identity(start: Model, rows: Mapping[str, EncodedSet], *, asis: bool) -> dict[str, str]:
    """Return digests of the rows and of the model a run begins with, ``asis`` where its caller may have changed it."""
    weights = {"weights": weights_digest(start.net)} if asis else {}
    return {"parent": start.digest, **weights, **{role: some.digest for role, some in rows.items()}}


def _settled(method: Any, train: TrainConfig) -> Any:
    """Return the method with its settings filled in that hang on the run, before they are recorded."""
    if settle := getattr(method, "settle", None):
        settle(train.steps, train.lr)
    return method


def _may_train(start: Model, out: Path | None) -> None:
    """Refuse what is no model to train, and to keep checkpoints of one that must stay in memory, or in a taken folder.

    Raises:
        Unsupported: a soft prompt stands in front of the model.
        Refused: the model was attacked.
        UserError: the folder holds a model or a run.
    """
    start.require_weights()
    if out is None:
        return
    if not start.may_leave:
        how = ", then ".join(start.attacked)
        raise Refused(
            f"this model was attacked ({how}) and is kept in memory: checkpoints in {out} would hold its weights",
            hint="leave out `out`",
        )
    if held := next((name for name in ("config.json", PROVENANCE, MANIFEST, "run.json") if (out / name).exists()), ""):
        raise UserError(f"{out} holds {held}: it is the folder of a model or a run", hint="an empty or new folder")


def _whole(net: Any, step: Finetune, start: Model, shared: bool) -> Any:
    """Return the trained model, gathered on rank 0 where several ranks share it; None on the others."""
    return load_gathered(net, start.path or Path(step.model)) if shared else net


def _piped(
    step: Finetune,
    rows: Examples,
    model: Model | None,
    *,
    place: Path | None,
    label: str,
    known: Sequence[Example] = (),
) -> Outcome:
    """Let a pipeline train or repair a copy of the model; without rows of role ``data`` it repairs.

    Args:
        known: rows that the model has been trained on.
    """
    start = step.start(model)
    start.require_weights()
    _unseen(step, rows)
    provenance = _provenance(step, dict(step.settings), {}, start)
    provenance[KEY] = sorted(frozenset(marks(*rows.values())) | start.trained_prompts)
    _rehearse(start, place, provenance, adapter=False)
    asked = load_suite(step.suite).examples if step.suite else ()
    inputs = PipelineInputs(
        rows=rows,
        train=step.train,
        known=[*known, *asked],
        seed=step.seed,
        system=step.system,
        max_length=step.max_length,
        label=label or step.method,
    )
    done = run_pipeline(step, start, inputs)
    made = Made(method=step.method, provenance=provenance)
    leaves = start.may_leave and done.may_leave
    after = start.after(done.net, made, trained=frozenset(marks(*rows.values())), may_leave=leaves)
    return Outcome(after, cost={**asdict(sum(done.budgets, Budget())), "seed": step.seed}, facts=dict(done.facts))


def repair(step: Finetune, attacked: Model, clean: Sequence[Example], known: Sequence[Example], label: str) -> Outcome:
    """Train an attacked model in memory, on rows of the step's own or, without any, on verified ones.

    Args:
        clean: verified rows: role ``clean`` of a pipeline, else what is trained on.
        known: rows that the attacked model was trained on.
    """
    rows = {"clean" if step.spec.pipeline else "data": clean, **step.examples()}
    if step.spec.pipeline:
        return _piped(step, rows, attacked, place=None, label=label, known=known)
    return finetune_on(step, rows, attacked, out=None, label=label)


def _checked(step: Finetune, rows: Examples, spec: DefenceSpec, method: Any) -> dict[str, Any]:
    """Return the rows by role; there are some to train on, none is a prompt of the suite, and the adapter fits."""
    given = method.config if method is not None else spec.configure(step.method, step.preset, step.settings)
    check_adapter(step, spec, given)
    roles = dict(rows)
    if not roles.get("data"):
        raise DataError("there are no rows to train on", hint="--data rows.jsonl")
    _unseen(step, roles)
    return roles


def _unseen(step: Finetune, rows: Examples) -> None:
    if step.suite:
        check_disjoint(rows, {step.suite: load_suite(step.suite).examples})


def _trained(step: Finetune, roles: Examples) -> frozenset[str]:
    """Return the marks of all prompts that an adapter has seen: those of the provider's adapters under it too."""
    own = frozenset(marks(*roles.values()))
    return own | trained_prompts(find_any(step.assets)) if step.assets else own


def _attackers(step: Finetune, method: Any, start: Model) -> AbstractContextManager[Any]:
    """Return what lets a method's simulated attacks run in processes of their own, where it asks for that."""
    bf16 = uses_bf16(step.train.precision, next(start.net.parameters()).device)
    return with_attackers(method, start.net, wanted=step.attackers, seed=step.seed, bf16=bf16)


def _rehearse(start: Model, place: Path | None, provenance: Mapping[str, Any], *, adapter: bool) -> None:
    """Try everything that saving in ``place`` needs, before the first step; nothing is left behind."""
    if place is None:
        return
    if adapter:
        require_own(place, str(provenance["config_digest"]))
        with scratch(place, needs=bytes_needed(start.net)):  # as much as the training's own checkpoint takes
            return
    beside = bytes_needed(start.net)
    rehearse(start.net, start.tokenizer, place, parent=start.digest, provenance=provenance, beside=beside)


def harden(step: Finetune, out: Path, *, label: str = "") -> tuple[Outcome, Model | None]:
    """Run a training step and save its model under ``out``/checkpoint, or ``out``/adapter; return (outcome, it).

    Of several ranks only number 0 saves, and the others get None.

    An interrupted run leaves ``out``/training; the same call continues from there. Once the model is saved that folder
    is removed, unless ``train.save_every`` asks for intermediate checkpoints by name.
    """
    training = out / "training"
    outcome = step.run(out=training, place=out / step.place, label=label)
    if outcome.model is None:
        return outcome, None
    made = save_model(outcome.model, out / step.place)
    if not step.train.save_every and training.exists():  # a pipeline keeps no checkpoints on the way
        remove(training)
    return outcome, made


def shared_by_ranks(spec: DefenceSpec, name: str) -> bool:
    """Return whether several ranks train one model; refuse what needs one process."""
    if world() == 1:
        return False
    if not spec.ranks:
        raise Unsupported(f"{name} on {world()} ranks", hint="start it without torchrun or accelerate launch")
    return True


def _provenance(
    step: Finetune, settings: Mapping[str, Any], rows: Mapping[str, EncodedSet], start: Model
) -> dict[str, Any]:
    return {
        "job": to_dict(step),
        "settings": dict(settings),
        "config_digest": digest(to_dict(step)),
        "data_digests": {role: encoded.digest for role, encoded in rows.items()},
        "seed": step.seed,
        **({ORIGIN: start.origin} if start.origin else {}),
    }


def _particular(method: Any, chosen: Any, assets: Mapping[str, str]) -> dict[str, Any]:
    """Return what the record holds only of some methods: the system prompt to serve with, chosen rows, assets."""
    return {
        **({SERVED: method.serving_system} if getattr(method, "serving_system", None) else {}),
        **({"selection": chosen} if chosen else {}),
        **{f"{key}_digest": found for key, found in assets.items()},
    }
