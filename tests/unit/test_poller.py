"""One poller: it survives most errors, and releases places and permits that no item uses."""

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
    TooLargeError,
    TransientError,
    UnreadableError,
    WorkpoolError,
)
from workpool.events import PollerBackedOff, PollerRestarted, PollFinished
from workpool.pool import poller
from workpool.pool.bounded_queue import BoundedQueue
from workpool.pool.handler_health import HandlerHealth
from workpool.pool.poller import Poller, PollerGroup
from workpool.pool.pool_context import PoolContext
from workpool.testing.virtual_time import in_virtual_time

if TYPE_CHECKING:
    from collections.abc import Callable

    from workpool.events import Event
    from workpool.pool.dispatcher import OfferResult

REFUSED = RefusedError("poll", 401, "no")


class ClientWithScriptedPolls:
    """A client whose polls return or raise `answers` in order, and then wait forever."""

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


class DispatcherWithFixedAnswer:
    """A dispatcher that gives every item the same answer or raises the same error."""

    def __init__(
        self, queue: BoundedQueue[Any], *, answer: OfferResult | Exception = "queued"
    ) -> None:
        self.queue = queue
        self.answer = answer
        self.must_pause_between_polls = False
        self.health = HandlerHealth(lambda _: 0)
        self.offered: list[object] = []

    def offer_item(self, item: object, polled_at: float) -> OfferResult:
        assert polled_at <= asyncio.get_running_loop().time()
        self.offered.append(item)
        if isinstance(self.answer, Exception):
            raise self.answer
        if self.answer == "queued":
            self.queue.put_item(item)
        elif self.answer == "aside":
            self.queue.set_item_aside(item)
        return self.answer


class PollerTestbed:
    """The client, dispatcher and poller group of one pool, with its reported events."""

    def __init__(
        self,
        *answers: object,
        answer: OfferResult | Exception = "queued",
        block_ms: int = 1,
        concurrency: int = 2,
    ) -> None:
        self.events: list[Event] = []
        self.fatal: list[WorkpoolError] = []
        self.client = ClientWithScriptedPolls(*answers)
        self.queue: BoundedQueue[Any] = BoundedQueue(concurrency, 0)
        self.dispatcher = DispatcherWithFixedAnswer(self.queue, answer=answer)
        clock = asyncio.get_running_loop().time
        self.context = PoolContext(
            settings=Settings(block_ms=block_ms),
            client=cast("Any", self.client),
            plugins=cast("Any", None),
            renewer=cast("Any", None),
            queue=self.queue,
            clock=clock,
            observe=cast("Any", lambda kind, *values: self.events.append(kind(*values))),
            start_context=copy_context(),
            threads=cast("Any", None),
        )
        self.group = PollerGroup(
            self.context, until_empty=False, on_fatal=self.fatal.append, on_empty=lambda: None
        )

    async def run_poller(self, seconds: float = 20) -> None:
        """Run one poller until the poller ends or the client has returned its last answer."""
        tested_poller = Poller(self.context, self.group, cast("Any", self.dispatcher), 0)
        async with asyncio.timeout(seconds), asyncio.TaskGroup() as group:
            task = group.create_task(tested_poller.run_polls())
            over = group.create_task(self.client.exhausted.wait())
            await asyncio.wait({task, over}, return_when=asyncio.FIRST_COMPLETED)
            task.cancel()
            over.cancel()

    def events_of_type(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture(autouse=True)
def disable_poll_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poller, "BACKOFF_SECONDS", 0.0)


