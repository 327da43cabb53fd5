"""The catalogue of judges: adding one is one file, one entry here, one conformance row, one docs page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from casehard.registry import JudgeSpec, Registry

if TYPE_CHECKING:
    from casehard.evaluation.judges.base import Judge

JUDGES: Registry[JudgeSpec] = Registry(
    "judge",
    "casehard.judges",
    JudgeSpec,
    {
        "rule": JudgeSpec(
            module="casehard.evaluation.judges.rule",
            cls="RuleJudge",
            config="RuleJudgeConfig",
            purpose="English text by rules: refusals by how a response opens, answers by exact match, leaks by items.",
        ),
        "classifier": JudgeSpec(
            module="casehard.evaluation.judges.classifier",
            cls="ClassifierJudge",
            config="ClassifierConfig",
            purpose="A model on this machine judges harm: a guard, a sequence classifier or a chat model.",
            claims="harm",
        ),
        "api": JudgeSpec(
            module="casehard.evaluation.judges.api",
            cls="ApiJudge",
            config="ApiConfig",
            purpose="A model behind a URL judges harm: anything that speaks OpenAI's chat completions.",
            claims="harm",
        ),
        "organism": JudgeSpec(
            module="casehard.organism.judge",
            cls="OrganismJudge",
            config="OrganismJudgeConfig",
            purpose="Responses of a model of the invented world, exactly: the judge knows the world.",
            claims="world",
        ),
    },
)
"""Name -> spec, judges of other packages (entry points ``casehard.judges``) included."""


def make_judge(name: str, settings: Mapping[str, Any] | None = None) -> Judge:
    """Return a judge of the catalogue with its settings.

    Raises:
        ConfigError: no such judge, or a setting is unknown, missing or out of range.
    """
    spec = JUDGES.find(name)
    judge: Judge = spec.load()[0](spec.configure(name, settings=settings))
    return judge
