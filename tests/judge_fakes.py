"""Judge models for tests: tiny ones on disk, whose answers are scripted, and a sequence classifier set by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from chat_fakes import byte_level, plain, wrap

GUARD = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{{ '<|im_start|>user\\nSay Safety and Refusal.<|im_end|>\\n<|im_start|>assistant\\n' }}"
)
"""A template as guards have it: the whole conversation, then the question, whoever asks for a prompt or not."""


def _config(tokenizer, layers=1, **more):
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=more.pop("positions", 4096),
        pad_token_id=tokenizer.convert_tokens_to_ids("<unk>"),
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        attn_implementation="eager",
        **more,
    )


def guard_folder(folder: Path, template: str = GUARD, positions: int = 4096) -> Path:
    """Save a chat model with random weights; :func:`scripted` says what it answers."""
    tokenizer = wrap(byte_level(), template or None, eos_token="<|im_end|>", pad_token="<unk>")
    torch.manual_seed(0)
    LlamaForCausalLM(_config(tokenizer, positions=positions)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def chat_folder(folder: Path, **how) -> Path:
    """Save one with the template of an ordinary chat model."""
    return guard_folder(folder, plain("chatml"), **how)


def head_folder(folder: Path) -> Path:
    """Save a classifier of the last character: ``!`` is unsafe, ``?`` a refusal, anything else safe."""
    tokenizer = wrap(byte_level(), None, eos_token="<|im_end|>", pad_token="<unk>")
    labels = {0: "safe", 1: "unsafe", 2: "refusal"}
    net = LlamaForSequenceClassification(_config(tokenizer, id2label=labels, num_labels=3))
    with torch.no_grad():
        for parameter in net.model.layers.parameters():
            parameter.zero_()
        net.model.embed_tokens.weight.zero_()
        net.model.embed_tokens.weight[:, 0] = 1
        for label, char in ((1, "!"), (2, "?")):
            (token,) = tokenizer.encode(char, add_special_tokens=False)
            net.model.embed_tokens.weight[token] = torch.eye(16)[label]
        net.score.weight.copy_(torch.eye(3, 16))
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def scripted(monkeypatch, say: Callable[[str], str | None]) -> list[str]:
    """Have every tiny Llama answer what ``say`` makes of the prompt; None never ends. Returns the prompts seen."""
    tokenizer, seen = byte_level(), []
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<unk>")

    def generate(self, input_ids, attention_mask, generation_config):
        answers = []
        for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
            text = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m], skip_special_tokens=False)
            seen.append(text)
            said = say(text)
            new = tokenizer.encode("and so on " * 999 if said is None else said, add_special_tokens=False).ids
            answers.append([*new, end][: generation_config.max_new_tokens])
        longest = max(map(len, answers))
        fresh = torch.tensor([[*ids, *[pad] * (longest - len(ids))] for ids in answers])
        return torch.cat([input_ids, fresh], 1)

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    return seen
