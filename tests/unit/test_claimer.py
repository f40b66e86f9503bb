"""Claims of items in virtual time: acks, the start of a lease, and the first heartbeats."""

from __future__ import annotations

import asyncio
from contextvars import copy_context
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from workpool.errors import LeaseLost
from workpool.events import AckFinished
from workpool.pool.claim import Claimer
from workpool.pool.machine_pauses import MachinePauseDetector
from workpool.pool.pool_item import PoolItem
from workpool.secret import Secret
from workpool.testing.fault import Fault
from workpool.testing.virtual_time import in_virtual_time
from workpool.wire.protocol import ACK_LEASE_SECONDS, RECLAIM_OLDER_THAN_MS

if TYPE_CHECKING:
    from tests.unit.conftest import LeaseTestbed
    from workpool.events import Event

ENVIRONMENT = "env_00000000000070008000000000000001"
UNSENT = Fault(answer="silence", applied=False)
START = 1_772_366_400.0
RECLAIM_SECONDS = RECLAIM_OLDER_THAN_MS / 1000


def make_fault_that_refuses_request(status: int, retry_after: float | None = None) -> Fault:
    return Fault(answer=status, applied=False, retry_after=retry_after)


class ClaimerTestbed:
    """A claimer in a `LeaseTestbed`, with the events and the ack results that it has reported."""

    def __init__(self, bench: LeaseTestbed, window: float | None = None) -> None:
        self.bench = bench
        self.events: list[Event] = []
        self.acks: list[Exception | None] = []
        context: Any = SimpleNamespace(
            draining=False,
            redelivery_window_seconds=RECLAIM_SECONDS if window is None else window,
            client=bench.client,
            clock=bench.clock,
            observe=lambda kind, *values: self.events.append(kind(*values)),
            renewer=SimpleNamespace(pauses=MachinePauseDetector(bench.clock, bench.clock)),
        )
        self.context = context
        self.claimer = Claimer(context, bench.heartbeats, self.acks.append)

    async def deliver_item(self) -> PoolItem:
        self.bench.operations.enqueue(ENVIRONMENT)
        delivered = await self.bench.client.poll()
        assert delivered is not None
        return PoolItem(delivered, None, copy_context(), self.bench.clock())

    def begin_drain(self, item: PoolItem) -> None:
        self.context.draining = True
        item.notify_waiters()

    async def acknowledge_item(self, item: PoolItem | None = None) -> tuple[PoolItem, str]:
        item = item or await self.deliver_item()
        result = await self.claimer.acknowledge_item(item, self.bench.clock())
        assert [event.result for event in self.events if isinstance(event, AckFinished)] == [result]
        return item, result


@pytest.mark.parametrize(
    ("fault", "first"),
    [
        (Fault(answer="silence"), True),
        (Fault(answer="silence", applied=False), True),
        (Fault(answer="reset", applied=False), True),
        (Fault(answer=500), True),
        (Fault(answer=b"{"), True),
        (Fault(answer=429, applied=False), False),
    ],
    ids=["silence", "unsent", "reset", "500", "garbage", "429"],
)
def test_lease_starts_at_first_ack_that_control_plane_may_have_applied(
    testbed: type[LeaseTestbed], fault: Fault, *, first: bool
) -> None:
    """A failed ack may have begun the lease, although only the repeated ack is answered."""

    @in_virtual_time
    async def acknowledge_despite_fault() -> None:
        one = testbed(ack=[fault])
        async with one.opened_clients():
            item, result = await ClaimerTestbed(one).acknowledge_item()
        assert result == "ok"
        earlier, later = one.get_send_times("ack")
        assert earlier < later
        assert item.acked_at == (earlier if first else later)

    acknowledge_despite_fault()


