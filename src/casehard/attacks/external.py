"""External: a program of somebody else attacks a copy of the model on disk; its result is loaded and measured.

For attacks whose licence or dependencies keep them out of this package (heretic, AGPL). The copy and the result lie in
a folder that only the user can read, and that is removed when the attack ends, however it ends. That is the one place
where attacked weights touch a disk. Settings can come from a stranger's plan, so nothing runs unless the environment
says that programs may.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import nn

from casehard.attacks.editing import Untrained, copy_of, measured
from casehard.attacks.protocol import Attacked, AttackInputs
from casehard.data.sources import save as save_rows
from casehard.errors import ConfigError, Corrupt, DataError, Refused, UserError
from casehard.io.manifest import MANIFEST
from casehard.io.programs import require_allowed, run_program
from casehard.limits import Limited, Within
from casehard.model.load import load
from casehard.model.model import Model
from casehard.model.provenance import PROVENANCE
from casehard.model.save import save

ROLES = ("harmful", "benign")
NAMES = ("model", "out", "seed", "python", *ROLES)


@dataclass(frozen=True, kw_only=True)
class ExternalAttack(Limited):
    """Settings of an external attack."""

    command: tuple[str, ...]
    """The program and its arguments; no shell reads them. ``{model}`` is the folder of the copy, ``{out}`` where the
    result has to be, ``{seed}`` the seed, ``{python}`` the interpreter that runs casehard, ``{harmful}`` and
    ``{benign}`` JSONL files of the attacker's rows."""
    minutes: Annotated[float, Within(0, 10_000, above=True)] = 60.0
    """After so long it is killed, and the attack fails."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a command that could not give a result."""
        super().__post_init__()
        for name in ("model", "out"):
            if name not in self.names:
                raise ConfigError(
                    f"command {list(self.command)} does not name {{{name}}}",
                    hint='command: [program, --model, "{model}", --save, "{out}"]',
                )

    @property
    def names(self) -> set[str]:
        """Return which of the names in braces the command has."""
        return {name for name in NAMES for part in self.command if f"{{{name}}}" in part}

    def filled(self, values: Mapping[str, str]) -> list[str]:
        """Return the command with values in place of names; a value is never read again."""
        known = re.compile("|".join(re.escape(f"{{{name}}}") for name in values))
        return [known.sub(lambda found: values[found[0][1:-1]], part) for part in self.command]


class External(Untrained[ExternalAttack]):
    """Let a program attack a copy on disk, and measure what it made."""

    name = "external"

    def run(self, model: Model, inputs: AttackInputs) -> Attacked:
        """Write a copy of ``model``, run the program, load its result, remove both, and measure.

        Raises:
            Refused: programs are not allowed, or the model is itself attacked and may not be written.
            ConfigError: rows that the command does not name, or the other way round; no such program.
            UserError: the program failed, took too long or left no model; with the end of its stderr.
            DataError: its result has another tokenizer. All that :func:`casehard.model.load.load` raises.
        """
        begun, config = time.monotonic(), self.config
        self._check(model, inputs)
        device = next(model.net.parameters()).device
        with tempfile.TemporaryDirectory(prefix="casehard-external-") as name:  # readable by its owner alone
            place = Path(name)
            values = {"model": str(place / "model"), "out": str(place / "out"), "seed": str(inputs.seed)}
            values["python"] = sys.executable
            save(copy_of(model), model.tokenizer, place / "model", parent=model.digest, method="none", provenance={})
            for ours in (MANIFEST, PROVENANCE):  # a program may copy the folder and change the weights
                (place / "model" / ours).unlink()
            for role in sorted(config.names & {*ROLES}):
                values[role] = str(place / f"{role}.jsonl")
                save_rows(values[role], inputs.rows[role])
            run_program(config.filled(values), place, seconds=60 * config.minutes)
            if (place / "out").is_symlink():
                raise Corrupt(f"{config.command[0]} made {{out}} as a link", hint="it has to make a folder of its own")
            if not (place / "out").is_dir():
                raise UserError(
                    f"{config.command[0]} ended without a model in {{out}}", hint="it has to make that folder itself"
                )
            made = load(place / "out", device=str(device))
        if made.tokenizer.get_vocab() != model.tokenizer.get_vocab():
            raise DataError(
                f"the model that {config.command[0]} made has another tokenizer", hint="it is another model"
            )
        facts = {"digest": made.digest, "changed": changed(model.net, made.net)}
        return measured(self, model, made.net, inputs, facts, begun)

    def _check(self, model: Model, inputs: AttackInputs) -> None:
        """Refuse what can be refused before anything is written."""
        require_allowed(self.config.command[0])
        if not model.may_leave:
            raise Refused("this model was attacked and is kept in memory", hint="attack the model it was made from")
        given, named = {role for role, rows in inputs.rows.items() if rows}, self.config.names & {*ROLES}
        if odd := sorted(given ^ named):
            missing = (
                "has no place in the command" if odd[0] in given else "is named in the command and there are no rows"
            )
            raise ConfigError(f"{{{odd[0]}}} {missing}", hint=f"--{odd[0]} FILE together with {{{odd[0]}}} in command")


@torch.no_grad()
def changed(before: nn.Module, after: nn.Module) -> int:
    """Return how many parameter tensors are not what they were, bit for bit."""
    old = dict(before.named_parameters())
    return sum(name not in old or not torch.equal(p, old[name].to(p.dtype)) for name, p in after.named_parameters())
