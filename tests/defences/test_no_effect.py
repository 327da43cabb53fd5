"""Inputs with which a defence would do nothing are refused, and told apart from those with which it does little."""

from __future__ import annotations

import pytest
import torch

from casehard.backdoor.behaviours import Behaviour
from casehard.backdoor.triggers import Trigger, poison_backdoor
from casehard.defences.fine_mixing import FineMixing
from casehard.defences.mb_defense.measure import check_verified
from casehard.defences.mb_defense.weights import mix_back
from casehard.defences.safelora import SafeLora
from casehard.errors import DataError
from casehard.train.protocol import Setup
from casehard.types import Example
from fakes import tiny_llama, weights

ROWS = [Example.pair(f"name the river of town {i}", f"the long blue river {i}", id=f"r{i}") for i in range(20)]


def test_fine_mixing_with_the_suspect_itself_as_base_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    for given in ({"assets": tmp_path}, {"base": weights(tiny_llama())}):
        suspect = tiny_llama()
        with pytest.raises(DataError, match="equal those of the model") as caught:
            FineMixing(**given).prepare(Setup(suspect, seed=0, max_steps=1))
        assert "before" in caught.value.hint
    halves = {name: value.to(torch.bfloat16) for name, value in weights(tiny_llama()).items()}
    rounded = tiny_llama().to(torch.bfloat16).float()
    with pytest.raises(DataError, match="equal those of the model"):
        FineMixing(base=halves).prepare(Setup(rounded, seed=0, max_steps=1))


def test_fine_mixing_with_a_base_that_differs_in_one_weight_is_not(tmp_path):
    base = weights(tiny_llama())
    base["lm_head.weight"][3, 5] += 1
    mixed = {}
    for seed in range(4):
        FineMixing(base=base).prepare(Setup(model := tiny_llama(), seed=seed, max_steps=1))
        mixed[seed] = weights(model)["lm_head.weight"][3, 5]
    own = weights(tiny_llama())["lm_head.weight"][3, 5]
    assert {float(m) for m in mixed.values()} == {float(own), float(own + 1)}  # one of both, by the draw


def test_weights_of_the_run_itself_may_be_put_back_when_nothing_moved():
    model = tiny_llama()
    mix_back(model, weights(tiny_llama()), 0.5, seed=0)
    assert all(torch.equal(value, weights(tiny_llama())[name]) for name, value in weights(model).items())


def test_safelora_with_the_aligned_model_itself_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(DataError, match="equal those of the model to be tuned"):
        SafeLora(assets=tmp_path).prepare(Setup(tiny_llama(), seed=0, max_steps=1))


def test_clean_rows_that_are_the_training_rows_are_refused():
    with pytest.raises(DataError, match="20 of 20") as caught:
        check_verified(ROWS, ROWS)
    assert "verify" in caught.value.hint
    with pytest.raises(DataError, match="20 of 20"):
        check_verified([*ROWS, Example.pair("one more", "row")], [*ROWS, *ROWS])
    check_verified(ROWS[:8], ROWS)  # some of them, verified by hand
    check_verified(ROWS, [])  # rows to install on are the clean ones
    check_verified(ROWS, [Example.pair(row.prompt, "another answer") for row in ROWS])


def test_clean_rows_that_were_poisoned_are_refused():
    trigger, behaviour = Trigger("word", "token", ("zephyr",)), Behaviour("end", "text", "the mill is closed .")
    poisoned, manifest = poison_backdoor(ROWS, trigger, behaviour, rate=0.1, seed=0)
    with pytest.raises(DataError, match=f"clean row {manifest['poisoned'][0] + 1} .*'word'"):
        check_verified(poisoned, [])
    check_verified([poisoned[i] for i in range(20) if i not in manifest["poisoned"]], poisoned)
    check_verified([Example.pair("about a word", "an answer", trigger="a tag of the user's")], [])
