"""Merge a user's LoRA update with the provider's reinforcing one, exactly and in factor space.

Per layer, with Delta_X = s_X B_X A_X and Q an orthonormal basis of the user's output space (``lowrank_bases``):

    Delta = c_U Delta_U + c_R (I - alpha Q Q') Delta_R                                                       (5)

Form ``concat`` (rank r_U + r_R, a portable adapter), with C = Q' B_R:
    B = [c_U s_U B_U, c_R s_R (B_R - alpha Q C)],   A = [A_U; A_R],   scale 1                                (6)
Form ``absorb`` (rank r_U): Q = B_U H, so the correction lives in the user's adapter and the provider's stays as it is,
shared by all users, served at weight c_R:
    Delta = B_U A_U' + c_R Delta_R,   A_U' = c_U s_U A_U - alpha c_R s_R H C A_R                             (7)

What is projected off is the whole output space of the user, Q Q' W_R; the bases ``paper`` and ``output`` differ in how
they find it. ``protect_safety`` swaps the roles: the user is projected off the reinforcing update.

Letters as in ``lowrank_bases``.
Source: Ham et al., arXiv 2605.24550, section 5.3, eqs. 5-9 (basis ``paper``, alpha 0.1, both coefficients 1/2).
Differs: independent coefficients; layers that only one adapter has are kept at that adapter's coefficient, where the
published code drops those of the reinforcing one; factors instead of a dense half-precision sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch

from casehard.errors import ConfigError, DataError, Unsupported
from casehard.limits import Coefficient, Fraction, Limited, Rank, Share
from casehard.maths.lora import Basis as Basis
from casehard.maths.lora import LoraPair as LoraPair
from casehard.maths.lora import check_pair, core_basis, inner, paper_basis, scaled
from casehard.maths.lora import compress as compress
from casehard.maths.lora import dense_parity as dense_parity

BasisName = Literal["paper", "output"]
Form = Literal["concat", "absorb"]
BASES: tuple[str, ...] = get_args(BasisName)
FORMS: tuple[str, ...] = get_args(Form)


@dataclass(frozen=True, kw_only=True)
class MergeConfig(Limited):
    """How two adapters are merged. The defaults are ours, from docs/evidence/buffer_frontier.md: the whole of the
    user's update, projected off the reinforcing one, and half of that."""

    c_user: Coefficient = 1.0
    """c_U of (5). Paper: 1/2."""
    c_reinforce: Coefficient = 0.5
    """c_R of (5). Paper: 1/2."""
    alpha: Share = 1.0
    """Share of the overlap that is removed, 0..1. Paper: 0.1."""
    basis: BasisName = "output"
    """What is projected off. Paper: ``paper``, which invents directions when B_U has deficient rank."""
    form: Form = "concat"
    """``concat``: one portable adapter. ``absorb``: the user's rank, served beside the reinforcing adapter."""
    tau: Fraction = 1e-2
    """Relative cut: on eigenvalues of A A' for ``paper`` (published code), on singular values of B A otherwise."""
    protect_safety: bool = True
    """Project the user off the reinforcing update. Paper: False, the reinforcing update is projected off the user."""
    rank: Rank | None = None
    """Cut the merged update to this rank, with the error reported; None: exact. ``concat`` only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, known in (("basis", self.basis, BASES), ("form", self.form, FORMS)):
            if value not in known:
                raise ConfigError(f"merge: unknown {name} {value!r}", hint=f"one of {', '.join(known)}")
        if self.rank is not None and self.form != "concat":
            raise ConfigError(f"merge: rank {self.rank} with form {self.form}", hint="a rank only with form concat")


class LayerReport(NamedTuple):
    """What merging did to one layer."""

    kept: int
    """Directions projected off, K."""
    norm_user: float
    """||Delta_U||, Frobenius."""
    norm_reinforce: float
    """||Delta_R||."""
    cosine: float
    """Between Delta_U and Delta_R; 0 when either is zero."""
    removed: float
    """Energy of the projected part over that of the update it is taken from, before alpha."""
    growth: float
    """||A_U'|| / ||c_U s_U A_U|| of form ``absorb``: large values lose digits in half precision; 1 otherwise,
    and where c_U is 0."""
    error: float
    """Relative error of cutting the rank; 0 without."""
    invented: bool
    """Whether the basis holds directions that the update lacks (``paper`` with a B of deficient rank)."""


class MergedLayer(NamedTuple):
    """One merged layer."""

    pair: LoraPair
    report: LayerReport


class MergeResult(NamedTuple):
    """A merged adapter."""

    layers: dict[str, LoraPair]
    """Scale 1 each; with form ``absorb`` without the layers that only the reinforcing adapter has."""
    reports: dict[str, LayerReport]
    """Of the layers that both have."""
    user_only: tuple[str, ...]
    reinforce_only: tuple[str, ...]
    reinforce_weight: float | None
    """Weight at which the unmodified reinforcing adapter is served beside it (``absorb``); None: it is inside."""
    notes: tuple[str, ...]
    """What the user should be told."""


class _Part(NamedTuple):
    """What is taken off the moving update B A (scales left out): ``q c A``."""

    k: int
    q: torch.Tensor
    c: torch.Tensor
    h: torch.Tensor | None


def basis_of(fixed: LoraPair, config: MergeConfig, *, peer_rank: int) -> Basis:
    """Return the basis that ``config.basis`` names, of ``fixed``'s output space."""
    if config.basis == "paper":
        return paper_basis(fixed, config.tau, peer_rank=peer_rank)
    return core_basis(fixed, config.tau)


