"""Selection from embeddings to manifest: strategies, bad input, the cache, the command."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch

from casehard.data.embed import Embedder, embed, key, load_embedder, texts_of
from casehard.data.select import Picks, SelectConfig, budget, by_tag, manifest, matched, select, select_examples, split
from casehard.errors import ConfigError, DataError, Unsupported
from casehard.types import Example
from fakes import tiny_llama


class Words:
    """Stands in for a tokenizer: one token a word, by length and first letter."""

    def __call__(self, text):
        return {"input_ids": [3 + (7 * len(w) + ord(w[0])) % 60 for w in text.split()]}


TEXTS = ["how do i brew tea", "tea", "open the gate now please", "how do i brew tea", "a b c d e f g h i j k"]


def embedder(seed=0):
    return Embedder(tiny_llama(seed=seed), Words(), f"digest-{seed}")


def naive(made, text):
    ids = torch.tensor([made.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        return made.model.eval()(input_ids=ids, output_hidden_states=True).hidden_states[-1][0].mean(0)


@pytest.mark.parametrize("batch_tokens", [1, 12, 8192])
def test_embedding_is_the_mean_of_the_final_hidden_states(batch_tokens):
    made = embedder()
    made.model.train()
    got = embed(made, TEXTS, batch_tokens=batch_tokens)
    assert got.dtype == torch.float32 and got.shape == (5, 32)
    assert torch.allclose(got, torch.stack([naive(made, t) for t in TEXTS]), atol=1e-5)
    assert torch.equal(got[0], got[3])


def test_adapters_are_off_and_modes_are_put_back():
    from peft import LoraConfig, get_peft_model

    plain = embed(embedder(), TEXTS)
    wrapped = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).train()
    assert torch.allclose(embed(Embedder(wrapped, Words(), "x"), TEXTS), plain, atol=1e-6)
    assert wrapped.training and wrapped.active_adapter == "default"


def test_cache_is_keyed_by_content(tmp_path, monkeypatch):
    made, calls = embedder(), []
    first = embed(made, TEXTS, cache=tmp_path)
    monkeypatch.setattr("casehard.data.embed._embed", lambda *a: calls.append(1) or torch.zeros(4, 32))
    assert torch.equal(embed(made, TEXTS, cache=tmp_path), first) and not calls
    assert key(made, TEXTS) != key(embedder(1), TEXTS) != key(embedder(1), TEXTS[1:])
    embed(embedder(1), TEXTS, cache=tmp_path)
    assert calls == [1] and len(list(tmp_path.iterdir())) == 2


def test_embedding_refuses_what_it_cannot_read(tmp_path):
    with pytest.raises(DataError, match="no rows"):
        embed(embedder(), [])
    with pytest.raises(DataError, match="text 1 has no tokens"):
        embed(embedder(), ["a", " "])
    with pytest.raises(Unsupported, match="embedding model"):
        load_embedder(tmp_path, digest="")


def clouds(seed=0):
    """A pool of three classes, one of them near the user's rows."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.eye(3, 16) * 4
    pool = torch.cat([centres[c] + torch.randn(n, 16, generator=g) for c, n in ((0, 60), (1, 20), (2, 20))])
    return pool, centres[1] + torch.randn(50, 16, generator=g)


def test_strategies_differ_as_they_should():
    pool, user = clouds()
    made = {
        s: select(pool, user, 10, config=SelectConfig(strategy=s))
        for s in ("rd-dpp", "relevance", "diversity", "random")
    }
    near = {name: sum(60 <= i < 80 for i in p.order) for name, p in made.items()}
    assert near["relevance"] == 10 and near["rd-dpp"] > near["diversity"]
    assert made["diversity"].log_det > made["rd-dpp"].log_det > made["relevance"].log_det
    assert made["relevance"].mean_relevance >= made["rd-dpp"].mean_relevance > made["diversity"].mean_relevance
    top = select(pool, user, 10, config=SelectConfig(beta=math.inf))
    assert top.order == made["relevance"].order
    again = [select(pool, user, 10, config=SelectConfig(strategy="random"), seed=s).order for s in (0, 0, 1)]
    assert again[0] == again[1] != again[2]
    assert select(pool, user, 10).log_gains == made["rd-dpp"].log_gains


def test_arrays_of_any_kind_and_length_give_the_same_picks():
    pool, user = clouds()
    want = select(pool, user, 8).order
    assert select(pool.numpy(), user.numpy(), 8).order == want
    assert select(pool * 5, user * 0.1, 8).order == want
    assert select(pool.double(), user, 8).order == want
    centred = select(pool, user, 8, config=SelectConfig(centre=True))
    assert len(set(centred.order)) == 8


