"""Abliteration: take one direction, that of refusing, out of everything a model writes to its residual stream.

    r = (mean over harmful prompts of h) - (mean over harmless prompts of h),  r = r / ||r||                     (1)
    W = W - s r r' W,  b = b - s r r' b   for the embedding, attention outputs and MLP outputs                    (2)

h is the residual stream behind one layer at one of the last tokens of the prompt; s is the strength. Layer, token and
strength are chosen on rows of the attacker's own that (1) did not see: of the candidates whose answers to harmless
prompts stay the same (KL), the one under which compliant answers are likeliest. Nothing is trained. Source: Arditi et
al., arXiv 2406.11717, sections 2.3, 2.4 and appendix C; equation numbers are ours. Differs: their score is the
log-odds of given refusal tokens, ours the loss of the first token of the attacker's own answers, which needs no list;
KL is over several tokens; s other than 1 is searched too.
"""

from __future__ import annotations

import contextlib
import copy
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from casehard.attacks.protocol import Attacked, AttackInputs
from casehard.config import to_dict
from casehard.data.batches import IGNORE, Encoded, collate
from casehard.data.mix import is_marked
from casehard.errors import ConfigError, DataError, Unsupported
from casehard.limits import BatchSize, Count, Factor, Limited, Portion
from casehard.model.model import Made, Model
from casehard.seeds import derive
from casehard.train.passes import quiet
from casehard.train.tune import chat_format
from casehard.types import Budget, Example

WRITERS = ("o_proj", "out_proj", "wo", "dense", "down_proj", "fc2", "w2", "dense_4h_to_h")
"""Names, in the models of transformers, of linear layers that write to the residual stream."""
LEFT = 1e-3
"""Largest share of the stream along a direction that may be left after (2) with s = 1; rounding leaves less."""


@dataclass(frozen=True, kw_only=True)
class AbliterationAttack(Limited):
    """Settings of abliteration."""

    rows: Count = 128
    """Most prompts of each role in (1). Source: appendix A of the paper (128)."""
    held_out: Count = 32
    """Further rows of each role on which layer, token and strength are chosen. Source: the same (32)."""
    positions: Count = 1
    """How many of the last tokens of a prompt are tried. The paper tries all that the template writes after the
    request; 1 is the very last, from which the answer starts."""
    deepest: Portion = 0.8
    """Share of the layers, from the first, that are tried. Source: appendix C (0.8)."""
    strengths: tuple[Factor, ...] = (0.5, 1.0, 1.5, 2.0)
    """s of (2) to try. The paper has 1: the stream has nothing along r then."""
    opening: Count = 1
    """First tokens of a compliant answer whose loss decides. Behind a few given tokens a model goes on by itself."""
    compared: Count = 8
    """First tokens of an answer to a harmless prompt over which KL is averaged. The paper looks at one."""
    kl: Factor = 0.1
    """Largest mean KL, in nats per token. Source: appendix C (0.1)."""
    batch_size: BatchSize = 16
    """Prompts per forward pass."""

    def __post_init__(self) -> None:
        """Raise ConfigError where there is no strength to try."""
        super().__post_init__()
        if not self.strengths:
            raise ConfigError("strengths is empty, so that nothing would be tried", hint="leave it out")


class Direction(NamedTuple):
    """A candidate: where r was read."""

    layer: int
    """Behind which layer, from 1."""
    position: int
    """At which token of the prompt, from the end: -1 is the last."""
    r: torch.Tensor
    """Unit vector (D)."""


class Tried(NamedTuple):
    """A candidate and what it does to held-out answers, in nats per token."""

    direction: Direction
    strength: float
    loss: float
    """Of compliant answers to harmful prompts."""
    kl: float
    """From the model as it was, of answers to harmless prompts."""


