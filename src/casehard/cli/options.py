"""Options that several verbs share, and how file, ``--set`` and flags combine."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from casehard import config
from casehard.errors import ConfigError, DataError, MissingExtra

Config = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="YAML file with settings, or run.json of an earlier run."),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Override one setting; repeat as needed. Wins over the file."),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of everything random in this run [default: 0].")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Run folder to make.")]
Model = Annotated[
    str | None, typer.Option("--model", metavar="DIR|ID", help="Model or run folder, or Hub id org/name[@revision].")
]
Suite = Annotated[
    str | None, typer.Option("--suite", metavar="PATH", help="Evaluation suite: folder, .jsonl or YAML file.")
]
Device = Annotated[
    str | None,
    typer.Option("--device", metavar="auto|cpu|cuda", help="Where it runs; auto takes a GPU when there is one."),
]
Maps = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        metavar="COLUMN=KEY",
        help="Read this column of the data files as prompt, response ... Repeatable.",
    ),
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", min=1, help="Measure at most this many prompts a group: a look, not a result."),
]

FILES = (
    r"A data FILE may end in a filter on tags: 'rows.jsonl?kind=a,b&source=c'. A comma, & or = that belongs to a value "
    r"has a backslash before it: 'rows.jsonl?source=Smith\, J.'."
)
"""Last lines of the help of every command that reads data files."""


ROWS = ("data", "unsafe", "retain", "safe", "harmful", "refusals", "benign", "clean")
"""Settings that name files of rows."""


def settings(
    file: Path | None,
    sets: Sequence[str] | None,
    flags: Mapping[str, Any],
    maps: Sequence[str] | None = None,
    *,
    roles: Iterable[str] = ROWS,
) -> dict[str, Any]:
    """Return the settings of a verb: the file's, then the flags that were given, then the ``--set`` overrides.

    Args:
        file: YAML, or ``run.json`` of an earlier run of the verb.
        flags: dotted setting name -> value; None and empty lists mean "not given".
        maps: columns of every file of rows, see :func:`mapped`.
        roles: settings that name files of rows.

    Raises:
        ConfigError: a missing or unreadable file, an override that is not ``a.b=c``, or a map that means nothing.
    """
    values = config.override(config.read_yaml(file) if file else {}, ())
    if "config_digest" in values and isinstance(values.get("config"), dict):  # run.json of a finished run
        values = values["config"]
    for path, value in flags.items():
        if value is None or value == []:
            continue
        *groups, last = path.split(".")
        node = values
        for group in groups:
            node = node.setdefault(group, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{file}: {group!r} must be a group of settings, got {node!r}")
        node[last] = value
    values = config.override(values, sets or ())
    for key in roles if maps else ():
        if values.get(key):
            values[key] = mapped(as_list(values, key), maps)
    rows = values.get("rows")
    if maps and isinstance(rows, dict):
        values["rows"] = {role: mapped(as_list(rows, role), maps) for role in list(rows)}
    return values


def mapped(specs: Sequence[str], maps: Sequence[str] | None) -> list[str]:
    """Return file specs that read columns as keys, ``COLUMN=KEY`` each.

    Raises:
        ConfigError: not of that form, or a key that means nothing.
    """
    from casehard.data.sources import with_map

    columns: dict[str, str] = {}
    for text in maps or ():
        column, mark, key = text.rpartition("=")
        if not mark or not column or not key or column in columns:
            problem = f"{column!r} is mapped twice" if column in columns else f"{text!r} is not of the form COLUMN=KEY"
            raise ConfigError(f"--map: {problem}", hint="example: --map question=prompt --map answer=response")
        columns[column] = key
    return [with_map(spec, columns) for spec in specs]


def need(values: Mapping[str, Any], key: str, flag: str) -> None:
    """Raise ConfigError naming ``flag`` when the setting ``key`` is missing or empty."""
    if not values.get(key):
        raise ConfigError(f"{flag} is missing", hint=f"give {flag}, or {key!r} in the --config file")


def as_list(values: dict[str, Any], key: str) -> list[str]:
    """Return a setting that may be one text or a list of texts, and store it as a list.

    Raises:
        ConfigError: something else.
    """
    value = values.get(key) or []
    specs = [value] if isinstance(value, str) else value
    if not isinstance(specs, list) or not all(isinstance(item, str) for item in specs):
        raise ConfigError(
            f"{key}: expected a file or a list of files, got {config.shown(value)}", hint="give file names"
        )
    values[key] = specs
    return specs


def take_rows(values: dict[str, Any], roles: Iterable[str]) -> None:
    """Move the rows of every data role from the top of the settings into ``rows``, and check that the files are there.

    Raises:
        DataError: a missing file.
    """
    given = {str(role): specs for role, specs in (values.get("rows") or {}).items()}
    for role in dict.fromkeys(roles):
        given[role] = values.pop(role, None) or given.get(role) or []
    values["rows"] = {role: as_list(given, role) for role in list(given) if given[role]}
    for role, specs in values["rows"].items():
        check_specs(specs, f"--{role}")


def group(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return a group of settings, empty where it is missing.

    Raises:
        ConfigError: something else stands there.
    """
    value = values.get(key) or {}
    if not isinstance(value, dict):
        raise ConfigError(
            f"{key}: expected a group of settings, got {config.shown(value)}", hint=f"{key}: {{name: value}}"
        )
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(
            f"{what}: expected a path, got {config.shown(value)}", hint="put it in quotes if it is a name"
        )
    return value


def model_folder(given: Any) -> str:
    """Return the model meant by ``given``: a folder, or a Hub id with its commit, whose snapshot is here then.

    Raises:
        UserError: see :func:`casehard.model.source.find`.
    """
    from casehard.model.source import pin
    from casehard.train.progress import announce

    return pin(_text(given, "model"), tell=announce)


def other_folder(given: str) -> str:
    """Return the same of a folder that need not be a model; one that is not there is told by who reads it."""
    from casehard.model.source import pin_any
    from casehard.train.progress import announce

    return pin_any(given, tell=announce)


def device_text(name: str) -> str:
    """Return the device as the plan shows it, "auto" with what it came to.

    Raises:
        ConfigError: no such device.
        Unsupported: not on this machine.
    """
    from casehard.model.load import find_device

    found = str(find_device(name))
    return found if found == name else f"{found} ({name})"


def require_report() -> None:
    """Raise MissingExtra when the report at the end could not draw its figures; asked before anything long starts."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra("matplotlib", "report", purpose="figures of the report")


def check_specs(specs: Sequence[Any], flag: str) -> None:
    """Raise DataError when a local data file is missing, before anything slow starts."""
    from casehard.data.sources import KINDS

    for spec in specs:
        path = _text(spec, flag).partition("?")[0]
        if path.startswith("hub:") or Path(path).is_file() or Path(path).is_dir():
            continue
        if not Path(path).exists():
            raise DataError(f"{flag}: no such file: {path}", hint=f"data files are {KINDS}")
        raise DataError(f"{flag}: {path} is a pipe or a device, and is read twice", hint="write it to a file first")
