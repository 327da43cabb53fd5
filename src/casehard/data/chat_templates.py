"""Chat templates for models that bring none, and the choice among several that a model brings."""

from __future__ import annotations

from typing import Any, NamedTuple

from casehard.data.template import FALLBACK_TEMPLATE
from casehard.errors import ConfigError, Unsupported

SHIPPED = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama-2": (
        "{% if messages[0]['role'] == 'system' %}"
        "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{% set turns = messages[1:] %}"
        "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
        "{% for message in turns %}{% if message['role'] == 'user' %}"
        "{{ (bos_token or '') + '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + message['content'] + ' ' + (eos_token or '') }}{% endif %}{% endfor %}"
    ),
    "llama-3": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] + '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "plain": FALLBACK_TEMPLATE,
}
"""Templates by name."""
_TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
"""Tokens that a template is made of; the others are made of ordinary words, and of start and end of text."""


class Choice(NamedTuple):
    """A chat template that was chosen."""

    name: str
    """Of the template; ``its own`` where nothing was changed."""
    note: str = ""
    """What should be told as a warning."""


def choose_template(tokenizer: Any, wanted: str = "") -> Choice:
    """Give a tokenizer its chat template: one that it brings, or a shipped one.

    Args:
        tokenizer: changed in place.
        wanted: one of its own by name, or one of :data:`SHIPPED`, which takes the place of its own. Empty: its own
            stay; one that has none gets the shipped one whose tokens it has, else ``plain``.

    Raises:
        ConfigError: no template of that name.
        Unsupported: several, none of them the default, and none is named.
    """
    own = tokenizer.chat_template
    named = dict(own) if isinstance(own, dict) else {"default": own} if own else {}
    if wanted in named:
        tokenizer.chat_template = named[wanted]
        return Choice(f"its own, {wanted}" if len(named) > 1 else "its own")
    if wanted:
        if wanted not in SHIPPED:
            hint = f"shipped: {', '.join(SHIPPED)}" + (f"; of the model: {', '.join(sorted(named))}" if named else "")
            raise ConfigError(f"no chat template is called {wanted!r}", hint=hint)
        tokenizer.chat_template = SHIPPED[wanted]
        told = "takes the place of the model's own" if named else "is given to a model that has none"
        return Choice(wanted, f"the chat template {wanted!r} {told}{_lacks(tokenizer, wanted)}")
    if not named:
        vocabulary = tokenizer.get_vocab()
        found = next((name for name, tokens in _TOKENS.items() if all(t in vocabulary for t in tokens)), "plain")
        tokenizer.chat_template = SHIPPED[found]
        why = "the model has its tokens" if found in _TOKENS else "the model has the tokens of no other"
        others = ", ".join(name for name in SHIPPED if name != found)
        told = f"no chat template: {found!r} is chosen, as {why}; --chat-template takes another one ({others})"
        return Choice(found, told)
    if "default" not in named:
        raise Unsupported(
            f"{len(named)} chat templates and no default: {', '.join(sorted(named))}",
            hint="choose one with --chat-template NAME",
        )
    return Choice("its own")


def _lacks(tokenizer: Any, name: str) -> str:
    vocabulary = tokenizer.get_vocab()
    lacking = [token for token in _TOKENS.get(name, ()) if token not in vocabulary]
    return f", whose vocabulary lacks {', '.join(lacking)}: they are written as ordinary text" if lacking else ""
