"""Patcher against its equations: closed forms on a quadratic, a one-graph twin, exact reductions, resume, telemetry."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from casehard.config import build
from casehard.data.batches import Encoded, EncodedSet
from casehard.defences.patcher import PRESETS, Patcher, PatcherConfig
from casehard.defences.patcher.backend import InProcessBackend
from casehard.defences.patcher.in_turn import InTurn, SimulatedAttacks
from casehard.defences.patcher.scheduled import Scheduled
from casehard.errors import ConfigError, DataError
from casehard.maths.bilevel import Attacker, with_view
from casehard.train.protocol import Setup, Step

UNSAFE = EncodedSet(tuple(Encoded([3 + i, 5, 7 + i, 2], [-100, -100, 7 + i, 2]) for i in range(6)), 0)
SAFE = EncodedSet(tuple(Encoded([3 + i, 6, 9, 4, 2], [-100, -100, 9, 4, 2]) for i in range(8)), 0)
ATTACKER = Attacker(steps=3, lr=1e-2, batch_size=2)


def llama(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        attention_dropout=dropout,
        attn_implementation="eager",
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(dtype).train()


def drive(
    method: Patcher | None,
    model: nn.Module,
    steps: int,
    *,
    micros: int = 1,
    start: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
    scratch: Path | None = None,
    state: dict | None = None,
    stop: int | None = None,
    clip: float | None = None,
) -> list[dict]:
    """Run the outer loop by hand: what the training shell does, without the Trainer. Returns the telemetry."""
    log: list[dict] = []
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05)
    if method is not None:
        method.prepare(Setup(model, seed=0, max_steps=steps, micros=micros, scratch=scratch, log=log.append))
        if state is not None:
            method.restore(state)
    for index in range(start, stop or steps):
        for micro in range(micros):
            batch = SAFE.batch_at(2, seed=0, step=index * micros + micro, purpose="outer")
            step = Step(index, micro, micros, lambda m, b: m(**b).loss / micros, lambda loss: loss.backward())
            if method is None:
                step.backward(step.loss(model, batch))
            else:
                method.backward(model, batch, step)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if method is not None:
            method.after_step(model, optimizer, step)
        optimizer.zero_grad()
    if method is not None and stop is None:
        method.finish(model)
    return log


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -- exact reductions (properties 1, 2, 5) -------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_alpha_zero_is_sft_bit_for_bit(dropout: float) -> None:
    plain, patched = llama(dropout), llama(dropout)
    torch.manual_seed(1)
    drive(None, plain, 6, micros=2)
    torch.manual_seed(1)
    config = PatcherConfig(alpha=0.0, round_steps=2, attackers=(ATTACKER,))
    method = Patcher(config, unsafe=UNSAFE)
    drive(method, patched, 6, micros=2)
    assert same(weights(plain), weights(patched))
    assert method.passes == 0


def test_attack_of_zero_steps_at_alpha_half_is_sft_bit_for_bit() -> None:
    plain, patched = llama(), llama()
    drive(None, plain, 6)
    config = PatcherConfig(alpha=0.5, round_steps=2, attackers=(Attacker(steps=0, lr=1e-3),))
    drive(Patcher(config, unsafe=UNSAFE), patched, 6)
    assert same(weights(plain), weights(patched))


def test_first_round_is_plain_sft() -> None:
    plain, patched = llama(), llama()
    drive(None, plain, 8, stop=4)
    drive(Patcher(PatcherConfig(round_steps=4, attackers=(ATTACKER,)), unsafe=UNSAFE), patched, 8, stop=4)
    assert same(weights(plain), weights(patched))


def test_masters_do_not_move_before_the_optimiser_step() -> None:
    model = llama()
    method = Patcher(PatcherConfig(round_steps=1, attackers=(ATTACKER,)), unsafe=UNSAFE)
    method.prepare(Setup(model, seed=0, max_steps=9))
    before = weights(model)
    step = Step(1, 0, 1, lambda m, b: m(**b).loss, lambda loss: loss.backward())
    method.backward(model, SAFE.batch_at(2, seed=0, step=0, purpose="outer"), step)
    assert same(before, weights(model))
    assert any(p.grad.abs().sum() > 0 for p in model.parameters())


# -- the combined gradient (property 4) ----------------------------------------------------------------------


@pytest.mark.parametrize("micros", [1, 3])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0])
def test_two_backwards_equal_one_graph(micros: int, clip: float | None, alpha: float) -> None:
    """g of eq. 2 in float64, against alpha L(theta + delta) + (1 - alpha) L(theta) built in one graph."""
    model, twin = llama(dtype=torch.float64), llama(dtype=torch.float64)
    config = PatcherConfig(alpha=alpha, round_steps=1, attackers=(ATTACKER,), delta_dtype="float32")
    method = Patcher(config, unsafe=UNSAFE)
    method.prepare(Setup(model, seed=0, max_steps=9, micros=micros))
    batches = [SAFE.batch_at(2, seed=0, step=i, purpose="outer") for i in range(micros)]
    for micro, batch in enumerate(batches):
        step = Step(1, micro, micros, lambda m, b: m(**b).loss / micros, lambda loss: loss.backward())
        method.backward(model, batch, step)
    delta = method.vectors.pool.vectors[0].delta
    shifted = {n: p + delta[n] for n, p in twin.named_parameters()}
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        attacked = with_view(twin, shifted, lambda m, b=batch: m(**b).loss)
        total = total + (alpha * attacked + (1 - alpha) * twin(**batch).loss) / micros
    total.backward()
    for m in (model, twin):
        if clip is not None:
            nn.utils.clip_grad_norm_(m.parameters(), clip)
    assert sum(float(d.abs().sum()) for d in delta.values()) > 0
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


# -- closed form on a quadratic (properties 7, 8, 9) ---------------------------------------------------------


class Quadratic(nn.Module):
    """Safe loss 1/2 (theta-a)'A(theta-a), unsafe loss 1/2 (theta-b)'B(theta-b), chosen by the first token."""

    def __init__(self, a: torch.Tensor, curve_a: torch.Tensor, b: torch.Tensor, curve_b: torch.Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros_like(a))
        self.parts = ((a, curve_a), (b, curve_b))

    def forward(self, input_ids: torch.Tensor, **_: torch.Tensor) -> SimpleNamespace:
        centre, curve = self.parts[int(input_ids[0, 0])]
        x = self.theta - centre
        return SimpleNamespace(loss=0.5 * x @ curve @ x)


GRADIENT_DESCENT = {"optimizer": "sgd", "weight_decay": 0.0, "clip": 0.0}


def problem() -> tuple[Quadratic, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    eye = torch.eye(3, dtype=torch.float64)
    raw_a, raw_b = torch.randn(2, 3, 3, dtype=torch.float64)
    curve_a, curve_b = raw_a @ raw_a.T / 3 + eye, raw_b @ raw_b.T / 3 + eye
    a, b = torch.randn(2, 3, dtype=torch.float64)
    shrink = eye - torch.linalg.matrix_power(eye - 0.05 * curve_b, 8)
    return Quadratic(a, curve_a, b, curve_b), a, curve_a, b, curve_b, shrink


ONE_UNSAFE = EncodedSet((Encoded([1], [1]),), 0)
SAFE_BATCH = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}


def test_first_order_gradient_and_not_the_exact_one_on_a_quadratic() -> None:
    model, a, curve_a, b, curve_b, shrink = problem()
    alpha, eye = 0.4, torch.eye(3, dtype=torch.float64)
    attacker = Attacker(steps=8, lr=0.05, batch_size=1, **GRADIENT_DESCENT)
    config = PatcherConfig(alpha=alpha, round_steps=1, attackers=(attacker,), delta_dtype="float32")
    method = Patcher(config, unsafe=ONE_UNSAFE)
    method.prepare(Setup(model, seed=0, max_steps=9))
    method.backward(model, SAFE_BATCH, Step(1, 0, 1, lambda m, b: m(**b).loss, lambda loss: loss.backward()))
    theta = model.theta.detach()
    delta = -shrink @ (theta - b)
    first_order = curve_a @ (theta - a) + alpha * curve_a @ delta
    torch.testing.assert_close(model.theta.grad, first_order, rtol=1e-6, atol=1e-7)

    # The exact bi-level gradient differentiates through the attack; autograd agrees with the closed form.
    outer = theta.clone().requires_grad_()
    inner = outer
    for _ in range(8):
        inner = inner - 0.05 * curve_b @ (inner - b)
    objective = alpha * 0.5 * (inner - a) @ curve_a @ (inner - a) + (1 - alpha) * 0.5 * (outer - a) @ curve_a @ (
        outer - a
    )
    (exact,) = torch.autograd.grad(objective, outer)
    closed = (1 - alpha) * curve_a @ (theta - a) + alpha * (eye - shrink).T @ curve_a @ (theta + delta - a)
    torch.testing.assert_close(exact, closed)
    assert (exact - first_order).norm() > 0.1 * exact.norm()


def test_rounds_converge_to_the_fixed_point() -> None:
    """theta* = (I - alpha M)^-1 (a - alpha M b), property 8."""
    model, a, _, b, _, shrink = problem()
    attacker = Attacker(steps=8, lr=0.05, batch_size=1, **GRADIENT_DESCENT)
    config = PatcherConfig(alpha=0.5, round_steps=60, attackers=(attacker,), delta_dtype="float32")
    method = Patcher(config, unsafe=ONE_UNSAFE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    method.prepare(Setup(model, seed=0, max_steps=10_000))
    for index in range(60 * 25):
        step = Step(index, 0, 1, lambda m, b: m(**b).loss, lambda loss: loss.backward())
        method.backward(model, SAFE_BATCH, step)
        optimizer.step()
        method.after_step(model, optimizer, step)
        optimizer.zero_grad()
        if index == 119:
            # One round with delta frozen: theta -> a - alpha delta.
            delta = method.vectors.pool.vectors[0].delta["theta"].double()
            torch.testing.assert_close(model.theta.detach(), a - 0.5 * delta, rtol=1e-5, atol=1e-6)
    eye = torch.eye(3, dtype=torch.float64)
    expected = torch.linalg.solve(eye - 0.5 * shrink, a - 0.5 * shrink @ b)
    torch.testing.assert_close(model.theta.detach(), expected, rtol=1e-5, atol=1e-6)


# -- schedule, telemetry, pools, references ------------------------------------------------------------------


def test_schedule_and_telemetry() -> None:
    model = llama()
    attacker = Attacker(steps=20, lr=1e-2, batch_size=6)
    method = Patcher(PatcherConfig(round_steps=3, attackers=(attacker,)), unsafe=UNSAFE)
    log = drive(method, model, 9)
    attacks = [row for row in log if "attack_norm" in row]
    assert len(attacks) == 2  # after rounds 0 and 1; the run's last round needs no further attack
    assert method.passes == 2 * 20 + 6  # and one attacked pass in each of the six later steps
    assert attacks[0]["attack_loss_last"] < attacks[0]["attack_loss_first"]
    assert "attack_cosine" not in attacks[0]
    assert -1.0 <= attacks[1]["attack_cosine"] <= 1.0
    assert sum(row.get("tokens", 0) for row in log) == 2 * 20 * 6 * 4
    rounds = [row for row in log if "safe_loss" in row]
    assert [("attacked_loss" in row) for row in rounds] == [False, True, True]
    assert rounds[1]["gap"] == pytest.approx(rounds[1]["attacked_loss"] - rounds[1]["safe_loss"])


def test_pool_draws_every_vector_and_uses_each_attackers_data() -> None:
    other = EncodedSet(tuple(reversed(UNSAFE.rows)), 0)
    config = PatcherConfig(round_steps=4, attackers=(ATTACKER, Attacker(steps=2, lr=1e-2, batch_size=1, lora_rank=1)))
    method = Patcher(config, unsafe=(UNSAFE, other))
    drive(method, llama(), 12, stop=11)
    drawn = {method.vectors.pool.choose(i).attack_steps for i in range(20)}
    assert drawn == {3, 2}


def test_random_attack_lengths_stay_in_range_and_repeat() -> None:
    config = PatcherConfig(round_steps=1, attackers=(Attacker(steps=4, steps_min=1, lr=1e-3, batch_size=1),))
    lengths = []
    for _ in range(2):
        log = drive(Patcher(config, unsafe=UNSAFE), llama(), 12)
        lengths.append([row["attack_steps"] for row in log if "attack_steps" in row])
    assert lengths[0] == lengths[1]
    assert set(lengths[0]) <= {1.0, 2.0, 3.0, 4.0} and len(set(lengths[0])) > 1


@pytest.mark.parametrize("delay", [0, 2])
def test_references_differ_by_the_defenders_drift(delay: int) -> None:
    """Property 12: current and source coincide at age 0 and differ by exactly the drift otherwise."""
    vectors, drifts = {}, {}
    for reference in ("current", "source"):
        model = llama()
        config = PatcherConfig(
            round_steps=3, attackers=(ATTACKER,), reference=reference, delay=delay, delta_dtype="float32"
        )
        method = Patcher(config, unsafe=UNSAFE)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        method.prepare(Setup(model, seed=0, max_steps=20))
        for index in range(3 + delay + 1):
            if index == 3:
                at_source = weights(model)
            at_adoption = weights(model)
            step = Step(index, 0, 1, lambda m, b: m(**b).loss, lambda loss: loss.backward())
            method.backward(model, SAFE.batch_at(2, seed=0, step=index, purpose="outer"), step)
            optimizer.step()
            optimizer.zero_grad()
        vectors[reference] = list(method.vectors.pool.vectors[0].delta.values())
        drifts[reference] = [x - y for x, y in zip(at_adoption, at_source, strict=True)]
    for current, source, drift in zip(vectors["current"], vectors["source"], drifts["source"], strict=True):
        torch.testing.assert_close(current, source - drift, rtol=0, atol=1e-6)
    assert (sum(float(d.abs().sum()) for d in drifts["source"]) > 0) == (delay > 0)


def test_reset_optimizer_clears_moments_at_the_end_of_a_round() -> None:
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = PatcherConfig(round_steps=2, attackers=(ATTACKER,), reset_optimizer=True)
    drive(Patcher(config, unsafe=UNSAFE), model, 4, optimizer=optimizer, stop=2)
    assert not optimizer.state
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    drive(Patcher(PatcherConfig(round_steps=2, attackers=(ATTACKER,)), unsafe=UNSAFE), model, 4, optimizer=optimizer)
    assert optimizer.state


@pytest.mark.parametrize("kind", ["ce", "kl"])
def test_retain_term_adds_its_gradient(kind: str) -> None:
    base, kept = llama(), llama()
    drive(Patcher(PatcherConfig(round_steps=2, attackers=(ATTACKER,)), unsafe=UNSAFE), base, 6)
    config = PatcherConfig(round_steps=2, attackers=(ATTACKER,), retain=kind, retain_weight=0.7, retain_batch_size=3)
    method = Patcher(config, unsafe=UNSAFE, retain=SAFE)
    drive(method, kept, 6)
    assert not same(weights(base), weights(kept))
    assert method.passes == 2 * ATTACKER.steps + 4 + 6


def test_c_keeps_a_share_of_the_update_and_nothing_else_changes() -> None:
    start, ends = weights(llama()), []
    for c in (1.0, 0.7):
        model = llama()
        log = drive(Patcher(PatcherConfig(round_steps=2, attackers=(ATTACKER,), c=c), unsafe=UNSAFE), model, 6)
        ends.append((weights(model), log))
    (whole, log), (kept, other) = ends
    assert log == other
    for a, b, d in zip(start, whole, kept, strict=True):
        torch.testing.assert_close(d, a + 0.7 * (b - a))
    with pytest.raises(ConfigError, match="c"):
        PatcherConfig(c=0.0)


@pytest.mark.parametrize(("lr", "alpha", "told"), [(1e-2, 0.5, 0), (2e-3, 0.5, 0), (1e-3, 0.5, 1), (1e-3, 0.0, 0)])
def test_an_attacker_far_weaker_than_the_training_is_told(lr: float, alpha: float, told: int) -> None:
    config = PatcherConfig(alpha=alpha, round_steps=2, attackers=(Attacker(steps=3, lr=lr),))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        Patcher(config, unsafe=UNSAFE).prepare(Setup(llama(), seed=0, max_steps=6, lr=1e-2))
    assert sum("far from the training's 0.01" in str(w.message) for w in seen) == told


# -- resume (property 17) and what reaches the disk (R22) ----------------------------------------------------


@pytest.mark.parametrize("stop", range(1, 9))
@pytest.mark.parametrize("delay", [0, 1, 4])
def test_resume_anywhere_gives_the_uninterrupted_run(tmp_path: Path, stop: int, delay: int) -> None:
    config = PatcherConfig(round_steps=3, attackers=(ATTACKER,), delay=delay, retain="kl", retain_weight=0.1, c=0.8)

    def fresh() -> Patcher:
        return Patcher(config, unsafe=UNSAFE, retain=SAFE)

    whole = llama()
    log = drive(fresh(), whole, 9, scratch=None)
    first = llama()
    (tmp_path / "one").mkdir()
    head = fresh()
    early = drive(head, first, 9, stop=stop, scratch=tmp_path / "one")
    state = head.state()
    again = llama()
    again.load_state_dict(first.state_dict())
    (tmp_path / "two").mkdir()
    tail = fresh()
    late = drive(tail, again, 9, start=stop, scratch=tmp_path / "two", state=state)
    assert same(weights(whole), weights(again))
    assert early + late == log


@pytest.mark.parametrize("stop", [None, 3, 4, 6, 8])
@pytest.mark.parametrize("several", [False, True])
def test_the_sequential_loop_is_the_general_one_at_delay_zero(tmp_path: Path, stop: int | None, several: bool) -> None:
    """InTurn against Scheduled with attackers in this process: weights, telemetry, cost, and a resumed run."""
    seen = []
    other = Attacker(steps=2, lr=2e-2, batch_size=3)
    config = PatcherConfig(round_steps=3, attackers=(ATTACKER, other) if several else (ATTACKER,))
    for general in (False, True):
        scratch = tmp_path / f"{general}"
        scratch.mkdir()
        model, log, start, state = llama(), [], 0, None
        for end in [9] if stop is None else [stop, 9]:
            method = Patcher(config, unsafe=UNSAFE)
            if general:
                attacks = SimulatedAttacks(method.unsafe, config.attackers, 0, torch.bfloat16)
                method.backend = InProcessBackend(attacks, model)
            until = end if end < 9 else None
            log += drive(method, model, 9, start=start, stop=until, scratch=scratch, state=state)
            assert isinstance(method.vectors, Scheduled if general else InTurn)
            start, state = end, method.state()
        seen.append((weights(model), log, method.passes, sorted(p.name for p in scratch.iterdir())))
    assert same(seen[0][0], seen[1][0])
    assert seen[0][1:] == seen[1][1:]


def test_no_attack_vector_in_the_state_and_files_are_the_defenders_own(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = llama()
    seen: list[list[torch.Tensor]] = []
    method = Patcher(PatcherConfig(round_steps=2, attackers=(ATTACKER,)), unsafe=UNSAFE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    method.prepare(Setup(model, seed=0, max_steps=8, scratch=tmp_path))
    for index in range(8):
        seen.append(weights(model))
        step = Step(index, 0, 1, lambda m, b: m(**b).loss, lambda loss: loss.backward())
        method.backward(model, SAFE.batch_at(2, seed=0, step=index, purpose="outer"), step)
        optimizer.step()
        optimizer.zero_grad()
        state = method.state()
        tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
        assert all(v.dim() == 1 and len(v) <= 8 for v in tensors.values()), "only loss meters may be tensors"
        files = sorted(tmp_path.iterdir())
        assert len(files) <= 1
        for file in files:
            stored = load_file(file)
            ordered = [n for n, _ in model.named_parameters()]
            assert any(same([stored[n] for n in ordered], w) for w in seen), file.name


# -- settings ------------------------------------------------------------------------------------------------


def test_the_papers_settings_are_a_preset() -> None:
    config = PRESETS["paper_sequential"]
    assert (config.alpha, config.round_steps, config.reference) == (0.5, 1000, "current") and config.reset_optimizer
    attacker = config.attackers[0]
    assert (attacker.steps, attacker.lr, attacker.batch_size, attacker.weight_decay) == (300, 1e-5, 4, 0.01)


def test_what_is_not_given_hangs_on_the_run() -> None:
    """30 rounds, attacks of up to five rounds, and the training's learning rate."""
    config = PatcherConfig().over_run(3000, 4e-4)
    attacker = config.attackers[0]
    assert (config.round_steps, attacker.steps_min, attacker.steps, attacker.lr) == (100, 0, 500, 4e-4)
    assert PatcherConfig().over_run(30, 1.0).round_steps == 10, "shorter rounds get nowhere"
    given = PatcherConfig(round_steps=7, attackers=(Attacker(steps=3, lr=1e-2), Attacker(lr=1e-5, steps_min=2)))
    settled = [(a.steps_min, a.steps, a.lr) for a in given.over_run(100, 4e-4).attackers]
    assert settled == [(None, 3, 1e-2), (2, 35, 1e-5)], "a length that is given is kept"
    assert (given.round_steps, given.attackers[1].steps) == (7, None), "the given settings are as they were"
    method = Patcher(unsafe=UNSAFE)
    for steps, k2 in ((600, 20), (300, 10)):  # of one object, for one run after the other
        method.prepare(Setup(llama(), seed=0, max_steps=steps, lr=1e-3))
        assert (method.config.round_steps, method.config.attackers[0].steps) == (k2, 5 * k2)
    with pytest.raises(ConfigError, match="both are needed"):
        method.prepare(Setup(llama(), seed=0, max_steps=300))


