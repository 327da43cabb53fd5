"""Patcher's mathematics on a model sharded by FSDP2 (``torch.distributed.fsdp.fully_shard``).

Symbols as in :mod:`casehard.maths.bilevel`: theta the weights, delta the attack vector, alpha the share of the attacked
loss; N the number of ranks a parameter is split over, *shard* a rank's own rows of it (without padding, maybe none).

FSDP2 ignores parameters substituted by ``torch.func.functional_call``, so no view can be composed in the graph. Here
the shards themselves are written and put back from a copy, never by subtraction, so they come back bit for bit. What
FSDP2 gathered before a switch is stale after it: all FSDP modules, the root too, are resharded on both sides of each.

A switch must not happen between a forward pass and its backward pass: the backward gathers the weights anew and would
see the other ones. Finish the passes over theta, switch, run forward *and* backward, switch back.

Memory in bytes a parameter and rank, fp32 master weights, N shards; activations come on top:

    ===========================  ======  ======  =======  ==========  =======  =======
    while                        weight  grad    moments  kept copy   delta    sum
    ===========================  ======  ======  =======  ==========  =======  =======
    plain fine-tuning            4/N     4/N     8/N      -           -        16/N
    pass over theta              4/N     4/N     8/N      -           2/N      18/N
    pass over theta + delta      4/N     4/N     8/N      4/N         2/N      22/N
    simulated attack (AdamW)     4/N     4/N     8/N+8/N  4/N         2/N      30/N
    ===========================  ======  ======  =======  ==========  =======  =======

with delta in bfloat16 (fp32: 4/N). The attack's second 8/N are its own moments; when they are gone, 4/N of attacked
weights take their place. The caller's gradients are put aside during the attack, not shared: another 4/N. To this
comes one gathered layer at a time; the root, or everything with ``reshard_after_forward=False``, for a whole pass.
Differs from the published code, which edits FSDP1's gathered parameters in place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from casehard.distributed.ranks import RankInfo, rows_of, sharded
from casehard.errors import Diverged, Unsupported
from casehard.maths.bilevel import OPTIMISERS, Attacker, AttackRun, Batch, Params, forked_rng, parameters
from casehard.maths.tensors import same_keys
from casehard.seeds import derive

R = TypeVar("R")


def _fsdp_modules(model: nn.Module) -> list[Any]:
    if not torch.distributed.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule  # pulls in the whole of DTensor

    return [m for m in model.modules() if isinstance(m, FSDPModule)]


def is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP2 shards this model or a part of it."""
    return any(map(sharded, model.parameters())) or bool(_fsdp_modules(model))


def reshard(model: nn.Module) -> None:
    """Let go of everything FSDP2 has gathered, the root's parameters included; without FSDP2 do nothing."""
    for module in _fsdp_modules(model):
        module.reshard()


def _shards(model: nn.Module) -> dict[str, Any]:
    """Return the sharded parameters (DTensors) by name, after letting go of what is gathered."""
    reshard(model)
    found = parameters(model)
    _check_tied(model)
    meshes = set()
    for name, p in found.items():
        if not sharded(p):
            raise Unsupported(
                f"parameter {name!r} is not sharded", hint="fully_shard the whole model, ignoring nothing"
            )
        meshes.add(p.device_mesh)  # type: ignore[attr-defined]
        kinds = [x.is_shard() for x in p.placements]  # type: ignore[attr-defined]
        if kinds not in ([True], [False, True]):
            raise Unsupported(
                f"parameter {name!r} is laid out as {p.placements}",  # type: ignore[attr-defined]
                hint="use FSDP2 alone: a mesh (shard) or (replicate, shard), no tensor parallelism",
            )
    if len(meshes) != 1:
        raise Unsupported(f"the parameters live on {len(meshes)} device meshes", hint="shard the model over one mesh")
    return found


def _check_tied(model: nn.Module) -> None:
    """Refuse a tied weight in two groups: each pads it into a copy of its own, and only one is trained."""
    seen = set()
    for p in (p for group in _groups(model) for p in group.fsdp_params):
        weight = getattr(p._module_info.module, p._module_info.param_name)
        if id(weight) in seen and weight.shape[0] % weight.device_mesh.shape[-1]:
            raise Unsupported(
                f"a tied weight of {weight.shape[0]} rows was sharded twice, before it was tied",
                hint="load the model whole, then fully_shard it (transformers' DistributedConfig ties too late)",
            )
        seen.add(id(weight))


def local_weights(model: nn.Module) -> Params:
    """Return this process's part of the fp32 weights by name, tied ones once: its shards, or all of a whole model.

    Raises:
        Unsupported: see :func:`local_parts` and :func:`casehard.maths.bilevel.parameters`.
    """
    return local_parts(model) if is_sharded(model) else parameters(model)


def rank_info(model: nn.Module) -> RankInfo:
    """Return this rank's place among those that shard the model; the only one when nobody does."""
    return RankInfo.of_shards(_shards(model)) if is_sharded(model) else RankInfo()


