"""The one place that sends: rate limit, connection, check, bytes, in this order; then the answer.

Owns the connections and the token in use. It knows no call of the protocol by name: `client.py`
says what to send and how to read the answer. It never retries, but for two cases:

- a 401 or 403 is repeated once, at once, when the token source holds another token by now;
- aiohttp repeats a GET whose kept-alive connection turns out to be dead. A repeated poll may have
  delivered an item to nobody, which costs that item a redelivery (design §1) and nothing else;
  the other reads change nothing. A POST is never repeated: an ack, a beat or a stop that may have
  been applied is for the pool to judge.
"""

from __future__ import annotations

import asyncio
import copy
import http
import importlib.metadata
import io
import math
import time
from functools import cache, partial
from typing import TYPE_CHECKING, Final, Generic, NamedTuple, TypeAlias, TypeVar

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from workpool.errors import ControlPlaneError, RefusedError, SettingsError, TransientError
from workpool.wire.answers import SUCCESS, Answer, code_of, error_of, value_of
from workpool.wire.bound import Bound
from workpool.wire.calls import ANSWER_LIMIT_BYTES, STREAM
from workpool.wire.checked_body import CheckedBody, NotSentError
from workpool.wire.dialect import DIALECTS
from workpool.wire.options import DEFAULT_OPTIONS, CallOptions, Priority
from workpool.wire.proxy import proxy_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from workpool.settings import Settings
    from workpool.wire.calls import Call
    from workpool.wire.rate_limiter import RateLimiter

T = TypeVar("T")
Body: TypeAlias = bytes | io.BytesIO | CheckedBody | None

KEEPALIVE_SECONDS: Final = 30.0
"""Longer than the 20 s between two beats, shorter than the 60 s after which gateways hang up."""
SPARE_CONNECTIONS: Final = 16
LARGE_BYTES: Final = 256 * 1024
_DENIED: Final = frozenset({401, 403})
_ENDLESS: Final = aiohttp.ClientTimeout(total=None)
TRANSIENT: Final = (
    aiohttp.ClientConnectionError,
    aiohttp.ClientPayloadError,
    aiohttp.ClientResponseError,  # an answer that is not HTTP, or a proxy that refuses
    TimeoutError,
    OSError,
)
"""What may pass by itself. Anything else is a bug and must be loud (design §2)."""


class Request(NamedTuple, Generic[T]):
    """One request.

    Attributes:
        call: How to send it and how to read the answer.
        url: Where to; encoded already.
        seconds: The bound on all of it, the wait for our own rate limit included; None = the
            setting `request_timeout`.
        limiter: Our own rate limit that applies; None = the request waits for none.
        body: JSON.
        options: Its check, priority and connection.
    """

    call: Call[T]
    url: URL
    seconds: float | None = None
    limiter: RateLimiter | None = None
    body: bytes | None = None
    options: CallOptions = DEFAULT_OPTIONS


