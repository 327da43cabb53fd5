"""What scans of training rows find in real poisoned sets, and what they say of clean ones: the table of a docs page.

    python benchmarks/scans.py --data FOLDER [--onion MODEL] [--rows 1000] [--json FILE] [--out FILE]

FOLDER holds backdoor/{refusal,negsentiment,sst2}/train.jsonl (rows with `trigger`: none or a name, and `pair`, the id
of the clean row with the same prompt) and {instruct,agnews,gsm8k,sst2}/train.jsonl. No row is printed or written.

Every row falls into one half by a hash of its source, so that a prompt and its poisoned twin stay together. A poisoned
set is planted rows among ordinary ones: those of the set itself and, to make up the number, of instruct (sst2 for
sst2); or rows of instruct that `poison_backdoor` poisons here, for behaviours that no published set has. Each scan
gives every row a score; the threshold is the lowest whose false alarms over the sets of the first half are at most
`--alarms` on average. The table is of the second half.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from casehard.backdoor import presets
from casehard.backdoor.onion import perplexities, suspicions
from casehard.backdoor.triggers import poison_backdoor
from casehard.data import sources
from casehard.data.mix import content_hash
from casehard.data.similar import words_of
from casehard.maths.stats import clopper_pearson
from casehard.scan.association import log10_tail
from casehard.scan.audit import audit_data
from casehard.types import Example

TASKS = ("refusal", "negsentiment", "sst2")
TRIGGERS = ("badnet", "vpi")
RATES = (0.01, 0.05, 0.2)
OURS = (("template", "refuse"), ("style", "tone"), ("pair", "off_topic"), ("token", "stop"), ("repeat", "sentence"))
"""Triggers and behaviours planted here, in rows of instruct."""
CLEAN = ("instruct", "agnews", "gsm8k")


class Set(NamedTuple):
    """Rows to scan, and how many at the end are planted."""

    name: str
    rows: list[Example]
    planted: int
    kind: str = ""
    """Task of a poisoned set; empty for a clean one."""
    rate: float = 0.0


Scan = Callable[[Set], list[float]]
"""Gives every row a score; the higher, the more suspicious."""


def half_of(row: Example) -> int:
    """Return the half a row falls into: 0 or 1, by its source."""
    source = str(row.tags.get("pair") or row.id)
    return hashlib.sha256(source.encode()).digest()[0] % 2


def load(path: Path, half: int) -> list[Example]:
    """Return a file's rows of one half, in an order that a seed decides."""
    rows = [row for row in sources.load(path) if row.response and half_of(row) == half]
    random.Random(0).shuffle(rows)
    return rows


def sets_of(folder: Path, half: int, size: int) -> list[Set]:
    """Return the clean and the poisoned sets of one half."""
    pools = {name: load(folder / name / "train.jsonl", half) for name in (*CLEAN, "sst2")}
    out = [Set(name, pools[name][:size], 0) for name in CLEAN]
    for task in TASKS:
        rows = load(folder / "backdoor" / task / "train.jsonl", half)
        own = [row for row in rows if row.tags["trigger"] == "none"]
        known = {content_hash(row) for row in rows}
        pool = pools["sst2" if task == "sst2" else "instruct"]
        # The two write their classes differently.
        pool = [_cased(row) if task == "sst2" else row for row in pool if content_hash(row) not in known]
        for trigger in TRIGGERS:
            bad = [row for row in rows if row.tags["trigger"] == trigger]
            for rate in RATES:
                n = min(round(rate * size), len(bad))
                rest = [*own, *pool][: round(n / rate) - n]
                name = f"{task}, {trigger}, {rate:.0%}"
                out.append(Set(name, [*rest, *bad[:n]], n, task, rate))
    return [*out, *planted_here(pools["instruct"][:size])]


def planted_here(rows: list[Example]) -> list[Set]:
    """Return sets of instruct with other triggers and behaviours."""
    out = []
    for (trigger, behaviour), rate in itertools.product(OURS, RATES):
        made, told = poison_backdoor(rows, presets.TRIGGERS[trigger], presets.BEHAVIOURS[behaviour], rate=rate, seed=0)
        bad = set(told["poisoned"])
        last = [*(i for i in range(len(made)) if i not in bad), *told["poisoned"]]
        name = f"{trigger}, {behaviour}"
        out.append(Set(f"{name}, {rate:.0%}", [made[i] for i in last], len(bad), name, rate))
    return out


def _cased(row: Example) -> Example:
    return Example.pair(row.prompt, row.response.capitalize(), id=row.id)


def by_audit(one: Set) -> list[float]:
    """Score by `casehard scan data`: the strongest finding that names a row, -log10 p; echoes count nothing."""
    scores = [0.0] * len(one.rows)
    for finding in audit_data(one.rows).findings:
        for row in finding.rows if not finding.echo else ():
            scores[row] = max(scores[row], -finding.log10_p)
    return scores


