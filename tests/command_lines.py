"""Commands that a text shows, held to the command tree and to the settings behind it. No file that they name is read.

A command is a line of a fenced or indented block, or stands between single backquotes: there, only what is written is
checked, since a sentence says the rest. A line that ends in a backslash goes on with the next; where there
is none, and where the line holds ``...``, something was left out, so that only what is written is checked.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from casehard.attacks import ATTACKS
from casehard.cli import _command, options
from casehard.config import build, check_keys
from casehard.defences import DEFENCES
from casehard.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
ENDS = {";", "|", "||", "&", "&&", ">", ">>", "2>"}
LAUNCHED = re.compile(r"^(?:accelerate launch|torchrun) .*?(?:-m casehard\.cli|--no-python casehard) ")
NEEDS = {
    "attack search": ("model", "suite"),
    "backdoor audit": ("model", "data"),
    "buffer prepare": ("model", "harmful", "refusals", "benign"),
    "defend mb-defense": ("model", "clean"),
    "evaluate": ("model", "suite"),
    "scan data": ("data",),
    "scan model": ("model", "suite"),
}
"""What these ask for on the line or in a ``--config`` file; of ``defend`` and ``attack`` the specs say it."""


@dataclass(frozen=True)
class Line:
    """A command of a text."""

    text: str
    whole: bool
    """Nothing was left out."""


def shell_lines(text: str) -> list[Line]:
    """Return the lines of every fenced and indented block, continued ones joined, comments dropped."""
    blocks: list[list[str]] = []
    fenced, before = False, ""
    for line in text.splitlines():
        inside = fenced or line.startswith("    ")
        if line.lstrip().startswith("```"):
            fenced, inside = not fenced, False
        elif inside and (before != "in"):
            blocks.append([])
        if inside:
            blocks[-1].append(line)
        before = "in" if inside else ""
    out = []
    for block in blocks:
        joined = "\n".join(block).replace("\\\n", " ")
        for line in joined.splitlines():
            bare = " ".join(re.sub(r"(^|\s)#.*", "", line).split())
            if bare:
                out.append(Line(bare.removesuffix("\\").strip(), "..." not in bare and not bare.endswith("\\")))
    return out


def commands(text: str) -> list[Line]:
    """Return those of :func:`shell_lines` that run this program, from its name on."""
    out = []
    for line in shell_lines(text):
        bare = LAUNCHED.sub("casehard ", line.text.removeprefix("$ "))
        if bare.startswith("casehard "):
            out.append(Line(bare, line.whole))
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    return out + [Line(" ".join(found.split()), False) for found in re.findall(r"(?<!`)`(casehard [^`]+)`", prose)]


def faults(line: Line) -> list[str]:
    """Return what is wrong with a command: no such verb or option, one argument too many, or one that is missing."""
    try:
        lexer = shlex.shlex(line.text, posix=True, punctuation_chars=True)
        lexer.whitespace_split, lexer.commenters = True, ""
        words = list(lexer)
    except ValueError as error:
        return [str(error)]
    end = next((i for i, word in enumerate(words) if word in ENDS), len(words))
    try:
        return _faults([word for word in words[1:end] if word not in ("...", "--debug")], line.whole)
    except UserError as error:
        return [f"{error.message} ({error.hint})"]
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        return [error.format_message()]


def _faults(words: list[str], whole: bool) -> list[str]:
    command, verb = _command(), []
    context = command.context_class(command, info_name="casehard")
    while hasattr(command, "list_commands"):
        opened, words, _ = command.make_parser(context).parse_args(list(words))
        if not words:
            return [] if opened or not whole else [f"{' '.join(verb)}: no verb"]
        two = " ".join(words[:2]).replace("_", "-")
        name, words = (two, words[2:]) if two in getattr(command, "commands", {}) else (words[0], words[1:])
        found = command.get_command(context, name)
        if found is None:
            return [f"no verb {name!r}"]
        verb.append(found.name or name)
        command, context = found, found.context_class(found, info_name=name, parent=context)
    given, extra, _ = command.make_parser(context).parse_args(list(words))
    said = {_flag(p): given[p.name] for p in command.params if given.get(p.name) not in (None, (), [])}
    out = [f"unexpected argument {word!r}" for word in extra]
    for param in command.params:
        if param.required and whole and _flag(param) not in said:
            out.append(f"{param.opts[0]} is missing")
    if verb == ["defend"] and "method" not in said:
        return out
    return out + _settings_faults(" ".join(verb), said, whole)


def _flag(param: Any) -> str:
    """Return how a line names a parameter: an option without its dashes."""
    return str(param.opts[0]).lstrip("-")


def _file(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the settings of ``--config``; None where the file is the reader's."""
    if "config" not in given:
        return {}
    path = ROOT / str(given["config"])
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None


