"""PEFT LoRA adapter folders, read and written one layer at a time, and the marker that says what an adapter is for.

A folder holds ``adapter_config.json``, ``adapter_model.safetensors`` and, when this library wrote it, a marker
``casehard_adapter.json``: role (buffer, reinforce, user, merged), the base, tokenizer and template it was trained on,
and the SHA-256 of every tensor. A **buffer** is a working jailbreak of its base: no path that exports, merges or serves
may accept it, whatever it is called; :func:`refuse_buffer` is that check.

Reading needs no base model and folds nothing away: a layer is ``scale B A``. What cannot be said so (DoRA, biases,
embeddings, weights saved whole, initialisations that change the base) is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from casehard.errors import Corrupt, DataError, Unsupported, UserError
from casehard.io.files import read_json
from casehard.io.manifest import MANIFEST, verify
from casehard.maths.merge import LoraPair
from casehard.model.check import trusting
from casehard.model.source import is_snapshot

MARKER = "casehard_adapter.json"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ROLES = ("buffer", "reinforce", "user", "merged")
DIGESTS = ("base_digest", "tokenizer_digest", "template_digest")

PREFIX = "base_model.model."
_FACTOR = re.compile(r"^(?P<layer>.+)\.lora_(?P<factor>[AB])\.(?P<adapter>default\.)?weight$")
_NAMED_BUFFER = re.compile(r"(^|[._])buffer([._]|$)")
# Keys of adapter_config.json that make an adapter something else than scale * B A, and what to say of them.
_FOREIGN = {
    "use_dora": "DoRA rescales the base weight",
    "modules_to_save": "whole modules are saved beside the factors",
    "lora_bias": "biases are trained beside the factors",
    "trainable_token_indices": "embedding rows are trained beside the factors",
    "target_parameters": "factors of bare parameters (fused experts) are not linear layers",
    "layer_replication": "the base has other layers than its checkpoint",
    "alora_invocation_tokens": "an activated LoRA works on part of the tokens",
    "use_qalora": "QALoRA pools its inputs",
    "use_bdlora": "block-diagonal factors are stored in another shape",
    "arrow_config": "a router chooses among adapters",
    "kasa_config": "KaSA changes the base weights",
    "monteclora_config": "MonteCLoRA adds random parts",
}
_COMPILED = re.compile(r"(?<![^.])_orig_mod\.")
_DISTRIBUTED = re.compile(rf"^(?:module\.)+|(?<=^{re.escape(PREFIX)})(?:module\.)+")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class LayerShape(NamedTuple):
    """What the header of a file says about one layer."""

    d_out: int
    d_in: int
    rank: int


def plain_name(name: str) -> str:
    """Return a name without what ``torch.compile`` puts into it and DDP before it."""
    return _DISTRIBUTED.sub("", _DISTRIBUTED.sub("", _COMPILED.sub("", name)))


def plain_names(names: Iterable[str], folder: Path) -> dict[str, str]:
    """Return the plain name of each tensor of an adapter -> its name in the file.

    Raises:
        Corrupt: two tensors of one plain name.
    """
    out: dict[str, str] = {}
    for name in sorted(names):
        if (first := out.setdefault(plain_name(name), name)) != name:
            raise Corrupt(f"{folder}: one tensor twice, as {first} and {name}", hint="save the adapter again")
    return out


def is_transposed(model: torch.nn.Module) -> bool:
    """Return whether a model stores its linear layers transposed (GPT-2's Conv1D), which PEFT wants to be told."""
    return any(type(module).__name__ == "Conv1D" for module in model.modules())


def root_of(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model inside a ``PeftModel``; any other model is its own root."""
    inner = getattr(model, "base_model", None)
    if hasattr(model, "peft_config") and inner is not None and hasattr(inner, "model"):
        root: torch.nn.Module = inner.model
        return root
    return model


def live_pairs(model: torch.nn.Module, adapter: str = "default") -> dict[str, LoraPair]:
    """Return copies of the factors of one LoRA adapter of a ``PeftModel``, by layer name in the base model."""
    out = {}
    for name, module in root_of(model).named_modules():
        held: Any = getattr(module, "lora_A", None)
        if isinstance(held, torch.nn.ModuleDict) and adapter in held:
            layer: Any = module
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            out[name] = LoraPair(a.detach().clone(), b.detach().clone(), float(layer.scaling[adapter]))
    return out


def tensor_digest(tensor: torch.Tensor) -> str:
    """Return the SHA-256 (hex) of a tensor: dtype, shape and bytes."""
    flat = tensor.detach().to("cpu").contiguous()
    sha = hashlib.sha256(f"{str(flat.dtype).removeprefix('torch.')} {list(flat.shape)}\n".encode())
    sha.update(flat.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (FileNotFoundError, SafetensorError) as error:
        raise Corrupt(f"{path}: cannot be read: {error}", hint="fetch or build the adapter again") from None


def tensor_digests(folder: Path) -> dict[str, str]:
    """Return ``{tensor name: SHA-256}`` of an adapter's weights, one tensor in memory at a time."""
    with _open(Path(folder) / WEIGHTS) as handle:
        return {name: tensor_digest(handle.get_tensor(name)) for name in sorted(handle.keys())}


def read_marker(folder: Path | str) -> dict[str, Any] | None:
    """Return what the marker of an adapter folder says, or None for an adapter of other origin.

    Raises:
        Corrupt: the marker is not one that :func:`write_marker` writes.
    """
    path = Path(folder) / MARKER
    if not path.exists() and not path.is_symlink():
        return None
    marker = read_json(path)
    if not isinstance(marker, dict) or marker.get("role") not in ROLES:
        raise Corrupt(f"{path}: no role", hint=f"a marker names one of {', '.join(ROLES)}")
    for key in DIGESTS:
        if not isinstance(marker.setdefault(key, None), str | None):
            raise Corrupt(f"{path}: {key} must be text or null, got {marker[key]!r}")
    if not isinstance(marker.setdefault("tensors_sha256", {}), dict):
        raise Corrupt(f"{path}: tensors_sha256 must map names to digests")
    return marker


def write_marker(
    folder: Path | str,
    role: str,
    *,
    base_digest: str | None = None,
    tokenizer_digest: str | None = None,
    template_digest: str | None = None,
    tensors_sha256: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write the marker of an adapter folder and return it.

    Args:
        folder: holds the adapter's weights already, unless ``tensors_sha256`` is given.
        role: buffer, reinforce, user or merged.
        base_digest: content digest of the base (:func:`casehard.model.digest.folder_digest`), None if unknown.
        tokenizer_digest: digest of the tokenizer, None if unknown.
        template_digest: digest of the chat template, None if unknown.
        tensors_sha256: digests of the tensors; None: computed from the file.

    Raises:
        UserError: an unknown role.
        Corrupt: no readable weights.
    """
    if role not in ROLES:
        raise UserError(f"unknown adapter role {role!r}", hint=f"one of {', '.join(ROLES)}")
    marker = {
        "role": role,
        "base_digest": base_digest,
        "tokenizer_digest": tokenizer_digest,
        "template_digest": template_digest,
        "tensors_sha256": dict(tensor_digests(Path(folder)) if tensors_sha256 is None else tensors_sha256),
    }
    text = json.dumps(marker, indent=1, sort_keys=True) + "\n"
    (Path(folder) / MARKER).write_text(text, encoding="utf-8")
    return marker


def refuse_buffer(folder: Path | str, *, known: Collection[str] = ()) -> None:
    """Raise when a buffer adapter lies in ``folder`` or below: by marker, by name, by content.

    Args:
        folder: an adapter folder, a checkpoint, or a whole output folder.
        known: digests (:func:`tensor_digest`) of the buffer's tensors; when given, every ``.safetensors`` file below is
            read and compared, so that a renamed copy is found too.

    Raises:
        UserError: names the file that gives it away.
    """
    folder = Path(folder)
    hint = "a buffer is a working jailbreak of its base: it never leaves the provider and is never merged or served"
    for path in sorted(folder.rglob(MARKER)):
        if (read_marker(path.parent) or {})["role"] == "buffer":
            raise UserError(f"{path}: this adapter is marked as a buffer", hint=hint)
    for path in sorted(folder.rglob(CONFIG)):
        if path.parent != folder and _NAMED_BUFFER.search(path.parent.name):
            raise UserError(f"{path.parent}: an adapter saved under the name of a buffer", hint=hint)
    wanted = set(known)
    for path in sorted(folder.rglob("*.safetensors")):
        with _open(path) as handle:
            for name in sorted(handle.keys()):
                # A model of its own may have register_buffer names; only adapter tensors are meant.
                if "lora_" in name and _NAMED_BUFFER.search(name):
                    raise UserError(f"{path}: the tensor {name} carries the name of a buffer", hint=hint)
                if wanted and tensor_digest(handle.get_tensor(name)) in wanted:
                    raise UserError(f"{path}: the tensor {name} is one of the buffer's", hint=hint)


def _pattern(patterns: Mapping[str, Any], layer: str, default: Any) -> Any:
    """Return the value of the first pattern that PEFT would apply to a layer."""
    return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), default)


def _config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or str(config.get("peft_type")) != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise Unsupported(f"{folder}: peft_type is {kind!r}", hint="only LoRA adapters can be merged in factor space")
    for key, why in _FOREIGN.items():
        if config.get(key):
            raise Unsupported(f"{folder}: {key} = {config[key]!r}: {why}", hint="train the adapter without it")
    if config.get("bias", "none") != "none":
        raise Unsupported(f"{folder}: bias = {config['bias']!r}: biases are trained too", hint="use bias='none'")
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGES_BASE):
        raise Unsupported(
            f"{folder}: init_lora_weights = {start!r} changes the base weights",
            hint="convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    return config


class AdapterReader:
    """An adapter folder opened for reading layer by layer; use as a context manager.

    Raises:
        UserError: not an adapter folder.
        Unsupported: something else than plain LoRA on linear layers; names it.
        Corrupt: a damaged file, a factor without its partner, shapes that disagree with the configuration.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = folder = Path(folder)
        if not (folder / CONFIG).is_file():
            raise UserError(f"{folder}: no {CONFIG}", hint="give the folder of a PEFT adapter")
        if not (folder / WEIGHTS).is_file():
            pickled = (folder / "adapter_model.bin").exists()
            why = " (adapter_model.bin is a pickle, which can run code)" if pickled else ""
            hint = "save it with save_pretrained()"
            if pickled:
                hint += f", or merge it into its base: {trusting(folder)}"
            raise Unsupported(f"{folder}: no {WEIGHTS}{why}", hint=hint)
        if (folder / MANIFEST).is_file() and not is_snapshot(folder):
            verify(folder)
        self.config = _config(folder)
        self.marker = read_marker(folder)
        self._handle = _open(folder / WEIGHTS)
        self._names: dict[str, dict[str, str]] = {}
        for plain, name in plain_names(self._handle.keys(), folder).items():
            found = _FACTOR.match(plain)
            if found is None:
                raise Unsupported(
                    f"{folder}: the tensor {name} is no LoRA factor of a linear layer",
                    hint="biases, embeddings, DoRA magnitudes and whole modules cannot be merged in factor space",
                )
            layer = found["layer"].removeprefix(PREFIX)
            self._names.setdefault(layer, {})[found["factor"]] = name
        if not self._names:
            raise DataError(f"{folder}: {WEIGHTS} holds no LoRA factors")
        self.shapes = {layer: self._shape(layer) for layer in self._names}

    def __enter__(self) -> AdapterReader:
        self._handle.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.__exit__(*error)

    def _shape(self, layer: str) -> LayerShape:
        names = self._names[layer]
        if set(names) != {"A", "B"}:
            raise Corrupt(f"{self.folder}: {layer} has only factor {next(iter(names))}", hint="the file is incomplete")
        a, b = (tuple(self._handle.get_slice(names[f]).get_shape()) for f in "AB")
        if len(a) != 2 or len(b) != 2:
            raise Unsupported(f"{self.folder}: {layer} has factors of shape {a} and {b}", hint="only linear layers")
        rank = self._setting("rank_pattern", layer, "r")
        if a[0] != b[1] or a[0] != rank:
            raise Corrupt(f"{self.folder}: {layer}: A {a} and B {b} do not fit rank {rank} of {CONFIG}")
        return LayerShape(b[0], a[1], a[0])

    def _setting(self, patterns: str, layer: str, default: str) -> Any:
        """Return what the configuration says of a layer; its patterns may carry a wrapper's prefixes."""
        known = {plain_name(key): value for key, value in (self.config.get(patterns) or {}).items()}
        return _pattern(known, layer, self.config.get(default))

    def scale(self, layer: str) -> float:
        """Return the scale of a layer: alpha / r, or alpha / sqrt(r) with rsLoRA; patterns as PEFT reads them."""
        alpha = float(self._setting("alpha_pattern", layer, "lora_alpha"))
        rank = self.shapes[layer].rank
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def pair(self, layer: str) -> LoraPair:
        """Read one layer.

        Raises:
            Corrupt: a tensor is not finite or differs from the marker.
        """
        out = []
        for factor in "AB":
            name = self._names[layer][factor]
            tensor = self._handle.get_tensor(name)
            wanted = (self.marker or {}).get("tensors_sha256", {})
            if wanted and wanted.get(name) != tensor_digest(tensor):
                raise Corrupt(f"{self.folder}: the tensor {name} differs from {MARKER}", hint="take another copy")
            if not bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
                raise Corrupt(f"{self.folder}: the tensor {name} holds NaN or Inf", hint="use an earlier checkpoint")
            out.append(tensor)
        return LoraPair(a=out[0], b=out[1], scale=self.scale(layer))


def load_pairs(folder: Path | str) -> dict[str, LoraPair]:
    """Read a whole adapter, ``{layer: LoraPair}``, in file order; :func:`refuse_buffer` is the caller's to call.

    Raises:
        UserError, Unsupported, Corrupt: see :class:`AdapterReader`.
    """
    with AdapterReader(folder) as reader:
        return {layer: reader.pair(layer) for layer in reader.shapes}
