"""Paired differences between a defence and its controls: same prompts, same runs, one interval each.

A *run* is one (base, seed). Both what other prompts and what other runs would have given is uncertain, so the interval
covers a bootstrap over prompts and a t-interval over the runs' differences. The first alone takes the runs for all
there are: where training noise alone moves a run, it finds a difference in half the comparisons of equals. And where
few prompts changed a bootstrap has nothing to draw from: there the exact interval behind McNemar's test is added.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, TypedDict

from casehard.benchmark.entries import CURVE_METRICS
from casehard.benchmark.plan import Plan
from casehard.benchmark.records import NO_ATTACK, Measured, Point
from casehard.evaluation.metrics import find
from casehard.maths.stats import clopper_pearson, made_no_difference, mcnemar, paired_bootstrap, t_quantile

DRAWS = 1000
"""Resamples per difference; a plan asks for dozens of them."""
LEAST = 6
"""Fewest prompts that must have changed for any claim: of five, all one way, the exact test still says p = .0625."""


class Place(TypedDict):
    """Where a comparison is made; ``step`` None means over the whole curve."""

    attack: str
    metric: str
    family: str
    step: int | None


Outcomes = dict[tuple[str, str, int], float]
"""(base, prompt id, seed) -> outcome 0 or 1, or its mean over several steps."""


def outcomes(
    points: Mapping[Point, Measured], *, defence: str, attack: str, metric: str, family: str, step: int | None
) -> Outcomes:
    """Return the outcome of every prompt; with ``step`` None its mean over all steps after 0."""
    found: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    for point, (_, rows) in points.items():
        if (point.defence, point.attack, point.family) != (defence, attack, family):
            continue
        if point.step != step if step is not None else point.step == 0:
            continue
        for row in rows:
            value = find(metric, triggered="triggered" in row).outcome(row)
            if value is not None:
                # A prompt with the trigger in it is compared with the same prompt of another model.
                found[point.base, str(row.get("pair", row["id"])), point.seed].append(float(value))
    return {key: statistics.fmean(values) for key, values in found.items()}


def over_attacks(points: Mapping[Point, Measured], plan: Plan, attacks: Sequence[str], **place: str) -> Outcomes:
    """Return the mean outcome at the end of several attacks, of every prompt and run that all of them measured."""
    ends = [outcomes(points, attack=name, step=plan.attack(name).steps, **place) for name in attacks]
    # A prompt that one backdoor's trigger rules out is left out of all.
    shared = set.intersection(*(set(found) for found in ends)) if ends else set()
    return {key: statistics.fmean(found[key] for found in ends) for key in shared}


def contrast(mine: Outcomes, other: Outcomes) -> dict[str, Any] | None:
    """Compare two sets of outcomes prompt by prompt: mean(mine) - mean(other).

    The interval resamples prompts, each with all its runs, so that asking one prompt in three runs does not count as
    three prompts, and is widened to the t-interval over runs. A single run has no second part: its interval says what
    other prompts would give of these two models, and nothing about training them again. For yes/no outcomes of a single
    run, and wherever fewer than ``LEAST`` prompts changed, it is widened to the exact interval too, so that it contains
    0 whenever the exact McNemar test is not below .05.

    Returns:
        Beside the interval: ``changed``, the prompts that count for the test; ``per_seed``, the difference of every run
        that both have; ``rates``, what (mine, other) are in those runs; None without a shared prompt.
    """
    shared = sorted(mine.keys() & other.keys())
    if not shared:
        return None
    by_prompt: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    by_seed: dict[tuple[str, int], list[float]] = defaultdict(list)
    for key in shared:
        by_prompt[key[:2]].append((other[key], mine[key]))
        by_seed[key[0], key[2]].append(mine[key] - other[key])
    a = [statistics.fmean(pair[0] for pair in pairs) for pairs in by_prompt.values()]
    b = [statistics.fmean(pair[1] for pair in pairs) for pairs in by_prompt.values()]
    found = paired_bootstrap(a, b, draws=DRAWS)
    per_seed = [statistics.fmean(values) for values in by_seed.values()]
    low, high = over_runs(per_seed)
    low, high = min(found.low, low), max(found.high, high)
    moved = [y - x for x, y in zip(a, b, strict=True) if abs(y - x) > 1e-12]
    binary = len(by_seed) == 1 and all(v in (0.0, 1.0) for key in shared for v in (mine[key], other[key]))
    if binary or len(moved) < LEAST:
        near, far = _exact(moved, found.n)
        low, high = min(low, near), max(high, far)
    out: dict[str, Any] = {
        "difference": found.mean,
        "low": low,
        "high": high,
        "prompts": found.n,
        "changed": len(moved),
        "unpaired": len(mine.keys() ^ other.keys()),
        "per_seed": per_seed,
        "rates": [statistics.fmean(b), statistics.fmean(a)],
        "seeds_agree": all(d > 0 for d in per_seed) or all(d < 0 for d in per_seed),
        "no_difference": made_no_difference(low, high),
    }
    if binary:
        more = sum(mine[k] > other[k] for k in shared)
        less = sum(mine[k] < other[k] for k in shared)
        out |= {"more": more, "less": less, "mcnemar_p": mcnemar(more, less)}
    out["text"] = _text(out)
    return out


def _exact(moved: Sequence[float], prompts: int) -> tuple[float, float]:
    """Return the exact interval of a mean difference, given which prompts changed and by how much.

    With p the chance that a changed prompt rises, in its exact binomial interval: sum |d| / n * (2 p - 1). For yes/no
    outcomes it contains 0 exactly where the two-sided exact McNemar test has p >= .05.

    Args:
        moved: differences of the prompts that changed, none 0.
        prompts: all of them, n.
    """
    if not moved:
        return 0.0, 0.0
    rises = clopper_pearson(sum(d > 0 for d in moved), len(moved))
    size = sum(abs(d) for d in moved) / prompts
    return size * (2 * rises.low - 1), size * (2 * rises.high - 1)


def over_runs(differences: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % t-interval of the mean difference over runs, within -1 to 1; the difference itself for one run.

    Two runs give an interval of 12.7 standard errors: nearly everything is then "no difference", as it should be.
    """
    n, mean = len(differences), statistics.fmean(differences)
    half = t_quantile(0.95, n - 1) * statistics.stdev(differences) / math.sqrt(n) if n > 1 else 0.0
    return max(-1.0, mean - half), min(1.0, mean + half)


