"""Creates the aiohttp sessions of one client, which share a DNS resolver and a proxy.

There are three sessions, so that no call waits for a connection behind a call of another kind. The
pool's own calls (claims, completions, heartbeats) have as many connections as there are calls. The
calls of handlers share connections up to a limit. Each event stream, and each call that must not
reuse a connection, has its own.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final

import aiohttp
from yarl import URL

from workpool.wire.http.call_options import Priority
from workpool.wire.http.checked_request import CheckedRequest
from workpool.wire.http.environment_proxy import find_proxy_for_url
from workpool.wire.http.resolver import ThreadedDnsResolver

if TYPE_CHECKING:
    from collections.abc import Mapping
    from concurrent.futures import Executor

    from aiohttp import AddrInfoType

    from workpool.settings import Settings

KEEPALIVE_SECONDS: Final = 30.0
"""Longer than the 20 s between heartbeats, shorter than the 60 s after which gateways hang up."""
SPARE_CONNECTIONS: Final = 16
"""Connections for the calls of handlers, in addition to one for each session."""
ENDLESS: Final = aiohttp.ClientTimeout(total=None)
"""Turns aiohttp's timeouts off, because each request has a time limit of its own."""
POOL_BUFFER_BYTES: Final = 64 * 1024
BUFFER_BYTES: Final = 208 * 1024
"""The most that a connection of a handler receives at once; a larger buffer would be faster on long
distances. It bounds how long a server can block the loop with informational answers (1xx): aiohttp
parses all that was received before any task continues and can refuse them."""


class Connections:
    """The aiohttp sessions of one client, on the running loop.

    Args:
        settings: The settings of the connection.
        given: The caller's own session, used for everything and left open; None = a new one.
        headers: The headers of all requests, which a proxy may see.
        executor: Runs DNS lookups.

    Attributes:
        proxy: The proxy of all requests, if any.
        sessions: The session for the calls of each priority, by its number.
        single_use: The session whose connections are used once.
    """

    def __init__(
        self,
        settings: Settings,
        given: aiohttp.ClientSession | None,
        headers: Mapping[str, str],
        executor: Executor,
    ) -> None:
        self._headers = headers
        self._resolver = ThreadedDnsResolver(executor)
        self._is_ours = given is None
        limit = settings.concurrency + SPARE_CONNECTIONS
        self.proxy = find_proxy_for_url(URL(settings.base_url)) if given is None else None
        pool = given or self._new_session(POOL_BUFFER_BYTES, limit=0)
        handlers = given or self._new_session(BUFFER_BYTES, limit=limit)
        # The tuple is indexed by priority: a dict would hash an enum member for each request.
        self.sessions = tuple(handlers if each is Priority.HANDLER else pool for each in Priority)
        self.single_use = given or self._new_session(BUFFER_BYTES, limit=0, single_use=True)

    async def close(self) -> None:
        """Close the connections, except those of a session that the caller owns."""
        if self._is_ours:
            for session in {*self.sessions, self.single_use}:
                await session.close()

    def _new_session(
        self, buffer_bytes: int, *, limit: int, single_use: bool = False
    ) -> aiohttp.ClientSession:
        def new_socket(address: AddrInfoType) -> socket.socket:
            family, kind, protocol, _, _ = address
            made = socket.socket(family, kind, protocol)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
            return made

        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=limit,
                resolver=self._resolver,
                force_close=single_use,
                socket_factory=new_socket,
                keepalive_timeout=None if single_use else KEEPALIVE_SECONDS,
            ),
            request_class=CheckedRequest,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=self._headers,
            timeout=ENDLESS,
        )
