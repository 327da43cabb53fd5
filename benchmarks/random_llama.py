"""The random models and rows that the step benchmarks time: fixed shapes, seed 0, nothing downloaded."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from casehard.data.batches import Encoded

SHAPES = {
    # name: (vocab, hidden, intermediate, layers, heads)
    "organism": (640, 128, 384, 4, 4),
    "llama25m": (8192, 384, 1024, 10, 6),
    "llama500m": (32000, 1280, 3456, 22, 20),
    "llama1500m": (32000, 2048, 5632, 28, 16),
}


def vocabulary(name: str) -> int:
    """Return the number of token ids of a shape."""
    return SHAPES[name][0]


def model(name: str, device: str, *, attention: str = "", positions: int = 2048) -> LlamaForCausalLM:
    """Return a random Llama with tied embeddings, in training mode.

    Args:
        attention: implementation; empty takes the one the library takes, eager on a CPU.
        positions: longest row in tokens.
    """
    vocab, hidden, inner, layers, heads = SHAPES[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        attn_implementation=attention or ("eager" if device == "cpu" else "sdpa"),
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(device).train()


def rows(name: str, count: int, tokens: int) -> tuple[Encoded, ...]:
    """Return ``count`` random rows of one length, every token trained on."""
    g = torch.Generator().manual_seed(0)
    drawn = torch.randint(3, vocabulary(name), (count, tokens), generator=g).tolist()
    return tuple(Encoded(ids, ids) for ids in drawn)
