"""Load a causal language model and its tokenizer from a folder or the Hub: safetensors only, no remote code."""

from __future__ import annotations

import re
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from casehard.data.chat import pad_id
from casehard.distributed.ranks import local
from casehard.errors import ConfigError, Corrupt, DataError, Unsupported, UserError
from casehard.files import MANIFEST, read_json, verify
from casehard.model.digest import folder_digest, weight_files
from casehard.model.provenance import read_provenance, require_same_content
from casehard.model.shard import gather, shard

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Loaded:
    """A model ready to use, its tokenizer, and where both came from."""

    model: nn.Module
    tokenizer: Any
    digest: str
    """Content digest of the folder, see :func:`casehard.model.digest.folder_digest`."""
    path: Path
    notes: tuple[str, ...] = ()
    """Choices made on the way; each was also given as a warning."""


def _mentions(value: Any, key: str) -> bool:
    if isinstance(value, dict):
        return key in value or any(_mentions(v, key) for v in value.values())
    return isinstance(value, list) and any(_mentions(v, key) for v in value)


def check_folder(folder: Path, *, weights: bool = True) -> None:
    """Check that a model folder can be loaded without running anybody's code.

    Args:
        folder: an existing folder.
        weights: whether a model, not only a tokenizer, is wanted.

    Raises:
        Unsupported: remote code (``auto_map``), pickled weights only, or an adapter without its base.
        DataError: no ``config.json``.
        Corrupt: unreadable JSON, or a shard named outside the folder.
    """
    for file in sorted(folder.glob("*config.json")):
        if _mentions(read_json(file), "auto_map"):
            raise Unsupported(
                f"{file}: asks for code of its own (auto_map), which is never run",
                hint="use a checkpoint of an architecture that transformers itself has",
            )
    if not weights:
        return
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise Unsupported(
                f"{folder}: a PEFT adapter without its base model", hint="merge it into the base and save that"
            )
        raise DataError(f"{folder}: not a model folder, config.json is missing")
    if not weight_files(folder):
        pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
        seen = f"; only {', '.join(pickles[:3])}" if pickles else ""
        raise Unsupported(
            f"{folder}: no .safetensors weights{seen}",
            hint="pickled weights can run code; convert them with save_pretrained() in an environment you trust",
        )


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # the Hub client raises many unrelated types, offline ones included
        raise UserError(
            f"{name!r} is neither a folder here nor can it be fetched from the Hub "
            f"({type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else 'no detail'})",
            hint="check the path; without a network pass a folder that holds config.json and .safetensors files",
        ) from None


def find(path: str | Path) -> Path:
    """Return the folder of a checkpoint, fetching ``org/name`` or ``hub:org/name`` from the Hub if it is not local.

    Raises:
        UserError: no such folder, or it cannot be fetched.
    """
    text = str(path)
    if "\0" in text:
        raise UserError(f"path with a NUL character: {text!r}")
    try:
        if Path(text).is_dir():
            return Path(text)
        if Path(text).exists():
            raise UserError(f"{text}: a file, not a model folder")
    except OSError as error:
        raise UserError(f"{text[:80]}: {error.strerror}") from None
    name = text.removeprefix("hub:")
    if _HUB_ID.fullmatch(name) and ".." not in name:
        return _fetch(name)
    raise UserError(f"no such model folder: {text}")


def _one_line(error: BaseException) -> str:
    """Return what a library said as one line, cut between words: errors of the command line are lines."""
    return textwrap.shorten(str(error), 240, placeholder=" ...")


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    check_folder(folder, weights=False)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception on a damaged file
        raise DataError(
            f"{folder}: the tokenizer cannot be loaded ({type(error).__name__}: {_one_line(error)})",
            hint="the folder needs tokenizer.json and tokenizer_config.json",
        ) from None


def _set_pad(tokenizer: Any, rows: int | None) -> Iterator[str]:
    """Choose a pad token among the tokens the model can embed; yield what the user should be told."""
    if tokenizer.pad_token_id is not None and (rows is None or tokenizer.pad_token_id < rows):
        return
    if tokenizer.pad_token_id is not None:
        yield f"pad token {tokenizer.pad_token!r} (id {tokenizer.pad_token_id}) lies outside the {rows} embeddings"
        tokenizer.pad_token = None
    chosen = pad_id(tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chosen)
    yield f"padding with {tokenizer.pad_token!r} (id {chosen}); embeddings are not resized, padding is masked"


def _tell(notes: tuple[str, ...]) -> None:
    for note in notes:
        warnings.warn(note, stacklevel=3)


def load_tokenizer(path: str | Path) -> Any:
    """Load a tokenizer and make sure that it can pad without a new token.

    Raises:
        UserError, DataError, Unsupported: see :func:`load`.
    """
    tokenizer = _tokenizer(find(path))
    _tell(tuple(_set_pad(tokenizer, None)))
    return tokenizer


