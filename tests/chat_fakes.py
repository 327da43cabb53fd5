"""Tokenizers and chat templates for tests: the common styles, on small vocabularies made on the spot."""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = [
    "<s>", "</s>", "<unk>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>",
]  # fmt: skip
CORPUS = [
    "Hello there, how are you today? I am well, thank you.",
    "User: what is the capital?\nAssistant: The capital is a city.\n",
    "system user assistant model INST the answer is here\n\n and there",
] * 4

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}[G]{{ m['content'] | trim }}"
    "{{ '<|eot_id|>' }}[/G]"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}[G]{{ m['content'] + '<|im_end|>' }}[/G]{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'system' %}{{ raise_exception('no system turn') }}"
    "{% else %}[G]{{ ' ' + m['content'] + eos_token }}[/G]{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' }}[G]{{ m['content'] | trim }}{{ '<end_of_turn>' }}[/G]{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
STYLES = {
    "llama3": (LLAMA3, "<|eot_id|>"),
    "chatml": (CHATML, "<|im_end|>"),
    "llama2": (LLAMA2, "</s>"),
    "gemma": (GEMMA, "<end_of_turn>"),
}


def marked(style: str) -> str:
    """The template with generation markers around assistant turns only, as model authors write them."""
    body = STYLES[style][0]
    before, rest = body.split("[G]")
    inside, after = rest.split("[/G]")
    if style == "llama2":
        return f"{before}{{% generation %}}{inside}{{% endgeneration %}}{after}"
    return (
        f"{before}{{% if m['role'] == 'assistant' %}}{{% generation %}}{inside}{{% endgeneration %}}"
        f"{{% else %}}{inside}{{% endif %}}{after}"
    )


def plain(style: str) -> str:
    return STYLES[style][0].replace("[G]", "").replace("[/G]", "")


NEWLINES_TOGETHER = r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # as Llama 3 and Qwen cut


def byte_level(*, trim_offsets: bool = False, gpt2: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(NEWLINES_TOGETHER), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2)
    tokenizer.pre_tokenizer = bytes_only if gpt2 else pre_tokenizers.Sequence([cut, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return tokenizer


def metaspace() -> Tokenizer:
    """Sentencepiece-like: the very first piece, and only it, gets a word mark in front."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    alphabet = sorted({c for text in CORPUS for c in text} | set("<|>/_[]:"))
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*CORPUS, *byte_tokens], trainer)
    return tokenizer


def wrap(backend: Tokenizer, template: str | None = None, **special: str) -> Any:
    names = {"bos_token": "<s>", "eos_token": "</s>"} | special
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=SPECIAL[3:], **names)
    tokenizer.chat_template = template
    return tokenizer
