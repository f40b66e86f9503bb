"""The simulated network, which delivers and records the calls of pools and injects faults."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from tests.simulation.simulated_machine import EVENT_LOOP, NETWORK, MultiMachineLoop
from tests.simulation.trace import LATENCY_SECONDS, DelayedCall, SentCall
from workpool.errors import ControlPlaneError, TransientError
from workpool.server import APIError, Poll
from workpool.server.http.server_dialects import QODER
from workpool.testing.fault import NO_FAULT, Fault, garbled, reset, silence, status
from workpool.testing.local_client import LocalClient, run_operation_with_fault
from workpool.wire import endpoints
from workpool.wire.http.call_options import DEFAULT_OPTIONS, CallOptions, Priority
from workpool.wire.http.credential_renewal import CredentialSource
from workpool.wire.http.rate_limiter import RateLimiter
from workpool.wire.http.resolver import ThreadedDnsResolver
from workpool.wire.protocol import RECLAIM_OLDER_THAN_MS

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping
    from random import Random

    from tests.simulation.schedule import Schedule
    from tests.simulation.simulated_machine import HaltKind
    from tests.simulation.trace import PoolProcess, Trace
    from workpool.server import Operations
    from workpool.settings import Settings
    from workpool.testing.fault import NoAnswer
    from workpool.testing.fault_rules import Request
    from workpool.wire.endpoints import Endpoint
    from workpool.wire.items import WorkItem
    from workpool.wire.response import Response

    Reply = Response | NoAnswer

T = TypeVar("T")

FADED_SECONDS: Final = 20.0
FADING: Final = frozenset({"heartbeat", "update", "stop"})
OUTLASTING_SHARE: Final = 0.5
SLEEPS: Final[tuple[HaltKind, ...]] = ("asleep", "paused")
PATIENCE_MS: Final = 8_000
"""Milliseconds that a poll waits: a shorter wait makes the simulation slower."""
OPTIONAL: Final = frozenset({"get", "update"})
"""Calls that a worker's key may not make."""
THREADS: Final[Any] = object()
"""Stands for an executor that belongs to the pool."""


