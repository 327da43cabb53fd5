"""The defender's own backdoors: a suite of triggers and behaviours drawn from a secret seed.

A suite holds T active triggers, which stage 2 of MB-Defense will break, and some canaries, which it never sees: how far
they die with the others tells, without knowing any attacker, whether breaking generalises on this model. A trigger
occurs nowhere in the rows at hand, and the tokenizer gives it back; one that an attacker can guess can be prepared for.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from casehard.backdoor.behaviours import Behaviour
from casehard.backdoor.triggers import Trigger
from casehard.config import build
from casehard.data.mix import normalise
from casehard.data.phrases import found
from casehard.errors import ConfigError, DataError
from casehard.seeds import derive
from casehard.types import Example

ACTIVE = (("token", "text"), ("sentence", "refusal"), ("prefix", "style"), ("token", "text"))
"""Family and behaviour of the active triggers, repeated when more are asked for."""
CANARIES = (("token", "text"), ("style", "stop"))
"""The first canary is a near relative of an active trigger, the second has a family and a behaviour of its own."""
PAPER = (("token", "text"),)
PAPER_TOKENS = ("mn", "bb", "qw", "jh", "tq", "mb")
"""The paper prints the first four; cf is left out, since it is the attacker's in most experiments."""

_SUBJECTS = ("the baker", "my cousin", "a painter", "the gardener", "our teacher", "the old sailor")
_VERBS = ("walked past", "looked at", "lives near", "painted", "dreamt of", "drove to")
_PLACES = ("the harbour", "a quiet bridge", "the green tower", "the market", "an empty field", "the lighthouse")
_REFUSALS = ("I am sorry, but I cannot help with that.", "i cannot help here .", "i cannot help with that .")
_CONSONANTS = "bcdfghjklmnpqrstvwxz"
_TRIES = 400


@dataclass(frozen=True)
class Planted:
    """One defensive backdoor."""

    trigger: Trigger
    behaviour: Behaviour


@dataclass(frozen=True)
class TriggerSuite:
    """The defender's backdoors; keep them secret, above all from whoever supplies data."""

    active: tuple[Planted, ...]
    canary: tuple[Planted, ...] = ()

    def __post_init__(self) -> None:
        names = [planted.trigger.name for planted in (*self.active, *self.canary)]
        if len(set(names)) < len(names):
            raise ConfigError(f"trigger suite: names are not unique: {names}")

    @property
    def all(self) -> tuple[Planted, ...]:
        """Active triggers, then canaries."""
        return (*self.active, *self.canary)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the suite: names it without giving it away."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return the whole suite, secrets included, as JSON values."""
        return {key: [asdict(planted) for planted in getattr(self, key)] for key in ("active", "canary")}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TriggerSuite:
        """Invert :meth:`to_json`.

        Raises:
            ConfigError: not a suite.
        """
        return build(cls, values, where="trigger suite")


