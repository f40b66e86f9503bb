"""Fixtures of unit tests: leases, environment variables, configuration files, process signals."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import asynccontextmanager
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, TypeVarTuple

import pytest

from workpool import Settings
from workpool.cli.signal_recorder import SignalRecorder
from workpool.events import HeartbeatFinished
from workpool.pool.item_requests import HeartbeatSender, ItemSender
from workpool.pool.lease import Lease
from workpool.pool.lease_renewer import RenewerCallbacks
from workpool.pool.pool_item import PoolItem
from workpool.server import Operations, Poll
from workpool.testing.fault import Fault
from workpool.testing.local_client import FaultScript, LocalClient
from workpool.testing.loop_supervisor import ThreadlessLeaseRenewer
from workpool.testing.virtual_time import VirtualLoop
from workpool.wire.http.call_options import DEFAULT_OPTIONS, CallOptions, Priority

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from workpool.errors import LeaseRenewerError
    from workpool.events import Event
    from workpool.server import Record
    from workpool.testing.fault_rules import Request
    from workpool.wire.endpoints import Endpoint

ENVIRONMENT = "env_00000000000070008000000000000001"
START = 1_772_366_400.0
"""2026-03-01T12:00:00Z in epoch seconds."""

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class SentCall(NamedTuple):
    """The time and the operation of a call whose bytes were sent."""

    at: float
    op: str


class RecordingClient(LocalClient):
    """A client that records each call, and whose simulated rate limit delays every call.

    The testbed has the records, and the delay as `permit_seconds`.
    """

    def __init__(self, bench: LeaseTestbed, worker_id: str) -> None:
        super().__init__(
            bench.operations, bench.settings, faults=bench.fault_for_request, worker_id=worker_id
        )
        self._bench = bench

    def try_acquire_permit(self, priority: Priority) -> bool:
        del priority
        return not self._bench.permit_seconds

    async def acquire_permit(self, priority: Priority) -> None:
        del priority
        await asyncio.sleep(self._bench.permit_seconds)

    async def _send_call(
        self,
        endpoint: Endpoint[T],
        work_id: str | None,
        run_operation: Callable[[], object],
        timeout: float | None,
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> T:
        bench = self._bench
        bench.tries.append((endpoint.op, timeout, options))
        bench.in_flight += 1
        bench.peaks.append((bench.clock(), bench.in_flight))
        try:
            return await super()._send_call(endpoint, work_id, run_operation, timeout, options)
        finally:
            bench.in_flight -= 1

    def _record_sent_call(self, op: str, work_id: str | None, fault: Fault) -> None:
        del work_id, fault
        self._bench.sent.append(SentCall(self._bench.clock(), op))


class LeaseRenewerOnTestLoop(ThreadlessLeaseRenewer):
    """A lease renewer on the loop of the test, which checks its leases every second."""

    check_seconds = 1.0


class LeaseTestbed:
    """A control plane, a pool's client and lease renewer, and another worker, in virtual time.

    Attributes:
        ahead: Seconds by which the control plane's clock and the wall clock are ahead of the lease
            clock, as after a pause of the machine.
        latency: Seconds of each call without a scripted fault.
        permit_seconds: The seconds that each call for an item waits for the rate limit.
        sent: Each call of ours whose bytes were sent.
        tries: Each call of ours: its name, its timeout, its options.
        in_flight: The number of calls in flight.
        peaks: The start time of each call, and the number of calls in flight at that time.
        results: The time and the result of each heartbeat.
        changes: The time of each reported change of a lease, and the status of the lease.
        lost_at: The time of the first report of each lost lease, by work id.
    """

    def __init__(
        self, *, ttl: int = 60, request_timeout: float = 10.0, **faults: list[Fault | None]
    ) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self.loop = loop
        self.clock: Callable[[], float] = loop.machine_time
        self.ahead = self.latency = self.permit_seconds = 0.0
        self.sent: list[SentCall] = []
        self.tries: list[tuple[str, float | None, CallOptions]] = []
        self.in_flight = 0
        self.peaks: list[tuple[float, int]] = []
        self.results: list[tuple[float, HeartbeatFinished]] = []
        self.changes: list[tuple[float, str]] = []
        self.lost_at: dict[str, float] = {}
        self.script = FaultScript(**faults)
        self.operations = Operations(
            [ENVIRONMENT], now=lambda: START + self.wall_clock(), history_limit=None
        )
        self.settings = Settings(
            environment_id=ENVIRONMENT,
            base_url="http://127.0.0.1:1",
            token=ENVIRONMENT,
            lease_ttl=ttl,
            request_timeout=request_timeout,
        )
        self.client = self.open_client()
        self.rival = LocalClient(self.operations, self.settings, worker_id="rival")
        self.renewer = LeaseRenewerOnTestLoop(
            self.settings,
            self.clock,
            self.wall_clock,
            self.open_client,
            RenewerCallbacks(
                self.record_event,
                self.record_lease_change,
                self.fail_on_renewer_error,
                self.fail_on_renewer_error,
            ),
        )
        self.optional = self.renewer.optional
        self.heartbeats = HeartbeatSender(
            self.client, self.clock, self.renewer.pauses, self.record_event
        )
        self.sender = ItemSender(
            self.client,
            self.clock,
            request_timeout,
            self.renewer.pauses,
            self.renewer.request_lease_check,
        )

    def open_client(self) -> RecordingClient:
        return RecordingClient(self, "ours")

    def wall_clock(self) -> float:
        return self.clock() + self.ahead

    def fault_for_request(self, request: Request) -> Fault | None:
        return self.script(request) or Fault(
            request_delay=self.latency / 2, answer_delay=self.latency / 2
        )

    def record_event(self, event_type: Callable[[*Ts], Event], /, *values: *Ts) -> None:
        event = event_type(*values)
        if isinstance(event, HeartbeatFinished):
            self.results.append((self.clock(), event))

    def record_lease_change(self, item: PoolItem) -> None:
        self.changes.append((self.clock(), item.lease.status))
        if item.lease.status == "lost":
            self.lost_at.setdefault(item.id, self.clock())
        item.notify_waiters()
        if item.lease.status != "held":
            self.sender.abort_waits_for_answers(item)

    def fail_on_renewer_error(self, error: LeaseRenewerError | None) -> None:
        raise AssertionError(error)

    @asynccontextmanager
    async def opened_clients(self) -> AsyncIterator[None]:
        """Keep the clients of both workers and the renewer open during the `async with` block."""
        async with self.client, self.rival, self.renewer:
            yield

    async def claim_item(self) -> PoolItem:
        """Create an item and acknowledge it without sending a heartbeat."""
        self.operations.enqueue(ENVIRONMENT)
        return await self.claim_queued_item()

    async def claim_queued_item(self) -> PoolItem:
        """Poll and acknowledge the next item of the queue without sending a heartbeat."""
        delivered = await self.client.poll()
        assert delivered is not None
        acked_at = self.clock()
        item = PoolItem(await self.client.ack(delivered.id), None, copy_context(), acked_at)
        item.advance_state("slot")
        item.advance_state("acknowledged")
        settings = self.settings
        item.lease = Lease(
            item.work_item,
            acked_at,
            ttl=settings.lease_ttl,
            request_timeout=settings.request_timeout,
        )
        self.sent.clear()
        self.tries.clear()
        return item

    async def send_first_heartbeat(self, item: PoolItem) -> Lease:
        """Send the first heartbeat and give the lease to the renewer, which extends it."""
        lease = item.lease
        await self.heartbeats.send_heartbeat(lease)
        self.renewer.add_lease(lease, item)
        return lease

    @asynccontextmanager
    async def renewed_lease(self) -> AsyncIterator[Lease]:
        """Open the clients and yield the lease of a new item, which the renewer extends."""
        async with self.opened_clients():
            yield await self.send_first_heartbeat(await self.claim_item())

    @asynccontextmanager
    async def running_handler(self, item: PoolItem) -> AsyncIterator[None]:
        """Run a handler task of the item until the `async with` block ends."""
        item.handler_task = task = self.loop.create_task(asyncio.sleep(1e9))
        try:
            yield
        finally:
            task.cancel()

    def claim_as_other_worker(self, work_id: str) -> None:
        """Claim queued items as the worker `rival`, up to and including the item `work_id`."""
        while (item := self.operations.poll(ENVIRONMENT, Poll("rival", 0, 0))) is not None:
            self.operations.ack_item(ENVIRONMENT, item.id, "rival")
            self.operations.heartbeat(ENVIRONMENT, item.id, None, 600, "rival")
            if item.id == work_id:
                return
        raise AssertionError("it is not in the queue")

    def get_send_times(self, op: str) -> list[float]:
        return [each.at for each in self.sent if each.op == op]

    def heartbeat_results(self) -> list[str]:
        return [event.result for _, event in self.results]

    def item_history(self, item: Any, kind: str) -> list[Record]:
        return [
            each for each in self.operations.history.records_of_item(item.id) if each.kind == kind
        ]


@pytest.fixture
def make_testbed() -> type[LeaseTestbed]:
    """Return the class `LeaseTestbed`, because a test must instantiate it in virtual time."""
    return LeaseTestbed


@pytest.fixture
def environment_without_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the environment variables that settings read."""
    for name in list(os.environ):
        if name.upper().startswith(("WORKPOOL_", "QODER_PAT", "ANTHROPIC_")):
            monkeypatch.delenv(name)


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that writes a configuration file and returns its path."""

    def write_config_file(text: str) -> Path:
        path = tmp_path / "workpool.toml"
        path.write_text(text)
        return path

    return write_config_file


@pytest.fixture
def signal_recorder() -> Iterator[SignalRecorder]:
    """Return a signal recorder that is installed before the loop exists, as in a worker."""
    recorder = SignalRecorder()
    former = recorder.install_handlers()
    yield recorder
    for number, handler in former.items():
        signal.signal(number, handler)
