"""``casehard report RUN_DIR...``: write the report of finished runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from casehard.cli import console, options
from casehard.errors import ConfigError


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_DIR...",
            help="One folder of bench or demo, or several of attack, evaluate, defend; --leaderboard: any of bench and "
            "attack search.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="File to make, .html or .md [default: RUN_DIR/report.html]."),
    ] = None,
    leaderboard: Annotated[
        bool,
        typer.Option(
            "--leaderboard",
            help="Defences against the worst attacker found, over benchmarks and searches, oldest first. --out "
            "FILE.json keeps what the page needs of a benchmark; such files are taken in place of folders.",
        ),
    ] = False,
) -> None:
    """Write the report of finished runs: one HTML file, or the tables as a Markdown page.

    One benchmark's folder, or several folders of single verbs: the same attack on an undefended and on a hardened
    checkpoint together make a comparison.
    """
    if leaderboard:
        _leaderboard(folders, out)
        return
    for folder in folders:
        if not (folder / "run.json").is_file():
            what = "is not a run folder (it has no run.json)" if folder.is_dir() else "does not exist"
            raise ConfigError(
                f"{folder} {what}", hint="give the --out folder of bench, demo, attack, evaluate or defend"
            )
    options.require_report()
    from casehard.reporting.page import write_report

    console.plan("write a report", {"runs": folders, "out": out or folders[0] / "report.html"})
    console.made("report", write_report(folders, out=out))


def _leaderboard(sources: list[Path], out: Path | None) -> None:
    """Write the leaderboard; see :func:`casehard.reporting.leaderboard.write_leaderboard`."""
    kinds = (".html", ".md", ".json")
    if out is None or out.suffix not in kinds or out.is_dir():
        given = "no --out" if out is None else f"--out {out}"
        raise ConfigError(f"--leaderboard with {given}", hint=f"name a file that ends in {', '.join(kinds)}")
    for source in sources:
        if not (source.is_file() and source.suffix == ".json") and not (source / "run.json").is_file():
            what = "is neither a run folder nor a .json file" if source.exists() else "does not exist"
            raise ConfigError(f"{source} {what}", hint="give folders of bench and attack search, or files kept of them")
    from casehard.reporting.leaderboard import write_leaderboard

    console.plan("write a leaderboard", {"runs": sources, "out": out})
    console.made("leaderboard", write_leaderboard(sources, out))
