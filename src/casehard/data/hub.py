"""Data sets from the Hugging Face Hub; the only file that imports ``datasets``. No loading script is ever run."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

from casehard.errors import ConfigError, DataError, MissingExtra, UserError
from casehard.io import hub

_SPEC = re.compile(r"hub:(?P<name>\w[\w.-]*/\w[\w.-]*)(?:/(?P<config>\w[\w.-]*))?:(?P<split>[\w.-]+(?:\[[\d:%]*\])?)")

_HINT = "check the name and the network, or download the rows and pass a .jsonl or .parquet file"


def rows(spec: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of ``hub:org/name[/config]:split`` as plain dicts.

    Raises:
        DataError: the spec is malformed, or the data set cannot be fetched.
        MissingExtra: ``datasets`` is not installed.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise DataError(f"{spec!r} is not of the form hub:org/name:split", hint="example: hub:org/name:train[:500]")
    load = _loader()
    try:
        with hub.answers():
            table = load(match["name"], match["config"], split=match["split"])
        yield from table
    except hub.Silence:
        raise DataError(f"{spec}: the Hub does not answer", hint=_HINT) from None
    except Exception as error:  # the Hub client and its decoders of pictures and sounds raise many unrelated types
        raise DataError(
            f"{spec}: cannot be fetched ({type(error).__name__}: {str(error)[:200]})",
            hint=_HINT,
        ) from None


def _loader() -> Any:
    try:
        from datasets import load_dataset
    except ImportError:
        raise MissingExtra("datasets", "data", purpose="reading Hub data sets") from None
    return load_dataset


def commit_of(name: str, revision: str) -> str:
    """Return the commit that a branch or tag of a data set is at.

    Raises:
        ConfigError: there is no such data set or revision.
        UserError: the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        with hub.answers():
            return str(HfApi().dataset_info(name, revision=revision).sha)
    except Exception as error:  # the Hub client raises many unrelated types, offline ones included
        raise _refusal(name, error) from None


def whole(name: str, config: str, split: str, commit: str) -> list[dict[str, Any]]:
    """Return the rows of one split of a data set at a commit, or those of all its splits in turn.

    Nothing that the data set says is in an error: such a text may be a row.

    Args:
        split: empty for all.

    Raises:
        MissingExtra: ``datasets`` is not installed.
        ConfigError: no access to it.
        UserError: the Hub cannot be reached.
        DataError: it cannot be read as the table says.
    """
    load = _loader()
    try:
        with hub.answers():
            found = load(name, config or None, split=split or None, revision=commit)
        return list(found) if split else list(itertools.chain.from_iterable(found[part] for part in found))
    except Exception as error:
        raise _refusal(name, error) from None


def _refusal(name: str, error: BaseException) -> UserError:
    """Return why a data set did not come; the words of the client alone, by the kinds of its errors."""
    from huggingface_hub import constants, errors

    page, local = f"{constants.ENDPOINT}/datasets/{name}", "or read a local copy with --from FOLDER"
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or at.__context__
    kinds = {kind.__name__ for item in chain for kind in type(item).__mro__}
    statuses = {getattr(getattr(item, "response", None), "status_code", 0) for item in chain}
    gated = any(isinstance(item, errors.GatedRepoError) for item in chain) or "is a gated dataset" in str(error)
    if gated:
        hint = f"accept its licence at {page}, then log in with `hf auth login` or set HF_TOKEN; {local}"
        return ConfigError(f"{name} is gated, and access was not granted", hint=hint)
    if "OfflineModeIsEnabled" in kinds or "LocalEntryNotFoundError" in kinds:
        hint = f"unset HF_HUB_OFFLINE and HF_DATASETS_OFFLINE, {local}"
        return UserError(f"{name} is not in the cache, and the Hub must not be asked (offline)", hint=hint)
    if "RevisionNotFoundError" in kinds:
        return ConfigError(f"{name} has no such revision", hint=f"see {page}/tree/main")
    if "RepositoryNotFoundError" in kinds or "DatasetNotFoundError" in kinds or statuses & {401, 403, 404}:
        hint = f"see {page}; for a private one log in with `hf auth login` or set HF_TOKEN; {local}"
        return ConfigError(f"{name}: there is no such data set on the Hub, or no access to it", hint=hint)
    if kinds & {
        "Silence",
        "TransportError",
        "ConnectionError",
        "TimeoutException",
        "HfHubHTTPError",
    }:
        hint = f"check the network and HF_ENDPOINT, {local}"
        return UserError(f"{constants.ENDPOINT} cannot be reached, or does not answer", hint=hint)
    hint = f"it may be laid out in another way today: see {page}; {local}"
    return DataError(f"{name}: cannot be read ({type(error).__name__})", hint=hint)
