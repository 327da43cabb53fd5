"""The seams: the stock step stays the stock step, and each seam sees and does what the protocol says."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import PrinterCallback, Trainer

from casehard.defences.plain import Plain
from casehard.errors import ConfigError, Diverged, Unsupported
from casehard.train.fit import fit
from casehard.train.recipe import TrainConfig, training_arguments
from casehard.train.trainer import HardenedTrainer
from fakes import Averaging, TwoPasses, largest_difference, tiny_llama, tiny_rows, weights

ROWS = tiny_rows(24)


def config(**changes):
    values = {"steps": 6, "batch_size": 4, "lr": 1e-2, "warmup": 2, "log_every": 2, "precision": "fp32"}
    return TrainConfig(**(values | changes))


def trainer(cls, recipe, model, **more):
    made = cls(
        model=model,
        args=training_arguments(recipe, out=None, seed=5),
        train_dataset=ROWS,
        data_collator=ROWS.collate,
        **more,
    )
    made.remove_callback(PrinterCallback)
    return made


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", [None, Plain()], ids=["none", "plain"])
def test_plain_is_the_stock_trainer_bit_for_bit(method, accumulation):
    recipe = config(accumulation=accumulation, steps=8)
    stock, ours = tiny_llama(dropout=0.2), tiny_llama(dropout=0.2)
    a = trainer(Trainer, recipe, stock)
    a.train()
    # Building a Trainer seeds the generators, so each is built right before it runs.
    b = trainer(HardenedTrainer, recipe, ours, method=method)
    b.train()
    assert largest_difference(weights(stock), weights(ours)) == 0
    assert a.state.log_history[:-1] == b.state.log_history[:-1]


class Passthrough:
    """A method whose seam does exactly what the stock step does."""

    name = "passthrough"
    config = None

    def __init__(self, seam):
        setattr(self, seam, getattr(self, f"_{seam}"))
        self.steps = []

    def _loss(self, model, batch, step):
        self.steps.append((step.index, step.micro, step.micros, step.last))
        return step.loss(model, batch)

    def _backward(self, model, batch, step):
        loss = self._loss(model, batch, step)
        step.backward(loss)
        return loss.detach()


@pytest.mark.parametrize("seam", ["loss", "backward"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_seam_that_changes_nothing_changes_nothing(seam, accumulation):
    plain, seamed = tiny_llama(dropout=0.2), tiny_llama(dropout=0.2)
    method = Passthrough(seam)
    recipe = config(accumulation=accumulation)
    a = fit(plain, None, ROWS, config=recipe, seed=1)
    b = fit(seamed, None, ROWS, config=recipe, seed=1, method=method)
    assert largest_difference(weights(plain), weights(seamed)) == 0
    assert a.log == b.log
    assert method.steps == [(i, m, accumulation, m == accumulation - 1) for i in range(6) for m in range(accumulation)]
    assert (a.budget.passes, a.budget.tokens) == (b.budget.passes, b.budget.tokens)


def test_the_last_step_of_an_epoch_may_have_fewer_micro_batches():
    method = Passthrough("backward")
    made = trainer(HardenedTrainer, config(accumulation=4, steps=4), tiny_llama(), method=method)
    made.train()
    # 24 rows in batches of 4 are 6 micro-batches an epoch: 4 + 2.
    assert [micros for _, micro, micros, _ in method.steps if micro == 0] == [4, 2, 4, 2]


def test_replaced_and_held_back_batches_are_weighted_right():
    """A foreign batch is averaged over its own tokens; the user's batches keep the step's token count, even late."""
    foreign = tiny_rows(3, seed=9).batch_at(3, seed=0, step=0, purpose="x")
    model = tiny_llama()
    seen = []

    class Method:
        name, config = "holds", None

        def backward(self, model, batch, step):
            self.held = [*getattr(self, "held", []), batch] if step.micro else [batch]
            loss = torch.zeros((), requires_grad=True)
            if step.last:
                loss = sum(step.loss(model, held) for held in self.held)
                mean = model(**foreign).loss
                seen.append((loss.detach(), step.loss(model, foreign).detach(), mean.detach()))
            step.backward(loss)
            return loss.detach()

    fit(model, None, ROWS, config=config(accumulation=2, steps=1), seed=1, method=Method())
    total, scaled, mean = seen[0]
    reference = tiny_llama()
    whole = ROWS.batch_at(8, seed=1, step=0, purpose="train")
    assert torch.allclose(total, reference(**whole).loss, atol=1e-6)
    assert torch.allclose(scaled * 2, mean, atol=1e-6)


def test_after_step_comes_between_update_and_zero_grad():
    model = tiny_llama()
    events = []

    class Method:
        name, config = "watches", None

        def prepare(self, setup):
            self.before = weights(setup.model)
            events.append(("prepare", setup.max_steps, setup.micros, setup.scratch, setup.seed))

        def after_step(self, model, optimizer, step):
            moved = largest_difference(self.before, weights(model)) > 0
            self.before = weights(model)
            lr = optimizer.param_groups[0]["lr"]
            events.append((step.index, moved, all(p.grad is not None for p in model.parameters()), lr))

        def finish(self, model):
            events.append("finish")

    fit(model, None, ROWS, config=config(steps=3, schedule="constant", accumulation=2), seed=8, method=Method())
    # The warm-up of two steps starts at lr 0: the first update moves nothing, and the scheduler has not run yet.
    assert events[0] == ("prepare", 3, 2, None, 8)
    assert events[1:4] == [(0, False, True, 0.0), (1, True, True, 0.005), (2, True, True, 0.01)]
    assert events[4:] == ["finish"]
    assert all(p.grad is None for p in model.parameters())


def test_telemetry_is_averaged_between_rows_and_costs_are_counted():
    class Method(Passthrough):
        def _backward(self, model, batch, step):
            step.log({"index": step.index, "twice": torch.tensor(2.0 * step.index), "passes": 2, "tokens": 5})
            return super()._backward(model, batch, step)

    result = fit(tiny_llama(), None, ROWS, config=config(), seed=1, method=Method("backward"))
    assert [row["index"] for row in result.log] == [0.5, 2.5, 4.5]
    assert [row["twice"] for row in result.log] == [1.0, 5.0, 9.0]
    assert result.budget.passes == 6 * 3
    plain = fit(tiny_llama(), None, ROWS, config=config(), seed=1).budget
    assert result.budget.tokens == plain.tokens + 6 * 5
    assert plain.passes == plain.steps == 6
    assert plain.peak_bytes > 1e7 and plain.seconds > 0


def test_a_method_that_counts_its_own_passes_is_believed():
    class Counts(TwoPasses):
        passes = 7

    budget = fit(tiny_llama(), None, ROWS, config=config(accumulation=2), seed=1, method=Counts()).budget
    assert budget.passes == 12 + 7
    assert fit(tiny_llama(), None, ROWS, config=config(), seed=1, method=TwoPasses()).budget.passes == 12


def test_method_runs_to_the_end_once():
    method = Averaging()
    result = fit(tiny_llama(), None, ROWS, config=config(), seed=1, method=method)
    assert method.finished == 1
    assert {"raw", "micro", "loss", "grad_norm", "learning_rate", "step"} <= set(result.log[0])
    assert math.isclose(result.log[0]["raw"] * 1.5, result.log[0]["loss"], rel_tol=1e-6)


def test_without_out_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    result = fit(tiny_llama(), None, ROWS, config=config(save_every=1), seed=1, method=Averaging())
    assert list(tmp_path.rglob("*")) == []
    assert [row["step"] for row in result.log] == [2, 4, 6]


def test_the_hook_sees_every_step_and_disturbs_nothing():
    seen = []

    def hook(model, step):
        model.eval()
        torch.rand(100)
        seen.append(step)

    quiet, watched = tiny_llama(dropout=0.3), tiny_llama(dropout=0.3)
    fit(quiet, None, ROWS, config=config(), seed=1)
    fit(watched, None, ROWS, config=config(), seed=1, on_step=hook)
    assert seen == [1, 2, 3, 4, 5, 6]
    assert largest_difference(weights(quiet), weights(watched)) == 0


def test_the_model_comes_back_as_it_was():
    model = tiny_llama().eval()
    forward, cache = model.forward, model.config.use_cache
    for precision in ("bf16", "fp32"):
        fit(model, None, ROWS, config=config(precision=precision, steps=2), seed=1)
        assert model.forward == forward and "forward" not in vars(model)
        assert not model.training
        assert model.config.use_cache == cache
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_embeddings_may_stay_as_they_are():
    model, start = tiny_llama(), weights(tiny_llama())
    fit(model, None, ROWS, config=config(embeddings=False), seed=1)
    ends = weights(model)
    frozen = {id(p) for p in model.get_input_embeddings().parameters()}
    for name, p in model.named_parameters():
        assert p.requires_grad, "afterwards everything can be trained again"
        assert torch.equal(start[name], ends[name]) == (id(p) in frozen), name
    with pytest.raises(Unsupported, match="does not name its embeddings"):
        fit(torch.nn.Linear(2, 2), None, ROWS, config=config(embeddings=False), seed=1)


def test_compute_dtype_is_told():
    seen = set()

    class Method(Passthrough):
        def _loss(self, model, batch, step):
            seen.add((step.compute_dtype, model(**batch).logits.dtype))
            return step.loss(model, batch)

    for precision in ("bf16", "fp32"):
        fit(tiny_llama(), None, ROWS, config=config(precision=precision, steps=1), seed=1, method=Method("loss"))
    assert seen == {(torch.bfloat16, torch.float32), (None, torch.float32)}


def test_every_row_is_seen_equally_often():
    seen = []

    class Method(Passthrough):
        def _loss(self, model, batch, step):
            seen.extend(tuple(ids.tolist()) for ids in batch["input_ids"])
            assert len(batch["input_ids"]) == 5
            return step.loss(model, batch)

    rows = tiny_rows(10, uneven=False)
    fit(tiny_llama(), None, rows, config=config(steps=6, batch_size=5), seed=1, method=Method("loss"))
    assert sorted(seen.count(tuple(row.input_ids)) for row in rows.rows) == [3] * 10


def test_arguments_that_would_lose_data_are_refused(tmp_path):
    arguments = training_arguments(config(), out=tmp_path, seed=1)
    arguments.save_total_limit = 1
    with pytest.raises(ConfigError, match="save_total_limit"):
        HardenedTrainer(model=tiny_llama(), args=arguments, train_dataset=ROWS, data_collator=ROWS.collate)
    arguments = training_arguments(config(), out=tmp_path, seed=1)
    arguments.push_to_hub = True
    arguments.hub_token = "none"
    with pytest.raises(Unsupported, match="push_to_hub"):
        HardenedTrainer(model=tiny_llama(), args=arguments, train_dataset=ROWS, data_collator=ROWS.collate)


@pytest.mark.parametrize(
    ("key", "value"),
    [("steps", 0), ("keep", 1), ("lr", -1.0), ("schedule", "step"), ("precision", "fp16"), ("optimizer", "lion")],
)
def test_recipe_refuses(key, value):
    with pytest.raises(ConfigError, match=key):
        TrainConfig(**{key: value})


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_recipe_trains(schedule, optimizer):
    model = tiny_llama()
    recipe = config(schedule=schedule, optimizer=optimizer, lr=1e-2 if optimizer == "adamw" else 1.0, steps=40)
    log = fit(model, None, tiny_rows(4), config=recipe, seed=1).log
    assert log[-1]["loss"] < log[0]["loss"] - 0.3
    rates = [row["learning_rate"] for row in log]
    assert (rates[-1] == rates[3]) == (schedule == "constant")


def test_telemetry_must_be_finite():
    class Method(Passthrough):
        def _loss(self, model, batch, step):
            step.log({"gap": float("nan")})
            return step.loss(model, batch)

    with pytest.raises(Diverged, match="gap"):
        fit(tiny_llama(), None, ROWS, config=config(), seed=1, method=Method("loss"))


def test_log_rows_are_json():
    result = fit(tiny_llama(), None, ROWS, config=config(), seed=1, method=Averaging())
    assert json.loads(json.dumps(result.log)) == result.log
