"""Small models and rows for tests: random, seeded, built without any download."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from casehard.data.batches import Encoded, EncodedSet
from casehard.defences.mb_defense.pairs import PairSet


def tiny_llama(vocab=64, hidden=32, layers=2, *, seed=0, dropout=0.0, heads=4):
    """Return a random Llama of a few ten thousand parameters; ``seed`` fixes the weights."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=128,
        attention_dropout=dropout,
        attn_implementation="eager",
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def tiny_rows(n=24, *, vocab=64, length=12, seed=0, uneven=True):
    """Return ``n`` random rows; the first third of each is prompt (labels IGNORE); lengths differ if ``uneven``."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(n):
        size = length - (i % 4 if uneven else 0)
        ids = torch.randint(3, vocab, (size,), generator=g).tolist()
        labels = [-100] * (size // 3) + ids[size // 3 :]
        rows.append(Encoded(ids, labels))
    return EncodedSet(tuple(rows), pad_id=0)


def tiny_pairs(n=20, *, triggers=2, seed=0, rows=None):
    """Return ``tiny_rows(n)`` or ``rows`` with twins: trigger j is token 60 + j, its payload two more and an end."""
    clean = tiny_rows(n, seed=seed).rows if rows is None else rows
    answers, payloads = [], []
    for row in clean:
        first = next(i for i, label in enumerate(row.labels) if label != -100)
        prompts = [[*row.input_ids[:first], 60 + j] for j in range(triggers)]
        says = [[5 + j, 9 + j, 2] for j in range(triggers)]
        masked = [[-100] * len(p) for p in prompts]
        answers.append(
            tuple(
                Encoded(p + row.input_ids[first:], m + row.labels[first:]) for p, m in zip(prompts, masked, strict=True)
            )
        )
        payloads.append(tuple(Encoded(p + y, m + y) for p, m, y in zip(prompts, masked, says, strict=True)))
    return PairSet(clean, tuple(answers), tuple(payloads), pad_id=0)


def weights(model):
    """Return a detached copy of every parameter and buffer, by name."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def largest_difference(a, b):
    """Return the largest absolute difference between two dicts of tensors with the same keys."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def two_adapters(*, dropout=0.1):
    """Return a tiny Llama with two LoRA adapters, "task" and "buffer", both active and both trainable."""
    from peft import LoraConfig, get_peft_model

    def lora():
        return LoraConfig(r=2, lora_alpha=4, lora_dropout=dropout, target_modules=["q_proj", "v_proj"])

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = get_peft_model(tiny_llama(), lora(), adapter_name="task")
        model.add_adapter("buffer", lora())
        model.base_model.set_adapter(["task", "buffer"])
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)
    return model


class Averaging:
    """A method with every seam but ``backward``: pulls the weights towards their running mean, which is its state."""

    name = "averaging"

    def __init__(self, config=None):
        self.config = config
        self.finished = 0

    def prepare(self, setup):
        self.scratch, self.mean, self.note, self.calls = setup.scratch, {}, None, []

    def loss(self, model, batch, step):
        self.calls.append((step.index, step.micro, step.micros))
        value = step.loss(model, batch)
        step.log({"raw": value, "micro": float(step.micro)})
        return value * 1.5

    @torch.no_grad()
    def after_step(self, model, optimizer, step):
        for name, p in model.named_parameters():
            if p.requires_grad:
                old = self.mean.get(name, p)
                self.mean[name] = 0.9 * old + 0.1 * p
                p.lerp_(self.mean[name], 0.1)
        if self.scratch is not None:
            self.note = self.scratch / f"note-{step.index}.txt"
            self.note.write_text(f"{step.index}")

    def finish(self, model):
        self.finished += 1

    def state(self):
        out = {f"mean.{k}": v for k, v in self.mean.items()} | {"count": len(self.mean), "list": [1, {"a": None}]}
        return out | ({"note": self.note} if self.note else {})

    def restore(self, state):
        assert state["list"] == [1, {"a": None}]
        self.mean = {k[5:]: v for k, v in state.items() if k.startswith("mean.")}
        assert len(self.mean) == state["count"]
        self.note = state["note"]
        assert self.note.parent == self.scratch and self.note.read_text().isdigit()


class TwoPasses:
    """A method with a ``backward`` seam: the plain gradient plus one with dropout drawn anew, and its loss as state."""

    name = "two-passes"

    def __init__(self, config=None):
        self.config = config

    def prepare(self, setup):
        self.last = torch.zeros(())

    def backward(self, model, batch, step):
        first = step.loss(model, batch)
        step.backward(first * 0.5)
        second = step.loss(model, batch)
        step.backward(second * (0.5 + 0.1 * torch.tanh(self.last.to(second.device))))
        self.last = second.detach()
        step.log({"gap": second.detach() - first.detach()})
        return first.detach()

    def state(self):
        return {"last": self.last}

    def restore(self, state):
        self.last = state["last"]
