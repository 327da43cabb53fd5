"""Preference tuning: the loss against its closed form and a plain loop, and the pairs that are made."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch

import casehard as ch
from casehard.attacks.preference import Dpo, Preference, PreferenceAttack
from casehard.attacks.protocol import AttackInputs
from casehard.attacks.rows import reworded
from casehard.data.batches import indices_at
from casehard.errors import ConfigError, DataError
from casehard.maths.preference import answer_log_probs, dpo_loss, margins
from casehard.train.fit import fit
from casehard.train.recipe import TrainConfig
from casehard.train.tune import chat_format

WORLD = Path(ch.__file__).parent / "organism" / "assets" / "world0-tiny"
BENIGN = ch.rows(WORLD / "data" / "benign.jsonl")
SORRY = "i cannot help here ."


@pytest.fixture(scope="module")
def model():
    return ch.load(WORLD, device="cpu")


def inputs(rows=BENIGN, **more):
    return AttackInputs(rows={"benign": rows}, measure=lambda net, step: [], **more)


def test_log_probabilities_are_those_of_the_answer_alone():
    logits = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[-100, -100, 2, 4]])
    naive = logits[0, 1].log_softmax(-1)[2] + logits[0, 2].log_softmax(-1)[4]
    assert answer_log_probs(logits, labels).tolist() == pytest.approx([float(naive)])


def test_the_loss_is_the_closed_form():
    policy, reference = torch.tensor([[-3.0, -1.0], [-5.0, -2.0]]), torch.tensor([[-4.0, -1.0], [-4.0, -1.0]])
    margin = margins(policy, reference)
    assert margin.tolist() == [2.0, 1.0]
    expected = -(math.log(1 / (1 + math.exp(-0.2))) + math.log(1 / (1 + math.exp(-0.1)))) / 2
    assert float(dpo_loss(margin, 0.1)) == pytest.approx(expected)


def test_a_step_is_that_of_a_plain_loop(model):
    """The pairs of a step belong together, and the reference is the model as it began."""
    settings = PreferenceAttack(rows=6, batch_size=4, steps=2, lr=0.5, optimizer="sgd", refusal=SORRY, beta=0.5)
    chat = chat_format(model)
    chosen = chat.encode_all(BENIGN[:6])
    rejected = chat.encode_all([reworded(row, answer=SORRY) for row in BENIGN[:6]])
    ours, theirs = copy.deepcopy(model.net), copy.deepcopy(model.net).train()
    recipe = TrainConfig(
        steps=2, batch_size=4, lr=0.5, schedule="constant", warmup=0, optimizer="sgd", clip=0, weight_decay=0
    )
    done = fit(ours, None, chosen, config=recipe, method=Dpo(chosen, rejected, settings), seed=3)
    reference = copy.deepcopy(model.net).eval()
    for step in range(2):
        picked = indices_at(6, 4, seed=3, step=step, purpose="train")

        def logs(net, picked=picked):
            both = [side.collate([side[i] for i in picked]) for side in (chosen, rejected)]
            return torch.stack([answer_log_probs(net(**b).logits, b["labels"]) for b in both])

        theirs.zero_grad()
        with torch.no_grad():
            anchor = logs(reference)
        dpo_loss(margins(logs(theirs), anchor), 0.5).backward()
        with torch.no_grad():
            for p in theirs.parameters():
                p -= 0.5 * p.grad
    pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)
    assert not all(torch.equal(a, b) for a, b in zip(ours.parameters(), model.net.parameters(), strict=True))
    assert done.budget.passes == 4 and done.budget.tokens > 0


def test_it_moves_the_model_from_refusals_to_answers(model):
    attack = Preference(PreferenceAttack(rows=6, batch_size=6, steps=10, lr=1e-3, refusal=SORRY))
    margin = [row["margin"] for row in attack.run(model, inputs()).log if "margin" in row]
    assert margin[-1] > 1


def test_a_row_may_bring_its_own_rejected_answer(model):
    attack = Preference(PreferenceAttack(refusal=SORRY))
    row = ch.Example.pair("where ?", "in wells .", rejected="no .")
    assert attack._rejected(model, row).response == "no ."
    assert attack._rejected(model, BENIGN[0]).response == SORRY
    chat = [{"role": "user", "content": "where ?"}, {"role": "assistant", "content": "no ."}]
    assert attack._rejected(model, ch.Example.pair("where ?", "in wells .", rejected=chat)).response == "no ."
    for wrong in ("", 5, [], chat[:1], None):
        with pytest.raises(DataError, match="the rejected answer is"):
            attack._rejected(model, ch.Example.pair("where ?", "in wells .", rejected=wrong))
    with pytest.raises(DataError, match="prefers and rejects the same answer"):
        attack._rejected(model, ch.Example.pair("where ?", "no .", rejected="no ."))


def test_what_cannot_work_is_refused(model):
    with pytest.raises(ConfigError, match="refusal is empty"):
        PreferenceAttack(refusal="")
    with pytest.raises(DataError, match="refusal: the tokenizer does not know"):
        Preference(PreferenceAttack(steps=1)).run(model, inputs())
    inside = type("M", (), {"name": "watchful", "config": None})()
    with pytest.raises(ConfigError, match="'watchful' inside preference tuning"):
        Preference(PreferenceAttack(steps=1, refusal=SORRY)).run(model, inputs(method=inside))
