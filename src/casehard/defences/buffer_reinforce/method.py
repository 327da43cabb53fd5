"""Buffer-and-Reinforce: fine-tune beside a temporary jailbreak, remove it, merge what refuses.

    tune    min over theta_U  -E_{user rows} log p(y | x; theta, theta_B, theta_U)                               (1)
    remove  theta_B leaves; theta is what it was, bit for bit
    merge   Delta = c_U Delta_U + c_R (I - alpha Q Q') Delta_R,  Q a basis of Delta_U's output space             (2)

Delta_X = s_X B_X A_X, the update of a layer by adapter X: B(uffer), R(einforce), U(ser). theta and theta_B are frozen
and active in (1). The buffer has learnt the compliance that harmful rows teach, so their gradient towards it
is small and theta_U does not take it up. B and R are the provider's, made once a base (``prepare.py``).

Source: Ham, Jang, Lee, Kim, ICML 2026, arXiv 2605.24550, equations 4 to 9.
Differs from the published code: the buffer is attached, not merged into a bf16 copy of the base; it is never part of
the model; (2) is exact in factor space and its coefficients are settings. The merge has its own page.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from casehard.defences.buffer_reinforce.assets import Assets, read_assets
from casehard.defences.buffer_reinforce.frozen_lora import (
    BaseWatch,
    FrozenLora,
    base_tensors,
    replace_adapter,
)
from casehard.errors import ConfigError, Unsupported
from casehard.limits import Limited
from casehard.maths.merge import LoraPair, MergeConfig, merge_states
from casehard.model.lora_files import live_pairs
from casehard.train.protocol import Setup, StateValue

USER = "default"
"""Name of the adapter that trains."""


@dataclass(frozen=True, kw_only=True)
class BufferReinforceConfig(Limited):
    """Settings of the customer's run. The ablations of the paper's Table 6 are combinations of the first three."""

    buffer: bool = True
    """Attach the buffer while the user's adapter trains (B)."""
    reinforce: bool = True
    """Merge the reinforce adapter at the end (R); off leaves the user's adapter as trained."""
    merge: MergeConfig = field(default_factory=MergeConfig)
    """Coefficients and basis of (2), taken as a whole; alpha = 0 is the merge without projection (no Q). The default is
    ours, from docs/evidence/buffer_frontier.md; preset ``paper`` has the paper's."""
    orthogonal_start: bool = False
    """Draw the rows of A_U orthogonal to those of A_R. Ours; the paper's share a seed, and probably their first A."""
    whole_check: bool | None = None
    """Compare every byte of the base before and after; None does so up to 1 GiB and samples each tensor beyond."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reinforce and self.merge.form != "concat":
            raise ConfigError(
                f"merge.form is {self.merge.form!r}: the method leaves one adapter that computes the result",
                hint="form concat here; reinforce: false, then `casehard merge reinforce`, for a shared adapter",
            )


PRESETS: dict[str, BufferReinforceConfig] = {
    "default": BufferReinforceConfig(),
    "paper": BufferReinforceConfig(
        merge=MergeConfig(c_user=0.5, c_reinforce=0.5, alpha=0.1, basis="paper", protect_safety=False),
    ),
    "buffer_only": BufferReinforceConfig(reinforce=False),
}

_FOREIGN = {
    "use_dora": "DoRA rescales the base weight",
    "use_rslora": "rsLoRA scales by the root of the rank",
    "lora_bias": "biases train beside the factors",
    "modules_to_save": "whole modules train beside the factors",
    "trainable_token_indices": "embedding rows train beside the factors",
    "target_parameters": "factors of bare parameters are not linear layers",
}


class BufferReinforce:
    """Buffer-and-Reinforce as a method: ``HardenedTrainer(method=...)`` or ``fit(method=...)`` on a ``PeftModel``.

    Args:
        config: settings, see :class:`BufferReinforceConfig`.
        assets: the provider's folder, made for the model's base.

    Raises:
        UserError, Corrupt: the folder is missing or damaged.
    """

    name = "buffer_reinforce"

    def __init__(self, config: BufferReinforceConfig | None = None, *, assets: Path | str | Assets) -> None:
        self.config = config or BufferReinforceConfig()
        self.assets = assets if isinstance(assets, Assets) else read_assets(assets)
        self._buffer: FrozenLora | None = None
        self._watch: BaseWatch | None = None

    # -- seams ---------------------------------------------------------------------------------------------

    def prepare(self, setup: Setup) -> None:
        """Check what is about to train, and attach the buffer; again after a resume, as no checkpoint holds it.

        Raises:
            Unsupported: not a LoRA run, or LoRA of a kind that (2) cannot merge.
            ConfigError: assets for another base, or layers of another shape.
        """
        self.release()
        model = setup.model
        require_user_adapter(model)
        self.assets.require_base(model)
        self._watch = BaseWatch(model, whole=self.config.whole_check)
        if self.config.orthogonal_start:
            start_orthogonal(model, self.assets.reinforce())
        if self.config.buffer:
            self._buffer = FrozenLora(self.assets.buffer()).attach(model)

    def finish(self, model: nn.Module) -> None:
        """Remove the buffer, verify the base, and merge: the model's active adapter then computes (2).

        Raises:
            Corrupt: a base weight or the buffer is not what it was.
        """
        self.release()
        assert self._watch is not None, "finish without prepare"
        self._watch.verify(model)
        if self.config.reinforce:
            replace_adapter(model, self.merged(model), USER)

    def state(self) -> dict[str, StateValue]:
        """Return which assets this run uses; never the buffer."""
        return {"assets": self.assets.digest}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Refuse to continue with other assets than the run began with.

        Raises:
            ConfigError: the digests differ.
        """
        if state["assets"] != self.assets.digest:
            self.release()
            raise ConfigError("the checkpoint belongs to a run with other assets", hint="give the same --assets folder")

    # -- around the run ------------------------------------------------------------------------------------

    def check_format(self, tokenizer: Any, *, system: str | None) -> None:
        """Check that the rows are rendered as the assets' were.

        Raises:
            ConfigError: another tokenizer, chat template or system message.
        """
        self.assets.require_format(tokenizer, system=system)

    def release(self) -> None:
        """Take the buffer out of the model; nothing to do when it is out. For a run that failed half-way."""
        if self._buffer is not None:
            buffer, self._buffer = self._buffer, None
            buffer.detach()

    # -- parts ---------------------------------------------------------------------------------------------

    def merged(self, model: nn.Module) -> dict[str, LoraPair]:
        """Return (2) for the user's adapter as it stands: layer -> factors."""
        return merge_states(live_pairs(model, USER), self.assets.reinforce(), self.config.merge).layers


