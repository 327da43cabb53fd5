"""``casehard doctor``: what is installed, what this machine can do, what is missing and how to get it."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from casehard import __version__
from casehard.cli import console, options
from casehard.compat import MINIMUM, requirements_of, version_of
from casehard.errors import ConfigError, DataError, Unsupported
from casehard.limits import PROCESSES

Row = tuple[str, str, str]


def _requirements() -> list[tuple[str, str, str]] | None:
    """Return (extra or "", package, required versions) for everything casehard names, dev tools apart; None: unread."""
    from packaging.requirements import Requirement

    texts = requirements_of("casehard")
    if texts is None:
        return None
    out = []
    for text in texts:
        wanted = Requirement(text)
        extra = str(wanted.marker).partition("extra == ")[2].strip("\"'") if wanted.marker else ""
        if extra != "dev":
            out.append((extra, wanted.name, str(wanted.specifier)))
    return out


def _known() -> list[tuple[str, str, str]]:
    """Return the same for what is there, as far as the code itself knows: where requirements cannot be read."""
    from casehard.benchmark.store import PACKAGES

    lowest = {name: f">={'.'.join(map(str, least))}" for name, least in MINIMUM.items()}
    return [("", name, lowest.get(name, "")) for name in PACKAGES if name in lowest or version_of(name)]


def package_rows(wanted: Sequence[tuple[str, str, str]]) -> tuple[list[Row], list[str], list[str]]:
    """Return table rows, complaints about core packages, and extras that are not complete.

    Args:
        wanted: (extra or "", package, required versions).
    """
    from packaging.specifiers import SpecifierSet

    rows: list[Row] = []
    broken: list[str] = []
    missing: dict[str, None] = {}
    for extra, name, versions in wanted:
        have = version_of(name)
        good = bool(have) and SpecifierSet(versions).contains(have, prereleases=True)
        part = extra or "core"
        rows.append(
            (name, have or "-", "ok" if good else f"{part}: wants {versions}" if have else f"{part}: not installed")
        )
        if not good and not extra:
            broken.append(f"{name} {have or 'is missing'}, wants {versions}")
        elif not good:
            missing[extra] = None
    return rows, broken, list(missing)


def machine_rows() -> list[Row]:
    """Return table rows on processor, threads, precision, memory and disk."""
    from casehard.benchmark.store import hardware

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


def count_parameters(folder: Path) -> int:
    """Return the number of parameters in a model folder, from the headers of its safetensors files.

    Raises:
        UserError: there are none.
    """
    from math import prod

    from safetensors import safe_open

    from casehard.model.check import check_folder

    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            total += sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    if not total:
        with contextlib.suppress(DataError):  # an empty folder, say
            check_folder(folder)  # says what it holds instead, and which command makes a model folder of that
        raise ConfigError(f"{folder} holds no *.safetensors file", hint="give the folder of a model")
    return total


def hardware_for_training() -> tuple[int, float, bool]:
    """Return devices, bytes of one device, and whether training computes in bf16: GPUs, else halves of the cores."""
    import torch

    from casehard.benchmark.store import hardware
    from casehard.train.recipe import uses_bf16

    gpus = torch.cuda.device_count()
    if gpus:
        smallest = min(torch.cuda.get_device_properties(i).total_memory for i in range(gpus))
        return gpus, float(smallest), uses_bf16("auto", torch.device("cuda"))
    found = hardware()
    cores = int(found["cores"] or 1)
    # Processes on one machine share its memory: each may take its part.
    return cores, float(found.get("memory_bytes", 0)) / min(cores, 2), False


def schedule_rows(k1: int, k2: int, parameters: int, *, attackers: int, bf16: bool) -> list[tuple[str, ...]]:
    """Return a table row for each of Patcher's schedules; bytes in all, or a parameter when their number is unknown."""
    from casehard.defences.patcher.cost import costs

    def size(bytes_each: float) -> str:
        if not bytes_each:
            return "-"
        if not parameters:
            return f"{bytes_each:.0f} B"
        total = bytes_each * parameters
        return f"{total / 1e9:.3g} GB" if total >= 1e9 else f"{total / 1e6:.3g} MB"

    return [
        (
            c.schedule,
            str(c.devices),
            f"{c.round_passes:,.0f}",
            f"{c.speedup:.2f}",
            f"{c.age:,.0f}",
            size(c.defender),
            size(c.attacker),
            size(c.host),
        )
        for c in costs(k1, k2, attackers=attackers, bf16=bf16)
    ]


def _schedules(model: str | None, k1: int, k2: int, attackers: int) -> None:
    from casehard.defences.patcher.cost import advice
    from casehard.model.source import find

    parameters = count_parameters(find(options.model_folder(model))) if model else 0
    devices, memory, bf16 = hardware_for_training()
    unit = f"{parameters:,} parameters" if parameters else "bytes a parameter"
    title = f"Patcher, k1 = {k1}, k2 = {k2}, {attackers} attacker{'s' if attackers > 1 else ''}: predicted"
    rows = schedule_rows(k1, k2, parameters, attackers=attackers, bf16=bf16)
    # Two tables, because one of eight columns does not fit a terminal of 80.
    console.table(title, ["schedule", "devices", "passes a round", "speed-up", "mean age"], [r[:5] for r in rows])
    needs = ["schedule", "defender", "attacker", "host"]
    console.table(f"memory of it, {unit}", needs, [(r[0], *r[5:]) for r in rows])
    console.say(f"here: {advice(k1, k2, devices=devices, device_bytes=memory, parameters=parameters, bf16=bf16)}")


def doctor(
    model: Annotated[
        str | None, typer.Option(metavar="DIR|ID", help="Model whose memory needs are shown for Patcher's schedules.")
    ] = None,
    k1: Annotated[int, typer.Option("--k1", min=0, max=10**9, help="Attack steps of a simulated attack.")] = 300,
    k2: Annotated[int, typer.Option("--k2", min=1, max=10**9, help="Outer steps of a round.")] = 1000,
    attackers: Annotated[int, typer.Option(min=1, max=PROCESSES, help="Attackers beside the defender.")] = 1,
) -> None:
    """Show what is installed, missing and possible here.

    Every extra that is not complete comes with the line that installs it.
    The last table says what each schedule of Patcher would cost on this
    hardware, activations apart.
    """
    console.plan(f"check this installation of casehard {__version__}", {})
    required = _requirements()
    packages, broken, missing = package_rows(_known() if required is None else required)
    console.table("packages", ["package", "version", "state"], packages)
    if required is None:
        console.warn("what casehard requires cannot be read: it runs from a source tree that is not installed")
    console.table("machine", ["what", "value", "note"], machine_rows())
    for extra in missing:
        console.say(f"optional {extra!r} is not complete; to install: pip install 'casehard[{extra}]'")
    if broken:
        raise Unsupported("this installation is not supported: " + "; ".join(broken), hint="pip install -U casehard")
    _schedules(model, k1, k2, attackers)
    if required is not None:
        console.say("the core is complete")
