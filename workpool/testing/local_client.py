"""A client that calls a control plane in the same process, without a network, for virtual time.

`LocalClient` replaces `WorkClient` and parses the same JSON. It injects faults into its calls.

    operations = Operations([environment_id], now=lambda: START + loop.machine_time())
    Supervisor(settings, connect=partial(LocalClient, operations, faults=script))
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import orjson

from workpool.errors import TransientError
from workpool.server import APIError, Poll
from workpool.server.http.server_dialects import QODER
from workpool.server.pagination import page_json
from workpool.server.state_machine import heartbeat_answer
from workpool.testing.fault import NO_FAULT, Fault, Op
from workpool.testing.fault_rules import Request
from workpool.testing.local_events import LocalEventCalls
from workpool.wire import endpoints
from workpool.wire.events.session_events import SessionEvents
from workpool.wire.http.call_options import CLAIM_OPTIONS, DEFAULT_OPTIONS, CallOptions, Priority
from workpool.wire.http.rate_limiter import RateLimits
from workpool.wire.protocol import (
    LIST_LIMIT_MAX,
    RECLAIM_OLDER_THAN_MS,
    TTL_DEFAULT_SECONDS,
    WORK_HEARTBEAT,
)
from workpool.wire.response import CODES, SUCCESS, Response, parse_error_answer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping
    from types import TracebackType

    from workpool.secret import Secret
    from workpool.server import Operations
    from workpool.settings import Settings
    from workpool.testing.fault import NoAnswer
    from workpool.wire.endpoints import Endpoint
    from workpool.wire.events.event_calls import SessionGuard
    from workpool.wire.items import Heartbeat, QueueStats, WorkItem

T = TypeVar("T")

WRITES: Final = frozenset({"ack", "stop", "update"})
"""The calls that the limit of writes applies to; a heartbeat never waits for it."""
_ABSENT: Final = "\x00"
"""Stands for the token that is removed from error messages; no message contains it."""
_ABOUT_SESSIONS: Final = frozenset({"events", "send", "stream"})


class FaultScript:
    """The faults for the first calls of each operation.

        FaultScript(heartbeat=[None, silence()], ack=[status(503)])

    The n-th fault is injected into the n-th call; None injects no fault.

    Attributes:
        sent: Every call so far: the operation, and the id of the item or None.
    """

    def __init__(self, **faults: Iterable[Fault | None]) -> None:
        self.sent: list[tuple[str, str | None]] = []
        self._faults = {op: iter(each) for op, each in faults.items()}

    def __call__(self, request: Request) -> Fault | None:
        """Record a call, and return its fault."""
        self.sent.append((request.op, request.work_id))
        return next(self._faults.get(request.op, iter(())), None)


class LocalClient:
    """A client (see `workpool.pool.client_protocol`) that calls `Operations` on the same loop.

    Args:
        operations: The operations of the control plane.
        settings: `environment_id` and `request_timeout` are used.
        faults: Called for every call; returns its fault.
        on_answer: Called with the status of every call that is answered, and with None for every
            call that has lost its connection.
        worker_id: The identity of the client.
    """

    def __init__(
        self,
        operations: Operations,
        settings: Settings,
        *,
        faults: Callable[[Request], Fault | None] | None = None,
        on_answer: Callable[[Request, int | None], None] | None = None,
        worker_id: str | None = None,
    ) -> None:
        self._operations = operations
        self._environment_id = str(settings.environment_id)
        self._timeout = settings.request_timeout
        self._faults = faults
        self._on_answer = on_answer
        self._open = False
        self.worker_id: str | None = worker_id or settings.worker_id
        self.rate_limits = RateLimits(0, 0)
        self.on_request: Callable[[str, str, float], None] | None = None
        self.on_rate_limit_wait: Callable[[Any, float], None] | None = None
        self.on_credential_refresh: Callable[[Any], None] | None = None

    async def __aenter__(self) -> LocalClient:
        """Open the client. A client that is not open raises a RuntimeError for each call."""
        self._open = True
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the client. Requests that it has sent still arrive at the control plane."""
        self._open = False

    def try_acquire_permit(self, priority: Priority) -> bool:
        """Acquire a permit for one write, without waiting; return whether it was available."""
        limiter = self.rate_limits.write
        return not limiter.limited or limiter.try_acquire(priority)

    async def acquire_permit(self, priority: Priority) -> None:
        """Wait for a permit for one write, without a time limit."""
        await self._acquire_write_permit(priority, None)

    def release_permit(self) -> None:
        """Give an unused permit back to the rate limiter."""
        if self.rate_limits.write.limited:
            self.rate_limits.write.refund()

    async def acquire_ack_permit(self) -> None:
        """Wait for a permit for one ack.

        Raises:
            TransientError: The wait exceeded the setting `request_timeout`.
        """
        await self._acquire_write_permit(Priority.CLAIM, self._timeout)

    def release_ack_permit(self) -> None:
        """Give an unused ack permit back to the rate limiter."""
        self.release_permit()

    async def poll(
        self,
        block_ms: int | None = None,
        reclaim_older_than_ms: int | None = None,
        *,
        timeout: float | None = None,
    ) -> WorkItem | None:
        """Poll for an item, as `WorkClient.poll` does."""
        window = RECLAIM_OLDER_THAN_MS if reclaim_older_than_ms is None else reclaim_older_than_ms
        poll = Poll(self.worker_id, block_ms or 0, window)
        request = self._new_request("poll", None)
        fault = self._fault_for_request(request)

        async def receive_answer() -> Response | NoAnswer:
            await asyncio.sleep(fault.wait + fault.request_delay)
            self._run_callback_before_arrival(request, fault)
            item = None
            if fault.applied:
                item = await self._operations.long_poll(
                    self._environment_id, poll, _client_is_never_gone
                )
            answer = run_operation_with_fault(
                fault, lambda: None if item is None else QODER.item_json(item)
            )
            if answer == "silence":
                await asyncio.Event().wait()
            await asyncio.sleep(compute_answer_delay(fault, answer))
            self._report_answer_status(request, answer)
            return answer

        seconds = self._timeout + poll.block_ms / 1000 if timeout is None else timeout
        return await self._await_answer(endpoints.POLL, receive_answer(), seconds)

    async def ack(
        self,
        work_id: str,
        *,
        permit: bool = False,
        timeout: float | None = None,
        options: CallOptions = CLAIM_OPTIONS,
    ) -> WorkItem:
        """Acknowledge an item, as `WorkClient.ack` does."""

        def answer_ack_call() -> object:
            return QODER.item_json(
                self._operations.ack_item(self._environment_id, work_id, self.worker_id)
            )

        options = options._replace(permit=permit or options.permit)
        item = await self._send_call(endpoints.ACK, work_id, answer_ack_call, timeout, options)
        return endpoints.check_item_id_of_answer(endpoints.ACK, work_id, item)

    async def heartbeat(
        self,
        work_id: str,
        expected: str | None = None,
        ttl: int | None = None,
        *,
        timeout: float | None = None,
        options: CallOptions = CLAIM_OPTIONS,
    ) -> Heartbeat:
        """Send a heartbeat, as `WorkClient.heartbeat` does."""

        def answer_heartbeat_call() -> object:
            item = self._operations.heartbeat(
                self._environment_id, work_id, expected, ttl or TTL_DEFAULT_SECONDS, self.worker_id
            )
            return {"type": WORK_HEARTBEAT, **heartbeat_answer(item, extended=True)}

        if self.rate_limits.write.limited:
            self.rate_limits.write.charge()
        return await self._send_call(
            endpoints.HEARTBEAT, work_id, answer_heartbeat_call, timeout, options
        )

    async def stop(
        self,
        work_id: str,
        force: bool = False,  # noqa: FBT001, FBT002 - as in WorkClient
        *,
        read_item: bool = True,
        timeout: float | None = None,
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> WorkItem | None:
        """Stop an item, as `WorkClient.stop` does."""

        def answer_stop_call() -> object:
            return QODER.item_json(
                self._operations.stop_item(
                    self._environment_id, work_id, self.worker_id, force=force
                )
            )

        stop = endpoints.STOP if read_item else endpoints.STOP_UNREAD
        return await self._send_call(stop, work_id, answer_stop_call, timeout, options)

    async def update_metadata(
        self,
        work_id: str,
        patch: Mapping[str, str | None],
        *,
        timeout: float | None = None,
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> WorkItem:
        """Merge metadata, as `WorkClient.update_metadata` does."""

        def answer_update_call() -> object:
            return QODER.item_json(
                self._operations.update_metadata(
                    self._environment_id, work_id, patch, self.worker_id
                )
            )

        return await self._send_call(
            endpoints.UPDATE, work_id, answer_update_call, timeout, options
        )

    async def get(
        self,
        work_id: str,
        *,
        timeout: float | None = None,
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> WorkItem:
        """Read an item, as `WorkClient.get` does."""

        def answer_get_call() -> object:
            return QODER.item_json(self._operations.get_item(self._environment_id, work_id))

        item = await self._send_call(endpoints.GET, work_id, answer_get_call, timeout, options)
        return endpoints.check_item_id_of_answer(endpoints.GET, work_id, item)

    async def list(
        self, *, limit: int | None = None, timeout: float | None = None
    ) -> AsyncGenerator[WorkItem, None]:
        """Iterate over the items of the environment, page by page."""
        left, after = sys.maxsize if limit is None else limit, ""
        while left > 0:
            size = min(left, LIST_LIMIT_MAX)

            def answer_list_call(size: int = size, after: str = after) -> object:
                page = self._operations.list_items(self._environment_id, size, after=after)
                return page_json(page, QODER.item_json)

            page = await self._send_call(endpoints.LIST, None, answer_list_call, timeout)
            for item in page.items:
                yield item
            if page.next_page is None:
                return
            left, after = left - len(page.items), page.items[-1].id

    def events(
        self, session_id: str, *, token: Secret | None = None, guard: SessionGuard | None = None
    ) -> SessionEvents:
        """Return the events of a session, as `WorkClient.events` does."""
        del token
        return SessionEvents(
            LocalEventCalls(self._operations, session_id, self._send_call), session_id, guard
        )

    async def stats(self) -> QueueStats:
        """Read the queue's statistics, as `WorkClient.stats` does."""

        def answer_stats_call() -> object:
            return self._operations.queue_stats(self._environment_id).to_json()

        return await self._send_call(endpoints.STATS, None, answer_stats_call, None)

    async def _send_call(
        self,
        endpoint: Endpoint[T],
        work_id: str | None,
        run_operation: Callable[[], object],
        timeout: float | None,
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> T:
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[Response | NoAnswer] = loop.create_future()
        request = self._new_request(endpoint.op, work_id)
        fault = self._fault_for_request(request)
        until = loop.time() + (self._timeout if timeout is None else timeout)
        await self._wait_for_permit_and_fault(endpoint.op, fault, options, until)
        if options.check is not None:
            options.check()
        self._record_sent_call(endpoint.op, work_id, fault)

        def deliver_request() -> None:
            self._run_callback_before_arrival(request, fault)
            answer = run_operation_with_fault(fault, run_operation)
            if answer != "silence":
                loop.call_later(compute_answer_delay(fault, answer), deliver_answer, answer)

        def deliver_answer(answer: Response | NoAnswer) -> None:
            self._report_answer_status(request, answer)
            if not answered.done():
                answered.set_result(answer)

        async def receive_answer() -> Response | NoAnswer:
            return await answered

        # From here on, the request arrives even if the caller is cancelled.
        self._schedule_request_delivery(fault.request_delay, deliver_request)
        return await self._await_answer(endpoint, receive_answer(), until - loop.time())

    async def _wait_for_permit_and_fault(
        self, op: str, fault: Fault, options: CallOptions, until: float
    ) -> None:
        """Wait for a permit of the client's rate limit, and for the seconds of `fault.wait`."""
        loop = asyncio.get_running_loop()
        if op in WRITES and not options.permit:
            await self._acquire_write_permit(options.priority, until - loop.time())
        if fault.wait:
            await asyncio.sleep(min(fault.wait, until - loop.time()))
            if loop.time() >= until:
                raise TransientError(op, None, "no answer in time", reason="timeout")

    async def _acquire_write_permit(self, priority: Priority, seconds: float | None) -> None:
        """Wait until the rate limit allows a write, for at most `seconds` (None: no limit)."""
        limiter = self.rate_limits.write
        if not limiter.limited or limiter.try_acquire(priority):
            return
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            async with asyncio.timeout(seconds):
                await limiter.acquire(priority)
        except TimeoutError:
            problem = "waited too long for the own rate limit"
            raise TransientError("permit", None, problem, reason="timeout") from None
        finally:
            if self.on_rate_limit_wait is not None:
                self.on_rate_limit_wait(limiter.kind, loop.time() - started)

    def _schedule_request_delivery(self, seconds: float, arrive: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_later(seconds, arrive)

    def _record_sent_call(self, op: str, work_id: str | None, fault: Fault) -> None:
        """Do nothing. A subclass overrides this method to record calls when they are sent."""

    def _new_request(self, op: str, subject: str | None) -> Request:
        if not self._open:
            raise RuntimeError("this LocalClient is not open: use it inside `async with`")
        work_id = None if op in _ABOUT_SESSIONS else subject
        now = asyncio.get_running_loop().time()
        return Request(cast("Op", op), work_id, self.worker_id, now)

    def _fault_for_request(self, request: Request) -> Fault:
        return (self._faults(request) if self._faults else None) or NO_FAULT

    def _run_callback_before_arrival(self, request: Request, fault: Fault) -> None:
        if fault.before is not None:
            fault.before(self._environment_id, request.work_id)

    def _report_answer_status(self, request: Request, answer: Response | NoAnswer) -> None:
        if self._on_answer is not None:
            self._on_answer(request, answer.status if isinstance(answer, Response) else None)

    async def _await_answer(
        self,
        endpoint: Endpoint[T],
        exchange: Coroutine[Any, Any, Response | NoAnswer],
        seconds: float,
    ) -> T:
        loop = asyncio.get_running_loop()
        started, code = loop.time(), "error"
        try:
            async with asyncio.timeout(seconds):
                answer = await exchange
            if not isinstance(answer, Response):
                raise TransientError(endpoint.op, None, "no answer: reset", reason="network")
            code = CODES.get(answer.status, "error")
        except TimeoutError:
            raise TransientError(endpoint.op, None, "no answer in time", reason="timeout") from None
        finally:
            if self.on_request is not None:
                self.on_request(endpoint.op, code, loop.time() - started)
        if answer.status in SUCCESS:
            return endpoint.parse_success_answer(answer.status, answer.body)
        raise parse_error_answer(endpoint.op, answer, _ABSENT)


def run_operation_with_fault(
    fault: Fault, run_operation: Callable[[], object]
) -> Response | NoAnswer:
    """Run an operation unless its fault prevents it; return the answer that the caller receives."""
    return fault.replace_answer(
        _make_operation_response(run_operation) if fault.applied else Response(502, {}, b"")
    )


def compute_answer_delay(fault: Fault, answer: Response | NoAnswer) -> float:
    """Return the seconds from the operation until the last byte of its answer arrives."""
    body = answer.body if isinstance(answer, Response) else b""
    return fault.answer_delay + fault.byte_seconds * len(body)


def _make_operation_response(run_operation: Callable[[], object]) -> Response:
    try:
        return Response(200, {}, orjson.dumps(run_operation()))
    except APIError as refusal:
        return Response(refusal.status, {}, orjson.dumps(refusal.to_envelope()))


def _client_is_never_gone() -> bool:
    return False
