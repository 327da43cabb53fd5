"""The baselines, each against its formula: one-step gradients by autograd on the whole objective."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from casehard.data.batches import EncodedSet
from casehard.defences.lisa import Lisa, LisaConfig
from casehard.defences.ptst import SAFETY_PROMPT, Ptst, PtstConfig
from casehard.defences.safe_mixing import SafeMixing, SafeMixingConfig, joined
from casehard.defences.safegrad import SafeGrad, SafeGradConfig, remove_conflict_
from casehard.errors import ConfigError, DataError
from casehard.train.protocol import SEAMS, Setup, Step, has
from fakes import tiny_llama, tiny_rows

USER = tiny_rows(24, seed=1)
SAFE = tiny_rows(10, seed=2)


def one(method, model, *, index=0, micros=1):
    """Run one optimiser step's backward passes and return the gradient and the telemetry."""
    log: dict[str, float] = {}
    model.zero_grad()
    for micro in range(micros):
        batch = USER.batch_at(4, seed=0, step=index * micros + micro, purpose="outer")
        step = Step(index, micro, micros, lambda m, b: m(**b).loss / micros, lambda x: x.backward(), log.update)
        if has(method, "backward"):
            method.backward(model, batch, step)
        else:
            method.loss(model, batch, step).backward()
    return [p.grad.clone() for p in model.parameters()], log


def prepared(method, model, micros=1):
    method.prepare(Setup(model, seed=0, max_steps=10, micros=micros))
    return method


def user_batch(step=0):
    return USER.batch_at(4, seed=0, step=step, purpose="outer")


def grad(model, loss):
    return list(torch.autograd.grad(loss, list(model.parameters())))


def close(a, b, atol=1e-6):
    return all(torch.allclose(x, y, atol=atol) for x, y in zip(a, b, strict=True))


