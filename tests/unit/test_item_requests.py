"""Calls for an item: the check before each request, retries and time limits, in virtual time."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from workpool.errors import (
    ConflictError,
    ControlPlaneError,
    LeaseLost,
    PreconditionError,
    RefusedError,
    SessionEnded,
    SessionGoneError,
    TransientError,
)
from workpool.pool.item_requests import CALLS_PER_SESSION, TRY_PART, SendOptions
from workpool.pool.pool_item import EndReason
from workpool.pool.session_backend import UPDATE_SECONDS, PoolSessionBackend
from workpool.testing.fault import Fault
from workpool.testing.virtual_time import in_virtual_time
from workpool.wire.http.call_options import Priority

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.unit.conftest import LeaseTestbed
    from workpool.pool.pool_item import PoolItem
    from workpool.wire.http.call_options import CallOptions

SILENCE = Fault(answer="silence", applied=False)
COMPLETION_OPTIONS = SendOptions(Priority.COMPLETION, by_handler=False)
HANDLER_OPTIONS = SendOptions(Priority.HANDLER, by_handler=True)


@asynccontextmanager
async def item_with_renewed_lease(bench: LeaseTestbed) -> AsyncIterator[PoolItem]:
    """Yield an item with a renewed lease and a running handler."""
    async with bench.opened_clients():
        item = await bench.claim_item()
        await bench.send_first_heartbeat(item)
        bench.tries.clear()
        bench.sent.clear()
        async with bench.running_handler(item):
            await asyncio.sleep(0)
            yield item


async def send_metadata_update(
    bench: LeaseTestbed,
    item: PoolItem,
    options: SendOptions = COMPLETION_OPTIONS,
    before_bytes: Callable[[], None] | None = None,
) -> object:
    async def update_metadata(call_options: CallOptions, seconds: float) -> object:
        return await bench.client.update_metadata(
            item.id, {"key": "value"}, timeout=seconds, options=call_options
        )

    return await bench.sender.send_with_retries(item, update_metadata, options, before_bytes)


def get_attempts_to_update_metadata(
    bench: LeaseTestbed,
) -> list[tuple[str, float | None, CallOptions]]:
    return [each for each in bench.tries if each[0] == "update"]


def lose_lease(item: PoolItem) -> None:
    item.lease.end_lease("lost")


def report_lost_lease(bench: LeaseTestbed, item: PoolItem) -> None:
    """End the lease as lost and report the change, as the renewer does."""
    lose_lease(item)
    bench.record_lease_change(item)


def request_stop(item: PoolItem) -> None:
    item.lease.end_lease("stopped")


def close_lease_of_session(item: PoolItem) -> None:
    item.lease.closed = True


def cancel_handler(item: PoolItem) -> None:
    item.cancelled_for = EndReason.TIMED_OUT


def begin_handoff(item: PoolItem) -> None:
    handoff: Any = type("Handoff", (), {"state": "open"})
    item.handoff = handoff


ENDS: list[tuple[Callable[[PoolItem], None], type[Exception], bool]] = [
    (lose_lease, LeaseLost, False),
    (request_stop, SessionEnded, False),
    (close_lease_of_session, SessionEnded, False),
    (begin_handoff, LeaseLost, False),
    (cancel_handler, SessionEnded, True),
]
"""Events that end the right to send, the error, and whether only the handler is affected."""


@pytest.mark.parametrize(("end", "error", "by_handler"), ENDS)
@pytest.mark.parametrize("wait", ["before", "rate limit", "connection"])
def test_request_is_not_sent_if_lease_ends_right_before_sending(
    make_testbed: type[LeaseTestbed],
    end: Callable[[PoolItem], None],
    error: type[Exception],
    wait: str,
    *,
    by_handler: bool,
) -> None:
    """A lease that ends during the wait for a connection or the rate limit allows no request."""

    @in_virtual_time
    async def assert_nothing_is_sent() -> None:
        bench = make_testbed(update=[Fault(wait=5.0)] if wait == "connection" else [])
        async with item_with_renewed_lease(bench) as item:
            bench.permit_seconds = 5.0 if wait == "rate limit" else 0.0
            options = HANDLER_OPTIONS if by_handler else COMPLETION_OPTIONS
            if wait == "before":
                end(item)
            else:
                bench.loop.call_later(4.9, end, item)
            with pytest.raises(error):
                await send_metadata_update(bench, item, options)
            # If the check before an attempt fails, no further attempt follows.
            assert len(get_attempts_to_update_metadata(bench)) <= 1
        assert not bench.get_send_times("update")

    assert_nothing_is_sent()


@in_virtual_time
async def test_pool_may_write_to_item_after_cancellation_of_handler(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed()
    async with item_with_renewed_lease(bench) as item:
        item.cancelled_for = EndReason.TIMED_OUT
        await send_metadata_update(bench, item, COMPLETION_OPTIONS)
        with pytest.raises(SessionEnded):
            await send_metadata_update(bench, item, HANDLER_OPTIONS)
    assert len(bench.get_send_times("update")) == 1


@in_virtual_time
async def test_waiting_call_is_not_sent_after_machine_sleeps_longer_than_lease(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed(update=[Fault(wait=5.0)])
    async with item_with_renewed_lease(bench) as item:
        bench.loop.call_later(4.9, bench.loop.suspend, 300)
        with pytest.raises(LeaseLost):
            await send_metadata_update(bench, item)
    assert not bench.get_send_times("update")


@in_virtual_time
async def test_waiting_call_is_sent_after_first_heartbeat_that_follows_machine_pause(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed(update=[Fault(wait=5.0)])
    async with item_with_renewed_lease(bench) as item:
        bench.loop.call_later(4.99, setattr, bench, "ahead", 30.0)
        await send_metadata_update(bench, item)
        (sent,) = bench.get_send_times("update")
        heartbeat, *_ = bench.get_send_times("heartbeat")
        assert 4.99 <= heartbeat <= sent


@in_virtual_time
async def test_write_raises_lease_lost_if_lease_ended_during_undetected_machine_pause(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed()
    async with item_with_renewed_lease(bench) as item:
        item.lease.deadline = bench.clock() + 1.0
        bench.sender.check_writes_allowed(item, by_handler=False)
        bench.ahead = 1.5
        with pytest.raises(LeaseLost):
            bench.sender.check_writes_allowed(item, by_handler=False)


@in_virtual_time
async def test_waiting_call_is_not_sent_if_another_worker_claims_item_during_machine_pause(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed(update=[Fault(wait=5.0)])
    async with item_with_renewed_lease(bench) as item:

        def simulate_machine_pause() -> None:
            bench.ahead = 300.0
            bench.claim_as_other_worker(item.id)

        bench.loop.call_later(4.99, simulate_machine_pause)
        with pytest.raises(SessionGoneError):
            await send_metadata_update(bench, item)
    assert not bench.get_send_times("update")


@in_virtual_time
async def test_callback_that_runs_right_before_sending_is_not_called_if_lease_is_lost(
    make_testbed: type[LeaseTestbed],
) -> None:
    called: list[float] = []
    bench = make_testbed(update=[Fault(wait=5.0)])
    async with item_with_renewed_lease(bench) as item:

        def record_time_of_send() -> None:
            called.append(bench.clock())

        await send_metadata_update(bench, item, before_bytes=record_time_of_send)
        assert called == pytest.approx([5.0])
        lose_lease(item)
        with pytest.raises(LeaseLost):
            await send_metadata_update(bench, item, before_bytes=record_time_of_send)
    assert len(called) == 1


@in_virtual_time
async def test_call_for_item_whose_lease_attribute_is_missing_raises_attribute_error(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed()
    async with bench.opened_clients():
        item = await bench.claim_item()
        del item.lease
        with pytest.raises(AttributeError, match="lease"):
            await send_metadata_update(bench, item)


@pytest.mark.parametrize(
    "error",
    [
        RefusedError("update", 403, "x"),
        ConflictError("update", 409, "x"),
        PreconditionError("update", 412, "x"),
    ],
)
def test_call_refused_by_control_plane_is_never_retried(
    make_testbed: type[LeaseTestbed], error: ControlPlaneError
) -> None:
    @in_virtual_time
    async def assert_single_request() -> None:
        assert error.status is not None
        bench = make_testbed(update=[Fault(answer=error.status, applied=False)])
        async with item_with_renewed_lease(bench) as item:
            with pytest.raises(type(error)):
                await send_metadata_update(bench, item)
        assert len(bench.get_send_times("update")) == 1

    assert_single_request()


@in_virtual_time
async def test_attempt_of_call_takes_at_most_a_third_of_remaining_lease(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed(request_timeout=300.0, update=[SILENCE] * 99)
    async with item_with_renewed_lease(bench) as item:
        lease = item.lease
        bench.renewer.remove_lease(lease)
        # `remove_lease` also marks the session as closed, which this test does not need.
        lease.closed = False
        with pytest.raises(TransientError):
            await send_metadata_update(bench, item)
        sent = bench.get_send_times("update")
        assert len(sent) > 5
        assert all(
            seconds is not None and seconds <= (60 - at) / TRY_PART + 1e-6
            for at, (_, seconds, _) in zip(
                sent, get_attempts_to_update_metadata(bench), strict=True
            )
        )
        assert get_attempts_to_update_metadata(bench)[0][1] == pytest.approx(20)
        assert bench.clock() <= lease.deadline


@in_virtual_time
async def test_each_attempt_of_call_is_limited_by_setting_request_timeout(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed(request_timeout=2.0, update=[SILENCE])
    async with item_with_renewed_lease(bench) as item:
        await send_metadata_update(bench, item)
    assert [seconds for _, seconds, _ in get_attempts_to_update_metadata(bench)] == [2.0, 2.0]
    first, second = bench.get_send_times("update")
    assert 2.0 <= second - first <= 2.0 + 0.2


@in_virtual_time
async def test_each_attempt_takes_at_most_a_third_of_time_limit_of_call(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed(update=[SILENCE] * 99)
    async with item_with_renewed_lease(bench) as item:
        with pytest.raises(TransientError) as caught:
            await send_metadata_update(bench, item, COMPLETION_OPTIONS._replace(seconds=3.0))
        assert caught.value.reason == "timeout"
        assert 1.0 < bench.clock() <= 3.0
    assert get_attempts_to_update_metadata(bench)[0][1] == pytest.approx(1.0)
    assert len(get_attempts_to_update_metadata(bench)) > 1


@pytest.mark.parametrize(
    ("failure", "new"),
    [
        (SILENCE, True),
        (Fault(answer="reset", applied=False), True),
        (Fault(answer=503, applied=False), False),
        (Fault(answer=429, applied=False), False),
        (Fault(answer=b"{"), False),
    ],
    ids=["silence", "reset", "503", "429", "garbage"],
)
def test_call_repeated_because_of_missing_answer_uses_new_connection(
    make_testbed: type[LeaseTestbed], failure: Fault, *, new: bool
) -> None:
    @in_virtual_time
    async def send_two_updates() -> None:
        bench = make_testbed(update=[failure])
        async with item_with_renewed_lease(bench) as item:
            await send_metadata_update(bench, item)
            await send_metadata_update(bench, item)
        assert [
            options.new_connection for *_, options in get_attempts_to_update_metadata(bench)
        ] == [
            False,
            new,
            False,
        ]

    send_two_updates()


@in_virtual_time
async def test_repeated_call_keeps_rate_limit_priority_and_permit_of_first_attempt(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed(update=[SILENCE])
    async with item_with_renewed_lease(bench) as item:
        await send_metadata_update(bench, item, COMPLETION_OPTIONS)
        await send_metadata_update(bench, item, HANDLER_OPTIONS)
    assert [options.priority for *_, options in get_attempts_to_update_metadata(bench)] == [
        Priority.COMPLETION,
        Priority.COMPLETION,
        Priority.HANDLER,
    ]
    assert all(options.permit for *_, options in get_attempts_to_update_metadata(bench))


@in_virtual_time
@pytest.mark.usefixtures("longest_retry_delays")
async def test_completion_write_is_retried_as_long_as_lease_is_renewed(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed(update=[Fault(answer=503, applied=False)] * 200)
    async with item_with_renewed_lease(bench) as item:
        await send_metadata_update(bench, item)
        between = [later - earlier for earlier, later in pairwise(bench.get_send_times("update"))]
        assert between == pytest.approx([0.2, 0.4, 0.8, 1.6, *[3] * 196])


@in_virtual_time
async def test_retry_after_header_delays_retry_by_at_most_half_of_remaining_time(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed(update=[Fault(answer=503, applied=False, retry_after=5)])
    async with item_with_renewed_lease(bench) as item:
        await send_metadata_update(bench, item)
        assert bench.clock() == pytest.approx(5)
    other_bench = make_testbed(update=[Fault(answer=429, applied=False, retry_after=300)])
    begun_at = other_bench.clock()
    async with item_with_renewed_lease(other_bench) as item:
        await send_metadata_update(other_bench, item, COMPLETION_OPTIONS._replace(seconds=20.0))
        assert other_bench.clock() == pytest.approx(begun_at + 10)


@pytest.mark.parametrize(
    "fault",
    [Fault(answer=503, applied=False, retry_after=20), SILENCE],
    ids=["between two attempts", "during an attempt"],
)
def test_call_ends_at_once_if_lease_is_lost_meanwhile(
    make_testbed: type[LeaseTestbed], fault: Fault
) -> None:
    @in_virtual_time
    async def lose_lease_during_update() -> None:
        bench = make_testbed(update=[fault])
        async with item_with_renewed_lease(bench) as item:
            bench.loop.call_later(1, report_lost_lease, bench, item)
            with pytest.raises(LeaseLost):
                await send_metadata_update(bench, item)
            assert bench.clock() == pytest.approx(1)

    lose_lease_during_update()


@in_virtual_time
async def test_call_raises_lease_lost_if_it_times_out_just_as_lease_is_lost(
    make_testbed: type[LeaseTestbed],
) -> None:
    """A loop that was blocked may handle the timeout and the loss of the lease in one turn."""
    bench = make_testbed(update=[SILENCE] * 9)
    async with item_with_renewed_lease(bench) as item:
        # The lease ends so soon after the timeout that both happen in one turn of the loop.
        bench.loop.call_at(10 + 1e-7, report_lost_lease, bench, item)
        with pytest.raises(LeaseLost):
            await send_metadata_update(bench, item)
        assert bench.clock() < 11


@in_virtual_time
async def test_call_raises_cancelled_error_if_calling_task_is_cancelled(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed(update=[SILENCE])
    async with item_with_renewed_lease(bench) as item, asyncio.TaskGroup() as group:
        task = group.create_task(send_metadata_update(bench, item))
        await asyncio.sleep(1)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
        assert not item.open_sends


@in_virtual_time
async def test_call_that_takes_longer_than_lease_ttl_succeeds_while_lease_is_renewed(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed()
    answered = asyncio.Event()
    async with item_with_renewed_lease(bench) as item:

        async def read_session() -> str:
            await answered.wait()
            return "answer"

        bench.loop.call_later(300, answered.set)
        assert await bench.sender.await_call_while_leased(item, read_session) == "answer"


@in_virtual_time
async def test_call_that_needs_lease_ends_at_time_limit_or_when_lease_is_lost(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed()
    async with item_with_renewed_lease(bench) as item:
        with pytest.raises(TimeoutError):
            await bench.sender.await_call_while_leased(item, asyncio.Event().wait, 7.0)
        assert bench.clock() == pytest.approx(7)
        bench.loop.call_later(3, report_lost_lease, bench, item)
        with pytest.raises(LeaseLost):
            await bench.sender.await_call_while_leased(item, asyncio.Event().wait, 100.0)
        assert bench.clock() == pytest.approx(10)


@in_virtual_time
async def test_many_concurrent_calls_by_one_handler_do_not_delay_calls_by_another(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed()
    async with item_with_renewed_lease(bench) as item:
        other = await bench.claim_item()
        await bench.send_first_heartbeat(other)
        async with bench.running_handler(other), asyncio.TaskGroup() as group:
            await asyncio.sleep(0)
            bench.peaks.clear()
            bench.latency = 1.0
            context: Any = bench
            busy = PoolSessionBackend(item, context, bench.sender)
            calls = [group.create_task(busy.update_metadata({"a": "b"})) for _ in range(100)]
            await asyncio.sleep(0.5)
            assert bench.in_flight == CALLS_PER_SESSION == 8
            await PoolSessionBackend(other, context, bench.sender).update_metadata({"a": "b"})
            assert bench.clock() == pytest.approx(1.5)
            await asyncio.wait(calls)
        assert max(in_flight for _, in_flight in bench.peaks) == CALLS_PER_SESSION + 1


@in_virtual_time
@pytest.mark.usefixtures("longest_retry_delays")
async def test_call_made_by_handler_is_retried_until_time_limit_of_call(
    make_testbed: type[LeaseTestbed],
) -> None:
    bench = make_testbed(update=[Fault(answer=503, applied=False)] * 999)
    async with item_with_renewed_lease(bench) as item:
        context: Any = bench
        with pytest.raises(TransientError):
            await PoolSessionBackend(item, context, bench.sender).update_metadata({"a": "b"})
        assert UPDATE_SECONDS - 3 <= bench.clock() <= UPDATE_SECONDS
