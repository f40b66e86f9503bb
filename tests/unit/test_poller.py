"""What pollers share, and what one poller gives back whatever its poll comes to (design §2)."""

from __future__ import annotations

import asyncio
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
from workpool.pool.parts import Parts
from workpool.pool.poller import REFUSED_SECONDS, Poller, Polling
from workpool.pool.queue import BoundedQueue

if TYPE_CHECKING:
    from workpool.events import Event

REFUSED = RefusedError("poll", 401, "no")
MINUTES = 60.0


class Script:
    """A client whose polls answer what they are told, one after the other, then wait for ever."""

    def __init__(self, *answers: object) -> None:
        self.answers = list(answers)
        self.polls = self.paid = 0
        self.exhausted = asyncio.Event()

    async def acquire_ack_permit(self) -> None:
        self.paid += 1

    def release_ack_permit(self) -> None:
        self.paid -= 1

    async def poll(self, *_: object) -> object:
        self.polls += 1
        if not self.answers:
            self.exhausted.set()
            await asyncio.Event().wait()
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer


class Dispatch:
    """Takes an item, or not, as told."""

    def __init__(self, queue: BoundedQueue[Any], *, takes: bool | Exception = True) -> None:
        self.queue = queue
        self.takes = takes
        self.offered: list[object] = []

    def offer(self, item: object) -> bool:
        self.offered.append(item)
        if isinstance(self.takes, Exception):
            raise self.takes
        if self.takes:
            self.queue.put(item)
        return self.takes


class World:
    """The parts of one pool around its pollers, with a clock in hand."""

    def __init__(self, *answers: object, takes: bool | Exception = True) -> None:
        self.now = 1000.0
        self.events: list[Event] = []
        self.fatal: list[WorkpoolError] = []
        self.emptied = 0
        self.calls = Script(*answers)
        self.queue: BoundedQueue[Any] = BoundedQueue(2, 0)
        self.dispatch = Dispatch(self.queue, takes=takes)
        self.parts = Parts(
            settings=Settings(block_ms=1),
            calls=cast("Any", self.calls),
            plugins=cast("Any", None),
            keeper=cast("Any", None),
            queue=self.queue,
            clock=lambda: self.now,
            observe=self.events.append,
        )

    def polling(self, *, until_empty: bool = False) -> Polling:
        return Polling(
            self.parts, until_empty=until_empty, on_fatal=self.fatal.append, on_empty=self.on_empty
        )

    def on_empty(self) -> None:
        self.emptied += 1

    async def run(self) -> None:
        """Run one poller until its script is at its end, or it ends by itself."""
        one = Poller(self.parts, self.polling(), cast("Any", self.dispatch), 0)
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            task = group.create_task(one.run())
            over = group.create_task(self.calls.exhausted.wait())
            await asyncio.wait({task, over}, return_when=asyncio.FIRST_COMPLETED)
            task.cancel()
            over.cancel()

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poller, "BACKOFF_SECONDS", 0.0)


# -- refusals, on a clock in hand


def test_refused_before_any_success_is_fatal_at_once() -> None:
    world = World()
    world.polling().note_refusal(REFUSED)
    assert world.fatal == [REFUSED]


def test_refused_after_a_success_is_fatal_after_five_minutes() -> None:
    world = World()
    polling = world.polling()
    polling.succeeded(null=True)
    assert REFUSED_SECONDS == 5 * MINUTES
    for _ in range(5):
        polling.note_refusal(REFUSED)
        assert polling.refused
        world.now += 1 * MINUTES - 0.001
    assert not world.fatal
    world.now += 1
    polling.note_refusal(REFUSED)
    assert world.fatal == [REFUSED]


def test_a_success_in_between_starts_the_five_minutes_anew() -> None:
    world = World()
    polling = world.polling()
    polling.succeeded(null=True)
    polling.note_refusal(REFUSED)
    world.now += 4 * MINUTES
    polling.succeeded(null=False)
    assert not polling.refused
    world.now += 2 * MINUTES
    polling.note_refusal(REFUSED)
    world.now += 4 * MINUTES
    polling.note_refusal(REFUSED)
    assert not world.fatal


