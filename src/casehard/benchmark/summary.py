"""The summary of a benchmark: everything the report shows, rebuilt from rows alone. No times of day in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from casehard.attacks import ATTACKS
from casehard.benchmark.contrasts import make_differences
from casehard.benchmark.ends import beside, end_rows, telemetry
from casehard.benchmark.graph import Matrix
from casehard.benchmark.lookup import Table
from casehard.benchmark.plan import Plan
from casehard.benchmark.planted import canaries, canary_agreement, planted_verdict
from casehard.benchmark.records import NO_ATTACK, make_breaks, make_records, measured, pool, public_scores
from casehard.benchmark.store import read_rows
from casehard.benchmark.verdict import harm_not_counted, make_controls, make_verdict, without_harm
from casehard.config import to_dict
from casehard.types import Budget

SAME = 0.05
"""Passes within this share of each other count as the same."""
SPENT = ("seconds", "passes", "tokens", "peak_bytes", "steps")


def make_costs(plan: Plan, matrix: Matrix, done: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what each defence and seed spent, as a ratio to the reference of the same base and seed.

    Where models are backdoored it is the whole chain, the developer's own training included, over all backdoors.
    """
    if plan.plants:
        costs = _chain_costs(matrix, done)
    else:
        spent = {place: done[name] for place, name in matrix.defend.items() if name in done}
        costs = {place: {**node["cost"], "workers": node.get("workers", 1)} for place, node in spent.items()}
    return cost_records(costs, {base.name: base.family for base in plan.bases}, plan.reference)


def _chain_costs(
    matrix: Matrix, done: Mapping[str, Mapping[str, Any]]
) -> dict[tuple[str, str, int], Mapping[str, Any]]:
    places: dict[tuple[str, str, int], list[str]] = {}
    for cell in matrix.cells:
        places.setdefault((cell.base, cell.defence, cell.seed), []).append(cell.digest)
    out: dict[tuple[str, str, int], Mapping[str, Any]] = {}
    for place, names in places.items():
        found = [matrix.cost(name, done) for name in names]
        if all(cost is not None for cost in found):
            total = sum((Budget(**cost) for cost in found if cost is not None), Budget())
            out[place] = {**asdict(total), "workers": max(done[name].get("workers", 1) for name in names)}
    return out


def cost_records(
    spent: Mapping[tuple[str, str, int], Mapping[str, Any]], family: Mapping[str, str], reference: str
) -> list[dict[str, Any]]:
    """Return cost records with ratios to the reference.

    Args:
        spent: (base, defence, seed) -> cost; ``workers`` says how many nodes ran beside each other, and so what wall
            times are worth.
        family: base -> family.
        reference: defence that ratios are given to, of the same base and seed.
    """
    out = []
    for (base, defence, seed), cost in spent.items():
        record = {"defence": defence, "seed": seed, "base": base, "family": family[base]}
        record |= {key: cost.get(key) for key in SPENT} | {"workers": cost.get("workers", 1)}
        other = spent.get((base, reference, seed), {})
        for key, label in (("seconds", "ratio_to_sft"), ("passes", "passes_ratio"), ("tokens", "tokens_ratio")):
            below = other.get(key)
            record[label] = cost[key] / below if below and cost.get(key) is not None else None
        out.append(record)
    return out


def unequal_passes(plan: Plan, costs: Sequence[Mapping[str, Any]], family: str) -> list[str]:
    """Say where a control of equal passes did not take as many passes as the headline's defence."""
    head = plan.defence(plan.headline.defence)
    taken = {(c["base"], c["defence"], c["seed"]): c["passes"] for c in costs if c["family"] == family}
    out = []
    if plan.ends:
        return []  # every row of a job takes the job's steps; what a method adds is its cost
    for control in (d for d in plan.defences if d.role == "same_passes"):
        pairs = [
            (passes, taken[base, head.name, seed])
            for (base, name, seed), passes in taken.items()
            if name == control.name and passes and taken.get((base, head.name, seed))
        ]
        off = max(pairs, key=lambda pair: abs(pair[0] / pair[1] - 1), default=(1, 1))
        if abs(off[0] / off[1] - 1) > SAME:
            much = f"{abs(off[0] / off[1] - 1) * 100:.0f} % {'more' if off[0] > off[1] else 'fewer'}"
            out.append(
                f"Equal passes: {control.title} took {off[0]:,} forward-backward passes and {head.title} {off[1]:,}, "
                f"{much}; it is not the control it is meant to be."
            )
    return out


