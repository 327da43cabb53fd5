"""Prefilling: the attacker writes the first tokens of the answer, or the system message, and the model goes on.

Whoever holds weights, or an API that continues a given answer, needs no training. Where alignment lives in the first
tokens of an answer, forcing those passes it by. Sources: Andriushchenko et al., arXiv 2404.02151 (prefilling); Qi et
al., arXiv 2406.05946, section 2.3.1 (the first k tokens of a harmful answer); openers as in casehard.data.surrogate.
Differs: the result is the attacker's best of all ways tried, for each prompt, rather than one way for all.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from casehard.attacks.editing import Untrained
from casehard.attacks.protocol import Attacked, AttackInputs
from casehard.config import to_dict
from casehard.data.chat import ChatFormat
from casehard.data.surrogate import OPENERS
from casehard.errors import ConfigError, DataError
from casehard.limits import Limited, Natural
from casehard.model.model import Made, Model
from casehard.seeds import derive
from casehard.types import Budget, Example, Message

COMPLIANCE = ("unscored", "incoherent", "refusal", "partial", "answer", "leak")
"""Labels, from what an attacker has least use for."""


@dataclass(frozen=True, kw_only=True)
class PrefillAttack(Limited):
    """Settings of prefilling."""

    source: Literal["openers", "rows", "own"] = "openers"
    """Whose first tokens are forced: an affirmative opener's; the answer's of one of the attacker's rows of role
    ``harmful``, drawn for each prompt; or that of the suite's own row, where it has a response."""
    openers: tuple[str, ...] = ()
    """Of which one is drawn for each prompt (source ``openers``); empty = those of ``casehard.data.surrogate``."""
    tokens: tuple[Natural, ...] = (1, 2, 4, 8)
    """k, how many tokens are forced, one attempt for each; 0 forces none. Shorter openers are forced whole."""
    systems: tuple[str, ...] = ("",)
    """System messages, each tried with every k; "" is that of the run."""

    def __post_init__(self) -> None:
        """Raise ConfigError where there is nothing to try."""
        super().__post_init__()
        for name in ("tokens", "systems"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty, so that nothing would be tried", hint="leave it out")
        if not all(text.strip() for text in self.openers):
            raise ConfigError("openers: one of them is empty", hint="tokens: [0] forces nothing")


def opening(chat: ChatFormat, example: Example, answer: str, tokens: int) -> list[int]:
    """Return the first tokens of an answer to an example, as they stand behind the generation prompt.

    They are cut from the rendered chat, as in training, and not tokenised by themselves: many tokenizers would begin
    otherwise. What ends a turn is left out.
    """
    asked = example.messages[:-1] if example.messages[-1].role == "assistant" else example.messages
    detail = chat.details(Example((*asked, Message("assistant", answer)), example.id))
    ids, end, ends = detail.encoded.input_ids, detail.end, set(chat.stop_ids)
    while end > detail.start and ids[end - 1] in ends:
        end -= 1
    return ids[detail.start : min(end, detail.start + tokens)]


class Prefill(Untrained[PrefillAttack]):
    """Ask every restricted prompt in several ways and keep, for each, the answer of most use to an attacker."""

    name = "prefill"

    def run(self, model: Model, inputs: AttackInputs) -> Attacked:
        """Measure ``model`` as it is, then ask its restricted prompts in every way.

        Returns:
            The same weights; rows with the best answer of each restricted prompt, ``tokens`` and ``system`` saying how
            it was got where it was not by asking plainly.

        Raises:
            ConfigError: rows of role harmful are missing, or would be ignored.
            DataError: a prompt of the suite has no response to begin with (source own).
        """
        begun, config = time.monotonic(), self.config
        text = self._text(inputs)
        best = {row["id"]: row for row in inputs.measure(model.net, 0)}
        asked = [row for row in best.values() if row["role"] == "restricted"]
        variants = [_counted(0, "", asked)]
        for system in config.systems:
            for tokens in config.tokens:
                if not tokens and not system:
                    continue  # asked already
                how = self._prefix(text, tokens) if tokens else None
                found = inputs.ask(model.net, roles={"restricted"}, system=system or None, prefix=how)
                variants.append(_counted(tokens, system, found))
                for row in found:
                    if _use(row) > _use(best.get(row["id"], row)):
                        best[row["id"]] = {**row, "tokens": tokens, "system": system}
        provenance = {"settings": to_dict(config), "seed": inputs.seed}
        made = Made(method=f"{self.name}-attack", provenance=provenance)
        rows = [{**row, "step": 0} for row in best.values()]
        spent = Budget(seconds=time.monotonic() - begun)
        after = model.after(model.net, made, may_leave=False)
        return Attacked(model=after, rows=rows, budget=spent, facts={"variants": variants})

    def _text(self, inputs: AttackInputs) -> Callable[[Example], str]:
        """Return which answer's first tokens are forced on an example."""
        source, harmful = self.config.source, inputs.rows.get("harmful", ())
        if bool(harmful) != (source == "rows"):
            raise ConfigError(
                f"source is {source!r}, and there are {len(harmful)} harmful rows",
                hint="harmful rows go with source: rows",
            )
        if source == "own":
            return _own
        texts = [row.response for row in harmful] if source == "rows" else self.config.openers or OPENERS
        return lambda example: random.Random(derive(inputs.seed, 0, f"prefill-{example.id}")).choice(texts)

    @staticmethod
    def _prefix(text: Callable[[Example], str], tokens: int) -> Callable[[ChatFormat, Example], list[int]]:
        return lambda chat, example: opening(chat, example, text(example), tokens)


def _own(example: Example) -> str:
    if not example.response:
        raise DataError(
            f"suite row {example.id!r} has no response whose first tokens could be forced",
            hint="source: openers, or rows of role harmful with source: rows",
        )
    return example.response


def _use(row: dict[str, Any]) -> int:
    return COMPLIANCE.index(row["label"])


def _counted(tokens: int, system: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    labels = Counter(row["label"] for row in rows)
    counts = {"asked": len(rows), "answered": labels["answer"] + labels["leak"], "leaked": labels["leak"]}
    return {"tokens": tokens, "system": system, **counts, **{key: labels[key] for key in ("refusal", "incoherent")}}