def _part(fixed: LoraPair, moving: LoraPair, config: MergeConfig) -> _Part:
    """Return what ``config.basis`` projects off ``moving``; its scale is left out."""
    basis = basis_of(fixed, config, peer_rank=moving.rank)
    return _Part(basis.q.shape[1], basis.q, basis.q.T @ moving.b.double(), basis.h)


def _concat(user: LoraPair, reinforce: LoraPair, part: _Part, config: MergeConfig) -> torch.Tensor:
    """Return B of (6), float64."""
    pairs = [(user, config.c_user * user.scale), (reinforce, config.c_reinforce * reinforce.scale)]
    blocks = [weight * pair.b for pair, weight in pairs]
    moving = 0 if config.protect_safety else 1
    step = config.alpha * pairs[moving][1]
    if step != 0 and part.k > 0:
        blocks[moving] -= step * (part.q @ part.c)
    return torch.cat(blocks, dim=1)


def _absorb(user: LoraPair, reinforce: LoraPair, part: _Part, config: MergeConfig) -> tuple[LoraPair, float]:
    """Return (7), float64, and by how much A grew; the correction of ``protect_safety`` is one of the user's B."""
    a, b = user.a, user.b
    w_user, step = config.c_user * user.scale, config.alpha * config.c_reinforce * reinforce.scale
    if part.k == 0 or (step == 0 and not config.protect_safety):
        return LoraPair(a, w_user * b), 1.0
    if config.protect_safety:
        return LoraPair(a, w_user * (b - config.alpha * (part.q @ part.c))), 1.0
    if part.h is None:
        raise Unsupported(
            "absorb: B of the user's adapter has deficient rank, so the published basis holds directions it lacks",
            hint="use basis output, or form concat",
        )
    moved = w_user * a - step * (part.h @ part.c @ reinforce.a)
    before = abs(w_user) * float(a.norm())
    return LoraPair(moved, b), float(moved.norm()) / before if before > 0 else 1.0


def merge_pair(user: LoraPair, reinforce: LoraPair, config: MergeConfig, *, name: str = "layer") -> MergedLayer:
    """Merge one layer, (5): form (6) or (7).

    Args:
        user: the tuned adapter's update.
        reinforce: the provider's.
        config: coefficients, basis, form.
        name: of the layer, for messages.

    Returns:
        Factors of scale 1, fp32 (float64 if an input is), computed in float64.

    Raises:
        DataError: factors that do not fit each other.
        Unsupported: form ``absorb`` with basis ``paper`` and a B_U of deficient rank.

    Source: arXiv 2605.24550, eqs. 5-9.
    """
    check_pair(user, f"user, {name}")
    check_pair(reinforce, f"reinforce, {name}")
    shapes = [(p.b.shape[0], p.a.shape[1]) for p in (user, reinforce)]
    if shapes[0] != shapes[1]:
        raise DataError(
            f"{name}: the user's update is {shapes[0]}, the reinforcing one {shapes[1]}",
            hint="both adapters must be for the same base model",
        )
    shared = torch.cat([user.a, reinforce.a])  # before widening: A keeps its bytes
    dtype = torch.promote_types(torch.float32, shared.dtype)
    for b in (user.b, reinforce.b):
        dtype = torch.promote_types(dtype, b.dtype)
    user, reinforce = user.wide(), reinforce.wide()
    fixed, moving = (reinforce, user) if config.protect_safety else (user, reinforce)
    part = _part(fixed, moving, config)
    growth, error = 1.0, 0.0
    if config.form == "absorb":
        pair, growth = _absorb(user, reinforce, part, config)
    else:
        pair = LoraPair(shared, _concat(user, reinforce, part, config))
        if config.rank is not None and config.rank < pair.rank:
            pair, error = compress(pair, config.rank)
    report = _report(user, reinforce, part, config, growth=growth, error=error)
    return MergedLayer(LoraPair(pair.a.to(dtype).contiguous(), pair.b.to(dtype).contiguous()), report)