def _text(found: Mapping[str, Any]) -> str:
    if found["no_difference"]:
        return "made no difference"
    way = "less" if found["difference"] < 0 else "more"
    doubt = "" if found["seeds_agree"] else "; the runs disagree"
    return f"{abs(found['difference']) * 100:.1f} points {way}{doubt}"


def make_differences(plan: Plan, points: Mapping[Point, Measured]) -> list[dict[str, Any]]:
    """Compare defences with their controls: the whole curve, the headline step, and the model before any attack."""
    asked = _asked(plan)
    out = []
    for family in dict.fromkeys(point.family for point in points):
        for (mine, other), (attack, metric, step) in product(_pairs(plan), asked):
            place: Place = {"attack": attack, "metric": metric, "family": family, "step": step}
            found = contrast(outcomes(points, defence=mine, **place), outcomes(points, defence=other, **place))
            if found is not None:
                over = "curve" if step is None else "step"
                out.append({"defence": mine, "against": other, **place, "over": over, **found})
    return out


def _asked(plan: Plan) -> list[tuple[str, str, int | None]]:
    """Return where defences are compared: (attack, metric, step), step None over the whole curve."""
    head = plan.headline
    if plan.plants:
        return [(attack.name, metric, attack.steps) for attack in plan.attacks for metric in ("asr", "cacc", "aacc")]
    useful = ("over_refusal", "twin_knowledge", "utility")
    asked: list[tuple[str, str, int | None]] = [(NO_ATTACK, metric, 0) for metric in useful]
    if plan.ends:
        asked = [(attack.name, metric, attack.steps) for attack in plan.attacks for metric in useful]
    for attack in plan.attacks:
        # Inside a job only its end is the same thing for every method.
        asked += [(attack.name, m, attack.steps if plan.ends else None) for m in CURVE_METRICS]
        # With harmful rows only there is no user task to learn.
        asked += [(attack.name, "fine_tunability", attack.steps)] if attack.share < 1 else []
    return asked + [(head.attack, m, head.step) for m in CURVE_METRICS if (head.attack, m, head.step) not in asked]


def _pairs(plan: Plan) -> list[tuple[str, str]]:
    """Return which rows are compared: (defence, control)."""
    head = plan.headline
    if plan.plants:
        pairs = [(row.name, head.against) for row in plan.defences if row.name != head.against]
        pairs += [(head.defence, head.without)] if head.without not in ("", head.against) else []
        return [*pairs, (head.defence, plan.unattacked.name)]
    controls = [d for d in plan.defences if d.role != "defence"]
    read_beside = {head.against, plan.undefended.name}
    if head.against not in [c.name for c in controls]:
        controls.append(plan.defence(head.against))
    claimed = [row for row in plan.defences if row.role in ("defence", "ablation") or row.name == head.defence]
    return [
        (row.name, control.name)
        for row, control in product(claimed, controls)
        # An ablation is read beside the claim; against every other row it would be a table of tables.
        if control.name != row.name
        and (row.role == "defence" or row.name == head.defence or control.name in read_beside)
    ]
