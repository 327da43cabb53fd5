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
    "search": "casehard.api",
    "evaluate": "casehard.api",
    "save": "casehard.api",
    "audit": "casehard.scan.audit_run",
    "bench": "casehard.api",
    "report": "casehard.api",
    "recommend": "casehard.advice",
    # catalogues
    "DEFENCES": "casehard.defences",
    "ATTACKS": "casehard.attacks",
    "JUDGES": "casehard.evaluation.judges",
    # nouns
    "Model": "casehard.model.model",
    "Attacked": "casehard.attacks.protocol",
    "Audited": "casehard.scan.audit_run",
    "Evaluation": "casehard.api",
    "Example": "casehard.types",
    "Message": "casehard.types",
    "Budget": "casehard.types",
    "Score": "casehard.types",
    # settings
    "TrainConfig": "casehard.train.recipe",
    "Lora": "casehard.train.tune",
    "SelectConfig": "casehard.data.select",
    "PatcherConfig": "casehard.defences.patcher",
    "SpardConfig": "casehard.defences.spard",
    "BufferReinforceConfig": "casehard.defences.buffer_reinforce.method",
    "MbStage2Config": "casehard.defences.mb_defense.method",
    "FinetuneAttack": "casehard.attacks.finetune",
    "BackdoorAttack": "casehard.attacks.backdoor",
    # methods as objects, for training scripts of your own
    "Patcher": "casehard.defences.patcher",
    "Spard": "casehard.defences.spard",
    "BufferReinforce": "casehard.defences.buffer_reinforce.method",
    "MbStage2": "casehard.defences.mb_defense.method",
    "UserError": "casehard.errors",
}

if TYPE_CHECKING:  # what the table above says, once more in the words of type checkers; a test compares the two
    from casehard.advice import recommend
    from casehard.api import Evaluation, attack, bench, defend, evaluate, load, report, rows, save, search
    from casehard.attacks import ATTACKS
    from casehard.attacks.backdoor import BackdoorAttack
    from casehard.attacks.finetune import FinetuneAttack
    from casehard.attacks.protocol import Attacked
    from casehard.data.select import SelectConfig
    from casehard.defences import DEFENCES
    from casehard.defences.buffer_reinforce.method import BufferReinforce, BufferReinforceConfig
    from casehard.defences.mb_defense.method import MbStage2, MbStage2Config
    from casehard.defences.patcher import Patcher, PatcherConfig
    from casehard.defences.spard import Spard, SpardConfig
    from casehard.errors import UserError
    from casehard.evaluation.judges import JUDGES
    from casehard.model.model import Model
    from casehard.scan.audit_run import Audited, audit
    from casehard.train.recipe import TrainConfig
    from casehard.train.tune import Lora
    from casehard.types import Budget, Example, Message, Score

__all__ = [
    "ATTACKS",
    "DEFENCES",
    "JUDGES",
    "Attacked",
    "Audited",
    "BackdoorAttack",
    "Budget",
    "BufferReinforce",
    "BufferReinforceConfig",
    "Evaluation",
    "Example",
    "FinetuneAttack",
    "Lora",
    "MbStage2",
    "MbStage2Config",
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
    "audit",
    "bench",
    "defend",
    "evaluate",
    "load",
    "recommend",
    "report",
    "rows",
    "save",
    "search",
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
