"""The command tree: one line per verb. Verb modules import nothing heavy until they run."""

from __future__ import annotations

from typing import Annotated

import typer
from typer.core import TyperGroup

import casehard
from casehard.cli import (
    attack,
    backdoor,
    bench,
    buffer,
    data,
    defend,
    demo,
    doctor,
    evaluate,
    judge,
    mb_defense,
    merge,
    model,
    options,
    organism,
    recommend,
    report,
    scan,
    select,
    verify,
)

VERBS = [
    "demo",
    "recommend",
    "organism",
    "model",
    "select",
    "buffer",
    "defend",
    "merge",
    "attack",
    "scan",
    "backdoor",
    "evaluate",
    "judge",
    "bench",
    "report",
    "data",
    "verify",
    "doctor",
]
PIPELINE = f"defend {mb_defense.NAME}"
CHECK = "judge check"


class Verbs(TyperGroup):
    """The top group, listing its verbs in the order in which they are used."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """Return the names in the order of VERBS."""
        return list(VERBS)

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Read ``defend mb-defense`` and ``judge check`` as one verb each, with options of its own."""
        if args[:2] == CHECK.split():
            args = [CHECK, *args[2:]]
        if args[:1] == ["defend"] and args[1:2] in ([mb_defense.NAME], ["mb_defense"]):
            args = [PIPELINE, *args[2:]]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=Verbs,
    help="Harden language models against harmful fine-tuning and backdoors, and show the evidence.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="--debug anywhere on the line (or CASEHARD_DEBUG=1) shows tracebacks.",
)


def _version(asked: bool) -> None:
    if asked:
        print(f"casehard {casehard.__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Harden language models against harmful fine-tuning and backdoors, and show the evidence."""


app.command("demo")(demo.demo)
app.command("recommend")(recommend.recommend)
app.add_typer(organism.app, name="organism")
app.add_typer(model.app, name="model")
app.command("select", epilog=options.FILES)(select.select)
app.add_typer(buffer.app, name="buffer")
app.command("defend", epilog=options.FILES)(defend.defend)
app.add_typer(merge.app, name="merge")
app.command(PIPELINE, hidden=True, epilog=options.FILES)(mb_defense.mb_defense)
app.add_typer(attack.app, name="attack")
app.add_typer(scan.app, name="scan")
app.add_typer(backdoor.app, name="backdoor")
app.command("evaluate")(evaluate.evaluate)
app.command("judge")(judge.judge)
app.command(CHECK, hidden=True)(judge.check)
app.command("bench")(bench.bench)
app.command("report")(report.report)
app.add_typer(data.app, name="data")
app.command("verify")(verify.verify)
app.command("doctor")(doctor.doctor)
