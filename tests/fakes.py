"""Small models and rows for tests: random, seeded, built without any download."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from casehard.data.batches import Encoded, EncodedSet


def tiny_llama(vocab=64, hidden=32, layers=2, *, seed=0, dropout=0.0, heads=4):
    """Return a random Llama of a few ten thousand parameters; ``seed`` fixes the weights."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=128,
        attention_dropout=dropout,
        attn_implementation="eager",
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def tiny_rows(n=24, *, vocab=64, length=12, seed=0, uneven=True):
    """Return ``n`` random rows; the first third of each is prompt (labels IGNORE); lengths differ if ``uneven``."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(n):
        size = length - (i % 4 if uneven else 0)
        ids = torch.randint(3, vocab, (size,), generator=g).tolist()
        labels = [-100] * (size // 3) + ids[size // 3 :]
        rows.append(Encoded(ids, labels))
    return EncodedSet(tuple(rows), pad_id=0)


def weights(model):
    """Return a detached copy of every parameter and buffer, by name."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def largest_difference(a, b):
    """Return the largest absolute difference between two dicts of tensors with the same keys."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)
