"""Reading the bytes of an answer, and the errors of a request that was not answered."""

from __future__ import annotations

from typing import Final

import aiohttp

from workpool.errors import ControlPlaneError, RefusedError, TransientError
from workpool.wire.endpoints import ANSWER_LIMIT_BYTES, STREAM
from workpool.wire.http.limited_response import InformationalFlood
from workpool.wire.response import BEGINNING_BYTES, Oversized

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
    """Return the response when it is an event stream: a gateway may answer a page with 200."""
    if response.content_type == "text/event-stream":
        return response
    response.close()
    raise TransientError(STREAM, response.status, "not an event stream", reason="bad_body")


async def read_bounded(
    response: aiohttp.ClientResponse, limit: int = ANSWER_LIMIT_BYTES
) -> bytes | Oversized:
    """Return the body, unpacked; its beginning, and close the connection, if it exceeds `limit`."""
    length = response.content_length
    if length is not None and "Content-Encoding" not in response.headers:
        if 0 < length <= limit:
            content = response.content  # mostly all there with the headers: nothing to wait for
            return content.read_nowait() if content.is_eof() else await content.read()
        if length > limit:
            limit = BEGINNING_BYTES  # the rest is not waited for
    chunks: list[bytes] = []
    room = limit
    async for chunk in response.content.iter_any():
        chunks.append(chunk)
        room -= len(chunk)
        if room < 0:
            response.close()
            return Oversized(b"".join(chunks)[:BEGINNING_BYTES])
    return b"".join(chunks)


def no_answer(op: str, error: BaseException) -> ControlPlaneError:
    """The error for a request that was not answered."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        # Nothing that passes by itself, and no one we may talk to: as good as a refusal.
        problem = getattr(error.certificate_error, "verify_message", "") or "not valid"
        return RefusedError(op, None, f"the TLS certificate is not trusted: {problem}")
    if isinstance(error, TimeoutError):
        return TransientError(op, None, "no answer in time", reason="timeout")
    # Only what aiohttp says about connecting is quoted: its other errors quote what was received.
    told = str(error) if isinstance(error, aiohttp.ClientConnectorError) else type(error).__name__
    return TransientError(op, None, f"no answer: {told}", reason="network")
