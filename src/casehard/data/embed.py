"""Embeddings of prompts: the mean of the final hidden states over the prompt's tokens.

By default those of the model that will be tuned (its trunk, adapters off), as in SPARD; or of any sentence-embedding
folder. Texts are batched by length and results are cached under the digest of everything that decides them.

Letters: N texts, B texts in a batch, T tokens, D width.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from casehard.errors import DataError, Unsupported
from casehard.io.tensorfile import load_tensors, save_tensors
from casehard.types import Example

Text = Literal["prompt", "prompt+answer"]
_RECIPE = "mean-final-hidden-1"


@dataclass(frozen=True)
class Embedder:
    """A model that embeds text, its tokenizer, and the content digest of both."""

    model: Any
    tokenizer: Any
    digest: str


def load_embedder(folder: str | Path, *, digest: str, device: str = "cpu", config: Any = None) -> Embedder:
    """Load a sentence-embedding folder with ``AutoModel``: safetensors only, no remote code.

    Args:
        folder: a local folder, checked by ``casehard.model.check`` if it is from a stranger.
        digest: content digest of the folder.
        device: where it runs.
        config: the configuration to use in place of the one in the folder, from ``casehard.model.headers``.

    Raises:
        Unsupported: the folder cannot be loaded so.
    """
    from transformers import AutoModel, AutoTokenizer

    options = {"trust_remote_code": False, "local_files_only": True}
    try:
        settings = {} if config is None else {"config": config}
        model: Any = AutoModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32, **settings, **options)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, **settings, **options)
    except Exception as error:  # some hundred classes, each with its own ways
        raise Unsupported(
            f"{folder}: cannot be loaded as an embedding model: {str(error)[:300]}",
            hint="give a local folder with config.json, tokenizer.json and .safetensors weights",
        ) from None
    return Embedder(model.to(device).eval(), tokenizer, digest)


def texts_of(examples: Sequence[Example], text: Text = "prompt") -> list[str]:
    """Return what is embedded of each example: the last user turn, raw, or that and the answer."""
    if text == "prompt":
        return [e.prompt for e in examples]
    return [f"{e.prompt} {e.response}".strip() for e in examples]


def embed(
    embedder: Embedder, texts: Sequence[str], *, cache: Path | None = None, batch_tokens: int = 8192
) -> torch.Tensor:
    """Return one embedding a text, (N, D) float32 on the CPU.

    Args:
        texts: rendered with no template; of one longer than the model's context the beginning is read, with a warning.
        cache: folder of earlier results; None computes anew.
        batch_tokens: most tokens, padding included, in one forward pass.

    Raises:
        DataError: no texts, or a text without tokens.
    """
    if not texts:
        raise DataError("nothing to embed: no rows", hint="check the file and its filter")
    # Equal texts are embedded once: their rows must be equal to the last bit, whatever batch they fall in.
    unique = list(dict.fromkeys(texts))
    path = None if cache is None else cache / f"{key(embedder, unique)}.safetensors"
    if path is not None and path.exists():
        found = load_tensors(path)["embeddings"]
    else:
        found = _embed(embedder, unique, batch_tokens)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(path, {"embeddings": found})
    at = {text: i for i, text in enumerate(unique)}
    return found[[at[text] for text in texts]]


def key(embedder: Embedder, texts: Sequence[str]) -> str:
    """Return the digest of all that decides the embeddings: model and tokenizer, dtype, recipe and texts."""
    dtype = str(next(embedder.model.parameters()).dtype)
    return hashlib.sha256(json.dumps([embedder.digest, dtype, _RECIPE, list(texts)]).encode()).hexdigest()


def _embed(embedder: Embedder, texts: list[str], batch_tokens: int) -> torch.Tensor:
    model = embedder.model
    off = model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext()
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    # Without the language head: logits over the vocabulary are not wanted.
    trunk = getattr(whole, getattr(whole, "base_model_prefix", "") or "", whole)
    ids = [embedder.tokenizer(text)["input_ids"] for text in texts]
    ids = _cut(ids, getattr(whole.config, "max_position_embeddings", None))
    device = next(model.parameters()).device
    out: torch.Tensor | None = None
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        with torch.no_grad(), off:
            for batch in _batches(ids, batch_tokens):
                longest = max(len(ids[i]) for i in batch)
                tokens = torch.zeros((len(batch), longest), dtype=torch.long)
                mask = torch.zeros((len(batch), longest), dtype=torch.long)
                for row, i in enumerate(batch):
                    tokens[row, : len(ids[i])] = torch.tensor(ids[i])
                    mask[row, : len(ids[i])] = 1
                tokens, mask = tokens.to(device), mask.to(device)
                hidden = trunk(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
                mean = (hidden * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True)
                if out is None:
                    out = torch.empty(len(texts), mean.shape[1])
                out[batch] = mean.cpu()
    finally:
        for m in training:
            m.training = True
    assert out is not None
    return out


def _cut(ids: list[list[int]], limit: int | None) -> list[list[int]]:
    """Return token rows no longer than the model reads: a choice of rows may rest on the beginning of a long one."""
    empty = next((i for i, row in enumerate(ids) if not row), None)
    if empty is not None:
        raise DataError(f"text {empty} has no tokens to embed")
    long = sum(limit is not None and len(row) > limit for row in ids)
    if long:
        warnings.warn(
            f"{long} of {len(ids)} texts are longer than the {limit} tokens the embedding model reads: "
            "their beginnings stand for them",
            stacklevel=4,
        )
    return [row[:limit] for row in ids]


def _batches(ids: list[list[int]], batch_tokens: int) -> list[list[int]]:
    """Group texts of like length so that no padded batch exceeds ``batch_tokens`` (a single long text may)."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    batches: list[list[int]] = [[]]
    for i in order:
        if batches[-1] and (len(batches[-1]) + 1) * len(ids[i]) > batch_tokens:
            batches.append([])
        batches[-1].append(i)
    return batches
