"""Look at a model folder before anything of it is built or run: which files are there, and what the JSON asks for.

Three looks, each before the next needs what it found: the entries of the folder (plain files inside it, of bounded
size), the JSON files (nobody's code, no other files, values that cannot make a constructor run for ever), and, in
``headers.py``, whether ``config.json`` describes the tensors that are there. Each collects all problems it sees.
"""

from __future__ import annotations

import fnmatch
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from casehard.errors import Corrupt, DataError, Unsupported, UserError
from casehard.io.files import read_json
from casehard.model.digest import READ, TEMPLATES, weight_files

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_MIB = 1 << 20
# The largest of each kind on the Hub have about a tenth of this.
_SIZES = (("*.jinja", _MIB), ("*config.json", 16 * _MIB), ("*.index.json", 256 * _MIB))
_SIZE = 256 * _MIB
_DEPTH = 32
_GROWTH = 1000
"""Characters that a normalizer may make of one; what is published makes at most three."""
TOKENIZER = "tokenizer.json"

_CODE = "use a checkpoint of an architecture that transformers itself has"
_OTHERS = "put what they say into the usual file, and leave the key out"
# Keys that lead to code or to files that nothing here has looked at, what they do, and what to do.
_FOREIGN = {
    "auto_map": ("asks for code of its own ({key}), which is never run", _CODE),
    "use_kernels": ("asks for kernels from the Hub ({key}), which are code and never fetched", "leave the key out"),
    "kernel_config": ("asks for kernels from the Hub ({key}), which are code and never fetched", "leave the key out"),
    "fusion_config": ("asks for parts of the model to be exchanged ({key})", "leave the key out"),
    "transformers_weights": ("points to other weight files ({key})", "name them model.safetensors"),
    "configuration_files": ("points to other configurations ({key})", _OTHERS),
    "fast_tokenizer_files": ("points to other tokenizer files ({key})", _OTHERS),
}
_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal|_autoset)?")
# What a caller asks of a model for one call; a stored value breaks every caller that did not ask.
_OF_A_CALL = {"return_dict", "use_return_dict", "output_attentions", "output_hidden_states", "torchscript"}
# Counts that a constructor loops over or fills a table with.
_COUNTS = ((re.compile(r"(layers?|blocks|depth|experts)$"), 10_000), (re.compile(r"num_labels$"), 100_000))
_DROPOUT = re.compile(r"(drop|dropout|pdrop|layerdrop)(_p|_prob|_rate)?$")
_TABLES = ("id2label", "label2id", "quantization_config")
# Of the methods of transformers: those whose package is installed with pip, and that fetch no kernels from the Hub.
_QUANTISED = ("aqlm", "auto-round", "awq", "bitsandbytes", "compressed-tensors", "gptq", "hqq", "quanto", "torchao")


class Problem(NamedTuple):
    """Something that keeps a folder from being loaded."""

    kind: type[UserError]
    where: str
    """Name of the file, or the empty string for the folder itself."""
    text: str
    hint: str = ""


class Checked(NamedTuple):
    """What ``config.json`` says, without what is never used, and what the user should be told about that."""

    config: dict[str, Any]
    notes: tuple[str, ...] = ()


def refuse(folder: Path, problems: list[Problem]) -> None:
    """Raise one error that names all problems, of the first one's class; do nothing when there are none."""
    if not problems:
        return
    first = problems[0]
    if len(problems) == 1:
        raise first.kind(f"{folder / first.where}: {first.text}", hint=first.hint)
    told = [f"{p.where}: {p.text}" if p.where else p.text for p in problems]
    more = f"; and {len(told) - 5} more" if len(told) > 5 else ""
    hints = dict.fromkeys(p.hint for p in problems[:5] if p.hint)
    raise first.kind(f"{folder}: {len(told)} problems: {'; '.join(told[:5])}{more}", hint="; ".join(hints))


def check_folder(folder: Path, *, weights: bool = True) -> Checked:
    """Check that a model folder can be loaded without running anybody's code and without reading beyond it.

    Args:
        folder: an existing folder.
        weights: whether a model, not only a tokenizer, is wanted.

    Raises:
        Unsupported: code of its own, kernels from the Hub, pickled or GGUF weights only, an adapter.
        DataError: no ``config.json``, or values in it that no model has.
        Corrupt: links out of the folder, pipes, devices, unreadable JSON, a shard named outside the folder.
    """
    refuse(folder, list(_entries(folder)))
    read = {file.name: read_json(file) for file in sorted(folder.glob("*config.json")) if file.is_file()}
    refuse(folder, [problem for name, value in read.items() for problem in _json(name, value)])
    if (folder / TOKENIZER).is_file():
        refuse(folder, list(_tokenizer(read_json(folder / TOKENIZER))))
    if weights:
        _check_weights(folder)
    config = read.get("config.json", {})
    notes: dict[str, None] = {}
    return Checked(_clean(config, notes), tuple(notes))


