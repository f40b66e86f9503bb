"""Sends HTTP requests: waits for the rate limit, runs the lease check, and reads the answer.

Owns the connections and the token in use. `client.py` defines the requests and the parsers of
answers; only the event stream is opened here. A request is repeated in two cases only:

- a 401 or 403 is repeated once, at once, if the token source has another token by then;
- aiohttp repeats a GET if its kept-alive connection was closed. A repeated poll may have
  delivered an item to nobody, so that item is delivered again later; the other reads change
  nothing. A POST is repeated after a 401 or 403 only: the pool decides what to do about an ack, a
  heartbeat or a stop that may have been applied.
"""

from __future__ import annotations

import asyncio
import copy
import http
import importlib.metadata
import io
import math
import time
from functools import cache
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

from multidict import CIMultiDict

from workpool.errors import RefusedError, SettingsError, TransientError
from workpool.logs import hide_token
from workpool.wire.client_dialects import DIALECTS
from workpool.wire.endpoints import ANSWER_LIMIT_BYTES, STREAM
from workpool.wire.http.call_options import DEFAULT_OPTIONS, CallOptions, Priority
from workpool.wire.http.checked_request import CheckedPayload, NotSentError, RequestCheck
from workpool.wire.http.connection_errors import TRANSIENT, error_code, make_no_answer_error
from workpool.wire.http.connections import ENDLESS, Connections
from workpool.wire.http.credential_renewal import CredentialSource
from workpool.wire.http.daemon_threads import DaemonThreads
from workpool.wire.http.timeouts import SharedTimer, TimeLimit
from workpool.wire.response import (
    BEGINNING_BYTES,
    CODES,
    SUCCESS,
    OversizedBody,
    Response,
    parse_error_answer,
)

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Mapping

    import aiohttp
    from yarl import URL

    from workpool.settings import Settings
    from workpool.wire.endpoints import Endpoint
    from workpool.wire.http.rate_limiter import RateLimiter

T = TypeVar("T")

LARGE_BYTES: Final = 256 * 1024
THREADS: Final = 8
"""More than the lookups and file reads that run at one time, so that none waits for a thread."""
HIDDEN_CHARACTERS: Final = 8
"""A shorter value of an extra header, such as `1`, is not treated as a secret."""
_DENIED: Final = frozenset({401, 403})


