"""The rivals of SPARD and Buffer-and-Reinforce: each against a slow twin of its formula, and what it promises."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from casehard.data.batches import Encoded, EncodedSet
from casehard.defences import DEFENCES
from casehard.defences.anchor import PRESETS, Anchor, AnchorConfig, fisher
from casehard.defences.bottleneck import Bottleneck, BottleneckConfig
from casehard.defences.one_shot_repair import OneShotRepair, OneShotRepairConfig
from casehard.defences.token_constrained import TokenConstrained, TokenConstrainedConfig, constrained
from casehard.errors import ConfigError, DataError, Diverged
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


# -- token_constrained -------------------------------------------------------------------------------------


def naive_constrained(model, start, batch, config):
    """Return the terms of the loss of a batch, one an answer token."""
    terms = []
    for row in rows_of(batch):
        pairs = zip(answers(model, row), answers(start, row), strict=True)
        for t, ((logp, token), (reference, _)) in enumerate(pairs, start=1):
            beta = config.first if t == 1 else config.early if t <= config.until else config.rest
            p = logp[token] - reference[token].detach()
            terms.append(-p if beta == 0 else -2 / beta * torch.log(1 / (1 + torch.exp(-beta * p))))
    return terms


@pytest.mark.parametrize("micros", [1, 2])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("betas", [{}, {"first": 3.0, "early": 0.7, "until": 3, "rest": 0.0}], ids=["paper", "own"])
def test_the_constrained_loss_token_by_token(betas, lora, micros):
    model = pushed(fresh(True)) if lora else tiny_llama()
    start, config = copy.deepcopy(model), TokenConstrainedConfig(**betas)
    method = prepared(TokenConstrained(config), model, micros)
    got, log = one(method, pushed(model, 0.1), micros)
    parts = [naive_constrained(model, start, user_batch(i), config) for i in range(micros)]
    want = gradient(model, sum(sum(part) / len(part) for part in parts) / micros)
    assert torch.allclose(got, want, atol=2e-6) and float(want.norm()) > 0.01
    assert 0 < log["still_learning"] < 2


def test_constraining_tokens_begins_as_plain_fine_tuning():
    model = tiny_llama()
    got, log = one(prepared(TokenConstrained(), model), model)
    assert torch.allclose(got, gradient(model, user_loss(model)), atol=1e-6)
    assert log["still_learning"] == pytest.approx(1.0)


def test_constraining_tokens_with_no_beta_is_plain_fine_tuning():
    none = TokenConstrained(TokenConstrainedConfig(first=0.0, early=0.0, rest=0.0))
    plain, got = (weights(run(method, fresh())) for method in (None, none))
    assert largest_difference(plain, got) == 0


def test_betas_count_answer_tokens_wherever_the_padding_is():
    method = TokenConstrained(TokenConstrainedConfig(first=9.0, early=5.0, until=2, rest=1.0))
    keep = torch.tensor([[0, 0, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 1]]).bool()
    want = [9.0, 5.0, 1.0, 1.0, 9.0, 5.0, 1.0, 9.0, 5.0]
    assert method.betas(keep)[keep].tolist() == want


@pytest.mark.parametrize("r", [-3.0, -0.2, 0.0, 0.2, 3.0])
def test_a_large_beta_binds_a_token_and_a_small_one_leaves_it_free(r):
    """The slope is -1 at the start and without beta; it dies out as a token gets likelier, or doubles."""
    betas = torch.tensor([0.0, 1e-4, 0.1, 0.5, 2.0, 20.0])
    at = torch.full_like(betas, r, requires_grad=True)
    (slope,) = torch.autograd.grad(constrained(at, betas).sum(), at)
    assert slope[0] == -1 and slope[1] == pytest.approx(-1, abs=1e-3)
    assert bool((slope < 0).all()) and bool((slope >= -2).all())
    steps = slope.diff().sign()
    assert bool((steps == float((r > 0) - (r < 0))).all()) or r == 0
    assert r or bool((slope == -1).all())


# -- bottleneck --------------------------------------------------------------------------------------------


def state_at(model, row, layer):
    """Return the state that a row's answer begins from, for layers counted from 0, by watching the modules."""
    first = next(i for i, label in enumerate(row.labels) if label != -100)
    seen = []
    inner = model.model.norm if layer == len(model.model.layers) else model.model.layers[layer - 1]
    hook = inner.register_forward_hook(lambda *a: seen.append(a[2][0] if isinstance(a[2], tuple) else a[2]))
    model(input_ids=torch.tensor([row.input_ids]))
    hook.remove()
    return seen[0][0, first - 1] if layer else model.model.embed_tokens.weight[row.input_ids[first - 1]]