# -- the entries of the folder --------------------------------------------------------------------------------------


def _entries(folder: Path) -> Iterator[Problem]:
    try:
        paths = sorted(folder.iterdir())
        if (folder / TEMPLATES).is_dir():
            paths += sorted((folder / TEMPLATES).iterdir())
    except OSError as error:
        yield Problem(DataError, "", f"cannot be read: {error.strerror}", "check the permissions of the folder")
        return
    for path in paths:
        name = path.relative_to(folder).as_posix()
        try:
            outside = path.is_symlink() and not _within(folder, path.resolve(strict=True))
            found = path.stat()
        except (OSError, RuntimeError):  # pathlib calls a circle of links a RuntimeError
            yield Problem(Corrupt, name, "a link that leads nowhere", "put the file itself there")
            continue
        if outside:
            hint = "such links are not followed: put the file itself there"
            yield Problem(Corrupt, name, "a link out of the folder", hint)
        elif stat.S_ISDIR(found.st_mode):
            if name in READ or name.endswith((".safetensors", ".jinja", "config.json")):
                yield Problem(Corrupt, name, "a folder, not a file")
        elif not stat.S_ISREG(found.st_mode):
            yield Problem(Corrupt, name, "not a plain file", "pipes and devices are never read")
        elif not os.access(path, os.R_OK):
            yield Problem(DataError, name, "cannot be read", "check the permissions of the file")
        elif found.st_size > (limit := _limit(name)):
            text = f"{found.st_size:,} bytes long; such a file has at most {limit:,}"
            yield Problem(DataError, name, text, "it is not what its name says")


def _within(folder: Path, target: Path) -> bool:
    """Return whether the target of a link belongs to the folder, or to its store in the cache of the Hub's client."""
    real = folder.resolve()
    if real.parent.name == "snapshots" and target.is_relative_to(real.parents[1] / "blobs"):
        return True
    return target.is_relative_to(real)


def _limit(name: str) -> float:
    base = name.rpartition("/")[2]
    known = next((size for pattern, size in _SIZES if fnmatch.fnmatch(base, pattern)), None)
    if known is not None:
        return known
    return _SIZE if base in READ or base.endswith(".json") else math.inf