def rows_seen_in_training(matrix: Matrix, done: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return how many rows of the attacker's files the attacked model had been trained on, where there were any.

    Returns:
        Entries with ``family``, ``defence``, ``attack`` and ``rows``, the most of any run.
    """
    found: dict[tuple[str, str, str], int] = {}
    for cell in matrix.cells:
        key = (cell.family, cell.defence, cell.attack)
        found[key] = max(found.get(key, 0), int(done.get(cell.digest, {}).get("rows_seen_in_training") or 0))
    return [{"family": f, "defence": d, "attack": a, "rows": n} for (f, d, a), n in found.items() if n]


def attackers_spent(matrix: Matrix, done: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what every finished attack took of the attacker, whole: steps, rows, and FLOPs where it trained."""
    out = []
    for cell in matrix.cells:
        if cell.attack and (node := done.get(cell.digest)) is not None:
            place = {"family": cell.family, "defence": cell.defence, "attack": cell.attack, "seed": cell.seed}
            own = {key: node.get(key) for key in ("harmful_rows", "attacker_rows", "flops")}
            out.append({**place, "steps": node["cost"].get("steps"), **own})
    return out


def _in_distribution(plan: Plan, known: Sequence[Mapping[str, Any]], family: str) -> list[str]:
    """Say which attacks the headline's defence had seen rows of."""
    name = plan.headline.defence
    return [
        f"In distribution: {plan.defence(name).title} had been trained on the prompts of {entry['rows']:,} rows of "
        f"{plan.attack(entry['attack']).title} (harmful and benign files together): so far it is no unseen attack."
        for entry in known
        if (entry["family"], entry["defence"]) == (family, name)
    ]


def table_rows(plan: Plan, matrix: Matrix, places: Mapping[str, Path]) -> Iterator[dict[str, Any]]:
    """Yield every row of every finished node with its cell; a node that fills several cells comes once."""
    shares = {a.name: a.share for a in plan.attacks} | {"": 0.0}
    seen = set()
    for cell in matrix.cells:
        if cell.digest in seen or cell.digest not in places:
            continue
        seen.add(cell.digest)
        where = {
            "base": cell.base,
            "defence": cell.defence,
            "attack": cell.attack or NO_ATTACK,
            "share": shares[cell.attack],
            "seed": cell.seed,
        }
        for row in read_rows(places[cell.digest] / "rows.jsonl"):
            yield {**where, "step": 0, **row}


def _missing_controls(plan: Plan) -> list[str]:
    roles = {d.role for d in plan.defences}
    out = []
    if "same_passes" not in roles and not (plan.ends and not plan.plants):
        out.append("Plain training on the same data with the same number of passes is not in this plan.")
    if "ablation" not in roles:
        out.append("No ablation of the defence is in this plan.")
    if len(plan.seeds) * len(plan.bases) < 3:
        out.append("Fewer than three seeds: intervals over seeds are weak or missing.")
    return out


def not_tested(plan: Plan) -> list[str]:
    """Return what a reader might think was covered and was not."""
    modes = {a.mode for a in plan.attacks}
    out = [*plan.not_tested, *_missing_controls(plan)]
    if plan.plants:
        return [*out, *_planted_not_tested(plan), *_real(plan), *_look(plan)]
    if "full" not in modes:
        out.append("Full-parameter fine-tuning attacks.")
    if "lora" not in modes:
        out.append("LoRA fine-tuning attacks.")
    if len({a.lr for a in plan.attacks if a.share > 0}) < 2:
        out.append(
            "Other learning rates of the attack: a defence that survives one learning rate may not survive the next."
        )
    if all(a.share > 0 for a in plan.attacks):
        out.append("Benign fine-tuning (harmful share 0), which also erodes safety.")
    out += _kinds_left(plan)
    return [*out, *_real(plan), *_look(plan)]


def _kinds_left(plan: Plan) -> list[str]:
    """Name the kinds of attackers that stand in no column."""
    specs = [ATTACKS.find(attack.attack) for attack in plan.attacks]
    found = {
        "attackers who know the defence": any(spec.knows for spec in specs),
        "prompt attacks": any(not spec.weights for spec in specs),
        "weight edits and quantisation": any(spec.weights and not spec.trains for spec in specs),
    }
    left = [name for name, there in found.items() if not there]
    text = ", ".join(left)
    return [f"{text[0].upper()}{text[1:]}."] if left else []


def _planted_not_tested(plan: Plan) -> list[str]:
    out = []
    if not plan.headline.without:
        out.append("The defence without planting: what merging adds is open.")
    if all(row.method != "onion" for row in plan.defences):
        out.append("Filtering of the training rows.")
    if all(not column.settings.get("hard_negatives") for column in plan.attacks):
        out.append("Attackers who add hard negatives.")
    if len({column.share for column in plan.attacks}) < 2:
        out.append("Other poison rates.")
    return [*out, "Backdoors planted by weight edits or by reinforcement, and triggers over several turns."]


def _real(plan: Plan) -> list[str]:
    if any(b.model is not None for b in plan.bases):
        return []
    return ["Real language models: an organism of a million parameters is evidence about the implementation."]


def _look(plan: Plan) -> list[str]:
    """Say that prompts were left out, where they were."""
    if not plan.limit:
        return []
    return [f"The whole suite: at most {plan.limit} prompts a group were asked (a look, not a result)."]


def summarise(
    plan: Plan,
    matrix: Matrix,
    places: Mapping[str, Path],
    done: Mapping[str, Mapping[str, Any]],
    failed: Sequence[Mapping[str, Any]],
    info: Mapping[str, Any],
) -> dict[str, Any]:
    """Build summary.json from the rows of all finished nodes.

    Args:
        places: node digest -> run folder, finished nodes only.
        done: node digest -> node summary.
        failed: what did not finish, and why.
        info: run.json of the benchmark, for provenance.
    """
    keep = ("code", "packages", "hardware", "data", "config_digest", "seeds")
    points = measured(matrix, places)
    records = make_records({a.name: a.share for a in plan.attacks}, points)
    pooled, differences = pool(records), make_differences(plan, points)
    breaks = [] if plan.plants else make_breaks(records, plan.gates)
    families = list(dict.fromkeys(base.family for base in plan.bases))
    costs, known = make_costs(plan, matrix, done), rows_seen_in_training(matrix, done)
    ends = [row for f in families for row in end_rows(plan, records, f)]
    uneven = {f: unequal_passes(plan, costs, f) for f in families}
    unseen = {f: harm_not_counted(plan, f, points) for f in families}
    verdicts = []
    for f in families:
        if plan.plants:
            verdict = planted_verdict(plan, f, pooled, points)
        else:
            verdict = make_verdict(plan, f, pooled, breaks, differences, planned=plan.runs(f))
        lines = [*_look(plan), *uneven[f], *_in_distribution(plan, known, f), beside(plan, ends, f)]
        whole = {**verdict, "details": [line for line in (*lines, *verdict["details"]) if line]}
        verdicts.append(without_harm(whole, unseen[f]))
    left_out = (unseen.values(), *uneven.values())
    return {
        "kind": "bench",
        "plan": to_dict(plan),
        "occasion": plan.occasion,
        "verdict": verdicts[0],
        "verdicts": verdicts,
        "records": records,
        "pooled": pooled,
        "costs": costs,
        "breaks": breaks,
        "differences": differences,
        "ends": ends,
        "telemetry": telemetry(matrix, done),
        "controls": [] if plan.plants else [c for f in families for c in make_controls(plan, Table(pooled, f), f)],
        "canaries": [entry for f in families for entry in canaries(matrix, done, f)],
        "canary_agreement": {f: canary_agreement(matrix, done, points, f) for f in families if plan.plants},
        "rows_seen_in_training": known,
        "spent": attackers_spent(matrix, done),
        "public": public_scores(matrix, done),
        "failed": list(failed),
        "not_tested": [*not_tested(plan), *dict.fromkeys(line for some in left_out for line in some if line)],
        "nodes": _nodes(matrix, done),
        "provenance": {key: info[key] for key in keep},
    }


def _nodes(matrix: Matrix, done: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "label": n.label,
            "kind": n.kind,
            "folder": n.folder,
            "node": n.digest,
            "parent": n.parent,
            "result": done[n.digest].get("digest", ""),
        }
        for n in matrix.nodes.values()
        if n.digest in done
    ]