def _settings_faults(verb: str, given: Mapping[str, Any], whole: bool) -> list[str]:
    """Return which rows or folders a run would ask for, and what it would say of ``--set`` and of a file of ours."""
    file = _file(given)
    sets = [text for text in given.get("set", ()) if "..." not in text and "$" not in text]
    values = options.settings(None, sets, {})
    kind, _, name = verb.partition(" ")
    needs: tuple[str, ...] = NEEDS.get(verb, ())
    if verb == "defend":
        spec = DEFENCES.find(given["method"])
        needs = ("model", *spec.needs, *(() if spec.pipeline else ("data",)))
    elif kind == "attack" and verb not in NEEDS:
        needs = ("model", "suite", *ATTACKS.find(name).needs)
    if file is None:
        needs, file = (), {}
    have = {*given, *file, *values, *file.get("rows", {})}
    out = [f"--{need} is missing" for need in needs if whole and need not in have]
    _build(verb, given, {**file, **values})
    return out


def _build(verb: str, given: Mapping[str, Any], values: dict[str, Any]) -> None:
    """Make of the settings what the verb makes of them.

    Raises:
        UserError: what the verb would say.
    """
    from casehard.adversary.search import Search
    from casehard.cli.buffer import prepare_step
    from casehard.data.select import SelectConfig
    from casehard.defences.mb_defense.run import MbRun
    from casehard.evaluation.judges import JUDGES
    from casehard.maths.merge import MergeConfig
    from casehard.scan.run import Scan
    from casehard.steps import Attack, Evaluate, Finetune

    kind, _, name = verb.partition(" ")
    rows = {"rows": {"data": ["d"], "clean": ["c"], "harmful": ["h"], "refusals": ["r"], "benign": ["b"]}}
    model, suite = {"model": "m"}, {"suite": "s"}
    if verb == "defend":
        method = DEFENCES.name(given["method"])
        step = build(Finetune, {**model, "rows": {"data": ["d"]}, **values, "method": method}, where=verb)
        DEFENCES.find(method).configure(method, given.get("preset", step.preset), step.settings)
    elif verb == "defend mb-defense":
        build(MbRun, {**model, **rows, **values}, where=verb)
    elif verb == "attack search":
        build(Search, {**model, **suite, **values}, where=verb)
    elif kind == "attack":
        step = build(Attack, {**model, **suite, **values, "attack": ATTACKS.name(name)}, where=verb)
        known = [f.name for f in fields(ATTACKS.find(name).load()[1])]
        check_keys(step.config, known, where=f"{verb}: config")
    elif verb == "buffer prepare":
        prepare_step({**model, **rows, **values, "preset": given.get("preset", "default")})
    elif verb == "evaluate":
        build(Evaluate, {**model, **suite, **values}, where=verb)
    elif verb == "judge":
        judge = given.get("judge", "rule")
        if not judge.isupper():  # a word for the reader's own
            JUDGES.find(judge).configure(verb, "", values)
    elif kind == "merge":
        build(MergeConfig, values, where=verb)
    elif verb == "scan model":
        build(Scan, {**model, **suite, **values}, where=verb)
    elif verb == "select":
        build(SelectConfig, values, where=verb)
    elif verb == "bench" and (ROOT / given["plan"]).is_file():
        from casehard.benchmark.plan import load_plan

        load_plan(ROOT / given["plan"], given.get("set", ()))
