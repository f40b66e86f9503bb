"""Handoffs of a lease to a child process, in every order of requests of parent and child.

In virtual time; the child is a second client of the same control plane. See
workpool/docs/architecture.md, "Handing an item off".
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from tests.simulation.finished_simulation import START
from tests.simulation.simulated_world import ENVIRONMENT
from workpool import LeaseLost, SessionEnded, Settings, handler
from workpool.errors import HandoverError, PreconditionError, TransientError
from workpool.events import HeartbeatFinished, ItemReclaimed, SessionFinished
from workpool.pool.handoff_child import HandoffChild
from workpool.server import Operations
from workpool.testing import Recorder
from workpool.testing.fault import Fault
from workpool.testing.local_client import LocalClient, Script
from workpool.testing.loop_supervisor import LoopSupervisor
from workpool.testing.virtual_time import VirtualLoop, in_virtual_time

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from workpool import Session
    from workpool.session import HandedLease
    from workpool.testing.fault_rules import Request

UNSENT = Fault(answer="silence", applied=False)
UNANSWERED = Fault(answer="silence")
GARBLED = Fault(answer=b"{")
BOUND = 60 - 6 - 15
"""Seconds after which a parent takes back an item with the default TTL of 60 s."""


class ChildInLoop(LoopSupervisor, HandoffChild):
    """The child's side of a handoff in virtual time."""


class HandoffTestbed:
    """One pool with one session, a child process, and the requests that both sent.

    Attributes:
        lease: The handed-off lease of the last handoff.
        sent: The pool's calls for the item, with their times.
    """

    def __init__(self, **faults: list[Fault | None]) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self.loop = loop
        self.operations = Operations(
            [ENVIRONMENT], now=lambda: START + loop.machine_time(), history_limit=None
        )
        self.recorder = Recorder()
        self.sent: list[tuple[float, str]] = []
        self.lease: HandedLease
        self.outcome = ""
        self._children: list[asyncio.Task[None]] = []
        self._script = Script(**faults)
        (item,) = self.operations.enqueue(ENVIRONMENT)
        self.work_id = item.id

    async def run_handler(
        self,
        handle: Callable[[Session], Awaitable[Any]],
        meanwhile: Callable[[LoopSupervisor], Awaitable[None]] | None = None,
        **values: Any,
    ) -> str:
        """Run a pool with this handler until its session has ended; return the outcome."""

        @handler
        async def work(session: Session) -> Any:
            return await handle(session)

        settings = Settings(
            environment_id=ENVIRONMENT, token=ENVIRONMENT, stats_interval=0, **values
        )
        connect = partial(LocalClient, self.operations, faults=self._note_request)
        pool = LoopSupervisor(settings, plugins=[work, self.recorder], connect=connect)
        child = LocalClient(self.operations, settings, worker_id="child")
        async with child as self.child, asyncio.TaskGroup() as self.group, pool as self.pool:
            if meanwhile is not None:
                await meanwhile(pool)
            finished = await self.recorder.wait_for(SessionFinished, timeout=900)
            assert pool.status().running == 0
            await asyncio.sleep(5)  # wait for all requests in progress
        return finished.outcome

    def _note_request(self, request: Request) -> Fault | None:
        if request.work_id is not None:
            self.sent.append((self.loop.time(), request.op))
        return self._script(request)

    def start_child(self, after: float = 0.0) -> None:
        """Start a child that sends its first heartbeat after this number of seconds."""

        async def start_later() -> None:
            await asyncio.sleep(after)
            await self.send_child_heartbeat()

        self._children.append(self.group.create_task(start_later()))

    async def send_child_heartbeat(self) -> None:
        """Send the child's first heartbeat."""
        await self.child.heartbeat(self.work_id, self.lease.last_heartbeat, self.lease.ttl)

    async def is_child_refused(self) -> bool:
        """Return whether the child's first heartbeat is refused."""
        with pytest.raises(PreconditionError):
            await self.send_child_heartbeat()
        return True

    def metric_value(self, name: str, **labels: str) -> float | None:
        labels["environment_id"] = ENVIRONMENT
        return self.pool.registry.get_sample_value(f"workpool_{name}", labels)

    def stop_by_operator(self, *, force: bool = False) -> None:
        """Stop the item as an operator does."""
        self.operations.stop_item(ENVIRONMENT, self.work_id, "operator", force=force)

    @property
    def request_names(self) -> list[str]:
        return [op for _, op in self.sent]

    def requests_since(self, moment: float) -> list[str]:
        return [op for at, op in self.sent if at > moment]

    @property
    def item(self) -> Any:
        return self.operations.get_item(ENVIRONMENT, self.work_id)


