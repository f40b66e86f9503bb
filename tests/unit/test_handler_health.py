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


class Scene:
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
    scene = Scene()
    assert FAILURES == 5
    scene.fail(4)
    assert scene.health.failing() == []
    assert scene.health.may_claim(BROKEN)
    scene.end()
    assert scene.failing
    assert not scene.health.may_claim(BROKEN)
    assert scene.health.may_claim(OTHER)  # failures are counted per handler


@in_virtual_time
async def test_repeated_failures_of_one_item_count_once() -> None:
    scene = Scene()
    for _ in range(100):
        scene.end(number=1)
    assert not scene.failing


@in_virtual_time
async def test_failed_health_checks_do_not_count_as_handler_failures() -> None:
    scene = Scene()
    for _ in range(100):
        scene.end(handler=None)
    assert scene.health.failing() == []


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
        scene = Scene()
        for _ in range(FAILURES):
            scene.end(outcome, seconds, error)
        assert scene.failing == counts

    check()


def test_cyclic_causes_of_error_are_followed_once() -> None:
    @in_virtual_time
    async def check() -> None:
        scene = Scene()
        one, two = ValueError(), KeyError()
        one.__context__, two.__context__ = two, one
        scene.end("released", error=one)
        assert not scene.failing

    check()


@pytest.mark.parametrize(
    ("outcome", "seconds", "resets"),
    [
        ("completed", 0.1, True),
        ("failed", 5.0, True),
        ("timed_out", 5.0, True),
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
        scene = Scene()
        scene.fail()
        scene.end(outcome, seconds)
        assert scene.failing != resets
        assert scene.health.may_claim(BROKEN) == resets
        again = Scene()
        again.fail(4)
        again.end(outcome, seconds)
        again.end()
        assert again.failing != resets  # 4 + 1 failures, or 1

    check()


@in_virtual_time
async def test_failing_handler_claims_one_item_at_a_time_after_its_pause() -> None:
    scene = Scene()
    scene.fail()
    await asyncio.sleep(0.9)
    assert not scene.health.may_claim(BROKEN)
    await asyncio.sleep(0.2)
    assert scene.health.may_claim(BROKEN)
    scene.owned[BROKEN] = 1
    assert not scene.health.may_claim(BROKEN)


@in_virtual_time
async def test_pause_of_failing_handler_doubles_up_to_thirty_seconds() -> None:
    scene = Scene()
    scene.fail()
    pauses = []
    for _ in range(8):
        before = scene.loop.time()
        await scene.health.admission()
        assert scene.health.may_claim(BROKEN)
        pauses.append(scene.loop.time() - before)
        scene.end()
    assert pauses == pytest.approx([1, 2, 4, 8, 16, 30, 30, 30])
    assert FAILING_PAUSE_MAX_SECONDS == 30
    scene.end("completed")
    scene.fail()
    before = scene.loop.time()
    await scene.health.admission()
    assert scene.loop.time() - before == pytest.approx(1)  # the pause starts again at 1 s


@in_virtual_time
async def test_admission_waits_only_if_every_used_handler_is_failing() -> None:
    scene = Scene()
    await scene.health.admission()
    assert scene.loop.time() == 0
    scene.end("completed", handler=OTHER)
    scene.fail()
    await scene.health.admission()
    assert scene.loop.time() == 0
    for _ in range(FAILURES):
        scene.end(handler=OTHER)
    await scene.health.admission()
    assert scene.loop.time() == pytest.approx(1)


@in_virtual_time
async def test_admission_waits_for_running_session_of_failing_handler() -> None:
    scene = Scene()
    scene.fail()
    await asyncio.sleep(2)
    scene.owned[BROKEN] = 1

    def succeed() -> None:
        scene.owned[BROKEN] = 0
        scene.end("completed")

    scene.loop.call_later(100, succeed)
    await scene.health.admission()
    assert scene.loop.time() == pytest.approx(102)
    assert not scene.failing


@in_virtual_time
async def test_admission_of_two_paused_handlers_ends_with_shorter_pause() -> None:
    scene = Scene()
    scene.fail(FAILURES + 2)  # a pause of 4 s
    await asyncio.sleep(1)
    for _ in range(FAILURES):
        scene.end(handler=OTHER)  # a pause of 1 s
    before = scene.loop.time()
    await scene.health.admission()
    assert scene.loop.time() - before == pytest.approx(1)
    assert [a < b for a, b in pairwise(map(scene.health.may_claim, (BROKEN, OTHER)))] == [True]


@in_virtual_time
async def test_admission_of_busy_and_paused_handler_ends_with_pause() -> None:
    """One handler runs its session after its pause; the other handler may claim in 4 s."""
    scene = Scene()
    for _ in range(FAILURES):
        scene.end(handler=OTHER)  # a pause of 1 s
    scene.owned[OTHER] = 1
    scene.fail(FAILURES + 2)  # a pause of 4 s
    await scene.health.admission()
    assert scene.loop.time() == pytest.approx(4)
    assert scene.health.may_claim(BROKEN)


@in_virtual_time
async def test_handler_health_forgets_work_ids_of_successful_sessions() -> None:
    scene = Scene()
    for number in range(100_000):
        scene.end(number=number, outcome="completed")
    assert not scene.health._failures
