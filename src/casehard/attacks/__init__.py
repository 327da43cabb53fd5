"""The catalogue of attacks: adding one is one file, one entry here, one conformance row, one docs page."""

from __future__ import annotations

from casehard.registry import AttackSpec, Registry

ATTACKS: Registry[AttackSpec] = Registry(
    "attack",
    "casehard.attacks",
    AttackSpec,
    {
        "finetune": AttackSpec(
            module="casehard.attacks.finetune",
            cls="Finetune",
            config="FinetuneAttack",
            purpose="Harmful fine-tuning of all weights or a LoRA adapter, on rows of which a share is harmful.",
            takes=("harmful", "benign"),
            share="share",
        ),
        "backdoor": AttackSpec(
            module="casehard.attacks.backdoor",
            cls="Backdoor",
            config="BackdoorAttack",
            purpose="Training rows of which a share carries a trigger that sets off a harmless behaviour.",
            needs=("data",),
            share="rate",
            plants=True,
        ),
    },
)
"""Name -> spec, attacks of other packages (entry points ``casehard.attacks``) included."""
