"""Whether ``config.json`` describes the tensors of a model folder, from the headers of the weight files alone.

The model is laid out without memory (on torch's meta device) and compared with names, shapes and dtypes in the headers,
before any byte of a weight is read: where the two disagree a loader would allocate what the configuration says, drop
what it does not mention, and fill what is missing with random numbers.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from casehard.errors import Corrupt, DataError, Unsupported
from casehard.io.disk import storage_errors
from casehard.io.files import read_json
from casehard.model.check import Problem, refuse, shown
from casehard.model.digest import weight_files

_FLOATS = {"F64", "F32", "F16", "BF16"}
_WRAPPERS = ("_orig_mod.", "module.")
_STACK = re.compile(r"(.*?)\.(\d+)\.")
_SIZES = ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "head_dim")
_SIZES_TOO = ("num_key_value_heads", "max_position_embeddings")
_IDS = ("suppress_tokens", "begin_suppress_tokens")
_BUFFERS = 1 << 30  # bytes of tables computed from the configuration; those of real models are a few MiB


class Tensor(NamedTuple):
    """What the header of a file says about one tensor."""

    dtype: str
    shape: tuple[int, ...]


def one_line(error: BaseException) -> str:
    """Return what a library said as one line, cut between words: errors of the command line are lines."""
    told = f"no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
    return textwrap.shorten(told, 240, placeholder=" ...")


def read_headers(folder: Path) -> dict[str, Tensor]:
    """Return dtype and shape of every tensor a loader would read; the format's own library checks the headers.

    Raises:
        Corrupt: a damaged header, or a tensor in two files.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as handle:
                for name in sorted(handle.keys()):
                    part = handle.get_slice(name)
                    if name in found:
                        raise Corrupt(f"{folder}: the tensor {name} is in two files, the second is {file.name}")
                    found[name] = Tensor(str(part.get_dtype()), tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            hint = "fetch or build the checkpoint again"
            raise Corrupt(f"{folder}: damaged weights: {file.name}: {error}", hint=hint) from None
    return found


def build_config(folder: Path, values: Mapping[str, Any]) -> Any:
    """Return the configuration object of transformers for the checked values of a ``config.json``.

    Raises:
        Unsupported: transformers does not know the architecture.
        DataError: a value of the wrong type or out of range.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    kind = values.get("model_type")
    text, temp = json.dumps(values), Path(tempfile.gettempdir())
    with storage_errors(temp, needs=len(text)), tempfile.TemporaryDirectory(prefix="casehard-config-") as place:
        # Through a file: reading one, transformers mends what older versions of it wrote.
        (Path(place) / "config.json").write_text(text, encoding="utf-8")
        try:
            config: Any = AutoConfig.from_pretrained(place, trust_remote_code=False, local_files_only=True)
            config.get_text_config(decoder=True).to_dict()  # a part that is no configuration has none
        except Exception as error:  # validators and constructors of some hundred classes
            told = one_line(error).replace(place, str(folder))
            if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
                raise Unsupported(f"{folder}: cannot be loaded as a causal language model: {told}") from None
            hint = "config.json was changed, or written for another version of transformers"
            raise DataError(f"{folder / 'config.json'}: {told}", hint=hint) from None
    config._name_or_path = str(folder)
    return config


def check_headers(folder: Path, config: Any, *, quantised: bool = False) -> None:
    """Check the configuration against the headers of the weight files.

    Args:
        config: from :func:`build_config`.
        quantised: whether the weights are stored in packed form, so that shapes and dtypes are not the model's.

    Raises:
        Corrupt: layers, shapes or sizes that are not those of the tensors.
        DataError: sizes or token ids no model has, or weights that are no floating-point numbers.
        Unsupported: a model that cannot be laid out, or names with a wrapper's prefix.
    """
    tensors = read_headers(folder)
    refuse(folder, [*_sizes(config), *_names(tensors), *_layers(config, tensors), *_tokens(folder, config)])
    model = _laid_out(folder, config)
    if not quantised:
        refuse(folder, [*_shapes(model, tensors), *_dtypes(model, tensors)] or list(_memory(model, tensors)))


def _sizes(config: Any) -> Iterator[Problem]:
    text = config.get_text_config(decoder=True)
    for key in (*_SIZES, *_SIZES_TOO):
        value = getattr(text, key, None)
        computed = isinstance(getattr(type(text), key, None), property)  # XLNet's positions are -1: without limit
        if isinstance(value, int) and value < 1 and not computed:
            yield Problem(DataError, "config.json", f"{key} is {value}", "no model has fewer than 1")
    if extra := getattr(type(config), "extra_files", ()):
        yield Problem(Unsupported, "", f"a model whose weights are also in {extra[0]}", "use a causal language model")


def _names(tensors: Mapping[str, Tensor]) -> Iterator[Problem]:
    if not tensors:
        yield Problem(Corrupt, "", "the weight files hold no tensors", "fetch the checkpoint again")
    for prefix in _WRAPPERS:
        if tensors and all(name.startswith(prefix) for name in tensors):
            text = f"every tensor's name begins with {prefix!r}, which a wrapper put there (torch.compile, DDP)"
            yield Problem(Unsupported, "", text, "unwrap the model, then save it again with save_pretrained()")


def _layers(config: Any, tensors: Mapping[str, Tensor]) -> Iterator[Problem]:
    """Look for a stack of as many layers as the configuration says: fewer would be dropped, more made up."""
    wanted = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    stacks = defaultdict(set)
    for name in tensors:
        if found := _STACK.match(name):
            stacks[found[1]].add(int(found[2]))
    if not isinstance(wanted, int) or wanted < 1 or not stacks:
        return
    # Layers that predict further tokens stand behind the others and are left out by transformers.
    more = getattr(config.get_text_config(decoder=True), "num_nextn_predict_layers", None) or 0
    if not any(len(stack) in (wanted, wanted + more) for stack in stacks.values()):
        most = max(len(stack) for stack in stacks.values())
        text = f"num_hidden_layers is {wanted}, the weights are those of {most} layers"
        yield Problem(Corrupt, "config.json", text, "configuration and weights are of two models; fetch them again")


def _tokens(folder: Path, config: Any) -> Iterator[Problem]:
    """Look for special tokens beyond the vocabulary: an index error at the first use, or an end that never comes."""
    text = config.get_text_config(decoder=True)
    rows = getattr(text, "vocab_size", None)
    if not isinstance(rows, int) or rows < 1:
        return
    given = {"config.json": text.to_dict()}
    if (folder / "generation_config.json").is_file():
        given["generation_config.json"] = read_json(folder / "generation_config.json")
    for where, settings in given.items():
        for key, value in settings.items():
            if not (key.endswith(("_token_id", "_token_ids")) or key in _IDS):
                continue
            ids = [i for i in (value if isinstance(value, list) else [value]) if i is not None]
            if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
                yield Problem(DataError, where, f"{key} is {shown(value)}, not the number of a token")
            elif any(i >= rows for i in ids):
                hint = "the file belongs to another model, or the embeddings were cut"
                yield Problem(DataError, where, f"{key} is {value}, outside a vocabulary of {rows}", hint)


def _laid_out(folder: Path, config: Any) -> Any:
    """Return the model without memory for its tensors."""
    from transformers import AutoModelForCausalLM

    make: Any = AutoModelForCausalLM.from_config
    try:
        with torch.device("meta"):
            return make(copy.deepcopy(config), trust_remote_code=False, attn_implementation="eager")
    except Exception as error:  # constructors of some hundred classes
        raise Unsupported(f"{folder}: cannot be loaded as a causal language model: {one_line(error)}") from None


def _places(model: Any, name: str) -> tuple[str, ...]:
    """Return the names a stored tensor may have in the model: a trunk is often saved without the model's prefix."""
    prefix = f"{model.base_model_prefix}."
    return name, prefix + name, name.removeprefix(prefix)


def _shapes(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[Problem]:
    state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    odd = {}
    for name, tensor in tensors.items():
        place = next((n for n in _places(model, name) if n in state), None)
        # A transposed weight may be one that transformers turns round while loading; it reports those it does not.
        if place and sorted(state[place]) != sorted(tensor.shape):
            odd[place] = tensor.shape
    if odd:
        first = min(odd)
        text = f"{len(odd)} mismatched keys in the weights, first {first}: "
        text += f"{state[first]} by config.json, {odd[first]} in the file"
        yield Problem(Corrupt, "", text, "such tensors would be filled with random numbers; config.json is not theirs")


def _dtypes(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[Problem]:
    weights = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    odd = {
        name: tensor.dtype
        for name, tensor in tensors.items()
        if tensor.dtype not in _FLOATS
        and (name.endswith("weight") or any(place in weights for place in _places(model, name)))
    }
    if odd:
        first = min(odd)
        text = f"{len(odd)} weights are not plain floating-point numbers, first {first} ({odd[first]})"
        hint = "quantised weights need their quantization_config; or convert the checkpoint to float"
        yield Problem(DataError, "", text, hint)


def _memory(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[Problem]:
    """Compare what the configuration would have allocated with what the files hold."""
    stored = sum(torch.Size(t.shape).numel() for t in tensors.values())
    wanted = sum(p.numel() for p in model.parameters())
    tables = sum(b.numel() * b.element_size() for b in model.buffers())
    if wanted > 2 * stored:
        text = f"config.json describes a model of {wanted:,} parameters, the files hold {stored:,}"
        yield Problem(Corrupt, "", text, "configuration and weights are of two models; fetch them again")
    if tables > max(_BUFFERS, 4 * stored):
        text = f"asks for tables of {tables / 2**30:,.0f} GiB beside the weights"
        yield Problem(DataError, "config.json", text, "is max_position_embeddings what it was?")