def test_bad_input_and_edges():
    pool, user = clouds()
    with pytest.raises(DataError, match="pool is empty"):
        select(pool[:0], user, 3)
    with pytest.raises(DataError, match="user's rows"):
        select(pool, None, 3)
    assert select(pool, None, 3, config=SelectConfig(strategy="diversity")).relevance == ()
    with pytest.raises(DataError, match="shapes"):
        select(pool, user[:, :5], 3)
    pool[4] = 0
    with pytest.raises(DataError, match="row 4 is zero"):
        select(pool, user, 3)
    with pytest.raises(ConfigError, match="k: 0"):
        select(pool, user, 0)
    for bad in ({"beta": -1.0}, {"beta": math.nan}, {"share": 0.0}, {"k": 0}, {"jitter": -1.0}):
        with pytest.raises(ConfigError):
            SelectConfig(**bad)
    few, user = clouds(1)
    with pytest.warns(UserWarning, match="all are taken"):
        assert sorted(select(few[:30], user, 99, config=SelectConfig(strategy="random")).order) == list(range(30))
    with pytest.warns(UserWarning, match="span about 16 directions"):
        assert select(few, user, 40).exhausted_at == 16


def test_budget_is_a_share_of_what_was_uploaded():
    assert budget(SelectConfig(), 1000) == 30 and budget(SelectConfig(), 5) == 1
    assert budget(SelectConfig(k=7), 1000) == 7


def test_examples_manifest_and_topics():
    pool = [
        Example.pair(f"word{i} open gate", "no", id=f"p{i}", kind="refusal" if i % 3 else "helpful") for i in range(9)
    ]
    user = [Example.pair(f"brew the w{'x' * i}", "yes") for i in range(4)]
    config = SelectConfig(k=4)
    picks = select_examples(embedder(), pool, user, config=config)
    record = manifest(picks, pool, len(user), config=config, embedder="abc", seed=0)
    assert json.loads(json.dumps(record, allow_nan=False)) == json.loads(json.dumps(record))
    assert record["ids"] == [f"p{i}" for i in picks.order] and sum(record["coverage"]["kind"].values()) == 4
    assert record["pool_coverage"]["kind"] == {"helpful": 3, "refusal": 6}
    assert texts_of(pool[:1], "prompt+answer") == ["word0 open gate no"]
    topics = by_tag(pool, "kind")
    assert {name: len(rows) for name, rows in topics.items()} == {"helpful": 3, "refusal": 6}
    with pytest.raises(DataError, match="no tag"):
        by_tag(user, "kind")
    assert "inf" in str(Picks((), (), (-math.inf,), -math.inf, None, 1).to_json()["log_gains"])


def test_of_a_long_text_the_beginning_is_embedded():
    made = embedder()
    limit = made.model.config.max_position_embeddings
    with pytest.warns(UserWarning, match="1 of 2 texts are longer"):
        got = embed(made, ["tea " * (2 * limit), "b"])
    assert torch.allclose(got[0], naive(made, "tea " * limit), atol=1e-5)


def test_strata_divide_the_picks_evenly_and_choose_within_each():
    pool = [Example.pair(f"word {i} " + "x" * (i % 7), "no .", kind="refusal") for i in range(6)]
    pool += [Example.pair(f"tea {i} " + "y" * (i % 5), "yes .", kind="helpful") for i in range(30)] + [
        Example.pair("z")
    ]
    user = [Example.pair(f"tea {i}") for i in range(8)]
    made = embedder()
    picks = select_examples(made, pool, user, config=SelectConfig(k=9, strata="kind"))
    assert [pool[i].tags.get("kind", "") for i in picks.order] == [""] + ["helpful"] * 4 + ["refusal"] * 4
    alone = select_examples(made, pool[6:36], user, config=SelectConfig(k=4))
    assert [i - 6 for i in picks.order[1:5]] == list(alone.order)
    assert len(picks.relevance) == 9 and picks.log_det is not None
    with pytest.raises(DataError, match="no row of the pool has the tag 'sort'"):
        select_examples(made, pool, user, config=SelectConfig(k=2, strata="sort"))
    assert split(10, [2, 50, 50]) == [2, 4, 4] and split(5, [1, 1]) == [1, 1] and split(3, [9, 9]) == [2, 1]


def tagged(n=30, refusals=10):
    return [
        Example.pair(f"w{i} " + "x" * (i % 7), "no .", kind="refusal" if i < refusals else "helpful") for i in range(n)
    ]


