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
from workpool.pool.lease_renewer import HEARTBEATS_MIN, NEW_CONNECTIONS_PER_SECOND, SHRINK_SECONDS
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
"""A little more than the shortest time between two ticks of the renewer."""


def make_fault_that_refuses_request(status: int) -> Fault:
    return Fault(answer=status, applied=False)


def compute_seconds_between_times(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(times)]


def assert_single_lease_status_change(one: LeaseTestbed, at: float, status: str) -> None:
    """Assert that the status of one lease changed once: at the time `at`, to `status`."""
    [(changed_at, changed_to)] = one.changes
    assert changed_at == pytest.approx(at, abs=TOLERANCE)
    assert changed_to == status


@in_virtual_time
async def test_lease_added_by_another_thread_during_renewer_tick_raises_no_error(
    testbed: type[LeaseTestbed],
) -> None:
    one = testbed()
    async with one.opened_clients():
        items = [await one.claim_item() for _ in range(30)]
        for item in items[:20]:
            one.renewer.add_lease(item.lease, item)
        others = iter(items[20:])

        def add_lease_during_garbage_collection(_phase: str, _info: object) -> None:
            # Garbage collection calls this function in the middle of a tick, and thereby simulates
            # another thread that adds a lease.
            for item in islice(others, 1):
                one.renewer.add_lease(item.lease, item)

        former = gc.get_threshold()
        # Use up the free tuples that Python reuses, because a reused tuple starts no garbage
        # collection.
        used = [(number, number) for number in range(5_000)]
        gc.callbacks.append(add_lease_during_garbage_collection)
        try:
            gc.set_threshold(1)
            one.renewer._end_or_renew_leases()
        finally:
            gc.set_threshold(*former)
            gc.callbacks.remove(add_lease_during_garbage_collection)
        assert len(used) == 5_000
        assert len(one.renewer.held_leases()) > 20


@in_virtual_time
async def test_lease_is_renewed_every_third_of_ttl_for_an_hour(testbed: type[LeaseTestbed]) -> None:
    one = testbed()
    async with one.renewed_lease() as lease:
        await asyncio.sleep(3_600)
        assert lease.is_held(one.clock())
    between = compute_seconds_between_times(one.get_send_times("heartbeat"))
    assert len(between) > 3_600 / 20.1
    assert all(18 <= gap <= 20 + TOLERANCE for gap in between)
    assert set(one.heartbeat_results()) == {"ok"}
    assert max(event.lag_seconds for _, event in one.results) < TOLERANCE
    assert not one.changes


@in_virtual_time
async def test_lease_added_to_idle_renewer_is_renewed_in_time(testbed: type[LeaseTestbed]) -> None:
    one = testbed(ttl=10)
    async with one.opened_clients():
        await asyncio.sleep(100.5)
        lease = await one.send_first_heartbeat(await one.claim_item())
        await asyncio.sleep(100)
        assert lease.is_held(one.clock())
    assert max(compute_seconds_between_times(one.get_send_times("heartbeat"))) < 10 / 3 + TOLERANCE


@in_virtual_time
async def test_removed_lease_is_not_renewed(testbed: type[LeaseTestbed]) -> None:
    one = testbed()
    async with one.renewed_lease() as lease:
        assert one.renewer.held_leases() == [lease]
        one.renewer.remove_lease(lease)
        assert one.renewer.held_leases() == []
        await asyncio.sleep(300)
    assert len(one.sent) == 1
    assert not one.changes


@in_virtual_time
async def test_ended_lease_is_not_added_to_renewer(testbed: type[LeaseTestbed]) -> None:
    one = testbed()
    async with one.opened_clients():
        item = await one.claim_item()
        item.lease.end_lease("lost")
        one.renewer.add_lease(item.lease, item)
        assert one.renewer.held_leases() == []