def require_user_adapter(model: nn.Module) -> None:
    """Check that exactly one plain LoRA adapter, called "default", trains, and nothing else.

    Raises:
        Unsupported: anything else; says what.
    """
    configs: Any = getattr(model, "peft_config", None)
    if configs is None or not hasattr(model, "base_model"):
        raise Unsupported(
            "buffer_reinforce tunes a LoRA adapter and got a bare model: trained base weights cannot be given back",
            hint="mode lora; in code: casehard.model.adapters.add_lora(model, rank, alpha)",
        )
    active = list(getattr(model, "active_adapters", ()))
    if list(configs) != [USER] or active != [USER]:
        raise Unsupported(
            f"the model has the adapters {list(configs)}, active {active}", hint=f"exactly one, called {USER!r}"
        )
    config = configs[USER]
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        raise Unsupported(f"the user's adapter is {kind}", hint="only LoRA adapters can be merged in factor space")
    for key, why in _FOREIGN.items():
        if getattr(config, key, None):
            raise Unsupported(f"the user's adapter has {key}: {why}", hint="train a plain LoRA adapter")
    if config.bias != "none":
        raise Unsupported(f"the user's adapter has bias = {config.bias!r}: biases train too", hint="use bias='none'")
    trained = [name for name, tensor in base_tensors(model) if tensor.requires_grad]
    if trained:
        raise Unsupported(f"the base tensor {trained[0]} is trainable", hint="freeze the base: only the adapter trains")
    if not any(p.requires_grad for p in model.parameters()):
        raise Unsupported("the user's adapter is frozen: nothing would train", hint=f"set_adapter({USER!r})")


@torch.no_grad()
def start_orthogonal(model: nn.Module, reinforce: Mapping[str, LoraPair]) -> None:
    """Take out of every fresh A_U what lies in the row space of A_R; the model computes what it did, as B_U = 0.

    Raises:
        ConfigError: a layer's B_U is not zero, or the two ranks together exceed its width.
    """
    for name, module in model.named_modules():
        layer = name.removeprefix("base_model.model.")
        held: Any = getattr(module, "lora_A", None)
        if layer not in reinforce or held is None or USER not in held:
            continue
        a, b = held[USER].weight, module.lora_B[USER].weight
        if bool(b.any()):
            raise ConfigError(f"orthogonal_start: {layer} is trained already", hint="it is for fresh adapters")
        other = reinforce[layer].a.to(device=a.device, dtype=torch.float32)
        if other.shape[0] + a.shape[0] > a.shape[1]:
            raise ConfigError(f"orthogonal_start: ranks {a.shape[0]} + {other.shape[0]} exceed the width {a.shape[1]}")
        q = torch.linalg.qr(other.t()).Q
        a.copy_((a.float() - (a.float() @ q) @ q.t()).to(a.dtype))


def preset(name: str, **changes: Any) -> BufferReinforceConfig:
    """Return a named preset with changes applied: ``default``, ``paper`` or ``buffer_only``."""
    if name not in PRESETS:
        raise ConfigError(f"buffer_reinforce preset {name!r} is unknown", hint=f"one of {sorted(PRESETS)}")
    return replace(PRESETS[name], **changes)
