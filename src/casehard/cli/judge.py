"""``casehard judge FILE``: label responses."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from casehard.cli import console, options
from casehard.errors import ConfigError, DataError

if TYPE_CHECKING:
    from casehard.evaluation.judges.base import Judge


def judge(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL rows with prompt and response.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="PATH", help="File (.jsonl) or run folder to make [default: stdout]."),
    ] = None,
    name: Annotated[str, typer.Option("--judge", metavar="NAME", help="Judge; --set gives its settings.")] = "rule",
    sets: options.Sets = None,
) -> None:
    """Label responses, by rule unless another judge is named.

    Labels: refusal, partial (declines, then answers some of it), answer, leak, incoherent, unscored (no response).
    """
    if not file.is_file():
        raise DataError(f"no such file: {file}", hint='give a JSONL file of {"prompt": ..., "response": ...} rows')
    from casehard.evaluation.judges import make_judge
    from casehard.evaluation.judges.base import judge_file

    settings = options.settings(None, sets, {})
    made = make_judge(name, settings)
    plan = {"file": file, "settings": settings or None, "out": out}
    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            labelled = Path(folder) / "rows.jsonl"
            counts = judge_file(file, labelled, made)
            console.write(labelled.read_text(encoding="utf-8"))
    elif out.suffix == ".jsonl":
        if out.exists():
            raise ConfigError(f"{out} already exists", hint="give another path with --out, or remove it")
        console.plan(f"label responses by {made.name}", plan)
        counts = judge_file(file, out, made)
    else:
        console.plan(f"label responses by {made.name}", plan)
        counts = _into_folder(file, out, made, settings)
    total = sum(counts.values())
    rows = [(label, f"{n:,}", f"{n / total:.3f}") for label, n in counts.items() if label != "leak" or n]
    console.table(f"labels of {total:,} responses", ["label", "rows", "share"], rows, stderr=out is None)
    if out is not None:
        console.made("labelled rows", out if out.suffix == ".jsonl" else out / "rows.jsonl")


def _into_folder(file: Path, out: Path, made: Judge, settings: dict[str, Any]) -> dict[str, int]:
    from casehard.benchmark.store import read_rows
    from casehard.cli.runs import run_folder
    from casehard.evaluation.judges.base import judge_file

    config = {"file": str(file), "judge": made.name, **({"settings": settings} if settings else {})}
    with run_folder(out, "judge", config, data=[str(file)]) as run:
        with tempfile.TemporaryDirectory() as folder:
            labelled = Path(folder) / "rows.jsonl"
            counts = judge_file(file, labelled, made)
            run.rows(read_rows(labelled))
        run.summary({"labels": counts, "n": sum(counts.values())})
    return counts
