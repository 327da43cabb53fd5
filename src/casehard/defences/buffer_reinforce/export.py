"""What leaves where a method tunes an adapter: a PEFT folder, searched for the buffer before it is published."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from casehard import __version__
from casehard.defences.buffer_reinforce.assets import Assets, tokenizer_digests
from casehard.defences.buffer_reinforce.frozen_lora import live_pairs
from casehard.defences.buffer_reinforce.publish import refuse_buffer_in
from casehard.errors import ConfigError
from casehard.io.files import staged
from casehard.io.stored import read
from casehard.model.lora_files import LayerShape, is_transposed, write_marker
from casehard.model.lora_write import write_adapter
from casehard.model.model import Model
from casehard.types import Checkpoint

RECORD = "job.json"


def adapter_writer(
    net: nn.Module, base: Model, method: Any, provenance: Mapping[str, Any]
) -> Callable[[Path], Checkpoint]:
    """Return the function that writes the tuned adapter of ``net`` as a PEFT folder with ``job.json`` and a marker.

    Args:
        net: a ``PeftModel`` with one adapter.
        base: the model it was tuned on.
        method: the method that tuned it; where it has provider ``assets``, nothing of their buffer may leave.
        provenance: JSON values.
    """
    assets: Assets | None = getattr(method, "assets", None)
    record = {
        **provenance,
        "base_digest": base.digest,
        "merged": bool(getattr(method.config, "reinforce", False)),
        "casehard": __version__,
    }

    def write(out: Path) -> Checkpoint:
        require_own(out, str(provenance["config_digest"]))
        return _write(out, net, base, assets, record)

    return write


@dataclass(frozen=True)
class _Record:
    """What is read of the record in an adapter folder."""

    config_digest: str


def require_own(adapter: Path, config_digest: str) -> None:
    """Refuse to replace what another run, or somebody, put where the adapter goes.

    Raises:
        ConfigError: it was not written by a run of the same settings.
    """
    record = adapter / RECORD
    if adapter.is_symlink() or (adapter.exists() and not record.is_file()):
        raise ConfigError(f"{adapter} already exists", hint="give another folder with --out")
    if adapter.exists() and read(record, _Record)["config_digest"] != config_digest:
        raise ConfigError(f"{adapter} is of another job", hint="give another folder with --out")


def _write(out: Path, net: nn.Module, base: Model, assets: Assets | None, record: Mapping[str, Any]) -> Checkpoint:
    pairs = live_pairs(net)
    ranks = {name: int(p.a.shape[0]) for name, p in pairs.items()}
    shapes = {name: LayerShape(int(p.b.shape[0]), int(p.a.shape[1]), ranks[name]) for name, p in pairs.items()}
    needs = sum(4 * (p.a.numel() + p.b.numel()) for p in pairs.values()) + (1 << 20)
    tokenizer, template = tokenizer_digests(base.tokenizer)
    options: dict[str, Any] = {"target_modules": pairs, "fan_in_fan_out": is_transposed(net)}
    with staged(out, needs=needs) as folder:
        digests = write_adapter(folder, shapes, iter(pairs.items()), rank=max(ranks.values()), **options)
        write_marker(
            folder,
            "merged" if record["merged"] else "user",
            base_digest=base.digest,
            tokenizer_digest=tokenizer,
            template_digest=template,
            tensors_sha256=digests,
        )
        (folder / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        if assets is not None:
            refuse_buffer_in(folder, assets)  # before it is published
    return Checkpoint(out, "", base.digest, "adapter")
