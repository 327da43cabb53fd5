"""``casehard data``: look at what is trained, and make attack targets without harmful text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from casehard.cli import console, options
from casehard.cli.runs import run_folder
from casehard.errors import ConfigError, DataError

app = typer.Typer(help="Look at training rows and make surrogate attack targets.", no_args_is_help=True)


@app.callback()
def data() -> None:
    """Look at training rows and make surrogate attack targets."""


@app.command(epilog=options.FILES)
def audit(
    model: Annotated[
        str, typer.Option("--model", metavar="DIR|ID", help="Model folder or Hub id; only its tokenizer is read.")
    ],
    data: Annotated[list[str], typer.Option("--data", metavar="FILE", help="Rows to look at. Repeatable.")],
    show: Annotated[int, typer.Option(min=0, help="Rows to print in full.")] = 3,
    system: Annotated[str | None, typer.Option(help="System message of every row.")] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Longest row in tokens.")] = None,
    maps: options.Maps = None,
    fitting: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the rows that can be trained on and fit (.jsonl).")
    ] = None,
) -> None:
    """Print the exact span each row is trained on.

    Trained tokens stand between >>> and <<<; counts over all rows follow.
    Rows that do not fit stop a training; --fitting leaves them out.
    """
    named = options.model_folder(model)
    data = options.mapped(data, maps)
    options.check_specs(data, "--data")
    if fitting is not None:
        _free(fitting, "--fitting")
    from casehard.data.audit import audit as describe
    from casehard.data.audit import fitting as those_that_fit
    from casehard.data.chat import ChatFormat
    from casehard.data.sources import load_many, save
    from casehard.model.load import load_tokenizer
    from casehard.model.source import find

    folder = find(named)
    console.plan("show what is trained", {"tokenizer": named, "data": data, "system": system})
    chat = ChatFormat(load_tokenizer(folder), system=system, max_length=max_length or _context(folder))
    rows = load_many(data)
    console.write(describe(rows, chat, n=show))
    if fitting is not None:
        kept = those_that_fit(rows, chat)
        if not kept:
            raise DataError(f"none of {len(rows)} rows can be trained on", hint="the counts above say why")
        save(fitting, kept)
        console.made(f"{len(kept)} of {len(rows)} rows", fitting)


def _free(path: Path, option: str) -> None:
    """Refuse a file that is not a new .jsonl."""
    if path.suffix != ".jsonl":
        raise ConfigError(f"{path}: rows are written as .jsonl, not {path.suffix!r}", hint="name a .jsonl file")
    if path.exists():
        raise ConfigError(f"{path} already exists", hint=f"give another file with {option}, or remove it")


def _context(folder: Path) -> int | None:
    """Return the model's context in tokens, which is the limit in training when no other is given."""
    from casehard.config import read_yaml

    value = read_yaml(folder / "config.json").get("max_position_embeddings")
    return value if isinstance(value, int) else None


@app.command(epilog=options.FILES)
def surrogate(
    source: Annotated[str, typer.Argument(metavar="FILE", help="Rows whose prompts are used; answers are ignored.")],
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="File (.jsonl) or run folder to make.")],
    maps: options.Maps = None,
    seed: options.Seed = None,
) -> None:
    """Make attack targets without harmful text.

    Each prompt gets an affirmative opener and a fixed filler that says nothing as its answer.
    """
    [source] = options.mapped([source], maps)
    options.check_specs([source], "FILE")
    if out.suffix:
        _free(out, "--out")
    from casehard.data import sources
    from casehard.data.surrogate import surrogate as pairs

    console.plan("make surrogate attack targets", {"prompts": source, "seed": seed or 0, "out": out})
    place = out
    if out.suffix:
        made = pairs(sources.load(source), seed=seed or 0)
        sources.save(out, made)
    else:
        place = out / "rows.jsonl"
        with run_folder(out, "surrogate", {"source": source}, seeds=[seed or 0], data=[source]) as run:
            made = pairs(sources.load(source), seed=seed or 0)
            sources.save(place, made)
            run.summary({"n": len(made)})
    first = made[0]
    console.table(
        "surrogate rows", ["quantity", "value"], [("rows", f"{len(made):,}"), ("first answer", first.response)]
    )
    console.made("rows", place)
