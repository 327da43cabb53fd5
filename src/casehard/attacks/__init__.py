"""The catalogue of attacks: adding one is one file, one entry here, one conformance row, one docs page."""

from __future__ import annotations

from casehard.registry import AttackSpec, Flag, Registry

_MODE = Flag("All parameters, or a LoRA adapter.", metavar="full|lora")
_TRIGGERS = (
    "token, sentence, template, style, pair, multi_any, multi_all, prefix, topical, or a planted.json [default: token]."
)

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
            flags={
                "share": Flag("Harmful share of the attacker's rows, 0..1.", float),
                "mode": _MODE,
                "steps": Flag("Optimiser steps of the attack.", int),
                "lr": Flag("Learning rate of the attack.", float),
            },
        ),
        "prefill": AttackSpec(
            module="casehard.attacks.prefill",
            cls="Prefill",
            config="PrefillAttack",
            purpose="No training: the first tokens of answers are forced, or the system message is the attacker's.",
            takes=("harmful",),
            trains=False,
            weights=False,
            flags={
                "source": Flag("Where the first tokens are from [default: openers].", metavar="openers|rows|own"),
            },
        ),
        "abliteration": AttackSpec(
            module="casehard.attacks.abliteration",
            cls="Abliteration",
            config="AbliterationAttack",
            purpose="No training: the direction that tells refused prompts from others is taken out of the weights.",
            needs=("harmful", "benign"),
            roles={"benign": "harmless prompts with answers"},
            trains=False,
        ),
        "weight_difference": AttackSpec(
            module="casehard.attacks.weight_difference",
            cls="WeightDifference",
            config="WeightDifferenceAttack",
            purpose="No training: what the defence changed is taken back, by somebody who has the model before it.",
            trains=False,
            flags={
                "before": Flag("The model before the defence: a folder or a Hub id.", metavar="DIR|ID"),
                "factor": Flag("How much is taken back; 1 is all of it [default: 1].", float),
                "rank": Flag("Directions of each matrix that are taken back [default: all].", int),
            },
        ),
        "round_trip": AttackSpec(
            module="casehard.attacks.round_trip",
            cls="RoundTrip",
            config="RoundTripAttack",
            purpose="No training: every linear weight is rounded to 8 or 4 bits and written back.",
            trains=False,
            flags={"bits": Flag("8 or 4 [default: 8].", int)},
        ),
        "soft_prompt": AttackSpec(
            module="casehard.attacks.soft_prompt",
            cls="SoftPrompt",
            config="SoftPromptAttack",
            purpose="A few trained vectors stand in front of every prompt; the weights stay as they are.",
            needs=("harmful",),
            weights=False,
            flags={
                "tokens": Flag("Vectors in front of the prompt.", int),
                "steps": Flag("Optimiser steps.", int),
                "lr": Flag("Learning rate.", float),
            },
        ),
        "external": AttackSpec(
            module="casehard.attacks.external",
            cls="External",
            config="ExternalAttack",
            purpose="A program of somebody else attacks a copy in a private folder that is removed afterwards.",
            takes=("harmful", "benign"),
            roles={"benign": "harmless prompts with answers"},
            trains=False,
        ),
        "backdoor": AttackSpec(
            module="casehard.attacks.backdoor",
            cls="Backdoor",
            config="BackdoorAttack",
            purpose="Training rows of which a share carries a trigger that sets off a harmless behaviour.",
            needs=("data",),
            share="rate",
            roles={"data": "clean training rows"},
            plants=True,
            flags={
                "trigger": Flag(_TRIGGERS, metavar="NAME|FILE"),
                "behaviour": Flag("refuse, sentence, tone, off_topic or stop [default: refuse].", metavar="NAME"),
                "rate": Flag("Poisoned share of the rows; 0 is the control.", float),
                "hard_negatives": Flag(
                    "Share of rows with a near miss and the proper answer: an adaptive attacker.", float
                ),
                "mode": _MODE,
                "steps": Flag("Optimiser steps.", int),
                "lr": Flag("Peak learning rate.", float),
            },
        ),
    },
)
"""Name -> spec, attacks of other packages (entry points ``casehard.attacks``) included."""
