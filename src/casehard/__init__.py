"""Harden language models against harmful fine-tuning and backdoors, and show the evidence.

    import casehard as ch

    hard = ch.defend(ch.load("my-model"), "patcher", data="align.jsonl", unsafe="simulated.jsonl")
    curve = ch.attack(hard, "finetune", harmful="h.jsonl", benign="b.jsonl", suite="suite.yaml")

Public names load lazily: ``import casehard`` costs milliseconds and does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC: dict[str, str] = {
    # verbs
    "load": "casehard.api",
    "rows": "casehard.api",
    "defend": "casehard.api",
    "attack": "casehard.api",
    "evaluate": "casehard.api",
    "save": "casehard.api",
    "bench": "casehard.api",
    "report": "casehard.api",
    # catalogues
    "DEFENCES": "casehard.defend",
    "ATTACKS": "casehard.attack",
    # nouns
    "Model": "casehard.model.model",
    "Attacked": "casehard.attack.protocol",
    "Evaluation": "casehard.api",
    "Example": "casehard.types",
    "Message": "casehard.types",
    "Budget": "casehard.types",
    "Score": "casehard.types",
    # settings
    "TrainConfig": "casehard.train.recipe",
    "Lora": "casehard.train.tune",
    "SelectConfig": "casehard.data.select",
    "PatcherConfig": "casehard.defend.patcher",
    "SpardConfig": "casehard.defend.spard",
    "BufferReinforceConfig": "casehard.defend.buffer_reinforce",
    "MbDefenseConfig": "casehard.defend.mb_defense",
    "FinetuneAttack": "casehard.attack.finetune",
    "BackdoorAttack": "casehard.attack.backdoor",
    # methods as objects, for training scripts of your own
    "Patcher": "casehard.defend.patcher",
    "Spard": "casehard.defend.spard",
    "BufferReinforce": "casehard.defend.buffer_reinforce",
    "MbDefense": "casehard.defend.mb_defense",
    "UserError": "casehard.errors",
}

if TYPE_CHECKING:  # what the table above says, once more in the words of type checkers; a test compares the two
    from casehard.api import Evaluation, attack, bench, defend, evaluate, load, report, rows, save
    from casehard.attack import ATTACKS
    from casehard.attack.backdoor import BackdoorAttack
    from casehard.attack.finetune import FinetuneAttack
    from casehard.attack.protocol import Attacked
    from casehard.data.select import SelectConfig
    from casehard.defend import DEFENCES
    from casehard.defend.buffer_reinforce import BufferReinforce, BufferReinforceConfig
    from casehard.defend.mb_defense import MbDefense, MbDefenseConfig
    from casehard.defend.patcher import Patcher, PatcherConfig
    from casehard.defend.spard import Spard, SpardConfig
    from casehard.errors import UserError
    from casehard.model.model import Model
    from casehard.train.recipe import TrainConfig
    from casehard.train.tune import Lora
    from casehard.types import Budget, Example, Message, Score

__all__ = [
    "ATTACKS",
    "DEFENCES",
    "Attacked",
    "BackdoorAttack",
    "Budget",
    "BufferReinforce",
    "BufferReinforceConfig",
    "Evaluation",
    "Example",
    "FinetuneAttack",
    "Lora",
    "MbDefense",
    "MbDefenseConfig",
    "Message",
    "Model",
    "Patcher",
    "PatcherConfig",
    "Score",
    "SelectConfig",
    "Spard",
    "SpardConfig",
    "TrainConfig",
    "UserError",
    "__version__",
    "attack",
    "bench",
    "defend",
    "evaluate",
    "load",
    "report",
    "rows",
    "save",
]


def __getattr__(name: str) -> Any:
    """Import a public name the first time it is used."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'casehard' has no attribute {name!r}; public names: {', '.join(sorted(_PUBLIC))}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
