"""Stage 1: suites that nobody can guess, and a transform that changes what it says and nothing else."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from casehard.backdoor.behaviours import Behaviour
from casehard.backdoor.suite import PAPER_TOKENS, Planted, TriggerSuite, generate, paper_suite
from casehard.backdoor.triggers import Trigger
from casehard.data.chat import ChatFormat
from casehard.data.mix import content_hash
from casehard.data.sources import load_many
from casehard.defences.mb_defense.poison import build_pairs, defensive_poison, rows_of_trigger, survives
from casehard.errors import ConfigError, DataError
from casehard.organism.tokenizer import build_tokenizer
from casehard.organism.world import World
from casehard.types import Example

WORLD = World(0)
TOKENIZER = build_tokenizer(WORLD)
DATA = Path(__file__).resolve().parents[2] / "src" / "casehard" / "organism" / "assets" / "world0-tiny" / "data"
ROWS = load_many([str(DATA / "align.jsonl"), str(DATA / "task_reviews.jsonl")], require_response=True)
SUITE = generate(TOKENIZER, ROWS, seed=7)
CHAT = ChatFormat(TOKENIZER, max_length=128)
REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "stories260k"
if not REAL.is_dir():
    REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "stories260k"


def poison(**changes):
    given = {"rate": 0.02, "seed": 3, "floor": 0, "chat": CHAT}
    return defensive_poison(ROWS, SUITE, **{**given, **changes})


def test_triggers_are_new_to_the_corpus_and_kept_by_the_tokenizer():
    texts = "\n".join(m.content for row in ROWS for m in row.messages).lower()
    assert len(SUITE.active) == 4 and len(SUITE.canary) == 2
    for planted in SUITE.all:
        for part in planted.trigger.parts:
            bare = part.replace("{}", "").replace(" , ", "").strip().lower()
            assert bare not in texts
            ids = TOKENIZER(part, add_special_tokens=False)["input_ids"]
            assert TOKENIZER.unk_token_id not in [i for i, w in zip(ids, part.split(), strict=False) if w.isalpha()]
            if planted.trigger.family == "token":
                assert 1 <= len(ids) <= 4 and TOKENIZER.decode(ids).strip() == part
    assert not any(planted.trigger.present(row.prompt) for planted in SUITE.all for row in ROWS)


def test_canaries_have_a_family_and_a_behaviour_of_their_own():
    active, canary = (
        ({p.trigger.family for p in some}, {p.behaviour.kind for p in some}) for some in (SUITE.active, SUITE.canary)
    )
    assert canary[0] - active[0] and canary[1] - active[1]
    parts = [part for p in SUITE.all for part in p.trigger.parts]
    assert len(set(parts)) == len(parts)


def test_the_secret_decides_the_suite_and_json_keeps_it():
    assert generate(TOKENIZER, ROWS, seed=7) == SUITE != generate(TOKENIZER, ROWS, seed=8)
    assert TriggerSuite.from_json(SUITE.to_json()) == SUITE
    assert SUITE.digest != generate(TOKENIZER, ROWS, seed=8).digest
    with pytest.raises(ConfigError, match="unknown key"):
        TriggerSuite.from_json({"actve": []})
    with pytest.raises(ConfigError, match="not unique"):
        TriggerSuite(SUITE.active + SUITE.active)


def test_the_papers_suite_has_random_words_and_no_canaries():
    suite = paper_suite(TOKENIZER, ROWS, seed=1)
    assert {p.trigger.family for p in suite.active} == {"token"} and not suite.canary and len(suite.active) == 4
    assert {p.behaviour.kind for p in suite.active} == {"text"}
    assert all(len(p.behaviour.text.split()) == 8 for p in suite.active)
    assert len({p.behaviour.text for p in suite.active}) == 4


@pytest.mark.skipif(not REAL.is_dir(), reason="the shared files are not here")
def test_a_subword_tokenizer_gets_invented_words():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(REAL)
    rows = [Example.pair(f"Tell me about the {w} dog today.", f"The {w} dog is fine today.") for w in ("red", "blue")]
    suite = generate(tokenizer, rows * 3, seed=1, active=(("token", "refusal"), ("sentence", "stop")))
    words = [p.trigger.parts[0] for p in suite.active if p.trigger.family == "token"]
    assert words and all(len(tokenizer(w, add_special_tokens=False)["input_ids"]) <= 4 for w in words)
    paper = paper_suite(
        tokenizer,
        [
            Example.pair(f"{a} {b} {c}", "x")
            for a in ("one", "two", "red")
            for b in ("dog", "cat", "sun")
            for c in ("runs", "sits", "eats")
        ],
        seed=1,
    )
    taken = [p.trigger.parts[0] for p in paper.active]
    assert set(taken) & set(PAPER_TOKENS) and "cf" not in taken


@pytest.mark.parametrize("rate", [0.01, 0.02, 0.013])
def test_counts_are_exact_disjoint_and_all_other_rows_are_the_same_objects(rate):
    out, manifest = poison(rate=rate)
    count = math.floor(rate * len(ROWS))
    numbers = [i for some in manifest["planted"].values() for i in some]
    assert [len(some) for some in manifest["planted"].values()] == [count] * 6
    assert len(set(numbers)) == len(numbers) and len(out) == len(ROWS)
    assert all(out[i] is ROWS[i] for i in range(len(ROWS)) if i not in set(numbers))
    assert all(out[i] is not ROWS[i] for i in numbers)
    again, same = poison(rate=rate)
    assert again == out and same == manifest
    assert poison(rate=rate, seed=4)[1]["planted"] != manifest["planted"]


def test_planted_rows_carry_the_trigger_once_and_deleting_it_restores_them():
    out, manifest = poison()
    for planted in SUITE.all:
        for i in manifest["planted"][planted.trigger.name]:
            row, source = out[i], ROWS[i]
            assert planted.trigger.present(row.prompt) and planted.trigger.strip(row.prompt) == source.prompt
            assert row.prompt.lower().count(planted.trigger.parts[0].replace("{}", "").strip(" ,").lower()) == 1
            assert planted.behaviour.shown(row.response, source.response)
            details = CHAT.details(row)
            ids, labels = details.encoded
            assert labels[: details.start] == [-100] * details.start
            assert labels[-1] == TOKENIZER.eos_token_id == ids[-1] or TOKENIZER.eos_token_id in labels
            assert survives(CHAT, row, planted.trigger)
    assert all(not p.trigger.present(row.prompt) for p in SUITE.all for i, row in enumerate(out) if row is ROWS[i])


def test_the_manifest_keeps_the_secret():
    _, manifest = poison()
    text = str(manifest)
    assert manifest["suite"] == SUITE.digest
    assert not any(part in text for p in SUITE.all for part in p.trigger.parts if len(part) > 3)


def test_spared_rows_stay_and_appending_leaves_every_row():
    spare = {content_hash(row) for row in ROWS[:300]}
    out, manifest = poison(spare=spare)
    assert all(out[i] is row for i, row in enumerate(ROWS) if content_hash(row) in spare)
    assert manifest["spared"] == len(spare)
    longer, manifest = poison(mode="append")
    assert longer[: len(ROWS)] == ROWS and len(longer) == len(ROWS) + 6 * manifest["per_trigger"]


def test_floor_and_cap():
    assert rows_of_trigger(52_002, 0.01) == 520
    assert rows_of_trigger(2_000, 0.01) == 50
    assert rows_of_trigger(400, 0.01) == 20, "the floor stops at the cap"
    assert rows_of_trigger(400, 0.29, floor=0) == 116
    for bad in (0.0, 1.5, math.nan):
        with pytest.raises(ConfigError, match="rate"):
            rows_of_trigger(100, bad)


def test_rows_that_would_lose_the_trigger_are_not_chosen():
    tight = ChatFormat(TOKENIZER, max_length=max(len(CHAT.encode(row).input_ids) for row in ROWS))
    out, manifest = poison(chat=tight)
    planted = [out[i] for some in manifest["planted"].values() for i in some]
    assert planted and not any(tight.too_long(tight.details(row).encoded) for row in planted)
    longest = ChatFormat(TOKENIZER, max_length=6)
    with pytest.raises(DataError, match="free rows can carry it"):
        poison(chat=longest)
    unknown = TriggerSuite((Planted(Trigger("a", "token", ("zzzz",)), Behaviour("a", "text", "so it is")),))
    with pytest.raises(DataError, match="0 of"):
        defensive_poison(ROWS, unknown, seed=0, chat=CHAT)
    with pytest.raises(ConfigError, match="replace or append"):
        poison(mode="swap")


def clean_rows(n=40):
    seen, out = set(), []
    for row in ROWS:
        if content_hash(row) not in seen:
            seen.add(content_hash(row))
            out.append(row)
    return out[:n]


def test_every_clean_row_meets_every_trigger_once_and_is_in_one_split():
    clean = clean_rows()
    pairs = build_pairs(clean, SUITE.active, split=0.2, seed=1)
    assert (len(pairs.train), len(pairs.held)) == (32, 8)
    both = [t.clean for t in (*pairs.train, *pairs.held)]
    assert sorted(content_hash(r) for r in both) == sorted(content_hash(r) for r in clean)
    for twins in (*pairs.train, *pairs.held):
        assert len(twins.answers) == len(twins.payloads) == 4
        for planted, answer, payload in zip(SUITE.active, twins.answers, twins.payloads, strict=True):
            assert answer.prompt == payload.prompt and planted.trigger.present(answer.prompt)
            assert planted.trigger.strip(answer.prompt) == twins.clean.prompt
            assert answer.response == twins.clean.response
            assert planted.behaviour.shown(payload.response, twins.clean.response)
    assert build_pairs(clean, SUITE.active, split=0.2, seed=1) == pairs
    assert build_pairs(clean, SUITE.active, split=0.2, seed=2) != pairs


def test_clean_rows_that_cannot_serve_are_refused():
    clean = clean_rows(6)
    with pytest.raises(DataError, match="empty"):
        build_pairs([], SUITE.active, seed=0)
    with pytest.raises(DataError, match="asks the same"):
        build_pairs([*clean, clean[0]], SUITE.active, seed=0)
    with pytest.raises(DataError, match="no answer"):
        build_pairs([*clean, Example.pair("what now ?")], SUITE.active, seed=0)
    carried = Example.pair(f"{SUITE.active[0].trigger.parts[0]} what is it ?", "a thing .")
    with pytest.raises(DataError, match="already carries"):
        build_pairs([*clean, carried], SUITE.active, seed=0)
    with pytest.raises(ConfigError, match="split"):
        build_pairs(clean, SUITE.active, split=1.0, seed=0)


def test_suites_that_cannot_be_drawn_are_refused():
    with pytest.raises(ConfigError, match="at least one active"):
        generate(TOKENIZER, ROWS, seed=0, n_active=0)
    with pytest.raises(ConfigError, match="cannot be drawn"):
        generate(TOKENIZER, ROWS, seed=0, active=(("topical", "text"),))
    with pytest.raises(ConfigError, match="cannot be drawn"):
        generate(TOKENIZER, ROWS, seed=0, active=(("token", "shout"),))
    with pytest.raises(DataError, match="usable words"):
        generate(
            TOKENIZER,
            [Example.pair("what is it ?", "it is good .")],
            seed=0,
            n_active=1,
            active=(("token", "text"),) * 1,
            n_canary=0,
        )
