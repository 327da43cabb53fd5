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
            metavar="RUN_DIR...", help="One folder of bench or demo, or several of attack, evaluate, defend."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="File to make, .html or .md [default: RUN_DIR/report.html]."),
    ] = None,
) -> None:
    """Write the report of finished runs: one HTML file, or the tables as a Markdown page.

    One benchmark's folder, or several folders of single verbs: the same attack on an undefended and on a hardened
    checkpoint together make a comparison.
    """
    for folder in folders:
        if not (folder / "run.json").is_file():
            what = "is not a run folder (it has no run.json)" if folder.is_dir() else "does not exist"
            raise ConfigError(
                f"{folder} {what}", hint="give the --out folder of bench, demo, attack, evaluate or defend"
            )
    if out is not None and out.is_dir():
        raise ConfigError(f"{out} is a folder", hint=f"name the file: --out {out / 'report.html'}")
    if out is not None and out.suffix not in (".html", ".md"):
        raise ConfigError(f"--out {out} is neither .html nor .md", hint=f"--out {out.name}.html: the whole report")
    options.require_report()
    from casehard.reporting.page import write_report

    console.plan("write a report", {"runs": folders, "out": out or folders[0] / "report.html"})
    console.made("report", write_report(folders, out=out))