@pytest.mark.parametrize(("layer", "micros"), [(-1, 1), (-1, 2), (2, 1), (1, 1), (0, 1), (-2, 1)])
def test_the_bottleneck_holds_the_state_the_answer_begins_from(layer, micros):
    model = tiny_llama()
    start, config = copy.deepcopy(model), BottleneckConfig(layer=layer, weight=0.3, prompts=4)
    method = prepared(Bottleneck(config, safe=SAFE), model, micros)
    got, log = one(method, pushed(model), micros)
    drawn = SAFE.batch_at(4, seed=0, step=0, purpose="bottleneck")
    at = range(3)[layer]
    far = [(state_at(model, row, at) - state_at(start, row, at).detach()).square().sum() for row in rows_of(drawn)]
    want = gradient(model, user_loss(model, micros) + 0.3 * sum(far) / 4)
    assert torch.allclose(got, want, atol=2e-5 * float(want.abs().max()))
    assert log["bottleneck_loss"] == pytest.approx(float(sum(far).detach()) / 4, rel=1e-4)


def test_the_last_layer_is_what_the_unembedding_reads():
    model = tiny_llama()
    method = prepared(Bottleneck(BottleneckConfig(), safe=SAFE), model)
    logits = model(input_ids=method._prompts["input_ids"]).logits[0, -1]
    assert torch.allclose(model.lm_head(method._held[0]), logits, atol=1e-6)


def test_answers_of_the_prompts_held_are_not_read():
    prompts, held = [row.input_ids[:4] for row in SAFE.rows], []
    for answer in ([7, 7], [9, 11, 13]):
        rows = tuple(Encoded([*prompt, *answer], [-100] * 4 + answer) for prompt in prompts)
        held.append(prepared(Bottleneck(safe=EncodedSet(rows, 0)), tiny_llama())._held)
    assert torch.equal(*held)


def test_the_rounding_of_mixed_precision_is_no_distance():
    model, log = tiny_llama(), {}
    method = prepared(Bottleneck(BottleneckConfig(prompts=3), safe=SAFE), model)

    def step(index):
        return Step(index, 0, 1, lambda m, b: m(**b).loss, lambda x: None, log.update, compute_dtype=torch.bfloat16)

    with torch.autocast("cpu", torch.bfloat16):
        method.loss(model, user_batch(), step(0))
        assert log["bottleneck_loss"] == 0
        method.loss(pushed(model), user_batch(), step(1))
    assert log["bottleneck_loss"] > 0.01


@pytest.mark.parametrize("lora", [False, True])
def test_the_bottleneck_at_no_weight_and_at_a_large_one(lora):
    plain, none = (run(m, fresh(lora)) for m in (None, Bottleneck(BottleneckConfig(weight=0.0), safe=SAFE)))
    assert largest_difference(weights(plain), weights(none)) == 0
    ruler = prepared(Bottleneck(safe=SAFE), fresh(lora))
    free, held = (run(Bottleneck(BottleneckConfig(weight=w), safe=SAFE), fresh(lora), steps=8) for w in (0.0, 1000.0))
    assert one(ruler, held)[1]["bottleneck_loss"] < one(ruler, free)[1]["bottleneck_loss"]


# -- one_shot_repair ---------------------------------------------------------------------------------------


def mean_loss(model, rows):
    terms = [-logp[token] for row in rows for logp, token in answers(model, row)]
    return sum(terms) / len(terms)


def test_a_repair_is_so_many_adam_steps_on_the_rows_drawn():
    model, twin = pushed(tiny_llama()), pushed(tiny_llama())
    config = OneShotRepairConfig(rows=2, steps=3, lr=1e-2, stop=0.0)
    prepared(OneShotRepair(config, safe=SAFE), model).finish(model)
    drawn = list(rows_of(SAFE.batch_at(2, seed=0, step=0, purpose="one-shot-repair")))
    m = v = 0.0
    for t in range(1, 4):  # Adam by hand, on one long vector
        slope = gradient(twin, mean_loss(twin, drawn))
        slope = slope * min(1.0, 1.0 / (float(slope.norm()) + 1e-6))
        m, v = 0.9 * m + 0.1 * slope, 0.999 * v + 0.001 * slope**2
        move = 1e-2 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        with torch.no_grad():
            at = 0
            for p in trained(twin):
                p.sub_(move[at : at + p.numel()].view_as(p))
                at += p.numel()
    assert largest_difference(weights(model), weights(twin)) < 1e-4  # three steps move a weight by 3e-2
    assert largest_difference(weights(model), weights(pushed(tiny_llama()))) > 1e-2