# Handoffs to a child that starts.


@in_virtual_time
@pytest.mark.parametrize("after", [0.0, 3.0, BOUND - 2])
async def test_first_heartbeat_of_child_takes_the_item_over(after: float) -> None:
    bench = HandoffTestbed()
    left_at = 0.0

    async def handle(session: Session) -> dict[str, str]:
        nonlocal left_at
        async with session.handover() as bench.lease:
            assert bench.metric_value("leases", state="active") == 1
            bench.start_child(after)
        left_at = bench.loop.time()
        assert bench.metric_value("leases", state="active") == 0
        with pytest.raises(SessionEnded):
            await session.update_metadata({"a": "b"})
        return {"ignored": "yes"}

    assert await bench.run_handler(handle) == "detached"
    assert after <= left_at <= after + 2
    labels = {"handler": "work.work", "outcome": "detached"}
    assert bench.metric_value("sessions_total", **labels) == 1
    assert bench.lease.work_id == bench.work_id
    assert bench.lease.environment_id == ENVIRONMENT
    assert bench.lease.ttl == 60
    # the first heartbeat, and a new one before the handoff
    assert bench.request_names.count("heartbeat") == 2
    assert set(bench.requests_since(0)) <= {"get"}
    assert (bench.item.state, dict(bench.item.metadata)) == ("active", {})
    assert bench.recorder.of(ItemReclaimed) == []


@in_virtual_time
async def test_parent_sends_nothing_for_item_inside_handoff_block() -> None:
    bench = HandoffTestbed()

    async def handle(session: Session) -> None:
        async with session.handover() as bench.lease:
            entered = bench.loop.time()
            with pytest.raises(LeaseLost):
                await session.update_metadata({"a": "b"})
            with pytest.raises(LeaseLost):
                await session.handover().__aenter__()
            await asyncio.sleep(BOUND - 4)
            assert bench.requests_since(entered) == []
            await bench.send_child_heartbeat()

    assert await bench.run_handler(handle) == "detached"


@in_virtual_time
async def test_write_in_progress_is_cancelled_when_handoff_begins() -> None:
    bench = HandoffTestbed(update=[UNSENT])

    async def handle(session: Session) -> None:
        async def write_metadata() -> None:
            with pytest.raises(LeaseLost):
                await session.update_metadata({"a": "b"})

        async with asyncio.TaskGroup() as group:
            group.create_task(write_metadata())
            await asyncio.sleep(1)
            async with session.handover() as bench.lease:
                assert bench.loop.time() == 1
                bench.start_child()

    assert await bench.run_handler(handle) == "detached"
    assert bench.item.metadata == {}


@in_virtual_time
async def test_handoff_block_starts_after_heartbeat_in_progress() -> None:
    """Parent and child must not both have a heartbeat in flight."""
    bench = HandoffTestbed(heartbeat=[None, Fault(request_delay=4, answer_delay=4)])

    async def handle(session: Session) -> None:
        # a heartbeat is due after a third of 60 s less jitter, so one is in flight
        await asyncio.sleep(21)
        assert bench.request_names.count("heartbeat") == 2
        async with session.handover() as bench.lease:
            assert bench.loop.time() > 25
            assert bench.request_names.count("heartbeat") == 2
            bench.start_child()

    assert await bench.run_handler(handle) == "detached"