FAILURES: dict[str, Exception] = {
    "transient": TransientError("poll", 500, "x", reason="server_error"),
    "throttled": TransientError("poll", 429, "x", reason="throttled", retry_after=0.001),
    "timeout": TransientError("poll", None, "x", reason="timeout"),
    "refused": REFUSED,
    "conflict": ConflictError("poll", 409, "x"),
    "bug": KeyError("bug"),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
async def test_failed_poll_releases_its_queue_place_and_ack_permit(failure: Exception) -> None:
    # The first poll succeeds, because a refusal of the first poll would be fatal.
    bench = PollerTestbed(None, failure, failure)
    await bench.run_poller()
    assert bench.client.polls == 4
    assert (bench.queue.reserved, bench.client.permits) == (0, 0)
    assert len(bench.events_of_type(PollFinished)) == 4
    expected = PollerBackedOff if isinstance(failure, ControlPlaneError) else PollerRestarted
    assert len(bench.events_of_type(expected)) == 2


async def test_refusal_of_the_first_poll_ends_polling_without_a_backoff(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench = PollerTestbed(REFUSED, REFUSED)
    await bench.run_poller()
    assert bench.client.polls == 1
    assert (bench.queue.reserved, bench.client.permits) == (0, 0)
    assert bench.events_of_type(PollerBackedOff) == []
    assert "poll failed" not in caplog.text


ANSWERS = {
    "too large": lambda: TooLargeError("poll", 200, work_id="work_1"),
    "too large, unknown": lambda: TooLargeError("poll", 200),
    "malformed": lambda: UnreadableError("poll", 200, "x", work_id="work_1"),
}


@pytest.mark.parametrize("make", ANSWERS.values(), ids=ANSWERS)
async def test_poller_polls_on_without_backoff_after_unreadable_items(
    make: Callable[[], UnreadableError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poller, "BACKOFF_SECONDS", 1000.0)
    monkeypatch.setattr(poller, "BACKOFF_CAP_SECONDS", 1000.0)
    bench = PollerTestbed(*(make() for _ in range(30)), "item")
    await bench.run_poller()
    assert not bench.events_of_type(PollerBackedOff)
    assert bench.client.polls == 32
    assert (bench.queue.reserved, bench.client.permits) == (0, 1)
    assert not bench.fatal


@in_virtual_time
async def test_poller_slows_down_if_all_items_are_unreadable() -> None:
    count = poller.SKIPS + 60
    bench = PollerTestbed(*(TooLargeError("poll", 200) for _ in range(count)), block_ms=999)
    clock = asyncio.get_running_loop().time
    started = clock()
    await bench.run_poller(600)
    assert clock() - started == pytest.approx(poller.SKIPS * poller.SKIP_SECONDS + 60, rel=0.05)


@in_virtual_time
async def test_readable_poll_answer_resets_count_of_unreadable_answers() -> None:
    answers: list[object] = [TooLargeError("poll", 200) for _ in range(poller.SKIPS)]
    bench = PollerTestbed(*answers, None, *answers, block_ms=999)
    clock = asyncio.get_running_loop().time
    started = clock()
    await bench.run_poller(600)
    assert clock() - started < 2 * poller.SKIPS * poller.SKIP_SECONDS + 2


async def test_unreadable_item_is_logged_once_with_work_id(
    caplog: pytest.LogCaptureFixture,
) -> None:
    names = ("work_1", "work_2", None, "work_1", None)
    bench = PollerTestbed(*(TooLargeError("poll", 200, work_id=name) for name in names))
    await bench.run_poller()
    assert all(each.startswith("item cannot be read") for each in caplog.messages)
    assert [vars(each)["work_id"] for each in caplog.records] == ["work_1", "work_2", "unknown"]


async def test_empty_poll_releases_queue_place_and_ack_permit() -> None:
    bench = PollerTestbed(None, None)
    await bench.run_poller()
    assert [event.result for event in bench.events_of_type(PollFinished)] == [
        "null",
        "null",
        "cancelled",
    ]
    assert (bench.queue.reserved, bench.client.permits) == (0, 0)


async def test_item_accepted_by_dispatcher_keeps_queue_place_and_ack_permit() -> None:
    bench = PollerTestbed("item")
    await bench.run_poller()
    assert bench.dispatcher.offered == ["item"]
    assert (bench.queue.reserved, bench.queue.waiting_item_count, bench.client.permits) == (0, 1, 1)


@pytest.mark.parametrize("answer", ["not_taken", KeyError("bug")], ids=["not taken", "bug"])
async def test_item_that_is_not_taken_releases_its_queue_place_and_ack_permit(answer: Any) -> None:
    bench = PollerTestbed("item", answer=answer)
    await bench.run_poller()
    assert bench.dispatcher.offered == ["item"]
    assert (bench.queue.reserved, bench.queue.waiting_item_count) == (0, 0)
    assert bench.client.permits == 0


@in_virtual_time
@pytest.mark.parametrize("paused_until", [None, 50.0], ids=["not_paused", "paused"])
async def test_cooldown_and_pause_that_begin_before_poll_is_sent_delay_the_poll(
    paused_until: float | None,
) -> None:
    """The cooldown of 30 s begins while the poller waits for its permit for the later ack."""
    bench = PollerTestbed()
    polled_at: list[float] = []
    permits_in_cooldown: list[int] = []
    loop = asyncio.get_running_loop()
    start = loop.time()
    acquire_permit = bench.client.acquire_ack_permit

    async def acquire_permit_while_another_poller_begins_cooldown() -> None:
        await acquire_permit()
        if loop.time() == start:
            bench.group.begin_cooldown(30.0)
            loop.call_later(20.0, record_permits_and_pause)

    def record_permits_and_pause() -> None:
        permits_in_cooldown.append(bench.client.permits)
        if paused_until is not None:
            bench.context.admission.pause("maintenance", None)
            loop.call_at(start + paused_until, bench.context.admission.resume)

    async def record_poll(*_: object) -> None:
        polled_at.append(loop.time() - start)
        bench.client.exhausted.set()
        await asyncio.Event().wait()

    bench.client.acquire_ack_permit = acquire_permit_while_another_poller_begins_cooldown  # type: ignore[method-assign] # a fake
    bench.client.poll = record_poll  # type: ignore[method-assign] # a fake
    await bench.run_poller(seconds=100)
    assert polled_at == [pytest.approx(paused_until or 30.0)]
    assert permits_in_cooldown == [0]


async def test_poller_frees_queue_place_but_keeps_ack_permit_of_item_for_busy_handler() -> None:
    bench = PollerTestbed("item", answer="aside")
    await bench.run_poller()
    assert (bench.queue.reserved, bench.queue.items_set_aside, bench.client.permits) == (
        0,
        ["item"],
        1,
    )


@in_virtual_time
async def test_poller_polls_again_at_once_after_item_whose_handler_is_busy() -> None:
    bench = PollerTestbed(*("item" for _ in range(5)), answer="aside", block_ms=999, concurrency=10)
    clock = asyncio.get_running_loop().time
    started = clock()
    await bench.run_poller(60)
    assert clock() - started == 0


@in_virtual_time
async def test_poller_pauses_between_polls_if_dispatcher_demands_pause() -> None:
    bench = PollerTestbed(*("item" for _ in range(5)), block_ms=999, concurrency=10)
    bench.dispatcher.must_pause_between_polls = True
    clock = asyncio.get_running_loop().time
    started = clock()
    await bench.run_poller(60)
    assert clock() - started == pytest.approx(5 * 0.999)


async def test_fifth_poller_crash_in_a_row_is_fatal() -> None:
    bugs = [KeyError(number) for number in range(9)]
    bench = PollerTestbed(*bugs[:4], None, *bugs[4:8])
    await bench.run_poller()
    assert not bench.fatal
    bench = PollerTestbed(*bugs[:5], None)
    await bench.run_poller()
    (fatal,) = bench.fatal
    assert isinstance(fatal, PollerError)
    assert fatal.__cause__ is bugs[4]
    assert bench.client.polls == 5


async def test_poller_crash_is_logged_with_traceback(caplog: pytest.LogCaptureFixture) -> None:
    await PollerTestbed(KeyError("bug")).run_poller()
    (record,) = [record for record in caplog.records if "poller crashed" in record.message]
    assert record.levelname == "ERROR"
    assert record.exc_info is not None


def test_poller_backoff_cap_and_crash_limit_have_documented_values() -> None:
    assert poller.BACKOFF_CAP_SECONDS == 30
    assert poller.CRASHES == 5