def _check_weights(folder: Path) -> None:
    """Check that there is a model with safetensors weights, and nothing that would be loaded with or instead of it."""
    gguf = sorted(p.name for p in folder.glob("*.gguf"))
    if not (folder / "config.json").is_file():
        for place in (folder, folder / "adapter"):  # a run folder may hold one
            if (place / "adapter_config.json").is_file():
                hint = convert(place, "--base MODEL")
                raise Unsupported(f"{place}: a PEFT adapter without its base model", hint=hint)
        if gguf:
            text = f"{folder}: no .safetensors weights; only {', '.join(gguf[:3])}"
            raise Unsupported(text, hint=convert(folder / gguf[0]))
        raise DataError(f"{folder}: not a model folder, config.json is missing")
    there = weight_files(folder)
    if not there:
        pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
        seen = [*gguf, *pickles][:3]
        hint = "fetch the weights; where the Hub has them only as .bin or GGUF: casehard model import ID --out DIR"
        if pickles:
            hint = trusting(folder)
        elif gguf:
            hint = convert(folder / gguf[0])
        raise Unsupported(
            f"{folder}: no .safetensors weights" + (f"; only {', '.join(seen)}" if seen else ""), hint=hint
        )
    if not any((folder / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        raise Unsupported(
            f"{folder}: neither model.safetensors nor model.safetensors.index.json; only {there[0].name}",
            hint="fetch the index too, or save the model again with save_pretrained()",
        )


def refuse_file(path: str | Path) -> None:
    """Raise Unsupported when a path names a file of weights in a format that is not read; do nothing otherwise."""
    path = Path(path)
    if path.suffix in (".gguf", ".safetensors", *(p[1:] for p in _PICKLES)) and path.is_file():
        hint = convert(path) if path.suffix == ".gguf" else trusting(path.parent)
        if path.suffix == ".safetensors":
            hint = f"give its folder: {path.parent}"
        raise Unsupported(f"{path}: only folders with .safetensors weights are read", hint=hint)


def convert(what: Path, options: str = "") -> str:
    """Return the advice to make an ordinary folder of something else."""
    return f"convert it to safetensors: casehard model import {what}{options and ' '}{options} --out DIR"


def trusting(folder: Path) -> str:
    """Return the same advice for pickles."""
    return f"pickled weights can run code; where you trust them, {convert(folder, '--allow-pickle')}"


# -- what the JSON asks for -----------------------------------------------------------------------------------------


def _walk(value: Any, depth: int = 0) -> Iterator[tuple[str, Any, int]]:
    """Yield every key at any depth with its value and depth, down to one level more than is allowed."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key, item, depth
            if depth <= _DEPTH:
                yield from _walk(item, depth + 1)
    elif isinstance(value, list) and depth <= _DEPTH:
        for item in value:
            if isinstance(item, dict | list):
                yield "", item, depth
                yield from _walk(item, depth + 1)


def _json(name: str, value: Any) -> Iterator[Problem]:
    if not isinstance(value, dict):
        yield Problem(Corrupt, name, f"holds a {type(value).__name__}, not an object of settings", "fetch it again")
        return
    for key, item, depth in _walk(value):
        if depth > _DEPTH:
            yield Problem(DataError, name, f"nested more than {_DEPTH} levels deep", "it is not what its name says")
            return
        if key in _FOREIGN and item:
            text, hint = _FOREIGN[key]
            yield Problem(Unsupported, name, text.format(key=key), hint)
        elif ("implementation" in key or "kernel" in key) and (kernel := _slashed(item)):
            text = f"{key} is {kernel!r}, a kernel from the Hub: code, which is never fetched"
            yield Problem(Unsupported, name, text, "leave the key out")
    if name == "config.json":
        yield from _values(value)


def _tokenizer(value: Any) -> Iterator[Problem]:
    """Look for replacements that multiply a text: some of them in a row, and a word takes all memory there is."""
    growth = 1
    for key, item, depth in _walk(value.get("normalizer") if isinstance(value, dict) else None):
        if depth > _DEPTH:
            yield Problem(
                DataError, TOKENIZER, f"nested more than {_DEPTH} levels deep", "it is not what its name says"
            )
            return
        if key in ("content", "prepend") and isinstance(item, str):
            growth *= max(1, len(item))
    if growth > _GROWTH:
        text = f"its normalizer makes one character {growth:,} long"
        yield Problem(DataError, TOKENIZER, text, "no tokenizer needs more than a few; take it from the original")


def _slashed(value: Any) -> str | None:
    """Return a text inside a value that names a repository, or None."""
    if isinstance(value, str):
        return value if "/" in value else None
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return next((found for item in inner if (found := _slashed(item))), None)


def _values(config: dict[str, Any]) -> Iterator[Problem]:
    """Yield what would hang or crash a constructor, or the training later; the rest is the constructor's to refuse."""
    name = "config.json"
    plain = {key: value for key, value in config.items() if key not in _TABLES}
    for key, value, _ in _walk(plain):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if key in ("dtype", "torch_dtype") and value is not None and not _is_float(value):
            yield Problem(DataError, name, f"{key} is {shown(value)}", "float32, bfloat16 or float16")
        for pattern, most in _COUNTS:
            if whole and pattern.search(key) and abs(value) > most:
                yield Problem(DataError, name, f"{key} is {value}, more than {most:,}", "no model has as many")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and _DROPOUT.search(key) and not 0 <= value <= 1:
            yield Problem(DataError, name, f"{key} is {value}, not within 0..1", "0 switches it off")
    for held in (config, config.get("text_config")):
        settings = held.get("quantization_config") if isinstance(held, dict) else None
        if settings and (method := _method(settings)) not in _QUANTISED:
            text = f"quantised with {method!r}, which cannot be loaded without kernels from elsewhere"
            yield Problem(
                Unsupported, name, text, "take the original weights, or dequantise it in an environment you trust"
            )


def _method(settings: Any) -> str:
    """Return the name of the quantisation that a ``quantization_config`` asks for."""
    if not isinstance(settings, dict):
        return str(settings)[:40]
    old = settings.get("load_in_4bit") or settings.get("load_in_8bit")
    return str(settings.get("quant_method") or ("bitsandbytes" if old else "an unnamed method"))


def _is_float(value: Any) -> bool:
    import torch

    found = getattr(torch, value, None) if isinstance(value, str) else None
    return isinstance(found, torch.dtype) and found.is_floating_point and found.itemsize >= 2


def shown(value: Any) -> str:
    """Return a value as Python writes it, cut short."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _clean(value: Any, notes: dict[str, None]) -> Any:
    """Return a configuration without what is never used; ``notes`` gets what the user should know of it."""
    if isinstance(value, list):
        return [_clean(item, notes) for item in value]
    if not isinstance(value, dict):
        return value
    out: dict[str, Any] = {}
    for key, item in value.items():
        if _IMPLEMENTATION.fullmatch(key):
            if isinstance(item, str) and item not in ("eager", "sdpa"):
                notes[f"config.json: {key} {item!r} is not used; casehard chooses it"] = None
        elif key in _OF_A_CALL:
            if item is not None and item is not (key == "return_dict"):
                notes[f"config.json: {key} {shown(item)} is not used"] = None
        elif key.endswith("_token_id") and isinstance(item, int) and item < 0:
            notes[f"config.json: {key} is {item}: there is no such token, and none is used"] = None
            out[key] = None
        else:
            out[key] = _clean(item, notes)
    return out
