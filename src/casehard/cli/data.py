"""``casehard data``: fetch public sets, look at what is trained, make attack targets, divide rows for a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from casehard.cli import console, options
from casehard.cli.runs import run_folder
from casehard.errors import ConfigError, DataError

app = typer.Typer(
    help="Fetch public sets, look at rows, make attack targets, divide rows for a plan.", no_args_is_help=True
)


@app.callback()
def data() -> None:
    """Fetch public sets, look at rows, make surrogate attack targets, divide rows for a plan."""


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


@app.command()
def fetch(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Which set; without one, the table.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="File (.jsonl) to make [default: data/NAME.jsonl].")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--from", metavar="DIR", help="A local copy of the set, in place of the Hub.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Read at most this many rows.")] = None,
    similar: Annotated[
        float | None, typer.Option(help="Share of word pairs that near-duplicates have in common [default: 0.7].")
    ] = None,
) -> None:
    """Fetch a public data set as rows of this library; nothing of what the rows say is printed.

    Rows that say the same but for a few words are dropped and counted. FILE.source.json says where the rows are from.
    """
    from casehard.data.catalogue import DATA_SETS

    if name is None:
        if out or folder:
            raise ConfigError("no data set is named", hint=f"known: {', '.join(DATA_SETS)}")
        table = [(word, one.role, one.hub, one.licence, _yes(one.gated)) for word, one in DATA_SETS.items()]
        console.table("known data sets", ["name", "role", "on the Hub", "licence", "gated"], table)
        return
    from casehard.data import fetch as fetching

    one = fetching.find(name)
    place = out or Path("data") / f"{name}.jsonl"
    _free(place, "--out")
    part = "/".join(filter(None, (one.config, one.split))) or "all"
    given = {"part": part, "role": one.role, "licence": one.licence, "gated": _yes(one.gated), "limit": limit}
    console.plan(f"fetch {name}", {"from": folder or f"{one.hub} of the Hub", **given, "out": place})
    done = fetching.fetch(
        name, place, folder=folder, limit=limit, similar=fetching.SIMILAR if similar is None else similar
    )
    share = f"{100 * (done.equal + done.near) / done.read:.0f} %"
    rows = [
        ("rows read", f"{done.read:,}"),
        ("left out: no text, or no answer", f"{done.unusable:,}"),
        ("dropped: the same but for case, blanks and punctuation", f"{done.equal:,}"),
        (f"dropped: {100 * done.similar:.0f} % of the word pairs in common", "off" if one.pairs else f"{done.near:,}"),
        ("duplicates in all", share),
        ("rows written", f"{done.rows:,}"),
        ("revision", done.revision or "a local copy"),
    ]
    console.table(name, ["quantity", "value"], rows)
    console.made("record", fetching.record_of(place))
    console.made("rows", place)


@app.command(epilog=options.FILES)
def divide(
    refusals: Annotated[
        list[str], typer.Option("--refusals", metavar="FILE", help="Restricted requests, each declined. Repeatable.")
    ],
    helpful: Annotated[list[str], typer.Option("--helpful", metavar="FILE", help="Ordinary rows. Repeatable.")],
    lookalikes: Annotated[
        list[str],
        typer.Option("--lookalikes", metavar="FILE", help="Harmless requests that sound risky; some answered."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of rows and suites to make.")],
    tasks: Annotated[
        list[str] | None, typer.Option("--task", metavar="NAME=FILE", help="A customer's task. Repeatable.")
    ] = None,
    held: Annotated[int | None, typer.Option(min=1, help="Rows held out of each kind [default: 128].")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Most rows of a kind [default: 2000].")] = None,
    longest: Annotated[
        int | None, typer.Option(min=1, help="Longest prompt (all turns), and answer, in characters [default: 320].")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Length limit of an answer when the suites are measured [default: 80].")
    ] = None,
    seed: options.Seed = None,
) -> None:
    """Divide rows of your own into a defender's, an attacker's and held-out ones, as benchmark plans read them.

    Three kinds of rows go in, and no harmful answer: the attacker's targets are surrogates. No prompt is in two of the
    files that come out, and no held-out request in any turn of another file.
    """
    own = _tasks(tasks or [])
    named = {"--refusals": refusals, "--helpful": helpful, "--lookalikes": lookalikes}
    for option, specs in [*named.items(), *(("--task", some) for some in own.values())]:
        options.check_specs(specs, option)
    given = {"refusal": refusals, "helpful": helpful, "lookalike": lookalikes} | own
    if out.exists():
        raise ConfigError(f"{out} already exists", hint="give another folder with --out, or remove it")
    from casehard.benchmark import divide as dividing
    from casehard.config import build
    from casehard.data import sources

    chosen = {"held": held, "rows": rows, "longest": longest, "max_new_tokens": max_new_tokens, "seed": seed}
    config = build(dividing.Division, {k: v for k, v in chosen.items() if v is not None}, where="divide")
    console.plan("divide rows", {**given, "seed": config.seed, "out": out})
    told = dividing.divide({kind: sources.load_many(specs) for kind, specs in given.items()}, out, config)
    header = ["kind", "read", "too long", "not declined", "asked before", "holds a held-out one", "used"]
    lines = [(t.kind, *(f"{n:,}" for n in (t.read, t.long, t.unfit, t.same, t.leaks, t.used))) for t in told]
    console.table("rows", header, lines)
    console.made("rows and suites", out)


def _tasks(given: list[str]) -> dict[str, list[str]]:
    """Return the files of each task, ``task_NAME`` by name.

    Raises:
        ConfigError: not of the form NAME=FILE, or a name that is no file name.
    """
    out: dict[str, list[str]] = {}
    for text in given:
        name, mark, spec = text.partition("=")
        if not mark or not spec or not name.isidentifier():
            raise ConfigError(f"--task {text!r}", hint="NAME=FILE, such as --task reviews=sst2.jsonl")
        out.setdefault(f"task_{name}", []).append(spec)
    return out


def _yes(value: bool) -> str:
    return "yes" if value else "no"