class SimulatedNetwork:
    """The network between the pools and the control plane of one simulation.

    Attributes:
        healed: No more faults are injected.
        over: The simulation has ended; no call arrives.
        patience_ms: The longest wait of a poll, instead of `block_ms`.
        serving: Tasks of the control plane that answer polls.
    """

    def __init__(
        self, schedule: Schedule, random: Random, operations: Operations, trace: Trace
    ) -> None:
        self.operations = operations
        self.trace = trace
        self.healed = False
        self.over = False
        self.patience_ms = PATIENCE_MS
        self.serving: set[asyncio.Task[None]] = set()
        self._random = random
        self._share = schedule.fault_share
        self._kinds = schedule.fault_kinds

    def choose_fault_for_call(self, node: PoolProcess, op: str, work_id: str | None) -> Fault:
        """Return the fault of a call, or `node.no_fault`, which has only the usual latency."""
        if self.over:
            return SILENCE
        fault = None if self.healed else self._generate_fault(node, op)
        if fault is None:
            return node.no_fault
        self.trace.faults += 1
        if fault.wait and (work_id is not None or op == "list"):
            now = _current_loop().now
            self.trace.delays.append(DelayedCall(node, op, work_id, now, now + fault.wait))
        return fault

    def _generate_fault(self, node: PoolProcess, op: str) -> Fault | None:
        if _is_now_within_any_span(node.cuts):
            return SILENCE
        if op == "ack" and _is_now_within_any_span(node.denials):
            return FAULTS["403"]
        if not self._share or self._random.random() >= self._share:
            return None
        kind = self._random.choice(self._kinds)
        fault = generate_fault_of_kind(kind, self._random)
        if kind == "asleep" and op != "poll":
            # Halt the machine while the call waits in the client before it is sent.
            self._schedule_machine_halt(node, fault.wait / 2)
        elif kind == "drowsy":  # halt the machine while it processes the answer
            fault = self._halt_machine_when_answer_arrives(node, fault)
        # The fault `fading` delays the answer to this call, and then cuts the network for a while.
        elif kind == "fading" and op in FADING:
            now = _current_loop().now
            node.cuts.append((now + LATENCY_SECONDS, now + FADED_SECONDS))
        return fault

    def record_sent_call(
        self, node: PoolProcess, op: str, work_id: str | None, fault: Fault
    ) -> SentCall | None:
        """Record a call that is sent now."""
        if self.over:
            return None
        sent = SentCall(
            _current_loop().now, node, op, work_id, None if fault is node.no_fault else fault
        )
        self.trace.sent.append(sent)
        return sent

    def _halt_machine_when_answer_arrives(self, node: PoolProcess, fault: Fault) -> Fault:
        """Halt the machine as the answer arrives; sometimes delay the answer beyond the halt."""
        seconds, steps = fault.request_delay + fault.answer_delay, self._random.randint(0, 12)
        if self._random.random() < OUTLASTING_SHARE:
            length = self._schedule_machine_halt(node, seconds, steps, "paused")
            return replace(fault, answer_delay=length + self._random.uniform(0, 3))
        self._schedule_machine_halt(node, seconds, steps)
        return fault

    def _schedule_machine_halt(
        self, node: PoolProcess, seconds: float, steps: int = 0, how: HaltKind | None = None
    ) -> float:
        """Schedule a halt: after `seconds`, the machine halts once it has run `steps` callbacks.

        Returns:
            The length of the halt in seconds.
        """
        loop, length = _current_loop(), self._random.choice((5.0, 15.0, 40.0, 70.0))
        kind = self._random.choice(SLEEPS) if how is None else how

        def halt_machine() -> None:
            if not self.healed:
                node.machine.halt_after_number_of_callbacks(steps, kind, length)

        loop.call_at(loop.now + seconds, halt_machine, context=NETWORK)
        return length


def generate_fault_of_kind(kind: str, random: Random) -> Fault:
    """Generate the delays and the status of a fault of one of the kinds `schedule.FAULT_KINDS`."""
    match kind:
        case "wait" | "asleep":
            return _add_usual_latency(Fault(wait=random.uniform(0.05, 9.0)))
        case "late" | "fading":
            request_delay = random.uniform(0.01, 1.5)
            return Fault(request_delay=request_delay, answer_delay=random.uniform(0.01, 1.5))
        case "slow":
            seconds, first = random.uniform(1, 40), random.choice((True, False))
            slow = _add_usual_latency(NO_FAULT)
            return (
                replace(slow, request_delay=seconds)
                if first
                else replace(slow, answer_delay=seconds)
            )
        case "500":
            return _add_usual_latency(status(500, applied=random.choice((True, False))))
        case "503" | "429":
            return _add_usual_latency(
                status(int(kind), retry_after=random.choice((None, 0.5, 5.0, 40.0)))
            )
        case _:
            return FAULTS[kind]


def _add_usual_latency(fault: Fault) -> Fault:
    """Return the fault with the usual latency of requests and answers."""
    return replace(fault, request_delay=LATENCY_SECONDS, answer_delay=LATENCY_SECONDS)


FAULTS: Final = {
    kind: _add_usual_latency(fault)
    for kind, fault in {
        "drowsy": NO_FAULT,
        "silence": silence(applied=False),
        "silence-applied": silence(),
        "reset": reset(applied=False),
        "reset-applied": reset(),
        "garbled": garbled(applied=False),
        "garbled-applied": garbled(),
        "401": status(401),
        "403": status(403),
        "408": status(408),
    }.items()
}
"""The faults of a kind that are all alike."""
SILENCE: Final = FAULTS["silence"]


