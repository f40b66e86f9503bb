"""The guards of a request: a check right before its first byte, and a limit of 1xx answers.

aiohttp skips any number of informational answers (1xx) and has no limit for them; a request of a
session that the client created ends after too many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import aiohttp

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp.abc import AbstractStreamWriter
    from aiohttp.client_proto import ResponseHandler
    from aiohttp.connector import Connection
    from aiohttp.http import RawResponseMessage
    from aiohttp.streams import StreamReader

    Message = tuple[RawResponseMessage, StreamReader]

INFORMATIONAL_MAX: Final = 16
INFORMATIONAL_BYTES: Final = 64 * 1024
"""Largest total size in bytes of the headers of informational answers before one answer."""
_INFORMATIONAL: Final = frozenset(range(100, 200)) - {101}
_PIECE_BYTES: Final = 64 * 1024
"""Size of the pieces in which a large body is written, so that it does not block the loop."""


class NotSentError(aiohttp.ClientConnectionError):
    """The check of a request failed, so nothing was sent."""


@dataclass(slots=True, eq=False)
class RequestCheck:
    """A request body, possibly empty, with a check that runs right before the bytes are written.

    Bytes that the kernel already holds cannot be taken back.

    Attributes:
        body: The body.
        check: Raises an error if the request must not be sent.
        refusal: The error that `check` raised.
    """

    body: bytes
    check: Callable[[], None]
    refusal: Exception | None = None

    def verify(self) -> None:
        """Run the check; store its error in `refusal`, so that the transport can raise it.

        Raises:
            NotSentError: The request may not be sent.
        """
        try:
            self.check()
        except Exception as refusal:  # noqa: BLE001 - the transport raises it
            self.refusal = refusal
            raise NotSentError from None


class CheckedBody(aiohttp.payload.Payload):
    """An aiohttp payload that runs the check of a `RequestCheck` before it writes the body.

    aiohttp (since 3.12) writes a request's headers together with the body, once it has a
    connection: resolved, connected, encrypted, through any proxy. So after a refused check nothing
    was sent, also in a caller's own session. aiohttp reports the refusal as a connection error, and
    does not repeat the request because of it.

    Args:
        check: The body and its check.
        headers_first: Write the headers separately: a trace of a caller's own session may wait
            between the check and the body's first byte.
    """

    _value: bytes
    _autoclose = True  # the body has nothing to close

    def __init__(self, check: RequestCheck, *, headers_first: bool = False) -> None:
        super().__init__(check.body)
        self._size = len(check.body)
        self._check = check
        self._headers_first = headers_first or not check.body

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Return the body as text."""
        return self._value.decode(encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        """Run the check, then write the headers and the body."""
        await self.write_with_length(writer, None)

    async def write_with_length(
        self, writer: AbstractStreamWriter, content_length: int | None
    ) -> None:
        """Run the check, then write the headers and the body; the given length is not used."""
        del content_length  # aiohttp passes None or the size of the body
        self._check.verify()
        if self._headers_first:
            writer.send_headers()
        for start in range(0, len(self._value), _PIECE_BYTES):
            await writer.write(self._value[start : start + _PIECE_BYTES])


class InformationalFlood(aiohttp.ClientError):
    """A server sent too many informational answers (1xx); aiohttp closes the connection."""


class _LimitedFeed:
    """Receives the headers of all answers on one connection, and passes them on."""

    __slots__ = ("_bytes", "_count", "_feed", "_flooded", "_protocol")

    def __init__(self, protocol: ResponseHandler) -> None:
        self._protocol = protocol
        self._feed = protocol.feed_data
        self._count = self._bytes = 0
        self._flooded = False

    def __call__(self, answer: Message, size: int = 0) -> None:
        if answer[0].code in _INFORMATIONAL:
            self._count_message(answer[0])
        else:
            self._count = self._bytes = 0
        if not self._flooded:  # aiohttp closes the connection, and the rest is discarded
            self._feed(answer, size)

    def _count_message(self, message: RawResponseMessage) -> None:
        self._count += 1
        self._bytes += sum(len(name) + len(value) + 4 for name, value in message.raw_headers)
        if self._count > INFORMATIONAL_MAX or self._bytes > INFORMATIONAL_BYTES:
            self._flooded = True
            self._protocol.set_exception(InformationalFlood())


class GuardedRequest(aiohttp.ClientRequest):
    """A request that limits informational answers and verifies a `RequestCheck` given as its data.

    To write a body, also an empty one, aiohttp makes a payload and on Python 3.11 starts a task,
    which costs 5 % of the CPU time that the pool spends on an item. So the check of a POST without
    a body is called here: aiohttp then writes the headers before the next await.
    """

    check: RequestCheck | None = None

    def update_body_from_data(self, body: object, _stacklevel: int = 3) -> None:
        """Store a given `RequestCheck`; make a payload of it unless it is a POST without a body."""
        if type(body) is RequestCheck:
            self.check = body
            body = CheckedBody(body) if body.body or self.method != "POST" else None
        super().update_body_from_data(body, _stacklevel)

    async def send(self, conn: Connection) -> aiohttp.ClientResponse:
        """Run the check if no payload will run it, then send the request."""
        protocol = conn.protocol
        # Replace `feed_data` once for each connection. Do not assign in `__dict__`: after an access
        # to it, Python 3.11 reads the attributes of the connection more slowly, which cost 14,000
        # instructions a request.
        if protocol is not None and not isinstance(protocol.feed_data, _LimitedFeed):
            setattr(protocol, "feed_data", _LimitedFeed(protocol))  # noqa: B010 - types forbid it
        if self.check is not None and not self.body:
            # aiohttp waits while writing is paused. Use a payload, which runs the check after that
            # wait.
            if protocol is None or protocol.writing_paused:
                await self.update_body(CheckedBody(self.check))
            else:
                self.check.verify()
        return await super().send(conn)
