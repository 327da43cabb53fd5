"""GGUF files, dequantised through transformers; the only file that imports ``gguf``."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from casehard.errors import Corrupt, DataError, MissingExtra, Unsupported
from casehard.model.gguf_header import check_tensors, read_header
from casehard.model.headers import one_line
from casehard.model.load import quiet

_BLOCK = re.compile(r"blk\.(\d+)\.")


class Facts(NamedTuple):
    """What a GGUF file says about itself."""

    name: str
    licence: str
    kinds: tuple[str, ...]
    """How its tensors are stored: ``Q4_1``, ``F32``."""


class Read(NamedTuple):
    """A GGUF file as an ordinary model in float32."""

    net: nn.Module
    tokenizer: Any
    facts: Facts


def read_gguf(file: Path) -> Read:
    """Read a GGUF file into an ordinary model of transformers, in eval mode.

    Raises:
        MissingExtra: ``gguf`` is not installed.
        Corrupt: not a GGUF file, cut short, or without some of the model's tensors.
        Unsupported: an architecture that transformers does not read from GGUF, or one part of several.
    """
    facts = _facts(file)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read: Any = AutoModelForCausalLM.from_pretrained
    where: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False, "local_files_only": True}
    try:
        # The reader draws a bar of its own, past every switch that transformers has for bars.
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            loaded, info = read(
                file.parent, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **where
            )
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    except Exception as error:  # readers of some dozen architectures, each with its own ways
        hint = "take the original weights from the Hub, or another conversion"
        raise Unsupported(f"{file}: cannot be read as a causal language model: {one_line(error)}", hint=hint) from None
    for kind in ("missing_keys", "mismatched_keys"):
        if info[kind]:
            first = min(key if isinstance(key, str) else str(key[0]) for key in info[kind])
            hint = "such tensors would be filled with random numbers; fetch the file again"
            raise Corrupt(f"{file}: {len(info[kind])} {kind.replace('_', ' ')}, first {first}", hint=hint)
    return Read(_fresh(loaded), tokenizer, facts)


def _facts(file: Path) -> Facts:
    """Look at what stands before the tensors."""
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError:
        raise MissingExtra("gguf", "gguf", purpose="reading GGUF files") from None
    header = read_header(file)
    check_tensors(file, header, {int(kind): layout for kind, layout in GGML_QUANT_SIZES.items()})
    names = {int(kind): kind.name for kind in GGML_QUANT_SIZES}
    said = header.values
    if int(said.get("split.count") or 0) > 1:
        hint = "join the parts first: llama-gguf-split --merge"
        raise Unsupported(f"{file}: one of {said['split.count']} parts of a model", hint=hint)
    if not header.tensors:
        raise DataError(f"{file}: holds no tensors, only a vocabulary or settings", hint="take the file of the weights")
    wanted = said.get(f"{said.get('general.architecture')}.block_count")
    found = {int(block[1]) for tensor in header.tensors if (block := _BLOCK.match(tensor.name))}
    if wanted is not None and found and found != set(range(int(wanted))):
        text = f"{file}: says that it has {wanted} layers, and holds tensors of {len(found)}"
        raise Corrupt(text, hint="fetch it again")
    kinds = tuple(sorted({names[tensor.kind] for tensor in header.tensors}))
    return Facts(str(said.get("general.name") or ""), str(said.get("general.license") or ""), kinds)


def _fresh(loaded: Any) -> nn.Module:
    """Return an ordinary model with the weights of a dequantised one, which cannot be saved."""
    from transformers import AutoModelForCausalLM

    config = loaded.config
    vars(config).pop("quantization_config", None)
    make: Any = AutoModelForCausalLM.from_config
    with torch.random.fork_rng(devices=[]), quiet():
        fresh = make(config, dtype=torch.float32, attn_implementation="eager")
    fresh.load_state_dict(loaded.state_dict(), assign=True)
    fresh.tie_weights()
    made: nn.Module = fresh.eval()
    return made
