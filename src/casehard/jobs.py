"""One function per verb, shared by the command line and the benchmark: defend, attack, evaluate.

Each takes a frozen job of plain values, so that it can be digested, stored and sent to another process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from casehard import secrets
from casehard.attack.finetune import FinetuneAttack, FinetuneResult, attack_data, finetune_attack
from casehard.config import digest, to_dict
from casehard.data.batches import EncodedSet
from casehard.data.chat import ChatFormat
from casehard.data.embed import Embedder
from casehard.data.mix import check_disjoint, is_marked, marks
from casehard.data.select import SelectConfig, manifest, select_examples
from casehard.data.sources import load_many
from casehard.defend import MethodSpec, find
from casehard.defend.provider_assets import RECORD, read_assets
from casehard.errors import ConfigError, DataError, Unsupported
from casehard.evaluate.suite import Suite, evaluate, load_suite
from casehard.evaluate.unseen import require_unseen, trained_prompts
from casehard.files import file_digest, remove
from casehard.maths.collective import world
from casehard.model.digest import folder_digest
from casehard.model.load import Loaded, load, load_gathered
from casehard.model.provenance import SERVED
from casehard.model.save import save
from casehard.parallel.launch import equipped, shards_wanted
from casehard.train.fit import fit
from casehard.train.recipe import TrainConfig, uses_bf16
from casehard.types import Checkpoint, Example

Rows = list[dict[str, Any]]
ROLES = {
    "unsafe": "restricted prompts with compliant answers",
    "retain": "harmless prompts with answers",
    "safe": "restricted prompts with refusals, and harmless rows",
}
"""Data roles of a method besides the rows it trains on, and what is in them."""


@dataclass(frozen=True, kw_only=True)
class DefendJob:
    """Harden one checkpoint."""

    model: str
    """Model folder or hub id."""
    method: str
    """Name in the catalogue of methods."""
    data: tuple[str, ...]
    """Rows trained on (for alignment-stage methods: restricted prompts with refusals, and harmless rows)."""
    unsafe: tuple[str, ...] = ()
    """Rows of the simulated attack (Patcher)."""
    retain: tuple[str, ...] = ()
    """Harmless rows of a retain term."""
    safe: tuple[str, ...] = ()
    """Safe rows of a defended fine-tuning: refusals and harmless rows (SPARD and its baselines)."""
    select: SelectConfig | None = None
    """Choose that many of the safe rows by the model's own embeddings; None takes them all."""
    assets: str = ""
    """Folder that the method reads what it prepared earlier from (adapters, another checkpoint)."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the method, over those of the preset."""
    preset: str = ""
    """Named settings of the method to start from; empty = its defaults."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The outer training loop."""
    attackers: int = 0
    """Patcher: attackers in processes of their own; 0 = as many as the settings list, where the schedule needs them."""
    suite: str = ""
    """Evaluation suite whose prompts must not occur in any training row; empty = not checked."""
    system: str | None = None
    """System message of every row; None keeps the template's own."""
    max_length: int | None = None
    """Longest row in tokens; None = the model's context."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU when there is one."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class AttackJob:
    """Attack one checkpoint in memory and measure it along the way."""

    model: str
    harmful: tuple[str, ...] = ()
    """Restricted prompts with compliant answers."""
    benign: tuple[str, ...] = ()
    """The attacker's cover rows."""
    suite: str
    """Suite measured at every checkpoint of the attack."""
    config: FinetuneAttack = field(default_factory=FinetuneAttack)
    full_at: tuple[int, ...] = ()
    """Attack steps at which the whole suite is measured; at the others only restricted prompts. Empty = the last."""
    system: str | None = None
    max_length: int | None = None
    limit: int | None = None
    """Measure at most this many prompts a group (a look, not a result)."""
    device: str = "auto"
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class TuneJob(AttackJob):
    """Tune one checkpoint on a customer's data, poisoned or not, with a defence inside the training run, in memory."""

    method: str = "plain"
    """Name in the catalogue of methods."""
    preset: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    unsafe: tuple[str, ...] = ()
    retain: tuple[str, ...] = ()
    safe: tuple[str, ...] = ()
    select: SelectConfig | None = None
    """Choose that many of the safe rows by the checkpoint's own embeddings; None takes them all."""
    assets: str = ""


@dataclass(frozen=True, kw_only=True)
class EvaluateJob:
    """Measure one checkpoint."""

    model: str
    suite: str
    system: str | None = None
    limit: int | None = None
    device: str = "auto"


@dataclass(frozen=True)
class DefendResult:
    """The hardened checkpoint, what it cost and everything that was logged.

    Of several ranks only number 0 knows the checkpoint's digest, and the whole log.
    """

    checkpoint: Checkpoint
    cost: dict[str, Any]
    log: list[dict[str, Any]]


@dataclass(frozen=True)
class TuneResult:
    """What a defended fine-tuning gave, and which safe rows it used when it chose them."""

    run: FinetuneResult
    selection: dict[str, Any] = field(default_factory=dict)
    assets_digest: str = ""
    """Digest of what the method read from its folder of assets; empty without."""


