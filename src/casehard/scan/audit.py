"""Audit a training set for planted behaviour: answers that recur, and words in the prompts that are tied to them.

1. Group answers: near-duplicates; same first words; same last words; cut short; refusals in any words.
2. For each group, count in how many of its prompts, and of all prompts, each n-gram (and each pair of words) occurs.
3. Report the n-grams whose prompts nearly all belong to the group, far more often than chance allows.

A finding is something for a person to look at, not a verdict: a question asked in many rows has its answer tied to it
too. What speaks for a trigger is that it sits in otherwise unlike prompts (``spread``) and, where answers are classes,
in prompts whose other words say another class (``explained``).
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any, NamedTuple

from casehard.backdoor.triggers import Trigger
from casehard.data.phrases import cut
from casehard.data.similar import near_duplicates, words_of
from casehard.errors import DataError
from casehard.evaluation.judges.rules import label_response
from casehard.limits import Coefficient, Count, Limited, Portion, Several
from casehard.maths.stats import clopper_pearson
from casehard.scan.association import expected_distinct, log10_tail, log_odds
from casehard.scan.classes import Classes, classes_of
from casehard.types import Example

Gram = tuple[str, ...]
KINDS = ("same", "refuses", "opens", "closes", "short")
"""Ways in which answers are alike."""
PAIR = "\0"
"""First element of a gram that is a pair of words apart from each other."""
COMMON = frozenset(".,;:!?'\"()-")
"""Punctuation of ordinary prompts, which alone is no trigger to look for."""


@dataclass(frozen=True, kw_only=True)
class AuditConfig(Limited):
    """Settings of an audit."""

    longest: Count = 5
    """Words of the longest n-gram."""
    least: Several = 4
    """Rows a group, and an n-gram in it, must have."""
    purity: Portion = 0.8
    """Share of an n-gram's prompts that must be in the group, or else of the group's prompts that must have it (a
    behaviour with several wordings makes several groups)."""
    alpha: Portion = 1e-3
    """Level of the exact test after Bonferroni correction for every n-gram tested in any group."""
    effect: Coefficient = 3.0
    """Least log odds ratio: 3 means odds twentyfold."""
    spread: Portion = 0.7
    """Different words that must be left once the n-gram is cut out, as a share of those of as many random prompts."""
    explained: Portion = 0.7
    """Where answers are a few classes: most of a finding's rows whose other words may tell their class."""
    similar: Portion = 0.7
    """Jaccard similarity of word pairs from which two answers are near-duplicates."""
    edge: Count = 3
    """First or last words that make a group."""
    words: Several = 400
    """Words of a row before its answer that are looked at, of a longer one half of them at each end."""


@dataclass(frozen=True)
class Group:
    """Rows whose answers are alike."""

    kind: str
    """One of KINDS."""
    text: str
    """What they share: an answer, its first or last words, or a description."""
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Finding:
    """Words in the prompt that are tied to a group of answers."""

    phrase: tuple[str, ...]
    """One phrase, or two words that occur together."""
    group: str
    """Kind of the group."""
    text: str
    """What the group's answers share."""
    both: int
    """Rows with the phrase whose answers are in the group."""
    phrase_rows: int
    group_rows: int
    rows_total: int
    spread: float
    """How unlike these prompts are once the phrase is cut out: 1 = as random prompts, near 0 = one question."""
    purity: float
    """both / phrase_rows."""
    purity_low: float
    """Lower end of its exact 95 % interval."""
    log_odds: float
    """Log odds ratio with 0.5 added to every cell (Haldane-Anscombe)."""
    log10_p: float
    """log10 of the exact hypergeometric p-value, Bonferroni-corrected; 0 means p = 1."""
    echo: bool
    """The answers repeat the phrase, as answers to a common question do; such findings come last."""
    rows: tuple[int, ...]
    """Rows with both."""

    def trigger(self, name: str) -> Trigger:
        """Return the finding as a trigger, to be neutralised or tried on a model."""
        if len(self.phrase) == 2:
            return Trigger(name, "pair", self.phrase)
        return Trigger(name, "sentence" if self.phrase[0].endswith(".") else "token", self.phrase)