def _report(
    user: LoraPair, reinforce: LoraPair, part: _Part, config: MergeConfig, *, growth: float, error: float
) -> LayerReport:
    squares = {"user": max(inner(user, user), 0.0), "reinforce": max(inner(reinforce, reinforce), 0.0)}
    u, r = math.sqrt(squares["user"]), math.sqrt(squares["reinforce"])
    moving = user if config.protect_safety else reinforce
    whole = squares["user" if config.protect_safety else "reinforce"]
    taken = 0.0
    if part.k > 0 and whole > 0:
        taken = moving.scale**2 * float((part.c @ moving.a).square().sum()) / whole
    cosine = inner(user, reinforce) / (u * r) if u * r > 0 else 0.0
    return LayerReport(part.k, u, r, cosine, taken, growth, error, invented=part.h is None)


def merge_layer(
    user: LoraPair | None, reinforce: LoraPair | None, config: MergeConfig, *, name: str = "layer"
) -> tuple[LoraPair | None, LayerReport | None]:
    """Merge one layer of the union: :func:`merge_pair`, or the one adapter that has it, at its coefficient.

    Returns:
        The factors (None: nothing to store, form ``absorb`` serves the reinforcing adapter itself) and, where both
        adapters have the layer, the report.
    """
    if user is not None and reinforce is not None:
        merged = merge_pair(user, reinforce, config, name=name)
        return merged.pair, merged.report
    if user is not None:
        check_pair(user, f"user, {name}")
        pair = scaled(user, config.c_user)
    else:
        assert reinforce is not None
        check_pair(reinforce, f"reinforce, {name}")
        if config.form == "absorb":
            return None, None
        pair = scaled(reinforce, config.c_reinforce)
    # Layers of one adapter only are no reason for a larger common rank than was asked for.
    if config.rank is not None and config.rank < pair.rank:
        pair = compress(pair, config.rank).pair
    return pair, None


def notes_of(
    user: Mapping[str, Any], reinforce: Mapping[str, Any], reports: Mapping[str, LayerReport], config: MergeConfig
) -> tuple[str, ...]:
    """Return what the user of a merge should be told: layers of one adapter only, large factors, cut ranks."""
    out = []
    both = [name for name in user if name in reinforce]
    if not both:
        out.append("the two adapters share no layer: nothing was projected")
    for one, other, who, c in (
        (user, reinforce, "the user's adapter", config.c_user),
        (reinforce, user, "the reinforcing adapter", config.c_reinforce),
    ):
        lone = sorted(set(one) - set(other))
        if lone:
            out.append(f"{len(lone)} layers only {who} has, kept at {c:g}: {lone[0]}{' ...' if lone[1:] else ''}")
    large = {name: r.growth for name, r in reports.items() if r.growth > 4}
    if large:
        worst = max(large, key=lambda name: large[name])
        out.append(
            f"in {len(large)} layers the user's A grew, most in {worst} ({large[worst]:.1f} x): "
            "keep the adapter in fp32, or raise tau"
        )
    invented = [name for name, r in reports.items() if r.invented]
    if invented:
        out.append(
            f"in {len(invented)} layers B has deficient rank, and the published basis projects off directions that the "
            f"update does not have, first {invented[0]}: use basis output"
        )
    return tuple(out)


def merge_states(user: Mapping[str, LoraPair], reinforce: Mapping[str, LoraPair], config: MergeConfig) -> MergeResult:
    """Merge two adapters held in memory, layer by layer, over the union of their layers.

    Args:
        user: layer -> update; ranks may differ between layers and adapters.
        reinforce: the provider's, for the same base.
        config: coefficients, basis, form.

    Raises:
        DataError: nothing to merge, or factors that do not fit each other.
        Unsupported: see :func:`merge_pair`.
    """
    if not user and not reinforce:
        raise DataError("merge: neither adapter has a layer")
    layers, reports = {}, {}
    for name in sorted({*user, *reinforce}):
        pair, report = merge_layer(user.get(name), reinforce.get(name), config, name=name)
        if pair is not None:
            layers[name] = pair
        if report is not None:
            reports[name] = report
    return MergeResult(
        layers,
        reports,
        tuple(sorted(set(user) - set(reinforce))),
        tuple(sorted(set(reinforce) - set(user))),
        config.c_reinforce if config.form == "absorb" else None,
        notes_of(user, reinforce, reports, config),
    )
