"""What a model argument means, in one place: a local folder, a run folder of ``casehard defend``, or a Hub model.

A local folder wins. Else ``org/name`` and ``org/name@revision`` are models of the Hugging Face Hub, unless the text is
plainly a path; ``hub:`` before them says so. What is fetched is kept by huggingface_hub, and named by its commit.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from casehard.errors import ConfigError, StorageError, UserError
from casehard.io import hub
from casehard.model.check import refuse_file
from casehard.model.provenance import read_provenance

ORIGIN = "origin"
"""Key under which a checkpoint records the Hub model it descends from, as ``org/name@commit``."""
FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]
# Copies of the weights in other layouts.
LEFT_OUT = ["*/*.json", "*/*.safetensors", "*/*.txt", "consolidated*.safetensors"]

_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>\w[\w./-]*))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR)
_FOLDER = "a local folder that holds config.json and *.safetensors"
_fetched: dict[tuple[str, HubModel, tuple[str, ...]], Path] = {}

Tell = Callable[[str], None]


@dataclass(frozen=True)
class HubModel:
    """A model of the Hub."""

    name: str
    revision: str = ""
    """Branch, tag or commit; empty for the default branch."""

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


def read(given: str | Path, *, root: Path = Path()) -> Path | HubModel:
    """Return what a model argument means; nothing is fetched.

    Args:
        given: path or Hub id.
        root: folder that a relative path starts from.

    Raises:
        ConfigError: a path to nothing, or to a file; or no Hub id behind ``hub:``.
        Unsupported: a file of weights in another format; the hint names the command that converts it.
    """
    text = str(given)
    if "\0" in text:
        raise ConfigError(f"path with a NUL character: {text!r}")
    if not text:
        raise ConfigError("no model is named", hint=f"give {_FOLDER}, or a Hub id org/name[@revision]")
    if text.startswith("hub:"):
        if found := _hub_id(text.removeprefix("hub:")):
            return found
        raise ConfigError(f"{text!r} names no model of the Hub", hint="hub:org/name or hub:org/name@revision")
    place = root / text
    try:
        if place.is_dir():
            return _checkpoint(place)
        if place.exists():
            refuse_file(place)
            raise ConfigError(f"{text}: a file, not a model folder", hint=f"give {_FOLDER}")
        found = _hub_id(text)
        if found and not (root / text.split("/")[0]).exists():
            return found
    except OSError as error:
        raise ConfigError(f"{text[:80]}: {error.strerror}", hint=f"give {_FOLDER}") from None
    raise ConfigError(f"no such model folder: {text}", hint=_nearest(place, text, found))


def _hub_id(text: str) -> HubModel | None:
    match = _ID.fullmatch(text)
    return HubModel(match["name"], match["revision"] or "") if match and ".." not in text else None


def _checkpoint(folder: Path) -> Path:
    """Return the model folder itself, or the one inside a run folder of ``casehard defend``."""
    inner = folder / "checkpoint"
    return inner if not (folder / "config.json").exists() and (inner / "config.json").exists() else folder


def _nearest(place: Path, text: str, found: HubModel | None) -> str:
    """Return what to do about a path to nothing."""
    there: list[str] = []
    with contextlib.suppress(OSError):
        there = [p.name for p in place.parent.iterdir() if p.is_dir()]
    near = difflib.get_close_matches(place.name, there, n=1)
    hints = [f"did you mean {Path(text).with_name(near[0])}?" if near else f"give {_FOLDER}"]
    hints.append(f"a model of the Hub: hub:{found}" if found else "a model of the Hub has the form org/name[@revision]")
    return "; ".join(hints)


def find(given: str | Path, *, root: Path = Path(), tell: Tell | None = None, also: tuple[str, ...] = ()) -> Path:
    """Return the folder of a model, fetched from the Hub where it is not local.

    Args:
        given: path or Hub id, see the top of this module.
        root: folder that a relative path starts from.
        tell: called with a line before the Hub is asked; on a terminal, bars then show how far the transfer is.
        also: patterns of files to fetch besides those that a model is loaded from.

    Raises:
        ConfigError: no such folder, no such model or revision on the Hub, or no access to it.
        UserError: the Hub cannot be reached, and its cache does not have the model.
        StorageError: the cache cannot be written.
    """
    found = read(given, root=root)
    return found if isinstance(found, Path) else _fetch(found, tell, also)


def pin(given: str | Path, *, tell: Tell | None = None) -> str:
    """Return a model argument that will mean the same tomorrow: a folder as it is, a Hub model with its commit.

    Raises:
        UserError: see :func:`find`; the Hub model is fetched.
    """
    found = read(given)
    return str(found) if isinstance(found, Path) else str(_snapshot(_fetch(found, tell)))


def find_any(given: str | Path, *, root: Path = Path(), tell: Tell | None = None) -> Path:
    """Return a folder that need not be a model (an adapter, assets): as it was given, or fetched from the Hub.

    Raises:
        UserError: see :func:`find`; whether a local folder is there is left to who reads it.
    """
    found = hub_model(given, root)
    return _fetch(found, tell) if found else Path(given)


def pin_any(given: str, *, tell: Tell | None = None) -> str:
    """Return what :func:`pin` does for a folder that need not be a model."""
    found = hub_model(given)
    return str(_snapshot(_fetch(found, tell))) if found else given


def hub_model(given: str | Path, root: Path = Path()) -> HubModel | None:
    """Return the Hub model that is meant, or None where it is a folder or nothing at all; nothing is fetched."""
    try:
        found = read(given, root=root)
    except ConfigError:
        return None
    return found if isinstance(found, HubModel) else None


def _snapshot(folder: Path) -> HubModel | None:
    """Return the Hub model a folder is a snapshot of, from its place in the cache."""
    place = folder.resolve()
    kind, _, name = place.parent.parent.name.partition("--")
    if place.parent.name != "snapshots" or kind != "models" or not _COMMIT.fullmatch(place.name):
        return None
    return HubModel(name.replace("--", "/"), place.name)


def is_snapshot(folder: Path) -> bool:
    """Return whether a folder lies in the Hub's cache, which checks its files and holds only some of a repository's."""
    return _snapshot(folder) is not None


def origin(folder: Path) -> str:
    """Return the Hub model that a checkpoint is, or was made from in any number of steps; empty if there is none."""
    if found := _snapshot(folder):
        return str(found)
    return str(read_provenance(folder).get("provenance", {}).get(ORIGIN, ""))


def _fetch(model: HubModel, tell: Tell | None, also: tuple[str, ...] = ()) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download

    key = (str(constants.HF_HUB_CACHE), model, also)
    if key in _fetched and _fetched[key].is_dir():
        return _fetched[key]
    if tell and not constants.is_offline_mode():
        tell(f"looking for {model} at {constants.ENDPOINT} ...")
    wanted: dict[str, Any] = {
        "revision": model.revision or None,
        "allow_patterns": [*FILES, *also],
        "ignore_patterns": LEFT_OUT,
    }
    try:
        with hub.answers():
            try:
                # Asked first, and once: snapshot_download tells less of what the Hub says, and asks six times.
                HfApi().model_info(model.name, revision=wanted["revision"], timeout=hub.PATIENCE)
            except Exception as error:
                folder = _kept(model, wanted, error)
            else:
                try:
                    folder = Path(snapshot_download(model.name, **wanted, tqdm_class=_bars(tell)))
                except hub.Silence as error:
                    folder = _kept(model, wanted, error)
    except UserError:
        raise
    except Exception as error:  # the Hub client raises many unrelated types, offline ones included
        raise _refusal(model, _reason(model, error)) from None
    commit = _snapshot(folder)
    assert commit is not None, folder
    # A commit never changes: who asks for it again in this process need not ask the Hub.
    _fetched[key[0], commit, also] = folder
    return folder


def _kept(model: HubModel, wanted: dict[str, Any], error: Exception) -> Path:
    """Return what the cache has of a model that the Hub would not give; else raise what it said."""
    from huggingface_hub import constants, snapshot_download

    try:
        folder = Path(snapshot_download(model.name, **wanted, local_files_only=True))
    except Exception:
        raise error from None
    if not constants.is_offline_mode():
        why = _reason(model, error).why
        warnings.warn(f"{model} is taken from the cache, commit {folder.name[:12]}: {why}", stacklevel=5)
    return folder


def _bars(tell: Tell | None) -> Any:
    """Return the class of progress bars: the client's own unless somebody wants to see them, and can."""
    if tell is None or not sys.stderr.isatty():
        return None
    from tqdm.auto import tqdm

    return tqdm


