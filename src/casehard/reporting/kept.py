"""What a page of evidence needs of a benchmark's summary, small enough to lie beside the page."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import Any

from casehard.benchmark.records import NO_ATTACK
from casehard.errors import DataError
from casehard.reporting.markdown import at_headline, by_base
from casehard.reporting.page_data import View

ABSOLUTE = re.compile(r"(?<![\w./~])/[\w.~-]|(?<![A-Za-z])[A-Za-z]:\\")
"""The beginning of a path from the root of a machine; not ``and/or``, ``25 / 25`` or a web address."""
ATTACK = ("attack", "mode", "share", "steps", "lr", "settings")
COST = ("passes_ratio", "tokens_ratio", "ratio_to_sft", "workers")
RATE = ("metric", "k", "n", "rate", "low", "high", "rates", "shared", "unreliable")


def kept(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``markdown`` reads of a benchmark's summary: it makes the same page of it.

    Rows, nodes, telemetry and most records are left out, and so are the files that the plan names.

    Raises:
        DataError: a path from the root of a machine, or this machine's name, stands in what is left.
    """
    plan, found = summary["plan"], summary["provenance"]
    views = [View(summary, verdict["family"]) for verdict in summary["verdicts"]]
    asked = {NO_ATTACK, *(a["name"] for a in plan["attacks"] if a.get("suite"))}
    titles = {metric for view in views for metric in view.titles}
    apart = {(view.family, *place) for view in views for place in by_base(view)}
    out = {
        "kind": summary["kind"],
        "plan": {
            **_only(plan, ("name", "title", "headline", "gates", "reference", "seeds")),
            "bases": _each(plan["bases"], ("name", "family")),
            "defences": _each(plan["defences"], ("name", "title", "role")),
            "attacks": [
                {**_only(a, ("name", "title", *ATTACK)), "suite": PurePath(a.get("suite") or "").name}
                for a in plan["attacks"]
            ],
        },
        **_only(summary, ("occasion", "verdicts", "ends", "canaries", "canary_agreement", "not_tested", "public")),
        "breaks": _each(summary["breaks"], ("family", "defence", "attack", "metric", "runs", "median", "text")),
        "costs": _each(summary["costs"], ("family", "defence", *COST)),
        "differences": [d for d in summary["differences"] if at_headline(plan.get("headline") or {}, d)],
        "failed": _each(summary["failed"], ("label", "message")),
        "provenance": {
            **_only(found, ("code", "config_digest", "seeds")),
            "packages": _only(found["packages"], ("torch",)),
            "hardware": _only(found["hardware"], ("processor", "cores", "gpus")),
            # Two files may have one name; where they lay is nobody's business.
            "data": {f"{sha[:12]}/{PurePath(name).name}": sha for name, sha in found["data"].items()},
        },
        "pooled": _each(
            (p for p in summary["pooled"] if p["metric"] in titles and (p["steps"] > 0 or p["attack"] in asked)),
            ("family", "defence", "attack", "steps", *RATE),
        ),
        "records": _each(
            (r for r in summary["records"] if (r["family"], r["attack"], r["steps"], r["metric"]) in apart),
            ("family", "base", "defence", "attack", "steps", "seed", "metric", "rate"),
        ),
    }
    _private(out)
    return out


def kept_text(values: Mapping[str, Any]) -> str:
    """Return what ``kept`` returned as JSON with a line per entry, so that a change is a line of a diff."""
    parts = []
    for key, value in values.items():
        entries = value if isinstance(value, list) else []
        lines = ",\n".join(f"  {json.dumps(entry, ensure_ascii=True)}" for entry in entries)
        parts.append(f" {json.dumps(key)}: " + (f"[\n{lines}\n ]" if entries else json.dumps(value, ensure_ascii=True)))
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _only(entry: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: entry[key] for key in keys if key in entry}


def _each(entries: Iterable[Mapping[str, Any]], keys: Iterable[str]) -> list[dict[str, Any]]:
    keys = tuple(keys)
    return [_only(entry, keys) for entry in entries]


def _private(values: Mapping[str, Any]) -> None:
    """Refuse what tells where a run was made."""
    host = re.compile(rf"(?<![\w-]){re.escape(platform.node() or 'localhost')}(?![\w-])", re.I)
    for text in _texts(values):
        for what, pattern in (("a path of a machine", ABSOLUTE), ("this machine's name", host)):
            if pattern.search(text):
                raise DataError(
                    f"{what} stands in the summary: {text!r}", hint="take it out of the plan and run it again"
                )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from (str(key), *_texts(item))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