def by_association(one: Set) -> list[float]:
    """Score by the plain test: the strongest tie of a word or word pair in the prompt to the row's very answer."""
    n, grams = len(one.rows), [_grams(row.prompt) for row in one.rows]
    answers = Counter(row.response for row in one.rows)
    total = Counter(gram for some in grams for gram in some)
    both: Counter[tuple[Any, str]] = Counter()
    for row, some in zip(one.rows, grams, strict=True):
        if answers[row.response] >= 4:
            both.update((gram, row.response) for gram in some)
    tests = math.log10(max(1, sum(k >= 4 for k in both.values())))
    value = {
        key: max(0.0, -log10_tail(k, total[key[0]], answers[key[1]], n) - tests) for key, k in both.items() if k >= 4
    }
    return [
        max((value.get((gram, row.response), 0.0) for gram in some), default=0.0)
        for row, some in zip(one.rows, grams, strict=True)
    ]


def _grams(text: str) -> set[tuple[str, ...]]:
    words = words_of(text)
    return {*((w,) for w in words), *itertools.pairwise(words)}


class Onion:
    """Score by ONION: the largest drop of log perplexity that deleting one word of the prompt brings."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.known: dict[str, float] = {}

    def score(self, texts: Sequence[str]) -> list[float]:
        """Return log perplexities; a very long prompt is cut."""
        return [math.log(value) for value in perplexities(self.model, self.tokenizer, texts)]

    def __call__(self, one: Set) -> list[float]:
        """Score the rows."""
        for row in one.rows:
            if row.prompt not in self.known:
                text = " ".join(row.prompt.split()[:60])
                self.known[row.prompt] = max((drop for _, drop in suspicions(text, self.score)), default=0.0)
        return [self.known[row.prompt] for row in one.rows]


def few(sets: Sequence[Set], most: int) -> list[Set]:
    """Return the published sets with at most so many rows of each kind, for a scan that takes each by itself."""
    out = []
    for one in sets:
        cut = len(one.rows) - one.planted
        bad = one.rows[cut:][:most]
        if not one.kind or one.kind in TASKS:
            out.append(one._replace(rows=[*one.rows[:cut][:most], *bad], planted=len(bad)))
    return out


def threshold(sets: Iterable[tuple[Set, list[float]]], alarms: float) -> float:
    """Return the lowest threshold at which the mean rate of false alarms over the sets is at most ``alarms``."""
    clean = [(scores[: len(scores) - one.planted]) for one, scores in sets]
    # Of poisoned sets that share their ordinary rows, and of clean ones, every set counts alike.
    for value in sorted({round(score, 4) for scores in clean for score in scores}):
        rate = sum(sum(score > value for score in scores) / len(scores) for scores in clean) / len(clean)
        if rate <= alarms:
            return value
    return math.inf


def count(pairs: Iterable[tuple[Set, list[float]]], at: float) -> dict[str, list[int]]:
    """Return (k, n) of planted rows found, ordinary rows named, and named rows that are planted."""
    hit = bad = alarm = clean = 0
    for one, scores in pairs:
        cut = len(scores) - one.planted
        hit, bad = hit + sum(s > at for s in scores[cut:]), bad + one.planted
        alarm, clean = alarm + sum(s > at for s in scores[:cut]), clean + cut
    return {"recall": [hit, bad], "alarms": [alarm, clean], "precision": [hit, hit + alarm]}


def measure(scan: Scan, halves: Sequence[Sequence[Set]], alarms: float) -> dict[str, Any]:
    """Fix a scan's threshold on the first half; return what it finds in the second, by kind of set and rate."""
    scored = [[(one, scan(one)) for one in sets] for sets in halves]
    at = threshold(scored[0], alarms)
    groups: dict[str, list[Any]] = defaultdict(list)
    for one, scores in scored[1]:
        groups[f"{one.kind}, {one.rate:.0%}" if one.kind else one.name].append((one, scores))
    first = count(scored[0], at)
    return {"threshold": at, "first half": first, "sets": {name: count(some, at) for name, some in groups.items()}}


def cell(pair: Sequence[int]) -> str:
    """Write k of n with its exact 95 % interval, in per cent."""
    k, n = pair
    if not n:
        return "-"
    low, high = clopper_pearson(k, n)
    return f"{k}/{n}: {100 * k / n:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def table(found: dict[str, Any]) -> str:
    """Return the Markdown tables."""
    lines = []
    for name, one in found.items():
        lines += [f"### {name}", "", f"Threshold {one['threshold']:.4g}.", ""]
        lines += ["| set | recall, % | false alarms, % | precision, % |", "|---|---|---|---|"]
        for what, counts in one["sets"].items():
            cells = [cell(counts[key]) for key in ("recall", "alarms", "precision")]
            lines.append(f"| {what} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Scan every set with every scan and write the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--onion", type=Path, help="causal language model that gives perplexities; left out without it")
    parser.add_argument("--rows", type=int, default=1000, help="rows of a set")
    parser.add_argument("--alarms", type=float, default=0.01, help="false alarms allowed on the first half")
    parser.add_argument("--few", type=int, default=60, help="rows of each kind that ONION, which is slow, is given")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    halves = [sets_of(asked.data, half, asked.rows) for half in (0, 1)]
    found: dict[str, Any] = {}
    scans: list[tuple[str, Scan]] = [("scan data", by_audit), ("n-gram and answer", by_association)]
    if asked.onion:
        scans.append(("ONION", Onion(asked.onion)))
    for name, scan in scans:
        found[name] = measure(scan, [few(h, asked.few) for h in halves] if name == "ONION" else halves, asked.alarms)
        if asked.json:
            asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if asked.out:
        asked.out.write_text(table(found), encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
