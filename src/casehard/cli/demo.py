"""``casehard demo``: the main job on the embedded organism, from nothing to a report."""

from __future__ import annotations

from typing import Annotated

import typer

from casehard.cli import options
from casehard.cli.bench import Jobs, run
from casehard.cli.shipped import shipped


def demo(
    out: options.Out,
    world_seed: Annotated[
        int | None, typer.Option(min=0, help="World of the organism; one that is not shipped is built first.")
    ] = None,
    seed: options.Seed = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="How many seeds, counted from --seed.")] = 3,
    jobs: Jobs = None,
    sets: options.Sets = None,
) -> None:
    """Harden, attack, measure and report.

    Patcher and its controls on the embedded model world; ends with the verdict and the path of the report.
    """
    options.require_report()
    from casehard.config import read_yaml

    plan = shipped("plans", "demo.yaml")
    first = seed or 0
    chosen = [f"seeds={list(range(first, first + seeds))}"]
    if world_seed is not None:
        chosen += [f"bases.{base['name']}.world_seed={world_seed}" for base in read_yaml(plan)["bases"]]
    run(plan, out, jobs=jobs, sets=[*chosen, *(sets or [])])
