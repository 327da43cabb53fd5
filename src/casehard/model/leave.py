"""How a model leaves memory: as a checkpoint or an adapter, and never by accident if it was attacked."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from casehard.errors import ConfigError, Refused
from casehard.model.digest import folder_digest
from casehard.model.model import Model
from casehard.model.provenance import ATTACKED, KEY
from casehard.model.save import save as save_checkpoint


def save(model: Model, out: str | Path, *, attacked: bool = False) -> Model:
    """Save a model as an ordinary Hugging Face folder with provenance and a manifest, or an adapter as a PEFT folder.

    Args:
        model: what to save.
        out: the folder to make.
        attacked: write it although it is attacked or jailbroken: for research on your own disk only.

    Returns:
        The model, with ``path`` and the content digest of what was written.

    Raises:
        ConfigError: no model, or ``attacked`` is neither True nor False.
        Refused: the model may not leave, and ``attacked`` is off.
        UserError: ``out`` is taken.
        StorageError: the disk refused the write; nothing is left behind.
    """
    if not isinstance(model, Model):
        hint = "its model is the attribute .model" if hasattr(model, "model") else "casehard.load makes one of a folder"
        raise ConfigError(f"what is to be saved is a {type(model).__name__}, not a Model", hint=hint)
    if attacked is not True and attacked is not False:
        raise ConfigError(f"attacked is {attacked!r}", hint="True or False")
    if not model.may_leave and not attacked:
        how = ", then ".join(model.attacked)
        raise Refused(
            f"this model was attacked ({how}) and is kept in memory", hint="attacked=True writes it all the same"
        )
    out = Path(out)
    if model.writer is not None:
        written = model.writer(out).path
        return replace(model, path=written, digest=folder_digest(written))
    net: Any = model.net
    if hasattr(net, "peft_config"):
        net = copy.deepcopy(net).merge_and_unload()
    made = model.lineage[-1] if model.lineage else None
    known = {KEY: sorted(model.trained_prompts)} if model.trained_prompts else {}
    known |= {ATTACKED: [*model.attacked]} if model.attacked else {}
    done = save_checkpoint(
        net,
        model.tokenizer,
        out,
        parent=model.parent,
        method=made.method if made else "none",
        provenance={**(made.provenance if made else {}), **known},
    )
    return replace(model, path=done.path, digest=done.digest)