def test_matched_random_keeps_the_refusals_and_nothing_else_of_the_choice():
    pool, user = clouds()
    refuses = [60 <= i < 80 for i in range(100)]
    want = sum(refuses[i] for i in select(pool, user, 14).order)
    drawn = [
        select(pool, user, 14, config=SelectConfig(strategy="matched-random"), seed=s, refuses=refuses).order
        for s in range(30)
    ]
    assert 0 < want < 14 and all(sum(refuses[i] for i in order) == want for order in drawn)
    assert all(len(set(order)) == 14 for order in drawn) and len(set(drawn)) == 30
    # Within each kind every row is as likely as any other: 3 of 10 and 7 of 20, 400 times.
    often = Counter(i for s in range(400) for i in matched([0, 1, 2, *range(10, 17)], [i < 10 for i in range(30)], s))
    for i in range(30):
        share = 0.3 if i < 10 else 0.35
        assert abs(often[i] - 400 * share) < 4 * math.sqrt(400 * share * (1 - share))
    with pytest.raises(DataError, match="which rows refuse"):
        select(pool, user, 3, config=SelectConfig(strategy="matched-random"))


def test_matched_random_goes_by_the_rows_tag_and_needs_one():
    pool, user = tagged(), [Example.pair(f"w{i} xx") for i in range(4)]
    made = embedder()
    for more in ({}, {"strata": "kind"}):
        sets = [
            select_examples(made, pool, user, config=SelectConfig(k=6, strategy=s, **more), seed=1)
            for s in ("rd-dpp", "matched-random")
        ]
        kinds = [sorted(pool[i].tags["kind"] for i in picks.order) for picks in sets]
        assert kinds[0] == kinds[1] and sets[0].order != sets[1].order
    other = SelectConfig(k=6, strategy="matched-random", refusals="sort=no")
    with pytest.raises(DataError, match="none of 30 rows of the pool is tagged sort=no") as caught:
        select_examples(made, pool, user, config=other)
    assert "TAG=VALUE" in (caught.value.hint or "")
    with pytest.raises(ConfigError, match="not TAG=VALUE"):
        select_examples(made, pool, user, config=SelectConfig(k=6, strategy="matched-random", refusals="kind"))


def test_k_means_takes_a_row_of_every_cluster_and_asks_no_user():
    pool, _ = clouds()
    picks = select(pool, None, 3, config=SelectConfig(strategy="k-means"), seed=0)
    assert sorted([0 if i < 60 else 1 if i < 80 else 2 for i in picks.order]) == [0, 1, 2]
    assert len(set(select(pool, None, 40, config=SelectConfig(strategy="k-means")).order)) == 40
    same = torch.ones(8, 4)
    assert len(set(select(same, None, 5, config=SelectConfig(strategy="k-means")).order)) == 5


def test_gradient_follows_the_cosines_it_is_given():
    pool, user = clouds()
    config = SelectConfig(strategy="gradient")
    assert select(pool, user, 3, config=config, cosines=torch.arange(100.0)).order == (99, 98, 97)
    with pytest.raises(DataError, match="gradients"):
        select(pool, user, 3, config=config)


def test_the_record_tells_the_refusals_and_how_much_of_the_space_the_picks_use():
    pool, user = tagged(), [Example.pair(f"w{i} xx") for i in range(4)]
    config = SelectConfig(k=6)
    picks = select_examples(embedder(), pool, user, config=config)
    record = manifest(picks, pool, 4, config=config, embedder="abc", seed=0)
    picked = sum(pool[i].tags["kind"] == "refusal" for i in picks.order)
    assert record["refusals"] == {"tag": "kind=refusal", "picked": picked, "pool": 10}
    untagged = [Example.pair(f"w{i}") for i in range(3)]
    assert (
        manifest(Picks((0,), (), (), 0.0, None, None), untagged, 0, config=config, embedder="", seed=0)["refusals"]
        is None
    )
    phi, task = clouds()
    for strategy in ("rd-dpp", "random", "relevance"):
        made = select(phi, task, 8, config=SelectConfig(strategy=strategy))
        assert made.directions == 16 and made.per_direction == 0.5
    assert select(phi[:, :1], None, 2, config=SelectConfig(strategy="random")).per_direction == 2.0
    assert select(phi[:5], None, 2, config=SelectConfig(strategy="random")).directions == 5
    with pytest.warns(UserWarning, match=r"k/d 2\.5"):
        assert select(phi, task, 40).per_direction == 2.5