class Transport:
    """Sends the requests of one client, on one event loop, and reads their answers.

    Args:
        settings: The address and the credentials.
        session: The caller's own session, which stays open; None = one is created and closed.
    """

    def __init__(self, settings: Settings, session: aiohttp.ClientSession | None) -> None:
        self._settings = settings
        self._seconds = settings.request_timeout
        self._given = session
        self._worker_id: str | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._renews = True
        self._answered = False
        self._source = CredentialSource(settings.read_token, settings.token_file)
        self._key_header: str | None = None
        self.on_request: Callable[[str, str, float], None] | None = None
        self.on_rate_limit_wait: Callable[[str, float], None] | None = None
        self.on_credential_refresh: Callable[[str], None] | None = None

    async def open(self, worker_id: str | None) -> None:
        """Read the token and prepare connections; no connection is opened yet.

        Raises:
            SettingsError: A setting is missing, or a file cannot be read.
        """
        if self._loop is not None:
            raise RuntimeError("this WorkClient is open already")
        self._worker_id = worker_id
        self._threads = DaemonThreads("workpool-blocking", THREADS)
        try:
            token, self._api_key, self._tls = await self._read_connection_settings()
            self._set_headers(token)
            self._hide_secrets()
            headers = self._copy_headers_without_secrets()
            self._connections = Connections(self._settings, self._given, headers, self._threads)
            self._request_options = self._build_request_options()
        except BaseException:
            await self._threads.close()
            raise
        self._loop = asyncio.get_running_loop()
        self._timer = SharedTimer(self._loop)

    async def close(self) -> None:
        """Close the connections except those of a caller's own session."""
        if self._loop is not None:
            self._loop = None
            self._timer.cancel_if_no_open_limits()
            try:
                await self._connections.close()
            finally:
                await self._threads.close()

    def copy_with_api_key(self) -> Transport:
        """Return a copy of the transport that sends the API key; return `self` if there is no key.

        The copy uses the same connections.
        """
        if self._api_key is None:
            return self
        other = copy.copy(self)
        other.use_api_key(self._api_key)
        return other

    def use_api_key(self, key: str) -> None:
        """Send this API key with all later requests; read the key again after a 401 or 403."""
        settings = self._settings
        self._source = CredentialSource(settings.read_api_key, settings.api_key_file)
        self._key_header = DIALECTS[settings.dialect].api_key_header
        self._set_headers(key)
        self._hide_secrets()

    def copy_with_token(self, token: str) -> Transport:
        """Return a copy of the transport that sends `token` and never renews that token.

        The copy uses the same connections.
        """
        other = copy.copy(self)
        other.use_fixed_token(token)
        return other

    def use_fixed_token(self, token: str) -> None:
        """Send this token with all later requests, and do not replace it after a 401 or 403."""
        self._renews = False
        self._set_headers(token)

    async def send(
        self,
        endpoint: Endpoint[T],
        url: URL,
        seconds: float | None = None,
        limiter: RateLimiter | None = None,
        body: bytes | None = None,
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> T:
        """Send one request and read its answer.

        Args:
            endpoint: The method and the parser of a success.
            url: The URL, already encoded.
            seconds: The limit in seconds, the wait for the rate limit included; None = the
                setting `request_timeout`.
            limiter: The rate limit of the request; None = it waits for none.
            body: JSON.
            options: The check, priority and connection.

        Raises:
            ControlPlaneError: The answer is not the success that the call expects, or no answer
                came.
            RuntimeError: The client is not open, or was opened on another event loop.
        """
        if self._loop is not asyncio.get_running_loop():
            self._raise_wrong_loop()
        if seconds is None:
            seconds = self._seconds
        until = time.monotonic() + seconds
        if limiter is not None and limiter.limited and not options.permit:
            await self.acquire_rate_token(limiter, endpoint.op, options.priority, seconds)
        token = self._token
        try:
            return await self._attempt_request(endpoint, url, until, body, options)
        except RefusedError as refused:
            await self._renew_denied_token(refused, token, until)
        return await self._attempt_request(endpoint, url, until, body, options)

    async def open_stream(
        self, url: URL, headers: Mapping[str, str], limiter: RateLimiter
    ) -> aiohttp.ClientResponse:
        """Open an event stream within `request_timeout`.

        The open stream has no time limit: the caller limits how long it reads.

        Raises:
            ControlPlaneError: The stream was not opened.
        """
        if self._loop is not asyncio.get_running_loop():
            self._raise_wrong_loop()
        until = time.monotonic() + self._seconds
        await self.acquire_rate_token(limiter, STREAM, Priority.HANDLER)
        token = self._token
        try:
            return await self._attempt_to_open_stream(url, headers, until)
        except RefusedError as refused:
            await self._renew_denied_token(refused, token, until)
        return await self._attempt_to_open_stream(url, headers, until)

    async def acquire_rate_token(
        self, limiter: RateLimiter, op: str, priority: Priority, seconds: float | None = None
    ) -> None:
        """Acquire a token of the rate limiter for one request, with a wait if necessary.

        Raises:
            TransientError: The wait exceeded `seconds` (None = `request_timeout`); nothing was
                sent.
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

    async def _attempt_request(
        self,
        endpoint: Endpoint[T],
        url: URL,
        until: float,
        body: bytes | None,
        options: CallOptions,
    ) -> T:
        op, started = endpoint.op, time.monotonic()
        seconds = _require_time_left(op, until - started)
        secrets, code = self._secrets, "error"
        check = None if options.check is None else RequestCheck(body or b"", options.check)
        try:
            # Do not use aiohttp's timeout: if the task is cancelled in the same loop iteration in
            # which the timeout expires, aiohttp would raise a timeout and hide the cancellation.
            with TimeLimit(seconds, self._timer):
                response, content = await self._exchange_request(
                    endpoint, url, body, options, check
                )
            self._answered = True
            status = response.status
            code = CODES.get(status, "error")
        except TRANSIENT as error:
            plain = url.scheme == "http" and not self._answered
            failure: Exception = make_no_answer_error(op, error, plain=plain)
            code = error_code(error)
        else:
            if status in SUCCESS:
                value = endpoint.parse_success_answer(status, content)
                add = endpoint.add_headers
                return value if add is None else add(value, response.headers)
            failure = parse_error_answer(op, Response(status, response.headers, content), *secrets)
        finally:
            if self.on_request is not None and (check is None or check.refusal is None):
                self.on_request(op, code, time.monotonic() - started)
        # Raise outside of the except block. Inside it, the context of the error would be aiohttp's
        # error, which contains the headers of the request with the token.
        if check is not None and check.refusal is not None:
            raise check.refusal
        raise failure

    async def _attempt_to_open_stream(
        self, url: URL, headers: Mapping[str, str], until: float
    ) -> aiohttp.ClientResponse:
        started = time.monotonic()
        seconds = _require_time_left(STREAM, until - started)
        secrets, code = self._secrets, "error"
        try:
            async with asyncio.timeout(seconds):
                response = await self._connect_stream(url, headers)
                code = CODES.get(response.status, "error")
                if response.status == http.HTTPStatus.OK:
                    return _require_event_stream(response)
                try:
                    answer = Response(
                        response.status, response.headers, await read_limited_body(response)
                    )
                finally:
                    response.close()
            failure = parse_error_answer(STREAM, answer, *secrets)
        except TRANSIENT as error:
            failure = make_no_answer_error(STREAM, error)
            code = error_code(error)
        finally:
            if self.on_request is not None:
                self.on_request(STREAM, code, time.monotonic() - started)
        raise failure

    async def _connect_stream(self, url: URL, headers: Mapping[str, str]) -> aiohttp.ClientResponse:
        return await self._connections.single_use.get(
            url,
            headers=CIMultiDict(self._headers, **headers),
            **self._request_options,
        )

    async def _exchange_request(
        self,
        endpoint: Endpoint[T],
        url: URL,
        body: bytes | None,
        options: CallOptions,
        check: RequestCheck | None,
    ) -> tuple[aiohttp.ClientResponse, bytes | OversizedBody]:
        data: object = check
        if check is None:
            # aiohttp sends a BytesIO in pieces. In one piece, a large body would block the loop.
            data = io.BytesIO(body) if body and len(body) > LARGE_BYTES else body
        # A caller's own aiohttp session does not use `CheckedRequest`, which makes a payload from a
        # `RequestCheck`. Make the payload here: it runs the check before it writes the body.
        elif self._given is not None:
            data = CheckedPayload(check, headers_first=True)
        connections = self._connections
        new = options.new_connection
        session = connections.single_use if new else connections.sessions[options.priority]
        response = await session.request(
            endpoint.method,
            url,
            data=data,
            headers=self._headers if body is None else self._json_headers,
            **self._request_options,
        )
        try:
            if check is not None and check.refusal is not None:
                # The lease check failed and the request was not sent, so the server has sent this
                # answer unasked: ignore it.
                raise NotSentError
            return response, await read_limited_body(response, endpoint.limit)
        finally:
            # After an error or a cancellation, the connection has unread bytes, and `release` then
            # closes it.
            if not response.closed:
                response.release()

    def _build_request_options(self) -> dict[str, Any]:
        """Return the aiohttp options of every request, without those that equal aiohttp's defaults.

        aiohttp processes each option in two functions, so fewer options cost less.
        """
        options: dict[str, Any] = {"allow_redirects": False}
        if self._given is not None:
            options |= {"timeout": ENDLESS, "raise_for_status": False}
        if self._connections.proxy is not None:
            options["proxy"] = self._connections.proxy
        if self._tls is not True:
            options["ssl"] = self._tls
        return options

    def _raise_wrong_loop(self) -> NoReturn:
        raise RuntimeError(
            "this WorkClient is not open: use it inside `async with`"
            if self._loop is None
            else "this WorkClient was opened on another event loop"
        )

    async def _renew_denied_token(self, refused: RefusedError, token: str, until: float) -> None:
        """Renew the token after a 401 or 403, so that the caller can repeat the refused request.

        `token` is the token of the refused request.

        Raises:
            RefusedError: `refused`, if its status is another one or there is no other token.
        """
        if refused.status not in _DENIED or not await self._renew_token(token, until):
            raise refused

    async def _renew_token(self, refused: str, until: float) -> bool:
        """Read the token again from its source; return whether it differs from `refused`.

        `refused` is the token that the control plane has refused.
        """
        if not self._renews:
            return False
        # A concurrent request may have renewed the token already.
        if self._token != refused:
            return True
        result = "error"
        try:
            async with asyncio.timeout(until - time.monotonic()):
                token = await self._source.read_current_credential(self._threads) or self._token
            result = "ok"
        except (SettingsError, TimeoutError):
            return False
        finally:
            if self.on_credential_refresh is not None:
                self.on_credential_refresh(result)
        if token != refused:
            self._set_headers(token)
            self._hide_secrets()
        return self._token != refused

    async def _read_connection_settings(self) -> tuple[str, str | None, ssl.SSLContext | bool]:
        """Check the settings of the connection; return token, API key and TLS context."""
        settings = self._settings

        def read_credentials() -> tuple[str, str | None, ssl.SSLContext | bool]:
            settings.require_connection()
            return settings.read_token(), settings.read_api_key(), settings.tls_context() or True

        files = (settings.token_file, settings.api_key_file)
        if not (any(files) or settings.ca_file or settings.client_cert_file):
            return read_credentials()  # no thread is needed, because no file is read
        try:
            async with asyncio.timeout(self._seconds):
                return await asyncio.get_running_loop().run_in_executor(
                    self._threads, read_credentials
                )
        except TimeoutError:
            names = "token_file, api_key_file, ca_file, client_cert_file"
            problem = f"{names}: could not be read in time"
        raise SettingsError((problem,))

    def _set_headers(self, token: str) -> None:
        """Build the headers that are passed with every request from now on."""
        # The token is passed with each request: aiohttp would send a session's default headers to
        # the proxy, too.
        headers = CIMultiDict(self._copy_headers_without_secrets() if self._given else ())
        if self._key_header is None:
            headers["Authorization"] = f"Bearer {token}"
        else:
            headers[self._key_header] = token
        extra = self._settings.extra_headers
        headers.update({name: value.get_secret_value() for name, value in extra.items()})
        self._token = token
        self._secrets = (token, *(value.get_secret_value() for value in extra.values()))
        self._headers = headers
        self._json_headers = CIMultiDict(headers, **{"Content-Type": "application/json"})

    def _hide_secrets(self) -> None:
        """Keep the token and the values of extra headers out of the log."""
        token, *values = self._secrets
        hide_token(token)
        for value in values:
            if len(value) >= HIDDEN_CHARACTERS:
                hide_token(value)

    def _copy_headers_without_secrets(self) -> dict[str, str]:
        """Return the request headers that contain no secrets.

        They are default headers of the aiohttp session, so a proxy receives them, too.
        """
        rules = DIALECTS[self._settings.dialect]
        headers = {
            "Accept": "application/json",
            "Accept-Encoding": "identity",  # answers are small: compression only costs CPU time
            "User-Agent": f"workpool/{_read_package_version()}",
            **rules.headers,
        }
        if self._worker_id is not None:
            headers[rules.worker_id_header] = self._worker_id
        return headers


def _require_event_stream(response: aiohttp.ClientResponse) -> aiohttp.ClientResponse:
    """Return the response, or raise an error if the response is no event stream.

    For example, a gateway may have answered with an HTML page and status 200.
    """
    if response.content_type == "text/event-stream":
        return response
    response.close()
    raise TransientError(STREAM, response.status, "not an event stream", reason="bad_body")


async def read_limited_body(
    response: aiohttp.ClientResponse, limit: int = ANSWER_LIMIT_BYTES
) -> bytes | OversizedBody:
    """Return the body of an answer, decompressed.

    If the body exceeds `limit`, return its beginning and close the connection.
    """
    length = response.content_length
    if length is not None and "Content-Encoding" not in response.headers:
        if 0 < length <= limit:
            # Most bodies arrive together with the headers, and are read without a wait.
            content = response.content
            return content.read_nowait() if content.is_eof() else await content.read()
        if length > limit:
            limit = BEGINNING_BYTES
    chunks: list[bytes] = []
    room = limit
    async for chunk in response.content.iter_any():
        chunks.append(chunk)
        room -= len(chunk)
        if room < 0:
            response.close()
            return OversizedBody(b"".join(chunks)[:BEGINNING_BYTES])
    return b"".join(chunks)


def _require_time_left(op: str, seconds: float) -> float:
    if seconds <= 0:
        raise TransientError(op, None, "no time left to send the request", reason="timeout")
    return seconds


@cache
def _read_package_version() -> str:
    return importlib.metadata.version("workpool")
