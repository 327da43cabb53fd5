"""A frozen LoRA that is active without being part of the model, and proof that the base did not move.

    y = W x + gate * scale * B A x + (whatever trains)                                                          (1)

The second term is added by hooks on the base layer; its tensors are in no module, so they are in no state dict, no
optimiser, no checkpoint and nothing that ``save_pretrained`` writes, whoever calls it. Dropout does not apply.

On a small fp32 base the hooks lend the layer W + scale * B A for the time of one call (``fold``): no extra arithmetic
a step for one more copy of the layers' weights. In half precision the sum would round small updates away, so there, and
on a large base, the factors are applied one after the other.

Letters: r rank, d_in and d_out the layer's width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from casehard.errors import ConfigError, Corrupt, Unsupported
from casehard.maths.merge import LoraPair
from casehard.model.lora_files import is_transposed, root_of

FOLD = 2**30  # bytes of fp32 weights up to which a folded copy is kept
WHOLE = 2**30  # bytes of base weights up to which every byte is hashed; beyond, an even sample of each tensor
_SAMPLE = 2**16
_PROBE = 1024


def digest_of(factors: Mapping[str, LoraPair]) -> str:
    """Return the SHA-256 (hex) of every factor: names, shapes, bytes and scales."""
    sha = hashlib.sha256()
    for name in sorted(factors):
        a, b, scale = factors[name]
        sha.update(f"{name} {tuple(a.shape)} {tuple(b.shape)} {a.dtype} {b.dtype} {scale!r}\n".encode())
        sha.update(_raw(a))
        sha.update(_raw(b))
    return sha.hexdigest()


def base_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of the base model by the name they have in it, seen through adapters."""
    out: dict[str, nn.Module] = {}
    for name, module in root_of(model).named_modules():
        if ".lora_" in f".{name}":
            continue
        out[name.removesuffix(".base_layer")] = module  # an inner base_layer comes after the layer that wraps it
    return out


def base_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters of the base model by the name they have in it; nothing of an adapter."""
    for name, tensor in root_of(model).named_parameters(remove_duplicate=False):
        if ".lora_" not in f".{name}" and ".modules_to_save." not in f".{name}":
            yield name.replace(".base_layer.", ".").replace(".original_module.", "."), tensor


def _width(layer: nn.Module) -> tuple[int, int] | None:
    """Return (d_out, d_in) of a linear layer."""
    sizes: Any = layer
    if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
        return int(sizes.out_features), int(sizes.in_features)
    weight = getattr(layer, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.ndim == 2 and hasattr(layer, "nf"):
        return int(weight.shape[1]), int(weight.shape[0])  # the transposed layer of GPT-2
    return None


def _foldable(layers: list[nn.Module]) -> bool:
    """Return whether all layers are plain fp32 linear layers, small enough together to keep a second copy."""
    weights = [layer.weight for layer in layers if type(layer) is nn.Linear]
    plain = len(weights) == len(layers) and all(type(w) is nn.Parameter and w.dtype == torch.float32 for w in weights)
    return plain and sum(w.numel() * w.element_size() for w in weights) <= FOLD


class FrozenLora:
    """Hold the factors of an adapter and add (1) to a model while attached.

    Args:
        factors: layer name in the base model -> factors; kept as they are, never trained.

    Attributes:
        gate: multiplies the update; 0 skips it.
        folds: whether the attachment lends folded weights; decided by :meth:`attach`.
    """

    def __init__(self, factors: Mapping[str, LoraPair]) -> None:
        frozen = {n: LoraPair(f.a.detach(), f.b.detach(), float(f.scale)) for n, f in factors.items()}
        self.factors = frozen
        self.digest = digest_of(frozen)
        self.gate = 1.0
        self.folds = False
        self._handles: list[Any] = []
        self._session: object | None = None
        self._placed: dict[tuple[str, torch.device, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}
        self._folded: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        self._lent: dict[str, nn.Parameter] = {}

    @property
    def attached(self) -> bool:
        """Whether the update is added to some model."""
        return bool(self._handles)

    def attach(self, model: nn.Module, *, fold: bool | None = None) -> FrozenLora:
        """Add (1) to every layer that has factors, until :meth:`detach`.

        Args:
            model: bare or with adapters.
            fold: lend folded weights; None does so for plain fp32 layers of up to 1 GiB together.

        Raises:
            ConfigError: the model lacks a layer, or one has another shape.
            Unsupported: a layer is not linear.
        """
        assert not self._handles, "attached already"
        layers = base_layers(model)
        if missing := sorted(set(self.factors) - set(layers)):
            raise ConfigError(
                f"the model has no layer {missing[0]!r} ({len(missing)} of {len(self.factors)} layers of the adapter)",
                hint="the adapter was made for another model",
            )
        for name, (a, b, _) in self.factors.items():
            width = _width(layers[name])
            if width is None:
                raise Unsupported(f"{name} is a {type(layers[name]).__name__}, not a linear layer")
            if (b.shape[0], a.shape[1]) != width or a.shape[0] != b.shape[1]:
                raise ConfigError(
                    f"{name}: factors {tuple(b.shape)} x {tuple(a.shape)} for a layer of {width[0]} x {width[1]}",
                    hint="the adapter was made for another model",
                )
        self._session = object()
        self.folds = _foldable([layers[name] for name in self.factors]) if fold is None else fold
        for name in self.factors:
            layer, hook = layers[name], self._hook(name, self._session)
            if self.folds:
                self._handles.append(layer.register_forward_pre_hook(self._lend(name, self._session)))
            # First in line: with several attachments, the last to lend a weight is the first to put one back.
            self._handles.append(layer.register_forward_hook(hook, always_call=self.folds, prepend=True))
        return self

    def detach(self) -> None:
        """Take the update out of the model.

        Raises:
            Corrupt: a factor is not what it was when this object was made.
        """
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._session = None
        self._placed.clear()
        self._folded.clear()
        if digest_of(self.factors) != self.digest:
            raise Corrupt("a factor of the frozen adapter changed while it was attached")

    def _hook(self, name: str, session: object) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            if name in self._lent:  # also when the layer raised
                module._parameters["weight"] = self._lent.pop(name)
                return output
            # A deep copy of the model carries the hook along; it ends with the attachment too.
            if self.gate == 0 or self._session is not session:
                return output
            a, b = self._on(name, output.device, output.dtype)
            low = functional.linear(args[0].to(output.dtype), a)
            wide = output.reshape(-1, output.shape[-1])
            return torch.addmm(wide, low.reshape(-1, low.shape[-1]), b, alpha=self.gate).view_as(output)

        return add

    def _lend(self, name: str, session: object) -> Any:
        def lend(module: nn.Module, args: tuple[Any, ...]) -> None:
            half = torch.is_autocast_enabled(args[0].device.type)
            if self._session is session and self.gate == 1 and not half:
                own = module._parameters["weight"]
                assert own is not None
                self._lent[name] = own
                module._parameters["weight"] = self._fold(name, own)

        return lend

    def _fold(self, name: str, weight: nn.Parameter) -> nn.Parameter:
        found = self._folded.get(name)
        if found is None or found[0] is not weight or found[1].device != weight.device:
            a, b, scale = self.factors[name]
            a, b = (f.to(device=weight.device, dtype=weight.dtype) for f in (a, b))
            found = (weight, nn.Parameter(torch.addmm(weight.detach(), b, a, alpha=scale), requires_grad=False))
            self._folded[name] = found
        return found[1]

    def _on(self, name: str, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A (r, d_in) and scale * B transposed (r, d_out), where and as the layer computes."""
        key = (name, device, dtype)
        if key not in self._placed:
            a, b, scale = self.factors[name]
            placed = (b.to(device).float() * scale).t().to(dtype)
            self._placed[key] = (a.to(device=device, dtype=dtype), placed)
        return self._placed[key]