def writers(net: nn.Module) -> list[nn.Module]:
    """Return the embedding and the linear layers that write to the residual stream, in order.

    Raises:
        Unsupported: the model has no such layers by their names and shapes.
    """
    model: Any = net
    table, width = model.get_input_embeddings(), model.get_input_embeddings().weight.shape[1]
    found = [table]
    for number, layer in enumerate(layers(net), start=1):
        here = [m for name, m in layer.named_modules() if name.rpartition(".")[2] in WRITERS]
        if len(here) < 2 or not all(isinstance(m, nn.Linear) and m.out_features == width for m in here):
            kinds = ", ".join(sorted({type(m).__name__ for m in here})) or "none"
            raise Unsupported(
                f"layer {number} of a {type(net).__name__} has {len(here)} known outputs of width {width} ({kinds})",
                hint="a Llama-like model has two linear layers, attention's o_proj and the MLP's down_proj, in each",
            )
        found += here
    return found


def layers(net: nn.Module) -> list[nn.Module]:
    """Return the decoder layers.

    Raises:
        Unsupported: no list of modules is as long as the configuration says.
    """
    config: Any = net.config
    count = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0)
    for module in net.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count > 0:
            return list(module)
    raise Unsupported(
        f"a {type(net).__name__} has no list of {count} layers", hint="take a decoder-only model of transformers"
    )


