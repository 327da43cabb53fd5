"""Messages between two processes: what arrives is what was sent, or an error says why not."""

from __future__ import annotations

import threading

import pytest
import torch

from casehard.defences.patcher.workers import transport
from casehard.defences.patcher.workers.transport import Channel
from casehard.errors import Corrupt, Lost


def pair() -> tuple[Channel, Channel]:
    """Return both ends of a channel within this process."""
    store = torch.distributed.HashStore()
    ends: dict[bool, Channel] = {}

    def make(first: bool) -> None:
        ends[first] = Channel(store, "t", first=first, loopback=True)

    threads = [threading.Thread(target=make, args=(first,)) for first in (True, False)]
    [t.start() for t in threads]
    [t.join(30) for t in threads]
    return ends[True], ends[False]


def send(channel: Channel, tensors: dict, **header: object) -> threading.Thread:
    thread = threading.Thread(target=lambda: channel.send(header, tensors.items(), count=len(tensors)), daemon=True)
    thread.start()
    return thread


TENSORS = {
    "matrix": torch.randn(33, 7),
    "half": torch.randn(5, 3).bfloat16(),
    "empty shard": torch.empty(0, 4),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "view": torch.arange(12.0).reshape(3, 4).T,
}


def test_tensors_of_every_shape_arrive_bit_for_bit_in_order() -> None:
    a, b = pair()
    for number in range(3):
        thread = send(a, TENSORS, number=number)
        message = b.receive()
        thread.join(10)
        assert message.header == {"number": number} and list(message.tensors) == list(TENSORS)
        for name, sent in TENSORS.items():
            got = message.tensors[name]
            assert got.dtype == sent.dtype and got.shape == sent.shape and torch.equal(got, sent), name
        assert message.size == sum(t.numel() * t.element_size() for t in TENSORS.values())
    send(b, {}, back=True)
    assert a.receive().header == {"back": True}


def test_a_changed_byte_is_told_and_names_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair()
    honest = transport.checksum
    monkeypatch.setattr(transport, "checksum", lambda t: honest(t) ^ (1 if t.dtype == torch.bfloat16 else 0))
    send(a, TENSORS)
    caught: list[Exception] = []

    def receive() -> None:
        try:
            b.receive()
        except Corrupt as error:
            caught.append(error)

    # The sender's sums are made with the patch; the receiver verifies without it.
    reader = threading.Thread(target=receive)
    original = Channel._receive_json

    def unpatch(self: Channel) -> object:
        value = original(self)
        if "sums" in value:
            monkeypatch.setattr(transport, "checksum", honest)
        return value

    monkeypatch.setattr(Channel, "_receive_json", unpatch)
    reader.start()
    reader.join(20)
    assert len(caught) == 1 and "tensor 'half' changed on its way: expected crc32" in str(caught[0])


def test_messages_come_in_order_or_not_at_all() -> None:
    a, b = pair()
    a._sent = 4
    send(a, {}, x=1)
    with pytest.raises(Corrupt, match="message 5 came where 0 was expected"):
        b.receive()


def test_a_header_of_absurd_size_is_refused() -> None:
    a, b = pair()
    thread = threading.Thread(target=lambda: a._group.send([torch.tensor([1 << 40])], a._peer, 0).wait(), daemon=True)
    thread.start()
    with pytest.raises(Corrupt, match="header of 1099511627776 bytes"):
        b.receive()


def test_a_closed_end_is_noticed_at_once_by_the_other() -> None:
    a, b = pair()
    threading.Timer(0.3, a.close).start()
    with pytest.raises(Lost, match="the other end of a channel is gone"):
        b.receive()
