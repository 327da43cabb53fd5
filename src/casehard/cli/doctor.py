"""``casehard doctor``: what is installed, what this machine can do, what is missing and how to get it."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import platform
import shutil
import sys
from pathlib import Path

from casehard import __version__
from casehard.cli import console
from casehard.errors import Unsupported

Row = tuple[str, str, str]


def _requirements() -> list[tuple[str, str, str]]:
    """Return (extra or "", package, required versions) for everything casehard names, dev tools apart."""
    from packaging.requirements import Requirement

    out = []
    for text in metadata.requires("casehard") or []:
        wanted = Requirement(text)
        extra = str(wanted.marker).partition("extra == ")[2].strip("\"'") if wanted.marker else ""
        if extra != "dev":
            out.append((extra, wanted.name, str(wanted.specifier)))
    return out


def package_rows() -> tuple[list[Row], list[str], list[str]]:
    """Return table rows, complaints about core packages, and extras that are not complete."""
    from packaging.specifiers import SpecifierSet

    rows: list[Row] = []
    broken: list[str] = []
    missing: dict[str, None] = {}
    for extra, name, wanted in _requirements():
        try:
            have = metadata.version(name)
        except metadata.PackageNotFoundError:
            have = ""
        good = bool(have) and SpecifierSet(wanted).contains(have, prereleases=True)
        part = extra or "core"
        rows.append(
            (name, have or "-", "ok" if good else f"{part}: wants {wanted}" if have else f"{part}: not installed")
        )
        if not good and not extra:
            broken.append(f"{name} {have or 'is missing'}, wants {wanted}")
        elif not good:
            missing[extra] = None
    return rows, broken, list(missing)


def machine_rows() -> list[Row]:
    """Return table rows on processor, threads, precision, memory and disk."""
    from casehard.bench.store import hardware

    rows: list[Row] = [("python", platform.python_version(), sys.executable)]
    found = hardware()
    rows.append(("processor", found["processor"], f"{found['cores']} cores"))
    if "memory_bytes" in found:
        rows.append(("memory", f"{found['memory_bytes'] / 2**30:.1f} GiB", ""))
    rows.append(("disk free here", f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB", str(Path.cwd())))
    try:
        import torch
    except ImportError as error:
        return [*rows, ("torch", "-", f"cannot be imported: {error}")]
    wanted = os.environ.get("OMP_NUM_THREADS")
    rows.append(("torch threads", str(torch.get_num_threads()), f"OMP_NUM_THREADS={wanted}" if wanted else ""))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows.append(("GPU", ", ".join(gpus) or "none", ""))
    from casehard.train.recipe import uses_bf16

    bf16 = uses_bf16("auto", torch.device("cuda" if gpus else "cpu"))
    rows.append(("precision", "bf16 over fp32 masters" if bf16 else "fp32", "train.precision=bf16|fp32 overrides it"))
    return rows


def doctor() -> None:
    """Show what is installed, missing and possible here.

    Every extra that is not complete comes with the line that installs it.
    """
    console.plan(f"check this installation of casehard {__version__}", {})
    packages, broken, missing = package_rows()
    console.table("packages", ["package", "version", "state"], packages)
    console.table("machine", ["what", "value", "note"], machine_rows())
    for extra in missing:
        console.say(f"optional {extra!r} is not complete; to install: pip install 'casehard[{extra}]'")
    if broken:
        raise Unsupported("this installation is not supported: " + "; ".join(broken), hint="pip install -U casehard")
    console.say("the core is complete")
