"""Handoffs of a lease to a child process, with the requests of both processes in every order.

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
from workpool.pool.handoff_child import HandoffChildSupervisor
from workpool.server import Operations
from workpool.testing import Recorder
from workpool.testing.fault import Fault
from workpool.testing.local_client import FaultScript, LocalClient
from workpool.testing.loop_supervisor import ThreadlessSupervisor
from workpool.testing.virtual_time import VirtualLoop, in_virtual_time

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from workpool import Session
    from workpool.session import HandedLease
    from workpool.testing.fault_rules import Request

UNSENT = Fault(answer="silence", applied=False)
UNANSWERED = Fault(answer="silence")
GARBLED = Fault(answer=b"{")
TAKE_BACK_SECONDS = 60 - 6 - 15
"""Seconds after which a parent takes back an item with the default TTL of 60 s."""


class HandoffChildInVirtualTime(ThreadlessSupervisor, HandoffChildSupervisor):
    """The supervisor of a child process, in virtual time."""


class HandoffTestbed:
    """One pool with one session, a client in place of the child process, and the pool's requests.

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
        self._script = FaultScript(**faults)
        (item,) = self.operations.enqueue(ENVIRONMENT)
        self.work_id = item.id

    async def run_handler(
        self,
        hand_off_item: Callable[[Session], Awaitable[Any]],
        meanwhile: Callable[[ThreadlessSupervisor], Awaitable[None]] | None = None,
        **values: Any,
    ) -> str:
        """Run a pool with the handler `hand_off_item` for one session; return its outcome."""

        @handler
        async def handler_under_test(session: Session) -> Any:
            return await hand_off_item(session)

        settings = Settings(
            environment_id=ENVIRONMENT, token=ENVIRONMENT, stats_interval=0, **values
        )
        connect = partial(LocalClient, self.operations, faults=self._record_request)
        pool = ThreadlessSupervisor(
            settings, plugins=[handler_under_test, self.recorder], connect=connect
        )
        child = LocalClient(self.operations, settings, worker_id="child")
        async with child as self.child, asyncio.TaskGroup() as self.group, pool as self.pool:
            if meanwhile is not None:
                await meanwhile(pool)
            finished = await self.recorder.wait_for(SessionFinished, timeout=900)
            assert pool.status().running == 0
            await asyncio.sleep(5)
        return finished.outcome

    def _record_request(self, request: Request) -> Fault | None:
        if request.work_id is not None:
            self.sent.append((self.loop.time(), request.op))
        return self._script(request)

    def start_child(self, after: float = 0.0) -> None:
        """Start a child that sends its first heartbeat after `after` seconds."""

        async def send_heartbeat_later() -> None:
            await asyncio.sleep(after)
            await self.send_child_heartbeat()

        self._children.append(self.group.create_task(send_heartbeat_later()))

    async def send_child_heartbeat(self) -> None:
        """Send the child's first heartbeat."""
        await self.child.heartbeat(self.work_id, self.lease.last_heartbeat, self.lease.ttl)

    async def is_child_heartbeat_refused(self) -> bool:
        """Return whether the child's first heartbeat is refused."""
        with pytest.raises(PreconditionError):
            await self.send_child_heartbeat()
        return True

    def read_metric_value(self, name: str, **labels: str) -> float | None:
        labels["environment_id"] = ENVIRONMENT
        return self.pool.registry.get_sample_value(f"workpool_{name}", labels)

    def stop_item_as_operator(self, *, force: bool = False) -> None:
        """Stop the item in the name of an operator, not of a worker."""
        self.operations.stop_item(ENVIRONMENT, self.work_id, "operator", force=force)

    @property
    def request_names(self) -> list[str]:
        return [op for _, op in self.sent]

    def request_names_sent_after(self, moment: float) -> list[str]:
        return [op for at, op in self.sent if at > moment]

    @property
    def current_item(self) -> Any:
        return self.operations.get_item(ENVIRONMENT, self.work_id)


