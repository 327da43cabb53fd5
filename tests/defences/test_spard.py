"""SPAG against its equations: naive twins, exact reductions, cost, resume, ranks, telemetry, bad input."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from casehard.data.batches import Encoded, EncodedSet, indices_at
from casehard.defences.spard import MAX_SKIPS, PRESETS, Spard, SpardConfig, preset
from casehard.errors import ConfigError, DataError, Diverged, Unsupported
from casehard.maths.optimizers import OptimizerView
from casehard.train.passes import rows_of_rank
from casehard.train.protocol import Setup, Step
from fakes import tiny_llama, tiny_rows
from forks import spawn

USER = tiny_rows(24, seed=1)
SAFE = tiny_rows(10, seed=2)
OTHER = tiny_rows(6, seed=3)
EAGER = {"tau": 0.5, "delta": 0.0, "batch_size": 4}


def adamw(model, lr=1e-2):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.01)


def drive(method, model, steps, *, optimizer=None, micros=1, start=0, state=None, log=None, scale=1.0):
    """Run the outer loop by hand: what the training shell does, without the Trainer."""
    optimizer = optimizer or adamw(model)
    rows = [] if log is None else log
    model.train()
    if method is not None:
        method.prepare(Setup(model, seed=0, max_steps=steps, micros=micros, log=rows.append))
        if state is not None:
            method.restore(state)
    for index in range(start, steps):
        for micro in range(micros):
            batch = USER.batch_at(4, seed=0, step=index * micros + micro, purpose="outer")
            step = Step(
                index,
                micro,
                micros,
                lambda m, b: m(**b).loss / micros,
                lambda loss: (loss * scale).backward(),
                rows.append,
            )
            step.loss(model, batch).backward()
        optimizer.step()
        if method is not None:
            method.after_step(model, optimizer, step)
        optimizer.zero_grad()
    return optimizer


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def moments(optimizer):
    return [v.clone() for s in optimizer.state.values() for v in s.values()]


def safe_loss(model, rows=SAFE):
    """Token mean over all rows, without dropout."""
    model.eval()
    total = count = 0
    with torch.no_grad():
        for i in range(len(rows)):
            row = rows.batch_at(1, seed=9, step=i, purpose="all")
            n = int((row["labels"][:, 1:] != -100).sum())
            total, count = total + float(model(**row).loss) * n, count + n
    model.train()
    return total / count


# -- exact reductions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"tau": 100.0}, {"tau": 0.0, "delta": 100.0}, {**EAGER, "eta_safe": 0.0}])
@pytest.mark.parametrize("dropout", [False, True])
def test_satisfied_constraint_or_zero_cap_is_sft_bit_for_bit(settings, dropout):
    plain, guarded = tiny_llama(dropout=0.3), tiny_llama(dropout=0.3)
    torch.manual_seed(1)
    expected = drive(None, plain, 5)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    method = Spard(SpardConfig(**settings, dropout=dropout), safe=SAFE)
    got = drive(method, guarded, 5)
    assert same(weights(plain), weights(guarded)) and same(moments(expected), moments(got))
    assert torch.equal(after, torch.get_rng_state())
    assert method.checks == 5 and method.trigger_rate == (1.0 if "eta_safe" in settings else 0.0)
    assert all(m.training for m in guarded.modules())


def twin(model, optimizer, index, config, taus, sets=(("safe", SAFE),)):
    """The step by definition: autograd on the whole model, dense vectors, the metric from the formula."""
    params = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    (topic, rows), tau = sets[0], taus[0]
    batch = rows.batch_at(config.batch_size, seed=0, step=index, purpose=f"spard-{topic}")
    loss = model(**batch).loss
    g = torch.cat([x.flatten() for x in torch.autograd.grad(loss, params)]).double()
    model.train()
    table = model.get_input_embeddings().weight
    moves = torch.cat([torch.full_like(p, config.embeddings or p is not table).flatten() for p in params]).bool()
    m = moves.double()
    if config.mode == "adam":
        v = torch.cat([(optimizer.state[p]["exp_avg_sq"] / (1 - 0.999 ** (index + 1))).flatten() for p in params])
        least = config.floor * float(v[moves & (v > 0)].double().mean().sqrt())
        m = torch.where(moves & (v > 0), 1 / (v.sqrt() + 1e-8).clamp(min=least), torch.zeros(())).double()
    violation = float(loss.detach()) - tau
    full = violation / float(g @ (m * g))
    cap = optimizer.param_groups[0]["lr"] if config.eta_safe == "lr" else config.eta_safe
    return violation, full, min(full, cap), -min(full, cap) * m * g


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"eta_safe": 1e-4},
        {"eta_safe": math.inf},
        {"embeddings": True, "floor": 0.01, "eta_safe": math.inf},
        {"floor": 0.1, "eta_safe": math.inf},
        {"mode": "euclidean"},
        {"mode": "euclidean", "eta_safe": math.inf},
        {"mode": "euclidean", "embeddings": True, "eta_safe": 1e-4},
    ],
)
def test_step_equals_the_naive_twin(settings):
    model, log = tiny_llama(), []
    config = SpardConfig(**EAGER, **settings)
    method = Spard(config, safe=SAFE)
    optimizer = adamw(model)
    shadow = copy.deepcopy(model)
    shadow_optimizer = adamw(shadow)
    shadow_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    drive(None, shadow, 1, optimizer=shadow_optimizer)
    drive(method, model, 1, optimizer=optimizer, log=log)
    violation, full, alpha, step = twin(shadow, shadow_optimizer, 0, config, method.taus)
    got = torch.cat([(p - q).detach().flatten() for p, q in zip(model.parameters(), shadow.parameters(), strict=True)])
    assert torch.allclose(got.double(), step, atol=2e-7 + 1e-4 * float(step.abs().max()))
    row = log[-1]
    assert row["violation"] == pytest.approx(violation, rel=1e-5)
    assert row["alpha"] == pytest.approx(alpha, rel=1e-4)
    assert row["alpha_share"] == pytest.approx(alpha / full, rel=1e-4)
    assert row["trigger_rate"] == 1.0
    assert row["step_ratio"] > 0 and -1 <= row["step_cosine"] <= 1


def test_full_sequence_equals_the_twin_step_by_step():
    model, other = tiny_llama(), tiny_llama()
    config = SpardConfig(tau=3.9, delta=0.05, batch_size=4)
    method = Spard(config, safe=SAFE)
    drive(method, model, 8)
    optimizer = adamw(other)
    for index in range(8):
        other.train()
        other(**USER.batch_at(4, seed=0, step=index, purpose="outer")).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        violation, _, _, step = twin(other, optimizer, index, config, [3.9])
        if violation > 0.05:
            with torch.no_grad():
                at = 0
                for p in other.parameters():
                    p.add_(step[at : at + p.numel()].view_as(p).float())
                    at += p.numel()
    assert 0 < method.triggers <= 8
    assert all(torch.allclose(a, b, atol=2e-6) for a, b in zip(weights(model), weights(other), strict=True))


def test_moments_step_count_and_weight_decay_are_untouched():
    model, shadow = tiny_llama(), tiny_llama()
    mine = drive(Spard(SpardConfig(**EAGER, eta_safe=math.inf), safe=SAFE), model, 1)
    plain = drive(None, shadow, 1)
    assert same(moments(mine), moments(plain))
    assert not same(weights(model), weights(shadow))
    assert all(p.grad is None for p in model.parameters())


def test_lora_only_the_adapter_moves():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    method = Spard(SpardConfig(**EAGER), safe=SAFE)
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    drive(method, model, 3)
    assert method.triggers == 3
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert any(
        not torch.equal(a, b) for a, b in zip(before, [p for p in model.parameters() if p.requires_grad], strict=True)
    )


def test_micro_batches_of_the_user_do_not_change_the_check():
    logs = []
    for micros in (1, 2):
        model, log = tiny_llama(), []
        optimizer = adamw(model, lr=0.0)
        drive(Spard(SpardConfig(**EAGER, mode="euclidean", eta_safe=1.0), safe=SAFE), model, 1,
              optimizer=optimizer, micros=micros, log=log)  # fmt: skip
        logs.append((log[-1]["violation"], log[-1]["alpha"], weights(model)))
    assert logs[0][0] == pytest.approx(logs[1][0]) and logs[0][1] == pytest.approx(logs[1][1], rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(logs[0][2], logs[1][2], strict=True))


def test_scaled_losses_give_the_same_alpha():
    results = []
    for scale in (1.0, 1024.0):
        model, log = tiny_llama(), []
        optimizer = adamw(model)
        optimizer.scaler = None if scale == 1 else SimpleNamespace(get_scale=lambda s=scale: s)
        drive(Spard(SpardConfig(**EAGER), safe=SAFE), model, 1, optimizer=optimizer, log=log, scale=scale)
        results.append((log[-1]["alpha"], weights(model)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(results[0][1], results[1][1], strict=True))


# -- several constraints, tau --------------------------------------------------------------------------------


def test_two_topics_meet_both_targets_to_first_order():
    model, log = tiny_llama(), []
    method = Spard(SpardConfig(tau=3.5, delta=0.0, eta_safe=math.inf), safe={"a": SAFE, "b": OTHER})
    drive(method, model, 1, log=log)
    assert log[-1]["residual"] == pytest.approx(0, abs=1e-5)
    assert method.taus == [3.5, 3.5]


def test_tau_auto_is_the_models_own_loss_for_each_topic():
    model, log = tiny_llama(), []
    method = Spard(SpardConfig(tau_scale=0.75), safe={"a": SAFE, "b": OTHER})
    method.prepare(Setup(model, seed=0, max_steps=1, log=log.append))
    assert method.taus == pytest.approx([0.75 * safe_loss(model, SAFE), 0.75 * safe_loss(model, OTHER)], rel=1e-5)
    assert {k for row in log for k in row} == {"tau_a", "tau_b"}


def test_hysteresis_acts_above_tau_plus_delta_and_aims_at_tau():
    model = tiny_llama()
    start = safe_loss(model)
    quiet = Spard(SpardConfig(tau=start - 0.2, delta=1.0), safe=SAFE)
    drive(quiet, tiny_llama(), 2)
    assert quiet.triggers == 0
    log = []
    loud = Spard(SpardConfig(tau=start - 0.5, delta=0.1, eta_safe=math.inf, batch_size=10), safe=SAFE)
    drive(loud, tiny_llama(), 1, log=log)
    assert log[-1]["violation"] > 0.1 and log[-1]["residual"] == pytest.approx(0, abs=1e-5)


# -- cost, stream, resume ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tau", "backwards"), [(100.0, 0), (0.1, 1)])
def test_one_forward_more_and_a_backward_only_when_triggered(tau, backwards):
    model, calls = tiny_llama(), {"forward": 0, "backward": 0}
    method = Spard(SpardConfig(tau=tau, delta=0.0), safe=SAFE)
    method.prepare(Setup(model, seed=0, max_steps=1))
    optimizer = adamw(model)
    model(**USER.batch_at(2, seed=0, step=0, purpose="outer")).loss.backward()
    optimizer.step()

    def loss(m, b):
        calls["forward"] += 1
        return m(**b).loss

    def backward(value):
        calls["backward"] += 1
        value.backward()

    method.after_step(model, optimizer, Step(0, 0, 1, loss, backward))
    assert calls == {"forward": 1, "backward": backwards}


def test_every_checks_only_then_and_the_stream_covers_each_epoch():
    method = Spard(SpardConfig(tau=100.0, every=2, batch_size=5), safe=SAFE)
    drive(method, tiny_llama(), 8)
    assert method.checks == 4
    seen = [i for step in range(2) for i in indices_at(len(SAFE), 5, seed=0, step=step, purpose="spard-safe")]
    assert sorted(seen) == list(range(10))
    row = rows_of_rank(SAFE, 5, seed=0, step=1, purpose="spard-safe")
    assert torch.equal(row["input_ids"], SAFE.batch_at(5, seed=0, step=1, purpose="spard-safe")["input_ids"])


def test_resume_is_bit_exact_and_keeps_the_first_tau():
    config = SpardConfig(delta=0.0, tau_scale=0.95)
    whole = tiny_llama()
    method = Spard(config, safe=SAFE)
    drive(method, whole, 6)
    first, half = Spard(config, safe=SAFE), tiny_llama()
    optimizer = drive(first, half, 3)
    state = first.state()
    second = Spard(config, safe=SAFE)
    drive(second, half, 6, optimizer=optimizer, start=3, state=state)
    assert same(weights(whole), weights(half))
    assert second.taus == method.taus and second.triggers == method.triggers > 0


def test_training_shell_runs_it_and_resumes_bit_exactly(tmp_path: Path):
    from casehard.train.fit import fit
    from casehard.train.recipe import TrainConfig

    train = TrainConfig(
        steps=6, batch_size=2, accumulation=2, lr=1e-2, warmup=0, precision="fp32", save_every=2, log_every=1
    )
    config = SpardConfig(delta=0.0, tau_scale=0.9)
    whole = fit(tiny_llama(), None, USER, config=train, method=Spard(config, safe=SAFE), seed=3, out=tmp_path / "a")

    def stop(model, step):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(tiny_llama(), None, USER, config=train, method=Spard(config, safe=SAFE), seed=3, out=tmp_path / "b",
            on_step=stop)  # fmt: skip
    method = Spard(config, safe=SAFE)
    resumed = fit(tiny_llama(), None, USER, config=train, method=method, seed=3, out=tmp_path / "b")
    assert same(weights(whole.model), weights(resumed.model))
    assert method.triggers > 0
    row = [r for r in resumed.log if "trigger_rate" in r][-1]
    assert {"safe_loss", "trigger_rate"} <= row.keys()
    triggered = [r for r in resumed.log if r.get("trigger_rate")]
    assert {"violation", "alpha", "alpha_share", "step_ratio", "step_cosine"} <= triggered[0].keys()


# -- the published code --------------------------------------------------------------------------------------


def test_reference_mode_clips_each_tensor_and_steps_the_shared_optimiser():
    model, shadow, log = tiny_llama(), tiny_llama(), []
    config = preset("published_code", tau=0.5, delta=0.0)
    mine = drive(Spard(config, safe=SAFE), model, 1, log=log)
    optimizer = drive(None, shadow, 1)
    shadow.eval()
    loss = shadow(**SAFE.batch_at(4, seed=0, step=0, purpose="spard-safe")).loss
    loss.backward()
    nn.utils.clip_grad_norm_(shadow.parameters(), 1.0)
    for p in shadow.parameters():
        p.grad.mul_(min((float(loss.detach()) - 0.5) / (float(p.grad.norm()) + 1e-8), 1.0))
    optimizer.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights(model), weights(shadow), strict=True))
    assert all(int(s["step"]) == 2 for s in mine.state.values()), "the step count doubles, as in that code"
    assert log[-1]["step_length"] > 0


# -- bad input -----------------------------------------------------------------------------------------------


def test_bad_settings_and_rows_are_refused():
    with pytest.raises(DataError, match="no safe rows"):
        Spard(safe=EncodedSet((), 0))
    with pytest.raises(DataError, match="no set"):
        Spard(safe={})
    with pytest.raises(DataError, match="no answer"):
        Spard(safe=EncodedSet((Encoded([3, 4], [-100, -100]),), 0))
    with pytest.raises(ConfigError, match="reference"):
        Spard(SpardConfig(mode="reference"), safe={"a": SAFE, "b": OTHER})
    for bad in (
        {"tau": -1.0},
        {"tau": math.nan},
        {"eta_safe": -1e-3},
        {"delta": -0.1},
        {"batch_size": 0},
        {"rho": 0.0},
    ):
        with pytest.raises(ConfigError):
            SpardConfig(**bad)
    with pytest.raises(ConfigError, match="preset"):
        preset("papre")
    assert PRESETS["paper"].mode == "euclidean"


def test_unreadable_optimisers_are_refused_not_guessed():
    def driven(optimizer, **settings):
        model = tiny_llama()
        drive(Spard(SpardConfig(**EAGER, **settings), safe=SAFE), model, 1, optimizer=optimizer(model.parameters()))

    with pytest.raises(Unsupported, match="Adagrad"):
        driven(lambda p: torch.optim.Adagrad(p, lr=0.01))
    driven(lambda p: torch.optim.Adagrad(p, lr=0.01), mode="euclidean")
    driven(lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9))
    with pytest.raises(Unsupported, match="rho"):
        driven(lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), rho=0.1)
    driven(lambda p: torch.optim.SGD(p, lr=0.01), rho=0.1)


def fake_step(index, value, log):
    return Step(index, 0, 1, lambda m, b: m.weight.sum() * value, lambda loss: loss.backward(), log.append)


class One(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


def armed(settings):
    model = One()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = Spard(SpardConfig(**settings), safe=SAFE)
    method.prepare(Setup(model, seed=0, max_steps=99))
    return model, optimizer, method


def test_non_finite_loss_is_skipped_counted_and_in_the_end_fatal():
    model, optimizer, method = armed({"tau": 0.1})
    log: list[dict] = []
    for index in range(MAX_SKIPS - 1):
        method.after_step(model, optimizer, fake_step(index, math.nan, log))
    assert method.skips == MAX_SKIPS - 1 and torch.equal(model.weight.detach(), torch.ones(3))
    assert all(row == {"skipped": 1.0} for row in log)
    with pytest.raises(Diverged, match="in a row"):
        method.after_step(model, optimizer, fake_step(99, math.inf, log))


def test_zero_gradient_with_violation_is_a_warned_no_op():
    model, optimizer, method = armed({"tau": 0.1})
    log: list[dict] = []
    step = Step(0, 0, 1, lambda m, b: (m.weight * 0).sum() + 1.0, lambda loss: loss.backward(), log.append)
    with pytest.warns(UserWarning, match="gradient is zero"):
        method.after_step(model, optimizer, step)
    assert torch.equal(model.weight.detach(), torch.ones(3)) and log[-1]["zero_gradient"] == 1.0


# -- end to end ----------------------------------------------------------------------------------------------


def test_planted_harmful_rows_sft_violates_and_spag_holds():
    refuse, comply, task = 5, 6, 7
    prompts = range(20, 40)
    safe = EncodedSet(tuple(Encoded([1, p, refuse, 2], [-100, -100, refuse, 2]) for p in prompts), 0)
    harmful = [Encoded([1, p, comply, 2], [-100, -100, comply, 2]) for p in list(prompts)[:6]]
    benign = [Encoded([1, p, task, 2], [-100, -100, task, 2]) for p in range(40, 60)]
    user = EncodedSet(tuple(harmful + benign), 0)

    def train(model, rows, steps, method=None, lr=3e-3):
        optimizer = adamw(model, lr)
        if method:
            method.prepare(Setup(model, seed=0, max_steps=steps))
        for index in range(steps):
            model(**rows.batch_at(8, seed=0, step=index, purpose="outer")).loss.backward()
            optimizer.step()
            if method:
                step = Step(index, 0, 1, lambda m, b: m(**b).loss, lambda loss: loss.backward())
                method.after_step(model, optimizer, step)
            optimizer.zero_grad()

    aligned = tiny_llama()
    train(aligned, safe, 60)
    start = safe_loss(aligned, safe)
    plain, guarded = copy.deepcopy(aligned), copy.deepcopy(aligned)
    train(plain, user, 120)
    method = Spard(SpardConfig(tau=start + 0.05, delta=0.05, batch_size=10), safe=safe)
    train(guarded, user, 120, method)
    only = EncodedSet(tuple(benign), 0)
    assert safe_loss(plain, safe) > start + 0.5
    assert safe_loss(guarded, safe) < start + 0.3
    assert safe_loss(guarded, only) < safe_loss(plain, only) + 0.15
    assert 0 < method.trigger_rate < 1


# -- ranks ---------------------------------------------------------------------------------------------------


def shared_run():
    """Two constraints under SGD: Adam's first, sign-like steps would blow up the rounding of another padding."""
    model = tiny_llama()
    method = Spard(SpardConfig(tau=3.9, delta=0.02, batch_size=4, eta_safe=0.5), safe={"a": SAFE, "b": OTHER})
    drive(method, model, 4, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    return model, method


def _rank(rank, world, out):
    import torch.distributed as dist

    torch.set_num_threads(1)
    # A file, not a port: ports may be taken.
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=world)
    model, method = shared_run()
    torch.save({"weights": weights(model), "triggers": method.triggers}, out / f"{rank}.pt")
    _shard(rank, world, out)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Run both distributed cases in one pair of processes: starting them takes longer than the work."""
    out = tmp_path_factory.mktemp("ranks")
    spawn(_rank, (2, out), nprocs=2)
    return out


@pytest.mark.slow
def test_two_ranks_equal_one(two_ranks: Path):
    ranks = [torch.load(two_ranks / f"{r}.pt") for r in range(2)]
    assert same(ranks[0]["weights"], ranks[1]["weights"])
    model, method = shared_run()
    assert method.triggers == ranks[0]["triggers"] > 0
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights(model), ranks[0]["weights"], strict=True))


def _shard(rank, world, out):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = tiny_llama()
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    triggers = []
    for tau in (3.9, 100.0):
        method = Spard(SpardConfig(tau=tau, delta=0.0, batch_size=4, eta_safe=0.5), safe=SAFE)
        drive(method, model, 3, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
        triggers.append(method.triggers)
    full = [p.full_tensor().detach().clone() for p in model.parameters()]
    if rank == 0:
        torch.save({"weights": full, "triggers": triggers}, out / "sharded.pt")


@pytest.mark.slow
def test_sharded_equals_replicated(two_ranks: Path):
    got = torch.load(two_ranks / "sharded.pt")
    model = tiny_llama()
    for tau, triggers in zip((3.9, 100.0), got["triggers"], strict=True):
        method = Spard(SpardConfig(tau=tau, delta=0.0, batch_size=4, eta_safe=0.5), safe=SAFE)
        drive(method, model, 3, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
        assert method.triggers == triggers
    assert got["triggers"][0] > 0
    assert all(torch.allclose(a, b, atol=2e-6) for a, b in zip(weights(model), got["weights"], strict=True))


def test_view_is_read_only():
    model = tiny_llama()
    optimizer = drive(None, model, 2)
    before = moments(optimizer)
    view = OptimizerView(optimizer, list(model.parameters()))
    for i, p in enumerate(model.parameters()):
        view.metric(i, torch.ones_like(p))
        view.last_step(i)
    assert same(before, moments(optimizer))
