"""Attempts: counted runs of an item, their numbers, and their metadata."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from workpool import Release, Session, handler
from workpool.errors import AttemptsExceeded
from workpool.events import DrainStarted, ItemReceived, SessionFinished, SessionStarted
from workpool.server import Poll
from workpool.testing import Hold, expire_lease, lost, status

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from workpool.server import ControlPlane
    from workpool.testing import Clock, Faults, Recorder

LONG = 60.0
DRAINED = {"workpool.released": "the pool is draining"}


@handler
async def patient(_: Session) -> None:
    await asyncio.Event().wait()


@handler
async def prompt(_: Session) -> None:
    return None


def ending(end: Callable[[], Any]) -> Any:
    """Return a handler that waits for an interruption and then returns or raises as `end` does."""

    @handler
    async def work(session: Session) -> Any:
        await session.interrupted()
        return end()

    return work


def fail() -> None:
    raise ValueError


def soon_over() -> Callable[[object], bool]:
    """Return a predicate that is true for 0.3 s, longer than a short write is retried."""
    since: list[float] = []

    def asked(_: object) -> bool:
        now = asyncio.get_running_loop().time()
        since.append(now)
        return now < since[0] + 0.3

    return asked


@dataclass
class Scene:
    """One item of a control plane, and the pools that run it one after another."""

    plane: ControlPlane
    faults: Faults
    recorder: Recorder
    make_pool: Any

    def __post_init__(self) -> None:
        self._environment = self.plane.environments[0]
        (item,) = self.plane.enqueue()
        self.id = item.id

    @property
    def metadata(self) -> dict[str, str]:
        return dict(self.plane.operations.get(self._environment, self.id).metadata)

    @property
    def attempts(self) -> list[int]:
        """Attempt numbers of all started sessions, in order."""
        return [event.session.attempt for event in self.recorder.of(SessionStarted)]

    @property
    def ends(self) -> list[str]:
        return [event.outcome for event in self.recorder.of(SessionFinished)]

    def write(self, **notes: str) -> None:
        patch = {f"workpool.{key}": value for key, value in notes.items()}
        self.plane.operations.update(self._environment, self.id, patch)

    def lapse(self) -> None:
        expire_lease(self.plane, self.id)

    def crash(self, work_id: str = "") -> None:
        """Run an item and lose its lease, as a worker that is killed does."""
        operations, work_id = self.plane.operations, work_id or self.id
        operations.ack(self._environment, work_id, "another")
        operations.heartbeat(self._environment, work_id, "NO_HEARTBEAT", worker_id="another")
        expire_lease(self.plane, work_id)

    async def run(self, plugin: object, **settings: Any) -> SessionFinished:
        """Run a pool until the session has ended, then let the lease of a released item expire."""
        before = len(self.ends)
        async with self.make_pool(plugin, **settings):
            await self.recorder.wait_for(SessionFinished, count=before + 1)
        self.lapse()
        return self.recorder.of(SessionFinished)[-1]

    async def roll(self, plugin: object, timeout: float = 0, **settings: Any) -> None:
        """Run a pool and drain it while the session of the item runs."""
        async with self.make_pool(plugin, **settings) as supervisor:
            await self.recorder.wait_for(SessionStarted, count=len(self.attempts) + 1)
            await supervisor.drain(timeout=timeout)
        assert supervisor.abandoned == 0
        self.lapse()

    @asynccontextmanager
    async def draining(self, plugin: object, **settings: Any) -> AsyncIterator[None]:
        """Run the block while a pool drains; the drain began while the session of the item ran."""
        async with self.make_pool(plugin, **settings) as supervisor, asyncio.TaskGroup() as group:
            await self.recorder.wait_for(SessionStarted)
            group.create_task(supervisor.drain(timeout=None))
            await self.recorder.wait_for(DrainStarted)
            yield
            await supervisor.drain(timeout=0)


@pytest.fixture
def scene(plane: ControlPlane, faults: Faults, recorder: Recorder, make_pool: Any) -> Scene:
    return Scene(plane, faults, recorder, make_pool)


@pytest.fixture
def short_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workpool.pool.session_runner.ATTEMPT_SECONDS", 0.1)
    monkeypatch.setattr("workpool.pool.completion.MARK_TRY_SECONDS", 1.0)


# -- what counts


async def test_attempt_of_new_item_is_one_without_extra_request(scene: Scene) -> None:
    await scene.run(prompt, max_attempts=1)
    assert scene.attempts == [1]
    assert [request.op for request in scene.faults.of(work_id=scene.id)] == [
        "ack",
        "heartbeat",
        "stop",
    ]


async def test_attempt_after_crashed_run_is_counted(scene: Scene) -> None:
    scene.crash()
    await scene.run(prompt)
    assert scene.attempts == [2]
    assert scene.metadata == {"workpool.attempt": "2"}


async def test_session_drained_repeatedly_completes_within_max_attempts(scene: Scene) -> None:
    for _ in range(3):
        await scene.roll(patient, max_attempts=2)
    assert (await scene.run(prompt, max_attempts=2)).outcome == "completed"
    assert scene.attempts == [1, 1, 1, 1]
    assert scene.metadata == {}


async def test_release_by_handler_is_not_counted_as_attempt(scene: Scene) -> None:
    @handler
    async def later(_: Session) -> None:
        raise Release("later")

    for _ in range(3):
        assert (await scene.run(later, max_attempts=1)).outcome == "released"
    assert (await scene.run(prompt, max_attempts=1)).outcome == "completed"
    assert scene.attempts == [1, 1, 1, 1]
    assert scene.metadata == {}


async def test_crash_after_drained_run_counts_as_attempt(scene: Scene) -> None:
    await scene.roll(patient)
    assert scene.metadata == DRAINED
    seen: list[dict[str, str]] = []

    @handler
    async def crash(_: Session) -> None:
        seen.append(scene.metadata)
        scene.lapse()
        await asyncio.Event().wait()

    assert (await scene.run(crash)).outcome == "lease_lost"
    assert seen == [{}]  # the mark is deleted before the handler starts
    await scene.run(prompt)
    assert scene.attempts == [1, 1, 2]


async def test_drained_run_after_crash_keeps_attempt_number(scene: Scene) -> None:
    scene.crash()
    await scene.roll(patient)
    assert scene.metadata == {"workpool.attempt": "2"} | DRAINED
    await scene.run(prompt)
    assert scene.attempts == [2, 2]
    assert scene.metadata == {"workpool.attempt": "2"}


@pytest.mark.parametrize(("crashed", "number"), [(False, 1), (True, 2)])
@pytest.mark.parametrize("op", ["ack", "heartbeat"])
async def test_item_acknowledged_during_drain_is_not_counted_as_attempt(
    scene: Scene, op: Any, number: int, *, crashed: bool
) -> None:
    if crashed:
        scene.crash()
    hold = Hold()
    scene.faults.add(hold, op, times=1)
    async with scene.make_pool(patient) as supervisor, asyncio.TaskGroup() as group:
        await hold.reached()
        group.create_task(supervisor.drain())
        await scene.recorder.wait_for(DrainStarted)
        hold.release()
    assert scene.attempts == []
    scene.lapse()
    await scene.run(prompt)
    assert scene.attempts == [number]


async def test_run_by_another_worker_while_item_waited_for_slot_counts_as_attempt(
    scene: Scene, clock: Clock
) -> None:
    may_end = asyncio.Event()

    @handler
    async def work(_: Session) -> None:
        await may_end.wait()

    (second,) = scene.plane.enqueue()
    async with scene.make_pool(work, concurrency=1, prefetch=1):
        await scene.recorder.wait_for(ItemReceived, count=2)
        await scene.recorder.wait_for(SessionStarted)
        clock.advance(6)  # longer than the reclaim window
        scene.plane.operations.poll(scene.plane.environments[0], Poll("another"))
        scene.crash(second.id)
        may_end.set()
        await scene.recorder.wait_for(SessionFinished, count=2)
    assert scene.attempts == [1, 2]
    assert [event.session.redelivered for event in scene.recorder.of(SessionStarted)] == [
        False,
        True,
    ]


# -- the mark of a drain


async def test_mark_is_written_as_soon_as_drain_is_requested(scene: Scene) -> None:
    """A process that is killed at the end of its grace period has already written the mark."""
    async with scene.draining(patient):
        await scene.faults.wait_for("update", answered=True)
        assert scene.metadata == DRAINED
        assert not scene.recorder.of(SessionFinished)
    assert len(scene.faults.of("update")) == 1


@pytest.mark.parametrize(
    ("end", "outcome", "metadata"),
    [
        (lambda: None, "completed", {}),
        (lambda: {"rows": "7"}, "completed", {"rows": "7"}),
        (fail, "failed", {"workpool.error": "ValueError"}),
    ],
    ids=["completes", "completes_with_result", "fails"],
)
async def test_session_that_ends_during_drain_leaves_no_mark(
    scene: Scene, end: Any, outcome: str, metadata: Any
) -> None:
    await scene.roll(ending(end), timeout=LONG)
    assert scene.recorder.of(SessionFinished)[-1].outcome == outcome
    assert scene.metadata == metadata
    assert scene.faults.of("update")


async def test_session_that_fails_while_its_mark_is_written_leaves_no_mark(scene: Scene) -> None:
    mark = Hold()
    scene.faults.add(mark, "update", times=1)
    async with scene.make_pool(ending(fail)) as supervisor, asyncio.TaskGroup() as group:
        await scene.recorder.wait_for(SessionStarted)
        group.create_task(supervisor.drain(timeout=LONG))
        await mark.reached()
        mark.release()
    assert scene.metadata == {"workpool.error": "ValueError"}


async def test_drained_session_whose_mark_hangs_is_released_on_time(scene: Scene) -> None:
    scene.faults.add(Hold(), "update")
    async with scene.make_pool(patient) as supervisor:
        await scene.recorder.wait_for(SessionStarted)
        await supervisor.drain(timeout=0)
    assert supervisor.abandoned == 0
    assert scene.recorder.of(SessionFinished)[0].outcome == "released"
    assert scene.faults.of("heartbeat")[-1].query["desired_ttl_seconds"] == "10"
    assert scene.metadata == {}


@pytest.mark.parametrize("written", [True, False])
async def test_abandoned_session_is_marked_if_possible(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, *, written: bool
) -> None:
    monkeypatch.setattr("workpool.pool.drain.AFTER_DEADLINE_SECONDS", 0.5)
    cancelled, may_end = asyncio.Event(), asyncio.Event()

    @handler(timeout=0.05)
    async def stubborn(_: Session) -> None:
        while not may_end.is_set():
            try:
                await may_end.wait()
            except asyncio.CancelledError:
                cancelled.set()

    if not written:
        scene.faults.add(Hold(), "update")
    async with scene.make_pool(stubborn) as supervisor:
        await cancelled.wait()
        async with asyncio.timeout(20):
            await supervisor.drain(timeout=0)
    metadata = scene.metadata
    left = asyncio.all_tasks() - {asyncio.current_task()}
    may_end.set()
    await asyncio.wait(left, timeout=20)
    assert supervisor.abandoned == 1
    assert metadata == (DRAINED if written else {})


async def test_attempt_whose_mark_could_not_be_written_is_counted(scene: Scene) -> None:
    scene.faults.add(status(503), "update", where=lambda _: not recovered)
    recovered: list[bool] = []
    await scene.roll(patient)
    recovered.append(True)
    await scene.run(prompt)
    assert scene.attempts == [1, 2]


async def test_release_by_handler_replaces_reason_written_by_drain(scene: Scene) -> None:
    may_end = asyncio.Event()

    @handler
    async def later(_: Session) -> None:
        await may_end.wait()
        raise Release("page 7")

    async with scene.draining(later):
        await scene.faults.wait_for("update", answered=True)
        may_end.set()
        await scene.recorder.wait_for(SessionFinished)
    assert scene.metadata == {"workpool.released": "Release"}


@pytest.mark.usefixtures("fast_heartbeats")
async def test_session_stopped_by_operator_during_drain_leaves_no_mark(scene: Scene) -> None:
    async with scene.draining(patient, lease_ttl=10, stop_grace=0):
        await scene.faults.wait_for("update", answered=True)
        scene.plane.operations.stop(scene.plane.environments[0], scene.id)
        await scene.recorder.wait_for(SessionFinished)
    assert scene.ends == ["stopped"]
    assert scene.metadata == {}


async def test_completed_session_whose_mark_cannot_be_deleted_is_stopped(
    scene: Scene,
) -> None:
    """If the item were not stopped, it would be run again."""
    may_end = asyncio.Event()

    @handler
    async def work(session: Session) -> None:
        await session.interrupted()
        await may_end.wait()

    scene.faults.add(status(503), "update", skip=1)
    async with asyncio.TaskGroup() as group:
        group.create_task(scene.roll(work, timeout=LONG))
        await scene.faults.wait_for("update", answered=True)
        may_end.set()
    assert scene.recorder.of(SessionFinished)[0].outcome == "completed"
    assert scene.metadata == DRAINED


# -- the start of the next run


async def test_lost_answer_to_attempt_update_does_not_count_twice(scene: Scene) -> None:
    scene.crash()
    scene.faults.add(lost(), "update", times=2)
    await scene.run(prompt, request_timeout=0.2)
    assert scene.attempts == [2]
    assert scene.metadata == {"workpool.attempt": "2"}


@pytest.mark.parametrize(
    ("notes", "number"), [({}, 2), ({"released": "earlier", "attempt": "4"}, 4)],
    ids=["crashed", "released"],
)  # fmt: skip
@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.usefixtures("short_writes")
async def test_run_that_cannot_be_counted_is_released_with_its_number(
    scene: Scene, notes: Any, number: int, *, applied: bool
) -> None:
    scene.crash()
    scene.write(**notes)
    scene.faults.add(status(503, applied=applied), "update", where=soon_over())
    assert (await scene.run(patient)).outcome == "released"
    assert scene.attempts == []
    await scene.run(prompt)
    assert scene.attempts == [number]


@pytest.mark.usefixtures("short_writes")
async def test_run_that_cannot_be_counted_keeps_its_mark(scene: Scene) -> None:
    scene.crash()
    scene.write(released="earlier")
    scene.faults.add(status(503), "update", where=lambda _: not recovered)
    recovered: list[bool] = []
    assert (await scene.run(patient)).outcome == "released"
    assert scene.metadata == {"workpool.released": "earlier"}
    recovered.append(True)
    await scene.run(prompt)
    assert scene.attempts == [1]


async def test_drain_mark_replaces_error_of_earlier_run(scene: Scene) -> None:
    """A run that failed and could not be stopped has left its error note in the metadata."""
    scene.crash()
    scene.write(error="ValueError")
    await scene.roll(patient)
    assert scene.attempts == [2]
    assert scene.metadata == {"workpool.attempt": "2"} | DRAINED


# -- the limit


@pytest.mark.parametrize(
    ("settings", "outcome"),
    [({}, "failed"), ({"max_attempts": 11}, "completed"), ({"max_attempts": 0}, "completed")],
    ids=["default", "higher", "off"],
)
async def test_item_lost_ten_times_fails_by_default(
    scene: Scene, settings: Any, outcome: str
) -> None:
    scene.crash()
    scene.write(attempt="10")
    finished = await scene.run(prompt, **settings)
    assert finished.outcome == outcome
    assert isinstance(finished.error, AttemptsExceeded) is (outcome == "failed")


async def test_item_beyond_max_attempts_leaves_no_mark(scene: Scene) -> None:
    scene.crash()
    scene.write(attempt="5", released="earlier")
    assert (await scene.run(prompt, max_attempts=4)).outcome == "failed"
    assert scene.metadata == {"workpool.attempt": "5", "workpool.error": "AttemptsExceeded"}