@in_virtual_time
async def test_failed_heartbeat_is_repeated_with_growing_delay(testbed: type[LeaseTestbed]) -> None:
    one = testbed(heartbeat=[None, *[RESET] * 6])
    async with one.renewed_lease() as lease:
        await asyncio.sleep(50)
        assert lease.is_held(one.clock())
    assert compute_seconds_between_times(one.get_send_times("heartbeat"))[1:7] == pytest.approx(
        [1, 2, 4, 4, 4, 4], abs=TOLERANCE
    )
    assert one.heartbeat_results() == ["ok", *["transient"] * 6, "ok"]


@in_virtual_time
async def test_urgent_heartbeat_is_sent_without_waiting_for_tick(
    testbed: type[LeaseTestbed],
) -> None:
    slow = Fault(answer=409, applied=False, answer_delay=3)
    one = testbed(heartbeat=[None, slow], get=[Fault(answer_delay=3)])
    async with one.renewed_lease():
        await asyncio.sleep(30)
    assert one.heartbeat_results() == ["ok", "recovered", "ok"]
    _, second, third = one.get_send_times("heartbeat")
    assert third == pytest.approx(second + 6)
    # The slow answers delay the third heartbeat, but this delay is no lag of the renewer.
    assert max(event.lag_seconds for _, event in one.results) < TOLERANCE


@in_virtual_time
async def test_lost_answer_of_heartbeat_is_recovered_by_reading_item(
    testbed: type[LeaseTestbed],
) -> None:
    one = testbed(heartbeat=[None, LOST])
    async with one.renewed_lease() as lease:
        await asyncio.sleep(120)
        assert lease.is_held(one.clock())
    assert one.heartbeat_results()[:4] == ["ok", "timeout", "recovered", "ok"]


@in_virtual_time
async def test_lease_with_contradictory_heartbeat_answers_is_lost_after_few_requests(
    testbed: type[LeaseTestbed],
) -> None:
    one = testbed(heartbeat=[None, LOST, *[make_fault_that_refuses_request(412)] * 999])
    async with one.renewed_lease() as lease:
        await asyncio.sleep(600)
        assert lease.status == "lost"
    assert len(one.sent) < 30


@pytest.mark.parametrize(("ttl", "end"), [(60, 54), (10, 9)])
def test_lease_whose_heartbeats_get_no_answer_is_lost_before_deadline(
    testbed: type[LeaseTestbed], ttl: int, end: float
) -> None:
    @in_virtual_time
    async def assert_lost_before_deadline() -> None:
        one = testbed(ttl=ttl, heartbeat=[None, *[UNSENT] * 999])
        async with one.renewed_lease() as lease:
            await asyncio.sleep(300)
        assert_single_lease_status_change(one, end, "lost")
        assert not lease.is_loss_confirmed
        assert max(one.get_send_times("heartbeat")) < end

    assert_lost_before_deadline()


@in_virtual_time
async def test_lease_is_lost_before_deadline_while_heartbeat_waits_for_connection(
    testbed: type[LeaseTestbed],
) -> None:
    """No request timeout ends the wait for a connection, so the renewer must end the lease."""
    one = testbed(ttl=10)
    async with one.opened_clients():
        leases = [await one.send_first_heartbeat(await one.claim_item()) for _ in range(200)]
        one.script = FaultScript(heartbeat=[UNSENT] * 9_999)
        await asyncio.sleep(30)
    assert len(one.lost_at) == 200
    assert all(one.lost_at[lease.item.id] <= lease.deadline - 1 + TOLERANCE for lease in leases)


@in_virtual_time
async def test_heartbeat_that_crashes_loses_one_lease_and_keeps_the_other(
    testbed: type[LeaseTestbed], caplog: pytest.LogCaptureFixture
) -> None:
    one = testbed()
    async with one.opened_clients():
        leases = [await one.send_first_heartbeat(await one.claim_item()) for _ in range(2)]
        leases[0]._ttl_asked = "a bug"  # type: ignore[assignment]  # a bug
        one.renewer.request_heartbeat(leases[0])
        await asyncio.sleep(60)
        assert [lease.is_held(one.clock()) for lease in leases] == [False, True]
    assert_single_lease_status_change(one, 0, "lost")
    assert "heartbeat crashed" in caplog.text