@in_virtual_time
@pytest.mark.parametrize("after", [0.0, 3.0, TAKE_BACK_SECONDS - 2])
async def test_session_outcome_is_detached_after_first_heartbeat_of_child_process(
    after: float,
) -> None:
    testbed = HandoffTestbed()
    left_at = 0.0

    async def hand_off_item(session: Session) -> dict[str, str]:
        nonlocal left_at
        async with session.handover() as testbed.lease:
            assert testbed.read_metric_value("leases", state="active") == 1
            testbed.start_child(after)
        left_at = testbed.loop.time()
        assert testbed.read_metric_value("leases", state="active") == 0
        with pytest.raises(SessionEnded):
            await session.update_metadata({"a": "b"})
        return {"ignored": "yes"}

    assert await testbed.run_handler(hand_off_item) == "detached"
    assert after <= left_at <= after + 2
    labels = {"handler": "handler_under_test.handler_under_test", "outcome": "detached"}
    assert testbed.read_metric_value("sessions_total", **labels) == 1
    assert testbed.lease.work_id == testbed.work_id
    assert testbed.lease.environment_id == ENVIRONMENT
    assert testbed.lease.ttl == 60
    # The first heartbeat starts the lease, and the second one extends it before the handoff.
    assert testbed.request_names.count("heartbeat") == 2
    assert set(testbed.request_names_sent_after(0)) <= {"get"}
    assert (testbed.current_item.state, dict(testbed.current_item.metadata)) == ("active", {})
    assert testbed.recorder.of(ItemReclaimed) == []


@in_virtual_time
async def test_pool_sends_no_request_for_item_during_handoff() -> None:
    testbed = HandoffTestbed()

    async def hand_off_item(session: Session) -> None:
        async with session.handover() as testbed.lease:
            entered = testbed.loop.time()
            with pytest.raises(LeaseLost):
                await session.update_metadata({"a": "b"})
            with pytest.raises(LeaseLost):
                await session.handover().__aenter__()
            await asyncio.sleep(TAKE_BACK_SECONDS - 4)
            assert testbed.request_names_sent_after(entered) == []
            await testbed.send_child_heartbeat()

    assert await testbed.run_handler(hand_off_item) == "detached"


@in_virtual_time
async def test_metadata_write_in_progress_is_cancelled_when_handoff_begins() -> None:
    testbed = HandoffTestbed(update=[UNSENT])

    async def hand_off_item(session: Session) -> None:
        async def write_metadata() -> None:
            with pytest.raises(LeaseLost):
                await session.update_metadata({"a": "b"})

        async with asyncio.TaskGroup() as group:
            group.create_task(write_metadata())
            await asyncio.sleep(1)
            async with session.handover() as testbed.lease:
                assert testbed.loop.time() == 1
                testbed.start_child()

    assert await testbed.run_handler(hand_off_item) == "detached"
    assert testbed.current_item.metadata == {}


@in_virtual_time
async def test_handoff_begins_only_after_heartbeat_in_progress_is_answered() -> None:
    """Parent and child must not both have a heartbeat in flight."""
    testbed = HandoffTestbed(heartbeat=[None, Fault(request_delay=4, answer_delay=4)])

    async def hand_off_item(session: Session) -> None:
        # The second heartbeat is sent at most 20 s after the first one, so it is in flight now.
        await asyncio.sleep(21)
        assert testbed.request_names.count("heartbeat") == 2
        async with session.handover() as testbed.lease:
            assert testbed.loop.time() > 25
            assert testbed.request_names.count("heartbeat") == 2
            testbed.start_child()

    assert await testbed.run_handler(hand_off_item) == "detached"


@in_virtual_time
async def test_pool_finds_out_before_handoff_whether_unanswered_heartbeat_was_applied() -> None:
    """The child must send the time of the parent's last applied heartbeat, answered or not."""
    testbed = HandoffTestbed(heartbeat=[None, UNANSWERED])

    async def hand_off_item(session: Session) -> None:
        async with session.handover() as testbed.lease:
            testbed.start_child()

    assert await testbed.run_handler(hand_off_item) == "detached"
    assert "recovered" in [event.result for event in testbed.recorder.of(HeartbeatFinished)]


