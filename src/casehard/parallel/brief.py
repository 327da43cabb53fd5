"""What an attacker must know before its first order: architecture, rows, how to attack. Plain JSON, no weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from casehard import __version__
from casehard.config import build
from casehard.data.batches import Encoded, EncodedSet
from casehard.errors import Unsupported
from casehard.maths.bilevel import Attacker


@dataclass(frozen=True)
class Brief:
    """Everything about a run that its attackers need."""

    architecture: Mapping[str, Any]
    """The model's configuration as plain values; the weights come with each order."""
    attention: str
    """Attention implementation, as it is not part of the saved configuration."""
    rows: tuple[EncodedSet, ...]
    """One set for each attacker."""
    attackers: tuple[Attacker, ...]
    seed: int
    delta_dtype: str
    bf16: bool
    """Compute under bf16 autocast."""
    threads: int = 0
    """CPU threads of an attacker; 0 leaves torch's own choice."""

    def dump(self) -> str:
        """Return the brief as JSON."""
        distinct = list({id(s): s for s in self.rows}.values())
        values = {
            "version": __version__,
            "architecture": dict(self.architecture),
            "attention": self.attention,
            "sets": [{"pad_id": s.pad_id, "rows": [[r.input_ids, r.labels] for r in s.rows]} for s in distinct],
            "rows": [[id(d) for d in distinct].index(id(s)) for s in self.rows],
            "attackers": [asdict(a) for a in self.attackers],
            "seed": self.seed,
            "delta_dtype": self.delta_dtype,
            "bf16": self.bf16,
            "threads": self.threads,
        }
        return json.dumps(values)

    @classmethod
    def parse(cls, text: str) -> Brief:
        """Read what :meth:`dump` wrote.

        Raises:
            Unsupported: it comes from another version of casehard.
        """
        values = json.loads(text)
        if values["version"] != __version__:
            raise Unsupported(
                f"the defender runs casehard {values['version']}, this attacker {__version__}",
                hint="install the same version everywhere",
            )
        sets = [EncodedSet(tuple(Encoded(*row) for row in s["rows"]), s["pad_id"]) for s in values["sets"]]
        return cls(
            architecture=values["architecture"],
            attention=values["attention"],
            rows=tuple(sets[i] for i in values["rows"]),
            attackers=tuple(build(Attacker, a, where="attacker") for a in values["attackers"]),
            seed=values["seed"],
            delta_dtype=values["delta_dtype"],
            bf16=values["bf16"],
            threads=values["threads"],
        )

    def model(self, device: torch.device) -> nn.Module:
        """Build the architecture in fp32 on ``device``, in training mode; its weights mean nothing yet."""
        from transformers import AutoConfig, AutoModelForCausalLM

        settings = dict(self.architecture)
        kind = settings.pop("model_type")
        config = AutoConfig.for_model(kind, **settings)
        model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, attn_implementation=self.attention or None, dtype=torch.float32
        )
        model.config.use_cache = False
        model = model.to(device).train()
        if self.bf16:
            model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)
        return model  # type: ignore[no-any-return]


def brief_for(
    model: nn.Module,
    rows: Sequence[EncodedSet],
    attackers: Sequence[Attacker],
    *,
    seed: int,
    delta_dtype: str,
    bf16: bool,
    threads: int = 0,
) -> Brief:
    """Describe a run to its attackers.

    Raises:
        Unsupported: the model has no ``transformers`` configuration an attacker could build it from.
    """
    config: Any = getattr(model, "config", None)
    if not getattr(config, "model_type", ""):
        raise Unsupported(
            f"{type(model).__name__} has no transformers configuration: attackers elsewhere cannot build it",
            hint="schedule=sequential attacks in the defender's own process",
        )
    values = json.loads(config.to_json_string(use_diff=False))
    attention = str(getattr(config, "_attn_implementation", "") or "")
    return Brief(values, attention, tuple(rows), tuple(attackers), seed, delta_dtype, bf16, threads)