@in_virtual_time
async def test_stop_request_is_reported_once_while_lease_is_renewed(
    testbed: type[LeaseTestbed],
) -> None:
    one = testbed()
    async with one.opened_clients():
        item = await one.claim_item()
        lease = await one.send_first_heartbeat(item)
        await one.rival.stop(item.id)
        await asyncio.sleep(600)
        assert lease.is_held(one.clock())
        assert lease.stop_requested
    assert [status for _, status in one.changes] == ["held"]


@in_virtual_time
async def test_renewer_reports_lease_as_stopped_when_another_client_stops_item(
    testbed: type[LeaseTestbed],
) -> None:
    one = testbed()
    async with one.opened_clients():
        item = await one.claim_item()
        await one.send_first_heartbeat(item)
        await one.rival.stop(item.id, force=True)
        await asyncio.sleep(60)
    assert [status for _, status in one.changes] == ["stopped"]
    assert [each.op for each in one.sent] == ["heartbeat", "heartbeat", "get"]


@in_virtual_time
async def test_request_to_check_lease_makes_renewer_send_heartbeat_at_once(
    testbed: type[LeaseTestbed],
) -> None:
    one = testbed()
    async with one.renewed_lease() as lease:
        await asyncio.sleep(5)
        one.renewer.request_heartbeat(lease)
        await asyncio.sleep(TOLERANCE)
    assert one.get_send_times("heartbeat") == pytest.approx([0, 5])


@in_virtual_time
async def test_suspended_renewer_sends_no_heartbeats(testbed: type[LeaseTestbed]) -> None:
    """The renewer is suspended while the handlers' loop is blocked for too long."""
    one = testbed()
    async with one.opened_clients():
        first, second = (
            await one.send_first_heartbeat(await one.claim_item()),
            await one.send_first_heartbeat(await one.claim_item()),
        )
        one.renewer.renewing = False
        one.renewer.monitor._ping += 1  # Simulate a ping that the handlers' loop has not answered.
        one.renewer.remove_lease(second)
        await asyncio.sleep(300)
        assert first.status == "lost"
    assert len(one.sent) == 1
    assert_single_lease_status_change(one, 54, "lost")


@in_virtual_time
async def test_release_of_lease_sends_one_last_heartbeat(testbed: type[LeaseTestbed]) -> None:
    one = testbed()
    async with one.opened_clients():
        item = await one.claim_item()
        lease = await one.send_first_heartbeat(item)
        await asyncio.sleep(5)
        one.renewer.request_last_heartbeat(lease, 12.4)
        await asyncio.sleep(300)
    assert one.get_send_times("heartbeat") == pytest.approx([0, 5])
    assert lease.status == "released"
    assert_single_lease_status_change(one, 5, "released")
    assert one.item_history(item, "heartbeat")[1].lease_end == pytest.approx(START + 5 + 12)


@pytest.mark.parametrize("answer", [Fault(answer_delay=4), RESET], ids=["slow", "reset"])
def test_release_of_lease_during_heartbeat_or_retry_sends_one_last_heartbeat(
    testbed: type[LeaseTestbed], answer: Fault
) -> None:
    @in_virtual_time
    async def assert_release_sends_last_heartbeat() -> None:
        one = testbed(heartbeat=[None, answer, RESET])
        async with one.opened_clients():
            item = await one.claim_item()
            lease = await one.send_first_heartbeat(item)
            one.renewer.request_heartbeat(lease)
            await asyncio.sleep(0.5)
            one.renewer.request_last_heartbeat(lease, 10)
            await asyncio.sleep(300)
        assert lease.status == "released"
        ttls = [
            round((each.lease_end or 0) - each.time) for each in one.item_history(item, "heartbeat")
        ]
        assert ttls == ([60, 60, 10] if answer.applied else [60, 10])

    assert_release_sends_last_heartbeat()