@in_virtual_time
@pytest.mark.parametrize("end", ["stopped", "lapsed"])
async def test_handoff_succeeds_if_child_ends_before_parent_reads_item(
    end: str,
) -> None:
    testbed = HandoffTestbed()

    async def hand_off_item(session: Session) -> None:
        async with session.handover() as testbed.lease:
            if end == "stopped":
                await testbed.send_child_heartbeat()
                await testbed.child.stop(testbed.work_id, force=True)
            else:
                await testbed.child.heartbeat(testbed.work_id, testbed.lease.last_heartbeat, 10)
                await asyncio.sleep(10.5)

    assert await testbed.run_handler(hand_off_item, reclaim_older_than_ms=60_000) == "detached"
    assert testbed.request_names == ["ack", "heartbeat", "heartbeat", "get"]


@in_virtual_time
async def test_child_process_that_starts_just_before_end_of_handoff_receives_item() -> None:
    """The parent's heartbeat is refused, and this does not count as a lost lease."""
    testbed = HandoffTestbed(get=[UNSENT] * 5)

    async def hand_off_item(session: Session) -> None:
        async with session.handover() as testbed.lease:
            testbed.start_child(TAKE_BACK_SECONDS - 0.1)

    assert await testbed.run_handler(hand_off_item) == "detached"
    heartbeats = [event.result for event in testbed.recorder.of(HeartbeatFinished)]
    assert heartbeats[-1] == "precondition"
    assert testbed.current_item.state == "active"
    assert testbed.recorder.of(ItemReclaimed) == []


@in_virtual_time
async def test_pool_does_not_stop_item_after_handoff_if_lease_owner_is_unknown() -> None:
    """The parent's last heartbeat has no answer, and the item does not show who holds it."""
    testbed = HandoffTestbed(heartbeat=[None, None, GARBLED])

    async def hand_off_item(session: Session) -> None:
        async with session.handover() as testbed.lease:
            pass

    assert await testbed.run_handler(hand_off_item, reclaim_older_than_ms=60_000) == "detached"
    assert "stop" not in testbed.request_names


@in_virtual_time
async def test_lease_does_not_expire_if_handoff_block_exceeds_its_time_limit() -> None:
    """A handler that starts its child slowly must not lose the item to an expired lease."""
    testbed = HandoffTestbed()

    async def hand_off_item(session: Session) -> None:
        async def hold_handoff_open() -> None:
            async with session.handover() as testbed.lease:
                await asyncio.sleep(300)
                assert await testbed.is_child_heartbeat_refused()

        with pytest.raises(HandoverError):
            await hold_handoff_open()

    assert await testbed.run_handler(hand_off_item) == "completed"


@in_virtual_time
async def test_item_returns_to_pool_if_handoff_starts_no_child_process() -> None:
    testbed = HandoffTestbed()

    async def hand_off_item(session: Session) -> dict[str, str]:
        with pytest.raises(HandoverError) as caught:
            async with session.handover() as testbed.lease:
                pass
        assert caught.value.work_id == testbed.work_id
        assert testbed.loop.time() == pytest.approx(TAKE_BACK_SECONDS, abs=0.1)
        assert await testbed.is_child_heartbeat_refused()
        await session.update_metadata({"a": "b"})
        await asyncio.sleep(100)  # longer than the TTL, so the pool must renew the lease
        return {"c": "d"}

    assert await testbed.run_handler(hand_off_item) == "completed"
    assert dict(testbed.current_item.metadata) == {"a": "b", "c": "d"}


@in_virtual_time
async def test_second_handoff_after_failed_one_can_succeed() -> None:
    testbed = HandoffTestbed()

    async def hand_off_item(session: Session) -> None:
        with pytest.raises(HandoverError):
            async with session.handover() as testbed.lease:
                pass
        async with session.handover() as testbed.lease:
            testbed.start_child()

    assert await testbed.run_handler(hand_off_item) == "detached"


@in_virtual_time
async def test_failed_handoff_fails_session() -> None:
    testbed = HandoffTestbed()

    async def hand_off_item(session: Session) -> None:
        async with session.handover() as testbed.lease:
            pass

    assert await testbed.run_handler(hand_off_item) == "failed"
    assert testbed.current_item.metadata == {"workpool.error": "HandoverError"}


