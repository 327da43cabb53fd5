"""``casehard demo``: the main job on the embedded organism, from nothing to a report."""

from __future__ import annotations

from typing import Annotated

import typer

from casehard.cli import options


def demo(
    out: options.Out,
    world_seed: Annotated[int, typer.Option(min=0, help="World of the organism; any other than 0 is built first.")] = 0,
    seed: options.Seed = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, counted from --seed.")] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time.")] = 2,
    sets: options.Sets = None,
) -> None:
    """Harden the embedded organism with Patcher, attack it beside its controls, and write the report."""
    from casehard.cli.bench import run
    from casehard.cli.shipped import shipped

    first = seed or 0
    chosen = [f"seeds={list(range(first, first + seeds))}"]
    if world_seed:
        chosen.append(f"bases.organism.world_seed={world_seed}")
    run(shipped("plans", "demo.yaml"), out, jobs=jobs, sets=[*chosen, *(sets or [])])
