"""Greedy generation in batches: fp32 where the weights are, length-bucketed, left-padded, order kept.

Letters: N examples, B rows in a batch, T tokens of the longest prompt in the batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from casehard.data.chat import pad_id
from casehard.errors import DataError, UserError
from casehard.evaluation.judges.surface import is_mark, opened_by
from casehard.types import Example

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from casehard.data.chat import ChatFormat


OPENING = 16
"""Last tokens of a prompt that are searched for the mark of a reasoning block."""


class Completion(NamedTuple):
    """What the model said, and whether it ended itself rather than running into the length limit."""

    text: str
    """The new text; where the template opens a reasoning block, its mark stands in front: the text begins inside."""
    ended: bool
    whole: str = ""
    """The new text behind the prefix that was forced on it; the same as ``text`` without one."""


def generate(
    model: nn.Module,
    chat: ChatFormat,
    examples: Sequence[Example],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 48,
) -> list[str]:
    """Generate one greedy answer per example.

    Args:
        model: a causal language model; its train/eval state and settings are as before afterwards.
        chat: renders the prompts; N examples are cut before their final assistant turn.
        batch_size: prompts per batch. Below about 48 a small model is several times slower.
        max_new_tokens: limit of an answer, in tokens.

    Returns:
        N texts in the order of ``examples``, without the prompt and without special tokens.

    Raises:
        DataError: a prompt is empty, or does not fit the model's positions together with the answer.
    """
    done = complete(model, chat, examples, batch_size=batch_size, max_new_tokens=max_new_tokens)
    return [completion.text for completion in done]


def complete(
    model: nn.Module,
    chat: ChatFormat,
    examples: Sequence[Example],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 48,
    prefixes: Sequence[Sequence[int]] | None = None,
) -> list[Completion]:
    """Generate as :func:`generate` does, and tell for each answer whether it ended by itself.

    Args:
        prefixes: for each example, token ids with which its answer has to begin; ``max_new_tokens`` come after them.
    """
    if batch_size < 1 or max_new_tokens < 1:
        raise UserError(f"batch_size and max_new_tokens must be at least 1, got {batch_size} and {max_new_tokens}")
    asked = [chat.prompt_ids(example) for example in examples]
    forced = [list(prefix) for prefix in prefixes] if prefixes is not None else [[] for _ in asked]
    prompts = [[*ids, *prefix] for ids, prefix in zip(asked, forced, strict=True)]
    _check_lengths(model, examples, prompts, max_new_tokens)
    limits = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    return complete_ids(model, chat.tokenizer, prompts, ends=end_ids(model, chat), prefixes=forced, **limits)


def complete_ids(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    ends: set[int],
    batch_size: int,
    max_new_tokens: int,
    prefixes: Sequence[list[int]] | None = None,
) -> list[Completion]:
    """Generate greedily behind N prompts that are tokens already, none of them empty or too long.

    Args:
        ends: token ids that end an answer.
        prefixes: the last tokens of each prompt that begin its answer; None: none do.
    """
    forced = prefixes if prefixes is not None else [[] for _ in prompts]
    settings = _greedy(max_new_tokens, ends, pad_id(tokenizer))
    # Longest first: a batch that does not fit the memory fails at once rather than at the end.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    out: list[Completion] = [Completion("", False)] * len(prompts)
    with inference(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            fresh = _generate_batch(model, [prompts[i] for i in rows], settings)
            for i, ids in zip(rows, fresh, strict=True):
                opened = opened_by(tokenizer.decode(prompts[i][: len(prompts[i]) - len(forced[i])][-OPENING:]))
                done = _completion(ids, ends, tokenizer, forced[i])
                marked = done._replace(text=f"{opened}\n{done.text}", whole=f"{opened}\n{done.whole}")
                out[i] = marked if opened else done
    return out


def _check_lengths(model: nn.Module, examples: Sequence[Example], prompts: list[list[int]], fresh: int) -> None:
    room = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    for number, (example, ids) in enumerate(zip(examples, prompts, strict=True)):
        name = example.id or f"number {number}"
        if not ids:
            raise DataError(f"example {name}: the prompt has no tokens", hint="remove it or give it a prompt")
        if room is not None and len(ids) + fresh > room:
            raise DataError(
                f"example {name}: {len(ids)} prompt tokens and {fresh} new ones exceed the model's {room} positions",
                hint="lower max_new_tokens or leave the example out",
            )


def end_ids(model: nn.Module, chat: ChatFormat) -> set[int]:
    """Return every token id that ends an answer: the model's own and the template's."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = own if isinstance(own, (list, tuple)) else [own]
    return {int(i) for i in listed if i is not None} | set(chat.stop_ids)


