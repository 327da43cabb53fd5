"""Pickled weights as safetensors: only tensors are taken out of a pickle, by torch's restricted reader."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from casehard.errors import Corrupt, Unsupported
from casehard.io.files import read_json
from casehard.model.check import check_folder
from casehard.model.digest import READ, TEMPLATES
from casehard.model.headers import one_line

_WHOLE, _INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ADAPTER = "adapter_model.bin"


def pickles_of(folder: Path) -> list[Path]:
    """Return the pickled weight files of a model or adapter folder, in order; maybe none.

    Raises:
        Corrupt: the index names a file that is missing or outside the folder.
    """
    for name in (_WHOLE, ADAPTER):
        if (folder / name).is_file():
            return [folder / name]
    index = folder / _INDEX
    if not index.is_file():
        return []
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise Corrupt(f"{index}: no weight_map")
    files = sorted(set(names.values()))
    for name in files:
        if name != Path(name).name or "\\" in name or "\0" in name or not (folder / name).is_file():
            raise Corrupt(f"{index}: {name!r} is not the name of a file in this folder", hint="fetch it again")
    return [folder / name for name in files]


def unpickle(folder: Path, into: Path) -> None:
    """Write the folder anew with safetensors weights.

    Args:
        folder: a model or adapter folder with pickled weights.
        into: an empty folder.

    Raises:
        Unsupported: the pickle holds anything but tensors by name.
        Corrupt: it cannot be read, or a tensor is in two files.
    """
    from safetensors.torch import save_file

    check_folder(folder, weights=False)
    for path in folder.iterdir():
        if path.name in READ and path.is_file():
            shutil.copyfile(path, into / path.name)
    if (folder / TEMPLATES).is_dir():
        shutil.copytree(folder / TEMPLATES, into / TEMPLATES)
    files = pickles_of(folder)
    places: dict[str, str] = {}
    seen: dict[tuple[int, int, tuple[int, ...]], str] = {}
    for number, file in enumerate(files, start=1):
        name = "adapter_model.safetensors" if file.name == ADAPTER else f"model-{number:05}.safetensors"
        tensors = {}
        for key, tensor in _tensors(file).items():
            if key in places:
                raise Corrupt(f"{folder}: the tensor {key} is in two files, the second is {file.name}")
            places[key] = name
            # safetensors has no shared storage: each name gets its own copy, as a tied head has in the pickle's file.
            tensors[key] = tensor.contiguous().clone() if _shared(tensor, key, seen) else tensor.contiguous()
        save_file(tensors, into / name, metadata={"format": "pt"})
    if files[0].name != ADAPTER:
        index = {"metadata": {}, "weight_map": places}
        (into / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _shared(tensor: torch.Tensor, key: str, seen: dict[tuple[int, int, tuple[int, ...]], str]) -> bool:
    storage = tensor.untyped_storage()
    if storage.nbytes() != tensor.numel() * tensor.element_size():
        return True
    place = (storage.data_ptr(), int(tensor.storage_offset()), tuple(tensor.shape))
    return seen.setdefault(place, key) != key


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except Exception as error:  # unpickling may fail in any way, and a refusal is one of them
        kind = Unsupported if "weights_only" in str(error) or "Unsupported" in str(error) else Corrupt
        raise kind(
            f"{file}: holds more than tensors, or is damaged: {one_line(error)}",
            hint="nothing of it was run; take safetensors weights, or convert it in an environment you trust",
        ) from None
    whole = isinstance(content, dict) and all(isinstance(key, str) for key in content)
    odd = next((key for key, value in content.items() if not isinstance(value, torch.Tensor)), "") if whole else ""
    if not whole or not content or odd:
        what = f"{odd!r} is no tensor" if odd else "it holds no tensors by name"
        raise Unsupported(f"{file}: {what}", hint="save the weights alone: model.save_pretrained()")
    return dict(content)


def _is_zip(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(2) == b"PK"
