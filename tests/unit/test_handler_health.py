"""Handlers that fail at once leave their items to other workers, in virtual time."""

from __future__ import annotations

import asyncio
import errno
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from workpool import Release
from workpool.handlers import Handler
from workpool.pool.admission import (
    FAILING_PAUSE_MAX_SECONDS,
    FAILURES,
    QUICK_SECONDS,
    HandlerHealth,
)
from workpool.testing.virtual_time import in_virtual_time

if TYPE_CHECKING:
    from workpool import Session
    from workpool.session import Outcome


async def run_nothing(session: Session) -> None:
    """Do nothing."""


BROKEN, OTHER = (
    Handler(name=name, call=run_nothing, plugin="test") for name in ("test.broken", "test.other")
)


class Ended:
    """An item whose session has ended."""

    def __init__(self, number: int, handler: Handler | None, error: BaseException | None) -> None:
        self.id = f"work_{number}"
        self.handler = handler
        self.error = error


class HealthBench:
    """The health of two handlers, and the number of their owned items."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.owned = {BROKEN: 0, OTHER: 0}
        self.health = HandlerHealth(self.owned.__getitem__)
        self.number = 0

    def end(
        self,
        outcome: Outcome = "failed",
        seconds: float = 0.5,
        error: BaseException | None = None,
        *,
        handler: Handler | None = BROKEN,
        number: int | None = None,
    ) -> None:
        """End a session of a new item, or of the item with this number."""
        self.number += number is None
        item: Any = Ended(self.number if number is None else number, handler, error)
        self.health.record(item, outcome, seconds)

    def fail(self, times: int = FAILURES) -> None:
        for _ in range(times):
            self.end()

    @property
    def failing(self) -> bool:
        return self.health.failing() == [BROKEN.name]


@in_virtual_time
async def test_five_quick_failures_in_a_row_mark_handler_as_failing() -> None:
    bench = HealthBench()
    assert FAILURES == 5
    bench.fail(4)
    assert bench.health.failing() == []
    assert bench.health.may_claim(BROKEN)
    bench.end()
    assert bench.failing
    assert not bench.health.may_claim(BROKEN)
    assert bench.health.may_claim(OTHER)  # failures are counted per handler


@in_virtual_time
async def test_repeated_failures_of_one_item_count_once() -> None:
    bench = HealthBench()
    for _ in range(100):
        bench.end(number=1)
    assert not bench.failing


@in_virtual_time
async def test_failed_health_checks_do_not_count_as_handler_failures() -> None:
    bench = HealthBench()
    for _ in range(100):
        bench.end(handler=None)
    assert bench.health.failing() == []


FULL = OSError(errno.ENOSPC, "no space left on device")


def caused(error: BaseException, *, implicit: bool = False) -> BaseException:
    outer = ValueError("outer")
    if implicit:
        outer.__context__ = error
    else:
        outer.__cause__ = error
    return outer


ENDS: list[tuple[Outcome, float, BaseException | None, bool]] = [
    ("failed", 0.0, None, True),
    ("failed", QUICK_SECONDS - 0.001, None, True),
    ("failed", QUICK_SECONDS, None, False),
    ("timed_out", 0.5, None, False),
    ("completed", 0.5, None, False),
    ("stopped", 0.5, None, False),
    ("lease_lost", 0.5, None, False),
    ("detached", 0.5, None, False),
    # released for exhaustion, after any time
    ("released", 100.0, FULL, True),
    ("released", 100.0, MemoryError(), True),
    ("released", 100.0, OSError(errno.EMFILE, "x"), True),
    ("released", 100.0, OSError(errno.ENFILE, "x"), True),
    ("released", 100.0, OSError(errno.EDQUOT, "x"), True),
    ("released", 100.0, OSError(errno.ENOMEM, "x"), True),
    ("released", 100.0, caused(FULL), True),
    ("released", 100.0, caused(caused(FULL, implicit=True)), True),
    ("released", 0.5, None, False),
    ("released", 0.5, Release("busy"), False),
    ("released", 0.5, OSError(errno.ECONNREFUSED, "x"), False),
    ("released", 0.5, OSError([errno.ENOSPC], "made by a handler"), False),
]


@pytest.mark.parametrize(("outcome", "seconds", "error", "counts"), ENDS)
def test_session_counts_as_failure_if_it_failed_at_once_or_exhausted_machine(
    outcome: Outcome, seconds: float, error: BaseException | None, *, counts: bool
) -> None:
    @in_virtual_time
    async def check() -> None:
        bench = HealthBench()
        for _ in range(FAILURES):
            bench.end(outcome, seconds, error)
        assert bench.failing == counts

    check()


def test_cyclic_causes_of_error_are_followed_once() -> None:
    @in_virtual_time
    async def check() -> None:
        bench = HealthBench()
        one, two = ValueError(), KeyError()
        one.__context__, two.__context__ = two, one
        bench.end("released", error=one)
        assert not bench.failing

    check()


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
def test_session_that_completes_or_runs_longer_resets_failing_handler(
    outcome: Outcome, seconds: float, *, resets: bool
) -> None:
    @in_virtual_time
    async def check() -> None:
        bench = HealthBench()
        bench.fail()
        bench.end(outcome, seconds)
        assert bench.failing != resets
        assert bench.health.may_claim(BROKEN) == resets
        again = HealthBench()
        again.fail(4)
        again.end(outcome, seconds)
        again.end()
        assert again.failing != resets  # 4 + 1 failures, or 1

    check()


@in_virtual_time
async def test_failing_handler_claims_one_item_at_a_time_after_its_pause() -> None:
    bench = HealthBench()
    bench.fail()
    await asyncio.sleep(0.9)
    assert not bench.health.may_claim(BROKEN)
    await asyncio.sleep(0.2)
    assert bench.health.may_claim(BROKEN)
    bench.owned[BROKEN] = 1
    assert not bench.health.may_claim(BROKEN)


@in_virtual_time
async def test_pause_of_failing_handler_doubles_up_to_thirty_seconds() -> None:
    bench = HealthBench()
    bench.fail()
    pauses = []
    for _ in range(8):
        before = bench.loop.time()
        await bench.health.admission()
        assert bench.health.may_claim(BROKEN)
        pauses.append(bench.loop.time() - before)
        bench.end()
    assert pauses == pytest.approx([1, 2, 4, 8, 16, 30, 30, 30])
    assert FAILING_PAUSE_MAX_SECONDS == 30
    bench.end("completed")
    bench.fail()
    before = bench.loop.time()
    await bench.health.admission()
    assert bench.loop.time() - before == pytest.approx(1)  # the pause starts again at 1 s


@in_virtual_time
async def test_admission_waits_only_if_every_used_handler_is_failing() -> None:
    bench = HealthBench()
    await bench.health.admission()
    assert bench.loop.time() == 0
    bench.end("completed", handler=OTHER)
    bench.fail()
    await bench.health.admission()
    assert bench.loop.time() == 0
    for _ in range(FAILURES):
        bench.end(handler=OTHER)
    await bench.health.admission()
    assert bench.loop.time() == pytest.approx(1)


@in_virtual_time
async def test_admission_waits_for_running_session_of_failing_handler() -> None:
    bench = HealthBench()
    bench.fail()
    await asyncio.sleep(2)
    bench.owned[BROKEN] = 1

    def succeed() -> None:
        bench.owned[BROKEN] = 0
        bench.end("completed")

    bench.loop.call_later(100, succeed)
    await bench.health.admission()
    assert bench.loop.time() == pytest.approx(102)
    assert not bench.failing


@in_virtual_time
async def test_admission_of_two_paused_handlers_ends_with_shorter_pause() -> None:
    bench = HealthBench()
    bench.fail(FAILURES + 2)  # a pause of 4 s
    await asyncio.sleep(1)
    for _ in range(FAILURES):
        bench.end(handler=OTHER)  # a pause of 1 s
    before = bench.loop.time()
    await bench.health.admission()
    assert bench.loop.time() - before == pytest.approx(1)
    assert [a < b for a, b in pairwise(map(bench.health.may_claim, (BROKEN, OTHER)))] == [True]


@in_virtual_time
async def test_admission_of_busy_and_paused_handler_ends_with_pause() -> None:
    """One handler runs its session after its pause; the other handler may claim in 4 s."""
    bench = HealthBench()
    for _ in range(FAILURES):
        bench.end(handler=OTHER)  # a pause of 1 s
    bench.owned[OTHER] = 1
    bench.fail(FAILURES + 2)  # a pause of 4 s
    await bench.health.admission()
    assert bench.loop.time() == pytest.approx(4)
    assert bench.health.may_claim(BROKEN)


@in_virtual_time
async def test_handler_health_forgets_work_ids_of_successful_sessions() -> None:
    bench = HealthBench()
    for number in range(100_000):
        bench.end(number=number, outcome="completed")
    assert not bench.health._failures
