"""What a verdict reads: pooled entries of one family by place, steps to break, and rates in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from casehard.benchmark.contrasts import LEAST
from casehard.benchmark.records import NO_ATTACK

TOO_WEAK = "attack too weak: no claim"
NO_DIFFERENCE = "made no difference"
SINGLE = "Single seed: the spread between runs is unknown."


class Table:
    """Look up pooled entries of one family."""

    def __init__(
        self, pooled: Sequence[Mapping[str, Any]], family: str, *, at: tuple[str, int] = (NO_ATTACK, 0)
    ) -> None:
        self.at = at
        """Attack and step at which a model is judged useful or not: before any attack, or after a customer's job."""
        own = [p for p in pooled if p["family"] == family]
        # An accuracy over fewer rows than a comparison may rest on tells nothing where there is the loss of all.
        losses = {(p["defence"], p["attack"], p["steps"]) for p in own if p["metric"] == "nll"}
        self._found = {
            (*place, p["metric"]): p
            for p in own
            if (place := (p["defence"], p["attack"], p["steps"])) not in losses
            or p["metric"] != "utility"
            or p["n"] >= LEAST
        }

    def get(self, defence: str, attack: str, step: int, metric: str) -> Mapping[str, Any] | None:
        """Return the pooled entry, or None where nothing was measured."""
        return self._found.get((defence, attack, step, metric))

    def before(self, defence: str, metric: str) -> Mapping[str, Any] | None:
        """Return the pooled entry of the model as it is judged: before any attack, or after the customer's job."""
        return self.get(defence, *self.at, metric)

    def curve(self, defence: str, attack: str, metric: str) -> list[Mapping[str, Any]]:
        """Return the pooled entries of one attack by step."""
        found = [p for (d, a, _, m), p in self._found.items() if (d, a, m) == (defence, attack, metric)]
        return sorted(found, key=lambda p: p["steps"])


def percent(value: float) -> str:
    """Write a share as a percentage; one decimal below 10."""
    scaled = value * 100
    return f"{scaled:.1f} %" if 0 < abs(scaled) < 10 else f"{scaled:.0f} %"


def percents(low: float, high: float) -> str:
    """Write a range of shares: ``1.2 to 15 %``."""
    return f"{percent(low).removesuffix(' %')} to {percent(high)}"


def rate_text(entry: Mapping[str, Any]) -> str:
    """Write a rate with what is known about its spread: the range of the runs, or one run's interval over prompts."""
    if len(entry["rates"]) > 1:
        span = f"runs {percents(min(entry['rates']), max(entry['rates']))}"
    else:
        span = f"95 % interval {percents(entry['low'], entry['high'])}"
        span += "" if entry["shared"] else ", single seed"
    if entry.get("unreliable"):
        span += f"; unreliable, {entry['unreliable']}"
    if entry["k"] is None:
        return f"{entry['rate']:.3f} ({entry['low']:.3f} to {entry['high']:.3f})"
    return f"{percent(entry['rate'])} ({entry['k']}/{entry['n']}, {span})"


def broken(
    breaks: Sequence[Mapping[str, Any]], family: str, defence: str, attack: str, metric: str
) -> Mapping[str, Any]:
    """Return when the runs of a defence break under an attack, by one metric."""
    for entry in breaks:
        if (entry["family"], entry["defence"], entry["attack"], entry["metric"]) == (family, defence, attack, metric):
            return entry
    return {"median": None, "text": "not measured", "last": 0, "runs": []}


def when(entry: Mapping[str, Any]) -> str:
    """Say when a model breaks: what :func:`broken` returned, in words."""
    text = str(entry["text"])
    return f"is broken {text}" if text.startswith(("not ",)) else f"breaks at step {text}"


def compared_to(name: str, found: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return status and first words where a comparison with the control shows no gain; None where it does.

    Args:
        name: title of the defence.
        found: what ``contrast`` returned; less is better.
    """
    if found["no_difference"]:
        low, high = found["low"] * 100, found["high"] * 100
        span = f"difference {found['difference'] * 100:+.1f} points, {low:+.1f} to {high:+.1f}"
        span += f"; only {found['changed']} prompts changed, too few for any claim" if found["changed"] < LEAST else ""
        return "no_difference", f"{name} {NO_DIFFERENCE} ({span})"
    if not found["seeds_agree"]:
        each = ", ".join(f"{d * 100:+.1f}" for d in found["per_seed"])
        return "disagree", f"The runs disagree about {name} ({each} points): on average"
    return ("worse", f"{name} makes it worse") if found["difference"] > 0 else None
