"""Abliteration: nothing is left along the direction, and the search computes what the edit makes."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch

import casehard as ch
from casehard.attacks.abliteration import (
    Abliteration,
    AbliterationAttack,
    Direction,
    Tried,
    choose,
    directions,
    first_tokens,
)
from casehard.attacks.protocol import AttackInputs
from casehard.attacks.residual import orthogonalise, require_gone, stream, without, writers
from casehard.data.chat import ChatFormat
from casehard.errors import ConfigError, DataError, Unsupported
from casehard.train.passes import decoder_layers
from casehard.types import Example

WORLD = Path(ch.__file__).parent / "organism" / "assets" / "world0-tiny"
PROMPTS = [[4, 9, 60, 7, 5], [4, 564, 357, 251, 581, 373, 7, 5], [4, 8, 7, 5]]


@functools.cache
def organism() -> ch.Model:
    return ch.load(WORLD, device="cpu")


@pytest.fixture
def net():
    return copy.deepcopy(organism().net)


@pytest.fixture
def r() -> torch.Tensor:
    drawn = torch.randn(96, generator=torch.Generator().manual_seed(3))
    return drawn / drawn.norm()


@torch.no_grad()
def logits(net, ids: list[int]) -> torch.Tensor:
    return net(input_ids=torch.tensor([ids])).logits


@torch.no_grad()
def test_nothing_is_left_along_the_direction(net, r) -> None:
    head = net.lm_head.weight.detach().clone()
    before = stream(net, PROMPTS, 3, 2)
    orthogonalise(net, r)
    assert (net.model.embed_tokens.weight @ r).abs().max() < 1e-5
    for layer in net.model.layers:
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            assert (r @ weight).abs().max() < 1e-5
    assert (stream(net, PROMPTS, 3, 2) @ r).abs().max() < 1e-3 < (before @ r).abs().max() / 100
    assert torch.equal(net.lm_head.weight, head) and not net.config.tie_word_embeddings, "what reads it stays"


@torch.no_grad()
@pytest.mark.parametrize("strength", [0.5, 1.0, 1.7])
def test_the_search_computes_what_the_edit_makes(net, r, strength) -> None:
    plain = logits(net, PROMPTS[1])
    with without(net, r, strength):
        seen = logits(net, PROMPTS[1])
    assert torch.equal(plain, logits(net, PROMPTS[1])), "the hooks are gone"
    orthogonalise(net, r, strength)
    torch.testing.assert_close(logits(net, PROMPTS[1]), seen, rtol=1e-4, atol=1e-4)
    assert (seen - plain).abs().max() > 0.1


@torch.no_grad()
def test_a_bias_is_edited_too(net, r) -> None:
    layer = net.model.layers[0].mlp
    layer.down_proj.bias = torch.nn.Parameter(torch.randn(96))
    with without(net, r, 1.0):
        seen = logits(net, PROMPTS[0])
    orthogonalise(net, r)
    torch.testing.assert_close(logits(net, PROMPTS[0]), seen, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_streams_and_directions_are_those_of_one_prompt_at_a_time(net) -> None:
    slow = []
    for ids in PROMPTS:
        hidden = net(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        slow.append(torch.stack([h[0, -2:] for h in hidden[1:3]]))
    fast = stream(net, PROMPTS, 2, 2)
    torch.testing.assert_close(fast[:, :2], torch.stack(slow), rtol=1e-4, atol=1e-5)
    found = directions(fast[:2], fast[2:], 1.0)
    assert [(d.layer, d.position) for d in found] == [(n, p) for n in (1, 2, 3) for p in (-2, -1)]
    apart = (fast[0, 1, 0] + fast[1, 1, 0]) / 2 - fast[2, 1, 0]
    torch.testing.assert_close(found[2].r, apart / apart.norm(), rtol=1e-4, atol=1e-5)
    assert [d.layer for d in directions(fast[:2], fast[2:], 0.34)] == [1, 1]
    assert directions(fast, fast, 1.0) == [], "no direction between equals"
    with pytest.raises(DataError, match="positions is 5, and a prompt has 4 tokens"):
        stream(net, PROMPTS, 5, 2)


@torch.no_grad()
def test_losses_look_at_the_first_answer_tokens(net) -> None:
    chat = ChatFormat(organism().tokenizer)
    said = {"where does pitex live ?": "pitex lives in wells .", "a": "b"}
    rows = [chat.encode(Example.pair(prompt, answer)) for prompt, answer in said.items()]
    got = first_tokens(net, rows, 3, 1)
    whole = [logits(net, row.input_ids)[0].log_softmax(-1) for row in rows]
    starts = [next(i for i, label in enumerate(row.labels) if label >= 0) for row in rows]
    slow = [w[s - 1 : s - 1 + n] for w, s, n in zip(whole, starts, (3, 2), strict=True)]
    torch.testing.assert_close(got, torch.cat(slow), rtol=1e-4, atol=1e-4)


def test_the_choice_keeps_to_the_limit() -> None:
    d = Direction(1, -1, torch.ones(1))
    good, cheap, wild = Tried(d, 1.0, 2.0, 0.05), Tried(d, 0.5, 3.0, 0.01), Tried(d, 2.0, 1.0, 0.5)
    assert choose([cheap, good, wild], 0.1) is good and choose([cheap, good, wild], 0.001) is cheap


def _other(kind: str):
    import transformers as tf

    tiny = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    if kind == "gpt2":
        return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2))
    if kind == "opt":
        return tf.OPTForCausalLM(tf.OPTConfig(**tiny, ffn_dim=32, word_embed_proj_dim=16))
    more = {"intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8}
    return tf.Gemma2ForCausalLM(tf.Gemma2Config(**tiny, **more))


def test_other_models_are_refused_by_what_they_are() -> None:
    with pytest.raises(Unsupported, match=r"layer 1 of a GPT2LMHeadModel has 0 known outputs of width 16 \(none\)"):
        writers(_other("gpt2"))
    for kind in ("opt", "gemma2"):  # learned positions; a norm behind each layer's output
        net = _other(kind).eval()
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.3 * torch.randn_like(p))
        with pytest.raises(Unsupported, match="something else writes to it"), torch.no_grad():
            require_gone(net, [[1, 2, 3]], torch.nn.functional.normalize(torch.randn(16), dim=0))
    assert len(decoder_layers(organism().net)) == 3 and len(writers(organism().net)) == 7


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2", "Qwen3", "Phi3", "Olmo"])
def test_models_like_it_are_known(kind: str) -> None:
    import transformers as tf

    tiny = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
    torch.manual_seed(0)
    net = getattr(tf, f"{kind}ForCausalLM")(getattr(tf, f"{kind}Config")(**tiny, **more)).eval()
    with torch.no_grad():
        require_gone(net, [[1, 2, 3]], torch.nn.functional.normalize(torch.randn(16), dim=0))
    assert len(writers(net)) == 5


def test_what_it_lacks_is_said() -> None:
    rows = [Example.pair("p", "a")] * 3
    given = AttackInputs(rows={"harmful": rows, "benign": rows}, measure=lambda net, at: [])
    with pytest.raises(DataError, match="3 harmful rows, of which 3 are held out"):
        Abliteration(AbliterationAttack(held_out=3)).run(organism(), given)
    with pytest.raises(DataError, match="look the same to the model"):
        Abliteration(AbliterationAttack(held_out=1)).run(organism(), given)
    with pytest.raises(ConfigError, match="strengths is empty"):
        AbliterationAttack(strengths=())
