"""Reading an answer: its headers after a few informational ones, and its body; or the error.

aiohttp skips any number of informational answers (1xx) and has no limit for them; a
request ends after too many.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

import aiohttp

from workpool.errors import ControlPlaneError, RefusedError, TransientError
from workpool.wire.endpoints import ANSWER_LIMIT_BYTES, STREAM
from workpool.wire.response import BEGINNING_BYTES, Oversized

if TYPE_CHECKING:
    from aiohttp.client_proto import ResponseHandler
    from aiohttp.http import RawResponseMessage
    from aiohttp.streams import StreamReader

    Message = tuple[RawResponseMessage, StreamReader]

INFORMATIONAL_MAX: Final = 16
INFORMATIONAL_BYTES: Final = 64 * 1024
"""Largest total size in bytes of the headers of informational answers before one answer."""
_OS_ERRORS: Final = {
    errno.ECONNREFUSED: "refused",
    errno.ECONNRESET: "reset",
    errno.EPIPE: "reset",
    errno.ETIMEDOUT: "timeout",
}
_INFORMATIONAL: Final = frozenset(range(100, 200)) - {101}


class InformationalFlood(aiohttp.ClientError):
    """Too many informational answers; aiohttp closes the connection."""


def limit_informational(protocol: ResponseHandler) -> None:
    """Let requests on a connection fail with `InformationalFlood` after too many such answers."""
    # Not through its `__dict__`: Python 3.11 reads all attributes of an object more slowly from
    # then on, which cost 14,000 instructions a request.
    if not isinstance(protocol.feed_data, _LimitedFeed):
        setattr(protocol, "feed_data", _LimitedFeed(protocol))  # noqa: B010 - types forbid it


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
            self._add(answer[0])
        else:
            self._count = self._bytes = 0
        if not self._flooded:  # whatever follows a flood is too late
            self._feed(answer, size)

    def _add(self, message: RawResponseMessage) -> None:
        self._count += 1
        self._bytes += sum(len(name) + len(value) + 4 for name, value in message.raw_headers)
        if self._count > INFORMATIONAL_MAX or self._bytes > INFORMATIONAL_BYTES:
            self._flooded = True
            self._protocol.set_exception(InformationalFlood())


TRANSIENT: Final = (
    aiohttp.ClientConnectionError,
    aiohttp.ClientPayloadError,
    InformationalFlood,
    aiohttp.ClientResponseError,  # an answer that is not HTTP, or a proxy that refuses
    TimeoutError,
    OSError,
)
"""Errors that may pass without a change. Any other error is a bug and is raised."""


def checked_stream(response: aiohttp.ClientResponse) -> aiohttp.ClientResponse:
    """Return the response if it is an event stream; a gateway may send a page with status 200."""
    if response.content_type == "text/event-stream":
        return response
    response.close()
    raise TransientError(STREAM, response.status, "not an event stream", reason="bad_body")


async def read_bounded(
    response: aiohttp.ClientResponse, limit: int = ANSWER_LIMIT_BYTES
) -> bytes | Oversized:
    """Return the body, unpacked.

    If it exceeds `limit`, return its beginning and close the connection.
    """
    length = response.content_length
    if length is not None and "Content-Encoding" not in response.headers:
        if 0 < length <= limit:
            # mostly the body has arrived with the headers, so there is no wait
            content = response.content
            return content.read_nowait() if content.is_eof() else await content.read()
        if length > limit:
            limit = BEGINNING_BYTES  # the rest of the body is not read
    chunks: list[bytes] = []
    room = limit
    async for chunk in response.content.iter_any():
        chunks.append(chunk)
        room -= len(chunk)
        if room < 0:
            response.close()
            return Oversized(b"".join(chunks)[:BEGINNING_BYTES])
    return b"".join(chunks)


def error_code(error: BaseException) -> str:
    """Return the `code` in the metrics of a request that was not answered."""
    match error:
        case aiohttp.ClientConnectorDNSError():
            return "dns"
        case aiohttp.ClientSSLError():
            return "tls"
        case TimeoutError():
            return "timeout"
        case aiohttp.ServerDisconnectedError():
            return "reset"
        case aiohttp.ClientOSError():
            return _OS_ERRORS.get(error.errno or 0, "error")
    return "error"


def no_answer(op: str, error: BaseException) -> ControlPlaneError:
    """Return the error for a request that was not answered."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        # The certificate stays wrong without a change, so the error counts as a refusal.
        problem = getattr(error.certificate_error, "verify_message", "") or "not valid"
        return RefusedError(op, None, f"the TLS certificate is not trusted: {problem}")
    if isinstance(error, TimeoutError):
        return TransientError(op, None, "no answer in time", reason="timeout")
    # Only aiohttp's texts about connecting are quoted: its other errors quote received bytes.
    told = str(error) if isinstance(error, aiohttp.ClientConnectorError) else type(error).__name__
    return TransientError(op, None, f"no answer: {told}", reason="network")