@in_virtual_time
async def test_heartbeat_in_doubt_is_resolved_before_child_starts() -> None:
    """The heartbeat was applied and its answer lost: the child must expect the new value."""
    bench = HandoffTestbed(heartbeat=[None, UNANSWERED])

    async def handle(session: Session) -> None:
        async with session.handover() as bench.lease:
            bench.start_child()

    assert await bench.run_handler(handle) == "detached"
    assert "recovered" in [event.result for event in bench.recorder.of(HeartbeatFinished)]


@in_virtual_time
@pytest.mark.parametrize("end", ["stopped", "lapsed"])
async def test_child_process_that_ended_before_parent_checked_it_is_treated_as_lease_owner(
    end: str,
) -> None:
    bench = HandoffTestbed()

    async def handle(session: Session) -> None:
        async with session.handover() as bench.lease:
            if end == "stopped":
                await bench.send_child_heartbeat()
                await bench.child.stop(bench.work_id, force=True)
            else:
                await bench.child.heartbeat(bench.work_id, bench.lease.last_heartbeat, 10)
                await asyncio.sleep(10.5)

    assert await bench.run_handler(handle, reclaim_older_than_ms=60_000) == "detached"
    assert bench.request_names == ["ack", "heartbeat", "heartbeat", "get"]


@in_virtual_time
async def test_child_that_starts_at_last_moment_keeps_item() -> None:
    """The parent's refused heartbeat means that the child holds the item, not that the lease is
    lost.
    """
    bench = HandoffTestbed(get=[UNSENT] * 5)

    async def handle(session: Session) -> None:
        async with session.handover() as bench.lease:
            bench.start_child(BOUND - 0.1)

    assert await bench.run_handler(handle) == "detached"
    heartbeats = [event.result for event in bench.recorder.of(HeartbeatFinished)]
    assert heartbeats[-1] == "precondition"
    assert bench.item.state == "active"
    assert bench.recorder.of(ItemReclaimed) == []


@in_virtual_time
async def test_item_in_doubt_after_handoff_belongs_to_child() -> None:
    """The parent's heartbeat was applied and its answer lost; the item does not show its holder."""
    bench = HandoffTestbed(heartbeat=[None, None, GARBLED])

    async def handle(session: Session) -> None:
        async with session.handover() as bench.lease:
            pass

    assert await bench.run_handler(handle, reclaim_older_than_ms=60_000) == "detached"
    assert "stop" not in bench.request_names


@in_virtual_time
async def test_handoff_block_longer_than_time_limit_loses_no_lease() -> None:
    """A handler that starts its child slowly must not lose the item to an expired lease."""
    bench = HandoffTestbed()

    async def handle(session: Session) -> None:
        async def start_slowly() -> None:
            async with session.handover() as bench.lease:
                await asyncio.sleep(300)
                assert await bench.is_child_refused()

        with pytest.raises(HandoverError):
            await start_slowly()

    assert await bench.run_handler(handle) == "completed"


# Handoffs whose child does not start.


@in_virtual_time
async def test_handoff_without_child_returns_item_to_parent() -> None:
    bench = HandoffTestbed()

    async def handle(session: Session) -> dict[str, str]:
        with pytest.raises(HandoverError) as caught:
            async with session.handover() as bench.lease:
                pass
        assert caught.value.work_id == bench.work_id
        assert bench.loop.time() == pytest.approx(BOUND, abs=0.1)
        assert await bench.is_child_refused()
        await session.update_metadata({"a": "b"})
        await asyncio.sleep(100)  # the lease is renewed as before the handoff
        return {"c": "d"}

    assert await bench.run_handler(handle) == "completed"
    assert dict(bench.item.metadata) == {"a": "b", "c": "d"}


@in_virtual_time
async def test_second_handoff_after_failed_one_can_succeed() -> None:
    bench = HandoffTestbed()

    async def handle(session: Session) -> None:
        with pytest.raises(HandoverError):
            async with session.handover() as bench.lease:
                pass
        async with session.handover() as bench.lease:
            bench.start_child()

    assert await bench.run_handler(handle) == "detached"