@in_virtual_time
async def test_lease_is_lost_if_heartbeat_that_releases_it_cannot_be_sent(
    testbed: type[LeaseTestbed],
) -> None:
    one = testbed(heartbeat=[None, *[UNSENT] * 99])
    async with one.renewed_lease() as lease:
        await asyncio.sleep(5)
        one.renewer.request_last_heartbeat(lease, 10)
        await asyncio.sleep(300)
    assert one.changes[0][0] == pytest.approx(5 + 9, abs=TOLERANCE)
    assert lease.status == "lost"
    assert len(one.get_send_times("heartbeat")) > 3
    assert not lease.is_loss_confirmed


@in_virtual_time
async def test_release_of_ended_lease_sends_no_heartbeat(testbed: type[LeaseTestbed]) -> None:
    one = testbed()
    async with one.opened_clients():
        item = await one.claim_item()
        lease = await one.send_first_heartbeat(item)
        lease.end_lease("lost")
        one.renewer.request_last_heartbeat(lease, 10)
        await asyncio.sleep(30)
    assert len(one.sent) == 1


def assert_heartbeats_limited(
    peaks: list[tuple[float, int]], since: float, limit: int = HEARTBEATS_MIN
) -> None:
    """Assert that after `since`, concurrent heartbeats grow in number by at most 50 a second."""
    for at, in_flight in peaks:
        assert in_flight <= limit + NEW_CONNECTIONS_PER_SECOND * (at - since + TOLERANCE) + 1


@in_virtual_time
async def test_heartbeats_after_machine_sleep_use_at_most_fifty_new_connections_a_second(
    testbed: type[LeaseTestbed],
) -> None:
    one = testbed()
    async with one.opened_clients():
        leases = [await one.send_first_heartbeat(await one.claim_item()) for _ in range(800)]
        await asyncio.sleep(10)
        one.peaks.clear()
        one.latency = 5.0
        one.loop.suspend(22)
        await asyncio.sleep(20)
        assert all(lease.is_held(one.clock()) for lease in leases)
    assert len(one.peaks) >= 800
    assert_heartbeats_limited(one.peaks, since=32)
    assert max(in_flight for _, in_flight in one.peaks) > 100


@in_virtual_time
async def test_heartbeats_with_quick_answers_need_few_connections(
    testbed: type[LeaseTestbed],
) -> None:
    """A heartbeat reuses a connection that has become free instead of opening a new one."""
    one = testbed()
    async with one.opened_clients():
        for _ in range(300):
            await one.send_first_heartbeat(await one.claim_item())
        one.peaks.clear()
        one.latency = 0.001
        for lease in one.renewer.held_leases():
            one.renewer.request_heartbeat(lease)
        await asyncio.sleep(0.5)
    assert len(one.peaks) == 300
    assert max(in_flight for _, in_flight in one.peaks) <= HEARTBEATS_MIN + 50 * 0.1


@in_virtual_time
async def test_limit_on_concurrent_heartbeats_shrinks_when_few_leases_remain(
    testbed: type[LeaseTestbed],
) -> None:
    one = testbed()
    async with one.opened_clients():
        leases = [await one.send_first_heartbeat(await one.claim_item()) for _ in range(400)]
        one.latency = 5.0
        await asyncio.sleep(40)
        assert max(in_flight for _, in_flight in one.peaks) > 100
        for lease in leases[5:]:
            one.renewer.remove_lease(lease)
        await asyncio.sleep(2 * SHRINK_SECONDS + 10)
        assert one.renewer._heartbeat_limit == HEARTBEATS_MIN


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
    testbed: type[LeaseTestbed],
) -> None:
    """6,000 leases need 300 heartbeats a second. Each takes half a second, so 150 run at once."""
    one = testbed()
    client = ClientWithSlowHeartbeats(one)
    one.renewer._connect = lambda: client
    async with one.opened_clients():
        item = await one.claim_item()
        leases = [Lease(item.work_item, 0.0, ttl=60, request_timeout=10.0) for _ in range(6_000)]
        for lease in leases:
            lease.begun, lease.due_at = True, 20.0
            one.renewer.add_lease(lease, item)
        await asyncio.sleep(75)
        assert all(lease.remaining_seconds(one.clock()) > 20 for lease in leases)
    assert_heartbeats_limited(client.peaks, since=20)
    assert not one.changes


