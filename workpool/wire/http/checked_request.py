"""An aiohttp request with a check right before its first byte, and a limit for 1xx answers.

aiohttp itself skips any number of informational answers (1xx). With this class, a request ends
after too many. Only the aiohttp sessions that workpool creates use this class.
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
    """Raised if the check of a request failed, so that nothing was sent."""


@dataclass(slots=True, eq=False)
class RequestCheck:
    """The body of a request, and a check that runs right before the request is written.

    The check for a lost lease is an example: bytes cannot be taken back once they are written.

    Attributes:
        body: The body.
        check: Raises an error if the request must not be sent.
        refusal: The error that `check` raised.
    """

    body: bytes
    check: Callable[[], None]
    refusal: Exception | None = None

    def run_check(self) -> None:
        """Run the check; store its error in `refusal`, so that the transport can raise it.

        Raises:
            NotSentError: The request may not be sent.
        """
        try:
            self.check()
        except Exception as refusal:  # noqa: BLE001 - the transport raises it
            self.refusal = refusal
            raise NotSentError from None


class CheckedPayload(aiohttp.payload.Payload):
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
    _autoclose = True  # This payload has no resource that needs `close()`.

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
        """Run the check, then write the headers and the whole body."""
        del content_length  # Unused: aiohttp passes the size of the whole body, or None.
        self._check.run_check()
        if self._headers_first:
            writer.send_headers()
        for start in range(0, len(self._value), _PIECE_BYTES):
            await writer.write(self._value[start : start + _PIECE_BYTES])


class InformationalFlood(aiohttp.ClientError):
    """Raised if a server sends too many informational answers (1xx)."""


class _InformationalAnswerCounter:
    """Counts the informational answers (1xx) on a connection.

    It replaces aiohttp's `feed_data` of the connection, and passes each answer on to that function.
    """

    __slots__ = ("_bytes", "_count", "_feed", "_flooded", "_protocol")

    def __init__(self, protocol: ResponseHandler) -> None:
        self._protocol = protocol
        self._feed = protocol.feed_data
        self._count = self._bytes = 0
        self._flooded = False

    def __call__(self, answer: Message, size: int = 0) -> None:
        if answer[0].code in _INFORMATIONAL:
            self._count_informational_answers(answer[0])
        else:
            self._count = self._bytes = 0
        # After too many informational answers, aiohttp closes the connection; ignore later answers.
        if not self._flooded:
            self._feed(answer, size)

    def _count_informational_answers(self, message: RawResponseMessage) -> None:
        self._count += 1
        self._bytes += sum(len(name) + len(value) + 4 for name, value in message.raw_headers)
        if self._count > INFORMATIONAL_MAX or self._bytes > INFORMATIONAL_BYTES:
            self._flooded = True
            self._protocol.set_exception(InformationalFlood())


class CheckedRequest(aiohttp.ClientRequest):
    """An aiohttp request that limits informational answers and runs the check of a `RequestCheck`.

    To write a body, also an empty one, aiohttp makes a payload and on Python 3.11 starts a task,
    which costs 5 % of the CPU time that the pool spends on an item. So the check of a POST without
    a body is called here: aiohttp then writes the headers before the next await.
    """

    check: RequestCheck | None = None

    def update_body_from_data(self, body: object, _stacklevel: int = 3) -> None:
        """Set the body of the request; `body` may be a `RequestCheck`, which contains a body.

        A payload for that body then runs the check. A POST whose `RequestCheck` has an empty body
        gets no payload, so `send` runs the check.
        """
        if type(body) is RequestCheck:
            self.check = body
            body = CheckedPayload(body) if body.body or self.method != "POST" else None
        super().update_body_from_data(body, _stacklevel)

    async def send(self, conn: Connection) -> aiohttp.ClientResponse:
        """Send the request.

        A payload runs the check before it writes the body. If the request has a check and no
        payload, run the check here.
        """
        protocol = conn.protocol
        if protocol is not None and protocol.should_close:
            # Bytes that no request has asked for have arrived on this connection since its last
            # answer. They would be taken for the answer to this request.
            raise aiohttp.ServerDisconnectedError
        # Replace `feed_data` once for each connection. Use `setattr` and not `__dict__`: once a
        # connection's `__dict__` was read, Python 3.11 reads its attributes more slowly, which cost
        # 14,000 CPU instructions a request.
        if protocol is not None and not isinstance(protocol.feed_data, _InformationalAnswerCounter):
            setattr(protocol, "feed_data", _InformationalAnswerCounter(protocol))  # noqa: B010 - types forbid it
        if self.check is not None and not self.body:
            # While writing is paused, aiohttp writes the request in a task, which may run later: a
            # check here would be too early. So add a payload with an empty body. The task calls its
            # `write_with_length`, which runs the check right before it writes the headers.
            if protocol is None or protocol.writing_paused:
                await self.update_body(CheckedPayload(self.check))
            else:
                self.check.run_check()
        return await super().send(conn)
