"""Floating-point operations of training: 6 N a token where all is trained, less where most of it is frozen."""

from __future__ import annotations

import torch

from casehard.model.adapters import add_lora
from casehard.train.cost import training_flops
from fakes import tiny_llama


def matrices(net: torch.nn.Module) -> int:
    """Count the weights of all linear layers, the output head among them."""
    return sum(m.weight.numel() for m in net.modules() if isinstance(m, torch.nn.Linear))


def test_a_full_training_takes_six_operations_a_weight_and_token() -> None:
    net = tiny_llama()
    assert training_flops(net, 10) == 10 * 6 * matrices(net)


def test_an_adapter_saves_the_gradients_of_what_is_frozen() -> None:
    whole = matrices(tiny_llama())
    wrapped = add_lora(tiny_llama(), 4, 8.0)
    adapter = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert adapter > 0 and training_flops(wrapped, 1) == 4 * (whole + adapter) + 2 * adapter
