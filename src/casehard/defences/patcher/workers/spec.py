"""What an attacker must know before its first request: architecture, rows, how to attack. No weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from casehard import __version__
from casehard.config import build
from casehard.data.batches import Encoded, EncodedSet
from casehard.defences.patcher.workers.resharding import row_counts
from casehard.errors import Unsupported
from casehard.maths.bilevel import Attacker
from casehard.model.shard import shard


@dataclass(frozen=True)
class AttackerSpec:
    """Everything about a run that its attackers need."""

    architecture: Mapping[str, Any]
    """The model's configuration as plain values; the weights come with each request."""
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
    row_counts: Mapping[str, int] = field(default_factory=dict)
    """Rows of every whole weight by name (``resharding``)."""

    def pack(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Return the spec as the header and the tensors of a message; rows are tensors, as there may be many."""
        distinct = list({id(s): s for s in self.rows}.values())
        header = {
            "kind": "spec",
            "version": __version__,
            "architecture": dict(self.architecture),
            "attention": self.attention,
            "pads": [s.pad_id for s in distinct],
            "rows": [[id(d) for d in distinct].index(id(s)) for s in self.rows],
            "attackers": [asdict(a) for a in self.attackers],
            "seed": self.seed,
            "delta_dtype": self.delta_dtype,
            "bf16": self.bf16,
            "threads": self.threads,
            "row_counts": dict(self.row_counts),
        }
        tensors = {}
        for i, s in enumerate(distinct):
            tensors[f"lengths{i}"] = torch.tensor([len(r.input_ids) for r in s.rows], dtype=torch.int64)
            tensors[f"ids{i}"] = torch.tensor([t for r in s.rows for t in r.input_ids], dtype=torch.int32)
            tensors[f"labels{i}"] = torch.tensor([t for r in s.rows for t in r.labels], dtype=torch.int32)
        return header, tensors

    @classmethod
    def unpack(cls, header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> AttackerSpec:
        """Read what :meth:`pack` made.

        Raises:
            Unsupported: it comes from another version of casehard.
        """
        if header["version"] != __version__:
            raise Unsupported(
                f"the defender runs casehard {header['version']}, this attacker {__version__}",
                hint="install the same version everywhere",
            )
        sets = []
        for i, pad in enumerate(header["pads"]):
            lengths = tensors[f"lengths{i}"].tolist()
            parts = [torch.split(tensors[f"{what}{i}"], lengths) for what in ("ids", "labels")]
            rows = tuple(Encoded(a.tolist(), b.tolist()) for a, b in zip(*parts, strict=True))
            sets.append(EncodedSet(rows, pad))
        return cls(
            architecture=header["architecture"],
            attention=header["attention"],
            rows=tuple(sets[i] for i in header["rows"]),
            attackers=tuple(build(Attacker, a, where="attacker") for a in header["attackers"]),
            seed=header["seed"],
            delta_dtype=header["delta_dtype"],
            bf16=header["bf16"],
            threads=header["threads"],
            row_counts=header["row_counts"],
        )

    def model(self, device: torch.device, ranks: int = 1) -> nn.Module:
        """Build the architecture in fp32 on ``device``, in training mode; its weights mean nothing yet.

        Args:
            ranks: processes of this attacker, over which it is sharded; all of them make the call.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        settings = dict(self.architecture)
        kind = settings.pop("model_type")
        config = AutoConfig.for_model(kind, **settings)
        model: Any = AutoModelForCausalLM.from_config(
            config, attn_implementation=self.attention or None, dtype=torch.float32
        )
        model.config.use_cache = False
        if ranks > 1:
            shard(model, ranks, device)
        else:
            model = model.to(device)
        model.train()
        if self.bf16:
            model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)
        return model


def spec_for(
    model: nn.Module,
    rows: Sequence[EncodedSet],
    attackers: Sequence[Attacker],
    *,
    seed: int,
    delta_dtype: str,
    bf16: bool,
    threads: int = 0,
) -> AttackerSpec:
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
    values.pop("distributed_config", None)  # how the defender is sharded is no part of the architecture
    attention = str(getattr(config, "_attn_implementation", "") or "")
    return AttackerSpec(
        values, attention, tuple(rows), tuple(attackers), seed, delta_dtype, bf16, threads, row_counts(model)
    )
