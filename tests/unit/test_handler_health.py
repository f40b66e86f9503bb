"""Handlers whose sessions fail right after their start leave items to other workers.

The tests run in virtual time.
"""

from __future__ import annotations

import asyncio
import errno
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from workpool import Release
from workpool.handlers import Handler
from workpool.pool.handler_health import (
    FAILING_PAUSE_MAX_SECONDS,
    FAILURES,
    QUICK_SECONDS,
    HandlerHealth,
)
from workpool.testing.virtual_time import in_virtual_time

if TYPE_CHECKING:
    from workpool import Session
    from workpool.session import Outcome


async def never_called_handler(session: Session) -> None:
    """A handler that is never called."""


BROKEN, OTHER = (
    Handler(name=name, call=never_called_handler, plugin="test")
    for name in ("test.broken", "test.other")
)


class FakeItemWithEndedSession:
    """An item whose session has ended."""

    def __init__(self, number: int, handler: Handler | None, error: BaseException | None) -> None:
        self.id = f"work_{number}"
        self.handler = handler
        self.error = error


class HandlerHealthTestbed:
    """The health of two handlers, and the number of items that each of them has claimed."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.owned = {BROKEN: 0, OTHER: 0}
        self.health = HandlerHealth(self.owned.__getitem__)
        self.number = 0

    def end_session(
        self,
        outcome: Outcome = "failed",
        seconds: float = 0.5,
        error: BaseException | None = None,
        *,
        handler: Handler | None = BROKEN,
        number: int | None = None,
    ) -> None:
        """End a session of the item with this `number`, or of a new item if `number` is None."""
        self.number += number is None
        item: Any = FakeItemWithEndedSession(
            self.number if number is None else number, handler, error
        )
        self.health.record_session_end(item, outcome, seconds)
        self.health.wake_waiting_pollers()

    def end_sessions_as_failed(self, times: int = FAILURES) -> None:
        for _ in range(times):
            self.end_session()

    @property
    def is_failing(self) -> bool:
        return self.health.failing_handlers() == [BROKEN.name]


@in_virtual_time
async def test_five_quick_failures_in_a_row_mark_handler_as_failing() -> None:
    bench = HandlerHealthTestbed()
    assert FAILURES == 5
    bench.end_sessions_as_failed(4)
    assert bench.health.failing_handlers() == []
    assert bench.health.may_claim(BROKEN)
    bench.end_session()
    assert bench.is_failing
    assert not bench.health.may_claim(BROKEN)
    assert bench.health.may_claim(OTHER)  # Failures are counted for each handler separately.


@in_virtual_time
async def test_repeated_failures_of_one_item_count_as_one_failure() -> None:
    bench = HandlerHealthTestbed()
    for _ in range(100):
        bench.end_session(number=1)
    assert not bench.is_failing


@in_virtual_time
async def test_failed_health_checks_do_not_count_as_handler_failures() -> None:
    bench = HandlerHealthTestbed()
    for _ in range(100):
        bench.end_session(handler=None)
    assert bench.health.failing_handlers() == []


FULL = OSError(errno.ENOSPC, "no space left on device")


ENDS: list[tuple[Outcome, float, BaseException | None, bool]] = [
    ("failed", 0.0, None, True),
    ("failed", QUICK_SECONDS - 0.001, None, True),
    ("failed", QUICK_SECONDS, None, False),
    ("timed_out", 0.5, None, False),
    ("completed", 0.5, None, False),
    ("stopped", 0.5, None, False),
    ("lease_lost", 0.5, None, False),
    ("detached", 0.5, None, False),
    # A session released because the disk is full counts as a failure, however long it ran.
    ("released", 100.0, FULL, True),
    ("released", 0.5, None, False),
    ("released", 0.5, Release("busy"), False),
    ("released", 0.5, OSError(errno.ECONNREFUSED, "x"), False),
]


@pytest.mark.parametrize(("outcome", "seconds", "error", "counts"), ENDS)
def test_only_quick_failures_and_exhausted_resources_make_handler_failing(
    outcome: Outcome, seconds: float, error: BaseException | None, *, counts: bool
) -> None:
    @in_virtual_time
    async def assert_failures_are_counted() -> None:
        bench = HandlerHealthTestbed()
        for _ in range(FAILURES):
            bench.end_session(outcome, seconds, error)
        assert bench.is_failing == counts

    assert_failures_are_counted()


@pytest.mark.parametrize(
    ("outcome", "seconds", "resets"),
    [
        ("completed", 0.1, True),
        ("failed", 5.0, True),
        ("timed_out", 5.0, True),
        ("stalled", 5.0, True),
        ("released", 5.0, False),
        ("stopped", 5.0, False),
        ("lease_lost", 5.0, False),
        ("detached", 5.0, False),
    ],
)
def test_only_completed_session_or_failure_after_five_seconds_resets_failure_count(
    outcome: Outcome, seconds: float, *, resets: bool
) -> None:
    @in_virtual_time
    async def assert_failures_are_reset() -> None:
        bench = HandlerHealthTestbed()
        bench.end_sessions_as_failed()
        bench.end_session(outcome, seconds)
        assert bench.is_failing != resets
        assert bench.health.may_claim(BROKEN) == resets
        again = HandlerHealthTestbed()
        again.end_sessions_as_failed(4)
        again.end_session(outcome, seconds)
        again.end_session()
        # If the session in between has not reset the count of failures, the count is 4 + 1 = 5 now.
        assert again.is_failing != resets

    assert_failures_are_reset()


@in_virtual_time
async def test_failing_handler_gets_no_item_for_a_second_and_then_single_items() -> None:
    bench = HandlerHealthTestbed()
    bench.end_sessions_as_failed()
    await asyncio.sleep(0.9)
    assert not bench.health.may_claim(BROKEN)
    await asyncio.sleep(0.2)
    assert bench.health.may_claim(BROKEN)
    bench.owned[BROKEN] = 1
    assert not bench.health.may_claim(BROKEN)


@in_virtual_time
async def test_pause_of_failing_handler_doubles_after_each_failure_up_to_thirty_seconds() -> None:
    bench = HandlerHealthTestbed()
    bench.end_sessions_as_failed()
    pauses = []
    for _ in range(8):
        before = bench.loop.time()
        await bench.health.wait_until_a_handler_may_claim()
        assert bench.health.may_claim(BROKEN)
        pauses.append(bench.loop.time() - before)
        bench.end_session()
    assert pauses == pytest.approx([1, 2, 4, 8, 16, 30, 30, 30])
    assert FAILING_PAUSE_MAX_SECONDS == 30
    bench.end_session("completed")
    bench.end_sessions_as_failed()
    before = bench.loop.time()
    await bench.health.wait_until_a_handler_may_claim()
    # The success has reset the pause, so the first pause after the new failures lasts 1 s.
    assert bench.loop.time() - before == pytest.approx(1)


@in_virtual_time
async def test_claims_continue_unless_all_handlers_used_so_far_are_failing() -> None:
    bench = HandlerHealthTestbed()
    await bench.health.wait_until_a_handler_may_claim()
    assert bench.loop.time() == 0
    bench.end_session("completed", handler=OTHER)
    bench.end_sessions_as_failed()
    await bench.health.wait_until_a_handler_may_claim()
    assert bench.loop.time() == 0
    for _ in range(FAILURES):
        bench.end_session(handler=OTHER)
    await bench.health.wait_until_a_handler_may_claim()
    assert bench.loop.time() == pytest.approx(1)


@in_virtual_time
async def test_claims_resume_when_running_session_of_failing_handler_ends() -> None:
    bench = HandlerHealthTestbed()
    bench.end_sessions_as_failed()
    await asyncio.sleep(2)
    bench.owned[BROKEN] = 1

    def complete_running_session() -> None:
        bench.owned[BROKEN] = 0
        bench.end_session("completed")

    bench.loop.call_later(100, complete_running_session)
    await bench.health.wait_until_a_handler_may_claim()
    assert bench.loop.time() == pytest.approx(102)
    assert not bench.is_failing


@in_virtual_time
async def test_claims_resume_when_item_of_failing_handler_ends_without_session() -> None:
    bench = HandlerHealthTestbed()
    bench.end_sessions_as_failed()
    await asyncio.sleep(2)
    bench.owned[BROKEN] = 1

    def end_item_without_session() -> None:
        bench.owned[BROKEN] = 0
        bench.health.wake_waiting_pollers()

    bench.loop.call_later(100, end_item_without_session)
    await bench.health.wait_until_a_handler_may_claim()
    assert bench.loop.time() == pytest.approx(102)
    assert bench.is_failing


@in_virtual_time
async def test_claims_resume_when_shorter_pause_of_two_failing_handlers_ends() -> None:
    bench = HandlerHealthTestbed()
    bench.end_sessions_as_failed(FAILURES + 2)  # No claims for BROKEN for 4 s.
    await asyncio.sleep(1)
    for _ in range(FAILURES):
        bench.end_session(handler=OTHER)  # No claims for OTHER for 1 s.
    before = bench.loop.time()
    await bench.health.wait_until_a_handler_may_claim()
    assert bench.loop.time() - before == pytest.approx(1)
    assert [a < b for a, b in pairwise(map(bench.health.may_claim, (BROKEN, OTHER)))] == [True]


@in_virtual_time
async def test_claims_resume_after_pause_of_failing_handler_while_another_handler_runs() -> None:
    """The failing handler OTHER runs a session while the failing handler BROKEN is in its pause.

    A failing handler may run only one session, so OTHER may claim no item meanwhile.
    """
    bench = HandlerHealthTestbed()
    for _ in range(FAILURES):
        bench.end_session(handler=OTHER)  # No claims for OTHER for 1 s.
    bench.owned[OTHER] = 1
    bench.end_sessions_as_failed(FAILURES + 2)  # No claims for BROKEN for 4 s.
    await bench.health.wait_until_a_handler_may_claim()
    assert bench.loop.time() == pytest.approx(4)
    assert bench.health.may_claim(BROKEN)


@in_virtual_time
async def test_handler_health_forgets_work_ids_of_successful_sessions() -> None:
    bench = HandlerHealthTestbed()
    for number in range(100_000):
        bench.end_session(number=number, outcome="completed")
    assert not bench.health.failures
