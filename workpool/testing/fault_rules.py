"""The rules that select the calls into which a fault is injected, and a log of all calls.

A rule selects calls by operation, count, probability, predicate or time. `fault` has the effects of
faults. If several rules match one call, their faults are nested: the fault of the first added rule
is the outermost.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, get_args

import orjson
from aiohttp import web

from workpool.testing.bounded_wait import VIRTUAL_WAIT_SECONDS, WAIT_SECONDS, BoundedCondition
from workpool.testing.fault import Fault, Op, combine_faults
from workpool.testing.http_faults import (
    answer_with_fault,
    find_operation_of_request,
    find_worker_id_of_request,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from types import TracebackType
    from typing import Self

    from workpool.testing.http_faults import FaultMiddleware

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class RuleLimits(TypedDict, total=False):
    """The conditions under which a rule injects its fault into a call; all of them must hold."""

    times: int
    """The largest number of requests that get the fault."""
    skip: int
    """The number of matching requests to skip first."""
    probability: float
    """The share of matching requests, drawn with the seed."""
    where: Callable[[Request], bool]
    """Returns whether the request matches."""
    between: tuple[float, float]
    """The window, in seconds since the first request."""


@dataclass(slots=True)
class Request:
    """The record of one call: an HTTP request, or a call of a `LocalClient`.

    Attributes:
        work_id: The id of the item, for calls about one item.
        worker_id: The header `Worker-ID`.
        at: The time of its arrival, on the loop's clock.
        headers: All headers. Empty in one process, like `query` and `body`.
        body: The JSON of the request; None without a body, or if a fault prevented reading it.
        status: The status of the answer; None before the answer.
        lost: The connection was closed before the answer, or there is no answer.
    """

    op: Op
    work_id: str | None
    worker_id: str | None
    at: float
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: Any = None
    status: int | None = None
    lost: bool = False


@dataclass(eq=False)
class Rule:
    """A fault and the conditions under which it is injected.

    A rule is also a context manager: at the end of the block, the rule is removed.

    Attributes:
        hits: The number of requests into which the fault was injected.
    """

    faults: Faults
    fault: Fault | FaultMiddleware
    ops: frozenset[Op]
    limits: RuleLimits
    hits: int = 0
    _matches: int = field(default=0, repr=False)

    def applies(self, request: Request) -> bool:
        """Return whether the fault applies to the request, and add the request to the counts.

        The limits `skip` and `times` and the attribute `hits` depend on these counts.
        """
        limits = self.limits
        where, window = limits.get("where"), limits.get("between")
        if request.op not in self.ops or (where is not None and not where(request)):
            return False
        if (
            window is not None
            and not window[0] <= self.faults.seconds_since_first_request() < window[1]
        ):
            return False
        self._matches += 1
        if self._matches <= limits.get("skip", 0) or self.hits >= limits.get(
            "times", self._matches
        ):
            return False
        if not self.faults.draw_chance(limits.get("probability", 1.0)):
            return False
        self.hits += 1
        return True

    def remove(self) -> None:
        """Remove the rule, so that its fault is no longer injected."""
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
    """The faults to inject into the calls of one control plane, and a log of the calls.

    Use it as `ControlPlane(middlewares=[faults.middleware])`.

    Attributes:
        seen: All requests in the order of arrival; empty without `remember`.
        rules: The current rules.
        seed: The seed of the probabilities. Print it if a test draws one at random.
    """

    def __init__(self, seed: int = 0, *, remember: bool = True, over_http: bool = True) -> None:
        """Create an empty set of faults; `add` adds a rule.

        Args:
            seed: The seed of the probabilities.
            remember: Whether to log the requests. The log grows, so a server that runs for days
                should have none.
            over_http: Whether the control plane is called over HTTP, not in this process.
        """
        self.seen: list[Request] = []
        self.rules: list[Rule] = []
        self.seed = seed
        self._random = random.Random(seed)  # noqa: S311 - faults must be repeatable
        self._changes = BoundedCondition()
        self._remember = remember
        self._over_http = over_http
        self._began: float | None = None

    def add(self, fault: Fault | FaultMiddleware, *ops: Op, **limits: Unpack[RuleLimits]) -> Rule:
        """Inject a fault from now on into calls of the operations `ops`; without `ops`, into all.

        Raises:
            TypeError: The fault works on HTTP requests only, and the calls are made in one process.
        """
        if not self._over_http and not isinstance(fault, Fault):
            raise TypeError(f"{fault!r} works on HTTP requests, and virtual time has none")
        rule = Rule(self, fault, frozenset(ops or get_args(Op)), limits)
        self.rules.append(rule)
        return rule

    def of(self, *ops: Op, work_id: str | None = None) -> list[Request]:
        """Return the recorded requests of the operations `ops`, oldest first.

        Without `ops`, requests of all operations count. With `work_id`, only requests for this
        item count.
        """
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
        timeout: float | None = None,
    ) -> Request:
        """Return the `count`-th request of the operations `ops`, and wait for it if necessary.

        Args:
            ops: The operations; without arguments, all operations.
            work_id: Count only requests for this item.
            count: The number of the request, from 1.
            answered: Count only requests that were answered.
            timeout: Seconds to wait. None: 30 s, or a day of virtual time.

        Raises:
            AssertionError: There was no such request in time.
        """

        def find_requested_number_of_requests() -> list[Request] | None:
            found = self.of(*ops, work_id=work_id)
            if answered:
                found = [request for request in found if request.status is not None]
            return found if len(found) >= count else None

        names = "/".join(ops) or "any"
        if timeout is None:
            timeout = WAIT_SECONDS if self._over_http else VIRTUAL_WAIT_SECONDS
        found = await self._changes.wait_until(
            find_requested_number_of_requests,
            lambda: f"{count} × {names}; there was {[each.op for each in self.seen]}",
            timeout,
        )
        return found[count - 1]

    def seconds_since_first_request(self) -> float:
        """Return the seconds since the first recorded request; 0 if no request is recorded."""
        now = asyncio.get_running_loop().time()
        return now - (now if self._began is None else self._began)

    def draw_chance(self, probability: float) -> bool:
        """Return True with the given probability, from the seeded random numbers.

        A certain result (1) draws no number, so a rule without probability does not change the
        numbers of the other rules.
        """
        return probability >= 1 or self._random.random() < probability

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Aiohttp middleware that injects the configured faults."""
        op = find_operation_of_request(request)
        if op is None:
            return await handler(request)
        seen = Request(
            op,
            request.match_info.get("work_id"),
            find_worker_id_of_request(request),
            asyncio.get_running_loop().time(),
            dict(request.query),
            request.headers,
        )
        for rule in self._record_request(seen)[::-1]:
            handler = partial(answer_with_fault, rule.fault, handler=handler)
        try:
            response = await handler(request)
            if request.transport is None or request.transport.is_closing():
                seen.lost = True
            else:
                seen.status = response.status
            return response
        finally:
            if request.body_exists and request.content.is_eof():
                with suppress(ConnectionError):
                    seen.body = _parse_json(await request.read())
            self._changes.notify_all()

    def fault_for_call(self, request: Request) -> Fault:
        """Record a call of a `LocalClient`, and return the fault to inject into this call."""
        rules = self._record_request(request)
        return combine_faults([rule.fault for rule in rules if isinstance(rule.fault, Fault)])

    def record_answer_status(self, request: Request, status: int | None) -> None:
        """Record the status of the answer to a call of a `LocalClient`; None means no answer."""
        request.status, request.lost = status, status is None
        self._changes.notify_all()

    def _record_request(self, request: Request) -> list[Rule]:
        """Record a request, and return the rules that apply to it."""
        if self._began is None:
            self._began = request.at
        if self._remember:
            self.seen.append(request)
        self._changes.notify_all()
        return [rule for rule in self.rules if rule.applies(request)]


def _parse_json(content: bytes) -> Any:
    try:
        return orjson.loads(content) if content else None
    except orjson.JSONDecodeError:
        return content
