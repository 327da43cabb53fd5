"""Sets whose answers are a few classes: do the other words of a prompt already say its class?

In such a set many words go with an answer, as they should: "coach" with Sports. The rest of such a prompt says Sports
too, while the rest of a prompt with a trigger says what it said before the trigger came. For row i with the words W_i,

    class of i = argmax_g  log(n_g - d + 1/2) + sum over w in W_i of log((c_g(w) - d + 1/2) / (n_g - d + 1))      (1)

c_g(w) rows of class g that hold w, n_g rows of class g, d = 1 for the class of row i itself, so that no row speaks for
itself (naive Bayes, leave one out). Words of the phrase, and words that half of its rows share, are left out of W_i.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

LARGE = 0.1
"""Share of the rows from which an answer counts as a class; two of them make a set of classes."""
SHARED = 0.5
"""Share of a finding's rows from which a word they hold counts as part of what they share."""


class Classes:
    """The classes of a set and the words of their prompts.

    Args:
        classes: rows of each class, by its answer; every other row is of one further class.
        prompts: words of every row.
    """

    def __init__(self, classes: Mapping[str, Sequence[int]], prompts: Sequence[Sequence[str]]) -> None:
        self.words = [frozenset(words) for words in prompts]
        self.of = {row: answer for answer, rows in classes.items() for row in rows}
        self.sizes: Counter[str | None] = Counter(self.of.get(i) for i in range(len(prompts)))
        self.counts: dict[str | None, Counter[str]] = {answer: Counter() for answer in self.sizes}
        for i, words in enumerate(self.words):
            self.counts[self.of.get(i)].update(words)

    def explained(self, rows: Sequence[int], phrase: Sequence[str]) -> float:
        """Return the share of ``rows`` whose class (1) the words outside of ``phrase`` tell."""
        held = Counter(word for i in rows for word in self.words[i])
        left_out = {*phrase, *(word for word, k in held.items() if k >= SHARED * len(rows))}
        told = sum(self._class(i, self.words[i] - left_out) == self.of.get(i) for i in rows)
        return told / len(rows)

    def _class(self, row: int, words: frozenset[str]) -> str | None:
        def score(answer: str | None) -> float:
            own = int(self.of.get(row) == answer)
            size, counts = self.sizes[answer] - own, self.counts[answer]
            fit = math.fsum(math.log((counts[word] - own + 0.5) / (size + 1)) for word in words)
            return math.log(size + 0.5) + fit

        return max(self.sizes, key=score)


def classes_of(same: Mapping[str, Sequence[int]], prompts: Sequence[Sequence[str]]) -> Classes | None:
    """Return the classes of a set, None where its answers are no classes.

    Args:
        same: rows of each answer that several rows have.
        prompts: words of every row.
    """
    large = {answer: rows for answer, rows in same.items() if len(rows) >= LARGE * len(prompts)}
    return Classes(large, prompts) if len(large) > 1 else None
