"""LoRA updates as pairs of factors, and orthonormal bases of what they write, never d_out x d_in.

An update is s B A. Its output space, col(B A), is the space an update of another adapter can be projected off:

    core:    B = Q_B R_B,  A' = Q_A R_A,  R_B R_A' = P S T',  k = #{sigma_i > tau sigma_1},  Q = Q_B P_k     (1)
    paper:   G = A A',  V = eigenvectors of G with lambda > tau lambda_1,  B V = Q R                        (2)

(1) is the rank-revealing way: it depends on the product B A only, not on how it is split (gauge); k = 0 when B A = 0.
(2) is the published way. It looks at A alone, which stays close to its random start while B is what collapses: a B of
deficient rank yields directions that B A does not have. Both are a product with B, Q = B H:

    core:    H = R_A' T_k S_k^-1            paper:   H = V R^-1                                             (3)

Everything here is float64: H divides by small singular values.
Letters: O = d_out, I = d_in, R rank, K kept directions.
Source: Ham et al., arXiv 2605.24550, section 5.3 (2); (1) and (3) are linear algebra.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from casehard.errors import DataError

FLOOR = 1e-12
"""Smallest sigma / sigma_1 that counts as a direction, whatever tau: below it lies the rounding of float64."""


class LoraPair(NamedTuple):
    """The update of one linear layer, ``scale * b @ a``."""

    a: torch.Tensor
    """(r, d_in)."""
    b: torch.Tensor
    """(d_out, r)."""
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Columns of b."""
        return self.b.shape[1]

    def wide(self) -> LoraPair:
        """Return the factors in float64."""
        return LoraPair(self.a.double(), self.b.double(), self.scale)

    def delta(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """Return the dense update (d_out, d_in); for tests and small layers."""
        return self.scale * (self.b.to(dtype) @ self.a.to(dtype))


class Basis(NamedTuple):
    """An orthonormal basis of an output space."""

    q: torch.Tensor
    """(d_out, K), float64; K may be 0."""
    h: torch.Tensor | None
    """(r, K): Q = B H; None where B does not span Q (paper basis of a rank-deficient B)."""


def check_pair(pair: LoraPair, name: str) -> None:
    """Raise DataError unless the factors are matrices that fit each other."""
    a, b = tuple(pair.a.shape), tuple(pair.b.shape)
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in (*a, *b):
        raise DataError(f"{name}: factors A {a} and B {b} do not fit", hint="A is (r, d_in), B is (d_out, r)")
    if not math.isfinite(pair.scale):
        raise DataError(f"{name}: scale is {pair.scale}")


def _empty(pair: LoraPair) -> Basis:
    b = pair.b.double()
    none_OK, none_RK = b[:, :0], b.new_zeros(pair.rank, 0)
    return Basis(none_OK, none_RK)


def core_basis(pair: LoraPair, tau: float) -> Basis:
    """Return the basis (1) of an update's output space, with (3).

    Args:
        pair: the update; its scale does not matter.
        tau: singular values at or below ``tau`` times the largest are left out, in [0, 1).

    Source: design of this library; equals (2) when both factors have full rank and nothing is left out.
    """
    a, b = pair.a.double(), pair.b.double()
    left, r_b = torch.linalg.qr(b)
    # R only: the orthonormal factor of A' is never needed, see (3).
    r_a = torch.linalg.qr(a.T, mode="r").R
    p, sigma, t_h = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    if not float(sigma[0]) > 0:
        return _empty(pair)
    k = int((sigma > max(tau, FLOOR) * sigma[0]).sum())
    p, sigma, t = p[:, :k], sigma[:k], t_h[:k].T
    return Basis(left @ p, r_a.T @ t / sigma)


def _published_span(pair: LoraPair, tau: float, peer_rank: int) -> torch.Tensor:
    """Return V of (2), (r, k); the identity where the published code takes B whole."""
    a = pair.a.double()
    values, vectors = torch.linalg.eigh(a @ a.T)
    kept = values > tau * values[-1]
    if int(kept.sum()) in (0, peer_rank):
        return torch.eye(pair.rank, dtype=torch.float64, device=a.device)
    return vectors[:, kept]


def paper_basis(pair: LoraPair, tau: float, *, peer_rank: int) -> Basis:
    """Return the published basis (2): QR of B, restricted to the leading eigenvectors of A A'.

    Args:
        pair: the update projected off.
        tau: eigenvalues of A A' at or below ``tau`` times the largest are left out.
        peer_rank: rank of the other adapter. The published code takes B whole when as many eigenvalues are kept as the
            *other* adapter has columns; so does this.

    Differs: B = 0 gives no direction at all, where QR of zeros returns the first coordinate axes.
    """
    b = pair.b.double()
    if not bool(b.any()):
        return _empty(pair)
    v = _published_span(pair, tau, peer_rank)
    q, r = torch.linalg.qr(b @ v)
    diagonal = r.diagonal().abs()
    if float(diagonal.min()) <= FLOOR * float(diagonal.max()) or r.shape[0] < r.shape[1]:
        return Basis(q, None)
    return Basis(q, torch.linalg.solve_triangular(r, v, upper=True, left=False))


def inner(x: LoraPair, y: LoraPair) -> float:
    """Return <Delta_x, Delta_y> = s_x s_y tr((B_x' B_y)(A_y A_x')), in float64."""
    b = x.b.double().T @ y.b.double()
    a = x.a.double() @ y.a.double().T
    return x.scale * y.scale * float((a * b).sum())


class Compressed(NamedTuple):
    """An update cut to a lower rank, and what that cost."""

    pair: LoraPair
    error: float
    """||cut off|| / ||whole||, Frobenius; 0 for a zero update."""


def compress(pair: LoraPair, rank: int) -> Compressed:
    """Return the closest update of rank <= ``rank`` (QR of both factors, SVD of the core), and its relative error.

    Source: Eckart-Young; the error is sqrt(sum of the squared tail of sigma) / ||sigma||.
    """
    dtype = torch.promote_types(pair.b.dtype, torch.float32)
    left, r_b = torch.linalg.qr(pair.b.double())
    right, r_a = torch.linalg.qr(pair.a.double().T)
    p, sigma, t_h = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    sigma = sigma * pair.scale
    root = sigma[:rank].abs().sqrt()
    b = (left @ p[:, :rank] * root * math.copysign(1.0, pair.scale)).to(dtype)
    a = (root[:, None] * (t_h[:rank] @ right.T)).to(dtype)
    whole = float(sigma.norm())
    return Compressed(LoraPair(a, b), float(sigma[rank:].norm()) / whole if whole > 0 else 0.0)


def scaled(pair: LoraPair, weight: float) -> LoraPair:
    """Return ``weight * pair`` with everything folded into B: scale 1, fp32 or wider. A keeps its bytes."""
    dtype = torch.promote_types(torch.float32, torch.promote_types(pair.a.dtype, pair.b.dtype))
    return LoraPair(pair.a.to(dtype), (weight * pair.scale * pair.b.double()).to(dtype))


def dense_parity(
    user: LoraPair,
    reinforce: LoraPair,
    *,
    base: torch.Tensor | None = None,
    alpha: float = 0.1,
    tau: float = 1e-2,
    coefficient: float = 0.5,
    cast: torch.dtype = torch.float16,
    evaluated: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Return what the published way makes of one layer, to compare with; (d_out, d_in), fp32.

    Dense fp32 updates, basis (2) whatever the rank of B, ``coefficient * (W_U + W~_R)`` cast to ``cast`` and, with
    ``base``, added to a copy of the weights in ``cast`` that is then evaluated in ``evaluated``.

    Args:
        user: W_U.
        reinforce: W_R.
        base: the layer's weight; None: return the update alone.
        alpha: share of the overlap that is removed.
        tau: cut on the eigenvalues of A A'.
        coefficient: of both updates.
        cast: type of the sum; torch.float32 for none.
        evaluated: type of the merged weight.

    Returns:
        The update, or with ``base`` the merged weight; in either case after the casts.

    Source: arXiv 2605.24550, eqs. 5-9, and the casts of its published code.
    """
    delta_u, delta_r = user.delta(torch.float32), reinforce.delta(torch.float32)
    q = torch.linalg.qr(user.b.float() @ _published_span(user, tau, reinforce.rank).float()).Q
    update = (coefficient * (delta_u + delta_r - alpha * (q @ (q.T @ delta_r)))).to(cast)
    return update.float() if base is None else (base.to(cast) + update).to(evaluated).float()
