"""Merge two adapter folders into one, layer by layer: neither is ever whole in memory, and no base model is needed.

The folder made is a plain PEFT adapter (one rank, ``lora_alpha == r``, scales folded into the factors, no patterns)
with ``merge.json`` (what was merged from what, how, and what it did to every layer), a marker and a manifest. Equal
inputs give equal bytes. The mathematics is in ``maths/merge.py``.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from casehard import __version__
from casehard.errors import DataError, UserError
from casehard.io.files import read_json, staged
from casehard.io.manifest import verify
from casehard.maths.merge import LayerReport, LoraPair, MergeConfig, merge_layer, notes_of
from casehard.model.digest import folder_digest
from casehard.model.lora import attach
from casehard.model.lora_files import DIGESTS, AdapterReader, LayerShape, read_marker, refuse_buffer, write_marker
from casehard.model.lora_write import write_adapter
from casehard.model.source import is_snapshot

RECORD = "merge.json"
_INNER = "language_model."
_SAME = {"base_digest": "base model", "tokenizer_digest": "tokenizer", "template_digest": "chat template"}


class Merged(NamedTuple):
    """A merged adapter folder."""

    path: Path
    rank: int
    layers: int
    reports: dict[str, LayerReport]
    reinforce_weight: float | None
    """Weight at which the unmodified reinforcing adapter is served beside it (form ``absorb``); None: it is inside."""
    notes: tuple[str, ...]


def _check_roles(user: AdapterReader, reinforce: AdapterReader) -> dict[str, Any]:
    """Return what both adapters are bound to, or raise on the first thing they disagree about."""
    found: dict[str, Any] = {}
    for reader, expected, flag in ((user, "user", "--user"), (reinforce, "reinforce", "--reinforce")):
        role = (reader.marker or {}).get("role", expected)
        if role != expected:
            hint = "it is merged already" if role == "merged" else "were --user and --reinforce swapped?"
            raise UserError(f"{reader.folder}: given as {flag}, but marked as {role!r}", hint=hint)
    for key in DIGESTS:
        one, two = ((reader.marker or {}).get(key) for reader in (user, reinforce))
        if one and two and one != two:
            raise UserError(
                f"another {_SAME[key]}: {user.folder} was made for {one[:12]}, {reinforce.folder} for {two[:12]}",
                hint="train the user's adapter on the base, and in the chat format, that the assets were made for",
            )
        found[key] = one or two
    bare = [{name.replace(_INNER, "") for name in set(x.shapes) - set(y.shapes)} for x, y in _ways(user, reinforce)]
    if common := bare[0] & bare[1]:
        which = next(r for r in (user, reinforce) if any(_INNER in name for name in r.shapes))
        raise UserError(
            f"{which.folder}: {len(common)} layers of a multimodal model (language_model), which the other adapter "
            "has under their plain names",
            hint="both adapters must be for the same base model",
        )
    for name in sorted(set(user.shapes) & set(reinforce.shapes)):
        u, r = user.shapes[name], reinforce.shapes[name]
        if u[:2] != r[:2]:
            raise DataError(
                f"{name}: the user's update is {u.d_out} x {u.d_in}, the reinforcing one {r.d_out} x {r.d_in}",
                hint="both adapters must be for the same base model",
            )
    return found


def _ways(user: AdapterReader, reinforce: AdapterReader) -> tuple[tuple[AdapterReader, AdapterReader], ...]:
    return (user, reinforce), (reinforce, user)


def _plan(user: AdapterReader, reinforce: AdapterReader, config: MergeConfig) -> dict[str, LayerShape]:
    """Return the layers of the result with the rank each will have, sorted."""
    out = {}
    for name in sorted({*user.shapes, *reinforce.shapes}):
        u, r = user.shapes.get(name), reinforce.shapes.get(name)
        if u is None and config.form == "absorb":
            continue
        shape = u or r
        assert shape is not None
        rank = shape.rank + (r.rank if u and r and config.form == "concat" else 0)
        # What is cut may come out lower still, in layers with fewer features than that; zeros fill it up.
        out[name] = shape._replace(rank=rank if config.rank is None else min(rank, config.rank))
    return out


def _targets(readers: Collection[AdapterReader], layers: Collection[str]) -> set[str]:
    """Return what PEFT is to wrap: the adapters' own lists where these are plain, else the full names of the layers."""
    lists = []
    for reader in readers:
        given = reader.config.get("target_modules")
        narrowed = any(reader.config.get(key) for key in ("exclude_modules", "layers_to_transform", "layers_pattern"))
        if not isinstance(given, list) or narrowed:
            return set(layers)
        lists += given
    wanted = set(lists)
    fits = all(any(name == t or name.endswith(f".{t}") for t in wanted) for name in layers)
    return wanted if fits else set(layers)


def _stream(
    names: Collection[str],
    user: AdapterReader,
    reinforce: AdapterReader,
    config: MergeConfig,
    reports: dict[str, LayerReport],
) -> Iterator[tuple[str, LoraPair]]:
    for name in names:
        u = user.pair(name) if name in user.shapes else None
        r = reinforce.pair(name) if name in reinforce.shapes else None
        pair, report = merge_layer(u, r, config, name=name)
        assert pair is not None
        if report is not None:
            reports[name] = report
        yield name, pair


