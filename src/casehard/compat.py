"""Every difference between supported versions of torch and transformers, the versions that are installed, and every
private member of those packages that we touch.

Supported: torch >= 2.11, transformers 5.17 up to the next major version.
"""

from __future__ import annotations

import functools
import sys
from importlib import metadata
from typing import Any

from casehard.errors import Unsupported

MINIMUM = {"torch": (2, 11), "transformers": (5, 17)}

PRIVATE: dict[str, str] = {
    "transformers.trainer:Trainer._save_checkpoint": "overridden: checkpoints are staged and renamed",
    "transformers.trainer:Trainer._get_output_dir": "overridden: names the staging folder",
    "transformers.trainer:Trainer._save": "overridden: a rank's own part of a sharded model",
    "transformers.trainer:Trainer._save_optimizer_and_scheduler": "overridden: safetensors instead of pickles",
    "transformers.trainer:Trainer._load_optimizer_and_scheduler": "overridden: refuses to go on without them",
    "transformers.trainer:Trainer._load_rng_state": "overridden: refuses to go on without it",
    "transformers.trainer:Trainer._load_from_checkpoint": "overridden: adapters keep which of them is active",
    "transformers.trainer:Trainer._load_best_model": "overridden: from a verified checkpoint",
    "transformers.trainer:Trainer._issue_warnings_after_load": "overridden: missing keys are an error",
    "transformers.trainer:Trainer._get_train_sampler": "overridden: rows are a function of (seed, step)",
    "transformers.trainer:Trainer._get_grad_norm": "overridden: a norm that is not finite stops the run first",
    "transformers.trainer:Trainer._prepare_for_training": "called: shards a model whose run had ended",
    "transformers.trainer:Trainer._prepare_inputs": "called: moves a batch to the device",
    "transformers.modeling_utils:PreTrainedModel._no_split_modules": "read: which layers are sharded one by one",
    "transformers.configuration_utils:PreTrainedConfig._attn_implementation": "read: attackers elsewhere attend alike",
    "transformers.configuration_utils:PreTrainedConfig._name_or_path": "removed: it says where, not what",
    "transformers.configuration_utils:PreTrainedConfig._commit_hash": "left out of digests",
    "accelerate.accelerator:_original_forward": "read: mixed precision shadows forward, evaluation wants the real one",
    "torch:_foreach_add_": "called: one kernel for many tensors",
    "torch:_foreach_div_": "called: one kernel for many tensors",
    "torch:Tensor._backward_hooks": "read: hooks of a master weight see the gradient of its view",
    "torch:Tensor._post_accumulate_grad_hooks": "the same",
    "torch.nn:Module._parameters": "read: a layer's own weight, not what its class calls so",
    "torch.distributed:ProcessGroupGloo._Options": "called: process groups between defender and attackers",
    "torch.distributed.fsdp:FSDPModule._get_fsdp_state": "called: FSDP2's state has no public door",
    "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState._fsdp_param_groups": "read: groups of sharded weights",
    "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState._is_root": "read: whose iteration state is reset",
    "torch.distributed.fsdp._fully_shard._fsdp_param_group:FSDPParamGroup._partial_reduce_output": "cleared",
    "torch.distributed.fsdp._fully_shard._fsdp_param:FSDPParam._unsharded_param": "cleared after faults",
    "torch.distributed.fsdp._fully_shard._fsdp_param:FSDPParam._module_info": "read: tied weights sharded twice",
    "concurrent.futures:ProcessPoolExecutor._processes": "read: only our own workers are told to stop",
    "atexit:_run_exitfuncs": "called: a rank leaves without the interpreter's end, but with its exit handlers run",
}
"""module:member -> what we do with it. A test asserts that each exists, and that no other is used."""


def version_of(package: str) -> str:
    """Return the version of an installed package, "" if it is not there. Nothing is imported.

    A package that is used from a source tree has no metadata, and one whose installation was cut short may have some
    without a version: then what it says of itself counts, once it is loaded.
    """
    try:
        if found := metadata.version(package):
            return found
    except metadata.PackageNotFoundError:
        pass
    return str(getattr(sys.modules.get(package), "__version__", ""))


def requirements_of(package: str) -> list[str] | None:
    """Return what an installed package says it requires; None if it has no metadata to say so."""
    try:
        return metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return None


def _release(text: str) -> tuple[int, int]:
    major, minor = text.split("+")[0].split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)


@functools.cache
def require_supported() -> None:
    """Refuse versions the training shell was never tested with.

    Raises:
        Unsupported: names the package, the version found and the range.
    """
    for package, lowest in MINIMUM.items():
        found = version_of(package)
        low = ".".join(map(str, lowest))
        if _release(found) < lowest:
            raise Unsupported(f"{package} {found} is older than {low}", hint=f"pip install '{package}>={low}'")
    if _release(version_of("transformers"))[0] != 5:
        raise Unsupported(
            f"transformers {version_of('transformers')} is not a 5.x release",
            hint="pip install 'transformers>=5.17,<6'",
        )


def loss_is_scaled(trainer: Any, num_items: Any) -> bool:
    """Return whether ``compute_loss`` already normalised over the whole accumulated batch.

    ``loss_is_scaled_for_ga`` exists from transformers 5.19 on; before that the rule below was the only one.
    """
    declared = getattr(trainer, "loss_is_scaled_for_ga", None)
    if declared is not None:
        return bool(declared)
    by_model = trainer.model_accepts_loss_kwargs and num_items is not None
    return bool(by_model or trainer.compute_loss_func is not None)
