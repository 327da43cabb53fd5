"""Save a model as an ordinary Hugging Face folder with provenance and a manifest, whole or not at all.

Beside the usual files the folder holds ``casehard.json`` (content digest, digest of the parent, method, provenance,
versions) and ``manifest.json`` (SHA-256 of every file). No pickles, no tokens, no times: equal models give equal bytes.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from casehard import __version__
from casehard.compat import version_of
from casehard.data.formats import check_values
from casehard.errors import Corrupt, Diverged, StorageError, Unsupported, UserError
from casehard.io.files import crash_point, read_json, scratch, staged
from casehard.io.manifest import verify
from casehard.io.secrets import redact
from casehard.model.digest import folder_digest
from casehard.model.generation import mend_generation
from casehard.model.headers import one_line
from casehard.model.load import check_finite, quiet
from casehard.model.lora_files import refuse_buffer
from casehard.model.provenance import PROVENANCE
from casehard.model.provenance import read_provenance as read_provenance
from casehard.types import Checkpoint

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_LOCAL = ("name_or_path", "_name_or_path", "is_local", "local_files_only")  # say where, not what


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_no_pickles(folder: Path) -> None:
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.suffix in _PICKLES:
            raise Unsupported(f"{path.name}: a pickle would leave with the model", hint="save as safetensors only")


def _without_secrets(provenance: dict[str, Any]) -> Any:
    plain = json.loads(json.dumps(provenance))  # as it will be written: tuples are lists there
    clean = redact(plain)
    if clean != plain:
        warnings.warn(f"a secret was blanked in {PROVENANCE}", stacklevel=3)
    return clean


def _check_target(out: Path, parent: str) -> None:
    if blocked := next((part for part in out.parents if part.exists() and not part.is_dir()), None):
        raise StorageError(f"cannot write to {blocked}: Not a directory", hint=f"{out}: choose another place")
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not out.is_dir():
        raise UserError(f"{out} exists and is not a folder", hint="choose another place")
    if not any(out.iterdir()):
        return
    if not (out / PROVENANCE).is_file():
        raise UserError(f"{out} exists and was not made by casehard", hint="choose an empty or new folder")
    if parent and read_provenance(out)["digest"] == parent:
        raise UserError(f"{out} is the model this one was made from", hint="choose another folder")


def _check_finite(model: nn.Module, what: str) -> None:
    stored = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in stored and not bool(buffer.isfinite().all()):
            raise Diverged(f"{what}: the buffer {name} holds NaN or Inf", hint="nothing was written")
    try:
        check_finite(model, what)
    except Corrupt as error:
        raise Diverged(error.message, hint="training diverged; nothing was written") from None


def _versions() -> dict[str, str]:
    return {"casehard": __version__, **{name: version_of(name) for name in ("torch", "transformers")}}


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters()) + (1 << 20)


def _beside(tokenizer: Any, folder: Path) -> None:
    """Write what stands beside the weights, without where it came from."""
    tokenizer.save_pretrained(folder)
    for file in (folder / "config.json", folder / "tokenizer_config.json"):
        if file.is_file():
            _write_json(file, {k: v for k, v in read_json(file).items() if k not in _LOCAL})
    _check_no_pickles(folder)


def rehearse(
    model: nn.Module, tokenizer: Any, out: Path, *, parent: str, provenance: Mapping[str, Any], beside: int = 0
) -> None:
    """Try all of :func:`save` but the weights, before they are worth anything; nothing is left behind.

    Args:
        model: as it will be saved, before any adapter is put on it.
        tokenizer: saved beside it.
        out: where it will be saved.
        parent: content digest of the checkpoint it is made from.
        provenance: as it will be recorded, as far as known.
        beside: bytes that will lie on the same disk by then (checkpoints of the training).

    Raises:
        UserError: ``out`` is taken.
        StorageError: it cannot be written to, or the disk has too little space.
        Unsupported: something that cannot be saved; says what.
    """
    out = Path(out)
    check_values(dict(provenance), "provenance")
    _check_target(out, parent)
    whole: Any = model
    with scratch(out, needs=_bytes(model) + beside) as folder:
        try:
            with quiet():
                whole.config.save_pretrained(folder)
                if whole.can_generate():
                    whole.generation_config.save_pretrained(folder)
            _beside(tokenizer, folder)
        except (UserError, OSError):
            raise
        except Exception as error:  # checks of some hundred classes, each with its own ways
            raise Unsupported(
                f"the model could not be saved once it is trained: {one_line(error)}",
                hint="mend config.json, generation_config.json or the tokenizer of the model; nothing was trained yet",
            ) from None


def save(
    model: nn.Module,
    tokenizer: Any,
    out: Path,
    *,
    parent: str,
    method: str,
    provenance: Mapping[str, Any],
    check: Callable[[Path], Mapping[str, Any]] | None = None,
) -> Checkpoint:
    """Save a model, its tokenizer and where it came from.

    Args:
        model: a ``PreTrainedModel``; adapters must have been merged.
        tokenizer: saved beside it.
        out: the folder to make; an older checkpoint of ours there is replaced, anything else is refused.
        parent: content digest of the checkpoint it was made from, or the empty string.
        method: name of the method that made it.
        provenance: JSON values: configuration, data digests, seed. A secret of the environment in it is blanked, with a
            warning: a trained model is not given up for it. ``casehard.io.secrets.refuse`` finds it beforehand.
        check: looks at the written files before they have a record or a name; it may add some of its own, what it
            returns is added to the provenance, and what it raises leaves nothing behind.

    Returns:
        The checkpoint, verified on disk.

    Raises:
        Diverged: weights that are not finite.
        Unsupported: adapters that are not merged.
        UserError: ``out`` is taken, or a buffer adapter would leave with the model.
        StorageError: the disk refused the write; nothing is left behind.
    """
    if hasattr(model, "peft_config"):
        raise Unsupported("the model still has adapters", hint="merge them first: model.merge_and_unload()")
    out = Path(out)
    provenance = dict(provenance)
    check_values(provenance, "provenance")
    clean = _without_secrets(provenance)
    _check_target(out, parent)
    _check_finite(model, f"model to be saved to {out}")
    for note in mend_generation(model):
        warnings.warn(note, stacklevel=2)
    saver: Any = model
    with staged(out, needs=_bytes(model)) as folder:
        with quiet():
            saver.save_pretrained(folder)
        crash_point("save:after_weights")
        _beside(tokenizer, folder)
        if check is not None:
            clean = {**clean, **_without_secrets(dict(check(folder)))}
        digest = folder_digest(folder)
        record = {"digest": digest, "parent": parent, "method": method, "provenance": clean}
        _write_json(folder / PROVENANCE, record | {"format": 1, "versions": _versions()})
        refuse_buffer(folder)
    verify(out)
    return Checkpoint(out, digest, parent, method)
