"""The lease renewer in virtual time: timely heartbeats, releases, limits, and machines that
sleep.
"""

from __future__ import annotations

import asyncio
import gc
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

import pytest

from workpool.errors import LeaseLost, TransientError
from workpool.pool.lease import Lease
from workpool.pool.lease_renewer import (
    HEARTBEAT_LIMIT_MIN,
    NEW_CONNECTIONS_PER_SECOND,
    SHRINK_SECONDS,
)
from workpool.testing.fault import Fault
from workpool.testing.local_client import FaultScript, LocalClient
from workpool.testing.virtual_time import in_virtual_time
from workpool.wire.items import Heartbeat

if TYPE_CHECKING:
    from tests.unit.conftest import LeaseTestbed

START = 1_772_366_400.0
LOST = Fault(answer="silence")
"""A heartbeat that is applied but whose answer is lost."""
UNSENT = Fault(answer="silence", applied=False)
RESET = Fault(answer="reset", applied=False)
TOLERANCE = 0.1
"""Allowed deviation in seconds from an expected time; checks of leases are at least 20 ms apart."""


def make_fault_that_refuses_request(status: int) -> Fault:
    return Fault(answer=status, applied=False)


def compute_seconds_between_times(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(times)]


def assert_single_lease_status_change(bench: LeaseTestbed, at: float, status: str) -> None:
    """Assert that the status of one lease changed once: at the time `at`, to `status`."""
    [(changed_at, changed_to)] = bench.changes
    assert changed_at == pytest.approx(at, abs=TOLERANCE)
    assert changed_to == status