@in_virtual_time
async def test_leases_after_machine_pause_are_renewed_in_order_of_their_deadlines(
    testbed: type[LeaseTestbed],
) -> None:
    one = testbed()
    async with one.opened_clients():
        items = []
        for _ in range(100):
            items.append(await one.claim_item())
            await one.send_first_heartbeat(items[-1])
            await asyncio.sleep(0.01)
        one.script.sent.clear()
        one.latency = 1.0
        one.loop.suspend(35)
        await asyncio.sleep(15)
    sent = [work_id for op, work_id in one.script.sent if op == "heartbeat"]
    assert sent[:100] == [item.id for item in items]


@in_virtual_time
async def test_machine_that_slept_beyond_ttl_loses_its_leases(testbed: type[LeaseTestbed]) -> None:
    one = testbed()
    async with one.renewed_lease() as lease:
        await asyncio.sleep(5)
        one.loop.suspend(55)
        await asyncio.sleep(1 + TOLERANCE)
        assert (lease.status, lease.is_loss_confirmed) == ("lost", False)
    assert len(one.sent) == 1


@in_virtual_time
async def test_machine_that_slept_within_ttl_renews_its_leases_at_once(
    testbed: type[LeaseTestbed],
) -> None:
    """Timers stand still while the machine sleeps, so the scheduled heartbeat would be too late."""
    one = testbed()
    async with one.renewed_lease() as lease:
        await asyncio.sleep(1)
        one.loop.suspend(50)
        await asyncio.sleep(1 + TOLERANCE)
        assert lease.remaining_seconds(one.clock()) > 58


@in_virtual_time
async def test_lease_with_hanging_heartbeat_is_lost_before_deadline_after_machine_sleep(
    testbed: type[LeaseTestbed],
) -> None:
    one = testbed(heartbeat=[None, UNSENT])
    async with one.renewed_lease() as lease:
        one.renewer.request_heartbeat(lease)
        await asyncio.sleep(0.5)
        one.loop.suspend(53.5)
        await asyncio.sleep(1 + TOLERANCE)
        assert lease.status == "lost"
    assert one.changes[0][0] < lease.deadline


@in_virtual_time
async def test_heartbeat_answer_read_after_sleep_beyond_ttl_does_not_extend_lease(
    testbed: type[LeaseTestbed],
) -> None:
    one = testbed(heartbeat=[None, Fault(answer_delay=5)])
    async with one.renewed_lease() as lease:
        one.renewer.request_heartbeat(lease)
        await asyncio.sleep(1)
        one.loop.suspend(60)
        await asyncio.sleep(10)
        assert (lease.status, lease.deadline) == ("lost", 60)
    assert len(one.sent) == 2


@in_virtual_time
async def test_worker_after_machine_pause_sends_only_heartbeats_until_leases_are_verified(
    testbed: type[LeaseTestbed],
) -> None:
    one = testbed()
    async with one.opened_clients():
        items = [await one.claim_item() for _ in range(3)]
        for item in items:
            await one.send_first_heartbeat(item)
        await asyncio.sleep(5)
        one.latency = 1.0
        # The wall clock jumps ahead of the lease clock, as after a pause of the machine.
        one.ahead += 30
        for item in items:
            with pytest.raises(TransientError, match="verified first"):
                one.sender.check_writes_allowed(item, by_handler=False)
        await asyncio.sleep(0.9)
        with pytest.raises(TransientError, match="verified first"):
            one.sender.check_writes_allowed(items[0], by_handler=False)
        await asyncio.sleep(0.3)
        for item in items:
            one.sender.check_requests_allowed(item, by_handler=False)
    assert one.get_send_times("heartbeat") == pytest.approx([0, 0, 0, 5, 5, 5])
    # The renewer reports each verified lease to the pool, although its status is unchanged: the
    # report wakes the calls that wait until the lease is verified.
    assert [status for _, status in one.changes] == ["held"] * 3


