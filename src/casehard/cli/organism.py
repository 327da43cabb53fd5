"""``casehard organism build``: make the embedded model world from nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from casehard.cli import console, options
from casehard.errors import ConfigError

app = typer.Typer(help="Build the embedded, harmless model world.", no_args_is_help=True)


@app.callback()
def organism() -> None:
    """Build the embedded, harmless model world."""


def _reusable(out: Path, recipe: str) -> bool:
    """Return whether ``out`` already holds this very build, intact; refuse a folder that holds anything else."""
    from casehard import files

    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"{out} exists and is not a folder", hint="give another folder with --out")
    if not out.is_dir() or not any(out.iterdir()):
        return False
    facts = out / "organism.json"
    if not facts.is_file() or json.loads(facts.read_text(encoding="utf-8")).get("recipe") != recipe:
        raise ConfigError(
            f"{out} is not empty and is not this organism", hint="give another folder with --out, or remove this one"
        )
    files.verify(out)
    return True


@app.command("build")
def make(
    out: options.Out,
    world_seed: Annotated[int, typer.Option(min=0, help="Seed of names, procedures and vocabulary.")] = 0,
    size: Annotated[str, typer.Option(metavar="tiny|small", help="Model size.")] = "small",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; float sums, and so the exact bytes, depend on it.")
    ] = None,
) -> None:
    """Pretrain the organism from scratch and write it as an ordinary model folder with its data.

    A folder that already holds the same build is checked and kept.
    """
    if size not in ("tiny", "small"):
        raise ConfigError(f"no organism size is called {size!r}", hint="sizes: tiny, small")
    from casehard.organism.build import build, recipe_digest

    console.plan("build an organism from nothing", {"world seed": world_seed, "size": size, "out": out})
    if _reusable(out, recipe_digest(world_seed, size)):
        console.made("already built, complete and unchanged", out)
        return
    made = build(out, world_seed=world_seed, size=size, threads=threads)
    files = sorted(p for p in made.rglob("*") if p.suffix in (".safetensors", ".jsonl"))
    rows = [(str(p.relative_to(made)), f"{p.stat().st_size / 1024:,.0f} KiB") for p in files]
    console.table("the organism", ["file", "size"], rows)
    console.made("model folder", made)
