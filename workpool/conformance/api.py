"""Single requests to one environment of a control plane, with unparsed answers.

The suite compares answers as they were sent. The package's own client would hide differences.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import aiohttp
import orjson

from workpool.logs import hide_token, readable
from workpool.wire.client_dialects import DIALECTS
from workpool.wire.endpoints import ANSWER_LIMIT_BYTES
from workpool.wire.http.connection_errors import TRANSIENT
from workpool.wire.http.transport import read_limited_body
from workpool.wire.response import OversizedBody

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from workpool.wire.http.rate_limiter import RateLimits
    from workpool.wire.protocol import Dialect

A = TypeVar("A")

REQUEST_SECONDS: Final = 15.0
DETAIL_MAX: Final = 120
REFUSED: Final = frozenset(
    {
        HTTPStatus.UNAUTHORIZED,
        HTTPStatus.FORBIDDEN,
        HTTPStatus.METHOD_NOT_ALLOWED,
        HTTPStatus.NOT_IMPLEMENTED,
    }
)
"""Statuses of a call that the key may not make, or that the control plane does not have."""


class NoAnswerError(Exception):
    """A request got no answer. The message of this error has the reason, but not the token."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One complete answer of the control plane.

    Attributes:
        body: The parsed JSON; None if the body is empty or not JSON.
        content: The body's bytes.
    """

    status: int
    body: Any
    headers: Mapping[str, str]
    content: bytes = b""

    @property
    def ok(self) -> bool:
        """Whether the status of the answer is a success (2xx)."""
        return HTTPStatus.OK <= self.status < HTTPStatus.MULTIPLE_CHOICES

    @property
    def is_refused(self) -> bool:
        """Whether the credential may not make the call, or the control plane lacks the call."""
        unsupported = self.error.get("type") == "unsupported_capability"
        return self.status in REFUSED or (self.status == HTTPStatus.BAD_REQUEST and unsupported)

    @property
    def error(self) -> Mapping[str, Any]:
        """The object `error` in the body of an error; empty if the body has none."""
        error = self.body.get("error") if isinstance(self.body, dict) else None
        return error if isinstance(error, dict) else {}

    def get(self, name: str) -> Any:
        """Return a field of the JSON body; None if the body does not have the field."""
        return self.body.get(name) if isinstance(self.body, dict) else None

    def __str__(self) -> str:
        """Return the HTTP status and the error message, shortened and safe for a terminal."""
        message = self.error.get("message")
        detail = f" ({shorten_value_for_terminal(message)})" if isinstance(message, str) else ""
        return f"HTTP {self.status}{detail}"


def shorten_value_for_terminal(value: object) -> str:
    """Return a received value as text: shortened, escaped for a terminal, without tokens."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return readable(text, DETAIL_MAX)


class WorkCallClient(ABC, Generic[A]):
    """The work calls of one environment. Each call passes its `options` to aiohttp's request."""

    environment: str
    base_url: str

    @abstractmethod
    async def __call__(self, method: str, url: str, **options: Any) -> A:
        """Send one HTTP request, and return the answer."""

    def work_url(self, suffix: str = "", environment: str | None = None) -> str:
        """Return the URL of a work call: the URL of the queue, followed by `suffix`."""
        return f"{self.base_url}/environments/{environment or self.environment}/work{suffix}"

    async def poll(self, environment: str | None = None, **options: Any) -> A:
        """Send a poll, which asks for an item."""
        return await self("GET", self.work_url("/poll", environment), **options)

    async def ack(self, work_id: str, **options: Any) -> A:
        """Acknowledge an item."""
        return await self("POST", self.work_url(f"/{work_id}/ack"), **options)

    async def heartbeat(
        self, work_id: str, expected: str | None = None, ttl: object = None, **options: Any
    ) -> A:
        """Send a heartbeat; a parameter that is None is not sent."""
        params = {"expected_last_heartbeat": expected, "desired_ttl_seconds": ttl}
        query = {name: str(value) for name, value in params.items() if value is not None}
        return await self("POST", self.work_url(f"/{work_id}/heartbeat"), params=query, **options)

    async def stop(self, work_id: str, **options: Any) -> A:
        """Send a request that stops an item."""
        return await self("POST", self.work_url(f"/{work_id}/stop"), **options)

    async def update(self, work_id: str, **options: Any) -> A:
        """Update an item's metadata."""
        return await self("POST", self.work_url(f"/{work_id}"), **options)

    async def get(self, work_id: str, **options: Any) -> A:
        """Read an item."""
        return await self("GET", self.work_url(f"/{work_id}"), **options)


