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
    make_testbed: type[LeaseTestbed], fault: Fault, *, first: bool
) -> None:
    """A failed ack may have begun the lease, although only the repeated ack is answered."""

    @in_virtual_time
    async def acknowledge_despite_fault() -> None:
        bench = make_testbed(ack=[fault])
        async with bench.opened_clients():
            item, result = await ClaimerTestbed(bench).acknowledge_item()
        assert result == "ok"
        earlier, later = bench.get_send_times("ack")
        assert earlier < later
        assert item.acked_at == (earlier if first else later)

    acknowledge_despite_fault()


@in_virtual_time
@pytest.mark.usefixtures("longest_retry_delays")
async def test_ack_answered_with_429_is_repeated_until_item_would_be_redelivered(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed(ack=[make_fault_that_refuses_request(429)] * 999)
    async with bench.opened_clients():
        _, result = await ClaimerTestbed(bench).acknowledge_item()
        assert result == "error"
        assert bench.clock() <= RECLAIM_SECONDS
    assert len(bench.get_send_times("ack")) > 1


@in_virtual_time
@pytest.mark.usefixtures("longest_retry_delays")
async def test_ack_that_may_have_been_applied_is_repeated_while_its_lease_lasts(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed(ack=[Fault(answer=500, applied=False)] * 999)
    async with bench.opened_clients():
        _, result = await ClaimerTestbed(bench).acknowledge_item()
        assert result == "error"
        assert RECLAIM_SECONDS < bench.clock() < ACK_LEASE_SECONDS


@in_virtual_time
@pytest.mark.usefixtures("longest_retry_delays")
async def test_ack_that_may_have_been_applied_is_not_repeated_after_lease_ends(
    make_testbed: type[LeaseTestbed],
) -> None:
    """The pool counts the lease from the first ack, so a later ack would not prolong the lease."""
    bench = make_testbed(ack=[Fault(answer=500, applied=False)] * 999)
    async with bench.opened_clients():
        _, result = await ClaimerTestbed(bench, window=300).acknowledge_item()
        assert result == "error"
        assert bench.clock() < ACK_LEASE_SECONDS


@in_virtual_time
async def test_repeated_ack_delayed_beyond_end_of_lease_is_not_sent(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed(ack=[Fault(answer=500, applied=False), Fault(wait=1)])
    async with bench.opened_clients(), asyncio.TaskGroup() as group:
        task = group.create_task(ClaimerTestbed(bench).acknowledge_item())
        await asyncio.sleep(0.9)  # By now the second ack waits for the rate limit or a connection.
        bench.loop.suspend(ACK_LEASE_SECONDS)
        item, result = await task
        assert result == "error"
        assert bench.operations.get_item(ENVIRONMENT, item.id).state == "queued"
    assert len(bench.get_send_times("ack")) == 1


@pytest.mark.parametrize(
    ("status", "result", "reported"),
    [(404, "gone", 0), (409, "conflict", 1), (412, "conflict", 1), (403, "error", 1)],
)
def test_refused_ack_is_never_repeated_but_is_reported_if_item_still_exists(
    make_testbed: type[LeaseTestbed], status: int, result: str, reported: int
) -> None:
    """A reported refusal makes pollers pause. An item that is gone (404) must not cause a pause."""

    @in_virtual_time
    async def assert_refused_ack_is_not_repeated() -> None:
        bench = make_testbed(ack=[make_fault_that_refuses_request(status)])
        async with bench.opened_clients():
            claimer_bench = ClaimerTestbed(bench)
            assert (await claimer_bench.acknowledge_item())[1] == result
        assert len(bench.get_send_times("ack")) == 1
        assert [error is not None for error in claimer_bench.acks] == [True] * reported

    assert_refused_ack_is_not_repeated()


@in_virtual_time
async def test_accepted_ack_is_reported_and_updates_item(make_testbed: type[LeaseTestbed]) -> None:
    bench = make_testbed()
    async with bench.opened_clients():
        claimer_bench = ClaimerTestbed(bench)
        item, _ = await claimer_bench.acknowledge_item()
    assert claimer_bench.acks == [None]
    assert item.work_item.state == "starting"
    assert item.work_item.acknowledged_at is not None


def make_fault_that_rewrites_state_in_answer(state: str) -> Fault:
    return Fault(rewrite=lambda item: {**item, "state": state})


@pytest.mark.parametrize(
    ("state", "result"),
    [("queued", "conflict"), ("active", "ok"), ("stopping", "conflict"), ("stopped", "conflict")],
)
def test_ack_is_ok_if_item_is_active_and_conflict_if_queued_or_stopped(
    make_testbed: type[LeaseTestbed], state: str, result: str
) -> None:
    @in_virtual_time
    async def assert_ack_has_result() -> None:
        bench = make_testbed(ack=[make_fault_that_rewrites_state_in_answer(state)])
        async with bench.opened_clients():
            assert (await ClaimerTestbed(bench).acknowledge_item())[1] == result

    assert_ack_has_result()


@in_virtual_time
async def test_ack_keeps_session_token_and_trace_that_came_with_polled_item(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed()
    async with bench.opened_clients():
        claimer_bench = ClaimerTestbed(bench)
        item = await claimer_bench.deliver_item()
        token, trace = Secret("token-of-the-session"), "00-" + "1" * 32 + "-" + "2" * 16 + "-01"
        item.work_item = replace(item.work_item, sessions_token=token, traceparent=trace)
        await claimer_bench.claimer.acknowledge_item(item, bench.clock())
    assert item.work_item.state == "starting"
    assert (item.work_item.sessions_token, item.work_item.traceparent) == (token, trace)


@in_virtual_time
async def test_ack_is_no_longer_repeated_after_drain_begins(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed(ack=[make_fault_that_refuses_request(503, retry_after=20)] * 9)
    async with bench.opened_clients(), asyncio.TaskGroup() as group:
        claimer_bench = ClaimerTestbed(bench)
        item = await claimer_bench.deliver_item()
        task = group.create_task(claimer_bench.acknowledge_item(item))
        await asyncio.sleep(1)
        claimer_bench.begin_drain(item)
        await task
        assert bench.clock() == pytest.approx(1)
        assert task.result()[1] == "error"


@in_virtual_time
async def test_first_heartbeat_is_sent_at_once_and_begins_lease(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed()
    async with bench.opened_clients():
        item = await bench.claim_item()
        await ClaimerTestbed(bench).claimer.send_first_heartbeats(item)
    assert item.lease.begun
    assert bench.get_send_times("heartbeat") == [0]
    assert bench.item_history(item, "heartbeat")[0].state == "active"


@in_virtual_time
async def test_lost_answer_of_first_heartbeat_is_recovered_by_reading_item(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed(heartbeat=[Fault(answer="silence")])
    async with bench.opened_clients():
        item = await bench.claim_item()
        await ClaimerTestbed(bench).claimer.send_first_heartbeats(item)
    assert bench.heartbeat_results() == ["timeout", "recovered", "ok"]
    assert [each.op for each in bench.sent] == ["heartbeat", "heartbeat", "get", "heartbeat"]
    assert item.lease.begun


@in_virtual_time
async def test_first_heartbeat_that_fails_is_repeated_until_lease_ends(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed(heartbeat=[make_fault_that_refuses_request(503)] * 999)
    async with bench.opened_clients():
        item = await bench.claim_item()
        await ClaimerTestbed(bench).claimer.send_first_heartbeats(item)
        assert bench.clock() == pytest.approx(54)
    assert (item.lease.status, item.lease.begun) == ("lost", False)
    assert len(bench.get_send_times("heartbeat")) > 10


@in_virtual_time
async def test_unanswered_first_heartbeat_with_short_ttl_is_repeated_within_ttl(
    make_testbed: type[LeaseTestbed],
) -> None:
    """If the unanswered heartbeat was applied, the lease lasts only 10 s from then on."""
    bench = make_testbed(ttl=10, heartbeat=[Fault(answer="silence")])
    async with bench.opened_clients():
        item = await bench.claim_item()
        await ClaimerTestbed(bench).claimer.send_first_heartbeats(item)
        assert bench.clock() < 5
    assert bench.heartbeat_results() == ["timeout", "recovered", "ok"]


@in_virtual_time
async def test_first_heartbeat_of_item_held_by_another_worker_is_not_repeated(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed()
    async with bench.opened_clients():
        item = await bench.claim_item()
        bench.ahead += 300
        bench.claim_as_other_worker(item.id)
        await ClaimerTestbed(bench).claimer.send_first_heartbeats(item)
    assert (item.lease.status, item.lease.is_loss_confirmed) == ("lost", True)
    assert len(bench.sent) == 1


@in_virtual_time
async def test_lease_is_lost_without_get_request_if_another_worker_holds_item(
    make_testbed: type[LeaseTestbed],
) -> None:
    """A read returns the `acknowledged_at` of any holder, so it does not show who the holder is."""
    bench = make_testbed(
        ack=[make_fault_that_rewrites_state_in_answer("active")], heartbeat=[UNSENT]
    )
    async with bench.opened_clients():
        item = await bench.claim_item()
        bench.operations.heartbeat(ENVIRONMENT, item.id, None, 60, "rival")
        await ClaimerTestbed(bench).claimer.send_first_heartbeats(item)
    assert (item.lease.status, item.lease.is_loss_confirmed) == ("lost", True)
    assert [each.op for each in bench.sent] == ["heartbeat", "heartbeat"]


@in_virtual_time
async def test_writes_are_forbidden_until_heartbeat_succeeds_if_item_is_active_after_ack(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed(ack=[make_fault_that_rewrites_state_in_answer("active")])
    async with bench.opened_clients():
        item = await bench.claim_item()
        with pytest.raises(LeaseLost):
            bench.sender.check_writes_allowed(item, by_handler=False)
        await ClaimerTestbed(bench).claimer.send_first_heartbeats(item)
        bench.sender.check_writes_allowed(item, by_handler=False)
    assert item.lease.begun


@in_virtual_time
async def test_first_heartbeat_of_lease_during_drain_releases_that_lease(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed()
    async with bench.opened_clients():
        item = await bench.claim_item()
        claimer_bench = ClaimerTestbed(bench)
        claimer_bench.begin_drain(item)
        await claimer_bench.claimer.send_first_heartbeats(item)
    (record,) = bench.item_history(item, "heartbeat")
    assert record.lease_end == START + 10
    assert item.lease.status == "released"


@in_virtual_time
async def test_drain_does_not_wait_for_retry_delay_of_refused_first_heartbeat(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed(heartbeat=[make_fault_that_refuses_request(503, retry_after=20)])
    async with bench.opened_clients(), asyncio.TaskGroup() as group:
        item = await bench.claim_item()
        claimer_bench = ClaimerTestbed(bench)
        task = group.create_task(claimer_bench.claimer.send_first_heartbeats(item))
        await asyncio.sleep(1)
        claimer_bench.begin_drain(item)
        await task
        assert bench.clock() == pytest.approx(1)
    assert item.lease.status == "released"


@in_virtual_time
async def test_failed_first_heartbeat_during_drain_is_not_repeated_in_tight_loop(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed(heartbeat=[make_fault_that_refuses_request(503)] * 999)
    bench.latency = 0.01
    async with bench.opened_clients():
        item = await bench.claim_item()
        claimer_bench = ClaimerTestbed(bench)
        claimer_bench.begin_drain(item)
        await claimer_bench.claimer.send_first_heartbeats(item)
        assert item.lease.status == "lost"
    assert len(bench.get_send_times("heartbeat")) < 100


@in_virtual_time
async def test_first_heartbeat_counts_as_unanswered_if_its_task_is_cancelled(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed(heartbeat=[Fault(answer_delay=5), None])
    async with bench.opened_clients():
        item = await bench.claim_item()
        claimer_bench = ClaimerTestbed(bench)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(claimer_bench.claimer.send_first_heartbeats(item))
            await asyncio.sleep(1)
            task.cancel()
        assert not item.lease.in_flight
        await claimer_bench.claimer.send_first_heartbeats(item)
    assert bench.heartbeat_results() == ["recovered", "ok"]
