"""One poller: what it gives back whatever its poll comes to, and what it survives."""

from __future__ import annotations

import asyncio
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, cast

import pytest

from workpool import Settings
from workpool.errors import (
    ConflictError,
    ControlPlaneError,
    PollerError,
    RefusedError,
    TransientError,
    WorkpoolError,
)
from workpool.events import PollerBackedOff, PollerRestarted, PollFinished
from workpool.pool import poller
from workpool.pool.context import PoolContext
from workpool.pool.handler_health import HandlerHealth
from workpool.pool.poller import Poller
from workpool.pool.poller_group import PollerGroup
from workpool.pool.queue import BoundedQueue

if TYPE_CHECKING:
    from workpool.events import Event

REFUSED = RefusedError("poll", 401, "no")


class ScriptedClient:
    """A client whose polls have these answers, one after the other, and then none."""

    def __init__(self, *answers: object) -> None:
        self.answers = list(answers)
        self.polls = self.permits = 0
        self.exhausted = asyncio.Event()

    async def acquire_ack_permit(self) -> None:
        self.permits += 1

    def release_ack_permit(self) -> None:
        self.permits -= 1

    async def poll(self, *_: object) -> object:
        self.polls += 1
        if not self.answers:
            self.exhausted.set()
            await asyncio.Event().wait()
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer


class ScriptedDispatcher:
    """Takes every item, or declines it, or crashes."""

    def __init__(self, queue: BoundedQueue[Any], *, takes: bool | Exception = True) -> None:
        self.queue = queue
        self.takes = takes
        self.health = HandlerHealth(lambda _: 0)
        self.offered: list[object] = []

    def offer(self, item: object, polled_at: float) -> bool:
        assert polled_at <= asyncio.get_running_loop().time()
        self.offered.append(item)
        if isinstance(self.takes, Exception):
            raise self.takes
        if self.takes:
            self.queue.put(item)
        return self.takes


class World:
    """What surrounds the pollers of one pool."""

    def __init__(self, *answers: object, takes: bool | Exception = True) -> None:
        self.events: list[Event] = []
        self.fatal: list[WorkpoolError] = []
        self.client = ScriptedClient(*answers)
        self.queue: BoundedQueue[Any] = BoundedQueue(2, 0)
        self.dispatcher = ScriptedDispatcher(self.queue, takes=takes)
        clock = asyncio.get_running_loop().time
        self.context = PoolContext(
            settings=Settings(block_ms=1),
            client=cast("Any", self.client),
            plugins=cast("Any", None),
            renewer=cast("Any", None),
            queue=self.queue,
            clock=clock,
            wall=clock,
            observe=cast("Any", lambda kind, *values: self.events.append(kind(*values))),
            start_context=copy_context(),
        )
        self.group = PollerGroup(
            self.context, until_empty=False, on_fatal=self.fatal.append, on_empty=lambda: None
        )

    async def run(self) -> None:
        """Run one poller until its client has no further answer, or it ends by itself."""
        one = Poller(self.context, self.group, cast("Any", self.dispatcher), 0)
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            task = group.create_task(one.run())
            over = group.create_task(self.client.exhausted.wait())
            await asyncio.wait({task, over}, return_when=asyncio.FIRST_COMPLETED)
            task.cancel()
            over.cancel()

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poller, "BACKOFF_SECONDS", 0.0)


# What a poll takes, it gives back.

FAILURES: dict[str, Exception] = {
    "transient": TransientError("poll", 500, "x", reason="server_error"),
    "throttled": TransientError("poll", 429, "x", reason="throttled", retry_after=0.001),
    "timeout": TransientError("poll", None, "x", reason="timeout"),
    "refused": REFUSED,
    "conflict": ConflictError("poll", 409, "x"),
    "bug": KeyError("bug"),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
async def test_failed_poll_gives_back_its_place_and_its_permit(failure: Exception) -> None:
    world = World(failure, failure)
    await world.run()
    assert world.client.polls == 3
    assert (world.queue.reserved, world.client.permits) == (0, 0)
    assert len(world.of(PollFinished)) == 3
    expected = PollerBackedOff if isinstance(failure, ControlPlaneError) else PollerRestarted
    assert len(world.of(expected)) == 2


async def test_null_poll_gives_back_its_place_and_its_permit() -> None:
    world = World(None, None)
    await world.run()
    assert [event.result for event in world.of(PollFinished)] == ["null", "null", "cancelled"]
    assert (world.queue.reserved, world.client.permits) == (0, 0)


async def test_item_that_is_taken_keeps_place_and_permit() -> None:
    world = World("item")
    await world.run()
    assert world.dispatcher.offered == ["item"]
    assert (world.queue.reserved, world.queue.waiting, world.client.permits) == (0, 1, 1)


@pytest.mark.parametrize("takes", [False, KeyError("bug")], ids=["declined", "bug"])
async def test_item_that_is_not_taken_gives_back_place_and_permit(takes: Any) -> None:
    world = World("item", takes=takes)
    await world.run()
    assert world.dispatcher.offered == ["item"]
    assert (world.queue.reserved, world.queue.waiting) == (0, 0)
    assert world.client.permits == 0


async def test_five_crashes_in_a_row_are_fatal_and_four_are_not() -> None:
    bugs = [KeyError(number) for number in range(9)]
    world = World(*bugs[:4], None, *bugs[4:8])
    await world.run()
    assert not world.fatal
    world = World(*bugs[:5], None)
    await world.run()
    (fatal,) = world.fatal
    assert isinstance(fatal, PollerError)
    assert fatal.__cause__ is bugs[4]
    assert world.client.polls == 5


async def test_crash_of_a_poller_is_logged_with_traceback(caplog: pytest.LogCaptureFixture) -> None:
    await World(KeyError("bug")).run()
    (record,) = [record for record in caplog.records if "poller crashed" in record.message]
    assert record.levelname == "ERROR"
    assert record.exc_info is not None


def test_backoff_cap_and_crash_limit_are_the_documented_ones() -> None:
    assert poller.BACKOFF_CAP_SECONDS == 30
    assert poller.CRASHES == 5
