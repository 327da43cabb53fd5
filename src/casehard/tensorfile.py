"""Named tensors in one safetensors file, for methods that must outlive a kill."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from casehard.errors import Corrupt
from casehard.files import fsync, storage_errors

if TYPE_CHECKING:
    import torch


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write tensors to ``path`` through a temporary file and a rename.

    Raises:
        StorageError: the disk refused the write; nothing is left behind.
    """
    from safetensors.torch import save_file

    partial = path.with_name(path.name + ".partial")
    needs = sum(t.numel() * t.element_size() for t in tensors.values())
    try:
        with storage_errors(path.parent, needs=needs):
            save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, partial)
            fsync(partial)
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def load_tensors(path: Path, *, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Read tensors written by :func:`save_tensors`.

    Raises:
        Corrupt: the file is missing or is not a complete safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device=str(device))
    except (FileNotFoundError, SafetensorError) as error:
        raise Corrupt(f"{path.name} cannot be read: {error}", hint="resume from an older checkpoint") from None
