"""Write docs/api.md from the docstrings of the public names: python docs/generate_api.py"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from pathlib import Path
from typing import Any

import casehard

PAGE = Path(__file__).with_name("api.md")
VERBS = ("load", "rows", "defend", "attack", "search", "evaluate", "audit", "save", "bench", "report", "recommend")
CATALOGUES = ("DEFENCES", "ATTACKS", "JUDGES")


def parameter(value: inspect.Parameter) -> str:
    """Return ``name: annotation = default``; annotations are texts here."""
    default = "" if value.default is inspect.Parameter.empty else f" = {value.default!r}"
    return f"{value.name}: {value.annotation}{default}"


def signature(name: str, value: Any) -> str:
    """Return ``name(...)`` with one parameter a line."""
    found = inspect.signature(value)
    lines, star = [], False
    for one in found.parameters.values():
        if one.kind is one.KEYWORD_ONLY and not star:
            lines.append("    *,")
            star = True
        lines.append(f"    {parameter(one)},")
    return "\n".join([f"{name}(", *lines, f") -> {found.return_annotation}"])


def fields(value: type) -> list[str]:
    """Return one bullet a field of a dataclass: name, default, and the docstring under it."""
    bases = [base for base in reversed(value.__mro__) if dataclasses.is_dataclass(base)]
    notes: dict[str, str] = {}
    current = ""
    for line in [line for base in bases for line in inspect.getsource(base).splitlines()]:
        stripped = line.strip()
        if line.startswith("    ") and not line.startswith("     ") and ":" in stripped and stripped[0].isalpha():
            current = stripped.split(":")[0]
        elif current and stripped.startswith('"""'):
            notes[current] = stripped.strip('"')
            current = "" if stripped.count('"""') == 2 else f"{current}+"
        elif current.endswith("+"):
            notes[current[:-1]] += " " + stripped.strip('"')
            current = "" if stripped.endswith('"""') else current
    out = []
    for field in dataclasses.fields(value):
        default = "" if field.default is dataclasses.MISSING else f" = {field.default!r}"
        out.append(f"- `{field.name}{default}`: {notes.get(field.name, '').strip() or 'see the class'}")
    return out


def section(name: str) -> list[str]:
    """Return the section of one public name."""
    value = getattr(casehard, name)
    doc = inspect.cleandoc(value.__doc__ or "")
    lines = [f"### `{name}`", ""]
    if inspect.isclass(value):
        lines += [doc.split("\n\n    Attributes")[0], ""]
        if dataclasses.is_dataclass(value):
            lines += [*fields(value), ""]
        return lines
    return [*lines, "```python", signature(name, value), "```", "", "```text", doc, "```", ""]


def page() -> str:
    """Return the whole page."""
    lines = ["# The Python API", "", "Generated from the docstrings by `python docs/generate_api.py`.", ""]
    lines += [f"`import casehard as ch` gives {len(casehard.__all__) - 1} names, all of them here.", ""]
    lines += ["```python", *inspect.cleandoc(sys.modules["casehard"].__doc__ or "").splitlines()[2:5], "```", ""]
    lines += ["## Verbs", ""]
    for name in VERBS:
        lines += section(name)
    lines += ["## Catalogues", "", "Mappings from name to spec; those of other packages are included.", ""]
    for name in CATALOGUES:
        found = getattr(casehard, name)
        lines += [f"### `{name}`", "", "| name | for | needs | takes |", "|---|---|---|---|"]
        for key, spec in found.ours.items():
            lines.append(f"| `{key}` | {spec.purpose} | {', '.join(spec.needs)} | {', '.join(spec.takes)} |")
        lines.append("")
    lines += ["## Nouns and settings", ""]
    for name in sorted(set(casehard.__all__) - {*VERBS, *CATALOGUES, "__version__"}):
        lines += section(name)
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
