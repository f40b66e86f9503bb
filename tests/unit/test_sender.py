"""The sender: the check before each request, retries and time limits, in virtual time."""

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
from workpool.pool.pool_item import EndReason
from workpool.pool.sender import CALLS_PER_SESSION, TRY_PART, SendOptions
from workpool.pool.session_runner import UPDATE_SECONDS, SessionCalls
from workpool.testing.fault import Fault
from workpool.testing.virtual_time import in_virtual_time
from workpool.wire.http.call_options import Priority

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.unit.conftest import Bench
    from workpool.pool.pool_item import PoolItem
    from workpool.wire.http.call_options import CallOptions

SILENCE = Fault(answer="silence", applied=False)
WRITE = SendOptions(Priority.COMPLETION, by_handler=False)
CALL = SendOptions(Priority.HANDLER, by_handler=True)


@asynccontextmanager
async def begun(one: Bench) -> AsyncIterator[PoolItem]:
    """Return an item whose lease has begun and is renewed, and whose handler runs."""
    async with one.open():
        item = await one.claim()
        await one.begin(item)
        one.tries.clear()
        one.sent.clear()
        async with one.handler_of(item):
            await asyncio.sleep(0)
            yield item


async def update(one: Bench, item: PoolItem, request: SendOptions = WRITE) -> object:
    async def call(options: CallOptions, seconds: float) -> object:
        return await one.client.update_metadata(
            item.id, {"key": "value"}, timeout=seconds, options=options
        )

    return await one.sender.send(item, call, request)


def updates(one: Bench) -> list[tuple[str, float | None, CallOptions]]:
    return [each for each in one.tries if each[0] == "update"]


# The check.


def lose(item: PoolItem) -> None:
    item.lease.end("lost")


def stop(item: PoolItem) -> None:
    item.lease.end("stopped")


def close(item: PoolItem) -> None:
    item.lease.closed = True


def cancel(item: PoolItem) -> None:
    item.cancelled_for = EndReason.TIMED_OUT


def lend(item: PoolItem) -> None:
    handoff: Any = type("Handoff", (), {"state": "open"})
    item.handoff = handoff


ENDS: list[tuple[Callable[[PoolItem], None], type[Exception], bool]] = [
    (lose, LeaseLost, False),
    (stop, SessionEnded, False),
    (close, SessionEnded, False),
    (lend, LeaseLost, False),
    (cancel, SessionEnded, True),
]
"""Events that end the right to send, the error, and whether only the handler is affected."""


@pytest.mark.parametrize(("end", "error", "by_handler"), ENDS)
@pytest.mark.parametrize("wait", ["before", "rate limit", "connection"])
def test_lease_check_is_made_right_before_request_bytes(
    bench: type[Bench],
    end: Callable[[PoolItem], None],
    error: type[Exception],
    wait: str,
    *,
    by_handler: bool,
) -> None:
    """The state at the end of the wait decides."""

    @in_virtual_time
    async def check() -> None:
        one = bench(update=[Fault(wait=5.0)] if wait == "connection" else [])
        async with begun(one) as item:
            one.permit_seconds = 5.0 if wait == "rate limit" else 0.0
            request = CALL if by_handler else WRITE
            if wait == "before":
                end(item)
            else:
                one.loop.call_later(4.9, end, item)
            with pytest.raises(error):
                await update(one, item, request)
            assert len(updates(one)) <= 1  # a refused check is never retried
        assert not one.times("update")

    check()


@in_virtual_time
async def test_call_of_pool_is_allowed_after_handler_was_cancelled(bench: type[Bench]) -> None:
    one = bench()
    async with begun(one) as item:
        item.cancelled_for = EndReason.TIMED_OUT
        await update(one, item, WRITE)
        with pytest.raises(SessionEnded):
            await update(one, item, CALL)
    assert len(one.times("update")) == 1


@in_virtual_time
async def test_machine_that_slept_during_wait_sends_nothing(bench: type[Bench]) -> None:
    one = bench(update=[Fault(wait=5.0)])
    async with begun(one) as item:
        one.loop.call_later(4.9, one.loop.suspend, 300)
        with pytest.raises(LeaseLost):
            await update(one, item)
    assert not one.times("update")


@in_virtual_time
async def test_machine_paused_during_wait_verifies_lease_before_sending(
    bench: type[Bench],
) -> None:
    one = bench(update=[Fault(wait=5.0)])
    async with begun(one) as item:
        one.loop.call_later(4.99, setattr, one, "ahead", 30.0)
        await update(one, item)
        (sent,) = one.times("update")
        heartbeat, *_ = one.times("heartbeat")
        assert 4.99 <= heartbeat <= sent


