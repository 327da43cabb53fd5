"""A tiny GGUF file of a Llama, as llama.cpp's converter writes one; needs the package ``gguf``."""

from __future__ import annotations

import zipfile
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["t h", "th e", "i n"]
VOCABULARY = [*SPECIAL, *sorted(ByteLevel.alphabet()), "th", "the", "in"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _turned(weight, heads):
    """Return query or key rows in the order of llama.cpp, which rotates neighbours where transformers takes halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path: Path, model, *, template: str | None = TEMPLATE, quantised: bool = False, **facts: str) -> Path:
    """Write a ``LlamaForCausalLM`` with ``len(VOCABULARY)`` tokens.

    Args:
        quantised: matrices as Q8_0, which takes widths that 32 divides.
        facts: ``license``, ``architecture``.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quantize

    config = model.config
    writer = GGUFWriter(path, facts.get("architecture", "llama"))
    writer.add_name("tiny")
    if "license" in facts:
        writer.add_license(facts["license"])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(VOCABULARY)
    writer.add_token_merges(MERGES)
    kinds = [TokenType.CONTROL] * len(SPECIAL) + [TokenType.NORMAL] * (len(VOCABULARY) - len(SPECIAL))
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if template:
        writer.add_chat_template(template)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.layers": "blk",
    }
    for name, value in model.state_dict().items():
        array = value.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            array = _turned(array, config.num_attention_heads)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        kind = GGMLQuantizationType.Q8_0 if quantised and array.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_folder(folder: Path, model, *, template: str | dict | None = TEMPLATE) -> Path:
    """Write the same model with the same tokenizer as an ordinary folder."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    merges = [tuple(merge.split()) for merge in MERGES]
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(VOCABULARY)}, merges))
    inner.pre_tokenizer, inner.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=SPECIAL[1], eos_token=SPECIAL[2])
    tokenizer.pad_token = SPECIAL[0]
    tokenizer.chat_template = template
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_wheel(path: Path, gguf: Path, inside: str) -> Path:
    """Write an archive with the file at ``inside``, as a package that carries weights has it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf, inside)
        archive.writestr("other/__init__.py", "raise SystemExit('ran')\n")
    return path
