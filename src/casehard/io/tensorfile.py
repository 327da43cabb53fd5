"""Named tensors in one safetensors file, for methods that must outlive a kill."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from casehard.errors import Corrupt
from casehard.io.files import replacing

if TYPE_CHECKING:
    import torch


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write tensors to ``path`` through a temporary file and a rename.

    Raises:
        StorageError: the disk refused the write; nothing is left behind.
    """
    from safetensors.torch import save_file

    needs = sum(t.numel() * t.element_size() for t in tensors.values())
    with replacing(path, needs=needs) as fresh:
        save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, fresh)
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