@in_virtual_time
async def test_machine_paused_while_another_worker_claimed_sends_nothing(
    bench: type[Bench],
) -> None:
    one = bench(update=[Fault(wait=5.0)])
    async with begun(one) as item:

        def pause() -> None:
            one.ahead = 300.0
            one.steal(item.id)

        one.loop.call_later(4.99, pause)
        with pytest.raises(SessionGoneError):
            await update(one, item)
    assert not one.times("update")


@in_virtual_time
async def test_callback_before_bytes_is_called_only_if_bytes_are_sent(
    bench: type[Bench],
) -> None:
    called: list[float] = []
    one = bench(update=[Fault(wait=5.0)])
    async with begun(one) as item:
        request = WRITE._replace(before_bytes=lambda: called.append(one.clock()))
        await update(one, item, request)
        assert called == pytest.approx([5.0])
        lose(item)
        with pytest.raises(LeaseLost):
            await update(one, item, request)
    assert len(called) == 1


@in_virtual_time
async def test_call_for_item_without_lease_raises_attribute_error(bench: type[Bench]) -> None:
    one = bench()
    async with one.open():
        item = await one.claim()
        del item.lease
        with pytest.raises(AttributeError, match="lease"):
            await update(one, item)


# Retries.


@pytest.mark.parametrize(
    "error",
    [
        RefusedError("update", 403, "x"),
        ConflictError("update", 409, "x"),
        PreconditionError("update", 412, "x"),
    ],
)
def test_call_refused_by_control_plane_is_never_retried(
    bench: type[Bench], error: ControlPlaneError
) -> None:
    @in_virtual_time
    async def check() -> None:
        assert error.status is not None
        one = bench(update=[Fault(answer=error.status, applied=False)])
        async with begun(one) as item:
            with pytest.raises(type(error)):
                await update(one, item)
        assert len(one.times("update")) == 1

    check()


@in_virtual_time
async def test_attempt_of_call_takes_at_most_a_third_of_remaining_lease(bench: type[Bench]) -> None:
    one = bench(request_timeout=300.0, update=[SILENCE] * 99)
    async with begun(one) as item:
        lease = item.lease
        one.renewer.remove(lease)
        lease.closed = False  # the lease is not renewed anymore
        with pytest.raises(TransientError):
            await update(one, item)
        sent = one.times("update")
        assert len(sent) > 5
        assert all(
            seconds is not None and seconds <= (60 - at) / TRY_PART + 1e-6
            for at, (_, seconds, _) in zip(sent, updates(one), strict=True)
        )
        assert updates(one)[0][1] == pytest.approx(20)
        assert one.clock() <= lease.deadline


@in_virtual_time
async def test_attempt_of_call_takes_at_most_request_timeout(bench: type[Bench]) -> None:
    one = bench(request_timeout=2.0, update=[SILENCE])
    async with begun(one) as item:
        await update(one, item)
    assert [seconds for _, seconds, _ in updates(one)] == [2.0, 2.0]
    first, second = one.times("update")
    assert 2.0 <= second - first <= 2.0 + 0.2


@in_virtual_time
async def test_attempt_of_call_takes_at_most_a_third_of_its_own_time_limit(
    bench: type[Bench],
) -> None:
    one = bench(update=[SILENCE] * 99)
    async with begun(one) as item:
        with pytest.raises(TransientError) as caught:
            await update(one, item, WRITE._replace(seconds=3.0))
        assert caught.value.reason == "timeout"
        assert 1.0 < one.clock() <= 3.0
    assert updates(one)[0][1] == pytest.approx(1.0)
    assert len(updates(one)) > 1


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
def test_retry_after_attempt_without_answer_uses_new_connection(
    bench: type[Bench], failure: Fault, *, new: bool
) -> None:
    @in_virtual_time
    async def check() -> None:
        one = bench(update=[failure])
        async with begun(one) as item:
            await update(one, item)
            await update(one, item)
        assert [options.new_connection for *_, options in updates(one)] == [False, new, False]

    check()


@in_virtual_time
async def test_each_attempt_of_call_has_its_priority_and_permit(bench: type[Bench]) -> None:
    one = bench(update=[SILENCE])
    async with begun(one) as item:
        await update(one, item, WRITE)
        await update(one, item, CALL)
    assert [options.priority for *_, options in updates(one)] == [
        Priority.COMPLETION,
        Priority.COMPLETION,
        Priority.HANDLER,
    ]
    assert all(options.permit for *_, options in updates(one))


@in_virtual_time
async def test_completion_is_retried_as_long_as_its_lease_is_renewed(bench: type[Bench]) -> None:
    one = bench(update=[Fault(answer=503, applied=False)] * 200)
    async with begun(one) as item:
        await update(one, item)
        assert one.clock() > 200
        between = [later - earlier for earlier, later in pairwise(one.times("update"))]
        assert max(between) <= 3.0 + 1e-6