def find_device(name: str) -> torch.device:
    """Return the device meant by ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.

    Raises:
        ConfigError: no such device.
        Unsupported: not on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"unknown device {name!r}", hint="cpu, cuda, cuda:0 or auto") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise Unsupported(f"device {name!r} asked for, but no CUDA device is available", hint="use device cpu")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype | str:
    if name == "auto":
        return "auto"
    if name not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r}", hint=f"one of auto, {', '.join(DTYPES)}")
    if name == "float16" and device.type == "cpu":
        raise Unsupported("float16 on a CPU overflows silently", hint="use float32 or bfloat16")
    return DTYPES[name]


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back the progress bars and load reports of transformers; what matters in them is raised as an error."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _weights(folder: Path, dtype: torch.dtype | str, device: torch.device, shards: int) -> nn.Module:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    # Eager attention on CPU: the fused kernels differ between builds in the last bits, and gain little there.
    attention = "eager" if device.type == "cpu" else None
    spread: dict[str, Any] = {}
    try:
        if shards and not _tied(folder):
            from transformers.distributed.configuration_utils import DistributedConfig

            spread["distributed_config"] = DistributedConfig(fsdp_size=shards)
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                dtype=dtype,
                attn_implementation=attention,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, with the name of the tensor
                **spread,
            )
    except SafetensorError as error:
        raise Corrupt(f"{folder}: damaged weights: {error}", hint="fetch or build the checkpoint again") from None
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise Unsupported(f"{folder}: cannot be loaded as a causal language model: {_one_line(error)}") from None
    model, info = loaded
    for kind in ("missing_keys", "mismatched_keys"):
        if info[kind]:
            first = min(key if isinstance(key, str) else str(key[0]) for key in info[kind])
            raise Corrupt(
                f"{folder}: {len(info[kind])} {kind.replace('_', ' ')} in the weights, first {first}",
                hint="such tensors would be filled with random numbers; the checkpoint is incomplete",
            )
    if shards and not spread:
        shard(model, shards, device)
    ready: nn.Module = model.eval() if shards else model.to(device).eval()
    return ready


def _tied(folder: Path) -> bool:
    """Return whether input and output embedding are one: such a model is read whole, then sharded (``shard``)."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", True))


def check_finite(model: nn.Module, what: str) -> None:
    """Raise Corrupt naming the first tensor of ``model`` that holds NaN or Inf."""
    for name, parameter in model.named_parameters():
        tensor = local(parameter.detach())
        if tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
            raise Corrupt(f"{what}: the tensor {name} holds NaN or Inf", hint="use an earlier checkpoint")


def embeddings(model: Any) -> torch.Tensor:
    """Return the input embedding table (V, D): V token ids, D the width."""
    table: torch.Tensor = model.get_input_embeddings().weight
    return table


def load(path: str | Path, *, dtype: str = "float32", device: str = "cpu", shards: int = 0) -> Loaded:
    """Load a checkpoint, in eval mode.

    Args:
        path: a folder with ``config.json``, tokenizer and ``.safetensors`` files; or a Hub id ``org/name``.
        dtype: ``float32`` (the master copy that training wants), ``bfloat16``, ``float16`` (GPU only), or ``auto``
            for the dtype the checkpoint was saved in.
        device: ``cpu``, ``cuda``, ``cuda:1`` or ``auto``.
        shards: number of ranks of this process group to shard the weights over (FSDP2), while they are read or, where
            embeddings are tied, right after; 0 leaves them whole.

    Raises:
        UserError: no such folder, or the Hub cannot be reached.
        Unsupported: remote code, pickled weights, an unknown architecture, a device that is not there.
        DataError: no config, a broken tokenizer, or one with more tokens than embeddings.
        Corrupt: a file differs from the manifest, the weights from what is recorded about them, tensors are missing, or
            weights are not finite.
    """
    target = find_device(device)
    wanted = _dtype(dtype, target)
    folder = find(path)
    check_folder(folder)
    # A Hub snapshot is a tree of links into a cache that checks its own files.
    if folder == Path(path) and ((folder / MANIFEST).is_file() or read_provenance(folder)):
        verify(folder)
    tokenizer = _tokenizer(folder)
    model = _weights(folder, wanted, target, shards)
    check_finite(model, str(folder))
    rows = int(embeddings(model).shape[0])
    notes = tuple(_set_pad(tokenizer, rows))
    highest = max(i for token, i in tokenizer.get_vocab().items())
    if highest >= rows and len(tokenizer) > rows:
        raise DataError(
            f"{folder}: the tokenizer has ids up to {highest}, the model only {rows} embeddings",
            hint="the tokenizer belongs to another model, or was extended without resizing the embeddings",
        )
    _tell(notes)
    digest = folder_digest(folder)
    require_same_content(folder, digest)
    return Loaded(model, tokenizer, digest, folder, notes)


def load_gathered(model: nn.Module, parent: Path) -> nn.Module | None:
    """Return a sharded model whole, in the memory of rank 0's host; None on every other rank. All ranks call this.

    Args:
        model: sharded over the ranks of this process group, of the architecture of ``parent``.
        parent: folder of the checkpoint it was loaded from.
    """
    state = gather(model)
    if state is None:
        return None
    whole = load(parent).model
    whole.load_state_dict(state)
    return whole
