"""Views, attack vectors and simulated attacks against closed forms and naive twins."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from casehard.errors import ConfigError, Diverged, Unsupported
from casehard.maths.bilevel import (
    Attacker,
    difference,
    linear_only,
    parameters,
    perturbed_view,
    retain_kl,
    simulate_attack,
    with_view,
)
from casehard.maths.tensors import cosine, dot, norm

BATCH = {"input_ids": torch.arange(24).reshape(3, 8) % 40, "labels": torch.arange(24).reshape(3, 8) % 40}


def llama(*, tie: bool = False, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tie,
        attention_dropout=dropout,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).to(dtype).train()


def random_delta(model: nn.Module, scale: float = 0.05) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(1)
    return {n: scale * torch.randn(p.shape, generator=gen).to(p.dtype) for n, p in model.named_parameters()}


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(**BATCH).loss


@pytest.mark.parametrize("tie", [False, True])
def test_view_equals_a_model_with_shifted_weights(tie: bool) -> None:
    model, twin = llama(tie=tie), llama(tie=tie)
    delta = random_delta(model)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            p.add_(delta[name])
    expected = loss_of(twin)
    expected.backward()
    got = with_view(model, perturbed_view(parameters(model), delta), loss_of)
    got.backward()
    assert torch.equal(got, expected)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_tied_embeddings_are_one_parameter_and_not_castable() -> None:
    model = llama(tie=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in parameters(model)
    assert "model.embed_tokens.weight" not in linear_only(model)
    assert "lm_head.weight" in linear_only(llama(tie=False))


@pytest.mark.parametrize("fails_in", ["forward", "backward"])
def test_masters_survive_a_failure_inside_the_view(fails_in: str) -> None:
    model = llama()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    same = dict(model.named_parameters())

    def run(inner: nn.Module) -> None:
        loss = loss_of(inner)
        if fails_in == "backward":
            loss.register_hook(lambda g: (_ for _ in ()).throw(RuntimeError("boom")))
            loss.backward()
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        with_view(model, perturbed_view(parameters(model), random_delta(model)), run)
    for name, p in model.named_parameters():
        assert p is same[name]
        assert p.requires_grad
        assert torch.equal(p, before[name])


def test_backward_inside_the_view_is_right_under_gradient_checkpointing() -> None:
    model, plain = llama(), llama()
    delta = random_delta(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def run(inner: nn.Module) -> None:
        loss_of(inner).backward()

    for m in (model, plain):
        with_view(m, perturbed_view(parameters(m), delta), run)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_castable_view_changes_nothing_under_autocast() -> None:
    delta = random_delta(llama())
    grads = []
    for dtype in (None, torch.bfloat16):
        model = llama()

        def run(inner: nn.Module) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(inner)
            loss.backward()
            return loss.detach()

        view = perturbed_view(parameters(model), delta, compute_dtype=dtype, castable=linear_only(model))
        loss = with_view(model, view, run)
        grads.append([loss, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_no_gradient_reaches_delta() -> None:
    model = llama()
    delta = {n: d.requires_grad_() for n, d in random_delta(model).items()}
    with_view(model, perturbed_view(parameters(model), delta), loss_of).backward()
    assert all(d.grad is None for d in delta.values())
    assert all(p.grad is not None for p in model.parameters())


def in_the_graph(params: dict, delta: dict) -> dict:
    """The naive view: theta + delta as nodes of the graph, whose gradients autograd itself brings to theta."""
    return {name: p + delta[name].detach() for name, p in params.items()}


@pytest.mark.parametrize("tie", [False, True])
def test_gradients_hooks_and_earlier_gradients_are_as_with_the_sum_in_the_graph(tie: bool) -> None:
    found = []
    for view in (in_the_graph, perturbed_view):
        model, told = llama(tie=tie), []
        frozen = model.model.embed_tokens.weight
        frozen.register_hook(lambda g: torch.cat([0 * g[:3], g[3:]]))  # rows that a caller keeps as they are
        model.model.norm.weight.register_post_accumulate_grad_hook(lambda p, told=told: told.append(p.grad.clone()))
        delta = random_delta(model)
        loss_of(model).backward()
        for _ in range(2):
            with_view(model, view(parameters(model), delta), lambda inner: loss_of(inner).backward())
        assert not frozen.grad[:3].any() and frozen.grad[3:].any() and len(told) == 3
        found.append([*(p.grad for p in model.parameters()), *told])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_gradients_are_handed_on_while_the_backward_pass_runs() -> None:
    model, alive = llama(), []
    view = perturbed_view(parameters(model), random_delta(model))
    first = model.model.embed_tokens.weight  # the last to be complete
    first.register_hook(lambda g: alive.append(sum(v.grad is not None for v in view.values())))
    with_view(model, view, lambda inner: loss_of(inner).backward())
    assert alive == [0]
    assert all(p.grad is not None for p in model.parameters())


def test_unmatched_names_are_errors() -> None:
    model = llama()
    delta = random_delta(model)
    delta["extra"] = delta.pop("model.norm.weight")
    with pytest.raises(Unsupported, match="2 parameters, first 'extra'"):
        perturbed_view(parameters(model), delta)
    with pytest.raises(Unsupported, match="disagree"):
        with_view(model, {"model.norm.weight": model.model.norm.weight}, loss_of)


def test_half_precision_and_frozen_weights_are_refused() -> None:
    with pytest.raises(Unsupported, match="bfloat16"):
        parameters(llama(dtype=torch.bfloat16))
    model = llama()
    model.model.norm.weight.requires_grad_(False)
    with pytest.raises(Unsupported, match="frozen"):
        parameters(model)


def test_delta_round_trip() -> None:
    model = llama()
    source = {n: p.detach() for n, p in model.named_parameters()}
    attacked = {n: p + 1e-3 * torch.randn_like(p) for n, p in source.items()}
    exact = difference(dict(attacked), source, dtype=torch.float32)
    short = difference(dict(attacked), source, dtype=torch.bfloat16)
    for name, value in attacked.items():
        spacing = torch.finfo(torch.float32).eps * value.abs().clamp(min=1e-6)
        assert bool(((source[name] + exact[name] - value).abs() <= spacing).all())
        assert bool(((short[name].float() - exact[name]).abs() <= 2**-8 * exact[name].abs()).all())


def test_difference_frees_the_attacked_copy_as_it_goes() -> None:
    attacked = {"a": torch.ones(3), "b": torch.ones(2)}
    difference(attacked, {"a": torch.zeros(3), "b": torch.zeros(2)}, dtype=torch.float32)
    assert attacked == {}


def naive_attack(model: LlamaForCausalLM, steps: int, lr: float) -> list[torch.Tensor]:
    """Train the model itself, the obvious way."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    for _ in range(steps):
        loss_of(model).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("tie", [False, True])
