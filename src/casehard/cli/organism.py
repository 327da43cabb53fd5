"""``casehard organism build``: make the embedded model world from nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from casehard.cli import console, options
from casehard.cli.runs import beside
from casehard.errors import ConfigError
from casehard.limits import PROCESSES, Limited, Within, WorldSeed

app = typer.Typer(help="Build the embedded, harmless model world.", no_args_is_help=True)


@app.callback()
def organism() -> None:
    """Build the embedded, harmless model world."""


@dataclass(frozen=True, kw_only=True)
class BuildSettings(Limited):
    """What a build depends on."""

    world_seed: WorldSeed = 0
    size: str = "small"
    threads: Annotated[int, Within(1, PROCESSES)] | None = None


def _reusable(out: Path, recipe: str) -> bool:
    """Return whether ``out`` already holds this very build, intact; refuse a folder that holds anything else."""
    from casehard.io import files, manifest

    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"{out} exists and is not a folder", hint="give another folder with --out")
    if not out.is_dir() or not any(out.iterdir()):
        return False
    facts = files.read_json(out / "organism.json") if (out / "organism.json").is_file() else {}
    if not isinstance(facts, dict) or facts.get("recipe") != recipe:
        raise ConfigError(
            f"{out} is not empty and is not this organism", hint="give another folder with --out, or remove this one"
        )
    manifest.verify(out)
    return True


@app.command("build")
def make(
    out: options.Out,
    world_seed: Annotated[
        int | None,
        typer.Option("--world-seed", "--seed", min=0, help="Seed of names, procedures, vocabulary and weights."),
    ] = None,
    size: Annotated[str | None, typer.Option(metavar="tiny|small", help="Model size [default: small].")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; float sums, and so the exact bytes, depend on it.")
    ] = None,
    config: options.Config = None,
    sets: options.Sets = None,
) -> None:
    """Pretrain the organism from scratch and write it as an ordinary model folder with its data.

    A folder that already holds the same build is checked and kept. How a build went is recorded beside it, in DIR.run:
    the folder itself holds nothing that differs from one build to the next.
    """
    from casehard.config import build as settings_of

    values = options.settings(config, sets, {"world_seed": world_seed, "size": size, "threads": threads})
    chosen = settings_of(BuildSettings, values, where="organism")
    if chosen.size not in ("tiny", "small"):
        raise ConfigError(f"no organism size is called {chosen.size!r}", hint="sizes: tiny, small")
    _run(chosen, out)


def _run(chosen: BuildSettings, out: Path) -> None:
    from casehard.benchmark.store import RunFolder, read_run
    from casehard.organism.build import build, recipe_digest

    console.plan("build an organism from nothing", {**asdict(chosen), "out": out})
    there = _reusable(out, recipe_digest(chosen.world_seed, chosen.size))
    with beside(out) as record:
        # A build that was killed once the folder stood has a record that does not know it.
        if there and (not (record / "run.json").is_file() or read_run(record).get("status") == "ok"):
            console.made("already built, complete and unchanged", out)
            return
        with RunFolder(record, "organism", asdict(chosen), seeds=[chosen.world_seed]) as run:
            made = out if there else build(out, world_seed=chosen.world_seed, size=chosen.size, threads=chosen.threads)
            files = sorted(p for p in made.rglob("*") if p.suffix in (".safetensors", ".jsonl"))
            sizes = {str(p.relative_to(made)): p.stat().st_size for p in files}
            run.summary({"files": sizes})
    console.table("the organism", ["file", "size"], [(name, f"{n / 1024:,.0f} KiB") for name, n in sizes.items()])
    console.made("run folder", record)
    console.made("model folder", made)