class Transport:
    """Requests of one client, on one event loop.

    Args:
        settings: Where to, and with which credentials.
        session: The caller's own session, which stays open; None = one is made, and closed.
    """

    def __init__(self, settings: Settings, session: aiohttp.ClientSession | None) -> None:
        self._settings = settings
        self._seconds = settings.request_timeout
        self._given = session
        self._worker_id: str | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._renews = True
        self.on_request: Callable[[str, str, float], None] | None = None
        self.on_rate_limit_wait: Callable[[str, float], None] | None = None
        self.on_credential_refresh: Callable[[str], None] | None = None

    def open(self, worker_id: str | None) -> None:
        """Read the token and make ready to connect; connects to nothing yet."""
        if self._loop is not None:
            raise RuntimeError("this WorkClient is open already")
        self._worker_id = worker_id
        self._use(self._settings.read_token())
        self._proxy = None if self._given else proxy_of(URL(self._settings.base_url))
        self._session = self._given or self._connect()
        # Connections of their own: however many are open, no other request waits for them.
        self._streams = self._given or aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=self._public_headers(),
        )
        self._loop = asyncio.get_running_loop()

    async def close(self) -> None:
        """Close the connections, unless they are the caller's."""
        self._loop = None
        if self._given is None:
            await self._session.close()
            await self._streams.close()

    def bearing(self, token: str) -> Transport:
        """The same connections with a token of its own, whose source is not read again."""
        other = copy.copy(self)
        other.bear(token)
        return other

    def bear(self, token: str) -> None:
        """Send this token from now on, and no other."""
        self._renews = False
        self._use(token)

    async def send(self, request: Request[T]) -> T:
        """Send one request and read its answer, all within its `seconds`.

        Raises:
            ControlPlaneError: Any other answer than the success that the call expects.
            RuntimeError: Not open, or on another event loop than the one it was opened on.
        """
        self._check_loop()
        seconds = self._seconds if request.seconds is None else request.seconds
        until = time.monotonic() + seconds
        if request.limiter is not None and not request.options.permit:
            op, priority = request.call.op, request.options.priority
            await self.acquire(request.limiter, op, priority, seconds)
        return await self._renewing(partial(self._attempt, request, until), until)

    async def open_stream(
        self, url: URL, headers: Mapping[str, str], limiter: RateLimiter
    ) -> aiohttp.ClientResponse:
        """Open an event stream within `request_timeout`; its length is the caller's to bound.

        Raises:
            ControlPlaneError: It was not opened.
        """
        self._check_loop()
        until = time.monotonic() + self._seconds
        await self.acquire(limiter, STREAM, Priority.HANDLER)
        return await self._renewing(partial(self._attempt_stream, url, headers, until), until)

    async def acquire(
        self, limiter: RateLimiter, op: str, priority: Priority, seconds: float | None = None
    ) -> None:
        """Acquire one request of our own rate limit, waiting for it if need be.

        Raises:
            TransientError: `seconds` (None = `request_timeout`) were not enough; nothing was sent.
        """
        seconds = self._seconds if seconds is None else seconds
        if not limiter.limited or limiter.try_acquire(priority):
            return
        started = time.monotonic()
        try:
            async with asyncio.timeout(None if seconds == math.inf else seconds):
                await limiter.acquire(priority)
        except TimeoutError:
            problem = "waited too long for our own rate limit"
            raise TransientError(op, None, problem, reason="timeout") from None
        finally:
            if self.on_rate_limit_wait is not None:
                self.on_rate_limit_wait(limiter.kind, time.monotonic() - started)

    async def _renewing(self, attempt: Callable[[], Awaitable[T]], until: float) -> T:
        """Make an attempt; once more when it was denied and there is another token by now."""
        token = self._token
        try:
            return await attempt()
        except RefusedError as refused:
            if refused.status not in _DENIED or not await self._renewed(token, until):
                raise
        return await attempt()

    async def _attempt(self, request: Request[T], until: float) -> T:
        check = request.options.check
        if check is None:
            return await self._ask(request, _plain_body(request.body), until)
        own_session = self._given is not None
        body = CheckedBody(request.body or b"", check, headers_first=own_session)
        try:
            return await self._ask(request, body, until)
        except TransientError:
            if body.refusal is None:
                raise
        raise body.refusal

    async def _ask(self, request: Request[T], body: Body, until: float) -> T:
        op, started = request.call.op, time.monotonic()
        seconds = _time_left(op, until - started)
        token, code = self._token, "error"
        try:
            # Not aiohttp's timeout: that takes a cancellation in the same turn for its own.
            with Bound(seconds):
                answer = await self._exchange(request, body)
            code = code_of(answer.status)
        except TRANSIENT as error:
            failure: ControlPlaneError = no_answer(op, error)
        else:
            if answer.status in SUCCESS:
                return value_of(op, answer, request.call.parse)
            failure = error_of(op, answer, token)
        finally:
            if not _was_refused(body):
                self._tell(op, code, started)
        # Raised out here: aiohttp's errors carry the request's headers, and so our token.
        raise failure

    async def _attempt_stream(
        self, url: URL, headers: Mapping[str, str], until: float
    ) -> aiohttp.ClientResponse:
        started = time.monotonic()
        seconds = _time_left(STREAM, until - started)
        token, code = self._token, "error"
        try:
            async with asyncio.timeout(seconds):
                response = await self._connect_stream(url, headers)
                code = code_of(response.status)
                if response.status == http.HTTPStatus.OK:
                    return _checked(response)
                try:
                    answer = Answer(response.status, response.headers, await read_bounded(response))
                finally:
                    response.close()
            failure = error_of(STREAM, answer, token)
        except TRANSIENT as error:
            failure = no_answer(STREAM, error)
        finally:
            self._tell(STREAM, code, started)
        raise failure

    def _tell(self, op: str, code: str, started: float) -> None:
        if self.on_request is not None:
            self.on_request(op, code, time.monotonic() - started)

    async def _connect_stream(self, url: URL, headers: Mapping[str, str]) -> aiohttp.ClientResponse:
        return await self._streams.get(
            url,
            headers=CIMultiDict(self._headers, **headers),
            timeout=_ENDLESS,
            proxy=self._proxy,
            allow_redirects=False,
            raise_for_status=False,
        )

    async def _exchange(self, request: Request[T], body: Body) -> Answer:
        call = request.call
        response = await self._session.request(
            call.method,
            request.url,
            data=body,
            headers=self._headers if request.body is None else self._json_headers,
            timeout=_ENDLESS,
            proxy=self._proxy,
            allow_redirects=False,
            raise_for_status=False,
        )
        try:
            if _was_refused(body):  # bytes that no request of ours has asked for
                raise NotSentError
            content = await read_bounded(response, call.limit)
            return Answer(response.status, response.headers, content)
        finally:
            if not response.closed:  # the answer was not read to its end, so nor is the connection
                response.release()

    def _check_loop(self) -> None:
        if self._loop is not asyncio.get_running_loop():
            raise RuntimeError(
                "this WorkClient is not open: use it inside `async with`"
                if self._loop is None
                else "this WorkClient was opened on another event loop"
            )

    async def _renewed(self, refused: str, until: float) -> bool:
        """Whether another token than the refused one is at hand, its source being read again."""
        if not self._renews:
            return False
        if self._token != refused:
            return True  # a request that was refused before us has seen to it
        read = self._settings.read_token
        result = "error"
        try:
            async with asyncio.timeout(until - time.monotonic()):
                # A file may lie on a disk that does not answer: never read on this loop.
                token = await asyncio.to_thread(read) if self._settings.token_file else read()
            result = "ok"
        except (SettingsError, TimeoutError):
            return False
        finally:
            if self.on_credential_refresh is not None:
                self.on_credential_refresh(result)
        if token != refused:
            self._use(token)
        return self._token != refused

    def _use(self, token: str) -> None:
        """Build the headers that every request bears from now on, beside its session's."""
        # With each request, never as a default of the session: aiohttp sends those to a proxy, too.
        headers = CIMultiDict(self._public_headers() if self._given else ())
        headers["Authorization"] = f"Bearer {token}"
        self._token = token
        self._headers = headers
        self._json_headers = CIMultiDict(headers, **{"Content-Type": "application/json"})

    def _public_headers(self) -> dict[str, str]:
        """What all requests bear and a proxy may see; cheaper as defaults of a session of ours."""
        rules = DIALECTS[self._settings.dialect]
        headers = {
            "Accept": "application/json",
            "Accept-Encoding": "identity",  # half a kilobyte is not worth unpacking
            "User-Agent": f"workpool/{_version()}",
            **rules.headers,
        }
        if self._worker_id is not None:
            headers[rules.worker_id_header] = self._worker_id
        return headers

    def _connect(self) -> aiohttp.ClientSession:
        settings = self._settings
        # All that the pool does at once, and some for what handlers add: a limit that is too low
        # would make a beat wait for a poll.
        places = settings.concurrency + settings.prefetch + settings.pollers
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=places + SPARE_CONNECTIONS, keepalive_timeout=KEEPALIVE_SECONDS
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=self._public_headers(),
        )