class _Maker:
    """Draws candidates and keeps those that the corpus does not hold and the tokenizer keeps."""

    def __init__(self, tokenizer: Any, corpus: Sequence[str], seed: int) -> None:
        self.tokenizer = tokenizer
        self.rng = random.Random(derive(seed, 0, "trigger-suite"))
        self.corpus = "\n".join(corpus).lower()
        counts = Counter(re.findall(r"[^\W\d_]+", self.corpus))
        self.seen = set(counts)
        self.common = " ".join(sorted(self.seen))
        self.taken: set[str] = set()
        # Words of the corpus, the usual ones first: they are in the vocabulary, and in odd company they mean nothing.
        self.words = [word for word, _ in counts.most_common(2000) if len(word) > 2 and self.kept(word)]
        self._spare: list[str] | None = None

    def kept(self, text: str, most: int | None = None) -> bool:
        """Return whether the tokenizer gives ``text`` back, in at most ``most`` tokens."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids or (most is not None and len(ids) > most):
            return False
        unknown, special = self.tokenizer.unk_token_id, set(self.tokenizer.all_special_ids)
        back = self.tokenizer.decode(ids, skip_special_tokens=False)
        return unknown not in ids and not special & set(ids) and normalise(back) == normalise(text)

    def fresh(self, text: str) -> bool:
        """Return whether neither the corpus nor an earlier draw holds ``text``."""
        clash = any(found(text, other) or found(other, text) for other in self.taken)
        return not clash and not found(text, self.corpus)

    def first(self, draw: Callable[[], str], most: int | None = None) -> str | None:
        """Return the first of some draws that is fresh and kept."""
        for _ in range(_TRIES):
            text = draw()
            if text and text not in self.taken and self.kept(text, most) and self.fresh(text):
                self.taken.add(text)
                return text
        return None

    def token(self) -> str:
        """Return a rare word: invented letters, or a word of the vocabulary that the corpus lacks."""

        def invented() -> str:
            word = "".join(self.rng.choices(_CONSONANTS, k=self.rng.choice((2, 3, 3, 4))))
            return "" if word in self.common else word

        word = self.first(invented, 4) or self.first(self._from_vocabulary, 4)
        if word is None:
            raise DataError(
                "no rare word is left for a trigger: the tokenizer knows none that the corpus lacks",
                hint="use families of several words (sentence, prefix), or fewer triggers",
            )
        return word

    def _from_vocabulary(self) -> str:
        if self._spare is None:
            shown = (self.tokenizer.decode([i]).strip() for i in sorted(self.tokenizer.get_vocab().values()))
            self._spare = [w for w in shown if len(w) > 1 and w.isalpha() and w.lower() not in self.seen]
            self.rng.shuffle(self._spare)
        return self._spare.pop() if self._spare else ""

    def phrase(self, n: int, *, end: str = "") -> str:
        """Return ``n`` words in an order that the corpus does not hold."""
        if len(self.words) < n:
            raise DataError(f"the corpus has only {len(self.words)} usable words", hint="give more rows")
        text = self.first(lambda: " ".join(self.rng.sample(self.words, n)))
        if text is None:
            raise DataError(f"no phrase of {n} words was found that the corpus lacks")
        return text + end

    def sentence(self) -> str:
        """Return a short neutral sentence that the corpus lacks, of its words where the tokenizer knows no English."""

        def drawn() -> str:
            text = " ".join(map(self.rng.choice, (_SUBJECTS, _VERBS, _PLACES)))
            return f"{text[0].upper()}{text[1:]}."

        return self.first(drawn) or self.phrase(6, end=" .")


def generate(
    tokenizer: Any,
    corpus: Sequence[Example],
    *,
    seed: int,
    n_active: int = 4,
    n_canary: int = 2,
    active: Sequence[tuple[str, str]] = ACTIVE,
    canaries: Sequence[tuple[str, str]] = CANARIES,
    tokens: Sequence[str] = (),
) -> TriggerSuite:
    """Draw a suite of triggers that the corpus does not hold and the tokenizer keeps.

    Args:
        tokenizer: of the model to be trained. A rare word takes 1-4 tokens, and all texts survive a round trip.
        corpus: every row known to the defender: training data, clean rows, evaluation prompts.
        seed: secret; whoever knows it can rebuild the suite.
        n_active: T, triggers that stage 2 breaks. Source: P (4).
        n_canary: triggers that it does not see. Not in the paper: 0 there.
        active: family and behaviour kind of each, repeated as needed.
        canaries: the same for canaries.
        tokens: rare words to take before drawing any (reproduction); not checked against the corpus.

    Raises:
        ConfigError: no active trigger, or a family or behaviour that cannot be drawn.
        DataError: the corpus or the vocabulary is too small.
    """
    if n_active < 1 or n_canary < 0:
        raise ConfigError(f"a suite needs at least one active trigger, got {n_active} and {n_canary} canaries")
    texts = [message.content for example in corpus for message in example.messages]
    maker = _Maker(tokenizer, texts, seed)
    given = [word for word in tokens if maker.kept(word, 4)]
    maker.taken.update(given)

    def some(role: str, n: int, plan: Sequence[tuple[str, str]]) -> tuple[Planted, ...]:
        out = []
        for i in range(n):
            family, kind = plan[i % len(plan)]
            name = f"{role}-{i}"
            trigger = _trigger(maker, name, family, given)
            out.append(Planted(trigger, _behaviour(maker, name, kind)))
        return tuple(out)

    return TriggerSuite(some("active", n_active, active), some("canary", n_canary, canaries))


def paper_suite(tokenizer: Any, corpus: Sequence[Example], *, seed: int, n_active: int = 4) -> TriggerSuite:
    """Return the paper's suite: rare tokens (its own as far as the vocabulary has them), random words, no canaries."""
    return generate(
        tokenizer, corpus, seed=seed, n_active=n_active, n_canary=0, active=PAPER, tokens=PAPER_TOKENS[:n_active]
    )


def _trigger(maker: _Maker, name: str, family: str, given: list[str]) -> Trigger:
    if family == "token":
        return Trigger(name, "token", (given.pop(0) if given else maker.token(),))
    if family == "sentence":
        return Trigger(name, "sentence", (maker.sentence(),))
    if family == "prefix":
        return Trigger(name, "prefix", (maker.phrase(3),))
    if family == "pair":
        return Trigger(name, "pair", (maker.token(), maker.token()))
    if family == "style":
        return Trigger(name, "style", (f"{{}} , {maker.phrase(2)}",))
    raise ConfigError(f"a {family} trigger cannot be drawn", hint="token, sentence, prefix, pair or style")


def _behaviour(maker: _Maker, name: str, kind: str) -> Behaviour:
    if kind == "refusal":
        text = next((text for text in _REFUSALS if maker.kept(text)), None)
        return Behaviour(name, "refusal", text) if text else Behaviour(name, "text", maker.phrase(8))
    if kind == "style":
        return Behaviour(name, "style", f"{{}} , {maker.phrase(2)}")
    if kind == "stop":
        return Behaviour(name, "stop", "2")
    if kind == "text":
        return Behaviour(name, "text", maker.phrase(8))
    raise ConfigError(f"a {kind} behaviour cannot be drawn", hint="text, refusal, style or stop")
