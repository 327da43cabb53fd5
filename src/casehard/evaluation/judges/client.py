"""Questions to a server that speaks OpenAI's ``/v1/chat/completions``: one at a time, each with a deadline.

Standard library only. Redirects are not followed and no proxy is used, so that the key goes to the host that is named,
and nowhere else; certificates are checked.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

from casehard.errors import ConfigError
from casehard.io.secrets import REDACTED, redact

LARGEST = 4_000_000
"""Bytes of an answer that are read."""
SHOWN = 200
"""Characters of a server's message that an error quotes."""
SILENT, BROKEN, NO_CHAT, UNREACHED = (
    *("no answer in time", "the answer broke off"),
    *("the answer is no chat completion", "no connection"),
)
AGAIN = (408, 409, 425, 429)
_LOCAL = ("localhost", "127.0.0.1", "::1")


class Answer(NamedTuple):
    """What a server said."""

    text: str
    ended: bool
    """By itself, rather than at the limit of tokens."""
    served: str
    """Model and version by the server's own account."""


class Failure(Exception):
    """No answer this time; the text says why, in few words, so that rows can be counted."""

    def __init__(self, why: str, *, again: bool = True, wait: float = 0.0, told: str = "") -> None:
        super().__init__(why)
        self.again = again
        """Whether asking once more may help."""
        self.wait = wait
        """Seconds that the server asks to be left alone."""
        self.told = told
        """What is known besides."""


class Client:
    """One server, one model.

    Args:
        url: up to ``/v1``, or the whole of ``.../chat/completions``.
        key: sent as a bearer token; "" for none.
        timeout: seconds until a question is given up, from the connection to the last byte.

    Raises:
        ConfigError: no such URL, one that holds a secret, or a key that would travel in the clear.
    """

    def __init__(self, url: str, key: str, timeout: float) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise ConfigError(f"api.url is {redact(url)!r}", hint="give http(s)://host[:port]/v1")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ConfigError("api.url holds more than host and path", hint="a key belongs into a variable: key_env")
        if key and parts.scheme == "http" and parts.hostname not in _LOCAL:
            raise ConfigError(
                f"api.url {url}: the key would travel unencrypted", hint="use https, or a tunnel to localhost"
            )
        if not re.fullmatch(r"[!-~]*", key):
            raise ConfigError("the key of the judge holds blanks or signs that no key has", hint="set it again")
        self.url, self.timeout, self._key = url, timeout, key
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname, port
        path = parts.path.rstrip("/")
        self._path = path if path.endswith("/chat/completions") else f"{path}/chat/completions"
        self.reached = False
        """Whether this server has ever answered."""

    def clean(self, text: str) -> str:
        """Return text without the key, or any other secret of the environment."""
        if self._key:
            text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(self._key)}(?![A-Za-z0-9])", REDACTED, text)
        return str(redact(text))

    def ask(self, model: str, messages: Sequence[Mapping[str, str]], max_tokens: int) -> Answer:
        """Ask once, at temperature 0.

        Raises:
            Failure: no answer that can be used.
            ConfigError: the server refuses the key, does not know the model, or sends us elsewhere.
        """
        asked = {"model": model, "messages": list(messages), "temperature": 0, "max_tokens": max_tokens}
        status, headers, body = self._send(json.dumps(asked).encode())
        self.reached = True
        if status == 200:
            return _answer(body)
        told = self.clean(" ".join(body[:4000].decode(errors="replace").split()))[:SHOWN]
        if status in (401, 403):
            raise ConfigError(f"{self.url} refuses the key: HTTP {status}: {told}", hint="name its variable: key_env")
        if status == 404:
            raise ConfigError(
                f"{self.url} does not know the model {model!r}, or the path: HTTP 404: {told}",
                hint="see api.url and api.model",
            )
        if 300 <= status < 400:
            raise ConfigError(f"{self.url} redirects: HTTP {status}", hint="give the URL it redirects to")
        again = status in AGAIN or status >= 500
        raise Failure(f"HTTP {status}", again=again, wait=_wait(headers.get("Retry-After", "")), told=told)

    def _send(self, body: bytes) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Post a body; return status, headers and what came back."""
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self.timeout)
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "close"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        late = threading.Event()
        watch: threading.Timer | None = None
        try:
            connection.connect()
            watch = threading.Timer(self.timeout, _hang_up, (connection.sock, late))
            watch.daemon = True
            watch.start()
            connection.request("POST", self._path, body, headers)
            response = connection.getresponse()
            content = response.read(LARGEST + 1)
        except (OSError, http.client.HTTPException) as error:
            if late.is_set() or isinstance(error, TimeoutError):
                raise Failure(SILENT) from None
            why = UNREACHED if watch is None else BROKEN
            raise Failure(why, told=self.clean(f"{type(error).__name__}: {error}")) from None
        finally:
            if watch is not None:
                watch.cancel()
            connection.close()
        if late.is_set() or len(content) > LARGEST:
            raise Failure(SILENT if late.is_set() else NO_CHAT)
        if response.length:  # read() with a limit does not say that bytes are missing
            raise Failure(BROKEN)
        return response.status, response.headers, content


def _hang_up(sock: socket.socket, late: threading.Event) -> None:
    """End a question whose time is over: a server that sends a byte now and then would never run into a timeout."""
    late.set()
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _answer(body: bytes) -> Answer:
    try:
        value = json.loads(body)
        choice = value["choices"][0]
        message = choice["message"]
        text = message.get("content")
        if text is None and isinstance(message.get("refusal"), str):
            text = message["refusal"]
        if not isinstance(text, str):
            raise TypeError(text)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise Failure(NO_CHAT) from None
    served = [str(value[key]) for key in ("model", "system_fingerprint") if value.get(key)]
    return Answer(text, choice.get("finish_reason") != "length", "/".join(served))


def _wait(text: str) -> float:
    """Return the seconds that a Retry-After header asks for; 0 where it says nothing that can be read."""
    if re.fullmatch(r"\d{1,9}(\.\d+)?", text.strip()):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0
