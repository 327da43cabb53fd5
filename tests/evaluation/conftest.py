import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from casehard.data.chat import ChatFormat
from casehard.organism.tokenizer import build_tokenizer
from casehard.organism.world import World


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer(World(0))


@pytest.fixture(scope="session")
def chat(tokenizer):
    return ChatFormat(tokenizer)


@pytest.fixture
def model(tokenizer):
    """A random Llama over the organism's vocabulary, with dropout, in train mode."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        attention_dropout=0.3,
        attn_implementation="eager",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).train()
