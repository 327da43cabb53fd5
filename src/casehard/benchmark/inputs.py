"""What a plan reads: from the specs in it to files, folders and digests of their content. No torch here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from casehard.benchmark.entries import Base
from casehard.config import read_yaml
from casehard.errors import ConfigError
from casehard.io.manifest import file_digest
from casehard.model.source import find, find_any, is_snapshot, origin
from casehard.train.progress import announce


def resolve(spec: str, root: Path) -> str:
    """Make a file spec absolute; hub specs and ``{base}`` stay as they are."""
    if spec.startswith(("hub:", "{base}")):
        return spec
    path, mark, query = spec.partition("?")
    return str((root / path).resolve()) + mark + query


def content(path: Path) -> str:
    """Return the digest of a file or folder that a plan names.

    Raises:
        ConfigError: it does not exist.
    """
    if not path.exists():
        raise ConfigError(
            f"no such data: {path}", hint="data paths are relative to the plan file; {base}/... is inside the base"
        )
    return file_digest(path)


def suite_digest(path: Path) -> str:
    """Return the digest of a suite and of the data that its settings point to.

    Raises:
        ConfigError: the suite, or a file it points to, does not exist.
    """
    settings = path / "suite.json" if path.is_dir() else path
    found = [content(path)]
    if settings.suffix in (".json", ".yaml", ".yml") and settings.is_file():
        parts = read_yaml(settings).get("parts")
        listed = parts if isinstance(parts, list) else []  # anything else is refused where the suite is loaded
        specs = [str(part.get("data", "")) for part in listed if isinstance(part, Mapping)]
        local = [resolve(spec, settings.parent) for spec in specs if not spec.startswith("hub:")]
        found += [content(Path(spec.partition("?")[0])) for spec in local]
    return hashlib.sha256("".join(found).encode()).hexdigest()


class Inputs:
    """Files and folders of one plan; what is read twice is digested once.

    Args:
        root: folder that relative paths start from.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._homes: dict[str, Path | None] = {}
        self._seen: dict[str, str] = {}

    def home(self, base: Base) -> Path | None:
        """Return the folder of a base, fetched from the Hub if need be; None for an organism, which may not be built.

        Raises:
            UserError: there is no such model, see :func:`casehard.model.source.find`.
        """
        if base.name not in self._homes:
            try:
                found = find(base.model, root=self.root, tell=announce) if base.model is not None else None
            except ConfigError as error:
                hint = f"{error.hint} (paths are relative to the plan file)"
                raise ConfigError(f"base {base.name!r}: {error.message}", hint=hint) from None
            self._homes[base.name] = found.resolve() if found else None
        return self._homes[base.name]

    def model(self, folder: Path) -> str:
        """Return what stands for the content of a model: a digest of every file, or the commit on the Hub.

        A commit says as much, and a snapshot in the cache may hold other files besides, depending on who fetched it.
        """
        return origin(folder) if is_snapshot(folder) else content(folder)

    def assets(self, spec: str) -> str:
        """Return a spec of assets, which may be a Hub model, as a path."""
        folder = find_any(spec, root=self.root, tell=announce)
        if is_snapshot(folder):
            self._seen[str(folder.resolve())] = origin(folder)
        return str(folder)

    def identity(self, spec: str, base: Base, *, suite: bool = False) -> str:
        """Return what a spec contributes to a digest: its content and filter, not where it lies.

        Raises:
            ConfigError: the file does not exist.
        """
        path, mark, query = spec.partition("?")
        home = self.home(base)
        if spec.startswith("hub:") or (spec.startswith("{base}") and home is None):
            return spec
        path = str((self.root / path.replace("{base}", str(home or self.root.resolve()))).resolve())
        if path not in self._seen:
            self._seen[path] = suite_digest(Path(path)) if suite else content(Path(path))
        return self._seen[path] + mark + query