@dataclass(eq=False)
class WorkerApi(WorkCallClient[Answer]):
    """A worker that sends single requests to the work calls of one environment.

    Attributes:
        http: The session that sends the requests; stays open.
        base_url: The address of the control plane, with the dialect's prefix.
        dialect: The dialect of the headers and queries.
        environment: The environment's id.
        token: The bearer token; None: no token is sent.
        worker: The name of the worker; None: no name is sent.
        headers: Further headers of every request.
        limits: The rate limits of the suite; None: no limits.
    """

    http: aiohttp.ClientSession
    base_url: str
    dialect: Dialect
    environment: str
    token: str | None = field(default=None, repr=False)
    worker: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    limits: RateLimits | None = None

    def __post_init__(self) -> None:
        for secret in (self.token or "", *self.headers.values()):
            hide_token(secret)

    def copy_as_application(self, api_key: str) -> WorkerApi:
        """Return a copy that authenticates as an application, with the API key `api_key`."""
        header = DIALECTS[self.dialect].api_key_header
        if header is None:
            return replace(self, token=api_key)
        return replace(self, token=None, headers={**self.headers, header: api_key})

    def copy_as_worker(self, worker: str | None, token: str | None) -> WorkerApi:
        """Return a copy that sends requests with another worker name and token."""
        return replace(self, worker=worker, token=token)

    async def __call__(self, method: str, url: str, **options: Any) -> Answer:
        """Send one request and return the answer.

        Args:
            method: The HTTP method.
            url: The whole URL.
            options: Options of `aiohttp.ClientSession.request`, and `worker`: the worker name.

        Raises:
            NoAnswerError: The control plane did not answer within `REQUEST_SECONDS`.
        """
        async with self._send_request(method, url, options) as response:
            body = await read_limited_body(response)
            if isinstance(body, OversizedBody):
                raise NoAnswerError(f"an answer of more than {ANSWER_LIMIT_BYTES} bytes")
            return Answer(response.status, _parse_json(body), response.headers, body)

    async def open_stream(self, url: str) -> tuple[int, str]:
        """Open a stream, close it, and return its status and content type."""
        async with self._send_request("GET", url, {}) as response:
            response.close()
            return response.status, response.content_type

    @asynccontextmanager
    async def _send_request(
        self, method: str, url: str, options: dict[str, Any]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        rules = DIALECTS[self.dialect]
        headers = {**rules.headers, **self.headers, **options.pop("headers", {})}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        worker = options.pop("worker", self.worker)
        if worker is not None:
            headers[rules.worker_id_header] = worker
        if rules.work_query:
            url = f"{url}?{rules.work_query}"
        if self.limits is not None:
            limiter = self.limits.read if method == "GET" else self.limits.write
            if limiter.limited:
                await limiter.acquire()
        bound = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
        try:
            async with self.http.request(
                method, url, headers=headers, timeout=bound, allow_redirects=False, **options
            ) as response:
                yield response
        except TimeoutError:
            raise NoAnswerError(f"no answer within {REQUEST_SECONDS:.0f} s") from None
        except (*TRANSIENT, aiohttp.ClientError) as error:
            raise NoAnswerError(f"no answer: {type(error).__name__}") from None


def _parse_json(content: bytes) -> Any:
    try:
        return orjson.loads(content) if content else None
    except orjson.JSONDecodeError:
        return None
