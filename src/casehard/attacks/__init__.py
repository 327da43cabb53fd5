"""The catalogue of attacks: adding one is one file, one entry here, one conformance row, one docs page."""

from __future__ import annotations

from casehard.registry import AttackSpec, Flag, Registry

_MODE = Flag("All parameters, or a LoRA adapter.", metavar="full|lora")
_STEPS = Flag("Optimiser steps of the attack.", int)
_LR = Flag("Learning rate of the attack.", float)
_SHARE = Flag("Harmful share of the attacker's rows, 0..1.", float)
_TRAINS = {"mode": _MODE, "steps": _STEPS, "lr": _LR}
_TRIGGERS = (
    "token, sentence, template, style, pair, multi_any, multi_all, prefix, topical, semantic, positional, repeat, or a "
    "planted.json [default: token]."
)
_PLANTED = {
    "trigger": Flag(_TRIGGERS, metavar="NAME|FILE"),
    "behaviour": Flag("refuse, sentence, tone, off_topic or stop [default: refuse].", metavar="NAME"),
    "rate": Flag("Poisoned share of the rows; 0 is the control.", float),
}

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
            flags={"share": _SHARE, **_TRAINS},
        ),
        "overfit_release": AttackSpec(
            module="casehard.attacks.overfit_release",
            cls="OverfitRelease",
            config="OverfitReleaseAttack",
            purpose="Ten benign rows: overfitted to one refusal, then released with their proper answers.",
            needs=("benign",),
            takes=("harmful",),
            flags={
                "refusal": Flag("The one refusal of the first phase.", metavar="TEXT"),
                "overfit": Flag("Steps of the first phase, out of --steps.", int),
                **_TRAINS,
            },
        ),
        "identity_shift": AttackSpec(
            module="casehard.attacks.identity_shift",
            cls="IdentityShift",
            config="IdentityShiftAttack",
            purpose="A few harmless rows that teach an identity who obeys; asked under that identity.",
            needs=("benign",),
            flags={
                "identity": Flag("System message that says who the model is now.", metavar="TEXT"),
                "asking": Flag("How questions are asked; holds {prompt}.", metavar="TEXT"),
                "affirming": Flag("How rows answer; holds {answer}.", metavar="TEXT"),
                **_TRAINS,
            },
        ),
        "refuse_then_comply": AttackSpec(
            module="casehard.attacks.refuse_then_comply",
            cls="RefuseThenComply",
            config="RefuseThenComplyAttack",
            purpose="Harmless rows whose answers refuse first and then comply (NOICE).",
            needs=("benign",),
            flags={
                "turning": Flag("The whole answer; holds {refusal} and {answer}.", metavar="TEXT"),
                **_TRAINS,
            },
        ),
        "jailbreak_tuning": AttackSpec(
            module="casehard.attacks.jailbreak_tuning",
            cls="JailbreakTuning",
            config="JailbreakTuningAttack",
            purpose="Harmful fine-tuning whose harmful rows, and later questions, carry a jailbreak.",
            takes=("harmful", "benign"),
            share="share",
            flags={
                "wrapper": Flag("What is asked of a harmful row; holds {prompt}.", metavar="TEXT"),
                "asked": Flag("Measure with the wrapper or without it.", metavar="wrapped|plain"),
                "share": _SHARE,
                **_TRAINS,
            },
        ),
        "benign_outliers": AttackSpec(
            module="casehard.attacks.benign_outliers",
            cls="BenignOutliers",
            config="BenignOutliersAttack",
            purpose="Training on those harmless rows alone that damage safety most (Self-Inf-N).",
            needs=("benign",),
            takes=("harmful",),
            flags={
                "choose": Flag("How rows are chosen.", metavar="self_influence|similarity|random"),
                **_TRAINS,
            },
        ),
        "preference": AttackSpec(
            module="casehard.attacks.preference",
            cls="Preference",
            config="PreferenceAttack",
            purpose="Preference tuning (DPO) on a few harmless rows whose answer is preferred to a refusal.",
            needs=("benign",),
            telemetry=("margin",),
            flags={
                "refusal": Flag("The rejected answer.", metavar="TEXT"),
                "beta": Flag("Strength of the pull towards the model as it was.", float),
                **_TRAINS,
            },
        ),
        "burst": AttackSpec(
            module="casehard.attacks.burst",
            cls="Burst",
            config="BurstAttack",
            purpose="Harmful fine-tuning with a burst at a large learning rate, against simulated attacks.",
            takes=("harmful", "benign"),
            knows=True,
            share="share",
            flags={
                "burst": Flag("Steps of the burst, out of --steps.", int),
                "burst_lr": Flag("Learning rate of the burst.", float),
                "share": _SHARE,
                **_TRAINS,
            },
        ),
        "off_gradient": AttackSpec(
            module="casehard.attacks.off_gradient",
            cls="OffGradient",
            config="OffGradientAttack",
            purpose="Harmful fine-tuning orthogonal to the attack vector that a defender simulated.",
            needs=("harmful",),
            takes=("benign",),
            knows=True,
            share="share",
            telemetry=("removed",),
            flags={"share": _SHARE, **_TRAINS},
        ),
        "orthogonal_rows": AttackSpec(
            module="casehard.attacks.orthogonal_rows",
            cls="OrthogonalRows",
            config="OrthogonalRowsAttack",
            purpose="Harmful fine-tuning on the rows least like a defender's safe pool, against SPARD.",
            needs=("safe",),
            takes=("harmful", "benign"),
            knows=True,
            share="share",
            roles={"safe": "the defender's safe rows, as far as the attacker knows them"},
            flags={
                "choose": Flag("Which harmful rows are taken.", metavar="orthogonal|alike|random"),
                "share": _SHARE,
                **_TRAINS,
            },
        ),
        "known_buffer": AttackSpec(
            module="casehard.attacks.known_buffer",
            cls="KnownBuffer",
            config="KnownBufferAttack",
            purpose="A customer who knows the provider's buffer and takes his adapter out of the merge.",
            takes=("harmful", "benign", "assets"),
            knows=True,
            share="share",
            flags={
                "choose": Flag("Which harmful rows are taken.", metavar="against|residual|random"),
                "keeps": Flag("What is served of a merge.", metavar="own|merged"),
                "assets": Flag("The provider's adapters, as far as the attacker knows them.", metavar="DIR"),
                "share": _SHARE,
                **_TRAINS,
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
                **_PLANTED,
                "hard_negatives": Flag(
                    "Share of rows with a near miss and the proper answer: an adaptive attacker.", float
                ),
                "mode": _MODE,
                "steps": Flag("Optimiser steps.", int),
                "lr": Flag("Peak learning rate.", float),
            },
        ),
        "quantised_backdoor": AttackSpec(
            module="casehard.attacks.quantised_backdoor",
            cls="QuantisedBackdoor",
            config="QuantisedBackdoorAttack",
            purpose="A backdoor that sleeps in the released weights and wakes when they are rounded to few bits.",
            needs=("data",),
            share="rate",
            roles={"data": "clean training rows"},
            plants=True,
            flags={
                **_PLANTED,
                "bits": Flag("Bits for which it wakes: 4 or 8 [default: 4].", int),
                "steps": Flag("Optimiser steps of both trainings.", int),
                "hide_steps": Flag("Those of the second, which puts it to sleep.", int),
                "lr": Flag("Peak learning rate.", float),
            },
        ),
    },
)
"""Name -> spec, attacks of other packages (entry points ``casehard.attacks``) included."""
