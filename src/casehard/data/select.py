"""Choose the few safe rows worth training on.

| strategy | rows | source |
|---|---|---|
| rd-dpp | relevant to the user's rows and unlike each other | SPARD |
| random | any | |
| matched-random | any, with as many refusals as rd-dpp picks from the same pool: the control of its choice | ours |
| relevance, diversity | rd-dpp with one half of it | SPARD's ablations |
| k-means | the nearest to each of k centres of the pool | maths/kmeans |
| gradient | whose gradient is most like the mean gradient of the user's rows | LESS, simplified: data/gradients |

relevance q_i = max_z cos(pool_i, user_z), poisoned user rows included, since nobody can tell them apart; rd-dpp is then
greedy MAP of the kernel (q_i q_j)^beta cos(pool_i, pool_j), see maths/dpp. Works on any array of embeddings.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import torch

from casehard.data.embed import Embedder, Text, embed, texts_of
from casehard.data.gradients import cosines as gradient_cosines
from casehard.data.mix import content_hash
from casehard.errors import ConfigError, DataError
from casehard.limits import WEIGHT, Count, Factor, Limited, Weight, Within
from casehard.maths.dpp import JITTER, Greedy, directions, greedy_map, log_weights, relevance, unit_rows
from casehard.maths.kmeans import kmeans, nearest_rows
from casehard.seeds import generator
from casehard.types import Example

Strategy = Literal["rd-dpp", "random", "matched-random", "relevance", "diversity", "k-means", "gradient"]


@dataclass(frozen=True, kw_only=True)
class SelectConfig(Limited):
    """Settings of a selection; the defaults are the paper's."""

    k: Count | None = None
    """Rows to pick; None = floor(share x user rows). Source: P, budget of the uploaded data, poison included."""
    share: Factor = 0.03
    """Picks as a share of the user's rows. Source: P (0.03; robust on 0.03..0.1)."""
    beta: Annotated[float, Within(0, WEIGHT, endless=True)] = 4.0
    """Exponent of relevance; 0 = diversity only, .inf = relevance only. Source: P (4; robust on 4..10)."""
    strategy: Strategy = "rd-dpp"
    """rd-dpp; random or matched-random (seeded); relevance (largest q) or diversity (beta = 0) alone; k-means (the rows
    nearest to k centres); gradient (the user's rows' mean gradient)."""
    refusals: str = "kind=refusal"
    """TAG=VALUE of the rows that refuse: what matched-random keeps equal, and what the record counts. Ours."""
    jitter: Weight = JITTER
    """eps of the kernel, inside the weighting. Source: published code (1e-6, there outside)."""
    centre: bool = False
    """Subtract the pool's mean embedding first. Not in the paper; embeddings of one model share a large mean."""
    strata: str = ""
    """Name of a tag: the picks are divided evenly over its values (rows without it are one more), each part chosen by
    itself. Keeps refusals in the set when the pool's harmless rows are nearer to the user's data. Not in the paper."""
    text: Text = "prompt"
    """What of a row is embedded. Source: P and code (prompt)."""


@dataclass(frozen=True)
class Picks:
    """What was chosen, in order, and how good the set is."""

    order: tuple[int, ...]
    """Row numbers in the pool."""
    relevance: tuple[float, ...]
    """q of each pick, 0..1; empty when there were no user rows."""
    log_gains: tuple[float, ...]
    """log of each pick's gain in the weighted kernel; empty for random and relevance."""
    log_det: float | None
    """log det of the unweighted cosine kernel over the picks, jitter included: how diverse the set is."""
    mean_relevance: float | None
    exhausted_at: int | None
    """Picks after which the pool's embeddings spanned nothing new; None if never."""
    directions: int = 0
    """Directions that the pool's embeddings span."""
    per_direction: float = 0.0
    """Picks over directions, k/d: the paper's is about 0.15; above 1 there is no diversity left to choose by."""

    def to_json(self) -> dict[str, Any]:
        """Return JSON values (an infinite log det as text)."""
        plain = asdict(self)
        plain["log_gains"] = [g if math.isfinite(g) else str(g) for g in self.log_gains]
        if self.log_det is not None and not math.isfinite(self.log_det):
            plain["log_det"] = str(self.log_det)
        return plain


