"""The injection of faults into requests to a control plane, and a log of all requests.

Owns when a fault is injected: by call, count, probability, predicate or time. The effects of faults
are in `actions`. If several rules match one request, their faults are nested; the first added one
is the outermost.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict, Unpack, get_args

import orjson
from aiohttp import web

from workpool.server.http.server_dialects import WORKER_ID_HEADERS
from workpool.testing.changes import WAIT_SECONDS, Changes

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from types import TracebackType
    from typing import Self

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

Op = Literal["poll", "ack", "heartbeat", "stop", "update", "get", "list", "stats", "session",
             "enqueue", "events", "send", "stream"]  # fmt: skip
_SUFFIXED = frozenset({"poll", "stats", "ack", "heartbeat", "stop"})


class Fault(Protocol):
    """A middleware: it may call `handler` for the true answer."""

    def __call__(self, request: web.Request, handler: Handler) -> Awaitable[web.StreamResponse]:
        """Answer the request."""


class Limits(TypedDict, total=False):
    """The conditions of a rule; all of them must hold."""

    times: int
    """The number of requests at most."""
    skip: int
    """The number of matching requests to skip first."""
    probability: float
    """The share of matching requests, drawn with the seed."""
    where: Callable[[web.Request], bool]
    """Returns whether the request matches."""
    between: tuple[float, float]
    """The window, in seconds since the first request."""


@dataclass(slots=True)
class Request:
    """One request that arrived.

    Attributes:
        work_id: The id of the item, for calls about one item.
        worker_id: The header `Worker-ID`.
        at: The time of its arrival, on the loop's clock.
        body: The JSON of the request; None without a body, or if a fault prevented reading it.
        status: The status of the answer; None until there is one.
        lost: The connection was closed before the answer.
    """

    op: Op
    work_id: str | None
    worker_id: str | None
    query: Mapping[str, str]
    at: float
    body: Any = None
    status: int | None = None
    lost: bool = False


@dataclass(eq=False)
class Rule:
    """A fault and its conditions. As a context manager, it is removed at the end of the block.

    Attributes:
        hits: Number of requests that it was injected into.
    """

    faults: Faults
    fault: Fault
    ops: frozenset[Op]
    limits: Limits
    hits: int = 0
    _met: int = field(default=0, repr=False)

    def applies(self, op: Op, request: web.Request) -> bool:
        """Return whether this fault applies to the request, and count the match."""
        limits = self.limits
        where, window = limits.get("where"), limits.get("between")
        if op not in self.ops or (where is not None and not where(request)):
            return False
        if window is not None and not window[0] <= self.faults.age() < window[1]:
            return False
        self._met += 1
        if self._met <= limits.get("skip", 0) or self.hits >= limits.get("times", self._met):
            return False
        if not self.faults.chance(limits.get("probability", 1.0)):
            return False
        self.hits += 1
        return True

    def remove(self) -> None:
        """Stop injecting the fault. Idempotent."""
        if self in self.faults.rules:
            self.faults.rules.remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


class Faults:
    """Faults of one control plane: `ControlPlane(middlewares=[faults.middleware])`.

    Attributes:
        seen: All requests in the order of arrival; empty without `remember`.
        rules: The current rules.
        seed: The seed of the probabilities. Print it if a test draws one at random.
    """

    def __init__(self, seed: int = 0, *, remember: bool = True) -> None:
        """`remember`: keep a log of the requests. It grows, so a server for days should not."""
        self.seen: list[Request] = []
        self.rules: list[Rule] = []
        self.seed = seed
        self._random = random.Random(seed)  # noqa: S311 - faults must be repeatable
        self._changes = Changes()
        self._remember = remember
        self._began: float | None = None

    def add(self, fault: Fault, *ops: Op, **limits: Unpack[Limits]) -> Rule:
        """Inject a fault into these calls (default: all) from now on."""
        rule = Rule(self, fault, frozenset(ops or get_args(Op)), limits)
        self.rules.append(rule)
        return rule

    def of(self, *ops: Op, work_id: str | None = None) -> list[Request]:
        """Return the requests so far of these calls (default: all), of one item or of all."""
        return [
            request
            for request in self.seen
            if (not ops or request.op in ops) and work_id in {None, request.work_id}
        ]

    async def wait_for(
        self,
        *ops: Op,
        work_id: str | None = None,
        count: int = 1,
        answered: bool = False,
        timeout: float = WAIT_SECONDS,
    ) -> Request:
        """Wait for the `count`-th request of these calls, or for its answer (`answered`).

        Raises:
            AssertionError: There was no such request in time.
        """

        def enough() -> list[Request] | None:
            found = self.of(*ops, work_id=work_id)
            if answered:
                found = [request for request in found if request.status is not None]
            return found if len(found) >= count else None

        names = "/".join(ops) or "any"
        found = await self._changes.until(
            enough,
            lambda: f"{count} × {names}; there was {[each.op for each in self.seen]}",
            timeout,
        )
        return found[count - 1]

    def age(self) -> float:
        """Seconds since the first request."""
        now = asyncio.get_running_loop().time()
        return now - (now if self._began is None else self._began)

    def chance(self, probability: float) -> bool:
        """Draw with the seed, but only if the probability leaves a choice."""
        return probability >= 1 or self._random.random() < probability

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Aiohttp middleware that injects the configured faults."""
        op = _op_of(request)
        if op is None:
            return await handler(request)
        seen = _note(op, request)
        if self._began is None:
            self._began = seen.at
        if self._remember:
            self.seen.append(seen)
        self._changes.notify()
        for rule in [rule for rule in self.rules if rule.applies(op, request)][::-1]:
            handler = partial(rule.fault, handler=handler)
        try:
            response = await handler(request)
            if request.transport is None or request.transport.is_closing():
                seen.lost = True
            else:
                seen.status = response.status
            return response
        finally:
            if request.body_exists and request.content.is_eof():
                seen.body = _json(await request.read())
            self._changes.notify()


def _op_of(request: web.Request) -> Op | None:
    match = request.match_info
    tail = request.path.rpartition("/")[2]
    op: Any
    if "session_id" in match:
        listed = "events" if request.method == "GET" else "send"
        op = {"events": listed, "stream": "stream", "archive": None}.get(tail, "session")
    elif tail == match.get("environment_id", tail):
        op = None  # a call of an application
    elif tail in _SUFFIXED:
        op = tail
    elif "work_id" in match:
        op = "get" if request.method == "GET" else "update"
    else:
        op = "list" if request.method == "GET" else "enqueue"
    return op if op in get_args(Op) else None


def _note(op: Op, request: web.Request) -> Request:
    headers = request.headers
    return Request(
        op,
        request.match_info.get("work_id"),
        next(filter(None, map(headers.get, WORKER_ID_HEADERS)), None),
        dict(request.query),
        asyncio.get_running_loop().time(),
    )


def _json(content: bytes) -> Any:
    try:
        return orjson.loads(content) if content else None
    except orjson.JSONDecodeError:
        return content