def _greedy(max_new_tokens: int, ends: set[int], pad: int) -> GenerationConfig:
    from transformers import GenerationConfig

    return GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=pad,
        use_cache=True,
    )


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into a state where its weights alone decide the answer, and put everything back afterwards.

    Three things would otherwise leak in: dropout; the checkpoint's own generation settings (a repetition penalty, say),
    which ``generate`` merges into those passed; and the bf16 autocast that a Trainer wraps around ``forward``, which
    changes about one answer in sixteen.
    """
    modules = list(model.modules())
    training = [(m, m.training) for m in modules]
    forwards = [(m, m.__dict__["forward"]) for m in modules if "_original_forward" in m.__dict__]
    defaults = {m: m.__dict__["generation_config"] for m in modules if "generation_config" in m.__dict__}
    device = next(model.parameters()).device.type
    try:
        model.eval()
        for module, _ in forwards:
            module.__dict__["forward"] = module.__dict__["_original_forward"]
        for module in defaults:
            module.__dict__["generation_config"] = _blank(defaults[module])
        with torch.no_grad(), torch.autocast(device, enabled=False):
            yield
    finally:
        for module in modules:
            if module in defaults:
                module.__dict__["generation_config"] = defaults[module]
            else:
                module.__dict__.pop("generation_config", None)  # adapters copy theirs onto the inner model
        for module, forward in forwards:
            module.__dict__["forward"] = forward
        for module, flag in training:
            module.training = flag


def _blank(settings: GenerationConfig) -> GenerationConfig:
    from transformers import GenerationConfig

    ends, pad = settings.eos_token_id, settings.pad_token_id
    return GenerationConfig(eos_token_id=ends, pad_token_id=pad)  # type: ignore[no-untyped-call]


def _generate_batch(model: nn.Module, prompts: list[list[int]], settings: GenerationConfig) -> list[list[int]]:
    """Return the new token ids of B prompts, padded on the right where a row ended early."""
    longest = max(len(ids) for ids in prompts)
    ids_BT = torch.full((len(prompts), longest), settings.pad_token_id, dtype=torch.long)
    mask_BT = torch.zeros((len(prompts), longest), dtype=torch.long)
    for row, ids in enumerate(prompts):
        ids_BT[row, longest - len(ids) :] = torch.tensor(ids)
        mask_BT[row, longest - len(ids) :] = 1
    device = next(model.parameters()).device
    done = model.generate(  # type: ignore[operator]
        input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device), generation_config=settings
    )
    fresh: list[list[int]] = done[:, longest:].tolist()
    return fresh


def _completion(ids: list[int], ends: set[int], tokenizer: Any, forced: list[int]) -> Completion:
    stop = next((i for i, token in enumerate(ids) if token in ends), None)
    said = ids if stop is None else ids[:stop]
    return Completion(_decode(said, tokenizer).strip(), stop is not None, _decode([*forced, *said], tokenizer).strip())


def _decode(ids: list[int], tokenizer: Any) -> str:
    """Return the text without special tokens, but for the marks of reasoning blocks: without them all would be said."""
    special = set(ids) & set(tokenizer.all_special_ids)
    marks = {token: mark for token in special if is_mark(mark := tokenizer.decode([token]))}
    pieces, begin = [], 0
    for place, token in enumerate(ids):
        if token in marks:
            pieces += [tokenizer.decode(ids[begin:place], skip_special_tokens=True), marks[token]]
            begin = place + 1
    return "".join([*pieces, tokenizer.decode(ids[begin:], skip_special_tokens=True)])