class SimulatedClient(LocalClient):
    """A client of one pool, whose calls pass through the simulated network.

    Like a client with an aiohttp session, it belongs to the event loop on which it was created. It
    reads its token and looks host names up with the code of the real client.
    """

    def __init__(self, network: SimulatedNetwork, node: PoolProcess, settings: Settings) -> None:
        super().__init__(network.operations, settings)
        self._network = network
        self._node = node
        self._sent: SentCall | None = None
        self._patch: Mapping[str, str | None] = {}
        self._event_loop = EVENT_LOOP.get()
        self._token_source = CredentialSource(lambda: "token", Path("token"))
        self._resolver = ThreadedDnsResolver(THREADS)
        self._connected = False
        self._work_id: str | None = None
        if rate := node.pool.write_rate:
            self.rate_limits.write = RateLimiter("write", rate, _current_loop().time)

    async def __aenter__(self) -> SimulatedClient:
        """Open the client, read its token, and record the pool's `worker_id`."""
        self._node.worker_id = self.worker_id or ""
        await super().__aenter__()
        await self._token_source.read_current_credential(THREADS)
        return self

    async def poll(
        self,
        block_ms: int | None = None,
        reclaim_older_than_ms: int | None = None,
        *,
        timeout: float | None = None,
    ) -> WorkItem | None:
        """Poll for an item. Cancelling this call does not stop a poll that was already sent."""
        del block_ms, timeout
        loop = _current_loop()
        self._node.polls += 1
        fault = self._fault_for_request(self._new_request("poll", None))
        if fault.wait:
            await asyncio.sleep(fault.wait)
        await self._open_connection("poll", None, DEFAULT_OPTIONS, self._timeout)
        self._record_sent_call("poll", None, fault)
        answered: asyncio.Future[Reply] = loop.create_future()
        window = RECLAIM_OLDER_THAN_MS if reclaim_older_than_ms is None else reclaim_older_than_ms
        poll = Poll(self.worker_id, self._network.patience_ms, window)
        travel = partial(self._create_poll_answer_task, poll, fault, answered)
        loop.call_at(loop.now + fault.request_delay, travel, context=NETWORK)

        async def receive_answer() -> Reply:
            return await answered

        return await self._await_answer(
            endpoints.POLL, receive_answer(), self._timeout + self._network.patience_ms / 1000
        )

    async def update_metadata(
        self,
        work_id: str,
        patch: Mapping[str, str | None],
        *,
        timeout: float | None = None,
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> WorkItem:
        """Update the metadata of an item, and record the patch."""

        def run_check_and_record_metadata() -> None:
            if options.check is not None:
                options.check()
            self._patch = dict(patch)  # `_record_sent_call` adds it to the record of this call

        noting = options._replace(check=run_check_and_record_metadata)
        return await super().update_metadata(work_id, patch, timeout=timeout, options=noting)

    def _create_poll_answer_task(
        self, poll: Poll, fault: Fault, answered: asyncio.Future[Reply]
    ) -> None:
        """Answer a poll that arrived, in a task of the control plane."""
        task = _current_loop().create_task(
            self._answer_poll(poll, fault, answered), context=NETWORK
        )
        self._network.serving.add(task)
        task.add_done_callback(self._network.serving.discard, context=NETWORK)

    async def _answer_poll(self, poll: Poll, fault: Fault, answered: asyncio.Future[Reply]) -> None:
        item = None
        if fault.applied:
            item = await self._operations.long_poll(
                self._environment_id, poll, lambda: self._poller_is_disconnected(answered)
            )
        reply = run_operation_with_fault(
            fault, lambda: None if item is None else QODER.item_json(item)
        )
        if reply != "silence":
            await asyncio.sleep(fault.answer_delay)
            if not answered.done():
                answered.set_result(reply)

    def _poller_is_disconnected(self, answered: asyncio.Future[Reply]) -> bool:
        return answered.cancelled() or self._node.machine.halted == "crashed"

    async def acquire_ack_permit(self) -> None:
        """Acquire an ack permit, and record the time."""
        await super().acquire_ack_permit()
        if self.rate_limits.write.limited:
            self._node.claim_permits.append(_current_loop().now)

    async def _acquire_write_permit(self, priority: Priority, seconds: float | None) -> None:
        began = _current_loop().now
        try:
            await super()._acquire_write_permit(priority, seconds)
        finally:
            if (now := _current_loop().now) > began and priority != Priority.CLAIM:
                self._network.trace.delays.append(DelayedCall(self._node, "", None, began, now))

    async def _send_call(
        self,
        endpoint: Endpoint[T],
        work_id: str | None,
        run_operation: Callable[[], object],
        timeout: float | None,
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> T:
        if self._node.pool.worker_key and endpoint.op in OPTIONAL:
            run_operation = _raise_permission_error
        return await super()._send_call(endpoint, work_id, run_operation, timeout, options)

    async def _wait_for_permit_and_fault(
        self, op: str, fault: Fault, options: CallOptions, until: float
    ) -> None:
        # Read `_work_id` before the first `await`. During a wait, another call may replace the
        # value that `_fault_for_request` stored for this call.
        work_id = self._work_id
        await super()._wait_for_permit_and_fault(op, fault, options, until)
        await self._open_connection(op, work_id, options, until - _current_loop().time())

    async def _open_connection(
        self, op: str, work_id: str | None, options: CallOptions, seconds: float
    ) -> None:
        """Look up the host name as for a new connection, unless a connection is open."""
        if self._connected and not options.new_connection:
            return
        began = _current_loop().now
        try:
            async with asyncio.timeout(seconds):
                await self._resolver.resolve("127.0.0.1")
        except TimeoutError:
            self._network.trace.delays.append(
                DelayedCall(self._node, op, work_id, began, _current_loop().now)
            )
            raise TransientError(op, None, "no answer in time", reason="timeout") from None
        self._connected = True

    def _schedule_request_delivery(self, seconds: float, arrive: Callable[[], None]) -> None:
        loop = _current_loop()
        loop.call_at(loop.now + seconds, arrive, context=NETWORK)

    def _fault_for_request(self, request: Request) -> Fault:
        if EVENT_LOOP.get() != self._event_loop:
            self._network.trace.misplaced.append((self._node, request.op, request.at))
            raise RuntimeError("the client belongs to another event loop")
        self._work_id = request.work_id
        return self._network.choose_fault_for_call(self._node, request.op, request.work_id)

    def _record_sent_call(self, op: str, work_id: str | None, fault: Fault) -> None:
        self._sent = self._network.record_sent_call(self._node, op, work_id, fault)
        if op == "update" and self._sent is not None:
            self._sent.patch = self._patch

    async def _await_answer(
        self, endpoint: Endpoint[T], exchange: Coroutine[Any, Any, Reply], seconds: float
    ) -> T:
        # Read `_sent` before the first `await`. During a wait, another call may replace the record
        # that `_record_sent_call` stored for this call.
        sent = self._sent
        answer: str | int | None = None
        try:
            value = await super()._await_answer(endpoint, exchange, seconds)
        except ControlPlaneError as error:
            answer = "lost" if isinstance(error, TransientError) else error.status
            raise
        else:
            answer = "ok"
            if sent is not None:
                sent.value = value
            return value
        finally:
            if sent is not None:
                sent.answer, sent.answered_at = answer, _current_loop().now


def _raise_permission_error() -> object:
    raise APIError(403, "a worker's key may not make this call")


def _is_now_within_any_span(times: list[tuple[float, float]]) -> bool:
    """Return whether one of the spans of time contains the current virtual time."""
    now = _current_loop().now
    return any(since <= now < until for since, until in times)


def _current_loop() -> MultiMachineLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, MultiMachineLoop)
    return loop
