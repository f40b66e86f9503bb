"""A response that only a few informational answers (1xx) may precede.

aiohttp passes over informational answers, however many there are, and has no setting for that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import aiohttp

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from typing import Any

    from aiohttp.connector import Connection
    from aiohttp.http import RawResponseMessage
    from aiohttp.streams import StreamReader

    Message = tuple[RawResponseMessage, StreamReader]

INFORMATIONAL_MAX: Final = 16
INFORMATIONAL_BYTES: Final = 64 * 1024
"""Bytes of the headers of all informational answers before one answer."""
_INFORMATIONAL: Final = frozenset(range(100, 200)) - {101}


class InformationalFlood(aiohttp.ClientError):
    """More informational answers than are accepted; aiohttp closes the connection."""


class LimitedResponse(aiohttp.ClientResponse):
    """A response whose request raises `InformationalFlood` if too many answers precede it."""

    def start(self, connection: Connection) -> Coroutine[Any, Any, aiohttp.ClientResponse]:
        """Read the headers of the answer."""
        protocol = connection.protocol
        # Once for each connection. Not through its `__dict__`: Python 3.11 reads all attributes of
        # an object more slowly from then on, which cost 14,000 instructions a request.
        if protocol is not None and not isinstance(protocol.read, _LimitedRead):
            setattr(protocol, "read", _LimitedRead(protocol.read))  # noqa: B010 - types forbid it
        return super().start(connection)


class _LimitedRead:
    """Reads the headers of all answers on one connection."""

    __slots__ = ("_bytes", "_count", "_read")

    def __init__(self, read: Callable[[], Awaitable[Message]]) -> None:
        self._read = read
        self._count = self._bytes = 0

    async def __call__(self) -> Message:
        message, _ = answer = await self._read()
        if message.code not in _INFORMATIONAL:
            self._count = self._bytes = 0
            return answer
        self._count += 1
        self._bytes += sum(len(name) + len(value) + 4 for name, value in message.raw_headers)
        if self._count > INFORMATIONAL_MAX or self._bytes > INFORMATIONAL_BYTES:
            raise InformationalFlood
        return answer
