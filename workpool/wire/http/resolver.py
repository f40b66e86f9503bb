"""A DNS resolver for aiohttp that looks up hosts on separate threads."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Final

from aiohttp.abc import AbstractResolver, ResolveResult

if TYPE_CHECKING:
    from concurrent.futures import Executor

LOOKUP_SECONDS: Final = 30.0
"""Limit of one lookup in seconds: aiohttp lets all connections to a host wait for one lookup."""
_NUMERIC: Final = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
_RESULT_FLAGS: Final = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV


class ThreadedDnsResolver(AbstractResolver):
    """Looks up hosts with `getaddrinfo` on the caller's executor.

    aiohttp's own resolver uses the event loop's executor, whose threads code of users may occupy.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return the IP addresses of a host name.

        Raises:
            OSError: The host has no address, or the lookup failed or took too long.
        """
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(LOOKUP_SECONDS):
            return await loop.run_in_executor(self._executor, _look_up_host, host, port, family)

    async def close(self) -> None:
        """Do nothing: the executor belongs to the caller."""


def _look_up_host(host: str, port: int, family: socket.AddressFamily) -> list[ResolveResult]:
    found = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    return [
        ResolveResult(
            hostname=host,
            # Use `getnameinfo` and not `address[0]`, which lacks the scope of a link-local address:
            # without the scope, no connection to the address is possible.
            host=socket.getnameinfo(address, _NUMERIC)[0],
            port=port,
            family=kind,
            proto=proto,
            flags=_RESULT_FLAGS,
        )
        for kind, _, proto, _, address in found
    ]