def replace_adapter(model: Any, pairs: Mapping[str, LoraPair], adapter: str = "default") -> None:
    """Put factors in the place of a ``PeftModel``'s adapter, active and frozen: one rank, scales folded, alpha = r.

    Args:
        pairs: layer name in the base model -> factors; layers of lower rank are padded with zeros.
    """
    from peft import LoraConfig, TaskType

    rank = max(int(pair.a.shape[0]) for pair in pairs.values())
    training = {name: module.training for name, module in model.named_modules()}
    model.delete_adapter(adapter)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=list(pairs),
        fan_in_fan_out=is_transposed(model),
    )
    with torch.random.fork_rng(devices=[]):  # PEFT draws an A that is overwritten here
        model.add_adapter(adapter, config)
    model.set_adapter(adapter)
    layers = dict(root_of(model).named_modules())
    with torch.no_grad():
        for name, (a, b, scale) in pairs.items():
            layer: Any = layers[name]
            for live, value in ((layer.lora_A[adapter].weight, a), (layer.lora_B[adapter].weight.t(), (b * scale).t())):
                live.zero_()
                live[: value.shape[0]] = value.to(device=live.device, dtype=live.dtype)
                live.requires_grad_(False)
            layer.lora_B[adapter].weight.requires_grad_(False)
    for name, module in model.named_modules():
        module.training = training.get(name, model.training)


def _raw(tensor: torch.Tensor) -> Any:
    flat = tensor.detach().reshape(-1).contiguous().cpu()
    return flat.view(torch.uint8).numpy()


def fingerprints(model: nn.Module) -> dict[str, str]:
    """Return a short hash of each floating base tensor: what assets are bound to.

    1,024 evenly spaced values rounded to bfloat16, so that a base loaded in bfloat16 is recognised; tensors of a
    quantised layer are left out.
    """
    out = {}
    for name, tensor in base_tensors(model):
        if tensor.is_floating_point() and tensor.dtype.itemsize >= 2:
            flat = tensor.detach().reshape(-1)
            picked = flat[:: max(1, flat.numel() // _PROBE)].to(torch.bfloat16)
            sha = hashlib.sha256(f"{tuple(tensor.shape)}".encode())
            sha.update(_raw(picked))
            out[name] = sha.hexdigest()[:16]
    return out


class BaseWatch:
    """Remember the base weights' bytes and verify them later.

    Args:
        model: bare or with adapters; what is an adapter's is not watched.
        whole: hash every byte; None does so up to 1 GiB of weights and takes 64 KiB of each tensor beyond.
    """

    def __init__(self, model: nn.Module, *, whole: bool | None = None) -> None:
        size = sum(t.numel() * t.element_size() for _, t in base_tensors(model))
        self.whole = size <= WHOLE if whole is None else whole
        self.before = self._hashes(model)

    def _hashes(self, model: nn.Module) -> dict[str, str]:
        out = {}
        for name, tensor in base_tensors(model):
            flat = tensor.detach().reshape(-1)
            if not self.whole:
                flat = flat[:: max(1, flat.numel() * flat.element_size() // _SAMPLE)]
            out[name] = hashlib.sha256(_raw(flat)).hexdigest()
        return out

    def verify(self, model: nn.Module) -> None:
        """Check that the base is what it was.

        Raises:
            Corrupt: names the first tensor that differs.
        """
        after = self._hashes(model)
        changed = [name for name, value in self.before.items() if after.get(name) != value]
        if changed:
            raise Corrupt(
                f"{len(changed)} base tensors changed while only an adapter was to train, first {changed[0]}",
                hint="beside a buffer, and where an adapter is handed back, the base stays; the result is discarded",
            )