def test_the_published_parallel_timing_is_a_preset() -> None:
    config = PRESETS["reference_parallel"]
    assert (config.schedule, config.alpha, config.round_steps, config.reference) == (
        "reference_parallel",
        0.5,
        1000,
        "current",
    )
    assert config.attackers[0].steps == 500 and config.over(15_000).first == 1999
    assert not config.reset_optimizer  # one program for the whole run


def test_settings_from_plain_values() -> None:
    config = build(PatcherConfig, {"alpha": 0.3, "attackers": [{"steps": 10}, {"steps": 5, "lr": 1e-3}]})
    assert [a.steps for a in config.attackers] == [10, 5]
    with pytest.raises(ConfigError, match="did you mean 'steps'"):
        build(PatcherConfig, {"attackers": [{"step": 10}]})


@pytest.mark.parametrize(
    "bad",
    [
        {"alpha": 1.5},
        {"round_steps": 0},
        {"delay": -1},
        {"attackers": ()},
        {"retain": "l2"},
        {"retain_batch_size": 0},
    ],
)
def test_bad_settings_are_refused(bad: dict) -> None:
    with pytest.raises(ConfigError):
        build(PatcherConfig, bad)


def test_missing_data_is_refused() -> None:
    with pytest.raises(DataError, match="unsafe sets"):
        Patcher(PatcherConfig(), unsafe=EncodedSet((), 0))
    with pytest.raises(DataError, match="harmless rows"):
        Patcher(PatcherConfig(retain="kl"), unsafe=UNSAFE)
    with pytest.raises(DataError, match="8 retain rows would be ignored"):
        Patcher(PatcherConfig(retain="none"), unsafe=UNSAFE, retain=SAFE)
    assert Patcher(unsafe=UNSAFE).config.retain == "none" and Patcher(unsafe=UNSAFE, retain=SAFE).config.retain == "kl"


@pytest.mark.parametrize(("round_steps", "delay", "steps"), [(1000, 0, 300), (4, 0, 4), (4, 2, 6)])
def test_a_run_without_any_attack_is_refused(round_steps: int, delay: int, steps: int) -> None:
    config = PatcherConfig(round_steps=round_steps, delay=delay, attackers=(ATTACKER,))
    with pytest.raises(ConfigError, match="first simulated attack would come at step"):
        Patcher(config, unsafe=UNSAFE).prepare(Setup(llama(), seed=0, max_steps=steps))


def test_alpha_one_counts_the_passes_it_runs() -> None:
    method = Patcher(PatcherConfig(alpha=1.0, round_steps=2, attackers=(ATTACKER,)), unsafe=UNSAFE)
    drive(method, llama(), 6)
    # Per attacked step one attacked pass more and one safe pass less than the loop counts.
    assert method.passes == 2 * ATTACKER.steps