@in_virtual_time
async def test_ack_answered_with_429_is_repeated_until_item_would_be_redelivered(
    testbed: type[LeaseTestbed],
) -> None:
    one = testbed(ack=[make_fault_that_refuses_request(429)] * 999)
    async with one.opened_clients():
        _, result = await ClaimerTestbed(one).acknowledge_item()
        assert result == "error"
        assert one.clock() <= RECLAIM_SECONDS
    assert len(one.get_send_times("ack")) > 1


@in_virtual_time
async def test_ack_that_may_have_been_applied_is_repeated_while_its_lease_lasts(
    testbed: type[LeaseTestbed],
) -> None:
    one = testbed(ack=[Fault(answer=500, applied=False)] * 999)
    async with one.opened_clients():
        _, result = await ClaimerTestbed(one).acknowledge_item()
        assert result == "error"
        assert RECLAIM_SECONDS < one.clock() < ACK_LEASE_SECONDS


@in_virtual_time
async def test_ack_that_may_have_been_applied_is_not_repeated_after_lease_ends(
    testbed: type[LeaseTestbed],
) -> None:
    """The pool counts the lease from the first ack, so a later ack would not prolong the lease."""
    one = testbed(ack=[Fault(answer=500, applied=False)] * 999)
    async with one.opened_clients():
        _, result = await ClaimerTestbed(one, window=300).acknowledge_item()
        assert result == "error"
        assert one.clock() < ACK_LEASE_SECONDS


@in_virtual_time
async def test_repeated_ack_delayed_beyond_end_of_lease_is_not_sent(
    testbed: type[LeaseTestbed],
) -> None:
    one = testbed(ack=[Fault(answer=500, applied=False), Fault(wait=1)])
    async with one.opened_clients(), asyncio.TaskGroup() as group:
        task = group.create_task(ClaimerTestbed(one).acknowledge_item())
        await asyncio.sleep(0.9)  # By now the second ack waits for the rate limit or a connection.
        one.loop.suspend(ACK_LEASE_SECONDS)
        item, result = await task
        assert result == "error"
        assert one.operations.get_item(ENVIRONMENT, item.id).state == "queued"
    assert len(one.get_send_times("ack")) == 1


@pytest.mark.parametrize(
    ("status", "result", "reported"),
    [(404, "gone", 0), (409, "conflict", 1), (412, "conflict", 1), (403, "error", 1)],
)
def test_refused_ack_is_never_repeated_but_is_reported_if_item_still_exists(
    testbed: type[LeaseTestbed], status: int, result: str, reported: int
) -> None:
    """A reported refusal makes pollers pause. An item that is gone (404) must not cause a pause."""

    @in_virtual_time
    async def assert_refused_ack_is_not_repeated() -> None:
        one = testbed(ack=[make_fault_that_refuses_request(status)])
        async with one.opened_clients():
            claims = ClaimerTestbed(one)
            assert (await claims.acknowledge_item())[1] == result
        assert len(one.get_send_times("ack")) == 1
        assert [error is not None for error in claims.acks] == [True] * reported

    assert_refused_ack_is_not_repeated()


@in_virtual_time
async def test_accepted_ack_is_reported_and_updates_item(testbed: type[LeaseTestbed]) -> None:
    one = testbed()
    async with one.opened_clients():
        claims = ClaimerTestbed(one)
        item, _ = await claims.acknowledge_item()
    assert claims.acks == [None]
    assert item.work_item.state == "starting"
    assert item.work_item.acknowledged_at is not None


def make_fault_that_changes_state(state: str) -> Fault:
    return Fault(rewrite=lambda item: {**item, "state": state})


@pytest.mark.parametrize(
    ("state", "result"),
    [("queued", "conflict"), ("active", "ok"), ("stopping", "conflict"), ("stopped", "conflict")],
)
def test_ack_is_ok_if_item_is_active_and_conflict_if_queued_or_stopped(
    testbed: type[LeaseTestbed], state: str, result: str
) -> None:
    @in_virtual_time
    async def acknowledge_item_in_state() -> None:
        one = testbed(ack=[make_fault_that_changes_state(state)])
        async with one.opened_clients():
            assert (await ClaimerTestbed(one).acknowledge_item())[1] == result

    acknowledge_item_in_state()


