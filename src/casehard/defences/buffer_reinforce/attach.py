"""The buffer around any training loop: a Trainer, TRL, or one written by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from casehard.defences.buffer_reinforce.assets import Assets, read_assets
from casehard.defences.buffer_reinforce.frozen_lora import BaseWatch, FrozenLora, base_tensors


@contextmanager
def buffered(model: nn.Module, assets: Assets | Path | str, *, whole: bool | None = None) -> Iterator[FrozenLora]:
    """Keep the provider's buffer active, frozen and out of reach while the block trains an adapter of ``model``.

        with buffered(model, "assets"):
            trainer.train()

    The base is frozen on entry, as PEFT would; a bare model may be given its adapter inside the block (TRL's
    ``peft_config``). The buffer is never a module of the model, so whatever the block saves does not hold it. It is
    taken out when the block ends, also by an exception.

    Args:
        model: a ``PeftModel`` or a bare model.
        assets: the provider's folder, made for this base.
        whole: compare every byte of the base before and after; None does so up to 1 GiB and samples beyond.

    Yields:
        The attached buffer; its ``gate`` scales it.

    Raises:
        ConfigError: the assets belong to another base.
        Corrupt: a base weight changed inside the block, or the buffer did.
    """
    opened = assets if isinstance(assets, Assets) else read_assets(assets)
    opened.require_base(model)
    for _, tensor in base_tensors(model):
        tensor.requires_grad_(False)
    watch = BaseWatch(model, whole=whole)
    buffer = FrozenLora(opened.buffer()).attach(model)
    try:
        yield buffer
    finally:
        buffer.detach()
    watch.verify(model)
