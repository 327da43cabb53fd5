"""The page of ``casehard backdoor audit``: one self-contained file that a person understands."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from casehard.reporting.page import made_with, template

LIMITS = (
    "Rows: triggers in fewer than four rows, or whose answers have nothing in common, and style or meaning alone.",
    "Model: triggers of several words that the rows do not give away, positions, what only a quantised model shows.",
    "Whether the model is safe in any other way.",
)


def render_audit(found: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        found: the summary of the audit.
        run: record of the run folder.
    """
    made = [*made_with(run), ("seed", str(run["seeds"][0])), ("config digest", run["config_digest"])]
    made += [(f"data: {name}", digest) for name, digest in run["data"].items()]
    html: str = template("backdoor.html.j2").render(
        found=found,
        after=found.get("after"),
        asked=run["config"],
        tried=sum(f["source"] == "rows" for f in found["tried"]),
        limits=LIMITS,
        provenance=made,
    )
    return re.sub(r"(?<=\d) (?=%)", "\u00a0", html)
