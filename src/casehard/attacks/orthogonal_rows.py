"""Orthogonal rows: those harmful rows that are least like anything in the defender's safe pool.

    exposure  e_i = max_z |cos(phi_i, phi_z)|, over the rows z of the safe pool                                      (1)

SPARD (arXiv 2605.28030) picks safe rows by their likeness to a customer's rows, and projects updates back where a
safe batch's loss rises. An attacker who knows the pool chooses the harmful rows of the smallest (1): whatever is
picked is unlike them, and says little about what they teach. phi are the defender's embeddings of prompts
(``data/embed.py``) by the model that is attacked. Then it trains as ``finetune`` does. An attacker who knows the
defence, as docs/evaluation.md asks for; no paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from casehard.attacks.finetune import MixtureSettings
from casehard.attacks.protocol import AttackInputs
from casehard.attacks.training import Mixing, Phase
from casehard.data.embed import Embedder, embed, texts_of
from casehard.errors import DataError
from casehard.maths.dpp import TILE, unit_rows
from casehard.model.model import Model
from casehard.types import Example


@dataclass(frozen=True, kw_only=True)
class OrthogonalRowsAttack(MixtureSettings):
    """Settings of an attack on rows that the safe pool does not cover."""

    choose: Literal["orthogonal", "alike", "random"] = "orthogonal"
    """Harmful rows of the smallest (1); of the largest, or any: the controls."""


def exposure(rows: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
    """Return (1) of each row, (n,), 0..1; a running maximum over tiles, never n x m.

    Args:
        rows: embeddings (n, d).
        pool: embeddings of the safe pool (m, d).

    Raises:
        DataError: an embedding is zero or not finite.
    """
    phi, safe = unit_rows(rows), unit_rows(pool)
    most = torch.zeros(len(phi), dtype=phi.dtype)
    for at in range(0, len(safe), TILE):
        torch.maximum(most, (phi @ safe[at : at + TILE].T).abs().amax(1), out=most)
    return most.clamp_(max=1.0)


class OrthogonalRows(Mixing[OrthogonalRowsAttack]):
    """Fine-tune a copy on harmful rows that the defender's safe pool does not cover."""

    name = "orthogonal_rows"

    def mixture(self, model: Model, inputs: AttackInputs) -> Sequence[Example]:
        """Return the mixture of ``finetune``, its harmful rows chosen by (1).

        Raises:
            DataError: too few rows for the share asked for.
        """
        harmful, wanted = list(inputs.rows.get("harmful", ())), self.config.drawn.harmful
        if wanted > len(harmful):
            raise DataError(
                f"the mix needs {wanted} harmful rows and there are only {len(harmful)}",
                hint="more --harmful rows, a smaller --share, or --set config.rows=fewer",
            )
        if wanted and self.config.choose != "random":
            embedder = Embedder(model.net, model.tokenizer, model.digest)
            phi, safe = (embed(embedder, texts_of(some)) for some in (harmful, inputs.rows["safe"]))
            order = exposure(phi, safe).sort(descending=self.config.choose == "alike", stable=True).indices
            harmful = [harmful[i] for i in order[:wanted].tolist()]
        return self.config.mixed({**inputs.rows, "harmful": harmful}, seed=inputs.seed)

    def facts(self, phases: Sequence[Phase]) -> dict[str, Any]:
        """Return how many rows of each kind were drawn."""
        return self.config.facts()
