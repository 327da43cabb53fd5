"""The provider's two adapters as a defence reads them: verified, and bound to one base, tokenizer and template.

    ASSETS/assets.json     what it was made from and for, seeds, digests, gates
    ASSETS/buffer/         PEFT adapter, role buffer: a working jailbreak of the base, readable by its owner only
    ASSETS/reinforce/      PEFT adapter, role reinforce: servable

``casehard.defences.buffer_reinforce.prepare`` makes the folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from casehard.defences.buffer_reinforce.frozen_lora import fingerprints
from casehard.errors import ConfigError, Corrupt, Unsupported, UserError
from casehard.io.manifest import verify
from casehard.io.stored import read
from casehard.maths.merge import LoraPair
from casehard.model.digest import tokenizer_digests
from casehard.model.lora_files import load_pairs, read_marker
from casehard.model.source import hub_model, is_snapshot

RECORD = "assets.json"
BUFFER, REINFORCE = "buffer", "reinforce"
FORMAT = 1


@dataclass(frozen=True)
class Assets:
    """A verified folder of provider assets."""

    path: Path
    record: Mapping[str, Any]
    """Contents of ``assets.json``."""

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of both adapters' tensors and of the base they belong to."""
        parts = [self.record[key] for key in ("base_digest", "buffer_sha256", "reinforce_sha256")]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def buffer(self) -> dict[str, LoraPair]:
        """Read BufferLoRA: layer -> factors."""
        return load_pairs(self.path / BUFFER)

    def reinforce(self) -> dict[str, LoraPair]:
        """Read ReinforceLoRA: layer -> factors."""
        return load_pairs(self.path / REINFORCE)

    def require_base(self, model: nn.Module) -> None:
        """Check that ``model``, seen through its adapters, is the base these assets were made for.

        Raises:
            ConfigError: another architecture, or other weights; names the first difference.
        """
        wanted: Mapping[str, str] = self.record["base_fingerprints"]
        found = fingerprints(model)
        common = [name for name in wanted if name in found]
        hint = "prepare assets for this base, or tune the base they were made for"
        if not common:
            raise ConfigError(f"{self.path}: made for another architecture than this model", hint=hint)
        changed = [name for name in common if wanted[name] != found[name]]
        if changed:
            raise ConfigError(
                f"{self.path}: made for another base: {len(changed)} of {len(common)} tensors differ, "
                f"first {changed[0]}",
                hint=hint,
            )

    def require_format(self, tokenizer: Any, *, system: str | None = None) -> None:
        """Check that rows would be rendered as they were for these assets.

        Raises:
            ConfigError: another tokenizer, chat template or system message.
        """
        for what, value in zip(("tokenizer", "template"), tokenizer_digests(tokenizer), strict=True):
            if self.record[f"{what}_digest"] != value:
                raise ConfigError(
                    f"{self.path}: made with another {what}",
                    hint="a buffer is only known to work in the chat format it was trained in: prepare assets with it",
                )
        if self.record["system"] != system:
            raise ConfigError(
                f"{self.path}: made with the system message {self.record['system']!r}, not {system!r}",
                hint="give the same system message",
            )


@dataclass(frozen=True)
class _Look:
    """How well a base, with the buffer or without, already fits harmful rows."""

    residual: float
    nll: float


@dataclass(frozen=True)
class _Reference:
    """What a job's rows are compared with."""

    base: _Look
    buffer: _Look


@dataclass(frozen=True)
class _Record:
    """What is read of the record of assets."""

    format: int
    base_digest: str
    base_fingerprints: dict[str, str]
    tokenizer_digest: str
    template_digest: str
    system: str | None
    buffer_sha256: dict[str, str]
    reinforce_sha256: dict[str, str]
    reference: _Reference | None = None


def refuse_fetched(given: Path | str) -> None:
    """Raise Unsupported when provider assets are meant to come from a Hub, ``given`` being a Hub id or a snapshot."""
    if is_snapshot(Path(given)) or (not Path(given).is_dir() and hub_model(given)):
        hint = "download the folder with the tool of your storage and give that; a reinforcing adapter may be a Hub id"
        what = "provider assets hold a buffer, a jailbreak of the base, and are no Hub model"
        raise Unsupported(f"{given}: {what}", hint=hint)


def read_assets(path: Path | str) -> Assets:
    """Open a folder of assets and verify every file of it.

    Raises:
        UserError: no such folder, or not a folder of assets.
        Unsupported: a Hub id, or what was fetched from there.
        Corrupt: a file differs from the manifest, or an adapter from its role.
    """
    refuse_fetched(path)
    path = Path(path)
    if not (path / RECORD).is_file():
        raise UserError(f"{path}: no {RECORD}", hint="make assets with: casehard buffer prepare --out DIR")
    verify(path)
    record = read(path / RECORD, _Record)
    if record["format"] != FORMAT:
        raise Corrupt(f"{path / RECORD}: not a record of provider assets of format {FORMAT}")
    for role in (BUFFER, REINFORCE):
        marker = read_marker(path / role)
        if marker is None or marker["role"] != role:
            raise Corrupt(f"{path / role}: not marked as {role}", hint="prepare the assets again")
        if marker["tensors_sha256"] != record[f"{role}_sha256"]:
            raise Corrupt(f"{path / role}: its tensors are not those of {RECORD}", hint="prepare the assets again")
    return Assets(path, record)