def test_simulated_attack_equals_training_the_model_itself(tie: bool) -> None:
    model = llama(tie=tie)
    before = [p.detach().clone() for p in model.parameters()]
    run = simulate_attack(model, parameters(model), lambda i: BATCH, Attacker(steps=7, lr=1e-3), seed=0)
    expected = naive_attack(llama(tie=tie), 7, 1e-3)
    assert all(torch.equal(a, b) for a, b in zip(run.weights.values(), expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert run.losses[-1] < run.losses[0]


def test_attack_leaves_the_global_random_stream_alone_and_is_seeded() -> None:
    model = llama(dropout=0.3)
    torch.manual_seed(5)
    expected = torch.rand(4)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(5)
        runs.append(simulate_attack(model, parameters(model), lambda i: BATCH, Attacker(steps=2, lr=1e-3), seed=seed))
        assert torch.equal(torch.rand(4), expected)
    first, again, other = (r.weights["model.norm.weight"] for r in runs)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_lora_attack_moves_linear_weights_by_low_rank_deltas_only() -> None:
    model = llama()
    run = simulate_attack(
        model, parameters(model), lambda i: BATCH, Attacker(steps=5, lr=1e-2, lora_rank=2, optimizer="adam"), seed=0
    )
    delta = difference(dict(run.weights), parameters(model), dtype=torch.float32)
    linear = linear_only(model)
    for name, d in delta.items():
        if name in linear:
            assert torch.linalg.matrix_rank(d, atol=1e-5) <= 2
        else:
            assert not d.any()
    assert norm(delta.values()) > 0


def test_diverging_attack_is_told() -> None:
    model = llama()
    with pytest.raises(Diverged, match="simulated attack diverged"):
        simulate_attack(
            model, parameters(model), lambda i: BATCH, Attacker(steps=3, lr=1e20, clip=0, optimizer="sgd"), seed=0
        )


@pytest.mark.parametrize(
    "bad", [{"optimizer": "adagrad"}, {"steps": -1}, {"batch_size": 0}, {"steps": 3, "steps_min": 4}]
)
def test_bad_attackers_are_refused(bad: dict) -> None:
    with pytest.raises(ConfigError):
        Attacker(**bad)


def test_retain_kl_is_zero_at_the_start_and_matches_the_definition() -> None:
    model = llama()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert abs(retain_kl(model, start, BATCH).item()) < 1e-6
    moved = llama()
    with torch.no_grad():
        moved.lm_head.weight.mul_(1.5)
    p = model(input_ids=BATCH["input_ids"]).logits[:, :-1].softmax(-1)
    q = moved(input_ids=BATCH["input_ids"]).logits[:, :-1].softmax(-1)
    expected = (p * (p.log() - q.log())).sum(-1).mean()
    torch.testing.assert_close(retain_kl(moved, start, BATCH), expected)


def test_vector_helpers_agree_with_the_flat_vector() -> None:
    gen = torch.Generator().manual_seed(0)
    a = [torch.randn(3, 4, generator=gen), torch.randn(5, generator=gen)]
    b = [torch.randn(3, 4, generator=gen), torch.randn(5, generator=gen)]
    flat_a, flat_b = (torch.cat([x.flatten() for x in v]).double() for v in (a, b))
    assert norm(a) == pytest.approx(float(flat_a.norm()), rel=1e-6)
    assert dot(a, b) == pytest.approx(float(flat_a @ flat_b), rel=1e-6)
    assert cosine(a, b) == pytest.approx(float(flat_a @ flat_b / flat_a.norm() / flat_b.norm()), rel=1e-6)
    assert cosine(a, [torch.zeros_like(x) for x in a]) == 0.0


class Quadratic(nn.Module):
    """L(theta) = 1/2 (theta - c)' C (theta - c), with (c, C) chosen by the first token: 0 safe, 1 unsafe."""

    def __init__(self, centres: list[torch.Tensor], curvatures: list[torch.Tensor]) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros_like(centres[0]))
        self.centres, self.curvatures = centres, curvatures

    def forward(self, input_ids: torch.Tensor, **_: torch.Tensor) -> SimpleNamespace:
        which = int(input_ids[0, 0])
        x = self.theta - self.centres[which]
        return SimpleNamespace(loss=0.5 * x @ self.curvatures[which] @ x)


def test_attack_vector_closed_form_on_a_quadratic() -> None:
    """Property 7: delta = -M (theta - b) with M = I - (I - eta B)^k."""
    torch.manual_seed(0)
    raw = torch.randn(4, 4, dtype=torch.float64)
    curve_b = raw @ raw.T / 4 + torch.eye(4, dtype=torch.float64)
    b = torch.randn(4, dtype=torch.float64)
    model = Quadratic([b, b], [curve_b, curve_b])
    attacker = Attacker(steps=9, lr=0.1, optimizer="sgd", weight_decay=0.0, clip=0.0)
    batch = {"input_ids": torch.ones(1, 1, dtype=torch.long)}
    run = simulate_attack(model, parameters(model), lambda i: batch, attacker, seed=0)
    delta = difference(dict(run.weights), parameters(model), dtype=torch.float64)["theta"]
    eye = torch.eye(4, dtype=torch.float64)
    shrink = eye - torch.linalg.matrix_power(eye - 0.1 * curve_b, 9)
    torch.testing.assert_close(delta, -shrink @ (model.theta.detach() - b), rtol=1e-12, atol=1e-12)
