"""``casehard judge FILE``: label responses; ``casehard judge check FILE``: hold judges against people's labels."""

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

    Labels: refusal, partial (declines, then answers some of it), answer, leak (harmful, or all content items),
    incoherent, unscored (no response).

    `casehard judge check FILE` compares judges with labels that people gave, and with each other.
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


def check(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="JSONL rows with prompt, response and human: a label, or true or false."),
    ],
    names: Annotated[
        list[str] | None,
        typer.Option("--judge", metavar="[ALIAS=]NAME", help="Judge; repeat for several [default: rule]."),
    ] = None,
    sets: options.Sets = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Run folder to make [default: none].")
    ] = None,
) -> None:
    """Compare judges with labels that people gave, and with each other: agreement, Cohen's kappa, confusion.

    human is refusal, partial, answer, leak or incoherent; or true or false, for a harmful response. Rows with the key
    wrapper are counted by it too. With several judges a setting is ALIAS.SETTING: --judge guard=classifier
    --set guard.model=DIR.
    """
    if not file.is_file():
        raise DataError(f"no such file: {file}", hint='give JSONL rows of {"prompt", "response", "human"}')
    from casehard.cli.runs import check_out, run_folder
    from casehard.evaluation.judges import make_judge
    from casehard.evaluation.judges.agreement import check as compare_all

    named = _named(names or ["rule"])
    settings = _settings_of(named, options.settings(None, sets, {}))
    judges = {alias: make_judge(name, settings[alias]) for alias, name in named.items()}
    if out is not None:
        check_out(out, "judge")
    console.plan("compare judges with people", {"file": file, "judges": ", ".join(named.values()), "out": out})
    if out is None:
        _, summary = compare_all(file, judges)
    else:
        config = {"file": str(file), "judges": named, "settings": settings}
        with run_folder(out, "judge", config, data=[str(file)]) as run:
            rows, summary = compare_all(file, judges)
            run.rows(rows)
            run.summary(summary)
    _show(summary)
    if out is not None:
        console.made("run folder", out)


def _named(given: list[str]) -> dict[str, str]:
    """Return alias -> name of a judge.

    Raises:
        ConfigError: two of the same alias.
    """
    named: dict[str, str] = {}
    for text in given:
        alias, _, name = text.rpartition("=")
        alias = alias or name
        if alias in named:
            raise ConfigError(f"two judges are called {alias!r}", hint=f"--judge a={name} --judge b={name}")
        named[alias] = name
    return named


def _settings_of(named: dict[str, str], values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the settings of each judge; those of a single one need no alias.

    Raises:
        ConfigError: a setting without an alias beside several judges.
    """
    own = {alias: dict(values[alias]) if isinstance(values.get(alias), dict) else {} for alias in named}
    rest = {key: value for key, value in values.items() if key not in named}
    if rest and len(named) > 1:
        key = next(iter(rest))
        raise ConfigError(f"--set {key}=...: of which judge?", hint=f"--set {next(iter(named))}.{key}=...")
    alias = next(iter(named))
    return {**own, alias: {**rest, **own[alias]}}


def _show(summary: dict[str, Any]) -> None:
    """Print what was compared, and for each judge where it differs from people."""
    people, between = summary["people"], summary["judges"]
    rows = [_compared(f"people, {name}", found) for name, found in people.items()]
    for name, found in people.items():
        rows += [_compared(f"  {name}: {w}", part) for w, part in found.get("by_wrapper", {}).items()]
    rows += [_compared(names, found) for names, found in between.items()]
    columns = ["between", "rows", "unscored", "agreement", "Cohen's kappa"]
    console.table(f"{summary['about']}s of {summary['n']:,} rows, with 95 % intervals", columns, rows)
    for name, found in people.items():
        said = sorted({label for row in found["table"].values() for label in row})
        lines = [[label, *[str(row.get(other, 0)) for other in said]] for label, row in found["table"].items()]
        console.table(f"people (rows) and {name} (columns)", ["", *said], lines)


def _compared(what: str, found: dict[str, Any]) -> list[str]:
    if not found["n"]:
        return [what, "0", str(found["unscored"]), "-", "-"]
    share = f"{found['share']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"
    kappa = "not defined: one label" if found["kappa"] is None else f"{found['kappa']:.2f}"
    if found["kappa"] is not None and found["kappa_low"] is not None:
        kappa += f" [{found['kappa_low']:.2f}, {found['kappa_high']:.2f}]"
    return [what, str(found["n"]), str(found["unscored"]), share, kappa]