@in_virtual_time
@pytest.mark.parametrize("came", [False, True])
async def test_exception_in_handoff_block_returns_item_unless_child_took_it(came: bool) -> None:  # noqa: FBT001 - a parameter of the test
    testbed = HandoffTestbed()

    async def hand_off_item(session: Session) -> None:
        async with session.handover() as testbed.lease:
            if came:
                await testbed.send_child_heartbeat()
            raise ValueError("cannot start it")

    assert await testbed.run_handler(hand_off_item) == ("detached" if came else "failed")
    assert ("stop" in testbed.request_names) is not came
    assert testbed.current_item.metadata == ({} if came else {"workpool.error": "ValueError"})
    assert testbed.loop.time() < 10
    if not came:
        assert testbed.current_item.state == "stopped"


@in_virtual_time
async def test_exception_in_handoff_block_is_raised_although_child_process_may_own_item() -> None:
    testbed = HandoffTestbed(heartbeat=[None, None, GARBLED])

    async def hand_off_item(session: Session) -> None:
        with pytest.raises(ValueError, match="cannot"):
            async with session.handover() as testbed.lease:
                raise ValueError("cannot")
        # The answer to the heartbeat was garbled, so the child may own the item.
        with pytest.raises(SessionEnded):
            await session.update_metadata({"a": "b"})

    assert await testbed.run_handler(hand_off_item, reclaim_older_than_ms=60_000) == "detached"


