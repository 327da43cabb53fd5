"""R21: the suite runs without a network; loopback is the exception."""

from __future__ import annotations

import socket

import pytest


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("example.org", 443)])
def test_the_outside_is_out_of_reach(address):
    with pytest.raises(RuntimeError, match="without a network"):
        socket.create_connection(address, timeout=1)
    with socket.socket() as direct, pytest.raises(RuntimeError, match="without a network"):
        direct.connect(address)


def test_loopback_works():
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname(), timeout=5)
        peer, _ = server.accept()
        with client, peer:
            client.sendall(b"x")
            assert peer.recv(1) == b"x"