@in_virtual_time
async def test_lease_added_by_another_thread_during_renewer_check_raises_no_error(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed()
    async with bench.opened_clients():
        items = [await bench.claim_item() for _ in range(30)]
        for item in items[:20]:
            bench.renewer.add_lease(item.lease, item)
        others = iter(items[20:])

        def add_lease_during_garbage_collection(_phase: str, _info: object) -> None:
            # Garbage collection calls this function in the middle of a check, and thereby simulates
            # another thread that adds a lease.
            for item in islice(others, 1):
                bench.renewer.add_lease(item.lease, item)

        former = gc.get_threshold()
        # CPython keeps deleted tuples and reuses them for new tuples, and the reuse of a tuple
        # starts no garbage collection. Use up these tuples, so that each further tuple is allocated
        # and can start a collection.
        used = [(number, number) for number in range(5_000)]
        gc.callbacks.append(add_lease_during_garbage_collection)
        try:
            gc.set_threshold(1)
            bench.renewer._end_or_renew_leases()
        finally:
            gc.set_threshold(*former)
            gc.callbacks.remove(add_lease_during_garbage_collection)
        assert len(used) == 5_000
        assert len(bench.renewer.held_leases()) > 20


@in_virtual_time
async def test_lease_is_renewed_every_third_of_ttl_for_an_hour(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed()
    async with bench.renewed_lease() as lease:
        await asyncio.sleep(3_600)
        assert lease.is_held(bench.clock())
    between = compute_seconds_between_times(bench.get_send_times("heartbeat"))
    assert len(between) > 3_600 / 20.1
    assert all(18 <= gap <= 20 + TOLERANCE for gap in between)
    assert set(bench.heartbeat_results()) == {"ok"}
    assert max(event.lag_seconds for _, event in bench.results) < TOLERANCE
    assert not bench.changes


@in_virtual_time
async def test_lease_added_to_idle_renewer_is_renewed_in_time(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed(ttl=10)
    async with bench.opened_clients():
        await asyncio.sleep(100.5)
        lease = await bench.send_first_heartbeat(await bench.claim_item())
        await asyncio.sleep(100)
        assert lease.is_held(bench.clock())
    times = bench.get_send_times("heartbeat")
    assert max(compute_seconds_between_times(times)) < 10 / 3 + TOLERANCE


@in_virtual_time
async def test_removed_lease_is_not_renewed(make_testbed: type[LeaseTestbed]) -> None:
    bench = make_testbed()
    async with bench.renewed_lease() as lease:
        assert bench.renewer.held_leases() == [lease]
        bench.renewer.remove_lease(lease)
        assert bench.renewer.held_leases() == []
        await asyncio.sleep(300)
    assert len(bench.sent) == 1
    assert not bench.changes


@in_virtual_time
async def test_ended_lease_is_not_added_to_renewer(make_testbed: type[LeaseTestbed]) -> None:
    bench = make_testbed()
    async with bench.opened_clients():
        item = await bench.claim_item()
        item.lease.end_lease("lost")
        bench.renewer.add_lease(item.lease, item)
        assert bench.renewer.held_leases() == []


@in_virtual_time
async def test_failed_heartbeat_is_repeated_with_growing_delay(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed(heartbeat=[None, *[RESET] * 6])
    async with bench.renewed_lease() as lease:
        await asyncio.sleep(50)
        assert lease.is_held(bench.clock())
    assert compute_seconds_between_times(bench.get_send_times("heartbeat"))[1:7] == pytest.approx(
        [1, 2, 4, 4, 4, 4], abs=TOLERANCE
    )
    assert bench.heartbeat_results() == ["ok", *["transient"] * 6, "ok"]


@in_virtual_time
async def test_urgent_heartbeat_is_sent_without_waiting_for_next_check(
    make_testbed: type[LeaseTestbed],
) -> None:
    slow = Fault(answer=409, applied=False, answer_delay=3)
    bench = make_testbed(heartbeat=[None, slow], get=[Fault(answer_delay=3)])
    async with bench.renewed_lease():
        await asyncio.sleep(30)
    assert bench.heartbeat_results() == ["ok", "recovered", "ok"]
    _, second, third = bench.get_send_times("heartbeat")
    assert third == pytest.approx(second + 6)
    # The slow answers delay the third heartbeat, but this delay is no lag of the renewer.
    assert max(event.lag_seconds for _, event in bench.results) < TOLERANCE


@in_virtual_time
async def test_lost_answer_of_heartbeat_is_recovered_by_reading_item(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed(heartbeat=[None, LOST])
    async with bench.renewed_lease() as lease:
        await asyncio.sleep(120)
        assert lease.is_held(bench.clock())
    assert bench.heartbeat_results()[:4] == ["ok", "timeout", "recovered", "ok"]


@in_virtual_time
async def test_lease_with_contradictory_heartbeat_answers_is_lost_after_few_requests(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed(heartbeat=[None, LOST, *[make_fault_that_refuses_request(412)] * 999])
    async with bench.renewed_lease() as lease:
        await asyncio.sleep(600)
        assert lease.status == "lost"
    assert len(bench.sent) < 30


@pytest.mark.parametrize(("ttl", "end"), [(60, 54), (10, 9)])
def test_lease_whose_heartbeats_get_no_answer_is_lost_before_deadline(
    make_testbed: type[LeaseTestbed], ttl: int, end: float
) -> None:
    @in_virtual_time
    async def assert_lost_before_deadline() -> None:
        bench = make_testbed(ttl=ttl, heartbeat=[None, *[UNSENT] * 999])
        async with bench.renewed_lease() as lease:
            await asyncio.sleep(300)
        assert_single_lease_status_change(bench, end, "lost")
        assert not lease.is_loss_confirmed
        assert max(bench.get_send_times("heartbeat")) < end

    assert_lost_before_deadline()


@in_virtual_time
async def test_lease_is_lost_before_deadline_while_heartbeat_waits_for_connection(
    make_testbed: type[LeaseTestbed],
) -> None:
    """No request timeout ends the wait for a connection, so the renewer must end the lease."""
    bench = make_testbed(ttl=10)
    async with bench.opened_clients():
        leases = [await bench.send_first_heartbeat(await bench.claim_item()) for _ in range(200)]
        bench.script = FaultScript(heartbeat=[UNSENT] * 9_999)
        await asyncio.sleep(30)
    assert len(bench.lost_at) == 200
    assert all(bench.lost_at[lease.item.id] <= lease.deadline - 1 + TOLERANCE for lease in leases)


@in_virtual_time
async def test_heartbeat_that_crashes_loses_one_lease_and_keeps_the_other(
    make_testbed: type[LeaseTestbed], caplog: pytest.LogCaptureFixture
) -> None:
    bench = make_testbed()
    async with bench.opened_clients():
        leases = [await bench.send_first_heartbeat(await bench.claim_item()) for _ in range(2)]
        leases[0]._ttl_asked = "a bug"  # type: ignore[assignment]  # a bug
        bench.renewer.request_heartbeat(leases[0])
        await asyncio.sleep(60)
        assert [lease.is_held(bench.clock()) for lease in leases] == [False, True]
    assert_single_lease_status_change(bench, 0, "lost")
    assert "heartbeat crashed" in caplog.text


@in_virtual_time
async def test_stop_request_is_reported_once_while_lease_is_renewed(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed()
    async with bench.opened_clients():
        item = await bench.claim_item()
        lease = await bench.send_first_heartbeat(item)
        await bench.rival.stop(item.id)
        await asyncio.sleep(600)
        assert lease.is_held(bench.clock())
        assert lease.stop_requested
    assert [status for _, status in bench.changes] == ["held"]


@in_virtual_time
async def test_renewer_reports_lease_as_stopped_when_another_client_stops_item(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed()
    async with bench.opened_clients():
        item = await bench.claim_item()
        await bench.send_first_heartbeat(item)
        await bench.rival.stop(item.id, force=True)
        await asyncio.sleep(60)
    assert [status for _, status in bench.changes] == ["stopped"]
    assert [each.op for each in bench.sent] == ["heartbeat", "heartbeat", "get"]


@in_virtual_time
async def test_request_to_check_lease_makes_renewer_send_heartbeat_at_once(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed()
    async with bench.renewed_lease() as lease:
        await asyncio.sleep(5)
        bench.renewer.request_heartbeat(lease)
        await asyncio.sleep(TOLERANCE)
    assert bench.get_send_times("heartbeat") == pytest.approx([0, 5])


@in_virtual_time
async def test_suspended_renewer_sends_no_heartbeats(make_testbed: type[LeaseTestbed]) -> None:
    """The renewer is suspended while the handlers' loop is blocked for too long."""
    bench = make_testbed()
    async with bench.opened_clients():
        first, second = (
            await bench.send_first_heartbeat(await bench.claim_item()),
            await bench.send_first_heartbeat(await bench.claim_item()),
        )
        bench.renewer.renewing = False
        # Simulate a ping that the handlers' loop has not answered.
        bench.renewer.monitor._ping += 1
        bench.renewer.remove_lease(second)
        await asyncio.sleep(300)
        assert first.status == "lost"
    assert len(bench.sent) == 1
    assert_single_lease_status_change(bench, 54, "lost")


@in_virtual_time
async def test_release_of_lease_sends_one_last_heartbeat(make_testbed: type[LeaseTestbed]) -> None:
    bench = make_testbed()
    async with bench.opened_clients():
        item = await bench.claim_item()
        lease = await bench.send_first_heartbeat(item)
        await asyncio.sleep(5)
        bench.renewer.request_last_heartbeat(lease, 12.4)
        await asyncio.sleep(300)
    assert bench.get_send_times("heartbeat") == pytest.approx([0, 5])
    assert lease.status == "released"
    assert_single_lease_status_change(bench, 5, "released")
    assert bench.item_history(item, "heartbeat")[1].lease_end == pytest.approx(START + 5 + 12)


@pytest.mark.parametrize("answer", [Fault(answer_delay=4), RESET], ids=["slow", "reset"])
def test_release_of_lease_during_heartbeat_or_retry_sends_one_last_heartbeat(
    make_testbed: type[LeaseTestbed], answer: Fault
) -> None:
    @in_virtual_time
    async def assert_release_sends_last_heartbeat() -> None:
        bench = make_testbed(heartbeat=[None, answer, RESET])
        async with bench.opened_clients():
            item = await bench.claim_item()
            lease = await bench.send_first_heartbeat(item)
            bench.renewer.request_heartbeat(lease)
            await asyncio.sleep(0.5)
            bench.renewer.request_last_heartbeat(lease, 10)
            await asyncio.sleep(300)
        assert lease.status == "released"
        ttls = [
            round((each.lease_end or 0) - each.time)
            for each in bench.item_history(item, "heartbeat")
        ]
        assert ttls == ([60, 60, 10] if answer.applied else [60, 10])

    assert_release_sends_last_heartbeat()


@in_virtual_time
async def test_lease_is_lost_if_heartbeat_that_releases_it_cannot_be_sent(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed(heartbeat=[None, *[UNSENT] * 99])
    async with bench.renewed_lease() as lease:
        await asyncio.sleep(5)
        bench.renewer.request_last_heartbeat(lease, 10)
        await asyncio.sleep(300)
    assert bench.changes[0][0] == pytest.approx(5 + 9, abs=TOLERANCE)
    assert lease.status == "lost"
    assert len(bench.get_send_times("heartbeat")) > 3
    assert not lease.is_loss_confirmed


@in_virtual_time
async def test_release_of_ended_lease_sends_no_heartbeat(make_testbed: type[LeaseTestbed]) -> None:
    bench = make_testbed()
    async with bench.opened_clients():
        item = await bench.claim_item()
        lease = await bench.send_first_heartbeat(item)
        lease.end_lease("lost")
        bench.renewer.request_last_heartbeat(lease, 10)
        await asyncio.sleep(30)
    assert len(bench.sent) == 1


def assert_heartbeats_limited(
    peaks: list[tuple[float, int]], since: float, limit: int = HEARTBEAT_LIMIT_MIN
) -> None:
    """Assert that after `since`, concurrent heartbeats grow in number by at most 50 a second."""
    for at, in_flight in peaks:
        assert in_flight <= limit + NEW_CONNECTIONS_PER_SECOND * (at - since + TOLERANCE) + 1


@in_virtual_time
async def test_heartbeats_after_machine_sleep_use_at_most_fifty_new_connections_a_second(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed()
    async with bench.opened_clients():
        leases = [await bench.send_first_heartbeat(await bench.claim_item()) for _ in range(800)]
        await asyncio.sleep(10)
        bench.peaks.clear()
        bench.latency = 5.0
        bench.loop.suspend(22)
        await asyncio.sleep(20)
        assert all(lease.is_held(bench.clock()) for lease in leases)
    assert len(bench.peaks) >= 800
    assert_heartbeats_limited(bench.peaks, since=32)
    assert max(in_flight for _, in_flight in bench.peaks) > 100


@in_virtual_time
async def test_heartbeats_with_quick_answers_need_few_connections(
    make_testbed: type[LeaseTestbed],
) -> None:
    """A heartbeat reuses a connection that has become free instead of opening a new one."""
    bench = make_testbed()
    async with bench.opened_clients():
        for _ in range(300):
            await bench.send_first_heartbeat(await bench.claim_item())
        bench.peaks.clear()
        bench.latency = 0.001
        for lease in bench.renewer.held_leases():
            bench.renewer.request_heartbeat(lease)
        await asyncio.sleep(0.5)
    assert len(bench.peaks) == 300
    assert max(in_flight for _, in_flight in bench.peaks) <= HEARTBEAT_LIMIT_MIN + 50 * 0.1


@in_virtual_time
async def test_limit_on_concurrent_heartbeats_shrinks_when_few_leases_remain(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed()
    async with bench.opened_clients():
        leases = [await bench.send_first_heartbeat(await bench.claim_item()) for _ in range(400)]
        bench.latency = 5.0
        await asyncio.sleep(40)
        assert max(in_flight for _, in_flight in bench.peaks) > 100
        for lease in leases[5:]:
            bench.renewer.remove_lease(lease)
        await asyncio.sleep(2 * SHRINK_SECONDS + 10)
        assert bench.renewer._heartbeat_limit == HEARTBEAT_LIMIT_MIN


class ClientWithSlowHeartbeats(LocalClient):
    """A client whose heartbeats succeed after half a second.

    Simulated control planes are too slow.
    """

    def __init__(self, bench: LeaseTestbed) -> None:
        super().__init__(bench.operations, bench.settings)
        self.in_flight = 0
        self.peaks: list[tuple[float, int]] = []

    async def heartbeat(
        self, work_id: str, expected: str | None = None, ttl: int | None = None, **_: Any
    ) -> Heartbeat:
        del work_id, expected
        self.in_flight += 1
        self.peaks.append((asyncio.get_running_loop().time(), self.in_flight))
        await asyncio.sleep(0.5)
        self.in_flight -= 1
        return Heartbeat("hb", lease_extended=True, state="active", ttl_seconds=ttl or 0)


@pytest.mark.trial
@pytest.mark.timeout(180)
@in_virtual_time
async def test_six_thousand_leases_with_half_a_second_latency_stay_held(
    make_testbed: type[LeaseTestbed],
) -> None:
    """6,000 leases need 300 heartbeats a second. Each takes half a second, so 150 run at once."""
    bench = make_testbed()
    client = ClientWithSlowHeartbeats(bench)
    bench.renewer._connect = lambda: client
    async with bench.opened_clients():
        item = await bench.claim_item()
        leases = [Lease(item.work_item, 0.0, ttl=60, request_timeout=10.0) for _ in range(6_000)]
        for lease in leases:
            lease.begun, lease.due_at = True, 20.0
            bench.renewer.add_lease(lease, item)
        await asyncio.sleep(75)
        assert all(lease.remaining_seconds(bench.clock()) > 20 for lease in leases)
    assert_heartbeats_limited(client.peaks, since=20)
    assert not bench.changes


@in_virtual_time
async def test_leases_after_machine_pause_are_renewed_in_order_of_their_deadlines(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed()
    async with bench.opened_clients():
        items = []
        for _ in range(100):
            items.append(await bench.claim_item())
            await bench.send_first_heartbeat(items[-1])
            await asyncio.sleep(0.01)
        bench.script.sent.clear()
        bench.latency = 1.0
        bench.loop.suspend(35)
        await asyncio.sleep(15)
    sent = [work_id for op, work_id in bench.script.sent if op == "heartbeat"]
    assert sent[:100] == [item.id for item in items]


@in_virtual_time
async def test_machine_that_slept_beyond_ttl_loses_its_leases(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed()
    async with bench.renewed_lease() as lease:
        await asyncio.sleep(5)
        bench.loop.suspend(55)
        await asyncio.sleep(1 + TOLERANCE)
        assert (lease.status, lease.is_loss_confirmed) == ("lost", False)
    assert len(bench.sent) == 1


@in_virtual_time
async def test_machine_that_slept_within_ttl_renews_its_leases_at_once(
    make_testbed: type[LeaseTestbed],
) -> None:
    """Timers stand still while the machine sleeps, so the scheduled heartbeat would be too late."""
    bench = make_testbed()
    async with bench.renewed_lease() as lease:
        await asyncio.sleep(1)
        bench.loop.suspend(50)
        await asyncio.sleep(1 + TOLERANCE)
        assert lease.remaining_seconds(bench.clock()) > 58


@in_virtual_time
async def test_lease_with_hanging_heartbeat_is_lost_before_deadline_after_machine_sleep(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed(heartbeat=[None, UNSENT])
    async with bench.renewed_lease() as lease:
        bench.renewer.request_heartbeat(lease)
        await asyncio.sleep(0.5)
        bench.loop.suspend(53.5)
        await asyncio.sleep(1 + TOLERANCE)
        assert lease.status == "lost"
    assert bench.changes[0][0] < lease.deadline


@in_virtual_time
async def test_heartbeat_answer_read_after_sleep_beyond_ttl_does_not_extend_lease(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed(heartbeat=[None, Fault(answer_delay=5)])
    async with bench.renewed_lease() as lease:
        bench.renewer.request_heartbeat(lease)
        await asyncio.sleep(1)
        bench.loop.suspend(60)
        await asyncio.sleep(10)
        assert (lease.status, lease.deadline) == ("lost", 60)
    assert len(bench.sent) == 2


@in_virtual_time
async def test_worker_after_machine_pause_sends_only_heartbeats_until_leases_are_verified(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed()
    async with bench.opened_clients():
        items = [await bench.claim_item() for _ in range(3)]
        for item in items:
            await bench.send_first_heartbeat(item)
        await asyncio.sleep(5)
        bench.latency = 1.0
        # The wall clock jumps ahead of the lease clock, as after a pause of the machine.
        bench.ahead += 30
        for item in items:
            with pytest.raises(TransientError, match="verified first"):
                bench.sender.check_writes_allowed(item, by_handler=False)
        await asyncio.sleep(0.9)
        with pytest.raises(TransientError, match="verified first"):
            bench.sender.check_writes_allowed(items[0], by_handler=False)
        await asyncio.sleep(0.3)
        for item in items:
            bench.sender.check_requests_allowed(item, by_handler=False)
    assert bench.get_send_times("heartbeat") == pytest.approx([0, 0, 0, 5, 5, 5])
    # The renewer reports each verified lease to the pool, although its status is unchanged: the
    # report wakes the calls that wait until the lease is verified.
    assert [status for _, status in bench.changes] == ["held"] * 3


@in_virtual_time
async def test_renewer_detects_pause_of_machine_at_next_check(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed()
    async with bench.renewed_lease() as lease:
        await asyncio.sleep(5)
        bench.ahead += 30
        await asyncio.sleep(1 + TOLERANCE)
        assert lease.remaining_seconds(bench.clock()) > 58
    assert len(bench.sent) == 2


@in_virtual_time
async def test_no_write_is_sent_for_item_that_other_worker_claimed_during_machine_pause(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed()
    async with bench.opened_clients():
        item = await bench.claim_item()
        lease = await bench.send_first_heartbeat(item)
        await asyncio.sleep(5)
        bench.ahead += 300
        bench.claim_as_other_worker(item.id)
        with pytest.raises(TransientError, match="verified first"):
            bench.sender.check_writes_allowed(item, by_handler=False)
        await asyncio.sleep(1)
        with pytest.raises(LeaseLost):
            bench.sender.check_requests_allowed(item, by_handler=False)
    assert (lease.status, lease.is_loss_confirmed) == ("lost", True)
    assert [each.op for each in bench.sent] == ["heartbeat", "heartbeat"]


@in_virtual_time
async def test_machine_pause_during_heartbeat_causes_another_heartbeat_at_once(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed(heartbeat=[None, Fault(answer_delay=2)])
    async with bench.opened_clients():
        item = await bench.claim_item()
        lease = await bench.send_first_heartbeat(item)
        bench.renewer.request_heartbeat(lease)
        await asyncio.sleep(1)
        bench.ahead += 30
        with pytest.raises(TransientError, match="verified first"):
            bench.sender.check_writes_allowed(item, by_handler=False)
        await asyncio.sleep(1.1)
        bench.sender.check_requests_allowed(item, by_handler=False)
    assert bench.get_send_times("heartbeat") == pytest.approx([0, 0, 2], abs=TOLERANCE)


@in_virtual_time
async def test_machine_pause_during_claim_forbids_writes_until_lease_is_verified(
    make_testbed: type[LeaseTestbed],
) -> None:
    """The first item's heartbeat ends before the pause, the second item's heartbeat after it."""
    bench = make_testbed(heartbeat=[None, Fault(answer_delay=2)])
    async with bench.opened_clients():
        first, second = await bench.claim_item(), await bench.claim_item()
        await bench.send_first_heartbeat(first)
        async with asyncio.TaskGroup() as group:
            group.create_task(bench.send_first_heartbeat(second))
            await asyncio.sleep(1)
            bench.ahead += 300
            bench.claim_as_other_worker(second.id)
            with pytest.raises(TransientError, match="verified first"):
                bench.sender.check_writes_allowed(first, by_handler=False)
        with pytest.raises(TransientError, match="verified first"):
            bench.sender.check_writes_allowed(second, by_handler=False)
        await asyncio.sleep(1 + TOLERANCE)
        with pytest.raises(LeaseLost):
            bench.sender.check_requests_allowed(second, by_handler=False)


@in_virtual_time
async def test_machine_pause_before_first_heartbeat_loses_lease(
    make_testbed: type[LeaseTestbed],
) -> None:
    """After the pause, another worker may hold the item, so the pool must not write to it."""
    bench = make_testbed()
    async with bench.opened_clients():
        item = await bench.claim_item()
        await asyncio.sleep(1)
        bench.ahead += 300
        for _ in range(2):
            with pytest.raises(LeaseLost):
                bench.sender.check_writes_allowed(item, by_handler=False)
        await asyncio.sleep(1)
        # The ack of this item is sent after the pause, so its lease needs no verification.
        other = await bench.claim_item()
        bench.sender.check_requests_allowed(other, by_handler=False)