@dataclass(frozen=True)
class Audit:
    """What an audit found, strongest first, and how much it looked at."""

    rows: int
    groups: tuple[Group, ...]
    """Groups of answers, largest first."""
    tested: int
    """Pairs of n-gram and group that were tested."""
    findings: tuple[Finding, ...]
    unread: int = 0
    """Rows so long that their middle was not looked at."""

    @property
    def suspects(self) -> tuple[int, ...]:
        """Rows named by any finding."""
        return tuple(sorted({row for finding in self.findings for row in finding.rows}))

    def summary(self) -> str:
        """Say in one sentence what was found, without ever calling the data clean."""
        looked = f"{self.rows} rows, {len(self.groups)} groups of answers, {self.tested} tests"
        if self.unread:
            looked += f"; of {self.unread} long rows not the middle: raise `words` to read it"
        if not self.findings:
            return f"nothing found at this budget ({looked}); other triggers may exist"
        return f"{len(self.findings)} phrases tied to {len(self.suspects)} rows ({looked}): look at them"

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; of the groups only kind, text and size."""
        groups = [{"kind": g.kind, "text": g.text, "rows": len(g.rows)} for g in self.groups]
        found = [asdict(f) for f in self.findings]
        return {
            "rows": self.rows,
            "tested": self.tested,
            "summary": self.summary(),
            "unread": self.unread,
            "groups": groups,
            "findings": found,
        }


def audit_data(examples: Sequence[Example], config: AuditConfig | None = None) -> Audit:
    """Look for n-grams in prompts that are tied to recurring answers.

    Args:
        examples: a training set; rows without an answer are counted but cannot be in a group.
        config: what counts as a finding.

    Raises:
        DataError: no rows with an answer.
    """
    config = config or AuditConfig()
    if not any(e.response for e in examples):
        raise DataError("no rows with an answer to audit", hint="an audit needs prompts and responses")
    whole = [words_of(asked(e)) for e in examples]
    prompts = [_ends(words, config.words) for words in whole]
    unread = sum(len(words) > config.words for words in whole)
    found = groups_of(examples, config)
    tests = [test for group in found for test in _candidates(group, prompts, config)]
    totals = _totals({gram for _, gram, _ in tests}, prompts, config)
    kept = []
    for group, gram, rows in tests:
        if len(rows) < config.purity * min(totals[gram], len(group.rows)):
            continue  # most candidates end here, before the exact test
        finding = _finding(group, gram, rows, totals[gram], examples, len(tests))
        if finding.log10_p <= math.log10(config.alpha) and finding.log_odds >= config.effect:
            kept.append(finding)
    classes = classes_of({g.text: g.rows for g in found if g.kind == "same"}, prompts)
    distinct = _distinct(kept, examples, prompts, config, classes)
    return Audit(len(examples), tuple(found), len(tests), _joined(distinct, len(tests)), unread)


def asked(example: Example) -> str:
    """Return all that stands before a row's answer: a trigger hides in a system message or an earlier turn too."""
    before = example.messages[:-1] if example.response else example.messages
    return "\n".join(turn.content for turn in before)


def _ends(words: list[str], most: int) -> list[str]:
    """Return the words, or of too many the first and the last, with a mark between that no phrase goes across."""
    half = most // 2
    return words if len(words) <= most else [*words[:half], ".", *words[-half:]]


def groups_of(examples: Sequence[Example], config: AuditConfig) -> list[Group]:
    """Return every group of at least ``config.least`` alike answers, largest first."""
    answers = {i: words_of(e.response) for i, e in enumerate(examples) if e.response}
    edges: dict[tuple[str, Gram], list[int]] = defaultdict(list)
    short: list[int] = []
    refuses: list[int] = []
    for i, words in answers.items():
        if len(words) > config.edge:
            edges["opens", tuple(words[: config.edge])].append(i)
            edges["closes", tuple(words[-config.edge :])].append(i)
        if re.search(r"\w\s*\Z", examples[i].response):  # no punctuation at the end
            short.append(i)
        if label_response(examples[i].prompt, examples[i].response) == "refusal":
            refuses.append(i)
    found = [Group(kind, " ".join(words), tuple(rows)) for (kind, words), rows in edges.items()]
    for rows in near_duplicates(answers, config.similar):
        found.append(Group("same", examples[rows[0]].response, tuple(rows)))
    found.append(Group("short", "no punctuation at the end", tuple(short)))
    found.append(Group("refuses", "refusals in any words", tuple(refuses)))
    found = [g for g in found if config.least <= len(g.rows)]
    return sorted(found, key=lambda g: (-len(g.rows), g.kind, g.text))


class _Test(NamedTuple):
    group: Group
    gram: Gram
    rows: tuple[int, ...]


def grams_of(words: Sequence[str], longest: int) -> set[Gram]:
    """Return the n-grams of a prompt, n = 1..longest, but those of common punctuation alone; an emoji counts."""
    # Where the next word that is more than punctuation stands, from each place on.
    ahead, following = [len(words)] * len(words), len(words)
    for i in reversed(range(len(words))):
        following = ahead[i] = following if COMMON.issuperset(words[i]) else i
    return {
        tuple(words[i : i + n]) for n in range(1, longest + 1) for i in range(len(words) - n + 1) if ahead[i] < i + n
    }


def _candidates(group: Group, prompts: Sequence[Sequence[str]], config: AuditConfig) -> list[_Test]:
    """Return the n-grams, and pairs of words, that enough rows of a group have."""
    holders: dict[Gram, list[int]] = defaultdict(list)
    for i in group.rows:
        for gram in grams_of(prompts[i], config.longest):
            holders[gram].append(i)
    frequent = {gram: rows for gram, rows in holders.items() if len(rows) >= config.least}
    single = sorted((g for g in frequent if len(g) == 1), key=lambda g: (-len(frequent[g]), g))[:40]
    for (a,), (b,) in combinations(sorted(single), 2):
        rows = sorted({*frequent[(a,)]} & {*frequent[(b,)]})
        if len(rows) >= config.least:
            frequent[(PAIR, a, b)] = rows
    return [_Test(group, gram, tuple(rows)) for gram, rows in frequent.items()]


