"""Load a causal language model and its tokenizer from a folder or the Hub: safetensors only, no remote code."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from casehard.data.chat import pad_id
from casehard.distributed.ranks import local
from casehard.errors import ConfigError, Corrupt, DataError, Unsupported, is_panic
from casehard.io.manifest import MANIFEST, verify
from casehard.model.check import check_folder
from casehard.model.digest import folder_digest
from casehard.model.generation import mend_generation
from casehard.model.headers import build_config, check_headers, one_line
from casehard.model.model import Made, Model
from casehard.model.provenance import ATTACKED, read_provenance, require_same_content, trained_prompts
from casehard.model.shard import gather, shard
from casehard.model.source import find, is_snapshot, origin

# Read when transformers is imported. Some architectures fetch kernels, which are code, from the Hub by themselves.
os.environ.setdefault("USE_HUB_KERNELS", "NO")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

TRIED = ["a", "Zz 9\n", "\u00e9\U0001f600"]
"""Texts that a tokenizer must be able to read."""


class Read(NamedTuple):
    """A model as it was read, and what should be told about its files."""

    model: nn.Module
    notes: tuple[str, ...]


def _tokenizer(folder: Path, config: Any = None) -> Any:
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False, local_files_only=True)
        found(TRIED)
        return found
    except BaseException as error:  # tokenizers raises bare Exception on a damaged file, and panics
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise DataError(
            f"{folder}: the tokenizer cannot be loaded or used ({type(error).__name__}: {one_line(error)})",
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
    folder = find(path)
    check_folder(folder, weights=False)
    tokenizer = _tokenizer(folder)
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


def _weights(folder: Path, config: Any, dtype: torch.dtype | str, device: torch.device, shards: int) -> Read:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    # Eager attention on CPU: the fused kernels differ between builds in the last bits, and gain little there.
    attention = "eager" if device.type == "cpu" else None
    spread: dict[str, Any] = {}
    try:
        # A tied model is read whole, then sharded: see ``shard``.
        if shards and not getattr(config.get_text_config(), "tie_word_embeddings", True):
            from transformers.distributed.configuration_utils import DistributedConfig

            spread["distributed_config"] = DistributedConfig(fsdp_size=shards)
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
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
    except ImportError as error:
        hint = "install it, or take the original, unquantised weights"
        raise Unsupported(f"{folder}: needs a package that is not installed: {one_line(error)}", hint=hint) from None
    except Exception as error:  # some hundred classes, each with its own ways
        raise Unsupported(f"{folder}: cannot be loaded as a causal language model: {one_line(error)}") from None
    model, info = loaded
    for kind in ("missing_keys", "mismatched_keys"):
        if info[kind]:
            first = min(key if isinstance(key, str) else str(key[0]) for key in info[kind])
            raise Corrupt(
                f"{folder}: {len(info[kind])} {kind.replace('_', ' ')} in the weights, first {first}",
                hint="such tensors would be filled with random numbers; the checkpoint is incomplete",
            )
    unused = sorted(map(str, info["unexpected_keys"]))
    notes = (f"{len(unused)} tensors of the files have no place in the model, first {unused[0]}",) if unused else ()
    if shards and not spread:
        shard(model, shards, device)
    return Read(model.eval() if shards else model.to(device).eval(), notes)


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


def load(path: str | Path, *, dtype: str = "float32", device: str = "cpu", shards: int = 0) -> Model:
    """Load a checkpoint, in eval mode.

    Args:
        path: a folder with ``config.json``, tokenizer and ``.safetensors`` files, a run folder of ``casehard defend``,
            or a Hub id ``org/name[@revision]``; see :mod:`casehard.model.source`.
        dtype: ``float32`` (the master copy that training wants), ``bfloat16``, ``float16`` (GPU only), or ``auto``
            for the dtype the checkpoint was saved in.
        device: ``cpu``, ``cuda``, ``cuda:1`` or ``auto``.
        shards: number of ranks of this process group to shard the weights over (FSDP2), while they are read or, where
            embeddings are tied, right after; 0 leaves them whole.

    Raises:
        UserError: no such folder or Hub model, or the Hub cannot be reached.
        Unsupported: remote code, pickled weights, an unknown architecture, a device that is not there.
        DataError: no config, a broken tokenizer, or one with more tokens than embeddings.
        Corrupt: a file differs from the manifest, the weights from what is recorded about them, tensors are missing, or
            weights are not finite.
    """
    target = find_device(device)
    wanted = _dtype(dtype, target)
    folder = find(path)
    checked = check_folder(folder)
    if not is_snapshot(folder) and ((folder / MANIFEST).is_file() or read_provenance(folder)):
        verify(folder)
    config = build_config(folder, checked.config)
    check_headers(folder, config, quantised=bool(getattr(config, "quantization_config", None)))
    tokenizer = _tokenizer(folder, config)
    model, seen = _weights(folder, config, wanted, target, shards)
    check_finite(model, str(folder))
    rows = int(embeddings(model).shape[0])
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= rows:
        raise DataError(
            f"{folder}: the tokenizer has ids up to {highest}, the model only {rows} embeddings",
            hint="the tokenizer belongs to another model, or was extended without resizing the embeddings",
        )
    if not shards:
        _try(model, folder, rows)
    notes = (
        *checked.notes,
        *_past(folder),
        *seen,
        *_set_pad(tokenizer, rows),
        *mend_generation(model),
        *_untie(model),
    )
    _tell(notes)
    digest = folder_digest(folder)
    require_same_content(folder, digest)
    return Model(
        net=model,
        tokenizer=tokenizer,
        digest=digest,
        path=folder,
        lineage=_lineage(folder),
        trained_prompts=frozenset(trained_prompts(folder)),
        notes=notes,
        origin=origin(folder),
    )


def _past(folder: Path) -> Iterator[str]:
    """Say what has to be known of how a checkpoint was made: that it was attacked, or that nothing is known.

    A training leaves checkpoints on its way that do not tell; and attacked weights lie in a folder of any name.
    """
    record = read_provenance(folder)
    if how := record.get("provenance", {}).get(ATTACKED):
        yield f"{folder.name} was attacked ({', then '.join(how)}): what is made of it records that"
    if not record and (folder / "trainer_state.json").is_file():
        yield (
            f"{folder.name} is a checkpoint of a training on its way: what it was made from and trained on stands "
            "nowhere in it, and nobody can check whether a suite's prompts were among its rows"
        )


def _lineage(folder: Path) -> tuple[Made, ...]:
    record = read_provenance(folder)
    if not record:
        return ()
    return (Made(method=record["method"], parent=record["parent"], provenance=record.get("provenance") or {}),)


@torch.no_grad()
def _try(model: Any, folder: Path, rows: int) -> None:
    """Run the model on four tokens, the last from its cache, then as in training: what breaks it later breaks it here.

    Raises:
        Unsupported: it cannot be run.
        Corrupt: what it computes is not finite.
    """
    if model.config.is_encoder_decoder:
        raise Unsupported(f"{folder}: an encoder-decoder model", hint="use a causal language model")
    ids = torch.arange(4, device=embeddings(model).device).remainder(rows).unsqueeze(0)
    try:
        logits = [(first := model(input_ids=ids[:, :3], use_cache=True)).logits]
        if (cache := first.get("past_key_values")) is not None:
            logits.append(model(input_ids=ids[:, 3:], past_key_values=cache, use_cache=True).logits)
        with torch.random.fork_rng([ids.device] if ids.is_cuda else []):
            model.train()(input_ids=ids, use_cache=False)
        model.eval()
        finite = all(bool(part.isfinite().all()) for part in logits)
    except Exception as error:  # whatever a value of config.json can make of a forward pass
        hint = "config.json was changed, or written for another version of transformers"
        raise Unsupported(f"{folder}: loads, but cannot be run: {one_line(error)}", hint=hint) from None
    if not finite:
        raise Corrupt(
            f"{folder}: its output is not finite, though its weights are",
            hint="a value of config.json is not the model's (a norm's epsilon, say); in float16, try bfloat16",
        )


def _untie(model: Any) -> Iterator[str]:
    """Say in the configuration that a model's two embedding tables differ, where it calls them one and the same."""
    head, settings = model.get_output_embeddings(), model.config.get_text_config(decoder=True)
    own = getattr(head, "weight", None)
    if own is not None and own is not embeddings(model) and getattr(settings, "tie_word_embeddings", False):
        # Whatever ties weights anew (an adapter, a resize) would put the input table in the head's place.
        settings.tie_word_embeddings = model.config.tie_word_embeddings = False
        yield "config.json ties input and output embedding (tie_word_embeddings), the files hold two: both are kept"


def load_gathered(model: nn.Module, parent: Path) -> nn.Module | None:
    """Return a sharded model whole, in the memory of rank 0's host; None on every other rank. All ranks call this.

    Args:
        model: sharded over the ranks of this process group, of the architecture of ``parent``.
        parent: folder of the checkpoint it was loaded from.
    """
    state = gather(model)
    if state is None:
        return None
    whole = load(parent).net
    whole.load_state_dict(state)
    return whole