@in_virtual_time
async def test_failed_handoff_fails_session() -> None:
    bench = HandoffTestbed()

    async def handle(session: Session) -> None:
        async with session.handover() as bench.lease:
            pass

    assert await bench.run_handler(handle) == "failed"
    assert bench.item.metadata == {"workpool.error": "HandoverError"}


@in_virtual_time
@pytest.mark.parametrize("came", [False, True])
async def test_exception_in_handoff_block_returns_item_unless_child_has_it(came: bool) -> None:  # noqa: FBT001 - a parameter of the test
    bench = HandoffTestbed()

    async def handle(session: Session) -> None:
        async with session.handover() as bench.lease:
            if came:
                await bench.send_child_heartbeat()
            raise ValueError("cannot start it")

    assert await bench.run_handler(handle) == ("detached" if came else "failed")
    assert ("stop" in bench.request_names) is not came
    assert bench.item.metadata == ({} if came else {"workpool.error": "ValueError"})
    assert bench.loop.time() < 10
    if not came:
        assert bench.item.state == "stopped"


@in_virtual_time
async def test_item_returns_to_parent_before_exception_leaves_handoff_block() -> None:
    bench = HandoffTestbed(heartbeat=[None, None, GARBLED])

    async def handle(session: Session) -> None:
        with pytest.raises(ValueError, match="cannot"):
            async with session.handover() as bench.lease:
                raise ValueError("cannot")
        with pytest.raises(SessionEnded):  # in doubt, the item belongs to the child
            await session.update_metadata({"a": "b"})

    assert await bench.run_handler(handle, reclaim_older_than_ms=60_000) == "detached"


# Handoffs that operators, drains or other workers interrupt.


