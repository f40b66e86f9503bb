"""The keeper's thread: its life, its watch over the handlers' loop, its look at the clock."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from workpool import Settings
from workpool.errors import KeeperError, ListenError
from workpool.events import Event, HeartbeatFinished, LoopLagMeasured
from workpool.pool import keeper as keeper_module
from workpool.pool import loop_monitor
from workpool.pool.clock import lease_clock
from workpool.pool.keeper import Keeper, Watcher
from workpool.pool.lease import Lease
from workpool.pool.loop_monitor import LoopMonitor
from workpool.server import Operations
from workpool.testing.changes import Changes
from workpool.testing.local import LocalClient, Script, Trouble

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

ENVIRONMENT = "env_00000000000070008000000000000001"
TICK_SECONDS = 0.02


class Scene:
    """What a keeper reports, and a clock that can jump."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.changes = Changes()
        self.events: list[Event] = []
        self.died: list[KeeperError] = []
        self.ended: list[KeeperError | None] = []
        self.blocked = threading.Event()
        self.ahead = 0.0
        self.fault: BaseException | None = None
        self.script = Script()
        self.sent = threading.Semaphore(0)
        self.operations = Operations([ENVIRONMENT], now=lambda: 1_772_366_400.0 + self.clock())

    def clock(self) -> float:
        return lease_clock() + self.ahead

    def trouble(self, op: str, work_id: str | None) -> Trouble | None:
        self.sent.release()
        return self.script(op, work_id)

    def observe(self, event: Event) -> None:
        """On the keeper's thread."""
        if self.fault is not None:
            raise self.fault
        self.events.append(event)
        self.loop.call_soon_threadsafe(self.changes.notify)

    def die(self, error: KeeperError) -> None:
        self.died.append(error)
        self.changes.notify()

    def renewal_ended(self, error: KeeperError | None) -> None:
        """On the keeper's thread."""
        self.ended.append(error)
        self.blocked.set()
        self.loop.call_soon_threadsafe(self.changes.notify)

    def keeper(
        self, *services: contextlib.AbstractAsyncContextManager[Any], **values: Any
    ) -> Keeper:
        settings = Settings(
            environment_id=ENVIRONMENT, base_url="http://127.0.0.1:1", token=ENVIRONMENT, **values
        )
        calls = LocalClient(self.operations, settings, troubles=self.trouble)
        watcher = Watcher(self.observe, self.die, self.renewal_ended)
        return Keeper(settings, self.clock, calls, watcher, services)

    async def claim(self, keeper: Keeper) -> Lease:
        """An item that is ours. Before the keeper uses the operations on its thread."""
        self.operations.enqueue(ENVIRONMENT)
        client = LocalClient(self.operations, Settings(environment_id=ENVIRONMENT))
        async with client:
            item = await client.poll()
            assert item is not None
            sent = self.clock()
            item = await client.ack(item.id)
        return Lease(item, sent, keeper, self.changes.notify)

    async def at_rest(self, keeper: Keeper) -> None:
        """Wait until the keeper's loop has done all that it was doing: its leases wait again."""
        rested = asyncio.Event()
        keeper._call(keeper.tell, rested.set)
        await rested.wait()

    def results(self) -> list[str]:
        return [each.result for each in list(self.events) if isinstance(each, HeartbeatFinished)]

    async def beats(self, count: int) -> None:
        """Wait for so many settled beats."""
        await self.until(lambda: len(self.results()) >= count)

    async def until(self, condition: Any) -> None:
        await self.changes.until(condition, lambda: f"{self.results()} {self.died}")


@pytest.fixture(autouse=True)
def fast_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module.Keeper, "tick_seconds", TICK_SECONDS)


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.fixture
async def scene() -> Scene:
    return Scene()


def keeper_threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name.startswith("workpool-keeper")]


# Life.


async def test_beats_are_sent_on_a_thread_of_their_own(scene: Scene) -> None:
    keeper = scene.keeper()
    lease = await scene.claim(keeper)
    async with keeper:
        assert len(keeper_threads()) == 1
        keeper.hold(lease)
        await scene.until(lambda: lease.begun)
        assert keeper.leases() == [lease]
        keeper.end(lease)
        assert keeper.leases() == []
    assert not keeper_threads()


