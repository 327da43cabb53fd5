"""What leaves where a method of a provider tunes an adapter: searched for the buffer before it is published."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from casehard.defences.buffer_reinforce.assets import Assets
from casehard.defences.buffer_reinforce.publish import refuse_buffer_in
from casehard.model.lora_write import adapter_writer
from casehard.model.model import Model
from casehard.types import Checkpoint


def writer_of(net: nn.Module, base: Model, method: Any, provenance: Mapping[str, Any]) -> Callable[[Path], Checkpoint]:
    """Return the function that writes the tuned adapter of ``net``; see ``casehard.model.lora_write.adapter_writer``.

    Args:
        net: a ``PeftModel`` with one adapter.
        base: the model it was tuned on.
        method: the method that tuned it; where it has provider ``assets``, nothing of their buffer may leave.
        provenance: JSON values.
    """
    assets = getattr(method, "assets", None)
    return adapter_writer(
        net,
        base,
        provenance,
        merged=bool(getattr(method.config, "reinforce", False)),
        check=(lambda folder: refuse_buffer_in(folder, assets)) if isinstance(assets, Assets) else None,
    )