class _Reason(NamedTuple):
    """Why a model did not come, what to do, and the kind of error that makes."""

    why: str
    hint: str
    kind: type[UserError] = UserError


def _refusal(model: HubModel, reason: _Reason) -> UserError:
    what = f"{str(model)!r} is neither a folder here nor can it be fetched from the Hub"
    return reason.kind(f"{what}: {reason.why}", hint=reason.hint)


def _reason(model: HubModel, error: Exception) -> _Reason:
    from huggingface_hub import constants, errors

    while isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    page, login = f"{constants.ENDPOINT}/{model.name}", "log in with `hf auth login`, or set HF_TOKEN"
    said = (str(error).strip().splitlines() or ["no detail"])[0][:160]
    if isinstance(error, errors.OfflineModeIsEnabled):
        hint = f"unset HF_HUB_OFFLINE, or give {_FOLDER}"
        return _Reason("HF_HUB_OFFLINE is set, and the cache does not have it", hint)
    if isinstance(error, errors.HFValidationError):
        return _Reason(said, "org/name or org/name@revision", ConfigError)
    if status := getattr(getattr(error, "response", None), "status_code", 0):
        http = f"(HTTP {status})"
        if isinstance(error, errors.GatedRepoError):
            return _Reason(
                f"it is gated, and access was not granted {http}",
                f"ask for access at {page}, then {login}",
                ConfigError,
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return _Reason(f"it has no revision {model.revision or 'main'!r}", f"see {page}/tree/main", ConfigError)
        if isinstance(error, errors.RepositoryNotFoundError):
            hint = f"check the path, or the spelling at {page}; for a private model {login}"
            return _Reason(f"there is no such model, or it is private {http}", hint, ConfigError)
        if status in (401, 403):
            return _Reason(f"access was refused {http}", f"{login}; a token may have expired", ConfigError)
        wait = "wait some minutes; with a token the limit is higher" if status == 429 else "try again later"
        return _Reason(f"the Hub answered with HTTP {status}", f"{wait}, or give {_FOLDER}")
    if isinstance(error, OSError) and error.errno in _DISK:
        place = error.filename or constants.HF_HUB_CACHE
        return _Reason(
            f"cannot write {place}: {error.strerror}", "free space, or set HF_HOME to another folder", StorageError
        )
    # By name: the module of the HTTP client is another one from version to version.
    kinds = {cls.__name__ for cls in type(error).__mro__}
    hint = f"check the network and HF_ENDPOINT, or give {_FOLDER}"
    if kinds & {"TimeoutException", "Silence"}:
        return _Reason(f"{constants.ENDPOINT} does not answer", hint)
    if kinds & {"ReadError", "WriteError", "RemoteProtocolError"}:
        again = "run it again: a transfer goes on where it stopped"
        return _Reason(f"the transfer from {constants.ENDPOINT} broke off ({said})", again)
    why = f"{constants.ENDPOINT} cannot be reached" if "TransportError" in kinds else type(error).__name__
    return _Reason(f"{why} ({said})", hint)