async def test_a_start_that_fails_raises_why_and_leaves_nothing(scene: Scene) -> None:
    opened: list[str] = []

    @contextlib.asynccontextmanager
    async def first() -> AsyncIterator[None]:
        opened.append("first")
        try:
            yield
        finally:
            opened.append("closed")

    @contextlib.asynccontextmanager
    async def taken() -> AsyncIterator[None]:
        raise ListenError("metrics_listen: taken")
        yield

    with pytest.raises(ListenError):
        await scene.keeper(first(), taken()).__aenter__()
    assert opened == ["first", "closed"]
    assert not scene.died


async def test_a_start_that_is_cancelled_leaves_nothing(scene: Scene) -> None:
    hanging = threading.Event()

    @contextlib.asynccontextmanager
    async def slow() -> AsyncIterator[None]:
        hanging.set()
        await asyncio.sleep(0.2)
        yield

    async with asyncio.TaskGroup() as group:
        starting = group.create_task(scene.keeper(slow()).__aenter__())
        await asyncio.to_thread(hanging.wait, 5)
        starting.cancel()
    assert starting.cancelled()
    assert not keeper_threads()


async def test_closing_is_bounded_and_says_what_it_left_behind(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()

    @contextlib.asynccontextmanager
    async def stubborn() -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(release.wait, 20)

    monkeypatch.setattr(keeper_module, "CLOSE_SECONDS", 0.05)
    keeper = scene.keeper(stubborn())
    async with keeper:
        pass
    assert "keeper did not end" in caplog.text
    release.set()
    for thread in keeper_threads():
        await asyncio.to_thread(thread.join, 5)


async def test_an_error_while_closing_is_logged(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    @contextlib.asynccontextmanager
    async def clumsy() -> AsyncIterator[None]:
        yield
        raise RuntimeError("dropped it")

    async with scene.keeper(clumsy()):
        pass
    assert "dropped it" in caplog.text
    assert not scene.died


async def test_a_keeper_that_dies_is_fatal_and_its_leases_are_lost(scene: Scene) -> None:
    keeper = scene.keeper()
    lease, later = await scene.claim(keeper), await scene.claim(keeper)
    async with keeper:
        keeper.hold(lease)
        await scene.beats(1)
        scene.fault = ZeroDivisionError("in the tick")
        await scene.until(lambda: scene.died)
        assert scene.died[0].__cause__ is not None
        assert (lease.fate, lease.confirmed) == ("lost", False)
        keeper.hold(later)
        assert later.fate == "lost"
        keeper.release(lease, 10)  # nobody is there to hear it
        keeper.end(lease)
    assert len(scene.died) == 1


# The watch over the handlers' loop.


async def test_the_loops_lag_is_measured(scene: Scene) -> None:
    async with scene.keeper():
        await scene.until(lambda: [e for e in scene.events if isinstance(e, LoopLagMeasured)])
        time.sleep(0.3)  # noqa: ASYNC251 - blocking the loop is the point
        await scene.until(
            lambda: [e for e in scene.events if isinstance(e, LoopLagMeasured) and e.seconds > 0.2]
        )


async def test_a_blocked_loop_is_warned_about_with_the_handlers_name(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loop_monitor, "LAG_WARNING_SECONDS", 0.1)

    async def handler() -> None:
        while "event loop is blocked" not in caplog.text:
            time.sleep(0.05)  # noqa: ASYNC251 - blocking the loop is the point

    async with scene.keeper() as keeper, asyncio.TaskGroup() as group:
        group.create_task(handler(), name="reports.daily_report work_1")
        await scene.until(lambda: "event loop runs again" in caplog.text)
        assert keeper.renewing
    assert "reports.daily_report work_1" in caplog.text


async def test_after_max_block_nothing_is_renewed_until_the_loop_runs_again(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    keeper = scene.keeper(max_block=0.3)
    lease = await scene.claim(keeper)
    async with keeper:
        keeper.hold(lease)
        await scene.beats(1)
        assert scene.blocked.wait(10)  # which blocks this loop
        assert not keeper.renewing
        assert "leases are not renewed any more" in caplog.text
        assert "test_after_max_block" in caplog.text  # all stacks, ours among them
        await scene.until(lambda: keeper.renewing)
        assert lease.held


async def test_blocked_time_is_exact_although_ticks_are_late(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every tick takes three times as long as may be counted for it."""
    monkeypatch.setattr(loop_monitor, "TICK_SECONDS", TICK_SECONDS / 6)
    async with scene.keeper(max_block=0.1):
        await scene.until(lambda: [e for e in scene.events if isinstance(e, LoopLagMeasured)])
        began, wall = time.monotonic(), time.time()  # noqa: TID251 - log records carry wall time
        assert scene.blocked.wait(10)  # which blocks this loop
        lasted = time.monotonic() - began
    [record] = [each for each in caplog.records if each.message.startswith("event loop blocked")]
    stated = re.search(r"seconds=(\d+\.\d{3}) ", record.message)
    assert stated is not None
    assert record.created - wall - 0.1 <= float(stated[1])
    assert lasted > 0.25
    assert float(stated[1]) <= lasted + TICK_SECONDS + 0.1


@pytest.mark.parametrize("error", [ZeroDivisionError(), SystemExit(), KeyboardInterrupt()])
async def test_exception_of_a_prompted_call_is_fatal(scene: Scene, error: BaseException) -> None:
    def crash() -> None:
        raise error

    keeper = scene.keeper()
    lease = await scene.claim(keeper)
    async with keeper:
        keeper.hold(lease)
        await scene.beats(1)
        keeper.prompt(lease, crash)
        await scene.until(lambda: scene.died and scene.ended)
        assert scene.died[0].__cause__ is error
        assert scene.ended == scene.died
        assert not keeper.renewing
        assert lease.fate == "lost"


@pytest.mark.parametrize("error", [SystemExit(), GeneratorExit()])
async def test_lease_task_that_raises_no_exception_class_is_fatal(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    async def crash(_: Lease) -> bool:
        raise error

    keeper = scene.keeper()
    lease = await scene.claim(keeper)
    async with keeper:
        monkeypatch.setattr(Lease, "beat", crash)
        keeper.hold(lease)
        await scene.until(lambda: scene.died and scene.ended)
        assert scene.ended == scene.died
        assert lease.fate == "lost"


async def test_failure_is_told_before_services_have_closed(scene: Scene) -> None:
    release = threading.Event()

    @contextlib.asynccontextmanager
    async def slow() -> AsyncIterator[None]:
        try:
            yield
        finally:
            await asyncio.to_thread(release.wait, 20)

    async with scene.keeper(slow()):
        scene.fault = ZeroDivisionError("in the tick")
        await scene.until(lambda: scene.died and scene.ended)
        assert not release.is_set()
        release.set()


async def test_a_process_that_was_stopped_is_not_taken_for_a_blocked_loop() -> None:
    pings: list[object] = []
    monitor = LoopMonitor(pings.append, max_block=5)
    monitor.ask()
    assert not monitor.answered
    assert not monitor.wait(3_600.0)


# The clock.


async def test_a_machine_that_slept_too_long_has_lost_its_leases(scene: Scene) -> None:
    keeper = scene.keeper()
    lease = await scene.claim(keeper)
    async with keeper:
        keeper.hold(lease)
        await scene.beats(1)
        await scene.at_rest(keeper)
        scene.ahead += 55
        await scene.until(lambda: lease.fate == "lost")
        assert not lease.confirmed
        await scene.until(lambda: lease.task is not None and lease.task.done())
    assert [op for op, _ in scene.script.sent] == ["heartbeat"]


async def test_a_machine_that_slept_renews_at_once_what_it_still_holds(scene: Scene) -> None:
    """Timers stood still with the machine: the next beat's would come after the lease's end."""
    keeper = scene.keeper()
    lease = await scene.claim(keeper)
    async with keeper:
        keeper.hold(lease)
        await scene.beats(1)
        await scene.at_rest(keeper)
        scene.ahead += 50
        await scene.beats(2)
        assert lease.held
        assert lease.remaining > 50


async def test_a_lease_is_given_up_in_time_while_a_beat_of_it_hangs(scene: Scene) -> None:
    """The beat's own timer stood still while the machine slept."""
    keeper = scene.keeper()
    lease = await scene.claim(keeper)
    async with keeper:
        keeper.hold(lease)
        await scene.beats(1)
        scene.sent.acquire()
        scene.script = Script(heartbeat=[Trouble(answer="silence", applied=False)])
        keeper.beat_now(lease)
        await asyncio.to_thread(scene.sent.acquire, timeout=5)
        await scene.at_rest(keeper)
        scene.ahead += 53.5
        await scene.until(lambda: lease.fate == "lost")
        assert scene.clock() < lease.deadline


async def test_a_lease_whose_beats_were_cancelled_by_mistake_is_given_up(scene: Scene) -> None:
    keeper = scene.keeper()
    lease = await scene.claim(keeper)
    async with keeper:
        keeper.hold(lease)
        await scene.beats(1)
        assert lease.task is not None
        keeper._call(lease.task.cancel)
        await scene.at_rest(keeper)
        scene.ahead += 53.5
        await scene.until(lambda: lease.fate == "lost")
        assert scene.clock() < lease.deadline
