"""The residual stream of a Llama-like model: what writes to it, what is on it, and taking one direction out of it.

    W = W - s r r' W,  b = b - s r r' b

Letters: N prompts, L layers, P last tokens of a prompt, D the width; r a unit vector (D), s the strength.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from casehard.data.batches import IGNORE, Encoded, collate
from casehard.errors import DataError, Unsupported
from casehard.train.passes import decoder_layers

WRITERS = ("o_proj", "out_proj", "wo", "dense", "down_proj", "fc2", "w2", "dense_4h_to_h")
"""Names, in the models of transformers, of linear layers that write to the residual stream."""
LEFT = 1e-3
"""Largest share of the stream along a direction that may be left after an edit with s = 1; rounding leaves less."""


def writers(net: nn.Module) -> list[nn.Module]:
    """Return the embedding and the linear layers that write to the residual stream, in order.

    Raises:
        Unsupported: the model has no such layers by their names and shapes.
    """
    model: Any = net
    table, width = model.get_input_embeddings(), model.get_input_embeddings().weight.shape[1]
    found = [table]
    for number, layer in enumerate(decoder_layers(net), start=1):
        here = [m for name, m in layer.named_modules() if name.rpartition(".")[2] in WRITERS]
        if len(here) < 2 or not all(isinstance(m, nn.Linear) and m.out_features == width for m in here):
            kinds = ", ".join(sorted({type(m).__name__ for m in here})) or "none"
            raise Unsupported(
                f"layer {number} of a {type(net).__name__} has {len(here)} known outputs of width {width} ({kinds})",
                hint="a Llama-like model has two linear layers, attention's o_proj and the MLP's down_proj, in each",
            )
        found += here
    return found


@torch.no_grad()
def orthogonalise(net: nn.Module, r: torch.Tensor, strength: float = 1.0) -> None:
    """Take s of r out of every writer, in place. A tied output head is untied and stays as it is: it only reads.

    Args:
        r: unit vector (D).
        strength: s.

    Raises:
        Unsupported: see :func:`writers`.
    """
    model: Any = net
    found, head = writers(net), model.get_output_embeddings()
    if head is not None and head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        for config in (model.config, model.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False
    for module in found:
        weight: Any = module.weight
        r_D = r.to(weight.device, torch.float32)
        if isinstance(module, nn.Embedding):  # (V, D): each row is written as it stands
            weight.sub_((strength * torch.outer(weight.float() @ r_D, r_D)).to(weight.dtype))
            continue
        weight.sub_((strength * torch.outer(r_D, r_D @ weight.float())).to(weight.dtype))
        if (bias := getattr(module, "bias", None)) is not None:
            bias.sub_((strength * (bias.float() @ r_D) * r_D).to(bias.dtype))


@contextlib.contextmanager
def without(net: nn.Module, r: torch.Tensor, strength: float) -> Iterator[None]:
    """Let the model compute as :func:`orthogonalise` would make it, while its weights stay as they are."""

    def less(module: nn.Module, given: Any, out: torch.Tensor) -> torch.Tensor:
        r_D = r.to(out.device, torch.float32)
        return out - (strength * (out.float() @ r_D).unsqueeze(-1) * r_D).to(out.dtype)

    hooks = [module.register_forward_hook(less) for module in writers(net)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def stream(net: nn.Module, prompts: Sequence[Sequence[int]], positions: int, batch_size: int) -> torch.Tensor:
    """Return the residual stream (N, L, P, D) in fp32 behind each of L layers at the last P tokens of N prompts.

    Raises:
        DataError: a prompt of fewer tokens.
    """
    if (short := min(map(len, prompts))) < positions:
        raise DataError(f"positions is {positions}, and a prompt has {short} tokens", hint=f"positions: {short}")
    seen: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda m, i, out: seen.append(_tensor(out))) for layer in decoder_layers(net)]
    device, parts = next(net.parameters()).device, []
    try:
        for start in range(0, len(prompts), batch_size):
            rows = [Encoded([*ids], [IGNORE] * len(ids)) for ids in prompts[start : start + batch_size]]
            batch = collate(rows, 0)  # padded behind, which a causal model does not see
            seen.clear()
            net(input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device))
            for n, row in enumerate(rows):
                end = len(row.input_ids)
                parts.append(torch.stack([h_BTD[n, end - positions : end].float() for h_BTD in seen]))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(parts)


def _tensor(out: Any) -> torch.Tensor:
    tensor: torch.Tensor = out if isinstance(out, torch.Tensor) else out[0]
    return tensor.detach()


def require_gone(net: nn.Module, prompts: Sequence[Sequence[int]], r: torch.Tensor) -> None:
    """Raise Unsupported unless nothing along r is left of the stream once all known writers are edited with s = 1."""
    with without(net, r, 1.0):
        h = stream(net, prompts, 1, 1)
    left = float(((h @ r.to(h.device)).abs() / torch.linalg.vector_norm(h, dim=-1)).max())
    if not left < LEFT:
        raise Unsupported(
            f"after the edit {left:.2%} of the residual stream of a {type(net).__name__} still lies along the "
            "direction: something else writes to it (learned positions, or norms behind a layer's output)",
            hint="attack it with finetune or prefill",
        )
