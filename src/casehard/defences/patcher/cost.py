"""What Patcher's schedules cost: time in passes, age in steps, memory in bytes a parameter. Arithmetic, no torch.

U is one forward-backward pass over one batch; k1 attack steps, k2 outer steps a round, n attackers.

| schedule | time of a round | age of the vector, from - to |
|---|---|---|
| sequential | (2 k2 + n k1) U | 0 - (k2 - 1) |
| lockstep | (2 k2 + k1) U | 0 - (k2 - 1) |
| async | max(2 k2, k1) U at an attack a round; an attack takes k1 / 2 outer steps | k1 / 2 - k1 |
| reference_parallel | the same | (k2 - 1) - (2 k2 - 2) while k1 <= 2 k2 |

The ideal speed-up of one attacker on a device of its own is 1 + k1 / (2 k2) up to k1 = 2 k2, where it is 2. An async
attacker takes the freshest weights again as soon as it is done, so its vectors are younger than the published timing's.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """One schedule's cost for one choice of k1 and k2."""

    schedule: str
    devices: int
    """Devices it wants: one for the defender, one for each attacker in a process of its own."""
    round_passes: float
    """Time of a round, in passes of one device."""
    speedup: float
    """Time of a sequential round over this one's."""
    age: float
    """Mean age of the vector in use, outer steps."""
    defender: float
    """Peak bytes a parameter on the defender's device, activations apart."""
    attacker: float
    """The same on an attacker's device; 0 without."""
    host: float
    """Most bytes a parameter in the defender's host memory (on a CPU they add to ``defender``): a copy of the source
    and an arriving vector for each attacker."""


WEIGHTS, GRADIENT, MOMENTS, VECTOR = 4.0, 4.0, 8.0, 2.0
"""fp32 master weights and gradients, two AdamW moments, a bf16 attack vector."""
SHARDED = 30.0
"""Peak over all ranks of a sharded defender that attacks itself: see ``distributed.fsdp``."""


def costs(k1: int, k2: int, *, attackers: int = 1, bf16: bool = True) -> list[Cost]:
    """Return the cost of every schedule.

    Args:
        attackers: n; each has a device of its own, apart from the defender's.
        bf16: under autocast (on GPUs) the attacked weights are bf16 where they may be; plain training has that too.
    """
    n, view = attackers, 2.0 if bf16 else 4.0
    plain = WEIGHTS + GRADIENT + MOMENTS
    patched = plain + n * VECTOR + view
    # The defender's gradients are not there yet; the attack has a copy, gradients and moments of its own.
    own = max(patched, WEIGHTS + MOMENTS + n * VECTOR + WEIGHTS + GRADIENT + MOMENTS)
    apart = WEIGHTS + WEIGHTS + GRADIENT + MOMENTS
    shared = WEIGHTS + n * VECTOR  # attacks of one round start from one copy
    young, alone, free = (k2 - 1) / 2, 2.0 * k2 + n * k1, max(2.0 * k2, k1)
    waiting = 2.0 * k2 + k1
    return [
        Cost("sequential", 1, alone, 1.0, young, own, 0.0, 0.0),
        Cost("lockstep", 1 + n, waiting, alone / waiting, young, patched, apart, shared),
        # At equal numbers of attacks a round; the defender itself never waits.
        Cost("async", 1 + n, free, alone / free, 0.75 * k1, patched, apart, n * (WEIGHTS + VECTOR)),
        Cost("reference_parallel", 1 + n, free, alone / free, 3 * young, patched, apart, WEIGHTS + shared),
    ]


def advice(k1: int, k2: int, *, devices: int, device_bytes: float, parameters: float, bf16: bool = True) -> str:
    """Return which schedule fits the hardware, in one sentence.

    Args:
        device_bytes: memory of one device (of the machine, for CPUs).
        parameters: of the model; 0 when unknown.
        bf16: as for :func:`costs`; CPUs compute in fp32.
    """
    sequential, _, free, _ = costs(k1, k2, bf16=bf16)
    least = free.defender + (0.0 if bf16 else free.host)  # without a GPU the host's memory is the device's
    if parameters and parameters * least > device_bytes:
        need = parameters * SHARDED / device_bytes
        return f"shard it over at least {int(need) + 1} devices (FSDP2), schedule sequential: one device is too small"
    if devices < 2:
        if parameters and parameters * sequential.defender > device_bytes:
            return "one device has room for the defender but for no attack besides: a second device, and schedule=async"
        return "schedule=sequential: there is one device"
    gain = f"about {free.speedup:.2f} times as fast as sequential, mean age {free.age:.0f}"
    more = f"; up to {devices - 1} attackers make a pool, at the same speed" if devices > 2 else ""
    helped = f"schedule=async with --attackers 1, {gain}{more}"
    if not bf16:
        return helped  # the threads of one process share a batch already
    return (
        f"where a batch can be split, sequential on all devices (torchrun --nproc-per-node {devices}), up to {devices} "
        f"times as fast as on one; where it cannot, {helped}"
    )