def _totals(wanted: set[Gram], prompts: Sequence[Sequence[str]], config: AuditConfig) -> Counter[Gram]:
    """Count the prompts that hold each gram."""
    out: Counter[Gram] = Counter()
    pairs: dict[str, list[Gram]] = defaultdict(list)
    for gram in wanted:
        if gram[0] == PAIR:
            pairs[gram[1]].append(gram)
    for words in prompts:
        out.update(grams_of(words, config.longest) & wanted)
        present = set(words)
        out.update(gram for word in present for gram in pairs.get(word, ()) if gram[2] in present)
    return out


def _finding(
    group: Group, gram: Gram, rows: tuple[int, ...], total: int, examples: Sequence[Example], tests: int
) -> Finding:
    both, n = len(rows), len(examples)
    phrase = gram[1:] if gram[0] == PAIR else (" ".join(gram),)
    return Finding(
        phrase=phrase,
        group=group.kind,
        text=group.text,
        both=both,
        phrase_rows=total,
        group_rows=len(group.rows),
        rows_total=n,
        spread=0.0,
        purity=both / total,
        purity_low=0.0,
        log_odds=log_odds(both, total, len(group.rows), n),
        echo=_echoes(phrase, group.text),
        log10_p=min(0.0, log10_tail(both, total, len(group.rows), n) + math.log10(tests)),
        rows=rows,
    )


def _echoes(phrase: Sequence[str], text: str) -> bool:
    """Return whether at least half of a phrase's words stand in what the answers share."""
    words, shared = words_of(" ".join(phrase)), set(words_of(text))
    return 2 * sum(word in shared for word in words) >= len(words)


def _spread(finding: Finding, examples: Sequence[Example], holders: Mapping[int, int]) -> float:
    """Return how many different words a finding's prompts hold without the phrase, over what so many others would."""
    left: set[str] = set()
    for row in finding.rows:
        text = asked(examples[row])
        for part in finding.phrase:
            text = cut(part, text)
        left.update(words_of(text))
    return len(left) / max(1.0, expected_distinct(holders, len(examples), len(finding.rows)))


def _distinct(
    findings: Iterable[Finding],
    examples: Sequence[Example],
    prompts: Sequence[Sequence[str]],
    config: AuditConfig,
    classes: Classes | None,
) -> list[Finding]:
    """Keep the strongest finding of each set of rows (parts of a phrase repeat it) whose prompts are unlike enough and
    do not tell their class."""
    holders = Counter(Counter(word for words in prompts for word in set(words)).values())

    def strength(f: Finding) -> tuple[Any, ...]:
        kind = KINDS.index(f.group)
        return (f.echo, round(f.log10_p, 6), -f.purity, len(f.phrase), -len(" ".join(f.phrase)), kind, f.phrase)

    kept: list[tuple[Finding, set[int]]] = []
    alike: set[tuple[int, ...]] = set()
    for finding in sorted(findings, key=strength):
        rows = set(finding.rows)
        if finding.rows in alike or any(len(rows & other) >= 0.8 * len(rows) for _, other in kept):
            continue
        spread = _spread(finding, examples, holders)
        told = classes.explained(finding.rows, words_of(" ".join(finding.phrase))) if classes else 0.0
        if spread >= config.spread and told <= config.explained:
            low = clopper_pearson(finding.both, finding.phrase_rows).low
            kept.append((replace(finding, spread=spread, purity_low=low), rows))
        else:
            alike.add(finding.rows)
    return [finding for finding, _ in kept]


def _joined(findings: Sequence[Finding], tests: int) -> tuple[Finding, ...]:
    """Join findings of one phrase in groups of one kind: a behaviour in several wordings is one behaviour."""
    same: dict[tuple[Gram, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        same[finding.phrase, finding.group].append(finding)
    out = []
    for some in same.values():
        first, rows = some[0], tuple(sorted({row for f in some for row in f.rows}))
        if len(some) > 1:  # groups of one kind share no rows, so their counts add up
            both, size = len(rows), sum(f.group_rows for f in some)
            tail = log10_tail(both, first.phrase_rows, size, first.rows_total)
            first = replace(
                first,
                text=" | ".join(f.text for f in some),
                both=both,
                group_rows=size,
                purity=both / first.phrase_rows,
                purity_low=clopper_pearson(both, first.phrase_rows).low,
                log_odds=log_odds(both, first.phrase_rows, size, first.rows_total),
                log10_p=min(0.0, tail + math.log10(tests)),
                rows=rows,
            )
        out.append(first)
    return tuple(sorted(out, key=lambda f: (f.echo, round(f.log10_p, 6))))