@in_virtual_time
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("force", [False, True])
async def test_stop_by_operator_during_handoff_ends_session_at_once(
    force: bool,  # noqa: FBT001 - a parameter of the test
    inside: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    """A child must not start an item that was stopped."""
    testbed = HandoffTestbed()

    async def hand_off_item(session: Session) -> None:
        async with session.handover() as testbed.lease:
            if inside:
                testbed.stop_item_as_operator(force=force)
            else:
                testbed.loop.call_later(3, partial(testbed.stop_item_as_operator, force=force))

    assert await testbed.run_handler(hand_off_item) == "stopped"
    assert testbed.loop.time() < 12
    assert testbed.current_item.state == "stopped"
    assert ("stop" in testbed.request_names) is not force


@in_virtual_time
async def test_handoff_of_session_with_stop_request_is_refused() -> None:
    testbed = HandoffTestbed()

    async def hand_off_item(session: Session) -> None:
        testbed.stop_item_as_operator()
        async with session.handover():
            raise AssertionError("the block was entered")

    assert await testbed.run_handler(hand_off_item) == "stopped"
    assert testbed.current_item.state == "stopped"


@in_virtual_time
@pytest.mark.parametrize("comes", [False, True])
async def test_drain_during_handoff_releases_item_that_no_child_has_taken(comes: bool) -> None:  # noqa: FBT001 - a parameter of the test
    testbed = HandoffTestbed()
    entered = asyncio.Event()

    async def hand_off_item(session: Session) -> None:
        async with session.handover() as testbed.lease:
            if comes:
                testbed.start_child(3)
            entered.set()

    async def drain_pool(pool: ThreadlessSupervisor) -> None:
        await entered.wait()
        began = testbed.loop.time()
        await pool.drain(6)
        assert testbed.loop.time() - began <= (5.1 if comes else 6.1)
        assert pool.abandoned == 0

    outcome = await testbed.run_handler(hand_off_item, drain_pool, reclaim_older_than_ms=60_000)
    assert outcome == ("detached" if comes else "released")
    if not comes:
        # The drain releases the item within 6 s, and the item's lease ends 10 s later.
        assert testbed.current_item.lease_end <= (START + 16.2) * 1_000_000


@in_virtual_time
async def test_session_timeout_during_handoff_returns_item_to_parent() -> None:
    testbed = HandoffTestbed()

    async def hand_off_item(session: Session) -> None:
        async with session.handover() as testbed.lease:
            pass

    assert await testbed.run_handler(hand_off_item, session_timeout=5) == "timed_out"
    assert testbed.current_item.state == "stopped"


@in_virtual_time
async def test_handoff_block_is_not_entered_if_session_times_out_before_it() -> None:
    testbed = HandoffTestbed(heartbeat=[None, Fault(request_delay=1, answer_delay=4)])

    async def hand_off_item(session: Session) -> None:
        async with session.handover():
            raise AssertionError("the block was entered")

    assert await testbed.run_handler(hand_off_item, session_timeout=2) == "timed_out"
    assert testbed.current_item.state == "stopped"


@in_virtual_time
@pytest.mark.parametrize("inside", [False, True])
async def test_lease_that_cannot_be_renewed_during_handoff_is_lost(inside: bool) -> None:  # noqa: FBT001 - a parameter of the test
    silence = [UNSENT] * 99
    testbed = HandoffTestbed(heartbeat=[None, None, *silence], get=[*silence], stop=[*silence])

    async def hand_off_item(session: Session) -> None:
        async with session.handover():
            if inside:
                await asyncio.sleep(300)

    assert await testbed.run_handler(hand_off_item, reclaim_older_than_ms=60_000) == "lease_lost"
    assert testbed.request_names_sent_after(54) == []
    assert testbed.recorder.of(ItemReclaimed) == []


@in_virtual_time
async def test_session_has_outcome_lease_lost_if_lease_expires_during_handoff() -> None:
    """The control plane ends the lease early, so neither parent nor child holds the item."""
    testbed = HandoffTestbed()

    def expire_lease() -> None:
        queue = testbed.operations.get_queue(ENVIRONMENT)
        queue.put_item(replace(queue.get_item(testbed.work_id), lease_end=0))

    async def hand_off_item(session: Session) -> None:
        async with session.handover() as testbed.lease:
            testbed.loop.call_later(5, expire_lease)

    assert await testbed.run_handler(hand_off_item, reclaim_older_than_ms=60_000) == "lease_lost"
    assert testbed.recorder.of(ItemReclaimed)[0].stage == "run"


async def run_pool_with_child(
    testbed: HandoffTestbed, **faults: list[Fault | None]
) -> tuple[HandoffChildInVirtualTime, list[str]]:
    """Hand the item off to a child whose requests have the given faults.

    Returns:
        The child, and the outcomes of its sessions.
    """

    @handler
    async def run_child_session(session: Session) -> None:
        await session.update_metadata({"by": "child"})

    recorder = Recorder()
    settings = Settings(environment_id=ENVIRONMENT, token=ENVIRONMENT, stats_interval=0)
    connect = partial(LocalClient, testbed.operations, faults=FaultScript(**faults))

    async def hand_off_item(session: Session) -> None:
        async with session.handover() as testbed.lease:
            testbed.group.create_task(wait_for_child())

    async def wait_for_child() -> None:
        lease = testbed.lease
        child = HandoffChildInVirtualTime(
            settings,
            lease.work_id,
            lease.last_heartbeat,
            plugins=[run_child_session, recorder],
            connect=connect,
        )
        children.append(child)
        with suppress(TransientError):
            await child.run()

    children: list[HandoffChildInVirtualTime] = []
    testbed.outcome = await testbed.run_handler(hand_off_item, reclaim_older_than_ms=600_000)
    return children[0], [event.outcome for event in recorder.of(SessionFinished)]


@in_virtual_time
async def test_child_repeats_failed_requests_and_takes_item_over() -> None:
    testbed = HandoffTestbed()
    fault = [Fault(answer=503, applied=False), GARBLED]
    _, outcomes = await run_pool_with_child(
        testbed, get=[*fault], heartbeat=[Fault(answer=429, applied=False)]
    )
    assert (testbed.outcome, outcomes) == ("detached", ["completed"])
    assert dict(testbed.current_item.metadata) == {"by": "child"}


@in_virtual_time
async def test_child_that_cannot_read_item_leaves_it_to_parent() -> None:
    testbed = HandoffTestbed()
    child, outcomes = await run_pool_with_child(testbed, get=[UNSENT] * 99)
    assert (testbed.outcome, outcomes) == ("failed", [])
    assert child.status().error is not None


@in_virtual_time
async def test_child_process_does_not_run_item_if_its_first_heartbeat_is_unanswered() -> None:
    """Without an answer, the child cannot know whether its own heartbeat was applied."""
    testbed = HandoffTestbed()
    _, outcomes = await run_pool_with_child(testbed, heartbeat=[GARBLED])
    assert (testbed.outcome, outcomes) == ("detached", ["detached"])
    assert testbed.current_item.metadata == {}