def _encode(loaded: Loaded, examples: Sequence[Example], system: str | None, max_length: int | None) -> EncodedSet:
    if max_length is not None and max_length < 1:
        raise ConfigError(f"max_length is {max_length}", hint="at least 1 token; leave it out for the model's context")
    limit = max_length or getattr(loaded.model.config, "max_position_embeddings", None)
    return ChatFormat(loaded.tokenizer, system=system, max_length=limit).encode_all(examples)


def _method(spec: MethodSpec, job: DefendJob | TuneJob, rows: Mapping[str, EncodedSet]) -> Any:
    """Build the method from preset, settings, encoded data roles and the folder of its assets."""
    roles: dict[str, Any] = dict(rows)
    if job.assets:
        roles["assets"] = Path(job.assets)
        if not roles["assets"].is_dir():
            raise DataError(f"no such folder of assets: {job.assets}", hint="--assets DIR")
    for need in spec.needs:
        if need not in roles:
            what = "a folder of assets" if need == "assets" else f"{need} rows"
            hint = "--assets DIR" if need == "assets" else f"--{need} FILE: {ROLES[need]}"
            raise ConfigError(f"method {job.method!r} needs {what} and got none", hint=hint)
    ignored = sorted(set(roles) - set(spec.takes))
    if ignored:
        what = "assets" if ignored[0] == "assets" else f"{ignored[0]} rows"
        raise DataError(f"method {job.method!r} would ignore the {what}", hint=f"leave out --{ignored[0]}")
    return spec.load()[0](spec.configure(job.method, job.preset, job.settings), **roles)


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


@contextmanager
def _guarded(method: Any, loaded: Loaded, system: str | None) -> Iterator[None]:
    """Check that the method fits the rows' format, and see that nothing of it stays attached if the run fails."""
    if callable(check := getattr(method, "check_format", None)):
        check(loaded.tokenizer, system=system)
    try:
        yield
    finally:
        if callable(release := getattr(method, "release", None)):
            release()


def _roles(job: DefendJob | TuneJob) -> dict[str, list[Example]]:
    """Load every data role of the job besides the rows trained on."""
    return {role: load_many(specs, require_response=True) for role in ROLES if (specs := getattr(job, role))}


def run_defend(job: DefendJob, out: str | Path, *, label: str = "") -> DefendResult:
    """Harden ``job.model`` and save the result under ``out``/checkpoint.

    An interrupted run leaves ``out``/training; the same call continues from there. Once the hardened model is saved
    that folder is removed, unless ``train.save_every`` asks for intermediate checkpoints by name.

    In a process group of several ranks all of them make the same call. The model is sharded over them (FSDP2), each has
    ``train.batch_size`` rows of a micro-batch, and rank 0 gathers and saves. An interrupted run goes on with as many.

    Raises:
        UserError: any setting, row or file is unusable; nothing half-written is left.
    """
    out = Path(out)
    secrets.refuse(to_dict(job), where="defend")  # before training: the provenance holds these values
    spec = find(job.method)
    together = _together(job)
    roles = {"data": load_many(job.data, require_response=True), **_roles(job)}
    if job.suite:
        check_disjoint(roles, {job.suite: load_suite(job.suite).examples})
    loaded = load(job.model, device=job.device, shards=shards_wanted(job.device))
    chosen = _choose(job.select, roles, roles["data"], loaded, job.seed)
    encoded = {role: _encode(loaded, rows, job.system, job.max_length) for role, rows in roles.items()}
    data = encoded.pop("data")
    method = _method(spec, job, encoded)
    assets = {"assets": assets_digest(job.assets)} if job.assets else {}
    training = out / "training"
    bf16 = uses_bf16(job.train.precision, next(loaded.model.parameters()).device)
    beside = equipped(method, loaded.model, wanted=job.attackers, seed=job.seed, bf16=bf16)
    with _guarded(method, loaded, job.system), beside:
        result = fit(
            loaded.model,
            loaded.tokenizer,
            data,
            config=job.train,
            method=method,
            seed=job.seed,
            out=training,
            identity={"parent": loaded.digest, **{role: rows.digest for role, rows in encoded.items()}, **assets},
            label=label or job.method,
        )
    model: Any = load_gathered(result.model, loaded.path) if together else result.model
    cost = {**asdict(result.budget), "seed": job.seed}
    if model is None:
        return DefendResult(Checkpoint(out / "checkpoint", "", loaded.digest, job.method), cost, result.log)
    whence = {"parent": loaded.digest, "method": job.method}
    checkpoint = save(
        model,
        loaded.tokenizer,
        out / "checkpoint",
        **whence,
        provenance={
            **_provenance(job, method, {"data": data, **encoded}),
            **({"assets_digest": assets["assets"]} if assets else {}),
            **({"selection": chosen} if chosen else {}),
            "trained_prompts": sorted(marks(*roles.values()) | trained_prompts(loaded.path)),
        },
    )
    if not job.train.save_every:
        remove(training)
    return DefendResult(checkpoint, cost, result.log)


