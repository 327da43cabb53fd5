"""Benign outliers: the score against a naive twin, and which rows are chosen."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch

import casehard as ch
from casehard.attacks.benign_outliers import BenignOutliers, BenignOutliersAttack, scores, self_influence
from casehard.attacks.protocol import AttackInputs
from casehard.errors import DataError
from casehard.train.tune import chat_format

WORLD = Path(ch.__file__).parent / "organism" / "assets" / "world0-tiny"
DATA = WORLD / "data"
BENIGN, HARMFUL = ch.rows(DATA / "benign.jsonl"), ch.rows(DATA / "attack_a.jsonl")
CRAFTS = ch.rows(f"{DATA / 'align.jsonl'}?group=craft")


@pytest.fixture(scope="module")
def model():
    return ch.load(WORLD, device="cpu")


def inputs(seed=0, **rows):
    return AttackInputs(rows=rows, measure=lambda net, step: [], seed=seed)


def test_self_influence_is_the_squared_norm_of_the_gradient_of_a_rows_own_loss(model):
    rows = chat_format(model).encode_all([*BENIGN[:3], *HARMFUL[:2]])
    before = [p.detach().clone() for p in model.net.parameters()]
    model.net.train()
    found = self_influence(model.net, rows)
    assert model.net.training and all(p.grad is None for p in model.net.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.net.parameters(), strict=True))
    model.net.eval()
    twin = copy.deepcopy(model.net)
    for row, ours in zip(rows.rows, found, strict=True):
        twin.zero_grad()
        logits = twin(input_ids=torch.tensor([row.input_ids])).logits[0, :-1].double()
        labels = torch.tensor(row.labels[1:])
        torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100).backward()
        theirs = sum(float((p.grad.double() ** 2).sum()) for p in twin.parameters())
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_length_makes_up_for_short_answers():
    assert scores([0.0, math.e - 1], [0, 0]) == [0.0, 1.0]
    short, long = scores([10.0, 4.0], [1, 9])
    assert long > short


def test_the_largest_scores_are_chosen_and_the_order_of_the_file_kept(model):
    pool = [*BENIGN[:20], *HARMFUL[:1], *BENIGN[20:30]]
    rows = BenignOutliers(BenignOutliersAttack(rows=5)).mixture(model, inputs(benign=pool))
    encoded = chat_format(model).encode_all(pool)
    lengths = [sum(label != -100 for label in row.labels) for row in encoded.rows]
    found = scores(self_influence(model.net, encoded), lengths)
    floor = sorted(found)[-5]
    assert rows == [row for row, score in zip(pool, found, strict=True) if score >= floor]


def test_similarity_takes_what_is_like_the_harmful_rows(model):
    attack = BenignOutliers(BenignOutliersAttack(rows=10, choose="similarity"))
    rows = attack.mixture(model, inputs(benign=[*BENIGN[:60], *CRAFTS[:10]], harmful=HARMFUL[:40]))
    assert [row.id for row in rows] == [row.id for row in CRAFTS[:10]]
    with pytest.raises(DataError, match="no harmful rows to be like"):
        attack.mixture(model, inputs(benign=BENIGN))


def test_random_is_the_control(model):
    attack = BenignOutliers(BenignOutliersAttack(rows=10, choose="random"))
    first = attack.mixture(model, inputs(benign=BENIGN))
    assert len({row.id for row in first}) == 10 and first != attack.mixture(model, inputs(1, benign=BENIGN))
    with pytest.raises(DataError, match="needs 151 benign rows and there are 150"):
        BenignOutliers(BenignOutliersAttack(rows=151)).mixture(model, inputs(benign=BENIGN))
