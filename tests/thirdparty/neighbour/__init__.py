"""What another package has to write: a spec for each thing that it adds. Its entry points name the specs."""

from __future__ import annotations

from casehard.registry import AttackSpec, DefenceSpec, Flag, JudgeSpec

DEFENCE = DefenceSpec(
    module="neighbour.defence",
    cls="SmallWeights",
    config="SmallWeightsConfig",
    purpose="It keeps the first weights small, which defends against nothing.",
    telemetry=("mean_square",),
    hardens=False,
    repairs=True,
)
ATTACK = AttackSpec(
    module="neighbour.attack",
    cls="Noise",
    config="NoiseAttack",
    purpose="Noise on every weight, without any training.",
    takes=("excuses",),
    roles={"excuses": "rows that the noise does not look at"},
    trains=False,
    flags={"scale": Flag("Standard deviation of the noise.", float)},
)
JUDGE = JudgeSpec(
    module="neighbour.judge",
    cls="FirstLetter",
    config="FirstLetterConfig",
    purpose="Responses by their first letter: a refusal begins with a vowel.",
)
