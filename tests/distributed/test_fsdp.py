"""FSDP2 against one process: switching weights, the simulated attack, and moving rows between groups.

The ranks of a fixture run every case once and leave what they saw in files; the tests compare it with one process.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from casehard.distributed.fsdp import (
    is_sharded,
    local_parts,
    simulate_attack_sharded,
    weights_plus,
    weights_set_to,
)
from casehard.distributed.ranks import overlaps, span
from casehard.errors import Diverged, Unsupported
from casehard.maths.bilevel import Attacker, parameters, perturbed_view, simulate_attack, with_view
from forks import spawn

VOCAB, WIDTH = 11, 6
LAYOUTS = [(tie, keep) for tie in (False, True) for keep in (None, True, False)]


class Out(NamedTuple):
    loss: torch.Tensor
    logits: torch.Tensor


class Block(nn.Module):
    """Rows no number of ranks divides: 5, 6, 3 (fewer than four ranks) and 1 (fewer than two)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 5), nn.Linear(5, WIDTH)
        self.narrow, self.wide = nn.Linear(WIDTH, 3, bias=False), nn.Linear(3, WIDTH, bias=False)
        self.gain = nn.Parameter(torch.ones(1))
        self.drop = nn.Dropout(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        past = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None].to(x)
        return x + self.drop(self.gain * self.down(torch.tanh(self.up(past))) + self.wide(torch.tanh(self.narrow(x))))