@pytest.mark.parametrize("lora", [False, True])
def test_a_repair_stops_where_the_start_was_and_touches_what_was_trained(lora):
    model, told = fresh(lora), {}
    method = OneShotRepair(OneShotRepairConfig(steps=500, lr=3e-3), safe=SAFE)
    method.prepare(Setup(model, seed=0, max_steps=1, log=told.update))
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    aim = method._stop
    method.finish(pushed(model, 0.3))
    (row,) = rows_of(method._rows)
    assert 0 < told["repair_steps"] < 500 and float(mean_loss(model, [row]).detach()) <= aim + 1e-5
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    before = weights(model)
    method.finish(model)  # nothing is left to repair
    assert largest_difference(before, weights(model)) == 0 == told["repair_steps"]


def test_a_repair_of_no_steps_is_plain_fine_tuning_and_costs_are_counted():
    plain = run(None, fresh())
    none = run(OneShotRepair(OneShotRepairConfig(steps=0), safe=SAFE), fresh())
    assert largest_difference(weights(plain), weights(none)) == 0
    recipe = TrainConfig(steps=4, batch_size=3, lr=1e-2, warmup=0, precision="fp32")
    method = OneShotRepair(OneShotRepairConfig(steps=5, stop=0.0), safe=SAFE)
    done = fit(fresh(), None, USER, config=recipe, method=method, seed=3)
    assert done.budget.passes == 4 + 5 and done.log[-1]["repair_steps"] == 5
    assert method._lr == 1e-2  # that of the job


def test_a_repair_is_done_once_when_a_run_continues_after_its_last_step(tmp_path):
    def make():
        return OneShotRepair(OneShotRepairConfig(steps=3, stop=0.0), safe=SAFE)

    first, again = (weights(run(make(), fresh(), out=tmp_path)) for _ in range(2))
    assert largest_difference(first, again) == 0


@pytest.mark.parametrize("name", ["safegrad", "token_constrained", "bottleneck", "one_shot_repair"])
def test_what_starts_from_a_checkpoint_still_knows_the_start(name, tmp_path):
    kind = DEFENCES[name].load()[0]
    rows = {"safe": SAFE} if DEFENCES[name].needs else {}
    assert continues(lambda: kind(**rows), True, tmp_path) == 0


def test_bad_settings_are_refused():
    with pytest.raises(DataError, match="3 prompts to hold and 2"):
        Bottleneck(BottleneckConfig(prompts=3), safe=EncodedSet(SAFE.rows[:2], 0))
    with pytest.raises(DataError, match="no prompt"):
        Bottleneck(safe=EncodedSet((Encoded([5, 6], [5, 6]),), 0))
    with pytest.raises(ConfigError, match="layer is 3"):
        prepared(Bottleneck(BottleneckConfig(layer=3), safe=SAFE), tiny_llama())
    with pytest.raises(DataError, match="11 rows"):
        OneShotRepair(OneShotRepairConfig(rows=11), safe=SAFE)
    with pytest.raises(ConfigError, match="learning rate"):
        OneShotRepair(safe=SAFE).prepare(Setup(tiny_llama(), seed=0, max_steps=1))
    spoilt = tiny_llama()
    with torch.no_grad():
        spoilt.lm_head.weight[3] = float("nan")
    with pytest.raises(Diverged):
        prepared(OneShotRepair(safe=SAFE), spoilt)
    cases = {
        "token_constrained": ({"first": -1.0}, {"until": 0}, {"early": float("nan")}),
        "bottleneck": ({"prompts": 0}, {"weight": -1.0}, {"layer": 0.5}),
        "one_shot_repair": ({"rows": 0}, {"steps": -1}, {"lr": "fast"}, {"stop": -0.1}),
    }
    for name, bad in cases.items():
        for settings in bad:
            with pytest.raises(ConfigError):
                DEFENCES[name].configure(name, settings=settings)
