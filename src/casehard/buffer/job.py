"""A customer's job at the provider: rows in, a standard PEFT adapter out, the buffer in nothing that is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from casehard import __version__, secrets
from casehard.buffer.assets import refuse_buffer_in
from casehard.config import digest, to_dict
from casehard.data.chat import ChatFormat
from casehard.data.mix import check_disjoint, marks
from casehard.data.sources import load_many
from casehard.defend import find
from casehard.defend.frozen_lora import live_pairs
from casehard.defend.provider_assets import Assets
from casehard.errors import ConfigError
from casehard.evaluate.suite import load_suite
from casehard.evaluate.unseen import KEY, trained_prompts
from casehard.files import remove, staged
from casehard.maths.lowrank import LoraPair
from casehard.model.adapters import add_lora
from casehard.model.load import load
from casehard.model.lora_files import LayerShape, write_adapter, write_marker
from casehard.seeds import derive
from casehard.stored import apart, read
from casehard.train.fit import fit
from casehard.train.recipe import TrainConfig

RECORD = "job.json"


@dataclass(frozen=True, kw_only=True)
class CustomerJob:
    """Tune one customer's rows."""

    model: str
    """The base the assets were made for."""
    assets: str
    """Folder of provider assets."""
    data: tuple[str, ...]
    """The customer's rows."""
    method: str = "buffer_reinforce"
    """A method that tunes an adapter beside the buffer: buffer_reinforce or security_vector."""
    preset: str = ""
    """Named settings of the method to start from; empty = its defaults."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the method, over those of the preset."""
    suite: str = ""
    """Evaluation suite whose prompts must not occur in the rows; empty = not checked."""
    train: TrainConfig = field(default_factory=TrainConfig)
    rank: int = 32
    """Rank of the customer's adapter. Source: paper."""
    alpha: float = 64.0
    """lora_alpha. Source: paper."""
    dropout: float = 0.0
    """Dropout of the customer's adapter (published code: 0.1)."""
    target: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Layers the customer's adapter is on."""
    system: str | None = None
    """System message of every row; the one of the assets."""
    max_length: int | None = None
    device: str = "auto"
    seed: int = 0


class CustomerResult(NamedTuple):
    """What the customer gets, and what it cost."""

    adapter: Path
    """PEFT adapter folder."""
    cost: dict[str, Any]
    log: list[dict[str, Any]]


def method_of(job: CustomerJob) -> Any:
    """Build the job's method on its assets, every file of which is verified.

    Raises:
        ConfigError: a method that does not tune an adapter beside a provider's, or unusable settings.
        UserError, Corrupt: the folder of assets is missing or damaged.
    """
    spec = find(job.method)
    if not spec.adapter:
        raise ConfigError(f"{job.method} is not a method that tunes an adapter", hint=f"casehard defend {job.method}")
    return spec.load()[0](spec.configure(job.method, job.preset, job.settings), assets=Path(job.assets))


def run_job(job: CustomerJob, out: Path | str, *, label: str = "tune") -> CustomerResult:
    """Tune beside the buffer, merge, and write ``out``/adapter; an interrupted job continues from ``out``/training.

    An adapter that this very job wrote before it was killed is written again.

    Raises:
        ConfigError: assets of another base, tokenizer, template or system message; or an adapter of something else is
            there.
        UserError: unusable rows; or a buffer in what was written, which is then removed.
    """
    secrets.refuse(to_dict(job), where=job.method)
    out = Path(out)
    _require_own(out / "adapter", job)
    method = method_of(job)
    rows = load_many(job.data, require_response=True)
    if job.suite:
        check_disjoint({"data": rows}, {job.suite: load_suite(job.suite).examples})
    loaded = load(job.model, device=job.device)
    method.check_format(loaded.tokenizer, system=job.system)
    limit = job.max_length or getattr(loaded.model.config, "max_position_embeddings", None)
    encoded = ChatFormat(loaded.tokenizer, system=job.system, max_length=limit).encode_all(rows)
    target = job.target if isinstance(job.target, str) else list(job.target)
    seed = derive(job.seed, 0, "customer-lora")  # no other adapter's first A
    model = add_lora(loaded.model, job.rank, job.alpha, target, job.dropout, seed=seed)
    training = out / "training"
    try:
        result = fit(
            model,
            loaded.tokenizer,
            encoded,
            config=job.train,
            method=method,
            seed=job.seed,
            out=training,
            identity={"parent": loaded.digest, "assets": method.assets.digest},
            label=label,
        )
    finally:
        method.release()
    record = {
        "job": to_dict(job),
        "settings": to_dict(method.config),
        "config_digest": digest(to_dict(job)),
        "base_digest": loaded.digest,
        "assets_digest": method.assets.digest,
        "data_digest": encoded.digest,
        KEY: sorted(marks(rows) | trained_prompts(loaded.path, method.assets.path)),
        "merged": getattr(method.config, "reinforce", False),
        "cost": apart(asdict(result.budget))[0],
        "casehard": __version__,
    }
    _export(out / "adapter", live_pairs(model), method.assets, record)
    if not job.train.save_every:
        remove(training)
    return CustomerResult(out / "adapter", {**asdict(result.budget), "seed": job.seed}, result.log)


@dataclass(frozen=True)
class _Record:
    """What is read of the record in an adapter folder."""

    config_digest: str


def _require_own(adapter: Path, job: CustomerJob) -> None:
    """Refuse to replace what another job, or somebody, put where the adapter goes."""
    record = adapter / RECORD
    if adapter.is_symlink() or (adapter.exists() and not record.is_file()):
        raise ConfigError(f"{adapter} already exists", hint="give another folder with --out")
    if adapter.exists() and read(record, _Record)["config_digest"] != digest(to_dict(job)):
        raise ConfigError(f"{adapter} is of another job", hint="give another folder with --out")


def _export(out: Path, pairs: Mapping[str, LoraPair], assets: Assets, record: dict[str, Any]) -> None:
    """Write a standard adapter, searched for the buffer before it is published."""
    ranks = {name: int(p.a.shape[0]) for name, p in pairs.items()}
    shapes = {name: LayerShape(int(p.b.shape[0]), int(p.a.shape[1]), ranks[name]) for name, p in pairs.items()}
    needs = sum(4 * (p.a.numel() + p.b.numel()) for p in pairs.values()) + (1 << 20)
    with staged(out, needs=needs) as folder:
        digests = write_adapter(folder, shapes, iter(pairs.items()), rank=max(ranks.values()), target_modules=pairs)
        write_marker(
            folder,
            "merged" if record["merged"] else "user",
            base_digest=record["base_digest"],
            tokenizer_digest=assets.record["tokenizer_digest"],
            template_digest=assets.record["template_digest"],
            tensors_sha256=digests,
        )
        (folder / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        refuse_buffer_in(folder, assets)  # before it is published
