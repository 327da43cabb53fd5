"""Shard a model over the ranks of a process group by FSDP2, and bring it together again on one of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from casehard.distributed.ranks import rank
from casehard.errors import Unsupported


def shard(model: nn.Module, ranks: int, device: torch.device) -> None:
    """Split a loaded model over all ranks, in place and onto ``device``: every decoder layer by itself, then the rest.

    For models with tied embeddings: transformers, asked to shard while loading (``DistributedConfig``), shards input
    and output embedding before it ties them. Where the ranks do not divide the rows, FSDP2 then pads each into a copy
    of its own and the output embedding is never trained (seen in transformers 5.23 with torch 2.13). A
    ``transformers.Trainer`` takes the model as one sharded while loading.

    Raises:
        Unsupported: the class names no layers that belong together.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers.distributed.configuration_utils import DistributedConfig

    whole: Any = model
    kinds = set(getattr(whole, "_no_split_modules", None) or ())
    layers = [m for m in model.modules() if type(m).__name__ in kinds]
    if not layers:
        raise Unsupported(f"{type(model).__name__} on {ranks} ranks: it names no layers", hint="use one process")
    mesh = init_device_mesh(device.type, (ranks,), mesh_dim_names=("fsdp",))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    whole.config.distributed_config = DistributedConfig(fsdp_size=ranks)
    whole._is_distributed_loading_by_transformers = whole._is_fsdp_managed_module = True


def gather(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """Return the weights of a sharded model, whole, on rank 0's host; None on every other rank. All ranks call this."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return None if rank() else state