@in_virtual_time
async def test_renewer_detects_pause_of_machine_at_next_tick(testbed: type[LeaseTestbed]) -> None:
    one = testbed()
    async with one.renewed_lease() as lease:
        await asyncio.sleep(5)
        one.ahead += 30
        await asyncio.sleep(1 + TOLERANCE)
        assert lease.remaining_seconds(one.clock()) > 58
    assert len(one.sent) == 2


@in_virtual_time
async def test_lease_of_item_claimed_elsewhere_during_machine_pause_is_lost_before_any_write(
    testbed: type[LeaseTestbed],
) -> None:
    one = testbed()
    async with one.opened_clients():
        item = await one.claim_item()
        lease = await one.send_first_heartbeat(item)
        await asyncio.sleep(5)
        one.ahead += 300
        one.claim_as_other_worker(item.id)
        with pytest.raises(TransientError, match="verified first"):
            one.sender.check_writes_allowed(item, by_handler=False)
        await asyncio.sleep(1)
        with pytest.raises(LeaseLost):
            one.sender.check_requests_allowed(item, by_handler=False)
    assert (lease.status, lease.is_loss_confirmed) == ("lost", True)
    assert [each.op for each in one.sent] == ["heartbeat", "heartbeat"]


@in_virtual_time
async def test_machine_pause_during_heartbeat_causes_another_heartbeat_at_once(
    testbed: type[LeaseTestbed],
) -> None:
    one = testbed(heartbeat=[None, Fault(answer_delay=2)])
    async with one.opened_clients():
        item = await one.claim_item()
        lease = await one.send_first_heartbeat(item)
        one.renewer.request_heartbeat(lease)
        await asyncio.sleep(1)
        one.ahead += 30
        with pytest.raises(TransientError, match="verified first"):
            one.sender.check_writes_allowed(item, by_handler=False)
        await asyncio.sleep(1.1)
        one.sender.check_requests_allowed(item, by_handler=False)
    assert one.get_send_times("heartbeat") == pytest.approx([0, 0, 2], abs=TOLERANCE)


@in_virtual_time
async def test_machine_pause_during_claim_forbids_writes_until_lease_is_verified(
    testbed: type[LeaseTestbed],
) -> None:
    """The first item's heartbeat ends before the pause, the second item's heartbeat after it."""
    one = testbed(heartbeat=[None, Fault(answer_delay=2)])
    async with one.opened_clients():
        first, second = await one.claim_item(), await one.claim_item()
        await one.send_first_heartbeat(first)
        async with asyncio.TaskGroup() as group:
            group.create_task(one.send_first_heartbeat(second))
            await asyncio.sleep(1)
            one.ahead += 300
            one.claim_as_other_worker(second.id)
            with pytest.raises(TransientError, match="verified first"):
                one.sender.check_writes_allowed(first, by_handler=False)
        with pytest.raises(TransientError, match="verified first"):
            one.sender.check_writes_allowed(second, by_handler=False)
        await asyncio.sleep(1 + TOLERANCE)
        with pytest.raises(LeaseLost):
            one.sender.check_requests_allowed(second, by_handler=False)


@in_virtual_time
async def test_machine_pause_before_first_heartbeat_loses_lease(
    testbed: type[LeaseTestbed],
) -> None:
    """After the pause, another worker may hold the item, so the pool must not write to it."""
    one = testbed()
    async with one.opened_clients():
        item = await one.claim_item()
        await asyncio.sleep(1)
        one.ahead += 300
        for _ in range(2):
            with pytest.raises(LeaseLost):
                one.sender.check_writes_allowed(item, by_handler=False)
        await asyncio.sleep(1)
        # The ack of this item is sent after the pause, so its lease needs no verification.
        other = await one.claim_item()
        one.sender.check_requests_allowed(other, by_handler=False)
