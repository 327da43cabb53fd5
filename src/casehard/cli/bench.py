"""``casehard bench PLAN``: run a whole matrix of bases, defences, attacks and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from casehard.cli import console, options
from casehard.cli.runs import check_out, hold
from casehard.errors import ConfigError
from casehard.io import secrets
from casehard.limits import PROCESSES

if TYPE_CHECKING:
    from casehard.benchmark.run import BenchResult, NodeEvent

Jobs = Annotated[
    int | None,
    typer.Option(
        "--jobs",
        min=1,
        max=PROCESSES,
        help="Runs at once, one CPU thread each [default: 2; what a GPU holds].",
    ),
]


def bench(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="Plan file (YAML).")],
    out: options.Out,
    jobs: Jobs = None,
    sets: options.Sets = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="First seed; as many follow as the plan has [default: the plan's].")
    ] = None,
) -> None:
    """Run a plan of defences, attacks and seeds.

    The plan is the settings file; --set changes it. What exists in DIR is reused, what was interrupted goes on, what
    failed is listed and does not stop the rest.
    """
    if not plan.is_file():
        raise ConfigError(f"no such plan: {plan}", hint="give a YAML file; plans/demo.yaml is an example")
    chosen = list(sets or [])
    if seed is not None:
        from casehard.benchmark.plan import load_plan

        chosen.insert(0, f"seeds={list(range(seed, seed + len(load_plan(plan, chosen).seeds)))}")
    run(plan, out, jobs=jobs, sets=chosen)


def run(plan: Path, out: Path, *, jobs: int | None, sets: Sequence[str]) -> None:
    """Run a plan file, write the report, and print verdict, table and paths; exit 1 when a run failed."""
    from casehard.benchmark.plan import load_plan
    from casehard.config import to_dict

    options.require_report()
    loaded = load_plan(plan, sets)
    secrets.refuse(to_dict(loaded), where="plan")
    check_out(out, "bench", again=True)
    if jobs is None:
        from casehard.benchmark.jobs import fitting

        jobs = fitting(loaded, plan.parent)
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
    from casehard.benchmark.run import run_plan
    from casehard.reporting.page import write_report
    from casehard.train.progress import announce

    with hold(out):
        result = run_plan(loaded, out, root=plan.parent, jobs=jobs, progress=_tell)
        announce("drawing the report ...")
        page = write_report(out)
    _conclude(result, page)


def _tell(event: NodeEvent) -> None:
    if event.status in ("failed", "skipped"):
        console.warn(f"{event.label}: {event.status}: {event.message}")


def _conclude(result: BenchResult, page: Path) -> None:
    console.say(f"runs: {result.ran} done, {result.reused} reused, {len(result.failed)} failed or skipped")
    console.say(result.summary["verdict"]["sentence"])
    console.made("report", page)
    if result.exit_code:
        console.fail(f"{len(result.failed)} runs failed or were skipped", "run the same command again to retry them")
        raise typer.Exit(result.exit_code)