def per_token(model, batch):
    """Summed loss and number of trained tokens, from the logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    return loss, int((labels != -100).sum())


def test_mixing_rows_is_the_token_mean_over_both_kinds():
    model = tiny_llama()
    method = prepared(SafeMixing(SafeMixingConfig(share=0.5), safe=SAFE), model)
    got, _ = one(method, model, index=3)
    (a, n), (b, m) = (
        per_token(model, user_batch(3)),
        per_token(model, SAFE.batch_at(2, seed=0, step=3, purpose="safe-mixing")),
    )
    assert close(got, grad(model, (a + b) / (n + m)))


def test_mixing_weight_is_the_weighted_sum():
    model = tiny_llama()
    method = prepared(SafeMixing(SafeMixingConfig(mode="weight", weight=0.3, share=0.5), safe=SAFE), model)
    got, log = one(method, model)
    safe = SAFE.batch_at(2, seed=0, step=0, purpose="safe-mixing")
    assert close(got, grad(model, 0.7 * model(**user_batch()).loss + 0.3 * model(**safe).loss))
    assert log["safe_loss"] == pytest.approx(float(model(**safe).loss.detach()), rel=1e-5)


def test_joining_batches_pads_and_masks():
    a, b = USER.batch_at(2, seed=0, step=0, purpose="x"), SAFE.batch_at(3, seed=0, step=1, purpose="y")
    both = joined(a, b, 0)
    assert both["input_ids"].shape[0] == 5 and both["attention_mask"].sum() == sum(
        x["attention_mask"].sum() for x in (a, b)
    )
    assert bool((both["labels"][both["attention_mask"] == 0] == -100).all())


@pytest.mark.parametrize("micros", [1, 2])
def test_lisa_gradient_in_both_phases(micros):
    model, rho = tiny_llama(), 0.7
    method = prepared(Lisa(LisaConfig(safe_steps=2, user_steps=3, rho=rho), safe=SAFE), model, micros)
    start = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)
    for index, phase in ((1, "safe"), (2, "user")):
        anchor = start if phase == "safe" else [p.detach().clone() for p in model.parameters()]
        if phase == "user":
            one(method, model, index=2, micros=micros)  # the anchor moves with the phase
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.01)
            index = 3
        got, log = one(method, model, index=index, micros=micros)
        losses = [
            SAFE.batch_at(4, seed=0, step=index * micros + i, purpose="lisa")
            if phase == "safe"
            else user_batch(index * micros + i)
            for i in range(micros)
        ]
        # The stand-in loss of ``one`` averages the user's micro-batches each over its own tokens.
        each = [per_token(model, b) for b in losses]
        means = sum(loss / n for loss, n in each) / micros
        want = sum(loss for loss, _ in each) / sum(n for _, n in each) if phase == "safe" else means
        pull = [rho * (p.detach() - a) for p, a in zip(model.parameters(), anchor, strict=True)]
        assert close(got, [g + x for g, x in zip(grad(model, want), pull, strict=True)])
        assert f"{phase}_loss" in log and method.phase(index) == phase
    again = prepared(Lisa(method.config, safe=SAFE), tiny_llama(seed=5), micros)
    again.restore(method.state())
    assert all(torch.equal(method._anchor[n], again._anchor[n]) for n in method._anchor)


@pytest.mark.parametrize("alignment", ["kl", "ce"])
@pytest.mark.parametrize("micros", [1, 2])
def test_safegrad_gradient(alignment, micros):
    model = tiny_llama()
    method = prepared(SafeGrad(SafeGradConfig(alignment=alignment, weight=0.5), safe=SAFE), model, micros)
    start = copy.deepcopy(model)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    got, log = one(method, model, micros=micros)
    user = torch.cat(
        [g.flatten() for g in grad(model, sum(model(**user_batch(i)).loss for i in range(micros)) / micros)]
    )
    safe = SAFE.batch_at(4, seed=0, step=0, purpose="safegrad")
    if alignment == "ce":
        loss = model(**safe).loss
    else:
        p, q = (
            m(input_ids=safe["input_ids"], attention_mask=safe["attention_mask"]).logits[:, :-1].log_softmax(-1)
            for m in (start, model)
        )
        keep = safe["labels"][:, 1:] != -100
        loss = ((p.exp() * (p - q)).sum(-1) * keep).sum() / keep.sum()
    align = torch.cat([g.flatten() for g in grad(model, loss)])
    if float(user @ align) < 0:
        user = user - (user @ align) / align.square().sum() * align
    want = user + 0.5 * align
    assert torch.allclose(torch.cat([g.flatten() for g in got]), want, atol=2e-6)
    assert log["conflict_rate"] in (0.0, 1.0) and -1 <= log["alignment_cosine"] <= 1


def test_surgery_removes_exactly_the_conflict():
    a = [torch.tensor([1.0, 0.0]), torch.tensor([2.0])]
    user = [torch.tensor([-1.0, 3.0]), torch.tensor([-1.0])]
    before = remove_conflict_(user, a)
    assert before < 0
    assert float(sum((u * x).sum() for u, x in zip(user, a, strict=True))) == pytest.approx(0, abs=1e-6)
    friendly = [torch.tensor([1.0, 3.0]), torch.tensor([1.0])]
    kept = [x.clone() for x in friendly]
    assert remove_conflict_(friendly, a) > 0 and close(friendly, kept)
    assert remove_conflict_([torch.zeros(2), torch.zeros(1)], a) == 0.0


def test_ptst_trains_plainly_and_carries_its_prompt():
    method = Ptst()
    assert not any(has(method, seam) for seam in SEAMS)
    assert method.config.system == SAFETY_PROMPT
    with pytest.raises(ConfigError, match="safety prompt"):
        PtstConfig(system=" ")


def test_bad_settings_and_empty_pools_are_refused():
    for make in (SafeMixing, Lisa, SafeGrad):
        with pytest.raises(DataError, match="no safe rows"):
            make(safe=EncodedSet((), 0))
    cases = (
        (SafeMixingConfig, {"share": 0.0}),
        (SafeMixingConfig, {"weight": 1.5}),
        (LisaConfig, {"rho": -1.0}),
        (LisaConfig, {"user_steps": 0}),
        (SafeGradConfig, {"batch_size": 0}),
        (SafeGradConfig, {"weight": -1.0}),
    )
    for kind, bad in cases:
        with pytest.raises(ConfigError):
            kind(**bad)
