"""What a user's training changed, for methods that mend it afterwards: LoRA factors, or weights against their start.

Letters: W (O, I) a linear layer's weight, B (O, R) and A (R, I) the factors of all trained adapters on it side by side,
scales folded into B, so that the user's update of the layer is D = B A.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from casehard.distributed.ranks import sharded
from casehard.errors import Corrupt, DataError, Unsupported
from casehard.train.protocol import StateValue

Start = dict[str, torch.Tensor]
"""The weights training started from, by parameter name; adapters' factors are not among them."""


class Adapter(NamedTuple):
    """One trained LoRA adapter on a layer: scale x b(a(x))."""

    a: nn.Linear
    b: nn.Linear
    scale: float


class Layer(NamedTuple):
    """A linear layer that training changed."""

    name: str
    """Its name in a checkpoint of the model without adapters, e.g. "model.layers.0.self_attn.q_proj"."""
    linear: nn.Linear
    """The layer with W: frozen under adapters, trained without."""
    adapters: tuple[Adapter, ...] = ()
    parameter: str = ""
    """Name of the trained W in the model; empty under adapters."""

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (B, A) in fp32."""
        parts = [(x.scale * x.b.weight.detach().float(), x.a.weight.detach().float()) for x in self.adapters]
        return torch.cat([b for b, _ in parts], 1), torch.cat([a for _, a in parts])

    def update(self, start: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return D (O, I) in fp32."""
        if self.adapters:
            b, a = self.factors()
            return b @ a
        return self.linear.weight.detach().float() - start[self.parameter].float()


def _factors(model: nn.Module) -> dict[str, tuple[nn.Module, tuple[Adapter, ...]]]:
    found = {}
    for name, module in model.named_modules():
        a, b = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
        if not isinstance(a, nn.ModuleDict) or not isinstance(b, nn.ModuleDict):
            continue
        holder: Any = module
        keys = [key for key in a if any(p.requires_grad for p in (*a[key].parameters(), *b[key].parameters()))]
        if keys:
            scales: Mapping[str, float] = holder.scaling
            found[name] = (holder.get_base_layer(), tuple(Adapter(a[k], b[k], float(scales[k])) for k in keys))  # type: ignore[arg-type]
    return found


def adapters(model: nn.Module) -> list[Adapter]:
    """Return every trained adapter of every layer; none when the model has no LoRA.

    Raises:
        Unsupported: adapters other than LoRA without DoRA on linear layers.
    """
    found = [adapter for _, several in _factors(model).values() for adapter in several]
    known = {id(p) for x in found for p in (*x.a.parameters(), *x.b.parameters())}
    for name, p in model.named_parameters():
        if p.requires_grad and "lora_" in name and id(p) not in known:
            raise Unsupported(f"trained adapter parameter {name!r}", hint="plain LoRA on linear layers only")
    for adapter in found:
        if not (isinstance(adapter.a, nn.Linear) and isinstance(adapter.b, nn.Linear)):
            raise Unsupported(f"LoRA on a {type(adapter.b).__name__}", hint="plain LoRA on linear layers only")
    return found


def others(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters that are no LoRA factors, by name.

    Raises:
        Unsupported: see :func:`adapters`; or FSDP2's sharded parameters.
    """
    known = {id(p) for x in adapters(model) for p in (*x.a.parameters(), *x.b.parameters())}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if any(sharded(p) for p in trained.values()):
        raise Unsupported("mending an update on sharded parameters", hint="use one process, or DDP")
    return {name: p for name, p in trained.items() if id(p) not in known}


def layers(model: nn.Module) -> list[Layer]:
    """Return the linear layers that training changes, the output head left out.

    Raises:
        Unsupported: see :func:`others`; something beside adapters is trained (a bias, a whole module); or nothing is.
    """
    rest = others(model)
    if found := _factors(model):
        biased = next((n for n, (_, several) in found.items() if any(x.b.bias is not None for x in several)), None)
        if extra := next(iter(rest), biased):
            raise Unsupported(f"beside A and B, {extra!r} is trained", hint="LoRA without bias and modules_to_save")
        prefix = "base_model.model."
        return [
            Layer(name.removeprefix(prefix), _plain(name, base), several) for name, (base, several) in found.items()
        ]
    ends: Any = model
    head = ends.get_output_embeddings() if callable(getattr(model, "get_output_embeddings", None)) else None
    # GPT-2's transposed layers are not passed over: they are refused by name.
    linear = lambda m: isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"  # noqa: E731
    named = {name: m for name, m in model.named_modules() if linear(m) and m is not head}
    out = [Layer(n, _plain(n, m), (), f"{n}.weight") for n, m in named.items() if f"{n}.weight" in rest]
    if not out:
        raise Unsupported("training changes no linear layer", hint="full-parameter training, or LoRA")
    return out


def _plain(name: str, module: nn.Module) -> nn.Linear:
    if not isinstance(module, nn.Linear) or module.weight.shape != (module.out_features, module.in_features):
        raise Unsupported(
            f"{name} is a {type(module).__name__}, not a plain linear layer",
            hint="a base model with plain, unquantised linear layers (not GPT-2), or another method",
        )
    return module


def start_of(model: nn.Module) -> Start:
    """Copy what is needed to tell the update from the model: trained weights, not adapters, whose B starts at zero.

    Memory: one copy of the trained parameters in full-parameter training, nothing under LoRA.

    Raises:
        Unsupported: see :func:`others`.
    """
    start = {name: p.detach().clone() for name, p in others(model).items()}
    if any(bool(adapter.b.weight.detach().any()) for adapter in adapters(model)):
        warnings.warn("the adapter is not fresh: what it held before counts as the user's update", stacklevel=3)
    return start


def to_state(start: Start) -> dict[str, StateValue]:
    """Return a start as a method's state. Needed: whoever resumes may have loaded the checkpoint, not the start."""
    return {f"start.{name}": value for name, value in start.items()}


def from_state(start: Start, state: Mapping[str, Any]) -> Start:
    """Invert :func:`to_state`, on the devices of ``start``."""
    return {name: state[f"start.{name}"].to(value.device) for name, value in start.items()}


class Folder:
    """The tensors of a checkpoint folder, read from its safetensors one at a time.

    Raises:
        DataError: no such folder, or no safetensors in it.
        Corrupt: a file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path, self._open = Path(path), safe_open
        single = self.path / "model.safetensors"
        files = [single] if single.is_file() else sorted(self.path.glob("*.safetensors"))
        if not files:
            raise DataError(f"{self.path}: no .safetensors weights", hint="the folder of the model before alignment")
        self._file: dict[str, Path] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as stream:
                    self._file |= dict.fromkeys(stream.keys(), file)
            except SafetensorError as error:
                raise Corrupt(f"{file}: damaged weights: {error}", hint="fetch the checkpoint again") from None

    def require(self, name: str, shape: torch.Size) -> None:
        """Check that a tensor is there with this shape, without reading it.

        Raises:
            DataError: it is not.
        """
        if name not in self._file:
            raise DataError(f"{self.path}: no tensor {name!r}", hint="the base must be the same architecture")
        with self._open(self._file[name], framework="pt") as stream:
            seen = tuple(stream.get_slice(name).get_shape())
        if seen != tuple(shape):
            raise DataError(f"{self.path}: {name} has shape {seen}, the model's has {tuple(shape)}")

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor in fp32, on the CPU."""
        with self._open(self._file[name], framework="pt") as stream:
            return stream.get_tensor(name).float()