def _record(
    user: AdapterReader,
    reinforce: AdapterReader,
    config: MergeConfig,
    reports: Mapping[str, LayerReport],
    bound: Mapping[str, str | None],
) -> dict[str, Any]:
    """Return what ``merge.json`` says: contents by digest, never paths or times."""
    notes = list(notes_of(user.shapes, reinforce.shapes, reports, config))
    bases = sorted({str(x.config.get("base_model_name_or_path")) for x in (user, reinforce)})
    if len(bases) > 1 and not bound["base_digest"]:
        notes.append(f"the adapters name different bases ({', '.join(bases)}), and neither says which by digest")
    return {
        "format": 1,
        "casehard": __version__,
        "config": asdict(config),
        "user": folder_digest(user.folder),
        "reinforce": folder_digest(reinforce.folder),
        "reinforce_weight": config.c_reinforce if config.form == "absorb" else None,
        **bound,
        "user_only": sorted(set(user.shapes) - set(reinforce.shapes)),
        "reinforce_only": sorted(set(reinforce.shapes) - set(user.shapes)),
        "layers": {name: report._asdict() for name, report in reports.items()},
        "notes": notes,
    }


def merge_folders(
    user: Path | str,
    reinforce: Path | str,
    out: Path | str,
    config: MergeConfig,
    *,
    buffer_digests: Collection[str] = (),
) -> Merged:
    """Merge two PEFT adapter folders into a new one.

    Args:
        user: the tuned adapter.
        reinforce: the provider's; read, never changed.
        out: the folder to make; whole or absent.
        config: coefficients, basis, form.
        buffer_digests: digests of the provider's buffer tensors; an input that holds one is refused.

    Returns:
        What was made. With form ``absorb`` it works only beside the reinforcing adapter, see :func:`attach_absorbed`.

    Raises:
        UserError: a buffer, swapped roles, another base, tokenizer or chat template.
        DataError: shapes that do not fit.
        Unsupported: adapters that are not plain LoRA.
        Corrupt: damaged files.
        Diverged: the result is not finite.
        StorageError: the disk refused the write; nothing is left behind.
    """
    out = Path(out)
    for folder in (user, reinforce):
        refuse_buffer(folder, known=buffer_digests)
    if Path(user).resolve() == Path(reinforce).resolve():
        raise UserError(f"{user}: the same folder for both adapters")
    reports: dict[str, LayerReport] = {}
    with AdapterReader(user) as u, AdapterReader(reinforce) as r:
        bound = _check_roles(u, r)
        shapes = _plan(u, r, config)
        if not shapes:
            raise DataError("nothing to merge", hint="with form absorb the user's adapter must have layers")
        rank = max(shape.rank for shape in shapes.values())
        needs = sum(4 * rank * (shape.d_out + shape.d_in) for shape in shapes.values()) + (1 << 20)
        readers = (u, r) if config.form == "concat" else (u,)
        with staged(out, needs=needs) as folder:
            digests = write_adapter(
                folder,
                shapes,
                _stream(shapes, u, r, config, reports),
                rank=rank,
                target_modules=_targets(readers, shapes),
                base=u.config.get("base_model_name_or_path"),
                # Factors are the same either way; PEFT corrects what an adapter says of its layers when it is loaded.
                fan_in_fan_out=any(bool(reader.config.get("fan_in_fan_out")) for reader in (u, r)),
            )
            write_marker(folder, "merged", tensors_sha256=digests, **bound)
            record = _record(u, r, config, reports, bound) | {"rank": rank}
            (folder / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            refuse_buffer(folder, known=buffer_digests)  # before it is published
    return Merged(out, rank, len(shapes), reports, record["reinforce_weight"], tuple(record["notes"]))


def attach_absorbed(model: nn.Module, user: Path | str, reinforce: Path | str) -> nn.Module:
    """Attach a user's adapter of form ``absorb`` and the shared reinforcing adapter, at its recorded weight.

    Args:
        model: the base model; wrapped in place.
        user: folder made by :func:`merge_folders` with form ``absorb``.
        reinforce: the provider's adapter it was made for.

    Returns:
        The ``PeftModel``, in eval mode, both adapters active and frozen.

    Raises:
        UserError: not such a folder, or another reinforcing adapter than the one it was made for.
        Corrupt: the folder differs from its manifest.
    """
    from peft.tuners.lora import LoraLayer

    refuse_buffer(user)
    refuse_buffer(reinforce)
    record = read_json(Path(user) / RECORD)
    if (read_marker(user) or {}).get("role") != "merged" or record.get("reinforce_weight") is None:
        raise UserError(f"{user}: not made with form absorb", hint="load it with PEFT alone")
    if not is_snapshot(Path(user)):
        verify(Path(user))  # its correction and its weight are as little to be believed unchecked as the other's digest
    actual = folder_digest(reinforce)
    if record["reinforce"] != actual:
        raise UserError(
            f"{user} was made for the reinforcing adapter {record['reinforce'][:12]}, this is {actual[:12]}",
            hint="the correction in the user's adapter belongs to that one",
        )
    wrapped: Any = attach(attach(model, user, "user"), reinforce, "reinforce")
    wrapped.base_model.set_adapter(["user", "reinforce"], inference_mode=True)
    for module in wrapped.modules():
        if isinstance(module, LoraLayer) and "reinforce" in module.scaling:
            module.set_scale("reinforce", record["reinforce_weight"])
    wrapped.requires_grad_(False)
    ready: nn.Module = wrapped.eval()
    return ready