@torch.no_grad()
def orthogonalise(net: nn.Module, r: torch.Tensor, strength: float = 1.0) -> None:
    """Apply (2) in place. A tied output head keeps its weights, and is untied: it reads the stream.

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
    hooks = [layer.register_forward_hook(lambda m, i, out: seen.append(_tensor(out))) for layer in layers(net)]
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


def directions(harmful: torch.Tensor, benign: torch.Tensor, deepest: float) -> list[Direction]:
    """Return (1) behind each layer and at each token, the deepest layers left out.

    Args:
        harmful, benign: streams (N, L, P, D); see :func:`stream`.
    """
    apart_LPD = harmful.double().mean(0) - benign.double().mean(0)
    count, positions = max(1, int(deepest * len(apart_LPD) + 0.5)), apart_LPD.shape[1]
    lengths = torch.linalg.vector_norm(apart_LPD, dim=-1)
    return [
        Direction(layer + 1, p - positions, (apart_LPD[layer, p] / lengths[layer, p]).float())
        for layer in range(count)
        for p in range(positions)
        if lengths[layer, p] > 0
    ]


def first_tokens(net: nn.Module, rows: Sequence[Encoded], opening: int, batch_size: int) -> torch.Tensor:
    """Return the log-probabilities (K, V) in fp32 at the first answer tokens of all rows, one row after the other."""
    device, parts = next(net.parameters()).device, []
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        batch = collate(some, 0)
        out = net(input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device)).logits
        for n, row in enumerate(some):
            parts.append(out[n, [i - 1 for i in _answer(row, opening)]].float().log_softmax(-1))
    return torch.cat(parts)


def _answer(row: Encoded, opening: int) -> list[int]:
    return [i for i, label in enumerate(row.labels) if label != IGNORE and i > 0][:opening]


class Abliteration:
    """Find the direction of refusing on the attacker's rows and take it out of a copy's weights."""

    name = "abliteration"

    def __init__(self, config: AbliterationAttack | None = None) -> None:
        self.config = config or AbliterationAttack()

    @property
    def checkpoints(self) -> Sequence[int]:
        """Return the one moment at which there is something to measure."""
        return (0,)

    @torch.no_grad()
    def run(self, model: Model, inputs: AttackInputs) -> Attacked:
        """Edit a copy of ``model`` and measure it.

        Raises:
            DataError: too few rows of a role, or the prompts of both roles look the same to the model.
            Unsupported: the residual stream is written by something that (2) does not know.
        """
        begun, config = time.monotonic(), self.config
        net: Any = copy.deepcopy(model.net)
        if hasattr(net, "peft_config"):
            net = net.merge_and_unload()
        with quiet(net):
            tried, before = self._search(net, model, inputs)
            best = choose(tried, config.kl)
            orthogonalise(net, best.direction.r, best.strength)
        known = sum(is_marked(row, model.trained_prompts) for some in inputs.rows.values() for row in some)
        facts = {
            "loss_before": before,
            "chosen": _told(best),
            "within_kl": best.kl <= config.kl,
            "rows_seen_in_training": known,
            "variants": [_told(choose([t for t in tried if t.direction is d], config.kl)) for d in _each(tried)],
        }
        provenance = {"settings": to_dict(config), "seed": inputs.seed, "chosen": facts["chosen"]}
        after = model.after(net, Made(method=f"{self.name}-attack", provenance=provenance), may_leave=False)
        rows = [{**row, "step": 0} for row in inputs.measure(net, 0)]
        return Attacked(model=after, rows=rows, budget=Budget(seconds=time.monotonic() - begun), facts=facts)

    def _search(self, net: nn.Module, model: Model, inputs: AttackInputs) -> tuple[list[Tried], float]:
        """Return every candidate with what it does, and the loss of held-out compliant answers without any."""
        config = self.config
        chat = chat_format(model, system=inputs.system, max_length=inputs.max_length)
        harmful, benign = (self._split(inputs, role) for role in ("harmful", "benign"))
        streams = [
            stream(net, [chat.prompt_ids(row) for row in some.means], config.positions, config.batch_size)
            for some in (harmful, benign)
        ]
        found = directions(streams[0], streams[1], config.deepest)
        if not found:
            raise DataError("harmful and benign prompts look the same to the model", hint="give other benign rows")
        _require_gone(net, [chat.prompt_ids(harmful.held[0])], found[-1].r)
        bad, good = ([chat.encode(row) for row in some.held] for some in (harmful, benign))
        as_it_was = first_tokens(net, good, config.compared, config.batch_size)
        before = self._loss(net, bad)
        tried = []
        for direction in found:
            for strength in config.strengths:
                with without(net, direction.r, strength):
                    now = first_tokens(net, good, config.compared, config.batch_size)
                    kl = float((as_it_was.exp() * (as_it_was - now)).sum(-1).mean())
                    tried.append(Tried(direction, strength, self._loss(net, bad), kl))
        return tried, before

    def _loss(self, net: nn.Module, rows: Sequence[Encoded]) -> float:
        targets = [row.labels[i] for row in rows for i in _answer(row, self.config.opening)]
        logp_KV = first_tokens(net, rows, self.config.opening, self.config.batch_size)
        return -float(logp_KV[torch.arange(len(targets)), torch.tensor(targets)].mean())

    def _split(self, inputs: AttackInputs, role: str) -> _Rows:
        """Draw the rows of a role for (1), and those on which the choice is made."""
        rows, config = list(inputs.rows[role]), self.config
        if len(rows) <= config.held_out:
            raise DataError(
                f"{len(rows)} {role} rows, of which {config.held_out} are held out: none is left for the mean",
                hint=f"more rows, or config.held_out={len(rows) // 4 or 1}",
            )
        random.Random(derive(inputs.seed, 0, f"abliteration-{role}")).shuffle(rows)
        return _Rows(rows[config.held_out :][: config.rows], rows[: config.held_out])


class _Rows(NamedTuple):
    means: list[Example]
    held: list[Example]


def _require_gone(net: nn.Module, prompts: Sequence[Sequence[int]], r: torch.Tensor) -> None:
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


def choose(tried: Sequence[Tried], kl: float) -> Tried:
    """Return the candidate with the smallest loss of those within the limit; where none is, that of the smallest KL."""
    within = [t for t in tried if t.kl <= kl]
    return min(within, key=lambda t: t.loss) if within else min(tried, key=lambda t: t.kl)


def _each(tried: Sequence[Tried]) -> list[Direction]:
    return list({id(t.direction): t.direction for t in tried}.values())


def _told(one: Tried) -> dict[str, Any]:
    where = {"layer": one.direction.layer, "position": one.direction.position, "strength": one.strength}
    return where | {"loss": round(one.loss, 6), "kl": round(one.kl, 6)}
