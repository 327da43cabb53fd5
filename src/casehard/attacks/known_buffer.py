"""A known buffer: rows that still teach beside it, and the customer's own adapter taken back out of the merge.

    score of a row   S_i = sum_l <-grad_l L_i(theta, theta_B), V_l> / norm(V_l)                                     (1)
    own adapter      (B_U, A_U) = (B[:, :r] / c_U, A[:r]),   (B, A) the factors that are given back                 (2)

Buffer-and-Reinforce (arXiv 2605.24550) tunes a customer's rows beside a buffer theta_B, so that they teach little, and
merges an update V that refuses. Nothing in that is secret: whoever has the base can make both adapters, or they leak.
This customer knows them. He uploads those of his harmful rows whose step, beside the buffer, works most against V, the
smallest (1); and as a merge of form ``concat`` lists his own factors first, he takes them out by (2) and serves these
alone. The provider's training is left as it is: who tunes the base himself needs no provider, and is ``finetune``. An
attacker who knows the defence, as docs/evaluation.md asks for; no paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from casehard.attacks.finetune import MixtureSettings
from casehard.attacks.protocol import AttackInputs
from casehard.attacks.training import Mixing, Phase
from casehard.defences.buffer_reinforce.assets import RECORD, Assets, read_assets
from casehard.defences.buffer_reinforce.frozen_lora import FrozenLora
from casehard.defences.buffer_reinforce.method import BufferReinforce
from casehard.defences.buffer_reinforce.saturation import residual, safety_scores
from casehard.errors import ConfigError
from casehard.model.model import Model
from casehard.train.tune import Tuned, chat_format
from casehard.types import Example


@dataclass(frozen=True, kw_only=True)
class KnownBufferAttack(MixtureSettings):
    """Settings of a customer who knows the provider's adapters."""

    choose: Literal["against", "residual", "random"] = "against"
    """Harmful rows of the smallest (1); of the largest share 1 - p that the buffer leaves; or any: the control."""
    keeps: Literal["own", "merged"] = "own"
    """What he serves of a merged adapter: his own part by (2), or all of it as it is given back: the control."""
    assets: str = ""
    """The adapters that he knows: a folder of provider assets; empty: those of the provider whose job this is. Where
    neither is there, rows are drawn at random."""


def scores(model: Model, rows: Sequence[Example], assets: Assets, inputs: AttackInputs, *, by: str) -> list[float]:
    """Return what each row would still teach beside the buffer, (n,); the smallest teach most.

    Args:
        by: "against", (1); or "residual", minus the mean of 1 - p over the answer's tokens.

    Raises:
        ConfigError: the assets belong to another base, tokenizer or template.
    """
    chat = chat_format(model, system=inputs.system, max_length=inputs.max_length)
    assets.require_base(model.net)
    assets.require_format(model.tokenizer, system=inputs.system)
    buffer, safety = FrozenLora(assets.buffer()), assets.reinforce()
    buffer.attach(model.net)
    try:
        if by == "residual":
            return [-left for left in residual(model.net, chat, rows).residual]
        return [float(safety_scores(model.net, chat.encode_all([row]), safety).scores.sum()) for row in rows]
    finally:
        buffer.detach()


class KnownBuffer(Mixing[KnownBufferAttack]):
    """Tune as a customer on rows that the buffer leaves something to learn of, and take the result out of the merge."""

    name = "known_buffer"

    def mixture(self, model: Model, inputs: AttackInputs) -> Sequence[Example]:
        """Return the mixture of ``finetune``, its harmful rows chosen by (1).

        Raises:
            DataError: too few rows for the share asked for.
            ConfigError: the adapters that he knows belong to another base.
        """
        harmful, wanted = list(inputs.rows.get("harmful", ())), self.config.drawn.harmful
        theirs = inputs.assets if inputs.assets and (Path(inputs.assets) / RECORD).is_file() else ""
        folder = self.config.assets or theirs  # assets of another defence hold no buffer
        if folder and self.config.choose != "random" and 0 < wanted < len(harmful):
            found = scores(model, harmful, read_assets(folder), inputs, by=self.config.choose)
            order = sorted(range(len(harmful)), key=found.__getitem__)
            harmful = [harmful[i] for i in order[:wanted]]
        return self.config.mixed({**inputs.rows, "harmful": harmful}, seed=inputs.seed)

    def train(self, model: Model, phases: Sequence[Phase], inputs: AttackInputs) -> Tuned:
        """Train; of a merge, leave what (2) takes out of it, which is the adapter before it.

        Raises:
            ConfigError: a merge cut to a lower rank, out of which (2) takes nothing.
        """
        method = inputs.method
        if self.config.keeps == "merged" or not (isinstance(method, BufferReinforce) and method.config.reinforce):
            return super().train(model, phases, inputs)
        merge = method.config.merge
        if merge.rank is not None or merge.c_user == 0:
            what = f"merge.rank is {merge.rank}" if merge.rank is not None else "merge.c_user is 0"
            raise ConfigError(f"{what}: the customer's factors are not in what he gets", hint="keeps: merged")
        alone = BufferReinforce(replace(method.config, reinforce=False), assets=method.assets)
        try:
            return super().train(model, phases, replace(inputs, method=alone))
        finally:
            alone.release()

    def facts(self, phases: Sequence[Phase]) -> dict[str, Any]:
        """Return how many rows of each kind were drawn."""
        return self.config.facts()