def select(
    pool: Any,
    user: Any | None,
    k: int,
    *,
    config: SelectConfig | None = None,
    seed: int = 0,
    refuses: Sequence[bool] | None = None,
    cosines: Any | None = None,
) -> Picks:
    """Pick ``k`` rows of ``pool``; all of them, in order, when k >= n.

    Args:
        pool: embeddings (n, d): tensor or array; lengths do not matter.
        user: embeddings (m, d) of the user's rows; None only for strategies that do not ask how relevant a row is.
        k: rows to pick, >= 1.
        seed: of strategies random, matched-random and k-means.
        refuses: which rows refuse, (n,): what strategy matched-random matches.
        cosines: of each row's gradient with the user's, (n,): what strategy gradient follows.

    Raises:
        DataError: no rows, a zero or non-finite embedding, widths that differ, or no user rows, refusals or gradients
            where they are needed.
        ConfigError: k < 1.
    """
    config = config or SelectConfig()
    if k < 1:
        raise ConfigError(f"k: {k} rows cannot be picked")
    phi, task = _prepare(pool, user, config)
    n = len(phi)
    if k > n:
        warnings.warn(f"{k} rows asked for and the pool has {n}: all are taken", stacklevel=2)
    k = min(k, n)
    q = None if task is None else relevance(phi, task)
    strategy = config.strategy
    if strategy in ("rd-dpp", "matched-random", "diversity"):
        got = _greedy(phi, q, k, config)
        if strategy != "matched-random":
            return _picks(phi, q, got.order, config, got.log_gains, got.exhausted_at)
        order = matched(got.order, _known(refuses, "which rows refuse", "refuses"), seed)
    elif strategy == "random":
        order = torch.randperm(n, generator=generator(seed, 0, "select"))[:k].tolist()
    elif strategy == "k-means":
        order = _central(phi, k, seed)
    else:
        by = q if strategy == "relevance" else torch.as_tensor(_known(cosines, "the rows' gradients", "cosines"))
        if by is None:
            raise DataError(_NO_USER, hint="--data, or strategy diversity")
        order = by.sort(descending=True, stable=True).indices[:k].tolist()
    return _picks(phi, q, order, config, [], None)


_NO_USER = "relevance needs the user's rows and there are none"


def _known(value: Any | None, what: str, argument: str) -> Any:
    if value is None:
        raise DataError(f"the strategy needs to know {what}", hint=f"select_examples finds out; or give {argument}=")
    return value


def _greedy(phi: torch.Tensor, q: torch.Tensor | None, k: int, config: SelectConfig) -> Greedy:
    """Return what rd-dpp picks, or diversity alone.

    Raises:
        DataError: relevance counts and there are no user rows.
    """
    beta = 0.0 if config.strategy == "diversity" else config.beta
    if q is None and beta > 0:
        raise DataError(_NO_USER, hint="--data, or strategy diversity")
    if math.isinf(beta):
        assert q is not None
        return Greedy(q.sort(descending=True, stable=True).indices[:k].tolist(), [], None, 0)
    weights = log_weights(q, beta) if q is not None else None
    got = greedy_map(phi, k, weights=weights, jitter=config.jitter)
    if got.exhausted_at is not None and got.exhausted_at < k:
        warnings.warn(
            f"the pool's embeddings span about {got.exhausted_at} directions and {k} rows were asked for "
            f"(k/d {k / max(got.exhausted_at, 1):.1f}; the paper's is about 0.15): later picks hardly add diversity "
            "and follow relevance",
            stacklevel=3,
        )
    return got


def matched(order: Sequence[int], refuses: Sequence[bool], seed: int) -> list[int]:
    """Return as many rows as ``order`` has, as many of them refusals, and otherwise at random.

    Example: rd-dpp picked 3 refusals among 10 rows; so 3 refusals and 7 others are drawn, each without replacement.
    """
    wanted = {True: sum(bool(refuses[i]) for i in order)}
    wanted[False] = len(order) - wanted[True]
    out: list[int] = []
    for i in torch.randperm(len(refuses), generator=generator(seed, 0, "select-matched")).tolist():
        if wanted[bool(refuses[i])] > 0:
            wanted[bool(refuses[i])] -= 1
            out.append(i)
    return out


