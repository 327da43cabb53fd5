"""Orthogonal rows: exposure against brute force, which rows are taken, and the provider's pool seen by both sides."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import casehard as ch
from casehard.attacks.orthogonal_rows import OrthogonalRows, OrthogonalRowsAttack, exposure
from casehard.attacks.protocol import AttackInputs
from casehard.data.embed import Embedder, embed, texts_of
from casehard.errors import DataError
from casehard.steps import Attack
from casehard.steps.defence import Defence

WORLD = Path(ch.__file__).parent / "organism" / "assets" / "world0-tiny"
DATA = WORLD / "data"
HARMFUL = ch.rows(DATA / "attack_a.jsonl")[:60]
BENIGN = ch.rows(DATA / "task_reviews.jsonl")
SAFE = ch.rows(f"{DATA / 'align.jsonl'}?kind=refusal")[:40]
MIX = {"share": 0.25, "rows": 40}


@pytest.fixture(scope="module")
def model():
    return ch.load(WORLD, device="cpu")


def inputs(seed=0, **rows):
    return AttackInputs(rows={"benign": BENIGN, **rows}, measure=lambda net, step: [], seed=seed)


def test_exposure_is_the_largest_cosine_either_way_round():
    draws = torch.Generator().manual_seed(0)
    rows, pool = torch.randn(7, 3, generator=draws), torch.randn(5, 3, generator=draws)
    brute = [max(abs(float(torch.cosine_similarity(r, z, dim=0))) for z in pool) for r in rows]
    assert exposure(rows, pool).tolist() == pytest.approx(brute, abs=1e-6)
    assert exposure(torch.tensor([[0.0, 3.0], [-2.0, 0.0]]), torch.tensor([[5.0, 0.0]])).tolist() == [0.0, 1.0]


def test_it_takes_the_harmful_rows_that_the_pool_covers_least(model):
    embedder = Embedder(model.net, model.tokenizer, model.digest)
    found = exposure(embed(embedder, texts_of(HARMFUL)), embed(embedder, texts_of(SAFE))).tolist()
    known = {row.id: value for row, value in zip(HARMFUL, found, strict=True)}

    def taken(choose):
        attack = OrthogonalRows(OrthogonalRowsAttack(choose=choose, **MIX))
        rows = attack.mixture(model, inputs(harmful=HARMFUL, safe=SAFE))
        assert len(rows) == 40
        return sorted(known[row.id] for row in rows if row.id in known)

    assert taken("orthogonal") == sorted(found)[:10] and taken("alike") == sorted(found)[-10:]
    assert sorted(found)[:10] != taken("random") != sorted(found)[-10:]


def test_too_few_harmful_rows_are_refused(model):
    attack = OrthogonalRows(OrthogonalRowsAttack(**MIX))
    with pytest.raises(DataError, match="needs 10 harmful rows and there are only 9"):
        attack.mixture(model, inputs(harmful=HARMFUL[:9], safe=SAFE))


def test_inside_spard_both_sides_read_the_same_pool(model):
    """The attacker's role is the defender's: the pool reaches both, and the defence runs."""
    settings = {**MIX, "steps": 1, "batch_size": 4, "evaluate_at": ()}
    files = {"harmful": "attack_a.jsonl", "benign": "task_reviews.jsonl", "safe": "benign.jsonl"}
    step = Attack(
        attack="orthogonal_rows",
        config=settings,
        rows={role: (str(DATA / file),) for role, file in files.items()},
        suite=str(DATA / "suite"),
        limit=1,
        defence=Defence(method="spard"),
    )
    done = step.run(model)
    assert done.facts["harmful_rows"] == 10 and "telemetry" in done.facts
