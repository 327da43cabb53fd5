"""Relevance-diversity selection: greedy MAP of a weighted determinantal point process, without its kernel.

For rows phi_i, relevance q_i and exponent beta the kernel is         L_ij = (q_i q_j)^beta (K_ij + eps [i = j])   (1)
with K = phi phi'. Greedy MAP adds, k times, the row of largest gain   L_ii - L_iC L_CC^-1 L_Ci                     (2)
With r_i the residual (Schur complement) of K + eps I, (2) is          exp(w_i) r_i,   w_i = 2 beta log q_i        (3)
so weights factor out, and the pick is argmax w_i + log r_i. For K = phi phi' the residual needs no kernel either:
    pick j:  c = B phi_j,  b = (phi_j - B' c) / sqrt(r_j),  e_i = phi_i . b,  r_i <- r_i - e_i^2                    (4)
Start: r_i = |phi_i|^2 + eps, B empty. This is weighted column-pivoted orthogonalisation; log det L_C adds up log gains.

Blocks. Residuals only fall, so a stale score is an upper bound. A shortlist of the T best stale scores is kept exact,
in float64, and rows are picked from it while its best provably beats every stale score outside; then one matrix product
brings all residuals up to date. Picks are those of the plain loop. Stale residuals are kept in the rows' own precision
with a bound on its error; near the rank, where that bound says nothing, they are recomputed in float64, tile by tile.

Past the rank every residual is eps x (1 + leverage): still a meaningful order, as eps stands inside the weighting.
Ties (log scores within TIE) go to the lowest index.

Letters: n rows, d dimensions, k picks, T shortlist; never an array of n x n, n x m or n x k.
Source: Chen et al., arXiv 2605.28030, section on RD-DPP; Chen et al. 2018 (the recurrence); Minoux 1978 (lazy greedy).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from casehard.errors import DataError

TIE = 1e-10
"""Log scores closer than this are equal."""
JITTER = 1e-6
"""eps of (1). Source: the published code, which adds it to the weighted kernel instead."""
TILE = 8192
_BLOCK, _SHORTLIST = 64, 256
_COPY = 1 << 28  # largest float64 copy of the rows, bytes; beyond it tiles are widened one at a time
ZERO = 1e-12
"""Residual, in units of the largest row, that counts as zero without jitter."""


class Greedy(NamedTuple):
    """What greedy MAP picked, in order."""

    order: list[int]
    log_gains: list[float]
    """log of (2) at each pick; their sum is log det L_C. Without weights they never rise."""
    exhausted_at: int | None
    """Number of picks after which all residuals were down at the jitter: the rows span no more; None if never."""
    passes: int
    """Products with all rows."""

    @property
    def log_det(self) -> float:
        """log det of L over the picks; -inf once a gain is zero."""
        return math.fsum(self.log_gains) if -math.inf not in self.log_gains else -math.inf


def log_weights(q: torch.Tensor, beta: float) -> torch.Tensor:
    """Return w of (3), (n,) float64; relevance is clamped to 0..1 (a negative cosine is no relevance).

    Args:
        q: relevance, (n,).
        beta: exponent >= 0; 0 is diversity only, and ignores q.
    """
    if beta == 0:
        return torch.zeros(len(q), dtype=torch.float64)
    return 2.0 * beta * q.double().clamp(0.0, 1.0).log()


def unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """Return rows of length 1, (n, d), in fp32 or wider.

    Raises:
        DataError: a row is not finite or is zero; names the first.
    """
    if rows.ndim != 2 or rows.shape[0] == 0 or rows.shape[1] == 0:
        raise DataError(f"embeddings of shape {tuple(rows.shape)}: expected rows x dimensions, at least 1 x 1")
    rows = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
    # Large rows must not overflow in the square, nor small ones vanish.
    size = rows.abs().amax(1, keepdim=True)
    bad = ~(torch.isfinite(size) & (size > 0)).squeeze(1)
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        what = "is zero" if bool(torch.isfinite(size[i])) else "is not finite"
        raise DataError(f"embedding of row {i} {what} ({int(bad.sum())} of {len(rows)} rows cannot be used)")
    rows = rows / size
    return rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))


def relevance(pool: torch.Tensor, task: torch.Tensor, *, tile: int = 2048) -> torch.Tensor:
    """Return q_i = max_z <pool_i, task_z>, clamped to 0..1, (n,); a running maximum over tiles, never n x m.

    Args:
        pool: unit rows, (n, d).
        task: unit rows, (m, d), m >= 1.
    """
    best = torch.full((len(pool),), -math.inf, dtype=pool.dtype, device=pool.device)
    for a in range(0, len(pool), tile):
        for b in range(0, len(task), tile):
            part = (pool[a : a + tile] @ task[b : b + tile].T).amax(1)
            torch.maximum(best[a : a + tile], part, out=best[a : a + tile])
    return best.clamp_(0.0, 1.0)


def directions(rows: torch.Tensor) -> int:
    """Return how many directions rows span, up to rounding in their precision; of many rows, 4 d of them are asked.

    Args:
        rows: unit rows, (n, d).
    """
    some = rows[:: max(1, len(rows) // (4 * rows.shape[1]))].double()
    gram = some.T @ some if len(some) >= rows.shape[1] else some @ some.T
    values = torch.linalg.eigvalsh(gram)
    cut = max(some.shape) * torch.finfo(torch.float32).eps
    return int((values > float(values[-1]) * cut**2).sum())


def greedy_map(
    rows: torch.Tensor,
    k: int,
    *,
    weights: torch.Tensor | None = None,
    jitter: float = JITTER,
    block: int = _BLOCK,
    shortlist: int = _SHORTLIST,
) -> Greedy:
    """Pick ``k`` rows by greedy MAP (2); all of them, in greedy order, when k >= n.

    Args:
        rows: phi, (n, d), unit rows for a cosine kernel; fp32 or fp64 (others are widened a tile at a time).
        k: picks, >= 1.
        weights: w of (3), (n,); -inf excludes a row until nothing else is left. None = no weights.
        jitter: eps of (1), >= 0. With 0, picks past the rank have gain 0 and follow w, then the index.
        block: most picks between two products with all rows.
        shortlist: rows kept exact between them.
    """
    return _Loop(rows, min(k, len(rows)), weights, jitter, block, shortlist).run()


def log_residuals(r: torch.Tensor, jitter: float, scale: float) -> torch.Tensor:
    """Return log r; with jitter r cannot fall below it, without it what is left of a spanned row is rounding."""
    if jitter > 0:
        return r.clamp(min=jitter).log()
    return torch.where(r > ZERO * scale, r, torch.zeros((), dtype=r.dtype, device=r.device)).log()


def best_index(score: torch.Tensor, left: torch.Tensor) -> int:
    """Return the lowest index among the best of what is left; among all of it when nothing scores above -inf."""
    score = torch.where(left, score, -math.inf)
    top = score.max()
    tied = left & (score >= top - TIE) if bool(top > -math.inf) else left
    return int(tied.to(torch.uint8).argmax())


class _Loop:
    """State of one greedy run: residuals r (n,), basis B (k, d), picks so far."""

    def __init__(
        self, rows: torch.Tensor, k: int, weights: torch.Tensor | None, jitter: float, block: int, shortlist: int
    ) -> None:
        n, d = rows.shape
        self.rows, self.k, self.jitter, self.block, self.size = rows, k, jitter, block, shortlist
        device = rows.device
        zeros = torch.zeros(n, dtype=torch.float64, device=device)
        self.w = zeros if weights is None else weights.to(device=device, dtype=torch.float64)
        self.start = torch.cat([self._wide(slice(a, a + TILE)).square().sum(1) for a in range(0, n, TILE)])
        self.start += jitter
        self.r = self.start.clone()
        self.scale = float(self.start.max())
        self.basis = torch.zeros(k, d, dtype=torch.float64, device=device)
        self.left = torch.ones(n, dtype=torch.bool, device=device)
        self.order: list[int] = []
        self.gains: list[float] = []
        self.fresh = 0
        self.passes = 0
        self.exact = rows.dtype == torch.float64
        narrow = float(torch.finfo(torch.float32).eps) * math.sqrt(d) * 2.0 * self.scale
        self.error = 0.0 if self.exact else narrow
        self.floor = max(100.0 * jitter, ZERO * self.scale)
        self.exhausted: int | None = None

    def _wide(self, part: slice | torch.Tensor | int) -> torch.Tensor:
        return self.rows[part].double()

    def run(self) -> Greedy:
        while len(self.order) < self.k:
            before = len(self.order)
            if before == 0 or self.exact:
                # All residuals are exact here, so the best of all is known.
                score = self.w + self._log(self.r)
                if not bool((score[self.left] > -math.inf).any()):
                    self._fill()
                    break
                self._take(best_index(score, self.left))
            self._from_shortlist()
            # One product for a handful of picks means the error bound hides the differences: go exact.
            poor = len(self.order) - before < min(4, self.k - before)
            self._refresh(exact=not self.exact and before > 0 and poor)
        return Greedy(self.order, self.gains, self.exhausted, self.passes)

    def _log(self, r: torch.Tensor) -> torch.Tensor:
        return log_residuals(r, self.jitter, self.scale)

    def _fill(self) -> None:
        """Take what is left and gains nothing, by weight, then index."""
        if self.exhausted is None:
            self.exhausted = len(self.order)
        rest = torch.where(self.left, self.w, -math.inf).tolist()
        by_weight = sorted(self.left.nonzero().flatten().tolist(), key=lambda i: (-rest[i], i))
        more = by_weight[: self.k - len(self.order)]
        self.order += more
        self.gains += [-math.inf] * len(more)

    def _take(self, j: int) -> torch.Tensor:
        """Add row j to the picks and return its new direction b of (4)."""
        t = len(self.order)
        phi, basis = self._wide(j), self.basis[:t]
        c = basis @ phi
        r = max(float(self.start[j]) - float(c @ c), self.jitter)
        if self.exhausted is None and r < self.floor:
            self.exhausted = t
        self.order.append(j)
        self.gains.append(float(self.w[j]) + math.log(r))
        self.left[j] = False
        self.basis[t] = (phi - c @ basis) / math.sqrt(r)
        return self.basis[t]

    def _from_shortlist(self) -> None:
        """Pick from the rows of highest stale score while they provably beat all others."""
        inside, bound, first = self._shortlist()
        if len(inside) == 0:
            return
        phi = self._wide(inside)
        e = phi @ self.basis[: len(self.order)].T
        r = self.start[inside] - e.square_().sum(1)
        w, left = self.w[inside], self.left[inside].clone()
        stop = min(self.k, self.fresh + self.block)
        while len(self.order) < stop and bool(left.any()):
            score = w + self._log(r)
            i = best_index(score, left)
            best, j = float(score[i]), int(inside[i])
            if best == -math.inf:
                return
            if not (best > bound + TIE or (self.error == 0.0 and best >= bound - TIE and j < first)):
                return
            left[i] = False
            r -= (phi @ self._take(j)).square_()

    def _shortlist(self) -> tuple[torch.Tensor, float, int]:
        """Return the T best rows by stale score (ascending), the best score outside and its lowest index."""
        stale = self.w + self._log(self.r + self.error)
        stale[~self.left] = -math.inf
        count = int(self.left.sum())
        if count <= self.size:
            return self.left.nonzero().squeeze(1), -math.inf, len(stale)
        edge = float(stale.topk(self.size + 1).values[-1])
        inside = (stale > edge + TIE).nonzero().squeeze(1)
        outside = self.left & (stale <= edge + TIE)
        return inside, edge + TIE, int(outside.to(torch.uint8).argmax())

    def _refresh(self, *, exact: bool) -> None:
        """Bring all residuals up to date with the basis; with ``exact``, from the start and in float64."""
        done = len(self.order)
        if done == self.k:
            return
        if exact:
            self.exact, self.error, self.fresh = True, 0.0, 0
            self.r.copy_(self.start)
            if self.rows.numel() * 8 <= _COPY:
                self.rows = self.rows.double()
        dtype = torch.float64 if self.exact else torch.float32
        new = self.basis[self.fresh : done].to(dtype).T.contiguous()
        for a in range(0, len(self.r), TILE):
            e = self.rows[a : a + TILE].to(dtype) @ new
            self.r[a : a + TILE] -= e.square_().sum(1)
        self.fresh = done
        self.passes += 1
