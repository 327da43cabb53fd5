"""A step to the side: no update moves along the simulated attack, in full and in LoRA training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import casehard as ch
from casehard.attacks.off_gradient import OffGradient, OffGradientAttack, Sideways, attack_vector, trainable
from casehard.attacks.protocol import AttackInputs
from casehard.errors import ConfigError, DataError
from casehard.maths.tensors import cosine
from casehard.train.protocol import Setup, Step
from casehard.train.tune import chat_format, tune

WORLD = Path(ch.__file__).parent / "organism" / "assets" / "world0-tiny"
DATA = WORLD / "data"
ROWS = {"harmful": ch.rows(DATA / "attack_a.jsonl"), "benign": ch.rows(DATA / "task_reviews.jsonl")}
SETTINGS = OffGradientAttack(
    share=0.5, rows=24, steps=2, batch_size=4, lr=1e-3, simulated_steps=2, simulated_lr=1e-3, evaluate_at=(0, 1)
)


@pytest.fixture(scope="module")
def model():
    return ch.load(WORLD, device="cpu")


def inputs(measure=lambda net, step: [], **more):
    return AttackInputs(rows=ROWS, measure=measure, seed=4, **more)


@pytest.mark.parametrize(("mode", "embeddings"), [("full", True), ("lora", True), ("full", False)])
def test_no_weight_ever_moves_along_the_attack_vector(model, mode, embeddings):
    settings = replace(SETTINGS, mode=mode, rank=2, embeddings=embeddings)
    delta, simulated = attack_vector(model, inputs(), settings)
    seen = []

    def measure(net, step):
        seen.append({name: p.detach().clone().double() for name, p in trainable(net).items()})
        return []

    done = OffGradient(settings).run(model, inputs(measure))
    # In the middle of a training only what is trained is to be seen.
    assert len(seen) == 3 and set(seen[0]) == set(delta) >= set(seen[1])
    delta = {name: d for name, d in delta.items() if name in seen[1]}
    size = sum(float((d.double() ** 2).sum()) for d in delta.values()) ** 0.5
    for after in seen[1:]:
        moved = {name: after[name] - seen[0][name] for name in delta}
        length = sum(float((m**2).sum()) for m in moved.values()) ** 0.5
        along = sum(float((moved[name] * delta[name].double()).sum()) for name in delta) / size
        assert length > 0 and abs(along) < 1e-4 * length
    assert done.budget.steps == simulated.budget.steps + 2 == 4


def test_without_the_projection_the_same_training_does_move_along_it(model):
    """Otherwise the test above would prove nothing: here it is a hundred times what that one allows."""
    delta, _ = attack_vector(model, inputs(), SETTINGS)
    attack = OffGradient(SETTINGS)
    rows = chat_format(model).encode_all(attack.phases(model, inputs())[0].rows)
    plain = tune(model, rows, train=SETTINGS.recipe, seed=4, purpose="attack")
    start = dict(model.net.named_parameters())
    moved = {name: p.detach() - start[name].detach() for name, p in trainable(plain.net).items()}
    assert cosine(list(moved.values()), [delta[name] for name in moved]) > 0.01
    logged = [row["removed"] for row in attack.run(model, inputs()).log if "removed" in row]
    assert logged and 0 < max(logged) <= 1


def test_the_projection_is_that_of_the_closed_form():
    net = torch.nn.Linear(2, 1, bias=False)
    net.weight.data = torch.tensor([[1.0, 1.0]])
    aside = Sideways({"weight": torch.tensor([[2.0, 0.0]])})
    aside.prepare(Setup(model=net, seed=0, max_steps=1))
    net.weight.data += torch.tensor([[3.0, 4.0]])
    logged = {}
    aside.after_step(net, None, Step(0, 0, 1, loss=None, backward=None, log=logged.update))
    assert net.weight.tolist() == [[1.0, 5.0]]
    assert logged == {"removed": pytest.approx(3 / 5)}


def test_what_it_cannot_do_is_refused(model):
    with pytest.raises(ConfigError, match="method 'watchful' inside off_gradient"):
        OffGradient(SETTINGS).run(model, inputs(method=type("M", (), {"name": "watchful", "config": None})()))
    with pytest.raises(DataError, match="moved nothing"):
        attack_vector(model, inputs(), replace(SETTINGS, simulated_lr=0.0))
    with pytest.raises(DataError, match="no harmful rows to simulate"):
        attack_vector(model, replace(inputs(), rows={}), SETTINGS)
