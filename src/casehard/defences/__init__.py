"""The catalogue of defences: adding one is one file, one entry here, one conformance row, one docs page."""

from __future__ import annotations

from casehard.registry import DefenceSpec, Registry

_HARDENED = "It is meant to keep its refusals longer when somebody fine-tunes it on harmful data."
_TUNED = "It is meant to have kept its parent's refusals although it was fine-tuned on data nobody could vouch for."
_CLEANED = "It is meant to have lost backdoors that its parent may have had; it was not hardened against fine-tuning."
_PLAIN = "That is ordinary fine-tuning, the control others are compared with: there is no defence in it."
_PROMPTED = (
    "That is ordinary fine-tuning; the defence is the system message below, which has to be put before every request. "
    "Without it there is none."
)


def _spec(module: str, cls: str, purpose: str, **facts: object) -> DefenceSpec:
    values: dict[str, object] = {"module": f"casehard.defences.{module}", "cls": cls, "config": f"{cls}Config", **facts}
    return DefenceSpec(purpose=purpose, **values)  # type: ignore[arg-type]


DEFENCES: Registry[DefenceSpec] = Registry(
    "method",
    "casehard.methods",
    DefenceSpec,
    {
        "plain": _spec("plain", "Plain", _PLAIN, hardens=False, repairs=True),
        "patcher": _spec(
            "patcher.method",
            "Patcher",
            _HARDENED,
            needs=("unsafe",),
            takes=("retain",),
            ranks=True,
            lora=False,
            train={"steps": 600},  # of 300 steps it held about half as long (docs/evidence/patcher.md)
        ),
        "vaccine": _spec("vaccine", "Vaccine", _HARDENED, telemetry=("pushed_loss",)),
        "booster": _spec(
            "booster", "Booster", _HARDENED, needs=("unsafe",), telemetry=("harmful_loss", "harmful_drop")
        ),
        "tar": _spec(
            "tar",
            "Tar",
            _HARDENED,
            needs=("unsafe",),
            takes=("retain",),
            telemetry=("tamper_loss", "attack_loss", "moved"),
            lora=False,
        ),
        "spard": _spec(
            "spard",
            "Spard",
            _TUNED,
            needs=("safe",),
            selects=True,
            telemetry=("trigger_rate", "violation", "alpha_share", "step_ratio", "step_cosine", "safe_loss"),
        ),
        "buffer_reinforce": _spec(
            "buffer_reinforce.method", "BufferReinforce", _TUNED, needs=("assets",), adapter=True
        ),
        "safe_mixing": _spec("safe_mixing", "SafeMixing", _TUNED, needs=("safe",), telemetry=("safe_loss",)),
        "lisa": _spec("lisa", "Lisa", _TUNED, needs=("safe",), telemetry=("safe_loss",)),
        "safegrad": _spec("safegrad", "SafeGrad", _TUNED, needs=("safe",)),
        "anchor": _spec("anchor", "Anchor", _TUNED, takes=("safe",), telemetry=("anchor_loss",)),
        "token_constrained": _spec("token_constrained", "TokenConstrained", _TUNED, telemetry=("still_learning",)),
        "bottleneck": _spec(
            "bottleneck",
            "Bottleneck",
            _TUNED,
            needs=("safe",),
            roles={"safe": "restricted prompts; their answers are not read"},
            telemetry=("bottleneck_loss",),
        ),
        "one_shot_repair": _spec(
            "one_shot_repair", "OneShotRepair", _TUNED, needs=("safe",), telemetry=("repair_steps", "repair_loss")
        ),
        "ptst": _spec("ptst", "Ptst", _PROMPTED, hardens=False),
        "shrink": _spec("shrink", "Shrink", _TUNED),
        "safelora": _spec("safelora", "SafeLora", _TUNED, needs=("assets",)),
        "security_vector": _spec(
            "buffer_reinforce.security_vector", "SecurityVector", _TUNED, needs=("assets",), adapter=True
        ),
        "antidote": _spec("antidote", "Antidote", _TUNED, needs=("unsafe",)),
        "mb_defense": DefenceSpec(
            module="casehard.defences.mb_defense.defence",
            cls="MbDefense",
            config="MbConfig",
            purpose=_CLEANED,
            needs=("clean",),
            hardens=False,
            pipeline=True,
            repairs=True,
        ),
        "mb_stage2": _spec("mb_defense.method", "MbStage2", _CLEANED, needs=("assets",), hardens=False),
        "onion": _spec("onion", "Onion", _CLEANED, needs=("clean",), hardens=False, pipeline=True),
        "fine_mixing": _spec(
            "fine_mixing", "FineMixing", _CLEANED, needs=("assets",), hardens=False, lora=False, repairs=True
        ),
        "dilution": _spec("dilution", "Dilution", _CLEANED, needs=("assets",), hardens=False, lora=False, repairs=True),
        "backdoor_collapse": DefenceSpec(
            module="casehard.defences.backdoor_collapse",
            cls="BackdoorCollapse",
            config="CollapseConfig",
            purpose=_CLEANED,
            needs=("clean",),
            hardens=False,
            pipeline=True,
            repairs=True,
        ),
        "crow": _spec("crow", "Crow", _CLEANED, hardens=False, repairs=True),
        "anomaly": _spec("anomaly", "Anomaly", _CLEANED, hardens=False, repairs=True),
    },
)
"""Name -> spec, defences of other packages (entry points ``casehard.methods``) included."""
