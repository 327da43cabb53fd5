"""The steps that chains are made of: each takes a model in memory and gives rows and, where it trains, another model.

    Finetune   harden, tune a customer's rows, repair: training on rows with a method inside, or none
    Attack     any attack of the catalogue, measured on the way; with a method inside it is a customer's job
    Evaluate   one row per prompt of a suite
    Chain      an attack and what is done about it afterwards, in memory; the end is measured

A step is a frozen record of plain values, so that it can be checked before anything runs, digested, stored and sent to
another process. ``run(model)`` does the work. Rows are named by role, as the specs of ``casehard.registry`` do.
"""

from __future__ import annotations

from casehard.model.step import Inputs, Outcome, Step
from casehard.steps.attack import Attack, attack_with
from casehard.steps.chain import Chain
from casehard.steps.defence import Defence, assets_digest
from casehard.steps.evaluate import Evaluate
from casehard.steps.finetune import CUSTOMER, Finetune, finetune_on, harden

__all__ = [
    "CUSTOMER",
    "Attack",
    "Chain",
    "Defence",
    "Evaluate",
    "Finetune",
    "Inputs",
    "Outcome",
    "Step",
    "assets_digest",
    "attack_with",
    "finetune_on",
    "harden",
]
