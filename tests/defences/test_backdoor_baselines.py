"""Baselines against backdoors, each against its formula."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from casehard.data.batches import Encoded, collate
from casehard.defences.anomaly import Anomaly, AnomalyConfig, disturbed, frame
from casehard.defences.crow import Crow, CrowConfig
from casehard.defences.fine_mixing import FineMixing, FineMixingConfig
from casehard.errors import ConfigError, DataError
from casehard.seeds import derive
from casehard.train.protocol import Setup, Step
from fakes import tiny_llama, tiny_rows, weights

ROWS = tiny_rows(8, seed=1)


def one(method, model, batch):
    """Run one step on one batch; return gradients and telemetry."""
    log: dict[str, float] = {}
    model.zero_grad()
    step = Step(0, 0, 1, lambda m, b: m(**b).loss, lambda x: x.backward(), log.update)
    if hasattr(method, "backward"):
        method.backward(model, batch, step)
    else:
        method.loss(model, batch, step).backward()
    return [p.grad.clone() for p in model.parameters()], log


def close(a, b):
    return all(torch.allclose(x, y, atol=1e-6, rtol=1e-4) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_fine_mixing_takes_each_weight_from_one_of_both(keep):
    suspect, base = tiny_llama(), weights(tiny_llama(seed=1))
    before = weights(suspect)
    method = FineMixing(FineMixingConfig(keep=keep), base=base)
    method.prepare(Setup(suspect, seed=3, max_steps=1))
    total = kept = 0
    for name, p in suspect.named_parameters():
        mine, theirs = p.detach() == before[name], p.detach() == base[name]
        assert bool((mine | theirs).all()), name
        apart = before[name] != base[name]
        total, kept = total + int(apart.sum()), kept + int((mine & apart).sum())
    assert kept / total == pytest.approx(keep, abs=0.02)
    again = tiny_llama()
    FineMixing(method.config, base=base).prepare(Setup(again, seed=3, max_steps=1))
    assert all(torch.equal(w, weights(suspect)[n]) for n, w in weights(again).items())


def test_fine_mixing_reads_a_folder_and_refuses_another_shape(tmp_path):
    tiny_llama(seed=1).save_pretrained(tmp_path)
    a, b = tiny_llama(), tiny_llama()
    FineMixing(assets=tmp_path).prepare(Setup(a, seed=0, max_steps=1))
    FineMixing(base=weights(tiny_llama(seed=1))).prepare(Setup(b, seed=0, max_steps=1))
    assert all(torch.equal(w, weights(b)[n]) for n, w in weights(a).items())
    with pytest.raises(DataError, match="no parameter"):
        FineMixing(base=weights(tiny_llama(hidden=16))).prepare(Setup(tiny_llama(), seed=0, max_steps=1))
    with pytest.raises(DataError, match="no complete safetensors"):
        FineMixing(assets=tmp_path / "nowhere")
    with pytest.raises(DataError, match="trusted base"):
        FineMixing()
    with pytest.raises(ConfigError):
        FineMixingConfig(keep=1.1)


def test_crow_gradient_is_that_of_its_formula():
    model, alpha, epsilon = tiny_llama(), 2.0, 0.05
    batch = collate(ROWS.rows[:3], 0)
    got, log = one(Crow(CrowConfig(alpha=alpha, epsilon=epsilon)), model, batch)

    def consistency(embedded):
        out = model(inputs_embeds=embedded, attention_mask=batch["attention_mask"], output_hidden_states=True)
        terms, count = 0.0, 0
        for a, b in zip(out.hidden_states[:-1], out.hidden_states[1:], strict=True):
            for i, row in enumerate(batch["attention_mask"]):
                for t in range(int(row.sum())):
                    terms = terms + 1 - nn.functional.cosine_similarity(a[i, t], b[i, t], dim=0)
                    count += 1
        return terms / count

    e = model.get_input_embeddings()(batch["input_ids"])
    at = e.detach().requires_grad_()
    (slope,) = torch.autograd.grad(consistency(at), at)
    value = consistency(e + epsilon * slope.sign())
    want = torch.autograd.grad(model(**batch).loss + alpha * value, list(model.parameters()))
    assert close(got, want)
    assert log["inconsistency"] == pytest.approx(float(value.detach()), rel=1e-5)
    plain, _ = one(Crow(CrowConfig(alpha=0.0)), model, batch)
    assert close(plain, torch.autograd.grad(model(**batch).loss, list(model.parameters())))
    with pytest.raises(ConfigError):
        CrowConfig(epsilon=-1.0)


def test_anomalies_stand_in_the_prompt_and_nothing_else_changes():
    rows = [Encoded([1, 10 + i, 20 + i, 3, 40, 41, 2], [-100] * 4 + [40, 41, 2]) for i in range(4)]
    batch = collate(rows, 0)
    assert frame([row.input_ids[:4] for row in rows]) == (1, 1)
    seen = set()
    for number in range(50):
        odd = disturbed(batch, 64, 5, random.Random(number))
        for i, row in enumerate(rows):
            n = int(odd["attention_mask"][i].sum())
            ids, labels = odd["input_ids"][i, :n].tolist(), odd["labels"][i, :n].tolist()
            extra = n - len(row.input_ids)
            assert 1 <= extra <= 5 and ids[0] == 1 and ids[-4:] == row.input_ids[-4:]
            assert labels == [-100] * (4 + extra) + row.labels[4:]
            spots = [at for at in range(1, 4) if ids[:at] + ids[at + extra :] == row.input_ids]
            assert spots
            inserted = ids[spots[0] : spots[0] + extra]
            assert not {1, 2, 3} & set(inserted), "template tokens are never inserted"
            seen.add(extra)
    assert seen == {1, 2, 3, 4, 5}


def test_one_prompt_alone_keeps_its_ends():
    assert frame([[1, 5, 6, 3]]) == (1, 1) and frame([[1]]) == (1, 0)
    assert frame([[1, 5], [1, 5]]) == (2, 0)


def test_anomaly_gradient_is_that_of_both_losses():
    model = tiny_llama()
    method = Anomaly(AnomalyConfig(weight=0.5))
    method.prepare(Setup(model, seed=4, max_steps=1))
    batch = collate(ROWS.rows[:4], 0)
    got, log = one(method, model, batch)
    odd = disturbed(batch, 64, 8, random.Random(derive(4, 0, "anomaly-0")))
    want = torch.autograd.grad(model(**batch).loss + 0.5 * model(**odd).loss, list(model.parameters()))
    assert close(got, want)
    assert log["anomaly_loss"] == pytest.approx(0.5 * float(model(**odd).loss.detach()), rel=1e-5)
    with pytest.raises(ConfigError):
        AnomalyConfig(longest=0)