def _local(tensor: Any) -> torch.Tensor:
    # The detached one shares storage; to_local of the parameter itself would record a graph.
    return tensor.detach().to_local()


def local_parts(model: nn.Module) -> Params:
    """Return this rank's shard of every parameter by name, tied ones once, whatever FSDP2 has gathered.

    The tensors are the weights themselves, not copies, without padding and empty where a rank holds no row.

    Raises:
        Unsupported: a parameter is not sharded by FSDP2 alone, or is frozen or stored in half precision.
    """
    return {name: _local(p) for name, p in _shards(model).items()}


def _groups(model: nn.Module) -> list[Any]:
    """Return FSDP2's groups of parameters; their state has no public door."""
    return [group for m in _fsdp_modules(model) for group in m._get_fsdp_state()._fsdp_param_groups]


def _waiting(model: nn.Module) -> list[tuple[Any, str]]:
    """Return where gradients lie that no rank has reduced yet, as (object, attribute)."""
    places = []
    for group in _groups(model):
        places.append((group, "_partial_reduce_output"))
        for p in group.fsdp_params:
            places += [(p, "unsharded_accumulated_grad"), (getattr(p, "_unsharded_param", None), "grad")]
    return [(owner, name) for owner, name in places if getattr(owner, name, None) is not None]


def _settle(model: nn.Module) -> None:
    """Bring FSDP2 back to rest after an exception.

    A gather it had begun would hand out old weights to the next forward pass, and half a backward pass leaves gradients
    that the next one would add to.
    """
    for module in _fsdp_modules(model):
        # A module is a root or not from the first forward pass on, and only roots may be reset.
        if module._get_fsdp_state()._is_root and callable(getattr(module, "reset_iter_state", None)):
            module.reset_iter_state()
    for owner, name in _waiting(model):
        setattr(owner, name, None)


@contextlib.contextmanager
def _kept(model: nn.Module, shards: Mapping[str, Any]) -> Iterator[None]:
    """Run a block that may overwrite the shards; afterwards they have the same bits as before."""
    copies = {name: _local(p).clone() for name, p in shards.items()}
    try:
        yield
    except BaseException:
        _settle(model)
        raise
    finally:
        reshard(model)
        with torch.no_grad():
            for name, p in shards.items():
                _local(p).copy_(copies.pop(name))


@contextlib.contextmanager
def _written(model: nn.Module, values: Mapping[str, torch.Tensor], what: str, *, add: bool) -> Iterator[None]:
    shards = _shards(model)
    if odd := same_keys(values, shards):
        raise Unsupported(f"{what} and model disagree on {len(odd)} parameters, first {odd[0]!r}")
    for name, p in shards.items():
        if values[name].shape != (shape := _local(p).shape):
            raise Unsupported(
                f"{what} of {name!r} has shape {tuple(values[name].shape)}, this rank's shard {tuple(shape)}",
                hint="pass this rank's rows, as local_parts has them",
            )
    with _kept(model, shards):
        with torch.no_grad():
            for name, p in shards.items():
                value = values[name].to(p.device)
                _ = _local(p).add_(value) if add else _local(p).copy_(value)
        yield


def weights_set_to(model: nn.Module, values: Mapping[str, torch.Tensor]) -> contextlib.AbstractContextManager[None]:
    """Run a block with ``values`` in place of the weights, for instance the starting weights of a KL term.

    As :func:`weights_plus` in all else; ``values`` are this rank's shard of every parameter (:func:`local_parts`).
    """
    return _written(model, values, "the set of weights", add=False)


def with_weights_set_to(model: nn.Module, values: Mapping[str, torch.Tensor], function: Callable[[nn.Module], R]) -> R:
    """Run ``function(model)`` under :func:`weights_set_to`, as :func:`casehard.maths.bilevel.with_view` does."""
    with weights_set_to(model, values):
        return function(model)


def weights_plus(model: nn.Module, delta: Mapping[str, torch.Tensor]) -> contextlib.AbstractContextManager[None]:
    """Run a block with theta + delta in place of theta (eq. 2 of docs/methods/patcher.md).

    The sum is composed in the master's precision. Forward and backward must both run inside; gradients accumulate into
    the same sharded ``.grad`` as outside. Afterwards, also when the block raises, every shard has its old bits and
    nothing gathered is left. When it raises, gradients not yet reduced are dropped: begin the optimiser step anew.

    Args:
        model: a sharded model, no forward pass of it waiting for its backward pass.
        delta: this rank's shard of the attack vector, by name, any float dtype; a tied parameter is in it once.

    Raises:
        Unsupported: names or shapes differ from the model's, or :func:`local_parts` refuses it.
    """
    return _written(model, delta, "the attack vector", add=True)