def _plain_body(body: bytes | None) -> bytes | io.BytesIO | None:
    # A large one in pieces, or it would hold up the loop and aiohttp would warn of that.
    return body if body is None or len(body) < LARGE_BYTES else io.BytesIO(body)


def _was_refused(body: object) -> bool:
    return isinstance(body, CheckedBody) and body.refusal is not None


def _time_left(op: str, seconds: float) -> float:
    if seconds <= 0:
        raise TransientError(op, None, "no time left to ask", reason="timeout")
    return seconds


def _checked(response: aiohttp.ClientResponse) -> aiohttp.ClientResponse:
    """An event stream; what answers 200 may be a gateway's page instead."""
    if response.content_type == "text/event-stream":
        return response
    response.close()
    raise TransientError(STREAM, response.status, "not an event stream", reason="bad_body")


async def read_bounded(
    response: aiohttp.ClientResponse, limit: int = ANSWER_LIMIT_BYTES
) -> bytes | None:
    """The body, unpacked; None, and the connection is closed, when it is larger than `limit`."""
    if (response.content_length or limit + 1) <= limit and (
        "Content-Encoding" not in response.headers
    ):
        content = response.content  # mostly all there with the headers: nothing to wait for
        return content.read_nowait() if content.is_eof() else await content.read()
    chunks: list[bytes] = []
    room = limit
    async for chunk in response.content.iter_any():
        room -= len(chunk)
        if room < 0:
            response.close()
            return None
        chunks.append(chunk)
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


@cache
def _version() -> str:
    return importlib.metadata.version("workpool")
