"""R5, R6, R7: a full disk, a number that is not finite, a signal."""

from __future__ import annotations

import math
import resource
import signal

import pytest
import torch

from casehard.errors import Diverged, Interrupted, Lost, StorageError
from casehard.io.manifest import verify
from casehard.train.checkpoint import checkpoints
from casehard.train.fit import fit
from casehard.train.guards import FiniteGuard, require_finite, told_of_peers
from casehard.train.recipe import TrainConfig
from fakes import Averaging, largest_difference, tiny_llama, tiny_rows, weights

ROWS = tiny_rows(8)


def config(**changes):
    values = {"steps": 8, "batch_size": 2, "lr": 1e-2, "warmup": 0, "save_every": 1, "log_every": 1}
    return TrainConfig(**(values | {"precision": "fp32"} | changes))


# -- R5 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [10, 2_000, 12_000, 40_000, 100_000])
def test_a_full_disk_does_no_harm(tmp_path, limit):
    """The limits stop the save in its first file, in the weights, in the generator state and in the optimiser."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def hook(model, step):
        if step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))

    try:
        with pytest.raises(StorageError) as caught:
            fit(tiny_llama(), None, ROWS, config=config(), seed=0, out=tmp_path, on_step=hook)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.exit_code == 5
    assert "needed" in str(caught.value) and "free" in str(caught.value)
    assert f"{limit:,}" in str(caught.value)
    assert [step for step, _ in checkpoints(tmp_path)] == [3, 2]
    for _, folder in checkpoints(tmp_path):
        verify(folder)
    assert list(tmp_path.glob(".*")) == []
    assert fit(tiny_llama(), None, ROWS, config=config(), seed=0, out=tmp_path).budget.steps == 8


# -- R6 ------------------------------------------------------------------------------------------------------


class Spoils:
    """Makes one number of step ``at`` not finite."""

    name, config = "spoils", None

    def __init__(self, what, value, at=3):
        self.what, self.value, self.at = what, value, at

    def backward(self, model, batch, step):
        bad = step.index == self.at and step.last
        if bad and self.what == "attack":
            require_finite(torch.tensor([0.0, self.value]), "inner attack loss", step=step.index)
        loss = step.loss(model, batch)
        step.backward(loss * self.value if bad and self.what == "loss" else loss)
        if bad and self.what == "gradient":
            list(model.parameters())[3].grad[0, 0] = self.value
        return (loss * self.value if bad and self.what == "reported" else loss).detach()


@pytest.mark.parametrize("clip", [1.0, 0.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("what", ["loss", "gradient", "attack", "reported"])
def test_divergence_stops_before_the_update(tmp_path, what, value, clip):
    model, good = tiny_llama(), {}

    def hook(model, step):
        good.update(weights(model))

    with pytest.raises(Diverged) as caught:
        recipe = config(clip=clip, accumulation=2)
        fit(model, None, ROWS, config=recipe, seed=0, out=tmp_path, method=Spoils(what, value), on_step=hook)
    assert caught.value.exit_code == 4
    assert "step 4" in str(caught.value)
    assert largest_difference(good, weights(model)) == 0
    assert [step for step, _ in checkpoints(tmp_path)] == [3, 2]
    rows = caught.value.log
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert math.isnan(rows[-1]["loss"]) and not any(math.isnan(row["loss"]) for row in rows[:-1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_divergence_without_any_method(tmp_path, value):
    """The case in which the stock Trainer logs 0.0, ends with NaN weights and exits 0."""
    model = tiny_llama()
    calls = []

    def spoil(module, inputs, output):
        calls.append(1)
        return output * value if len(calls) == 4 else output

    model.lm_head.register_forward_hook(spoil)
    with pytest.raises(Diverged, match="step 4"):
        fit(model, None, ROWS, config=config(), seed=0, out=tmp_path)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert [step for step, _ in checkpoints(tmp_path)] == [3, 2]


def test_the_guard_forgets_a_step_once_it_is_checked():
    guard = FiniteGuard()
    guard.saw_loss(torch.tensor(1.0))
    guard.saw_norm(torch.tensor(2.0))
    guard.check(0)
    guard.saw_loss(torch.tensor(math.inf))
    guard.saw_loss(torch.tensor(-math.inf))
    with pytest.raises(Diverged, match="loss nan"):
        guard.check(1)
    guard.check(2)
    require_finite(1.0, "x", step=0)
    with pytest.raises(Diverged, match="x is not finite at step 1"):
        require_finite(math.inf, "x", step=0)


# -- R7 ------------------------------------------------------------------------------------------------------


class Signals(Averaging):
    """Sends this process signals at a chosen moment of step 3."""

    def __init__(self, where, numbers):
        super().__init__()
        self.where, self.numbers, self.step = where, numbers, 0

    def fire(self, where):
        if where == self.where and self.step == 3:
            for number in self.numbers:
                signal.raise_signal(number)
            self.numbers = ()

    def loss(self, model, batch, step):
        self.step = step.index + 1
        self.fire("step")
        return super().loss(model, batch, step)

    def state(self):
        self.fire("save")
        return super().state()


def _rows(method):
    """Rows whose collation sends the signal."""

    class Rows(type(ROWS)):
        def collate(self, rows):
            method.step += 1
            method.fire("data")
            method.step -= 1
            return super().collate(rows)

    return Rows(ROWS.rows, ROWS.pad_id)


@pytest.mark.parametrize(
    ("numbers", "code"),
    [((signal.SIGINT,), 130), ((signal.SIGTERM,), 143), ((signal.SIGINT, signal.SIGTERM, signal.SIGINT), 130)],
    ids=["int", "term", "thrice"],
)
@pytest.mark.parametrize("where", ["data", "step", "save", "evaluation"])
def test_an_interrupt_is_clean(tmp_path, where, numbers, code):
    method = Signals(where, numbers)
    recipe = config(save_every=3 if where == "save" else 0)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def hook(model, step):
        method.fire("evaluation")

    with pytest.raises(Interrupted) as caught:
        rows = _rows(method)
        fit(tiny_llama(dropout=0.2), None, rows, config=recipe, seed=0, out=tmp_path, method=method, on_step=hook)
    assert caught.value.exit_code == code
    assert method.finished == 0
    # A signal during the save of step 3 is honoured at the boundary after it, in every other case at that of step 3.
    boundary = 4 if where == "save" else 3
    assert checkpoints(tmp_path)[0][0] == boundary
    for _, folder in checkpoints(tmp_path):
        verify(folder)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers

    resumed, whole = tiny_llama(dropout=0.2), tiny_llama(dropout=0.2)
    a = fit(resumed, None, ROWS, config=recipe, seed=0, out=tmp_path, method=Signals("", ()))
    b = fit(whole, None, ROWS, config=recipe, seed=0, method=Signals("", ()))
    assert largest_difference(weights(resumed), weights(whole)) == 0
    assert a.log == b.log


def test_an_interrupt_without_checkpoints_says_so():
    def hook(model, step):
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="kept no checkpoints") as caught:
        fit(tiny_llama(), None, ROWS, config=config(), seed=0, on_step=hook)
    assert caught.value.exit_code == 143


def test_a_dead_peer_is_told_as_such_and_other_errors_are_left_alone():
    """What gloo raises is a plain RuntimeError; NCCL's has a class."""
    for said in (
        RuntimeError("[x/gloo/transport/tcp/pair.cc:537] Read error"),
        torch.distributed.DistBackendError("n"),
    ):
        with pytest.raises(Lost, match="another process of this job is gone"), told_of_peers():
            raise said
    with pytest.raises(RuntimeError, match="size mismatch"), told_of_peers():
        raise RuntimeError("size mismatch")
