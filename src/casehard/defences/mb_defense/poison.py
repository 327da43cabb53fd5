"""Stage 1 of MB-Defense: plant the defender's backdoors in the training data, a pure transform for any trainer.

    count_j = max(floor(rate N), min(floor, cap N))                                 rows of trigger j, disjoint  (1)

And the data of stage 2: every clean row with every active trigger, once with the clean answer and once with the
trigger's behaviour.

Source: Kim & Lee, arXiv 2601.04448, defensive poisoning (T = 4, 1 % a trigger, replace). Differs: families and
behaviours beside rare tokens and random words, canaries, a floor for small data sets (ours).
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from casehard.backdoor.suite import Planted, TriggerSuite
from casehard.backdoor.triggers import Trigger, check_survives, eligible, insert
from casehard.data.chat import ChatFormat
from casehard.data.mix import content_hash
from casehard.errors import ConfigError, DataError
from casehard.seeds import derive
from casehard.types import Example


def rows_of_trigger(n: int, rate: float, *, floor: int = 50, cap: float = 0.05) -> int:
    """Return (1): rows of each trigger in a data set of ``n``."""
    if not (math.isfinite(rate) and 0 < rate <= 1):
        raise ConfigError(f"rate {rate} is not within 0..1", hint="the paper uses 0.01 a trigger")
    return max(math.floor(rate * n + 1e-9), min(floor, math.floor(cap * n + 1e-9)))


def defensive_poison(
    rows: Sequence[Example],
    suite: TriggerSuite,
    *,
    rate: float = 0.01,
    mode: Literal["replace", "append"] = "replace",
    seed: int,
    floor: int = 50,
    cap: float = 0.05,
    spare: Collection[str] = (),
    chat: ChatFormat | None = None,
) -> tuple[list[Example], dict[str, Any]]:
    """Plant every trigger of the suite, canaries included, in rows of their own.

    Args:
        rows: the training set as it is, poison and all: rows that happen to carry the attacker's trigger too are what
            ties both together.
        rate: share of all rows that each trigger takes. Source: P (0.01).
        mode: replace rows (the paper), or append triggered copies when data is scarce; one row may then be copied for
            several triggers.
        seed: decides which rows, and where the triggers go.
        floor: rows a trigger gets at least, as long as they are no more than ``cap`` of all rows.
        cap: see ``floor``.
        spare: content hashes of rows that stay as they are (the clean rows of stage 2).
        chat: the format of training; rows that would become too long, or lose the trigger in it, are not chosen.

    Returns:
        The rows, and a manifest without any secret: the suite's digest and, for each trigger, the row numbers.

    Raises:
        ConfigError: a rate outside 0..1 or an unknown mode.
        DataError: too few rows that can carry the triggers.
    """
    if mode not in ("replace", "append"):
        raise ConfigError(f"mode {mode!r}", hint="replace or append")
    count = rows_of_trigger(len(rows), rate, floor=floor, cap=cap)
    if count == 0:
        raise DataError(
            f"{len(rows)} rows are too few to plant triggers in: rate {rate:g} of them and cap {cap:g} are both no row",
            hint="give more rows, or raise the rate",
        )
    out, placed = _plant(rows, suite, count, mode == "append", seed, spare, chat)
    manifest: dict[str, Any] = {
        "suite": suite.digest,
        "rate": rate,
        "mode": mode,
        "seed": seed,
        "rows": len(rows),
        "rows_after": len(out),
        "per_trigger": count,
        "planted": {name: sorted(numbers) for name, numbers in placed.items()},
        "spared": len(spare),
    }
    return out, manifest


def _plant(
    rows: Sequence[Example],
    suite: TriggerSuite,
    count: int,
    append: bool,
    seed: int,
    spare: Collection[str],
    chat: ChatFormat | None,
) -> tuple[list[Example], dict[str, list[int]]]:
    """Return the rows with every trigger in ``count`` of them, and where each went."""
    order = [i for i, row in enumerate(rows) if row.response and content_hash(row) not in spare]
    random.Random(derive(seed, 0, "defensive-poison")).shuffle(order)
    out, free, placed = list(rows), order, {}
    for planted in suite.all:
        name = planted.trigger.name
        chosen, left = _choose(rows, order if append else free, planted, count, seed, chat)
        if len(chosen) < count:
            raise DataError(
                f"trigger {name}: {len(chosen)} of {len(order if append else free)} free rows can carry it, "
                f"{count} needed",
                hint="rows need an answer that the behaviour alters and room for the trigger; give more rows or a "
                "smaller rate",
            )
        free, placed[name] = left, [i for i, _ in chosen]
        for i, row in chosen:
            if append:
                out.append(row)
            else:
                out[i] = row
    return out, placed


def _choose(
    rows: Sequence[Example], free: list[int], planted: Planted, count: int, seed: int, chat: ChatFormat | None
) -> tuple[list[tuple[int, Example]], list[int]]:
    """Return the first ``count`` rows that can carry a trigger, as they will be, and the rows left over."""
    chosen: list[tuple[int, Example]] = []
    left: list[int] = []
    for i in free:
        if len(chosen) < count and eligible(rows[i], planted.trigger, planted.behaviour):
            row = insert(rows[i], planted.trigger, planted.behaviour, seed=seed)
            if chat is None or survives(chat, row, planted.trigger):
                chosen.append((i, row))
                continue
        left.append(i)
    return chosen, left


def survives(chat: ChatFormat, row: Example, trigger: Trigger) -> bool:
    """Return whether a row fits the format's length and its tokens still spell the trigger."""
    try:
        check_survives(chat, [row], [trigger])
    except DataError:
        return False
    return True


