"""Save a model as an ordinary Hugging Face folder with provenance and a manifest, whole or not at all.

Beside the usual files the folder holds ``casehard.json`` (content digest, digest of the parent, method, provenance,
versions) and ``manifest.json`` (SHA-256 of every file). No pickles, no tokens, no times: equal models give equal bytes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from casehard import __version__
from casehard.data.formats import check_values
from casehard.errors import Corrupt, Diverged, Unsupported, UserError
from casehard.files import MANIFEST, crash_point, staged, verify
from casehard.model.digest import folder_digest, read_json
from casehard.model.load import check_finite, quiet
from casehard.types import Checkpoint

PROVENANCE = "casehard.json"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_SECRET_NAME = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)S?$", re.IGNORECASE)
_LOCAL = ("name_or_path", "_name_or_path", "is_local", "local_files_only")  # say where, not what


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_clean(folder: Path) -> None:
    """Refuse pickles, and any text file that holds a secret of this process's environment."""
    secrets = [
        (name, value.encode()) for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= 8
    ]
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.suffix in _PICKLES:
            raise Unsupported(f"{path.name}: a pickle would leave with the model", hint="save as safetensors only")
        if path.suffix == ".safetensors":
            continue
        content = path.read_bytes()
        for name, value in secrets:
            if value in content:
                raise UserError(
                    f"{path.name} would hold the value of the environment variable {name}",
                    hint="remove the secret from the configuration",
                )


def _check_target(out: Path, parent: str) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not out.is_dir():
        raise UserError(f"{out} exists and is not a folder", hint="choose another place")
    if not any(out.iterdir()):
        return
    if not (out / PROVENANCE).is_file():
        raise UserError(f"{out} exists and was not made by casehard", hint="choose an empty or new folder")
    if parent and read_json(out / PROVENANCE).get("digest") == parent:
        raise UserError(f"{out} is the model this one was made from", hint="choose another folder")


def _versions() -> dict[str, str]:
    return {"casehard": __version__, **{name: version(name) for name in ("torch", "transformers")}}


def save(
    model: nn.Module,
    tokenizer: Any,
    out: Path,
    *,
    parent: str,
    method: str,
    provenance: Mapping[str, Any],
) -> Checkpoint:
    """Save a model, its tokenizer and where it came from.

    Args:
        model: a ``PreTrainedModel``; adapters must have been merged.
        tokenizer: saved beside it.
        out: the folder to make; an older checkpoint of ours there is replaced, anything else is refused.
        parent: content digest of the checkpoint it was made from, or the empty string.
        method: name of the method that made it.
        provenance: JSON values: configuration, data digests, seed.

    Returns:
        The checkpoint, verified on disk.

    Raises:
        Diverged: weights that are not finite.
        Unsupported: adapters that are not merged.
        UserError: ``out`` is taken, or the provenance holds a secret.
        StorageError: the disk refused the write; nothing is left behind.
    """
    if hasattr(model, "peft_config"):
        raise Unsupported("the model still has adapters", hint="merge them first: casehard.model.adapters.merge")
    out = Path(out)
    provenance = dict(provenance)
    check_values(provenance, "provenance")
    _check_target(out, parent)
    try:
        check_finite(model, f"model to be saved to {out}")
    except Corrupt as error:
        raise Diverged(error.message, hint="training diverged; nothing was written") from None
    needs = sum(p.numel() * p.element_size() for p in model.parameters()) + (1 << 20)
    saver: Any = model
    with staged(out, needs=needs) as folder:
        with quiet():
            saver.save_pretrained(folder)
        crash_point("save:after_weights")
        tokenizer.save_pretrained(folder)
        for file in (folder / "config.json", folder / "tokenizer_config.json"):
            if file.is_file():
                _write_json(file, {k: v for k, v in read_json(file).items() if k not in _LOCAL})
        digest = folder_digest(folder)
        record = {"digest": digest, "parent": parent, "method": method, "provenance": provenance}
        _write_json(folder / PROVENANCE, record | {"format": 1, "versions": _versions()})
        _check_clean(folder)
    verify(out)
    return Checkpoint(out, digest, parent, method)


def read_provenance(path: str | Path) -> dict[str, Any]:
    """Return what :func:`save` recorded in ``casehard.json``; empty for a folder of other origin.

    Raises:
        Corrupt: the file is not what :func:`save` writes.
    """
    file = Path(path) / PROVENANCE
    if not file.is_file():
        return {}
    record = read_json(file)
    texts = ("digest", "parent", "method")
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in texts):
        raise Corrupt(f"{file}: digest, parent or method is missing")
    return record


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read what a model folder is, after checking every byte of it.

    A folder of other origin (no ``casehard.json``, no manifest) is digested and has no parent.

    Raises:
        UserError: no such folder.
        Corrupt: a file differs from the manifest, or the weights from the recorded digest.
        Unsupported: no safetensors weights.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"no such model folder: {folder}")
    record = read_provenance(folder)
    if record or (folder / MANIFEST).exists():
        verify(folder)
    digest = folder_digest(folder)
    if record and record["digest"] != digest:
        raise Corrupt(
            f"{folder}: {PROVENANCE} records the content digest {record['digest']}, actual {digest}",
            hint="weights or provenance were exchanged",
        )
    return Checkpoint(folder, digest, record.get("parent", ""), record.get("method", ""))
