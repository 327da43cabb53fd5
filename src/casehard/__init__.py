"""Harden language models against harmful fine-tuning and backdoors, and show the evidence.

    import casehard as ch

    hard = ch.defend(ch.load("my-model"), "patcher", data="align.jsonl", unsafe="simulated.jsonl")
    curve = ch.attack(hard, "finetune", harmful="h.jsonl", benign="b.jsonl", suite="suite.yaml")

Public names load lazily: ``import casehard`` costs milliseconds and does not import torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
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

__all__ = ["__version__", *_PUBLIC]
