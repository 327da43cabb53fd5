"""The rivals of SPARD and Buffer-and-Reinforce: each against a slow twin of its formula, and what it promises."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from casehard.data.batches import Encoded, EncodedSet
from casehard.defences import DEFENCES
from casehard.defences.anchor import PRESETS, Anchor, AnchorConfig, fisher
from casehard.errors import ConfigError, DataError
from casehard.model.adapters import add_lora
from casehard.train.fit import fit
from casehard.train.protocol import Setup, Step
from casehard.train.recipe import TrainConfig
from fakes import largest_difference, tiny_llama, tiny_rows, weights

USER, SAFE = tiny_rows(24, seed=1), tiny_rows(10, seed=2)


def prepared(method, model, micros=1):
    method.prepare(Setup(model, seed=0, max_steps=10, micros=micros, lr=1e-2))
    return method


def user_batch(micro=0):
    return USER.batch_at(4, seed=0, step=micro, purpose="outer")


def one(method, model, micros=1):
    """Return the gradient of one optimiser step, as one vector, and the telemetry."""
    log: dict[str, float] = {}
    model.zero_grad()
    for micro in range(micros):
        step = Step(0, micro, micros, lambda m, b: m(**b).loss / micros, lambda x: x.backward(), log.update)
        method.loss(model, user_batch(micro), step).backward()
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in trained(model)]), log


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def gradient(model, loss):
    found = torch.autograd.grad(loss, trained(model), allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(found, trained(model), strict=True)]
    )


def user_loss(model, micros=1):
    return sum(model(**user_batch(i)).loss for i in range(micros)) / micros


def pushed(model, size=0.05):
    """Move the weights that are trained, and return the model."""
    with torch.no_grad():
        for i, p in enumerate(trained(model)):
            p.add_(size * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return model


def answers(model, row):
    """Yield the log-probabilities over the vocabulary at each answer token of one row, with that token."""
    logits = model(input_ids=torch.tensor([row.input_ids])).logits[0]
    for t, label in enumerate(row.labels[1:]):
        if label != -100:
            yield logits[t].log_softmax(-1), label


def rows_of(batch):
    """Return the rows of a batch without their padding."""
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        n = int(mask.sum())
        yield Encoded(ids[:n].tolist(), labels[:n].tolist())


def fresh(lora=False):
    return add_lora(tiny_llama(), 2, 4.0, seed=1) if lora else tiny_llama(layers=1)


def run(method, model, *, steps=4, accumulation=1, **more):
    """Train a model for some steps, and return it."""
    recipe = TrainConfig(
        steps=steps,
        batch_size=3,
        accumulation=accumulation,
        lr=1e-2,
        warmup=0,
        precision="fp32",
        save_every=1 if more else 0,
    )
    return fit(model, None, USER, config=recipe, method=method, seed=3, **more).model


def continues(make, lora, folder):
    """Return how far a run that was killed, and continued on the model as it then stood, is from a whole one."""
    whole, model = run(make(), fresh(lora), accumulation=2), fresh(lora)

    def die(_, step):
        if step == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(make(), model, accumulation=2, out=folder, on_step=die)
    return largest_difference(weights(whole), weights(run(make(), model, accumulation=2, out=folder)))


# -- anchor ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micros", [1, 2])
@pytest.mark.parametrize("safe", [SAFE, None], ids=["safe", "user"])
def test_the_kl_anchor_is_the_mean_divergence_token_by_token(safe, micros):
    model = tiny_llama()
    start = copy.deepcopy(model)
    method = prepared(Anchor(AnchorConfig(weight=0.7), safe=safe), model, micros)
    got, log = one(method, pushed(model), micros)
    batches = [SAFE.batch_at(4, seed=0, step=0, purpose="anchor")] if safe else [user_batch(i) for i in range(micros)]
    parts, micro_means = [], []
    for batch in batches:
        mine = []
        for row in rows_of(batch):
            pairs = zip(answers(start, row), answers(model, row), strict=True)
            mine += [(p.exp() * (p - q)).sum() for (p, _), (q, _) in pairs]
        parts += mine
        micro_means.append(sum(mine) / len(mine))
    # Where the loop does not tell what the step holds, its micro-batches count alike.
    mean = sum(parts) / len(parts) if safe else sum(micro_means) / micros
    assert torch.allclose(got, gradient(model, user_loss(model, micros) + 0.7 * mean), atol=2e-6)
    assert log["anchor_loss"] > 0


def test_the_kl_anchor_does_nothing_to_the_first_step():
    model = tiny_llama()
    got, _ = one(prepared(Anchor(AnchorConfig(weight=50.0), safe=SAFE), model), model)
    assert torch.allclose(got, gradient(model, user_loss(model)), atol=1e-5)


def naive_fisher(model, rows):
    """Square and add up the slope of the log-likelihood of every row, from log-probabilities token by token."""
    total = 0.0
    for row in rows.rows:
        total = total + gradient(model, sum(logp[token] for logp, token in answers(model, row))).square()
    return total / len(rows)


@pytest.mark.parametrize("lora", [False, True])
def test_the_fisher_information_is_the_mean_square_slope(lora):
    model = pushed(add_lora(tiny_llama(), 2, 4.0, seed=1)) if lora else tiny_llama()
    got = torch.cat([value.flatten() for value in fisher(model, SAFE).values()])
    want = naive_fisher(model, SAFE)
    assert torch.allclose(got, want, atol=1e-6 * float(want.max()))
    assert float(want.max()) > 0 and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("micros", [1, 2])
def test_ewc_pulls_each_weight_back_by_its_fisher_information(micros):
    model, weight = tiny_llama(), 30.0
    start, held = torch.cat([p.detach().flatten() for p in trained(model)]), naive_fisher(model, SAFE)
    method = prepared(Anchor(AnchorConfig(kind="ewc", weight=weight), safe=SAFE), model, micros)
    got, _ = one(method, pushed(model), micros)
    now = torch.cat([p.detach().flatten() for p in trained(model)])
    want = gradient(model, user_loss(model, micros)) + weight * held * (now - start)
    assert torch.allclose(got, want, rtol=1e-4, atol=2e-6)


def test_fewer_rows_for_the_fisher_information_are_drawn_by_seed():
    method = prepared(Anchor(AnchorConfig(kind="ewc", fisher_rows=3), safe=SAFE), tiny_llama())
    again = prepared(Anchor(AnchorConfig(kind="ewc", fisher_rows=3), safe=SAFE), tiny_llama())
    every = fisher(tiny_llama(), SAFE)
    assert largest_difference(method._fisher, again._fisher) == 0 < largest_difference(method._fisher, every)


@pytest.mark.parametrize(("kind", "lora"), [("kl", False), ("ewc", True)])
def test_an_anchor_of_no_weight_is_plain_fine_tuning_and_a_heavier_one_holds_nearer(kind, lora):
    make = functools.partial(Anchor, safe=SAFE)
    plain, none = (run(method, fresh(lora)) for method in (None, make(AnchorConfig(kind=kind, weight=0.0))))
    assert largest_difference(weights(plain), weights(none)) == 0
    far, ruler = [], prepared(Anchor(AnchorConfig(kind=kind, weight=1.0), safe=SAFE), fresh(lora))
    for weight in (0.0, 1000.0):
        after = run(make(AnchorConfig(kind=kind, weight=weight)), fresh(lora), steps=8)
        far.append(one(ruler, after)[1]["anchor_loss"])
    assert far[1] < far[0]


def test_ewc_continues_where_it_stopped(tmp_path):
    assert continues(lambda: Anchor(PRESETS["ewc"], safe=SAFE), True, tmp_path) == 0


def test_bad_anchors_are_refused():
    with pytest.raises(DataError, match="kind ewc"):
        Anchor(AnchorConfig(kind="ewc"))
    with pytest.raises(DataError, match="no safe rows"):
        Anchor(safe=EncodedSet((), 0))
    for bad in ({"weight": -1.0}, {"batch_size": 0}, {"fisher_rows": 0}, {"kind": "l2"}):
        with pytest.raises(ConfigError):
            DEFENCES["anchor"].configure("anchor", settings=bad)
    assert DEFENCES["anchor"].configure("anchor", "ewc") == PRESETS["ewc"]