def _central(phi: torch.Tensor, k: int, seed: int) -> list[int]:
    """Return the row nearest to each of k centres; where fewer than k rows differ, the lowest of what is left."""
    order = nearest_rows(kmeans(phi, k, generator=generator(seed, 0, "select-k-means")))
    taken = set(order)
    return order + [i for i in range(len(phi)) if i not in taken][: k - len(order)]


def _prepare(pool: Any, user: Any | None, config: SelectConfig) -> tuple[torch.Tensor, torch.Tensor | None]:
    phi = torch.as_tensor(pool)
    task = None if user is None else torch.as_tensor(user)
    if phi.ndim != 2 or (task is not None and (task.ndim != 2 or task.shape[1] != phi.shape[1])):
        seen = tuple(phi.shape), None if task is None else tuple(task.shape)
        raise DataError(f"embeddings of shapes {seen[0]} and {seen[1]}: expected (n, d) and (m, d)")
    if len(phi) == 0:
        raise DataError("the pool is empty", hint="check the file and its filter")
    if config.centre:
        mean = unit_rows(phi).mean(0)
        phi = unit_rows(phi) - mean
        task = None if task is None or len(task) == 0 else unit_rows(task) - mean
    return unit_rows(phi), None if task is None or len(task) == 0 else unit_rows(task).to(unit_rows(phi[:1]).dtype)


def _picks(
    phi: torch.Tensor,
    q: torch.Tensor | None,
    order: list[int],
    config: SelectConfig,
    gains: Sequence[float],
    exhausted: int | None,
) -> Picks:
    chosen = phi[order].double()
    # k x k, and k is small; the same number for every strategy, so that sets can be compared.
    block = chosen @ chosen.T + config.jitter * torch.eye(len(order), dtype=torch.float64, device=phi.device)
    picked = [] if q is None else [float(x) for x in q[order]]
    return Picks(
        order=tuple(order),
        relevance=tuple(picked),
        log_gains=tuple(gains),
        log_det=float(torch.linalg.slogdet(block)[1]),
        mean_relevance=sum(picked) / len(picked) if picked else None,
        exhausted_at=exhausted,
        directions=(spanned := directions(phi)),
        per_direction=len(order) / spanned,
    )


def budget(config: SelectConfig, user_rows: int) -> int:
    """Return how many rows are picked: ``k``, or floor(share x user rows), at least 1."""
    return config.k if config.k is not None else max(1, math.floor(config.share * user_rows))


def select_examples(
    embedder: Embedder,
    pool: Sequence[Example],
    user: Sequence[Example],
    *,
    config: SelectConfig | None = None,
    seed: int = 0,
    cache: Any | None = None,
    system: str | None = None,
) -> Picks:
    """Embed both sides and pick rows of ``pool``; see :func:`select`.

    Args:
        cache: folder of embeddings computed earlier (a ``Path``), or None.
        system: system message of the rows, for strategy gradient.

    Raises:
        DataError: see :func:`select`; or strategy matched-random and no row of the pool is a refusal by its tag.
        Unsupported: strategy gradient and an embedding model that has no language head.
    """
    config = config or SelectConfig()
    if not pool:
        raise DataError("the pool is empty", hint="check the file and its filter")
    phi = embed(embedder, texts_of(pool, config.text), cache=cache)
    task = embed(embedder, texts_of(user, config.text), cache=cache) if user else None
    k = budget(config, len(user))
    refuses = refusing(pool, config.refusals) if config.strategy == "matched-random" else None
    gains = gradient_cosines(embedder, pool, user, seed=seed, system=system) if config.strategy == "gradient" else None
    if not config.strata:
        return select(phi, task, k, config=config, seed=seed, refuses=refuses, cosines=gains)
    parts = strata(pool, config.strata)
    order: list[int] = []
    for rows, share in zip(parts.values(), split(k, [len(rows) for rows in parts.values()]), strict=True):
        if share:
            own = None if refuses is None else [refuses[i] for i in rows]
            of = None if gains is None else gains[rows]
            picks = select(phi[rows], task, share, config=config, seed=seed, refuses=own, cosines=of)
            order += [rows[i] for i in picks.order]
    whole, users = _prepare(phi, task, config)
    return _picks(whole, None if users is None else relevance(whole, users), order, config, [], None)


