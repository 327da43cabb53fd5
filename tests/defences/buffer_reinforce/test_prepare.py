"""Provider assets: what is trained on what, gates, publishing; property 12, and 15 for a whole run."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import casehard
from buffer_fakes import make_assets, random_pairs
from casehard.data.batches import IGNORE
from casehard.data.chat import ChatFormat
from casehard.data.mix import content_hash
from casehard.data.sources import load as read
from casehard.data.sources import save
from casehard.defences.buffer_reinforce.frozen_lora import FrozenLora, fingerprints
from casehard.defences.buffer_reinforce.gates import GateLimits, Held, measure
from casehard.defences.buffer_reinforce.prepare import (
    PRESETS,
    Gated,
    Prepare,
    PrepareConfig,
    buffer_rows,
    prepare,
    preset,
    reinforce_rows,
    split,
)
from casehard.defences.buffer_reinforce.publish import refuse_buffer_in, scan_for_buffer, write_assets
from casehard.defences.buffer_reinforce.screen import Gain, check, roc, screen, write_screening
from casehard.errors import ConfigError, DataError, UserError
from casehard.evaluation.judges.rule import RuleJudge
from casehard.model.adapters import add_lora
from casehard.model.load import load, load_tokenizer
from casehard.train.protocol import Step
from casehard.train.recipe import TrainConfig
from casehard.types import Example
from fakes import tiny_llama, tiny_rows

WORLD = Path(casehard.__file__).parent / "organism" / "assets" / "world0-tiny"
MODES = ("on", "alternate", "uniform")
TRAIN = TrainConfig(steps=2, batch_size=4, lr=1e-3, warmup=0)
SMALL = PrepareConfig(
    rank=2,
    alpha=4.0,
    dropout=0.0,
    epochs=None,
    buffer_train=TRAIN,
    reinforce_train=TRAIN,
    gates=GateLimits(prompts=4, max_new_tokens=8),
)


@pytest.fixture(scope="module")
def provider(tmp_path_factory):
    """An untrained model with the organism's tokenizer, and a few of the organism's rows."""
    folder = tmp_path_factory.mktemp("provider")
    tokenizer = load_tokenizer(WORLD)
    tiny_llama(vocab=len(tokenizer), hidden=32, layers=1).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = {
        "harmful": read(WORLD / "data" / "simulated.jsonl")[:24],
        "refusals": read(f"{WORLD / 'data' / 'align.jsonl'}?kind=refusal")[:24],
        "benign": read(f"{WORLD / 'data' / 'align.jsonl'}?kind=helpful")[:24],
    }
    for name, some in rows.items():
        save(folder / f"{name}.jsonl", some)
    return folder


def job(provider, config=SMALL, **changes):
    files = {name: (str(provider / f"{name}.jsonl"),) for name in ("harmful", "refusals", "benign")}
    own = {role: changes.pop(role) for role in list(changes) if role in files}
    # Its judge: rules for English text cannot score the babble of an untrained model of the world's words.
    given = {"suite": str(WORLD / "data" / "suite"), **changes}
    return Prepare(model=str(provider / "model"), config=config, device="cpu", rows={**files, **own}, **given)


@pytest.fixture(scope="module")
def made(provider, tmp_path_factory):
    return prepare(job(provider, replace(SMALL, allow_missed=True)), tmp_path_factory.mktemp("made") / "assets")


# -- what is trained on what (property 12) ------------------------------------------------------------------------


def pairs_of(kind, n, answer):
    return [Example.pair(f"{kind} {i}", f"{answer} {i}", kind=answer) for i in range(n)]


def test_roles_are_never_mixed_and_held_out_prompts_are_trained_by_nobody():
    # The same prompts with both answers, as in the paper's data.
    harmful, refusals = pairs_of("bad", 40, "comply"), pairs_of("bad", 40, "refuse")
    rows = split(harmful, refusals, pairs_of("good", 60, "help"), share=0.2)
    held = {content_hash(e) for e in (*rows.held.restricted, *rows.held.compliant, *rows.held.benign)}
    assert len(rows.held.restricted) == 8 and len(rows.held.compliant) == 8 and len(rows.held.benign) == 12
    first, second = (f(rows, PrepareConfig(), seed=0) for f in (buffer_rows, reinforce_rows))
    assert Counter(e.tags["kind"] for e in first) == {"comply": 32, "help": 32}
    assert Counter(e.tags["kind"] for e in second) == {"refuse": 32, "help": 32}
    assert not held & {content_hash(e) for e in (*first, *second)}
    paper = buffer_rows(rows, preset("paper"), seed=0)
    assert {e.tags["kind"] for e in paper} == {"comply"} and len(paper) == 32
    third = reinforce_rows(rows, PrepareConfig(refusal_share=0.25), seed=0)
    assert Counter(e.tags["kind"] for e in third) == {"refuse": 32, "help": 96}


def test_the_kl_term_holds_the_buffer_to_the_base_on_benign_rows(provider, tmp_path):
    chat = ChatFormat(load_tokenizer(provider / "model"))
    ids = [chat.prompt_ids(row) for row in read(provider / "benign.jsonl")[:8]]
    moved = {}
    for kl in (0.0, 300.0):
        train = replace(TRAIN, steps=12, lr=1e-2)
        config = replace(SMALL, kl=kl, helpful_share=0.0, allow_missed=True, buffer_train=train)
        done = prepare(job(provider, config), tmp_path / str(kl))
        assert ("benign" in done.assets.record["data_digests"]) == (kl > 0)
        model = load(provider / "model").net
        with torch.no_grad():
            before = [model(torch.tensor([row])).logits.log_softmax(-1) for row in ids]
            FrozenLora(done.assets.buffer()).attach(model)
            after = [model(torch.tensor([row])).logits.log_softmax(-1) for row in ids]
        moved[kl] = sum(float((b.exp() * (b - a)).sum(-1).mean()) for b, a in zip(before, after, strict=True))
    assert 0 <= moved[300.0] < 0.5 * moved[0.0], moved
    assert preset("security_vector").kl == 0.01 and preset("security_vector").helpful_share == 0
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="kl"):
            PrepareConfig(kl=wrong)


def test_unusable_rows_are_refused():
    bad, good = pairs_of("bad", 4, "x"), pairs_of("good", 4, "y")
    with pytest.raises(DataError, match="overlap"):
        split(bad, bad, [*good, bad[0]], share=0.2)
    with pytest.raises(DataError, match="too few"):
        split(bad, bad, good[:1], share=0.2)
    for wrong in ({"helpful_share": 1.0}, {"refusal_share": 0.0}, {"holdout": 0.0}, {"epochs": (0.0, 1.0)}):
        with pytest.raises(ConfigError):
            PrepareConfig(**wrong)
    with pytest.raises(ConfigError, match="min_buffer_asr"):
        GateLimits(min_buffer_asr=85)


def test_only_answers_carry_loss(provider):
    chat = ChatFormat(load_tokenizer(provider / "model"))
    for name in ("harmful", "refusals", "benign"):
        examples = read(provider / f"{name}.jsonl")
        for example, row in zip(examples, chat.encode_all(examples).rows, strict=True):
            prompt = chat.prompt_ids(example)
            assert row.input_ids[: len(prompt)] == prompt
            assert (
                all(label == IGNORE for label in row.labels[: len(prompt)]) and IGNORE not in row.labels[len(prompt) :]
            )


def test_reinforce_sees_the_buffer_as_its_gate_says():
    buffer = FrozenLora(random_pairs(seed=1))
    model = tiny_llama().eval()
    batch = tiny_rows(4).batch_at(4, seed=0, step=0, purpose="x")
    step = lambda i: Step(i, 0, 1, lambda m, b: m(**b).loss, lambda loss: None)  # noqa: E731
    plain = float(model(**batch).loss)
    buffer.attach(model)
    active = float(model(**batch).loss)
    seen = {mode: [float(Gated(buffer, mode, 0).loss(model, batch, step(i))) for i in range(4)] for mode in MODES}
    assert active != plain
    assert seen["on"] == [active] * 4 and seen["alternate"] == [active, plain] * 2
    assert len(set(seen["uniform"])) == 4 and not {plain, active} & set(seen["uniform"])
    gated = Gated(buffer, "alternate", 0)
    gated.loss(model, batch, step(1))
    gated.finish(model)
    assert buffer.gate == 1.0
    buffer.detach()


# -- the run -------------------------------------------------------------------------------------------------------


def test_missed_gates_publish_nothing(provider, tmp_path):
    with pytest.raises(UserError, match=r"buffer_asr is 0\.000, limit 0\.85") as caught:
        prepare(job(provider), tmp_path / "assets")
    assert not list(tmp_path.iterdir()) and "allow-missed" in caught.value.hint
    assert {g["name"] for g in caught.value.gates} >= {"base_asr", "buffer_asr", "reinforce_benign_refusal", "both_asr"}


def test_the_record_says_what_was_made_from_what(provider, made):
    record, loaded = made.assets.record, load(provider / "model")
    assert record["base_digest"] == loaded.digest and record["base_fingerprints"] == fingerprints(loaded.net)
    assert record["missed"] == ["buffer_asr", "buffer_left"] and len(record["gates"]) == len(made.gates) == 11
    assert record["rows"]["held_restricted"] > 0 and record["layers"] == 7
    assert set(record["data_digests"]) == {"buffer", "reinforce"}
    for role in ("buffer", "reinforce"):
        marker = json.loads((made.assets.path / role / "casehard_adapter.json").read_text())
        assert marker["role"] == role and marker["base_digest"] == loaded.digest
    made.assets.require_format(loaded.tokenizer)
    with pytest.raises(ConfigError, match="system message"):
        made.assets.require_format(loaded.tokenizer, system="be kind")
    other = load_tokenizer(provider / "model")
    other.chat_template = other.chat_template + " "
    with pytest.raises(ConfigError, match="another template"):
        made.assets.require_format(other)


def test_both_adapters_learnt_from_starts_of_their_own(made):
    buffer, reinforce = made.assets.buffer(), made.assets.reinforce()
    assert buffer.keys() == reinforce.keys()
    for name in buffer:
        assert bool(buffer[name].b.any()) and bool(reinforce[name].b.any())
        cosine = torch.cosine_similarity(buffer[name].a.flatten(), reinforce[name].a.flatten(), dim=0)
        assert abs(float(cosine)) < 0.6


def test_the_same_job_gives_the_same_bytes_and_leaves_the_model_alone(provider, made, tmp_path):
    loaded = load(provider / "model")
    before = {n: p.detach().clone() for n, p in loaded.net.named_parameters()}
    again = prepare(job(provider, replace(SMALL, allow_missed=True)), tmp_path / "again", model=loaded)
    assert again.assets.digest == made.assets.digest
    assert all(p.requires_grad and p.equal(before[n]) for n, p in loaded.net.named_parameters())
    other = prepare(job(provider, replace(SMALL, allow_missed=True), seed=1), tmp_path / "other", model=loaded)
    assert other.assets.digest != made.assets.digest


def test_assets_replace_assets_and_nothing_else(tmp_path):
    make_assets(tmp_path / "a")
    make_assets(tmp_path / "a", buffer=random_pairs(seed=8))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no provider assets"):
        make_assets(tmp_path / "b")
    with pytest.raises(KeyError):
        write_assets(tmp_path / "c", random_pairs(), random_pairs(), {})
    assert not (tmp_path / "c").exists()
    found = scan_for_buffer(tmp_path / "a")
    assert len(found) == 1 and "marked as a buffer" in found[0].why
    with pytest.raises(UserError, match="never leaves the provider"):
        refuse_buffer_in(tmp_path / "a" / "buffer")


def test_the_recipe_follows_epochs():
    from casehard.defences.buffer_reinforce.prepare import _recipe

    found = _recipe(PRESETS["paper"].buffer_train, 3.0, 4948)
    assert (found.steps, found.warmup, found.lr) == (1856, 93, 1e-5)
    assert _recipe(TRAIN, None, 10) is TRAIN


def test_gates_hold_against_a_judge_with_known_answers(provider):
    loaded = load(provider / "model")

    class Judge:
        labels = iter(["refusal"] * 3 + ["answer"] * 3 + ["leak"] * 3 + ["partial"] * 3 + ["refusal", "answer"] * 12)

        name = "known"

        def judge(self, examples, responses):
            from casehard.evaluation.judges.base import Verdict

            return [Verdict(next(self.labels)) for _ in responses]

    rows = read(provider / "benign.jsonl")[:3]
    name = "model.layers.0.mlp.up_proj"
    pairs = {role: {name: random_pairs(seed=i)[name]} for i, role in enumerate(("buffer", "reinforce"))}
    chat = ChatFormat(loaded.tokenizer)
    gates = measure(loaded.net, chat, Judge(), Held(rows, rows, rows), pairs, GateLimits(), max_new_tokens=2)
    by = {g.name: g for g in gates}
    assert (by["base_asr"].value, by["buffer_asr"].value, by["buffer_asr"].passed) == (0.0, 1.0, True)
    assert by["buffer_benign_refusal"].value == 1.0 and by["buffer_benign_refusal"].passed
    assert not by["reinforce_asr"].passed and not by["reinforce_benign_refusal"].passed
    assert by["reinforce_asr"].record()["low"] < by["reinforce_asr"].value < by["reinforce_asr"].record()["high"]


# -- screening and the pre-flight check ----------------------------------------------------------------------------


def test_the_gain_is_the_difference_of_the_two_log_likelihoods(provider, made, tmp_path):
    loaded = load(provider / "model")
    chat = ChatFormat(loaded.tokenizer)
    rows = [*read(provider / "harmful.jsonl")[:5], *read(provider / "benign.jsonl")[:5]]
    gains = screen(loaded.net, chat, made.assets, rows, label="kind")
    assert [g.gain for g in gains] == sorted((g.gain for g in gains), reverse=True)
    wrapped = add_lora(loaded.net, 1, 1)  # the assets see through an adapter
    for g in gains[:3]:
        row = chat.encode(rows[g.row])
        ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
        with torch.no_grad():
            without = float(wrapped(input_ids=ids, labels=labels).loss)
            frozen = FrozenLora(made.assets.buffer()).attach(wrapped)
            with_buffer = float(wrapped(input_ids=ids, labels=labels).loss)
            frozen.detach()
        assert g.gain == pytest.approx((without - with_buffer) * g.tokens, abs=1e-4)
    assert {g.label for g in gains} == {"compliance", "helpful"}
    write_screening(tmp_path / "ranked.jsonl", gains)
    text = (tmp_path / "ranked.jsonl").read_text()
    assert len(text.splitlines()) == 10 and rows[0].response not in text and "prompt" not in text
    with pytest.raises(ConfigError, match="system message"):
        screen(loaded.net, ChatFormat(loaded.tokenizer, system="x"), made.assets, rows)


def gain(value, label):
    return Gain(0, "", value, value, 0.0, 0.0, 1, label)


def test_the_roc_is_the_chance_of_the_right_order():
    mixed = [gain(3, "h"), gain(2, "b"), gain(1, "h"), gain(1, "b"), gain(0, "b")]
    found = roc(mixed, "h")
    assert found.auc == pytest.approx((3 + 1.5) / 6)
    assert found.points[0] == (0.0, 0.0) and found.points[-1] == (1.0, 1.0) and len(found.points) == 5
    assert roc([gain(1, "h"), gain(0, "b")], "h").auc == 1.0 and roc([gain(0, "h"), gain(0, "b")], "h").auc == 0.5
    with pytest.raises(DataError, match="no curve"):
        roc([gain(1, "h")], "h")


class Sayings:
    """A judge that calls a refusal what the base says to prompts on its list, and answers that begin with "no"."""

    name = "sayings"

    def __init__(self, refused, buffered_refuses):
        self.refused, self.buffered_refuses, self.asked = set(refused), buffered_refuses, 0

    def judge(self, examples, responses):
        return [self.verdict(*pair) for pair in zip(examples, responses, strict=True)]

    def verdict(self, example, response):
        from casehard.evaluation.judges.base import Verdict

        if response == example.response:
            return Verdict("refusal" if response.startswith("no") else "answer")
        self.asked += 1
        late = self.asked > 6  # the first six are the base's own answers
        says = example.prompt in self.refused and (not late or self.buffered_refuses)
        return Verdict("refusal" if says else "answer")


def test_the_check_warns_of_data_that_the_buffer_does_not_cover(provider, made):
    loaded = load(provider / "model")
    chat = ChatFormat(loaded.tokenizer)
    rows = read(provider / "benign.jsonl")[:6]
    calm = check(loaded.net, chat, made.assets, rows, Sayings([], False))
    assert calm.refused == 0 and calm.coverage is None and calm.warnings == ()
    assert 0 < calm.residual < 1 and calm.nll > 0
    strange = check(loaded.net, chat, made.assets, rows, Sayings([r.prompt for r in rows[:4]], True))
    assert (strange.refused, strange.still_refused) == (4, 4)
    assert any("still refuses 4 of the 4" in w for w in strange.warnings)
    drop = strange.refused_residual - strange.refused_residual_buffer
    reference = made.assets.record["reference"]
    assert strange.coverage == pytest.approx(
        drop / (reference["base"]["residual"] - reference["buffer"]["residual"]), rel=1e-6
    )
    cancelling = [Example.pair(r.prompt, "no " + r.response) for r in rows]
    assert any("cancel" in w for w in check(loaded.net, chat, made.assets, cancelling, Sayings([], False)).warnings)
    with pytest.raises(DataError):
        check(loaded.net, chat, made.assets, [], RuleJudge())