class Toy(nn.Module):
    """A causal language model of a few hundred weights, quick to start in many processes."""

    def __init__(self, *, tie: bool = False, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed = nn.Embedding(VOCAB, WIDTH)
            self.blocks = nn.ModuleList([Block(), Block()])
            self.norm = nn.LayerNorm(WIDTH)
            self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        if tie:
            self.head.weight = self.embed.weight
        for block in self.blocks:
            block.drop.p = dropout
        self.to(dtype)

    def forward(self, input_ids, labels, attention_mask=None) -> Out:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return Out(loss, logits)


def batch_at(i: int, rows: int = 4) -> dict[str, torch.Tensor]:
    """Return rows of uneven length, the trained tokens of each differing, row 1 without any."""
    g = torch.Generator().manual_seed(100 + i)
    ids = torch.randint(VOCAB, (rows, 8), generator=g)
    labels = ids.clone()
    for row in range(rows):
        labels[row, : 1 + row] = -100
    labels[1] = -100
    mask = torch.ones_like(ids)
    mask[0, 6:], labels[0, 6:] = 0, -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def whole_delta(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return {n: (0.3 * torch.randn(p.shape, generator=g)).to(dtype) for n, p in model.named_parameters()}


def own_rows(whole: dict[str, torch.Tensor], ranks: int, rank: int) -> dict[str, torch.Tensor]:
    return {name: t[slice(*span(len(t), ranks, rank))].clone() for name, t in whole.items()}


def loss_of(model: nn.Module, i: int = 0) -> float:
    with torch.no_grad():
        return float(model(**batch_at(i)).loss)


def clear(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = None


# -- on the ranks ------------------------------------------------------------------------------------------------


def shard(model: nn.Module, mesh, keep=None, **options) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    options |= {} if keep is None else {"reshard_after_forward": keep}
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def copies(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in parts.items()}


def bits_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def sharded_parameters(model: nn.Module) -> dict:
    local_parts(model)
    return dict(model.named_parameters())


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.to_local().clone() for n, p in sharded_parameters(model).items()}


def two_passes(model: nn.Module, alpha: float, delta, micros: int = 2, scale: float = 1.0) -> None:
    """Accumulate eq. 2 over micro-batches as Patcher does: every safe pass, one switch, every attacked pass."""
    if alpha < 1:
        for i in range(micros):
            (model(**batch_at(i)).loss * (scale * (1 - alpha) / micros)).backward()
    if alpha > 0:
        with weights_plus(model, delta):
            for i in range(micros):
                (model(**batch_at(i)).loss * (scale * alpha / micros)).backward()


def case_switch(world: int, rank: int, mesh, tie: bool, keep) -> dict:
    model = shard(Toy(tie=tie), mesh, keep)
    handles = dict(model.named_parameters())
    delta = own_rows(whole_delta(Toy(tie=tie)), world, rank)
    start = copies(local_parts(model))
    out: dict = {"start": start, "losses": [loss_of(model)]}
    out["gathered"] = [n for n, p in model.named_parameters() if not hasattr(p, "full_tensor")]
    out["parts while gathered"] = bits_equal(local_parts(model), start)
    with weights_plus(model, delta):
        out["losses"].append(loss_of(model))
    out["losses"].append(loss_of(model))
    with weights_set_to(model, copies(delta)):
        out["losses"].append(loss_of(model))
    out["losses"].append(loss_of(model))
    model(**batch_at(0))  # a forward pass with a graph that nobody goes back through
    out["gradients"] = {}
    for alpha in (0.0, 0.5, 1.0):
        clear(model)
        two_passes(model, alpha, delta)
        out["gradients"][alpha] = gradients(model)
    out["losses"].append(loss_of(model))
    out["same objects"] = all(p is handles[n] for n, p in sharded_parameters(model).items())
    out["bits"] = bits_equal(local_parts(model), start)
    out["state dict"] = {n: t.full_tensor() for n, t in model.state_dict().items()}
    return out


def case_no_sync(world: int, rank: int, mesh) -> dict:
    """As accelerate accumulates: gradients of all but the last micro-batch wait, unreduced."""
    model = shard(Toy(), mesh)
    delta = own_rows(whole_delta(Toy()), world, rank)
    model.set_requires_gradient_sync(False)
    (model(**batch_at(0)).loss * 0.25).backward()
    out = {
        "attack refuses": refused(lambda: simulate_attack_sharded(model, batch_at, Attacker(steps=1, lr=1e-5), seed=0))
    }
    model.set_requires_gradient_sync(True)
    (model(**batch_at(1)).loss * 0.25).backward()
    with weights_plus(model, delta):
        for i in range(2):
            (model(**batch_at(i)).loss * 0.25).backward()
    out["gradients"] = gradients(model)
    return out


def refused(call) -> str:
    try:
        call()
    except Unsupported as error:
        return str(error)
    return ""


class Boom(RuntimeError):
    pass


def case_errors(world: int, rank: int, mesh, keep) -> dict:
    model = shard(Toy(), mesh, keep)
    delta = own_rows(whole_delta(Toy()), world, rank)
    start, out = copies(local_parts(model)), {}

    def boom(*args):
        raise Boom

    for where in ("body", "forward", "backward"):
        clear(model)
        with contextlib.suppress(Boom), weights_plus(model, delta):
            loss = model(**batch_at(0)).loss
            if where == "forward":
                hook = model.blocks[1].up.register_forward_hook(boom)
                try:
                    model(**batch_at(0))
                finally:
                    hook.remove()
            if where == "backward":
                hook = model.blocks[0].up.register_full_backward_hook(boom)
                try:
                    model(**batch_at(0)).loss.backward()
                finally:
                    hook.remove()
            loss.new_zeros(()).item()
            raise Boom
        clear(model)
        bits = bits_equal(local_parts(model), start)
        model(**batch_at(0)).loss.backward()
        out[where] = (bits, loss_of(model), gradients(model))
    return out


def case_attack(world: int, rank: int, mesh, tie: bool, optimizer: str, rows: int) -> dict:
    model = shard(Toy(tie=tie), mesh)
    start = copies(local_parts(model))
    model(**batch_at(9)).loss.backward()
    model.embed.weight.grad = None
    held = {n: (p.grad, None if p.grad is None else p.grad.to_local().clone()) for n, p in model.named_parameters()}
    random = torch.get_rng_state()
    model.set_requires_gradient_sync(False)  # as in all but the last micro-batch of accelerate
    run = simulate_attack_sharded(model, lambda i: batch_at(i, rows), attacker(optimizer), seed=3, steps=4)
    kept = all(p.grad is held[n][0] for n, p in model.named_parameters())
    states = [m._get_fsdp_state() for m in (model, *model.blocks)]
    kept &= not any(g.reduce_grads or g.all_reduce_grads for s in states for g in s._fsdp_param_groups)
    kept &= all(g is None or torch.equal(g.to_local(), c) for g, c in held.values())
    seen: list[int] = []

    def failing(i: int):
        if i == 2:
            raise Boom
        return batch_at(i)

    with contextlib.suppress(Boom):
        simulate_attack_sharded(model, failing, attacker(optimizer), seed=3, progress=seen.append)
    try:
        simulate_attack_sharded(model, batch_at, Attacker(lr=1e30, steps=3, optimizer="sgd", clip=0.0), seed=3)
        message = ""
    except Diverged as error:
        message = str(error)
    return {
        "weights": run.weights,
        "losses": run.losses,
        "tokens": run.tokens,
        "kept": kept and torch.equal(random, torch.get_rng_state()),
        "bits": bits_equal(local_parts(model), start),
        "seen": seen,
        "diverged": message,
        "loss": loss_of(model),
    }


def attacker(optimizer: str) -> Attacker:
    return Attacker(steps=4, lr=0.02, optimizer=optimizer, clip=0.5, weight_decay=0.1)


def case_refusals(world: int, rank: int, mesh) -> dict:
    from torch.distributed.fsdp import fully_shard

    model = shard(Toy(), mesh)
    delta = own_rows(whole_delta(Toy()), world, rank)
    start = copies(local_parts(model))
    partly = Toy()
    fully_shard(partly.blocks[0], mesh=mesh)

    def enter(m, d):
        with weights_plus(m, d):
            raise AssertionError

    return {
        "missing": refused(lambda: enter(model, {k: v for k, v in delta.items() if k != "norm.bias"})),
        "shape": refused(lambda: enter(model, delta | {"embed.weight": torch.zeros(1, 1)})),
        "partly": refused(lambda: local_parts(partly)),
        "is_sharded": (is_sharded(model), is_sharded(partly), is_sharded(Toy())),
        "half": refused(lambda: local_parts(shard(Toy(dtype=torch.bfloat16), mesh))),
        "lora": refused(
            lambda: simulate_attack_sharded(model, batch_at, Attacker(steps=1, lr=1e-5, lora_rank=2), seed=0)
        ),
        "bits": bits_equal(local_parts(model), start),
    }


def case_mixed_precision(world: int, rank: int, mesh) -> dict:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = shard(Toy(), mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    start = copies(local_parts(model))
    delta = own_rows(whole_delta(Toy(), torch.bfloat16), world, rank)
    with weights_plus(model, delta):
        inside = loss_of(model)
    return {"inside": inside, "bits": bits_equal(local_parts(model), start)}


def case_dropout(world: int, rank: int, mesh) -> list[float]:
    model = shard(Toy(dropout=0.5), mesh).train()
    runs = [simulate_attack_sharded(model, batch_at, attacker("adamw"), seed=s, steps=2) for s in (3, 3, 4)]
    return [r.losses[-1] for r in runs]


def case_replicated(world: int, rank: int, mesh) -> dict:
    """Two replicas, each sharded over two ranks."""
    run = simulate_attack_sharded(shard(Toy(dtype=torch.float64), mesh), batch_at, attacker("adamw"), seed=3)
    return {"losses": run.losses, "weights": run.weights}


def run_cases(world: int, rank: int, mesh, pairs) -> dict:
    layouts = {1: [(False, None), (True, False)], 2: LAYOUTS, 4: [(False, None), (True, False), (True, 2)]}[world]
    return {
        "switch": {layout: case_switch(world, rank, mesh, *layout) for layout in layouts},
        "no sync": case_no_sync(world, rank, mesh),
        "errors": {keep: case_errors(world, rank, mesh, keep) for keep in (None, True, False)},
        "attack": {
            (tie, kind, rows): case_attack(world, rank, mesh, tie, kind, rows)
            for tie, kind, rows in [(False, "adamw", 4), (True, "adam", 3), (False, "sgd", 5)]
        },
        "refusals": case_refusals(world, rank, mesh),
        "mixed": case_mixed_precision(world, rank, mesh),
        "dropout": case_dropout(world, rank, mesh),
        "replicated": case_replicated(world, rank, pairs) if world == 4 else {},
    }


def _rank(rank: int, out: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    # A file, not a port: ports may be taken.
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=4)
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    alone = init_device_mesh("cpu", (4, 1), mesh_dim_names=("each", "one"))["one"]
    seen = {
        1: run_cases(1, 0, alone, pairs),
        2: run_cases(2, rank % 2, pairs["shard"], pairs),
        4: run_cases(4, rank, init_device_mesh("cpu", (4,)), pairs),
    }
    torch.save(seen, out / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory) -> list[dict]:
    """Run every case, by ones, twos and four, in one set of processes: starting them takes longer than the work."""
    out = tmp_path_factory.mktemp("ranks")
    spawn(_rank, (out,), nprocs=4)
    return [torch.load(out / f"{r}.pt", weights_only=False) for r in range(4)]


@pytest.fixture(params=[1, 2, 4])
def ranks(request, four_ranks) -> list[dict]:
    return [four_ranks[r][request.param] for r in range(request.param)]


# -- against one process -----------------------------------------------------------------------------------------


def close(a: dict, b: dict, atol: float = 1e-5) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def joined(ranks: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([r[name] for r in ranks]) for name in ranks[0]}


def expected_gradients(alpha: float, *, tie: bool = False, micros: int = 2, dtype=torch.float32) -> dict:
    model = Toy(tie=tie, dtype=dtype)
    for i in range(micros):
        (model(**batch_at(i)).loss * ((1 - alpha) / micros)).backward()
        view = perturbed_view(parameters(model), whole_delta(model, dtype))
        with_view(model, view, lambda m, i=i: (m(**batch_at(i)).loss * (alpha / micros)).backward())
    return {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.slow
def test_switches_are_seen_by_forward_and_backward_and_leave_no_trace(ranks):
    for (tie, keep), first in ranks[0]["switch"].items():
        model, all_ranks = Toy(tie=tie), [r["switch"][tie, keep] for r in ranks]
        master = {n: p.detach() for n, p in model.named_parameters()}
        delta = whole_delta(model)
        inside = with_view(model, perturbed_view(parameters(model), delta), loss_of)
        anchor = with_view(model, delta, loss_of)
        clean = loss_of(model)
        losses = [clean, inside, clean, anchor, clean, clean]
        assert min(abs(clean - inside), abs(clean - anchor)) > 0.01
        assert bits_equal(joined([r["start"] for r in all_ranks]), master)
        assert any(t.numel() == 0 for t in all_ranks[-1]["start"].values()) == (len(ranks) > 1)
        for r in all_ranks:
            assert r["losses"] == pytest.approx(losses, abs=1e-5), (tie, keep)
            assert r["parts while gathered"] and r["bits"] and r["same objects"]
            assert len(r["state dict"]) == len(model.state_dict())
            assert bits_equal(r["state dict"], {n: t.detach() for n, t in model.state_dict().items()})
        for alpha in (0.0, 0.5, 1.0):
            close(joined([r["gradients"][alpha] for r in all_ranks]), expected_gradients(alpha, tie=tie))
        # What the names of a model that FSDP2 left gathered would have given.
        assert bool(first["gathered"]) == (keep in (None, False)), keep


@pytest.mark.slow
def test_gradients_that_wait_unreduced_are_kept_and_refused_by_the_attack(ranks):
    assert all("wait to be reduced" in r["no sync"]["attack refuses"] for r in ranks)
    close(joined([r["no sync"]["gradients"] for r in ranks]), expected_gradients(0.5))


@pytest.mark.slow
def test_an_exception_inside_leaves_weights_and_the_next_gradient_alone(ranks):
    model = Toy()
    model(**batch_at(0)).loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    for keep, cases in ranks[0]["errors"].items():
        for where in cases:
            seen = [r["errors"][keep][where] for r in ranks]
            assert all(bits for bits, _, _ in seen), (keep, where)
            assert [loss for _, loss, _ in seen] == pytest.approx([loss_of(model)] * len(ranks), abs=1e-5), (
                keep,
                where,
            )
            close(joined([got for _, _, got in seen]), expected)


@pytest.mark.slow
def test_attack_equals_one_process(ranks):
    for tie, kind, rows in ranks[0]["attack"]:
        all_ranks = [r["attack"][tie, kind, rows] for r in ranks]
        model = Toy(tie=tie)
        source = {n: p.detach() for n, p in model.named_parameters()}
        run = simulate_attack(model, source, lambda i, rows=rows: batch_at(i, rows), attacker(kind), seed=3)
        close(joined([r["weights"] for r in all_ranks]), run.weights)
        assert max(float((run.weights[n] - source[n]).abs().max()) for n in source) > 0.01
        for r in all_ranks:
            assert r["losses"] == pytest.approx(run.losses, abs=1e-5)
            assert r["tokens"] == run.tokens
            assert r["kept"] and r["bits"] and r["seen"] == [0, 1]
            assert "diverged" in r["diverged"]
            assert r["loss"] == pytest.approx(loss_of(model), abs=1e-5)


@pytest.mark.slow
def test_refusals_name_what_is_wrong_and_change_nothing(ranks):
    for r in ranks:
        seen = r["refusals"]
        assert "disagree on 1 parameters, first 'norm.bias'" in seen["missing"]
        assert "'embed.weight' has shape (1, 1)" in seen["shape"]
        assert "is not sharded" in seen["partly"]
        assert seen["is_sharded"] == (True, True, False)
        assert "bfloat16" in seen["half"]
        assert "lora_rank 2" in seen["lora"]
        assert seen["bits"]


@pytest.mark.slow
def test_the_sum_is_composed_before_it_is_rounded(ranks):
    """FSDP2's mixed precision gathers bf16(theta + delta), not bf16(theta) + delta."""
    model = Toy()
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_((p + whole_delta(model, torch.bfloat16)[n]).bfloat16().float())
    for r in ranks:
        assert r["mixed"]["bits"]
        assert r["mixed"]["inside"] == pytest.approx(loss_of(model.bfloat16()), abs=1e-2)


@pytest.mark.slow
def test_the_seed_alone_decides_dropout(ranks):
    for r in ranks:
        first, again, other = r["dropout"]
        assert first == again == ranks[0]["dropout"][0] != other


@pytest.mark.slow
def test_attack_on_a_replicated_and_sharded_model(ranks):
    if len(ranks) < 4:
        pytest.skip("needs four ranks")
    model = Toy(dtype=torch.float64)
    source = {n: p.detach() for n, p in model.named_parameters()}
    run = simulate_attack(model, source, batch_at, attacker("adamw"), seed=3)
    for pair in (ranks[:2], ranks[2:]):
        close(joined([r["replicated"]["weights"] for r in pair]), run.weights, atol=1e-6)
        assert pair[0]["replicated"]["losses"] == pytest.approx(run.losses, abs=1e-6)


# -- one process -------------------------------------------------------------------------------------------------


def test_a_whole_model_is_refused():
    assert not is_sharded(Toy())
    with pytest.raises(Unsupported, match="is not sharded"):
        local_parts(Toy())


@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 9))
def test_overlaps_move_every_row_once_to_its_place(rows, senders, receivers):
    whole = torch.arange(rows)
    sent = [*whole.chunk(senders), *[whole[:0]] * senders][:senders]
    wanted = [*whole.chunk(receivers), *[whole[:0]] * receivers][:receivers]
    got: list[list[torch.Tensor]] = [[] for _ in range(receivers)]
    for s, r, start, stop in overlaps(rows, senders, receivers):
        assert start < stop
        offset = span(rows, senders, s)[0]
        got[r].append(sent[s][start - offset : stop - offset])
        assert len(got[r][-1]) == stop - start
    for pieces, expected in zip(got, wanted, strict=True):
        assert torch.equal(torch.cat([whole[:0], *pieces]), expected)


def test_overlaps_by_hand():
    assert overlaps(10, 2, 3) == [(0, 0, 0, 4), (0, 1, 4, 5), (1, 1, 5, 8), (1, 2, 8, 10)]
    assert overlaps(3, 4, 1) == [(0, 0, 0, 1), (1, 0, 1, 2), (2, 0, 2, 3)]
    assert overlaps(0, 2, 2) == []
