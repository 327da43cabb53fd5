"""The noun everything is about: a model in memory, what was done to it, and whether it may be written to disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from casehard.config import digest
from casehard.errors import Unsupported
from casehard.model.provenance import ATTACKED

if TYPE_CHECKING:
    from torch import nn

    from casehard.types import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Made:
    """One thing that was done to a model, as its provenance tells it."""

    method: str
    """Name of the defence or attack."""
    parent: str = ""
    """Digest of the model it was done to."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """JSON values: settings, seed, digests of the rows."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A causal language model with its tokenizer; frozen, though its weights are a module that can be trained.

    Attributes ``net`` and ``tokenizer`` are those of transformers; use them as you would without this library.
    """

    net: nn.Module
    tokenizer: Any
    digest: str
    """Content digest of the folder it was read from, or of the chain of steps that made it in memory."""
    path: Path | None = None
    """Folder it was read from or saved to; None for one that exists in memory only."""
    lineage: tuple[Made, ...] = ()
    """What was done to it, oldest first, as far back as is known."""
    trained_prompts: frozenset[str] = frozenset()
    """Marks of the prompts it is known to have been trained on (``casehard.data.mix.mark``)."""
    may_leave: bool = True
    """False for attacked and jailbroken weights: :func:`casehard.save` refuses them unless asked by name."""
    origin: str = ""
    """Hub model it is or descends from, as ``org/name@commit``; see :func:`casehard.model.source.origin`."""
    notes: tuple[str, ...] = ()
    """Choices made while it was read; each was also given as a warning."""
    writer: Callable[[Path], Checkpoint] | None = None
    """How it is saved where that is not an ordinary checkpoint: an adapter, for methods that tune one."""

    @property
    def parent(self) -> str:
        """Return the digest of the model it was made from; empty where that is not known."""
        return self.lineage[-1].parent if self.lineage else ""

    @property
    def served_with(self) -> str:
        """Return the system message without which it is not the defence it was made as; empty for none."""
        made = self.lineage[-1].provenance if self.lineage else {}
        return str(made.get("serving_system") or "")

    @property
    def attacked(self) -> tuple[str, ...]:
        """Return by name what was done to it, oldest first, if an attack is among that; empty for any other model."""
        done: list[str] = []
        known = not self.may_leave
        for made in self.lineage:
            before = made.provenance.get(ATTACKED)  # of a checkpoint, up to and with what is recorded there
            done, known = ([*before], True) if before else ([*done, made.method], known)
        return tuple(done) if known else ()

    def require_weights(self) -> None:
        """Refuse a model that trained vectors stand in front of: they are no weights, and neither trained nor edited.

        Raises:
            Unsupported: it is one.
        """
        if not hasattr(self.net, "get_input_embeddings"):
            raise Unsupported(
                "this model is asked behind a soft prompt, which is no part of its weights",
                hint="its weights are those of the model that was attacked: use that one",
            )

    def after(self, net: nn.Module, made: Made, *, trained: frozenset[str] = frozenset(), **changes: Any) -> Model:
        """Return the model that a step made of this one.

        Args:
            net: its weights.
            made: what was done; ``parent`` is filled in. With the parent's digest it gives the new digest.
            trained: marks of the prompts it was trained on.
            changes: further fields that differ.
        """
        link = replace(made, parent=self.digest)
        name = digest({"parent": self.digest, "method": made.method, "provenance": dict(made.provenance)})
        known = self.trained_prompts | trained
        values: dict[str, Any] = {"path": None, "notes": (), "writer": None, **changes}
        return replace(self, net=net, digest=name, lineage=(*self.lineage, link), trained_prompts=known, **values)
