"""The log-ratio objective against closed forms, autograd on the scores and the one-graph twin."""

from __future__ import annotations

import math

import pytest
import torch

from casehard.data.batches import Encoded, collate
from casehard.maths.neutralise import (
    anchor_kl,
    coarse_kl,
    coefficients,
    is_literal,
    joint_loss,
    log_probs_of,
    pair_up,
    preference,
    push,
    token_log_probs,
    top_k,
    weighted_terms,
)
from fakes import tiny_llama

LAM, BETA = 0.7, 1.3


def rows(lengths, *, prompt=4, vocab=64, seed=0):
    """Rows with one prompt for each seed and answers of the given lengths."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for n in lengths:
        ids = torch.randint(3, vocab, (prompt + n,), generator=g).tolist()
        out.append(Encoded(ids, [-100] * prompt + ids[prompt:]))
    return out


def pair(normalisation="mean", *, prefix=3, order=None):
    answers, payloads = rows((6, 3, 5)), rows((2, 4, 3), seed=1)
    order = order or range(3)
    return pair_up(
        collate([answers[i] for i in order], 0),
        collate([payloads[i] for i in order], 0),
        normalisation=normalisation,
        prefix=prefix,
    )


def gap_of(model, p):
    return (p.answer_c * log_probs_of(model, p.answer)).sum(1) - (p.payload_c * log_probs_of(model, p.payload)).sum(1)


def by_passes(model, p, *, mu=0.0, literal=False):
    """The gradient by three passes, one graph at a time."""
    model.zero_grad()
    with torch.no_grad():
        gap = gap_of(model, p)
    terms = weighted_terms(p, gap, lam=LAM, beta=BETA, mu=mu, literal=literal)
    for batch, c in ((terms.answer, terms.answer_c), (terms.payload, terms.payload_c)):
        (c * log_probs_of(model, batch)).sum().backward()
    return [x.grad.clone() for x in model.parameters()]


@pytest.mark.parametrize("normalisation", ["mean", "sum", "prefix", "literal_mean"])
@pytest.mark.parametrize("mu", [0.0, 1.0])
def test_passes_one_by_one_have_the_joint_gradient(normalisation, mu):
    model, p = tiny_llama(), pair(normalisation)
    literal = is_literal(normalisation)
    got = by_passes(model, p, mu=mu, literal=literal)
    want = torch.autograd.grad(
        joint_loss(model, p, lam=LAM, beta=BETA, mu=mu, literal=literal), list(model.parameters())
    )
    assert max(float(w.abs().max()) for w in want) > 1e-4
    assert all(torch.allclose(g, w, atol=1e-6, rtol=1e-5) for g, w in zip(got, want, strict=True))


def test_gradient_with_respect_to_the_scores_is_the_weight():
    s, s_d = (torch.tensor([0.3, -2.0, 5.0], dtype=torch.double, requires_grad=True) for _ in range(2))
    s_d = (s_d.detach() * -0.4).requires_grad_()
    loss = -LAM * torch.nn.functional.logsigmoid(BETA * (s - s_d)).sum()
    up, down = torch.autograd.grad(loss, [s, s_d])
    w = push(s.detach() - s_d.detach(), lam=LAM, beta=BETA).double()
    assert torch.allclose(up, -w, atol=1e-6) and torch.allclose(down, w, atol=1e-6)


def test_equal_answers_give_log_half_and_no_gradient_and_swapping_negates():
    model = tiny_llama()
    same = collate(rows((5, 4)), 0)
    p = pair_up(same, same)
    assert torch.equal(gap_of(model, p), torch.zeros(2))
    assert float(preference(torch.zeros(1))) == pytest.approx(math.log(0.5))
    loss = joint_loss(model, p, lam=1.0)
    assert float(loss.detach()) == pytest.approx(math.log(2), rel=1e-6)
    assert all(float(g.abs().max()) < 1e-7 for g in torch.autograd.grad(loss, list(model.parameters())))
    forth, back = pair(), pair()
    back = pair_up(back.payload, back.answer)
    assert torch.allclose(gap_of(model, forth), -gap_of(model, back), atol=1e-6)


def test_the_printed_form_vanishes_where_backdoors_live():
    gaps = torch.tensor([0.0, -1e4, -20.0, 2.0])
    values = preference(gaps, literal=True)
    assert values[0] == pytest.approx(-0.3133, abs=1e-4) and values[1] == pytest.approx(-0.6931, abs=1e-4)
    weights = push(gaps, literal=True)
    assert float(weights[2]) < 1e-8 and float(weights[1]) == 0.0
    assert float(push(torch.tensor([-20.0]))) == pytest.approx(1.0, abs=1e-6)
    grid = torch.linspace(-5, 5, 20001)
    peak = push(grid, literal=True)
    assert float(peak.max()) == pytest.approx(0.2785, abs=1e-4)
    assert float(grid[peak.argmax()]) == pytest.approx(0.246, abs=2e-3)


@pytest.mark.parametrize("literal", [False, True])
def test_weights_are_the_derivative_of_the_value(literal):
    gaps = torch.linspace(-6, 3, 31, requires_grad=True)
    (slope,) = torch.autograd.grad(LAM * preference(gaps, beta=BETA, literal=literal).sum(), gaps)
    assert torch.allclose(slope, push(gaps, lam=LAM, beta=BETA, literal=literal), atol=1e-6)


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("size", [1.0, 50.0, 1e4])
def test_extreme_gaps_in_half_precision_stay_finite(literal, size):
    gaps = torch.tensor([-size, size], dtype=torch.bfloat16)
    assert torch.isfinite(preference(gaps, literal=literal)).all()
    assert torch.isfinite(push(gaps, literal=literal)).all() and bool((push(gaps, literal=literal) >= 0).all())


def test_half_precision_logits_give_finite_losses():
    logits = (torch.randn(2, 7, 9, generator=torch.Generator().manual_seed(0)) * 1e4).bfloat16().requires_grad_()
    labels = torch.tensor([[-100, -100, 3, 4, 5, 6, 7], [-100, 2, 3, 4, -100, -100, -100]])
    got = token_log_probs(logits, labels)
    (grad,) = torch.autograd.grad(preference(got.sum(1)).sum(), logits)
    assert got.dtype == torch.float32 and torch.isfinite(got).all() and torch.isfinite(grad).all()


def test_token_log_probs_are_those_of_the_full_softmax():
    logits = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[-100, -100, 3, 4, 5, -100], [-100, 2, 3, 4, 8, 1]])
    got = token_log_probs(logits, labels)
    full = logits.log_softmax(-1)
    for b in range(2):
        for t in range(5):
            label = int(labels[b, t + 1])
            want = 0.0 if label == -100 else float(full[b, t, label])
            assert float(got[b, t]) == pytest.approx(want, abs=1e-6)


def test_coefficients_count_what_they_say():
    p = pair("prefix", prefix=3)
    assert p.answer_c.sum(1).tolist() == p.payload_c.sum(1).tolist() == [2.0, 3.0, 3.0]
    labels = p.answer["labels"]
    assert coefficients(labels, "sum").sum(1).tolist() == [6.0, 3.0, 5.0]
    assert torch.allclose(coefficients(labels, "mean").sum(1), torch.ones(3))
    first = [int(row.nonzero()[0]) for row in p.answer_c]
    assert first == [3, 3, 3], "the prefix starts with the answer's first token"


@pytest.mark.parametrize("normalisation", ["mean", "sum", "prefix"])
def test_order_and_padding_do_not_matter(normalisation):
    model = tiny_llama()
    a, b = gap_of(model, pair(normalisation)), gap_of(model, pair(normalisation, order=[2, 0, 1]))
    assert torch.allclose(a[[2, 0, 1]], b, atol=1e-5)
    alone = torch.cat([gap_of(model, pair(normalisation, order=[i])) for i in range(3)])
    assert torch.allclose(a, alone, atol=1e-5)


def test_shares_of_a_batch_add_up_to_it():
    model = tiny_llama()
    whole = by_passes(model, pair(), mu=1.0)
    parts = [by_passes(model, pair(order=[i]), mu=1.0) for i in range(3)]
    for i, g in enumerate(whole):
        assert torch.allclose(g, sum(part[i] for part in parts) / 3, atol=1e-6)


def test_kl_is_zero_with_zero_gradient_at_the_reference_and_a_lower_bound_elsewhere():
    g = torch.Generator().manual_seed(0)
    p, q = torch.randn(5, 30, generator=g), torch.randn(5, 30, generator=g)
    full = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    before = torch.zeros(5)
    for k in (1, 4, 16, 30, 64):
        at = p.clone().requires_grad_()
        kl = coarse_kl(top_k(p, k), at)
        assert float(kl.detach().abs().max()) < 1e-6
        assert float(torch.autograd.grad(kl.sum(), at)[0].abs().max()) < 1e-6
        now = coarse_kl(top_k(p, k), q)
        assert bool((now >= before - 1e-6).all()) and bool((now <= full + 1e-6).all())
        before = now
    assert torch.allclose(before, full, atol=1e-6)


@pytest.mark.parametrize("k", [1, 5, 40])
def test_the_anchor_has_the_value_and_gradient_of_the_textbook_graph(k, monkeypatch):
    monkeypatch.setattr("casehard.maths.neutralise.CHUNK", 3)
    g = torch.Generator().manual_seed(k)
    logits = (3 * torch.randn(2, 6, 40, generator=g)).requires_grad_()
    keep = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 0, 1, 0, 1, 0]]).bool()
    start = 3 * torch.randn(6, 40, generator=g)
    start[0], start[1, 0] = logits.detach()[0, 1], 60.0  # one at its reference, one with nothing outside
    with torch.no_grad():
        logits[0, 2, 0] = 60.0
    reference = top_k(start, k)
    want = coarse_kl(reference, logits[keep]).mean()
    got = anchor_kl(reference, logits, keep)
    (a,) = torch.autograd.grad(2.0 * want, logits)
    (b,) = torch.autograd.grad(2.0 * got, logits)
    assert torch.allclose(got, want, atol=1e-6) and torch.allclose(a, b, atol=1e-6)
    assert float(b[~keep].abs().max()) == 0 and float(b.abs().max()) > 1e-3
    half = anchor_kl(reference, logits.bfloat16(), keep)
    assert torch.isfinite(half) and float(half.detach()) == pytest.approx(float(want.detach()), rel=0.05)


def test_a_lambda_of_zero_leaves_nothing_of_the_payload():
    p = pair()
    terms = weighted_terms(p, torch.zeros(3), lam=0.0, beta=1.0, mu=0.0, literal=False)
    assert not terms.answer_c.any() and not terms.payload_c.any()