@in_virtual_time
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("force", [False, True])
async def test_stop_by_operator_during_handoff_ends_session_at_once(
    force: bool,  # noqa: FBT001 - a parameter of the test
    inside: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    """A child must not start an item that was stopped."""
    bench = HandoffTestbed()

    async def handle(session: Session) -> None:
        async with session.handover() as bench.lease:
            if inside:
                bench.stop_by_operator(force=force)
            else:
                bench.loop.call_later(3, partial(bench.stop_by_operator, force=force))

    assert await bench.run_handler(handle) == "stopped"
    assert bench.loop.time() < 12
    assert bench.item.state == "stopped"
    assert ("stop" in bench.request_names) is not force


@in_virtual_time
async def test_handoff_of_session_with_stop_request_is_refused() -> None:
    bench = HandoffTestbed()

    async def handle(session: Session) -> None:
        bench.stop_by_operator()
        async with session.handover():
            raise AssertionError("the block was entered")

    assert await bench.run_handler(handle) == "stopped"
    assert bench.item.state == "stopped"


@in_virtual_time
@pytest.mark.parametrize("comes", [False, True])
async def test_drain_during_handoff_releases_item_that_no_child_has_taken(comes: bool) -> None:  # noqa: FBT001 - a parameter of the test
    bench = HandoffTestbed()
    entered = asyncio.Event()

    async def handle(session: Session) -> None:
        async with session.handover() as bench.lease:
            if comes:
                bench.start_child(3)
            entered.set()

    async def drain_pool(pool: LoopSupervisor) -> None:
        await entered.wait()
        began = bench.loop.time()
        await pool.drain(6)
        assert bench.loop.time() - began <= (5.1 if comes else 6.1)
        assert pool.abandoned == 0

    outcome = await bench.run_handler(handle, drain_pool, reclaim_older_than_ms=60_000)
    assert outcome == ("detached" if comes else "released")
    if not comes:
        assert bench.item.lease_end <= (START + 16.2) * 1_000_000  # 6 s, and the 10 s of a release


@in_virtual_time
async def test_session_timeout_during_handoff_returns_item_to_parent() -> None:
    bench = HandoffTestbed()

    async def handle(session: Session) -> None:
        async with session.handover() as bench.lease:
            pass

    assert await bench.run_handler(handle, session_timeout=5) == "timed_out"
    assert bench.item.state == "stopped"


@in_virtual_time
async def test_handler_cancelled_before_handoff_block_leaves_no_handoff() -> None:
    bench = HandoffTestbed(heartbeat=[None, Fault(request_delay=1, answer_delay=4)])

    async def handle(session: Session) -> None:
        async with session.handover():
            raise AssertionError("the block was entered")

    assert await bench.run_handler(handle, session_timeout=2) == "timed_out"
    assert bench.item.state == "stopped"


@in_virtual_time
@pytest.mark.parametrize("inside", [False, True])
async def test_lease_that_cannot_be_renewed_during_handoff_is_lost(inside: bool) -> None:  # noqa: FBT001 - a parameter of the test
    silence = [UNSENT] * 99
    bench = HandoffTestbed(heartbeat=[None, None, *silence], get=[*silence], stop=[*silence])

    async def handle(session: Session) -> None:
        async with session.handover():
            if inside:
                await asyncio.sleep(300)

    assert await bench.run_handler(handle, reclaim_older_than_ms=60_000) == "lease_lost"
    assert bench.requests_since(54) == []
    assert bench.recorder.of(ItemReclaimed) == []


@in_virtual_time
async def test_item_queued_again_during_handoff_without_child_is_lost() -> None:
    """The control plane ended the lease early, so neither parent nor child holds the item."""
    bench = HandoffTestbed()

    def expire_lease() -> None:
        queue = bench.operations.get_queue(ENVIRONMENT)
        queue.put_item(replace(queue.get_item(bench.work_id), lease_end=0))

    async def handle(session: Session) -> None:
        async with session.handover() as bench.lease:
            bench.loop.call_later(5, expire_lease)

    assert await bench.run_handler(handle, reclaim_older_than_ms=60_000) == "lease_lost"
    assert bench.recorder.of(ItemReclaimed)[0].stage == "run"


# The child's side up to its first heartbeat; the tests of `workpool hold` cover the rest.


async def run_child(
    bench: HandoffTestbed, **faults: list[Fault | None]
) -> tuple[ChildInLoop, list[str]]:
    """Hand the item off to a child with these faults; return the child and its outcomes."""

    @handler
    async def child_program(session: Session) -> None:
        await session.update_metadata({"by": "child"})

    recorder = Recorder()
    settings = Settings(environment_id=ENVIRONMENT, token=ENVIRONMENT, stats_interval=0)
    connect = partial(LocalClient, bench.operations, faults=Script(**faults))

    async def handle(session: Session) -> None:
        async with session.handover() as bench.lease:
            bench.group.create_task(wait_for_child())

    async def wait_for_child() -> None:
        lease = bench.lease
        child = ChildInLoop(
            settings,
            lease.work_id,
            lease.last_heartbeat,
            plugins=[child_program, recorder],
            connect=connect,
        )
        children.append(child)
        with suppress(TransientError):
            await child.run()

    children: list[ChildInLoop] = []
    bench.outcome = await bench.run_handler(handle, reclaim_older_than_ms=600_000)
    return children[0], [event.outcome for event in recorder.of(SessionFinished)]


@in_virtual_time
async def test_child_retries_while_parent_waits() -> None:
    bench = HandoffTestbed()
    fault = [Fault(answer=503, applied=False), GARBLED]
    _, outcomes = await run_child(bench, get=[*fault], heartbeat=[Fault(answer=429, applied=False)])
    assert (bench.outcome, outcomes) == ("detached", ["completed"])
    assert dict(bench.item.metadata) == {"by": "child"}


@in_virtual_time
async def test_child_that_cannot_read_item_leaves_it_to_parent() -> None:
    bench = HandoffTestbed()
    child, outcomes = await run_child(bench, get=[UNSENT] * 99)
    assert (bench.outcome, outcomes) == ("failed", [])
    assert child.status().error is not None


@in_virtual_time
async def test_child_with_an_unknown_heartbeat_result_leaves_item_alone() -> None:
    """The answer to the child's heartbeat was lost, so the applied one may be the parent's."""
    bench = HandoffTestbed()
    _, outcomes = await run_child(bench, heartbeat=[GARBLED])
    assert (bench.outcome, outcomes) == ("detached", ["detached"])
    assert bench.item.metadata == {}