@in_virtual_time
async def test_ack_keeps_session_token_and_trace_that_came_with_polled_item(
    testbed: type[LeaseTestbed],
) -> None:
    one = testbed()
    async with one.opened_clients():
        claims = ClaimerTestbed(one)
        item = await claims.deliver_item()
        token, trace = Secret("token-of-the-session"), "00-" + "1" * 32 + "-" + "2" * 16 + "-01"
        item.work_item = replace(item.work_item, sessions_token=token, traceparent=trace)
        await claims.claimer.acknowledge_item(item, one.clock())
    assert item.work_item.state == "starting"
    assert (item.work_item.sessions_token, item.work_item.traceparent) == (token, trace)


@in_virtual_time
async def test_ack_is_no_longer_repeated_after_drain_begins(testbed: type[LeaseTestbed]) -> None:
    one = testbed(ack=[make_fault_that_refuses_request(503, retry_after=20)] * 9)
    async with one.opened_clients(), asyncio.TaskGroup() as group:
        claims = ClaimerTestbed(one)
        item = await claims.deliver_item()
        task = group.create_task(claims.acknowledge_item(item))
        await asyncio.sleep(1)
        claims.begin_drain(item)
        await task
        assert one.clock() == pytest.approx(1)
        assert task.result()[1] == "error"


@in_virtual_time
async def test_first_heartbeat_is_sent_at_once_and_begins_lease(
    testbed: type[LeaseTestbed],
) -> None:
    one = testbed()
    async with one.opened_clients():
        item = await one.claim_item()
        await ClaimerTestbed(one).claimer.send_first_heartbeats(item)
    assert item.lease.begun
    assert one.get_send_times("heartbeat") == [0]
    assert one.item_history(item, "heartbeat")[0].state == "active"


@in_virtual_time
async def test_lost_answer_of_first_heartbeat_is_recovered_by_reading_item(
    testbed: type[LeaseTestbed],
) -> None:
    one = testbed(heartbeat=[Fault(answer="silence")])
    async with one.opened_clients():
        item = await one.claim_item()
        await ClaimerTestbed(one).claimer.send_first_heartbeats(item)
    assert one.heartbeat_results() == ["timeout", "recovered", "ok"]
    assert [each.op for each in one.sent] == ["heartbeat", "heartbeat", "get", "heartbeat"]
    assert item.lease.begun


@in_virtual_time
async def test_first_heartbeat_that_fails_is_repeated_until_lease_ends(
    testbed: type[LeaseTestbed],
) -> None:
    one = testbed(heartbeat=[make_fault_that_refuses_request(503)] * 999)
    async with one.opened_clients():
        item = await one.claim_item()
        await ClaimerTestbed(one).claimer.send_first_heartbeats(item)
        assert one.clock() == pytest.approx(54)
    assert (item.lease.status, item.lease.begun) == ("lost", False)
    assert len(one.get_send_times("heartbeat")) > 10


@in_virtual_time
async def test_unanswered_first_heartbeat_with_short_ttl_is_repeated_within_ttl(
    testbed: type[LeaseTestbed],
) -> None:
    """If the unanswered heartbeat was applied, the lease lasts only 10 s from then on."""
    one = testbed(ttl=10, heartbeat=[Fault(answer="silence")])
    async with one.opened_clients():
        item = await one.claim_item()
        await ClaimerTestbed(one).claimer.send_first_heartbeats(item)
        assert one.clock() < 5
    assert one.heartbeat_results() == ["timeout", "recovered", "ok"]


@in_virtual_time
async def test_first_heartbeat_of_item_held_by_another_worker_is_not_repeated(
    testbed: type[LeaseTestbed],
) -> None:
    one = testbed()
    async with one.opened_clients():
        item = await one.claim_item()
        one.ahead += 300
        one.claim_as_other_worker(item.id)
        await ClaimerTestbed(one).claimer.send_first_heartbeats(item)
    assert (item.lease.status, item.lease.is_loss_confirmed) == ("lost", True)
    assert len(one.sent) == 1