def refusing(pool: Sequence[Example], told: str) -> list[bool]:
    """Return which rows refuse, by the tag that tells.

    Args:
        told: TAG=VALUE.

    Raises:
        ConfigError: not of that form.
        DataError: no row of the pool has the tag and value.
    """
    tag, mark, value = told.partition("=")
    if not (tag and mark and value):
        raise ConfigError(f"refusals: {told!r} is not TAG=VALUE", hint="the tag of the rows that refuse: kind=refusal")
    found = [str(e.tags.get(tag)) == value for e in pool]
    if not any(found):
        seen = sorted({str(e.tags[tag]) for e in pool if tag in e.tags})[:5]
        has = f"has values {', '.join(seen)}" if seen else "is in none of them"
        raise DataError(
            f"refusals: none of {len(pool)} rows of the pool is tagged {told}: {tag} {has}",
            hint="--set refusals=TAG=VALUE names the rows that refuse",
        )
    return found


def strata(pool: Sequence[Example], tag: str) -> dict[str, list[int]]:
    """Return the rows of each value of ``tag``, rows without it under the empty string.

    Raises:
        DataError: no row has the tag.
    """
    out: dict[str, list[int]] = {}
    for i, example in enumerate(pool):
        out.setdefault(str(example.tags.get(tag, "")), []).append(i)
    if set(out) == {""}:
        raise DataError(f"strata: no row of the pool has the tag {tag!r}", hint="name a key of the rows, as kind")
    return dict(sorted(out.items()))


def split(k: int, sizes: Sequence[int]) -> list[int]:
    """Divide ``k`` picks evenly over parts of the given sizes; what a small part cannot take goes to the others.

    Example: 10 over (2, 50, 50) -> (2, 4, 4).
    """
    shares = [0] * len(sizes)
    for _ in range(min(k, sum(sizes))):
        # The part that has least and still has room; the first of equals.
        shares[min((i for i in range(len(sizes)) if shares[i] < sizes[i]), key=lambda i: shares[i])] += 1
    return shares


def manifest(
    picks: Picks, pool: Sequence[Example], user_rows: int, *, config: SelectConfig, embedder: str, seed: int
) -> dict[str, Any]:
    """Return the JSON record of a selection: settings, picks with ids, measures of the set, coverage of the tags."""
    chosen = [pool[i] for i in picks.order]
    return {
        "settings": asdict(config) | {"beta": config.beta if math.isfinite(config.beta) else str(config.beta)},
        "seed": seed,
        "embedder": embedder,
        "pool_rows": len(pool),
        "user_rows": user_rows,
        "picks": picks.to_json(),
        "ids": [e.id for e in chosen],
        "contents": [content_hash(e) for e in chosen],
        "refusals": refusals_among(chosen, pool, config.refusals),
        "coverage": coverage(chosen),
        "pool_coverage": coverage(pool),
    }


def refusals_among(chosen: Sequence[Example], pool: Sequence[Example], told: str) -> dict[str, Any] | None:
    """Return how many picks refuse, and how many rows of the pool; None where no tag tells."""
    try:
        known = sum(refusing(pool, told))
    except DataError:
        return None
    tag, _, value = told.partition("=")
    return {"tag": told, "picked": sum(str(e.tags.get(tag)) == value for e in chosen), "pool": known}


def coverage(examples: Sequence[Example], tags: Sequence[str] = ("kind", "role", "group", "source")) -> dict[str, Any]:
    """Return, for each tag that occurs, how many rows have each value."""
    found: dict[str, Any] = {}
    for tag in tags:
        counts = Counter(str(e.tags[tag]) for e in examples if tag in e.tags)
        if counts:
            found[tag] = dict(sorted(counts.items()))
    return found


def by_tag(examples: Sequence[Example], tag: str) -> dict[str, list[Example]]:
    """Split rows by the value of a tag: one set of safe rows, and so one constraint of SPAG, for each topic.

    Raises:
        DataError: a row lacks the tag.
    """
    out: dict[str, list[Example]] = {}
    for i, e in enumerate(examples):
        if tag not in e.tags:
            raise DataError(f"row {e.id or i + 1} has no tag {tag!r} to split by", hint="add it, or do not split")
        out.setdefault(str(e.tags[tag]), []).append(e)
    return out