def test_it_tells_when_it_last_succeeded() -> None:
    world = World()
    polling = world.polling()
    assert polling.last_success_at is None
    polling.succeeded(null=True)
    world.now += 7
    assert polling.last_success_at == 1000.0


def test_idleness_is_said_once_not_once_per_poll(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "workpool")
    polling = World().polling()
    for _ in range(5):
        polling.succeeded(null=True)
    assert [record.message for record in caplog.records] == ["idle; waiting for work"]
    polling.succeeded(null=False)
    polling.succeeded(null=True)
    assert len(caplog.records) == 2


# -- the gate


async def test_a_gate_that_is_closed_for_longer_meanwhile_stays_closed() -> None:
    polling = World().polling()
    loop = asyncio.get_running_loop()
    started = loop.time()
    polling.close_gate(0.05)
    async with asyncio.TaskGroup() as group:
        passing = group.create_task(polling.pass_gate())
        await asyncio.sleep(0)
        polling.close_gate(0.15)
        polling.close_gate(0.01)  # which does not open it earlier
        await passing
    assert loop.time() - started >= 0.149


async def test_an_open_gate_holds_nobody() -> None:
    async with asyncio.timeout(20):
        await World().polling().pass_gate()


# -- the end of the queue


async def test_a_null_ends_it_only_if_asked_idle_and_alone() -> None:
    world = World()
    polling = world.polling(until_empty=True)
    await world.polling().settle_empty()  # not asked
    assert world.emptied == 0
    await world.queue.reserve()
    world.queue.put("item")
    await polling.settle_empty()  # not idle
    assert world.emptied == 0
    world.queue.take()
    await polling.settle_empty()
    assert world.emptied == 0
    world.queue.release()
    polling.sent()
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(polling.settle_empty())  # not alone
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (waiting.done(), world.emptied) == (False, 0)
        polling.answered()
    assert (world.emptied, polling.ended) == (0, False)
    await polling.settle_empty()
    assert (world.emptied, polling.ended) == (1, True)


# -- what a poll takes, it gives back

FAILURES: dict[str, Exception] = {
    "transient": TransientError("poll", 500, "x", reason="server_error"),
    "throttled": TransientError("poll", 429, "x", reason="throttled", retry_after=0.001),
    "timeout": TransientError("poll", None, "x", reason="timeout"),
    "refused": REFUSED,
    "conflict": ConflictError("poll", 409, "x"),
    "bug": KeyError("bug"),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
async def test_a_failed_poll_gives_back_its_place_and_its_share(failure: Exception) -> None:
    world = World(failure, failure)
    await world.run()
    assert world.calls.polls == 3
    assert (world.queue.reserved, world.calls.paid) == (0, 0)
    assert len(world.of(PollFinished)) == 3
    expected = PollerBackedOff if isinstance(failure, ControlPlaneError) else PollerRestarted
    assert len(world.of(expected)) == 2


async def test_a_null_gives_back_its_place_and_its_share() -> None:
    world = World(None, None)
    await world.run()
    assert [event.result for event in world.of(PollFinished)] == ["null", "null", "cancelled"]
    assert (world.queue.reserved, world.calls.paid) == (0, 0)


async def test_an_item_keeps_both() -> None:
    world = World("item")
    await world.run()
    assert world.dispatch.offered == ["item"]
    assert (world.queue.reserved, world.queue.waiting, world.calls.paid) == (0, 1, 1)


@pytest.mark.parametrize("takes", [False, KeyError("bug")], ids=["declined", "bug"])
async def test_an_item_that_is_not_taken_gives_both_back(takes: Any) -> None:
    world = World("item", takes=takes)
    await world.run()
    assert world.dispatch.offered == ["item"]
    assert (world.queue.reserved, world.queue.waiting) == (0, 0)
    assert world.calls.paid == 0


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
    assert world.calls.polls == 5


async def test_a_bug_is_loud(caplog: pytest.LogCaptureFixture) -> None:
    await World(KeyError("bug")).run()
    (record,) = [record for record in caplog.records if "poller crashed" in record.message]
    assert record.levelname == "ERROR"
    assert record.exc_info is not None


def test_the_cap_is_the_designs() -> None:
    assert poller.BACKOFF_CAP_SECONDS == 30
    assert poller.CRASHES == 5
