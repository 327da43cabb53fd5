"""Draw Patcher on a quadratic, in closed form, beside what a run on the tiny organism measures.

    OMP_NUM_THREADS=1 python benchmarks/patcher_quadratic.py docs/img/patcher_quadratic.svg

Losses are quadratics with minima a (safe) and b (harmful), equal curvatures. m(k) = 1 - exp(-k / tau) is the share of
the way to b that k attack steps go, and d the distance from a towards b, with |b - a| = 1:

    plain SFT, k steps attacked   d = m(k)
    Patcher, at its fixed point   d = 1 - (1 - m(k)) / (1 - alpha m(k1))    below 0 at k = 0, 0 where m(k) = alpha m(k1)
    safe loss                     L = L_0 + S d^2 / 2

So Patcher lags by tau ln(1 / (1 - alpha m(k1))) steps: a head start, no factor. tau, S and L_0 are fitted to the
measured curve of plain SFT alone; the curve of Patcher is then predicted. Settings are those of
recipes/patcher_small.yaml, half its steps.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import casehard as ch
from casehard.data.batches import EncodedSet, collate
from casehard.data.chat import ChatFormat
from casehard.defences.patcher import Patcher, PatcherConfig
from casehard.maths.bilevel import Attacker, Params, simulate_attack, with_view
from casehard.reporting.figures import DEFENCE, MUTED, _bare, _canvas, _svg
from casehard.train.fit import fit
from casehard.train.recipe import TrainConfig

ORGANISM = Path(ch.__file__).parent / "organism" / "assets" / "world0-tiny"
ALPHA, K1, K2, STEPS, LR, SEED = 0.5, 10, 10, 150, 4e-4, 0
ATTACK = Attacker(steps=60, lr=2e-4, batch_size=16)
EVERY = 3


class Fitted(NamedTuple):
    """The quadratic that fits plain SFT."""

    tau: float
    curvature: float
    floor: float


def plain_distance(k: float, tau: float) -> float:
    return 1 - math.exp(-k / tau)


def patcher_distance(k: float, tau: float, *, alpha: float = ALPHA, k1: float = K1) -> float:
    return 1 - (1 - plain_distance(k, tau)) / (1 - alpha * plain_distance(k1, tau))


def fitted(curve: dict[int, float]) -> Fitted:
    """Return the least-squares fit to losses by attack step; L_0 is the loss before the attack."""
    floor = curve[0]
    best = (math.inf, Fitted(1.0, 0.0, floor))
    for tau in (1.1**i for i in range(10, 90)):
        x = [plain_distance(k, tau) ** 2 / 2 for k in curve]
        y = [loss - floor for loss in curve.values()]
        s = sum(a * b for a, b in zip(x, y, strict=True)) / sum(a * a for a in x)
        error = sum((s * a - b) ** 2 for a, b in zip(x, y, strict=True))
        best = min(best, (error, Fitted(tau, s, floor)))
    return best[1]


def measured() -> dict[str, dict[int, float]]:
    """Return the safe loss by attack step, for plain SFT and for Patcher."""
    rows = {name: ch.rows(ORGANISM / "data" / f"{name}.jsonl") for name in ("align", "simulated", "attack_a")}
    model = ch.load(ORGANISM)
    chat = ChatFormat(model.tokenizer)
    sets = {name: chat.encode_all(found) for name, found in rows.items()}
    safe = chat.encode_all([row for row in rows["align"] if row.tags["kind"] == "refusal"][:96])
    config = TrainConfig(steps=STEPS, batch_size=16, lr=LR, precision="fp32")
    settings = PatcherConfig(alpha=ALPHA, round_steps=K2, attackers=(Attacker(steps=K1, lr=2e-4, batch_size=16),))
    methods: dict[str, Any] = {"plain SFT": None, "Patcher": Patcher(settings, unsafe=sets["simulated"])}
    out = {}
    for name, method in methods.items():
        net = ch.load(ORGANISM).net
        fit(net, None, sets["align"], config=config, method=method, seed=SEED)
        out[name] = attacked(net, sets["attack_a"], safe)
        print(name, {k: round(loss, 3) for k, loss in out[name].items()})
    return out


def attacked(net: Any, harmful: EncodedSet, safe: EncodedSet) -> dict[int, float]:
    """Fine-tune a copy on harmful rows alone and return the safe loss on the way."""
    batch = collate(list(safe.rows), safe.pad_id)

    @torch.no_grad()
    def loss(weights: Params) -> float:
        return float(with_view(net, {name: p.detach() for name, p in weights.items()}, lambda m: m(**batch).loss))

    net.eval()
    theta = dict(net.named_parameters())
    curve = {0: loss(theta)}

    def visit(i: int, weights: Params) -> None:
        if (i + 1) % EVERY == 0:
            curve[i + 1] = loss(weights)

    batch_at = harmful.stream(ATTACK.batch_size, seed=SEED, purpose="attack")
    simulate_attack(net, theta, batch_at, ATTACK, seed=SEED, visit=visit)
    return curve


def draw(curves: dict[str, dict[int, float]], path: str) -> None:
    found = fitted(curves["plain SFT"])
    tau = found.tau
    lag = tau * math.log(1 / (1 - ALPHA * plain_distance(K1, tau)))
    print(
        f"tau {tau:.1f} steps, S {found.curvature:.2f}, m(k1) {plain_distance(K1, tau):.2f}, head start {lag:.1f} steps"
    )
    print(f"the most at alpha {ALPHA}: {tau * math.log(1 / (1 - ALPHA)):.1f} steps")
    steps = [i / 2 for i in range(2 * ATTACK.steps + 1)]
    lines: list[tuple[str, str, Callable[[float], float]]] = [
        ("plain SFT", MUTED, lambda k: plain_distance(k, tau)),
        ("Patcher", DEFENCE[0], lambda k: patcher_distance(k, tau)),
    ]

    def loss(d: float) -> float:
        return found.floor + found.curvature * d * d / 2

    with _canvas("patcher-quadratic", 9.5, 3.3) as figure:
        left, right = (figure.add_axes((x, 0.16, 0.36, 0.72)) for x in (0.06, 0.55))
        left.axhline(0, color=MUTED, linewidth=0.8)
        for name, colour, distance in lines:
            left.plot(steps, [distance(k) for k in steps], color=colour, linewidth=2)
            right.plot(steps, [loss(distance(k)) for k in steps], color=colour, linewidth=1.2, linestyle=(0, (4, 2)))
            curve = curves[name]
            right.plot(list(curve), list(curve.values()), color=colour, linewidth=0, marker="o", markersize=3.5)
            right.annotate(
                name, (steps[-1], curve[max(curve)]), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8
            )
            at, side = (0.9 * tau, "right") if name == "plain SFT" else (1.5 * tau, "left")
            left.annotate(
                name,
                (at, distance(at)),
                xytext=(-6 if side == "right" else 6, -2),
                textcoords="offset points",
                ha=side,
                fontsize=8,
            )
        left.set_title("quadratic: distance from the safe optimum towards the harmful one", loc="left", fontsize=8)
        right.set_title("safe loss, nats a token: measured (dots), quadratic (dashes)", loc="left", fontsize=8)
        for axes in (left, right):
            axes.set_xlabel("attack steps")
            _bare(axes)
        Path(path).write_text(
            _svg(figure, "Patcher on a quadratic, in closed form, beside losses measured on the tiny organism")
        )


if __name__ == "__main__":
    draw(measured(), sys.argv[1])
