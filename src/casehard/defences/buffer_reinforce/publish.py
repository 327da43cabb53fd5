"""Write a folder of provider assets, and find a buffer that has got where it must not be."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from casehard.defences.buffer_reinforce.assets import BUFFER, FORMAT, RECORD, REINFORCE, Assets, read_assets
from casehard.errors import Corrupt, Unsupported, UserError
from casehard.io.files import scratch, staged
from casehard.maths.merge import LoraPair
from casehard.model.lora_files import LayerShape, plain_name, refuse_buffer, tensor_digest, write_marker
from casehard.model.lora_write import write_adapter

__all__ = ["Assets", "Leak", "read_assets", "refuse_buffer_in", "require_place", "scan_for_buffer", "write_assets"]

SAME = 0.99
"""Cosine above which two rows of a factor are the same direction; independent rows of width 32 stay below 0.8."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def require_place(out: Path) -> None:
    """Check that :func:`write_assets` could publish there, before hours of training.

    Raises:
        UserError: ``out`` is taken by something else.
        StorageError: it cannot be written to.
    """
    if out.is_symlink() or (
        out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / RECORD).exists()))
    ):
        raise UserError(f"{out} exists and holds no provider assets", hint="choose an empty or new folder")
    with scratch(out):
        pass


def write_assets(
    out: Path, buffer: Mapping[str, LoraPair], reinforce: Mapping[str, LoraPair], record: Mapping[str, Any]
) -> Assets:
    """Publish both adapters with their record, whole or not at all; the buffer is readable by its owner only.

    Args:
        out: the folder to make; an older one made by this function is replaced.
        buffer: layer name -> factors.
        reinforce: layer name -> factors.
        record: JSON values; needs base_digest, tokenizer_digest and template_digest.

    Raises:
        UserError: ``out`` is taken by something else.
        StorageError: the disk refused the write; nothing is left behind.
    """
    out = Path(out)
    require_place(out)
    adapters = {BUFFER: buffer, REINFORCE: reinforce}
    needs = sum(4 * (p.a.numel() + p.b.numel()) for pairs in adapters.values() for p in pairs.values()) + (1 << 20)
    binding = {key: record[key] for key in ("base_digest", "tokenizer_digest", "template_digest")}
    with staged(out, needs=needs) as folder:
        full: dict[str, Any] = {**record, "format": FORMAT}
        for role, pairs in adapters.items():
            inner = folder / role
            inner.mkdir(mode=0o700 if role == BUFFER else 0o755)  # before anything is in it
            digests = _write(inner, pairs)
            write_marker(inner, role, tensors_sha256=digests, **binding)
            full[f"{role}_sha256"] = digests
        for file in (folder / BUFFER).iterdir():
            file.chmod(0o600)
        text = json.dumps(full, indent=1, sort_keys=True) + "\n"
        (folder / RECORD).write_text(text, encoding="utf-8")
    return read_assets(out)


def _write(folder: Path, pairs: Mapping[str, LoraPair]) -> dict[str, str]:
    ranks = {name: int(p.a.shape[0]) for name, p in pairs.items()}
    shapes = {name: LayerShape(int(p.b.shape[0]), int(p.a.shape[1]), ranks[name]) for name, p in pairs.items()}
    targets = {name.rpartition(".")[2] for name in pairs}
    return write_adapter(folder, shapes, iter(pairs.items()), rank=max(ranks.values()), target_modules=targets)


class Leak(NamedTuple):
    """One place where a buffer was found."""

    file: Path
    tensor: str
    """Name of the tensor, or the empty string when the file's name or marker gives it away."""
    why: str


def scan_for_buffer(folder: Path | str, assets: Assets | Path | str | None = None) -> list[Leak]:
    """Look for a buffer in a folder: by marker and name, and with ``assets`` by content.

    By content means: a tensor of equal bytes under any name, and for tensors whose name ends in the layer's, most rows
    of A (columns of B) pointing the same way, so that a scaled, recast, stacked or permuted copy is found too. A buffer
    merged into full base weights is not.

    Args:
        folder: an adapter, a checkpoint, a run: everything below is read, optimiser state included.
        assets: the provider's assets; None looks at names and markers only.

    Returns:
        Everything suspicious, empty when clean.

    Raises:
        Unsupported: a pickle that holds more than tensors, which is never opened.
    """
    folder = Path(folder)
    found: list[Leak] = []
    try:
        refuse_buffer(folder)
    except Corrupt:
        raise
    except UserError as error:
        found.append(Leak(folder, "", error.message))
    if assets is None:
        return found
    buffer = (assets if isinstance(assets, Assets) else read_assets(assets)).buffer()
    known = {tensor_digest(f.to(kind)) for p in buffer.values() for f in (p.a, p.b) for kind in _KINDS}
    known |= {tensor_digest((p.b * p.scale).to(kind)) for p in buffer.values() for kind in _KINDS}
    for file, name, tensor in _tensors(folder):
        if tensor_digest(tensor) in known:
            found.append(Leak(file, name, "the bytes of a buffer tensor"))
        elif (layer := _layer_of(name, buffer)) and _same_directions(tensor, name, buffer[layer]):
            found.append(Leak(file, name, f"the directions of the buffer of {layer}"))
    return found


_KINDS = (torch.float32, torch.bfloat16, torch.float16)


def refuse_buffer_in(folder: Path | str, assets: Assets | Path | str | None = None) -> None:
    """Raise when :func:`scan_for_buffer` finds anything.

    Raises:
        UserError: names the first place.
    """
    found = scan_for_buffer(folder, assets)
    if found:
        first = found[0]
        raise UserError(
            f"{first.file}{': ' + first.tensor if first.tensor else ''}: {first.why}",
            hint="a buffer is a working jailbreak of its base: it never leaves the provider; remove this folder",
        )


def _layer_of(name: str, buffer: Mapping[str, LoraPair]) -> str | None:
    """Return the buffer's layer that a factor called ``name`` belongs to."""
    stem, mark, _ = plain_name(name).partition(".lora_")
    return next((layer for layer in buffer if mark and (stem == layer or stem.endswith(f".{layer}"))), None)


def _same_directions(tensor: torch.Tensor, name: str, pair: LoraPair) -> bool:
    mine = pair.a if ".lora_A" in name else pair.b.t()
    theirs = tensor.float() if ".lora_A" in name else tensor.float().t()
    if tensor.ndim != 2 or theirs.shape[-1] != mine.shape[-1]:
        return False
    mine = mine.float()[mine.norm(dim=1) > 0]
    if len(mine) == 0:
        return False
    cosines = torch.nn.functional.normalize(mine, dim=1) @ torch.nn.functional.normalize(theirs, dim=1).t()
    return float((cosines.abs().amax(1) > SAME).float().mean()) > 0.5


def _tensors(folder: Path) -> Iterator[tuple[Path, str, torch.Tensor]]:
    """Yield every tensor in the safetensors files and weights-only pickles below a folder."""
    from safetensors import safe_open

    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as handle:
                for name in sorted(handle.keys()):
                    yield file, name, handle.get_tensor(name)
        elif file.suffix in _PICKLES and not file.name.startswith("rng_state"):
            try:
                value = torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:  # torch raises many types for a file it will not open
                raise Unsupported(f"{file}: cannot be searched: {str(error).splitlines()[0][:160]}") from None
            yield from ((file, name, tensor) for name, tensor in _walk(value, ""))


def _walk(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _walk(item, f"{name}.{i}")