def _provenance(job: DefendJob, method: Any, rows: Mapping[str, EncodedSet]) -> dict[str, Any]:
    return {
        "job": to_dict(job),
        "settings": to_dict(method.config),
        "config_digest": digest(to_dict(job)),
        "data_digests": {role: encoded.digest for role, encoded in rows.items()},
        "seed": job.seed,
        **({SERVED: method.serving_system} if getattr(method, "serving_system", None) else {}),
    }


def _together(job: DefendJob) -> bool:
    """Return whether several ranks harden one model; refuse what needs one process."""
    if world() == 1:
        return False
    if job.method != "patcher":
        raise Unsupported(f"{job.method} on {world()} ranks", hint="start it without torchrun or accelerate launch")
    return True


def run_attack(job: AttackJob, *, loaded: Loaded | None = None, label: str = "attack") -> FinetuneResult:
    """Attack a copy of ``job.model`` in memory; nothing of the attacked model is written.

    Raises:
        DataError: training and evaluation rows overlap, or the share asked for cannot be met.
    """
    return _train_and_measure(job, loaded, {}, None, label)


def run_tune(job: TuneJob, *, loaded: Loaded | None = None, label: str = "tune") -> TuneResult:
    """Tune a copy of ``job.model`` on the customer's data with a defence inside the run; nothing is written.

    Raises:
        DataError: training and evaluation rows overlap, a role is missing, or the share asked for cannot be met.
    """
    spec = find(job.method)
    roles = _roles(job)
    loaded = loaded or load(job.model, device=job.device)
    harmful, benign = (load_many(specs) if specs else [] for specs in (job.harmful, job.benign))
    user = attack_data(harmful, benign, job.config, seed=job.seed)
    chosen = _choose(job.select, roles, user, loaded, job.seed)
    encoded = {role: _encode(loaded, rows, job.system, job.max_length) for role, rows in roles.items()}
    method = _method(spec, job, encoded)
    assets = assets_digest(job.assets) if job.assets else ""
    with _guarded(method, loaded, job.system):
        result = _train_and_measure(job, loaded, roles, method, label)
    return TuneResult(result, chosen, assets)


def _choose(
    config: SelectConfig | None, roles: dict[str, list[Example]], user: Sequence[Example], loaded: Loaded, seed: int
) -> dict[str, Any]:
    """Leave in ``roles`` the safe rows picked by the untuned checkpoint's embeddings; return the record of it."""
    if config is None:
        return {}
    pool = roles.get("safe", [])
    if not pool:
        raise DataError("select: there are no safe rows to choose from", hint="--safe pool.jsonl")
    embedder = Embedder(loaded.model, loaded.tokenizer, loaded.digest)
    picks = select_examples(embedder, pool, user, config=config, seed=seed)
    roles["safe"] = [pool[i] for i in picks.order]
    return manifest(picks, pool, len(user), config=config, embedder=loaded.digest, seed=seed)


def _train_and_measure(
    job: AttackJob, loaded: Loaded | None, roles: Mapping[str, Sequence[Example]], method: Any, label: str
) -> FinetuneResult:
    harmful = load_many(job.harmful, require_response=True) if job.harmful else []
    benign = load_many(job.benign, require_response=True) if job.benign else []
    suite = load_suite(job.suite)
    check_disjoint({"harmful": harmful, "benign": benign, **roles}, {job.suite: suite.examples})
    loaded = loaded or load(job.model, device=job.device)
    require_unseen(suite, trained_prompts(loaded.path), loaded.path)
    full_at = job.full_at or (job.config.checkpoints[-1],)
    if odd := set(full_at) - set(job.config.checkpoints):
        raise ConfigError(f"full_at: step {min(odd)} is not evaluated", hint=f"one of {job.config.checkpoints}")
    # A method that protects by what is said at inference (PTST) is measured as it would be served.
    served = getattr(method, "serving_system", None)

    def measure(model: Any, step: int) -> Rows:
        only = None if step in full_at else {"restricted"}
        return _measure(model, loaded, suite, job.limit, served if served and step else job.system, only=only)

    result = finetune_attack(
        loaded.model,
        loaded.tokenizer,
        harmful,
        benign,
        job.config,
        seed=job.seed,
        evaluate=measure,
        system=job.system,
        max_length=job.max_length,
        method=method,
        label=label,
    )
    known = trained_prompts(loaded.path)
    return replace(result, known_rows=sum(is_marked(row, known) for row in (*harmful, *benign)))


def run_evaluate(job: EvaluateJob, *, loaded: Loaded | None = None) -> Rows:
    """Measure ``job.model`` on a suite: one row per prompt.

    Raises:
        DataError: the checkpoint was trained on a prompt of the suite.
    """
    loaded = loaded or load(job.model, device=job.device)
    suite = load_suite(job.suite)
    require_unseen(suite, trained_prompts(loaded.path), loaded.path)
    return _measure(loaded.model, loaded, suite, job.limit, job.system, only=None)


def _measure(
    model: Any, loaded: Loaded, suite: Suite, limit: int | None, system: str | None, *, only: set[str] | None
) -> Rows:
    return evaluate(model, loaded.tokenizer, suite, roles=only, limit=limit, system=system)
