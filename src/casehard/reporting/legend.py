"""What each row of a report is: its colour, role, method and settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from casehard.reporting.figures import Look


def flow(values: Mapping[str, Any]) -> str:
    """Write settings on one line, as YAML would."""
    import yaml

    return yaml.safe_dump(dict(values), default_flow_style=True, width=10**6).strip()[1:-1]


def legend(looks: Mapping[str, Look], defences: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return what each row of the table is: its colour, title, role and method."""
    roles = {
        "undefended": "control: undefended",
        "unattacked": "control: never attacked",
        "same_passes": "control: plain training, same passes",
        "ablation": "ablation",
        "baseline": "baseline: another method",
        "defence": "defence",
    }
    return [
        {
            "colour": looks[d["name"]].colour,
            "title": d["title"],
            "role": roles[d["role"]],
            "method": " ".join(filter(None, (d.get("method") or "", d.get("preset") or ""))),
            "settings": flow(d.get("settings") or {}),
            "train": flow(d.get("train") or {}),
        }
        for d in defences
    ]
