"""One POST, bounded in time and size whatever the server does.

A read timeout begins anew with every byte, so a server that drips one byte a second holds its
client for ever, in the headers as well as in the body. A watchdog therefore ends the connection
when the request's time is up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading
from collections.abc import Mapping
from typing import Any

import requests
import urllib3
from requests import exceptions
from requests.adapters import HTTPAdapter

_local = threading.local()


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a server said."""

    status: int
    content: bytes
    kind: str
    """Content type, as the server names it."""
    retry_after: str | None


class TransportError(Exception):
    """No whole reply came."""

    def __init__(self, message: str, kind: str, transient: bool = True):
        super().__init__(message)
        self.kind = kind
        """`timeout`, `connection`, `too large` or `configuration`."""
        self.transient = transient
        """Another try may do better."""


def post_json(
    url: str,
    body: Mapping[str, Any],
    secret: str,
    timeout_s: float,
    deadline_s: float,
    max_bytes: int,
) -> Reply:
    """Sends `body` as JSON and reads the whole reply.

    Args:
        secret: bearer token; empty: none is sent.
        timeout_s: longest wait to connect, and for the next byte.
        deadline_s: longest time for everything.
        max_bytes: longest reply.

    Raises:
        TransportError: connection failed or broke off, time is up, or the reply is too large.
    """
    dog = _Watchdog(deadline_s)
    try:
        with (
            dog,
            _session().post(
                url,
                json=body,
                auth=_Bearer(secret),
                timeout=timeout_s,
                stream=True,
                allow_redirects=False,
            ) as response,
        ):
            content = bytearray()
            for piece in response.iter_content(1 << 16):
                content += piece
                if len(content) > max_bytes:
                    raise TransportError(
                        f"the answer is larger than {max_bytes:,} bytes", "too large", False
                    )
            kind = response.headers.get("Content-Type", "no content type")
            reply = Reply(
                response.status_code, bytes(content), kind[:80], response.headers.get("Retry-After")
            )
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        if dog.barked:
            raise TransportError(f"no whole answer within {deadline_s:g} s", "timeout") from None
        raise _named(error) from None
    if dog.barked:  # a body without a length ends with its connection, so a cut one looks whole
        raise TransportError(f"no whole answer within {deadline_s:g} s", "timeout")
    return reply


def _named(error: Exception) -> TransportError:
    # Not the error's own text: it can quote headers, and the key is one.
    name = type(error).__name__
    if isinstance(error, requests.Timeout) or "timed out" in str(error):
        return TransportError(
            f"{name}: it did not answer in time; is the server overloaded?", "timeout"
        )
    passing = (
        requests.ConnectionError,
        exceptions.ChunkedEncodingError,
        exceptions.ContentDecodingError,
    )
    if isinstance(error, passing) or not isinstance(error, requests.RequestException):
        return TransportError(f"{name}; is the server up?", "connection")
    return TransportError(f"{name}; check base_url and the key", "configuration", False)


class _Bearer(requests.auth.AuthBase):
    """Bearer token. Given even where there is none:
    otherwise requests looks for a password in ~/.netrc."""

    def __init__(self, secret: str):
        self._secret = secret

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._secret:
            request.headers["Authorization"] = f"Bearer {self._secret}"
        return request


class _Watchdog:
    """Shuts the connection that its thread is using, once the time is up
    and until the thread has noticed."""

    def __init__(self, seconds: float):
        self.barked = False
        self.connection: Any = None
        self._seconds = seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        _local.dog = self
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        _local.dog = None
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        wait = self._seconds
        while not self._done.wait(wait):
            self.barked, wait = True, 0.05
            sock = getattr(self.connection, "sock", None)
            if sock is not None:
                with contextlib.suppress(OSError):  # it is closed already, or not connected yet
                    # Not the method of a TLS socket, which would talk to the server first.
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)


class _Seen:
    """A connection that its thread's watchdog knows of."""

    def request(self, *args: Any, **kwargs: Any) -> None:
        if getattr(_local, "dog", None) is not None:
            _local.dog.connection = self
        super().request(*args, **kwargs)  # type: ignore[misc]


class _HTTPConnection(_Seen, urllib3.connection.HTTPConnection):
    pass


class _HTTPSConnection(_Seen, urllib3.connection.HTTPSConnection):
    pass


class _HTTPPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _HTTPConnection


class _HTTPSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _HTTPSConnection


class _Adapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(*args, **kwargs)
        manager.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}
        return manager


def _session() -> requests.Session:
    """A session a thread: sessions keep connections alive and are not safe to share."""
    if not hasattr(_local, "session"):
        session = requests.Session()
        for scheme in ("http://", "https://"):
            session.mount(scheme, _Adapter())
        _local.session = session
    return _local.session