@in_virtual_time
async def test_retry_after_is_obeyed_for_at_most_half_of_remaining_time(
    bench: type[Bench],
) -> None:
    one = bench(update=[Fault(answer=503, applied=False, retry_after=5)])
    async with begun(one) as item:
        await update(one, item)
        assert one.clock() == pytest.approx(5)
    two = bench(update=[Fault(answer=429, applied=False, retry_after=300)])
    begun_at = two.clock()
    async with begun(two) as item:
        await update(two, item, WRITE._replace(seconds=20.0))
        assert two.clock() == pytest.approx(begun_at + 10)


@in_virtual_time
async def test_lease_lost_between_two_attempts_ends_call_at_once(
    bench: type[Bench],
) -> None:
    one = bench(update=[Fault(answer=503, applied=False, retry_after=20)])
    async with begun(one) as item:

        def end() -> None:
            lose(item)
            item.notify()

        one.loop.call_later(1, end)
        with pytest.raises(LeaseLost):
            await update(one, item)
        assert one.clock() == pytest.approx(1)


@in_virtual_time
async def test_call_in_progress_is_cancelled_when_lease_is_lost(bench: type[Bench]) -> None:
    one = bench(update=[SILENCE])
    async with begun(one) as item:

        def end() -> None:
            lose(item)
            one.sender.cut(item)

        one.loop.call_later(1, end)
        with pytest.raises(LeaseLost):
            await update(one, item)
        assert one.clock() == pytest.approx(1)


@in_virtual_time
async def test_lease_lost_in_same_loop_turn_as_timeout_is_raised(
    bench: type[Bench],
) -> None:
    """Both happen in one turn of the loop, as after a handler that blocked the loop."""
    one = bench(update=[SILENCE] * 9)
    async with begun(one) as item:

        def end() -> None:
            lose(item)
            one.sender.cut(item)
            item.notify()

        one.loop.call_at(10 + 1e-7, end)  # so soon after the timeout that both are in one turn
        with pytest.raises(LeaseLost):
            await update(one, item)
        assert one.clock() < 11


@in_virtual_time
async def test_cancellation_of_calling_task_is_not_swallowed(bench: type[Bench]) -> None:
    one = bench(update=[SILENCE])
    async with begun(one) as item, asyncio.TaskGroup() as group:
        task = group.create_task(update(one, item))
        await asyncio.sleep(1)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
        assert not item.open_sends


# Reads.


@in_virtual_time
async def test_read_of_session_continues_across_lease_renewals(bench: type[Bench]) -> None:
    one = bench()
    answered = asyncio.Event()
    async with begun(one) as item:

        async def read() -> str:
            await answered.wait()
            return "answer"

        one.loop.call_later(300, answered.set)
        assert await one.sender.read(item, read) == "answer"


@in_virtual_time
async def test_read_of_session_ends_at_its_time_limit_or_with_session(bench: type[Bench]) -> None:
    one = bench()
    async with begun(one) as item:
        with pytest.raises(TimeoutError):
            await one.sender.read(item, asyncio.Event().wait, 7.0)
        assert one.clock() == pytest.approx(7)

        def end() -> None:
            lose(item)
            one.sender.cut(item)

        one.loop.call_later(3, end)
        with pytest.raises(LeaseLost):
            await one.sender.read(item, asyncio.Event().wait, 100.0)
        assert one.clock() == pytest.approx(10)


# The calls of one handler.


@in_virtual_time
async def test_calls_of_one_handler_are_limited_without_delaying_other_handlers(
    bench: type[Bench],
) -> None:
    one = bench()
    async with begun(one) as item:
        other = await one.claim()
        await one.begin(other)
        async with one.handler_of(other), asyncio.TaskGroup() as group:
            await asyncio.sleep(0)
            one.peaks.clear()
            one.latency = 1.0
            context: Any = one
            busy = SessionCalls(item, context, one.sender)
            calls = [group.create_task(busy.update_metadata({"a": "b"})) for _ in range(100)]
            await asyncio.sleep(0.5)
            assert one.under_way == CALLS_PER_SESSION == 8
            await SessionCalls(other, context, one.sender).update_metadata({"a": "b"})
            assert one.clock() == pytest.approx(1.5)
            await asyncio.wait(calls)
        assert max(under_way for _, under_way in one.peaks) == CALLS_PER_SESSION + 1


@in_virtual_time
async def test_call_of_handler_is_retried_for_its_own_time_limit(bench: type[Bench]) -> None:
    one = bench(update=[Fault(answer=503, applied=False)] * 999)
    async with begun(one) as item:
        context: Any = one
        with pytest.raises(TransientError):
            await SessionCalls(item, context, one.sender).update_metadata({"a": "b"})
        assert UPDATE_SECONDS - 3 <= one.clock() <= UPDATE_SECONDS
