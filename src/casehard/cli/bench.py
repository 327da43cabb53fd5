"""``casehard bench PLAN``: run a whole matrix of bases, defences, attacks and seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from casehard.cli import console, options
from casehard.errors import ConfigError, Diverged


def bench(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="Plan file (YAML).")],
    out: options.Out,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time.")] = 1,
    sets: options.Sets = None,
) -> None:
    """Run a plan: what exists in DIR is reused, what failed is listed and does not stop the rest."""
    if not plan.is_file():
        raise ConfigError(f"no such plan: {plan}", hint="give a YAML file; plans/demo.yaml is an example")
    run(plan, out, jobs=jobs, sets=list(sets or []))


def run(plan: Path, out: Path, *, jobs: int, sets: list[str]) -> None:
    """Run a plan file and print the verdict, the table and the path of the report."""
    from casehard.bench.plan import load_plan

    loaded = load_plan(plan, sets)
    console.plan(
        loaded.title,
        {
            "plan": plan,
            "bases": [b.name for b in loaded.bases],
            "defences": [d.name for d in loaded.defences],
            "attacks": [a.name for a in loaded.attacks],
            "seeds": list(loaded.seeds),
            "jobs": jobs,
            "out": out,
        },
    )
    from casehard.bench.run import run_plan

    result: Any = run_plan(loaded, out, jobs=jobs, root=plan.parent)
    console.say(result.verdict)
    console.made("report", result.report)
    if result.failed:
        raise Diverged(f"{len(result.failed)} of the runs failed: {', '.join(result.failed)}", hint=f"see {out}")
