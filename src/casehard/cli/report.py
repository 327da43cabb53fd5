"""``casehard report RUN_DIR``: write the HTML report of a finished run again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from casehard.cli import console
from casehard.errors import ConfigError


def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Run folder of casehard bench or demo.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="HTML file to make [default: RUN_DIR/report.html].")
    ] = None,
) -> None:
    """Write the HTML report of a finished run again."""
    if not folder.is_dir():
        raise ConfigError(f"no such run folder: {folder}", hint="give the --out folder of casehard bench or demo")
    from casehard.report.page import write_report

    console.plan("write a report", {"run": folder, "out": out or folder / "report.html"})
    console.made("report", write_report(folder, out=out))