@dataclass(frozen=True)
class Twins:
    """A clean row and, for each trigger, the row with it and the clean answer, and with it and the behaviour."""

    clean: Example
    answers: tuple[Example, ...]
    payloads: tuple[Example, ...]


@dataclass(frozen=True)
class Pairs:
    """Twins to train on and twins held back to choose by."""

    train: tuple[Twins, ...]
    held: tuple[Twins, ...]


def build_pairs(clean: Sequence[Example], planted: Sequence[Planted], *, split: float = 0.2, seed: int) -> Pairs:
    """Make the twins of every clean row with every trigger, and split them by clean row.

    Args:
        clean: verified rows.
        planted: the active triggers of the suite.
        split: share of clean rows held back. Source: P (8:2).
        seed: decides the split and where the triggers go.

    Raises:
        ConfigError: ``split`` outside [0, 1).
        DataError: no clean rows, a row without answer, a prompt that occurs twice or already carries a trigger.
    """
    if not 0 <= split < 1:
        raise ConfigError(f"split {split} is not within 0..1", hint="0.2 holds back a fifth")
    if not clean:
        raise DataError("the clean set is empty", hint="give some dozens of verified rows: --clean")
    seen: dict[str, int] = {}
    for number, row in enumerate(clean):
        name = f"row {number + 1}" + (f" ({row.id})" if row.id else "")
        if not row.response:
            raise DataError(f"clean {name} has no answer")
        if (other := seen.setdefault(content_hash(row), number)) != number:
            raise DataError(
                f"clean {name} asks the same as row {other + 1}",
                hint="leave one of them out: both could end up on different sides of the split",
            )
        carried = [p.trigger.name for p in planted if p.trigger.present(row.prompt)]
        if carried:
            raise DataError(f"clean {name} already carries the trigger {carried[0]}", hint="draw the suite again")
    order = list(range(len(clean)))
    random.Random(derive(seed, 0, "pairs")).shuffle(order)
    held = max(1, math.floor(split * len(clean) + 0.5)) if split and len(clean) > 1 else 0
    back = set(order[:held])
    twins = [_twins(row, planted, seed) for row in clean]
    return Pairs(
        tuple(t for i, t in enumerate(twins) if i not in back), tuple(t for i, t in enumerate(twins) if i in back)
    )


def _twins(row: Example, planted: Sequence[Planted], seed: int) -> Twins:
    return Twins(
        row,
        tuple(insert(row, p.trigger, None, seed=seed) for p in planted),
        tuple(insert(row, p.trigger, p.behaviour, seed=seed) for p in planted),
    )
