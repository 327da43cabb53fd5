"""Messages of tensors between two processes: a header, the tensors one by one, and their checksums.

A channel is a process group of its own with two members, so that a peer that dies breaks this channel and nothing else.
Rendezvous goes through any ``torch.distributed`` store; data goes rank to rank over gloo, from host memory to host
memory. Nothing is written to disk and nothing is unpickled; peers are trusted, the network between them too.
"""

from __future__ import annotations

import datetime
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from casehard.distributed.ranks import why
from casehard.errors import Corrupt, Lost

# Its names for groups made by hand are real, but torch does not list them for type checkers.
dist: Any = torch.distributed

PATIENCE = datetime.timedelta(days=7)
"""How long a receiver waits: an attacker may be idle for a whole round. A peer whose process dies is noticed at once,
one whose machine vanishes is not: see ``remote.PATIENCE``."""
DTYPES = ("float64", "float32", "bfloat16", "float16", "int64", "int32", "uint8")
LIMIT = 1 << 24
"""Largest header in bytes; more is no header of ours."""


@dataclass(frozen=True)
class Message:
    """What arrived."""

    header: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    """By name, in the order they were sent, in host memory."""
    size: int
    """Payload bytes."""


def checksum(tensor: torch.Tensor) -> int:
    """Return the CRC-32 of a tensor's bytes, whatever device it is on."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(data)  # type: ignore[arg-type]


class Channel:
    """One end of a channel; both ends construct it with the same store and name, one of them with ``first``.

    Args:
        store: rendezvous of both ends.
        name: of this channel, unique in the store.
        first: which of the two this end is.
        loopback: both ends are on this machine, so no other machine may connect.

    Raises:
        Lost: by every method, when the other end is gone.
    """

    def __init__(self, store: Any, name: str, *, first: bool, loopback: bool = False) -> None:
        self._peer = 1 if first else 0
        prefixed = dist.PrefixStore(f"casehard/{name}", store)
        with _lost_when_broken("could not be reached"):
            self._group = group(prefixed, 0 if first else 1, 2, loopback=loopback)
        self._sent = self._seen = -1

    def send(
        self, header: Mapping[str, Any], tensors: Iterable[tuple[str, torch.Tensor]] = (), *, count: int = 0
    ) -> int:
        """Send a message; tensors are taken from the iterable one at a time, so they may be made on the way.

        Args:
            header: JSON values.
            count: number of tensors to come.

        Returns:
            Payload bytes.
        """
        self._sent += 1
        with _lost_when_broken("is gone"):
            self._send_json({"header": dict(header), "count": count, "message": self._sent})
            sums, size = [], 0
            for name, tensor in tensors:
                data = tensor.detach().cpu().contiguous()
                self._send_json(
                    {"name": name, "dtype": str(data.dtype).removeprefix("torch."), "shape": list(data.shape)}
                )
                if data.numel():
                    self._group.send([data], self._peer, 0).wait()
                sums.append(checksum(data))
                size += data.numel() * data.element_size()
            assert len(sums) == count, (len(sums), count)
            self._send_json({"sums": sums})
        return size

    def receive(self) -> Message:
        """Wait for the next message and verify it.

        Raises:
            Corrupt: a checksum, or the running number of the message, is not what it should be.
        """
        with _lost_when_broken("is gone"):
            top = self._receive_json()
            tensors, size = {}, 0
            for _ in range(int(top["count"])):
                meta = self._receive_json()
                if meta["dtype"] not in DTYPES:
                    raise Corrupt(f"tensor {meta['name']!r} of dtype {meta['dtype']!r}: expected one of {DTYPES}")
                data = torch.empty(meta["shape"], dtype=getattr(torch, meta["dtype"]))
                if data.numel():
                    self._group.recv([data], self._peer, 0).wait()
                tensors[str(meta["name"])] = data
                size += data.numel() * data.element_size()
            sums = self._receive_json()["sums"]
        for (name, data), expected in zip(tensors.items(), sums, strict=True):
            if (actual := checksum(data)) != expected:
                raise Corrupt(f"tensor {name!r} changed on its way: expected crc32 {expected:08x}, actual {actual:08x}")
        if top["message"] != self._seen + 1:
            raise Corrupt(f"message {top['message']} came where {self._seen + 1} was expected")
        self._seen += 1
        return Message(dict(top["header"]), tensors, size)

    def close(self) -> None:
        """Break the connection; the other end's next call raises."""
        # gloo's abort and shutdown leave connections open; the group's end closes them.
        self._group = None

    def _send_json(self, value: Any) -> None:
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = torch.tensor([data.numel()], dtype=torch.int64)
        self._group.send([length], self._peer, 0).wait()
        self._group.send([data], self._peer, 0).wait()

    def _receive_json(self) -> Any:
        length = torch.zeros(1, dtype=torch.int64)
        self._group.recv([length], self._peer, 0).wait()
        if not 0 < int(length) <= LIMIT:
            raise Corrupt(f"a header of {int(length)} bytes arrived: expected 1 to {LIMIT}")
        data = torch.empty(int(length), dtype=torch.uint8)
        self._group.recv([data], self._peer, 0).wait()
        return json.loads(bytes(data.numpy()))


class _lost_when_broken:  # noqa: N801
    """Turn what a broken group raises into an error a user can read."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RuntimeError | AttributeError):  # the latter: this end was closed
            raise Lost(f"the other end of a channel {self.what}: {why(error)}") from None


def group(store: Any, rank: int, size: int, *, loopback: bool = False) -> Any:
    """Make a gloo process group by hand, apart from the groups that ``torch.distributed`` knows of."""
    options = dist.ProcessGroupGloo._Options()
    options._timeout = PATIENCE
    options._threads = 1
    local = dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")
    options._devices = [local if loopback else dist.ProcessGroupGloo.create_default_device()]
    return dist.ProcessGroupGloo(store, rank, size, options)
