"""A method with its settings, as every training step holds it: checked, built, given its rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from casehard.config import digest
from casehard.data.batches import EncodedSet
from casehard.data.embed import Embedder
from casehard.data.select import SelectConfig, manifest, select_examples
from casehard.defences import DEFENCES
from casehard.defences.buffer_reinforce.assets import RECORD, read_assets
from casehard.errors import ConfigError, DataError
from casehard.io.manifest import file_digest
from casehard.limits import Limited
from casehard.model.digest import folder_digest
from casehard.model.model import Model
from casehard.model.source import find_any
from casehard.registry import DefenceSpec
from casehard.train.protocol import PipelineInputs, Trained
from casehard.types import Example

Examples = Mapping[str, Sequence[Example]]
"""Rows by data role."""


@dataclass(frozen=True, kw_only=True)
class Defence(Limited):
    """A method with its settings, as plain values."""

    method: str = "plain"
    """Name in the catalogue of defences."""
    preset: str = ""
    """Named settings of the method to start from; empty = its defaults."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the method, over those of the preset."""
    select: SelectConfig | None = None
    """Choose that many of the safe rows by the model's own embeddings; None takes them all."""
    assets: str = ""
    """Folder that the method reads what was prepared earlier from (adapters, another checkpoint)."""

    @property
    def spec(self) -> DefenceSpec:
        """Return what the catalogue knows of the method."""
        return DEFENCES.find(self.method)

    def check(self, roles: Sequence[str], *, where: str = "", trains: bool = True) -> None:
        """Refuse data roles that the method needs and lacks, or would ignore, and settings it does not have.

        Args:
            trains: whether there are rows of role ``data``; a pipeline repairs without them.

        Raises:
            ConfigError: names the first.
            DataError: a selection without safe rows.
        """
        spec, given = self.spec, [*roles, *(["assets"] if self.assets else [])]
        lead = f"{where}: " if where else ""
        for need in spec.needs:
            if need not in given:
                what = "a folder of assets" if need == "assets" else f"{need} rows"
                hint = "--assets DIR" if need == "assets" else f"--{need} FILE: {spec.describe(need)}"
                raise ConfigError(f"{lead}method {self.method!r} needs {what} and got none", hint=hint)
        for role in given:
            if role not in spec.accepts():
                what = "assets" if role == "assets" else f"{role} rows"
                raise ConfigError(f"{lead}method {self.method!r} would ignore the {what}", hint=f"leave out --{role}")
        if self.select is not None and "safe" not in given:
            raise DataError(f"{lead}select: there are no safe rows to choose from", hint="--safe pool.jsonl")
        config = spec.configure(self.method, self.preset, self.settings)
        if spec.pipeline:
            if self.select is not None or self.assets:
                raise ConfigError(f"{lead}method {self.method!r} takes neither a selection nor assets")
            spec.load()[0](config).check(trains=trains)

    def build(self, rows: Mapping[str, EncodedSet]) -> Any:
        """Return the method on its encoded rows and its folder of assets."""
        self.check(list(rows))
        roles: dict[str, Any] = dict(rows)
        if self.assets:
            roles["assets"] = find_any(self.assets)
            if not roles["assets"].is_dir():
                raise DataError(f"no such folder of assets: {self.assets}", hint="--assets DIR")
        return self.spec.load()[0](self.spec.configure(self.method, self.preset, self.settings), **roles)


def run_pipeline(defence: Defence, model: Model, inputs: PipelineInputs) -> Trained:
    """Let a defence that trains the model itself do so, on a copy."""
    roles = [role for role, some in inputs.rows.items() if some]
    defence.check([role for role in roles if role != "data"], trains="data" in roles)
    settings = defence.spec.configure(defence.method, defence.preset, defence.settings)
    done: Trained = defence.spec.load()[0](settings).train(model, inputs)
    return done


@contextmanager
def guarded(method: Any, model: Model, system: str | None) -> Iterator[None]:
    """Check that the method fits the rows' format, and see that nothing of it stays attached if the run fails."""
    if callable(check := getattr(method, "check_format", None)):
        check(model.tokenizer, system=system)
    try:
        yield
    finally:
        if callable(release := getattr(method, "release", None)):
            release()


def choose(
    step: Defence, roles: dict[str, Any], user: Sequence[Example], model: Model, *, seed: int, system: str | None
) -> dict[str, Any]:
    """Leave in ``roles`` the safe rows picked by the untuned model, by ``step.select``; return the record of it."""
    if step.select is None:
        return {}
    pool = list(roles.get("safe", ()))
    if not pool:
        raise DataError("select: there are no safe rows to choose from", hint="--safe pool.jsonl")
    embedder = Embedder(model.net, model.tokenizer, model.digest)
    picks = select_examples(embedder, pool, user, config=step.select, seed=seed, system=system)
    roles["safe"] = [pool[i] for i in picks.order]
    return manifest(picks, pool, len(user), config=step.select, embedder=model.digest, seed=seed)


def selected(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return of a selection's record what tables show."""
    picked = chosen.get("picks", {})
    out = {key: picked[key] for key in ("log_det", "mean_relevance", "exhausted_at", "directions", "per_direction")}
    refusals = (chosen["refusals"] or {}).get("picked")
    return out | {"coverage": chosen["coverage"], "rows": len(picked["order"]), "refusals": refusals}


def assets_digest(folder: Path | str) -> str:
    """Return a digest of a method's folder of assets: of provider assets, of a model, else of every file.

    Raises:
        Corrupt: a damaged file.
    """
    folder = find_any(folder)
    if (folder / RECORD).is_file():
        return read_assets(folder).digest
    if any(folder.glob("*.safetensors")):
        return folder_digest(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return digest({p.relative_to(folder).as_posix(): file_digest(p) for p in files})
