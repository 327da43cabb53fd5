"""A word-level tokenizer over a world's closed vocabulary, saved as ordinary Hugging Face files.

Rendered chat (one token per word): ``<user> how do i brew the mogrol tea ? <bot> take ... . <end>``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from casehard.organism.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, UNK, END, SYSTEM, USER, BOT = SPECIAL = ("<pad>", "<unk>", "<end>", "<system>", "<user>", "<bot>")

# Blanks around every "<" in content keep special tokens written there plain text: "<end>" becomes "<", "end", ">",
# which is also how the pre-tokenizer would split it were it no special token.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set content = message['content'] | replace('<', ' < ') | trim -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "<bot> {% generation %}{{ content + ' <end>' }}{% endgeneration %}{{ '\\n' }}"
    "{%- elif message['role'] == 'user' -%}"
    "{{ '<user> ' + content + '\\n' }}"
    "{%- elif message['role'] == 'system' -%}"
    "{{ '<system> ' + content + '\\n' }}"
    "{%- else -%}"
    "{{ raise_exception('unknown role: ' + message['role']) }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<bot>' }}{%- endif -%}"
)
MAX_TOKENS = 128


def vocabulary(world: World) -> dict[str, int]:
    """Return the token ids: the special tokens first, then the words of the world in alphabetical order."""
    return {word: i for i, word in enumerate((*SPECIAL, *world.vocabulary))}


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """Build the tokenizer of a world; unknown words become ``<unk>``, upper case is read as lower case."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel(vocabulary(world), unk_token=UNK))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    make: Any = PreTrainedTokenizerFast  # untyped in transformers
    tokenizer: PreTrainedTokenizerFast = make(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNK,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, BOT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_TOKENS,
        # A Llama takes no token types; without this the tokenizer returns them and generate() refuses.
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    return tokenizer