@in_virtual_time
async def test_lease_is_lost_without_get_request_if_another_worker_holds_item(
    testbed: type[LeaseTestbed],
) -> None:
    """A read returns the `acknowledged_at` of any holder, so it does not show who the holder is."""
    one = testbed(ack=[make_fault_that_changes_state("active")], heartbeat=[UNSENT])
    async with one.opened_clients():
        item = await one.claim_item()
        one.operations.heartbeat(ENVIRONMENT, item.id, None, 60, "rival")
        await ClaimerTestbed(one).claimer.send_first_heartbeats(item)
    assert (item.lease.status, item.lease.is_loss_confirmed) == ("lost", True)
    assert [each.op for each in one.sent] == ["heartbeat", "heartbeat"]


@in_virtual_time
async def test_writes_are_forbidden_until_heartbeat_succeeds_if_item_is_active_after_ack(
    testbed: type[LeaseTestbed],
) -> None:
    one = testbed(ack=[make_fault_that_changes_state("active")])
    async with one.opened_clients():
        item = await one.claim_item()
        with pytest.raises(LeaseLost):
            one.sender.check_writes_allowed(item, by_handler=False)
        await ClaimerTestbed(one).claimer.send_first_heartbeats(item)
        one.sender.check_writes_allowed(item, by_handler=False)
    assert item.lease.begun


@in_virtual_time
async def test_first_heartbeat_of_lease_during_drain_releases_that_lease(
    testbed: type[LeaseTestbed],
) -> None:
    one = testbed()
    async with one.opened_clients():
        item = await one.claim_item()
        claims = ClaimerTestbed(one)
        claims.begin_drain(item)
        await claims.claimer.send_first_heartbeats(item)
    (record,) = one.item_history(item, "heartbeat")
    assert record.lease_end == START + 10
    assert item.lease.status == "released"


@in_virtual_time
async def test_drain_does_not_wait_for_retry_delay_of_refused_first_heartbeat(
    testbed: type[LeaseTestbed],
) -> None:
    one = testbed(heartbeat=[make_fault_that_refuses_request(503, retry_after=20)])
    async with one.opened_clients(), asyncio.TaskGroup() as group:
        item = await one.claim_item()
        claims = ClaimerTestbed(one)
        task = group.create_task(claims.claimer.send_first_heartbeats(item))
        await asyncio.sleep(1)
        claims.begin_drain(item)
        await task
        assert one.clock() == pytest.approx(1)
    assert item.lease.status == "released"


@in_virtual_time
async def test_failed_first_heartbeat_during_drain_is_not_repeated_in_tight_loop(
    testbed: type[LeaseTestbed],
) -> None:
    one = testbed(heartbeat=[make_fault_that_refuses_request(503)] * 999)
    one.latency = 0.01
    async with one.opened_clients():
        item = await one.claim_item()
        claims = ClaimerTestbed(one)
        claims.begin_drain(item)
        await claims.claimer.send_first_heartbeats(item)
        assert item.lease.status == "lost"
    assert len(one.get_send_times("heartbeat")) < 100


@in_virtual_time
async def test_first_heartbeat_counts_as_unanswered_if_its_task_is_cancelled(
    testbed: type[LeaseTestbed],
) -> None:
    one = testbed(heartbeat=[Fault(answer_delay=5), None])
    async with one.opened_clients():
        item = await one.claim_item()
        claims = ClaimerTestbed(one)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(claims.claimer.send_first_heartbeats(item))
            await asyncio.sleep(1)
            task.cancel()
        assert not item.lease.in_flight
        await claims.claimer.send_first_heartbeats(item)
    assert one.heartbeat_results() == ["recovered", "ok"]
