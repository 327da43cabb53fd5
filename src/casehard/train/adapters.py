"""Reading PEFT adapters back from a checkpoint without touching which of them are active or trainable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from casehard.errors import Corrupt

_WEIGHTS = "adapter_model.safetensors"


def is_peft(model: Any) -> bool:
    """Return whether ``model`` is a PeftModel; peft is imported only when something looks like one."""
    if not hasattr(model, "peft_config") or not hasattr(model, "base_model"):
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def load_adapters(model: Any, folder: Path) -> None:
    """Load every adapter of ``model`` in place.

    The stock resume activates the first adapter only and leaves the others frozen; here nothing but values changes.

    Raises:
        Corrupt: the checkpoint lacks an adapter that the model has.
    """
    from peft import set_peft_model_state_dict

    for name in model.peft_config:
        # save_pretrained puts the adapter called "default" at the top and every other one into its own folder.
        path = folder / _WEIGHTS if name == "default" else folder / name / _WEIGHTS
        if not path.exists():
            raise Corrupt(
                f"{folder}: no weights of adapter {name!r}", hint="the method must add the same adapters on a resume"
            )
        # Same dtype as the live tensors: reading may not round twice.
        set_peft_model_state_dict(model, load_file(path), adapter_name=name)