@contextlib.contextmanager
def _own_gradients(model: nn.Module, shards: Mapping[str, Any]) -> Iterator[None]:
    """Put the caller's gradients aside and reduce those of every backward pass, whatever the caller had asked for."""
    if waiting := _waiting(model):
        raise Unsupported(
            f"gradients of {len(waiting)} parameters, of earlier micro-batches, wait to be reduced",
            hint="simulate the attack before the first micro-batch of an optimiser step",
        )
    flags = [(g, g.reduce_grads, g.all_reduce_grads) for g in _groups(model)]
    gradients = {name: p.grad for name, p in shards.items()}
    try:
        for group, _, _ in flags:
            group.reduce_grads = group.all_reduce_grads = True
        for p in shards.values():
            p.grad = None
        yield
    finally:
        for group, reduce, all_reduce in flags:
            group.reduce_grads, group.all_reduce_grads = reduce, all_reduce
        for name, p in shards.items():
            p.grad = gradients[name]


def _clip(leaves: list[torch.Tensor], group: Any, limit: float) -> torch.Tensor:
    """Scale the gradients of all shards so that their one global norm is at most ``limit``; return the norm before."""
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    square = torch.zeros((), dtype=torch.float64, device=leaves[0].device)
    for g in gradients:
        square += torch.linalg.vector_norm(g).double().square()
    torch.distributed.all_reduce(square, group=group)
    norm = square.sqrt()
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_ does
    for g in gradients:
        g.mul_(scale.to(g.dtype))
    return norm


def _attack(
    model: nn.Module,
    shards: Mapping[str, Any],
    attacker: Attacker,
    steps: int,
    batch_at: Callable[[int], Batch],
    progress: Callable[[int], None],
) -> tuple[list[float], int]:
    """Take the attack's steps on the shards in place; return losses and tokens."""
    own = RankInfo.of_shards(shards)
    # Plain tensors on the shards' storage: the update is by element, and needs nothing of DTensor.
    leaves = [_local(p) for p in shards.values()]
    options: dict[str, Any] = {"lr": attacker.numbers()[1], "weight_decay": attacker.weight_decay}
    optimiser = OPTIMISERS[attacker.optimizer](leaves, fused=True, **options)
    losses, norms, tokens = [], [], 0
    for i in range(steps):
        batch = batch_at(i)
        tokens += int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum())
        rows, weight = rows_of(batch, own)
        loss = model(**{key: value.to(leaves[0].device) for key, value in rows.items()}).loss * weight
        (loss * own.world_size).backward()  # FSDP2 takes the mean over ranks
        losses.append(loss.detach())
        for leaf, p in zip(leaves, shards.values(), strict=True):
            leaf.grad, p.grad = (None if p.grad is None else _local(p.grad)), None
        limit = attacker.clip if attacker.clip > 0 else float("inf")
        norms.append(_clip(leaves, own.groups[-1], limit))
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        reshard(model)
        progress(i)
    if not losses:
        return [], tokens
    whole = own.total(torch.stack(losses).double())
    if not bool(torch.isfinite(torch.stack([whole, torch.stack(norms)])).all()):
        raise Diverged(
            f"the simulated attack diverged: losses {[round(float(x), 3) for x in whole[-3:]]}",
            hint=f"lower attacker.lr (now {attacker.lr}) or attacker.steps",
        )
    return whole.tolist(), tokens


def simulate_attack_sharded(
    model: nn.Module,
    batch_at: Callable[[int], Batch],
    attacker: Attacker,
    *,
    seed: int,
    steps: int | None = None,
    progress: Callable[[int], None] = lambda i: None,
) -> AttackRun:
    """Fine-tune the sharded model itself for k1 steps from theta, keep what came out and put theta back.

    The same attack as :func:`casehard.maths.bilevel.simulate_attack` on one process, shared out: every rank is given
    the whole batch and takes rows rank, rank + N, ...; its loss is weighted by its share of the trained tokens, so
    that the mean over ranks is the token mean of the batch. A rank without rows runs along at weight zero.

    Args:
        model: a sharded model at theta_source, no forward pass waiting; it runs in the mode and autocast it is in.
        batch_at: attack batch number i, the same on every rank, tokens and labels, shapes (B, T).
        attacker: how to attack; full-parameter only.
        seed: seeds dropout, another stream on every rank; the global random stream is untouched.
        steps: overrides ``attacker.steps``; ``progress`` is called with the number of each finished step.

    Returns:
        This rank's shards of the attacked weights; losses and tokens of the whole batches, alike on every rank.

    Raises:
        Unsupported: a LoRA attacker, gradients that wait to be reduced, or a model :func:`local_parts` refuses.
        Diverged: a loss or gradient norm of the attack is not finite.
    """
    if attacker.lora_rank > 0:
        raise Unsupported(f"lora_rank {attacker.lora_rank} on a sharded model", hint="lora_rank: 0, or one process")
    shards = _shards(model)
    number = RankInfo.of_shards(shards).rank
    own = seed if number == 0 else derive(seed, number, "attack-rank")
    k1 = attacker.numbers()[0] if steps is None else steps
    with _own_gradients(model, shards), _kept(model, shards):
        with forked_rng(own, next(iter(shards.values())).device):
            losses, tokens = _attack(model, shards, attacker, k1, batch_at, progress)
        weights = {name: _local(p).clone() for name, p in shards.items()}
    return AttackRun(weights, losses, tokens)
