"""``casehard judge FILE``: label responses."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from casehard.cli import console
from casehard.errors import ConfigError, DataError


def judge(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL rows with prompt and response.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="PATH", help="File (.jsonl) or run folder to make [default: stdout]."),
    ] = None,
) -> None:
    """Label responses by rule.

    Labels: refusal, partial (declines, then answers some of it), answer, incoherent, unscored (no response).
    """
    if not file.is_file():
        raise DataError(f"no such file: {file}", hint='give a JSONL file of {"prompt": ..., "response": ...} rows')
    from casehard.evaluation.judges.base import judge_file

    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            labelled = Path(folder) / "rows.jsonl"
            counts = judge_file(file, labelled)
            console.write(labelled.read_text(encoding="utf-8"))
    elif out.suffix == ".jsonl":
        if out.exists():
            raise ConfigError(f"{out} already exists", hint="give another path with --out, or remove it")
        console.plan("label responses by rule", {"file": file, "out": out})
        counts = judge_file(file, out)
    else:
        counts = _into_folder(file, out)
    total = sum(counts.values())
    rows = [(label, f"{n:,}", f"{n / total:.3f}") for label, n in counts.items() if label != "leak" or n]
    console.table(f"labels of {total:,} responses", ["label", "rows", "share"], rows, stderr=out is None)
    if out is not None:
        console.made("labelled rows", out if out.suffix == ".jsonl" else out / "rows.jsonl")


def _into_folder(file: Path, out: Path) -> dict[str, int]:
    from casehard.benchmark.store import read_rows
    from casehard.cli.runs import run_folder
    from casehard.evaluation.judges.base import judge_file

    console.plan("label responses by rule", {"file": file, "out": out})
    with run_folder(out, "judge", {"file": str(file), "judge": "rule"}, data=[str(file)]) as run:
        with tempfile.TemporaryDirectory() as folder:
            labelled = Path(folder) / "rows.jsonl"
            counts = judge_file(file, labelled)
            run.rows(read_rows(labelled))
        run.summary({"labels": counts, "n": sum(counts.values())})
    return counts
