"""An item's attempts, which are its counted runs, and the metadata that count them."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from workpool import Release, Session, handler
from workpool.errors import AttemptsExceeded
from workpool.events import DrainStarted, ItemReceived, SessionFinished, SessionStarted
from workpool.pool import session_runner
from workpool.server import Poll
from workpool.testing import Hold, expire_lease, lost, status

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from workpool.server import ControlPlane
    from workpool.testing import Clock, Faults, Recorder

LONG = 60.0
DRAINED = {"workpool.released": "the pool is draining"}


@handler
async def endless_handler(_: Session) -> None:
    await asyncio.Event().wait()


@handler
async def return_at_once(_: Session) -> None:
    return None


def handler_ended_by_drain(end: Callable[[], Any]) -> Any:
    """Return a handler that waits for an interruption, and then returns the result of `end()`."""

    @handler
    async def end_session_after_interruption(session: Session) -> Any:
        await session.interrupted()
        return end()

    return end_session_after_interruption


def raise_value_error() -> None:
    raise ValueError


@dataclass
class ItemTestbed:
    """One item of a control plane, and the pools that claim it one after another."""

    plane: ControlPlane
    faults: Faults
    recorder: Recorder
    make_pool: Any

    def __post_init__(self) -> None:
        self._environment = self.plane.environments[0]
        (item,) = self.plane.enqueue()
        self.id = item.id

    @property
    def item_metadata(self) -> dict[str, str]:
        return dict(self.plane.operations.get_item(self._environment, self.id).metadata)

    @property
    def attempt_numbers(self) -> list[int]:
        """The attempt numbers of all started sessions, in order."""
        return [event.session.attempt for event in self.recorder.of(SessionStarted)]

    @property
    def session_outcomes(self) -> list[str]:
        return [event.outcome for event in self.recorder.of(SessionFinished)]

    def write_metadata(self, **notes: str) -> None:
        patch = {f"workpool.{key}": value for key, value in notes.items()}
        self.plane.operations.update_metadata(self._environment, self.id, patch)

    def expire_lease(self) -> None:
        expire_lease(self.plane, self.id)

    def run_item_and_crash(self, work_id: str = "") -> None:
        """Run an item and lose its lease, as a worker that is killed does."""
        operations, work_id = self.plane.operations, work_id or self.id
        operations.ack_item(self._environment, work_id, "another")
        operations.heartbeat(self._environment, work_id, "NO_HEARTBEAT", worker_id="another")
        expire_lease(self.plane, work_id)

    async def run_one_session(self, plugin: object, **settings: Any) -> SessionFinished:
        """Run a pool until one session has ended, and then let the lease of the item expire."""
        before = len(self.session_outcomes)
        async with self.make_pool(plugin, **settings):
            await self.recorder.wait_for(SessionFinished, count=before + 1)
        self.expire_lease()
        return self.recorder.of(SessionFinished)[-1]

    async def drain_during_session(
        self, plugin: object, timeout: float = 0, **settings: Any
    ) -> None:
        """Run a pool and drain it while the session of the item runs."""
        async with self.make_pool(plugin, **settings) as supervisor:
            await self.recorder.wait_for(SessionStarted, count=len(self.attempt_numbers) + 1)
            await supervisor.drain(timeout=timeout)
        assert supervisor.abandoned == 0
        self.expire_lease()

    @asynccontextmanager
    async def draining_pool(self, plugin: object, **settings: Any) -> AsyncIterator[None]:
        """Start a session and a drain, and run the `async with` block before the session ends."""
        async with self.make_pool(plugin, **settings) as supervisor, asyncio.TaskGroup() as group:
            await self.recorder.wait_for(SessionStarted)
            group.create_task(supervisor.drain(timeout=None))
            await self.recorder.wait_for(DrainStarted)
            yield
            await supervisor.drain(timeout=0)


@pytest.fixture
def item_testbed(
    control_plane: ControlPlane, faults: Faults, recorder: Recorder, make_pool: Any
) -> ItemTestbed:
    return ItemTestbed(control_plane, faults, recorder, make_pool)


@pytest.fixture
def short_attempt_number_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_runner, "ATTEMPT_SECONDS", 0.1)


async def test_new_item_has_attempt_number_one_without_extra_request(
    item_testbed: ItemTestbed,
) -> None:
    await item_testbed.run_one_session(return_at_once, max_attempts=1)
    assert item_testbed.attempt_numbers == [1]
    assert [request.op for request in item_testbed.faults.of(work_id=item_testbed.id)] == [
        "ack",
        "heartbeat",
        "stop",
    ]


async def test_attempt_number_is_two_after_worker_crashed_in_first_attempt(
    item_testbed: ItemTestbed,
) -> None:
    item_testbed.run_item_and_crash()
    await item_testbed.run_one_session(return_at_once)
    assert item_testbed.attempt_numbers == [2]
    assert item_testbed.item_metadata == {"workpool.attempt": "2"}


async def test_session_that_drain_releases_does_not_count_towards_max_attempts(
    item_testbed: ItemTestbed,
) -> None:
    for _ in range(3):
        await item_testbed.drain_during_session(endless_handler, max_attempts=2)
    assert (
        await item_testbed.run_one_session(return_at_once, max_attempts=2)
    ).outcome == "completed"
    assert item_testbed.attempt_numbers == [1, 1, 1, 1]
    assert item_testbed.item_metadata == {}


async def test_release_by_handler_is_not_counted_as_attempt(item_testbed: ItemTestbed) -> None:
    @handler
    async def release_session(_: Session) -> None:
        raise Release("later")

    for _ in range(3):
        assert (
            await item_testbed.run_one_session(release_session, max_attempts=1)
        ).outcome == "released"
    assert (
        await item_testbed.run_one_session(return_at_once, max_attempts=1)
    ).outcome == "completed"
    assert item_testbed.attempt_numbers == [1, 1, 1, 1]
    assert item_testbed.item_metadata == {}


async def test_lost_lease_counts_as_attempt_although_drain_released_earlier_session(
    item_testbed: ItemTestbed,
) -> None:
    await item_testbed.drain_during_session(endless_handler)
    assert item_testbed.item_metadata == DRAINED
    seen: list[dict[str, str]] = []

    @handler
    async def lose_lease(_: Session) -> None:
        seen.append(item_testbed.item_metadata)
        item_testbed.expire_lease()
        await asyncio.Event().wait()

    assert (await item_testbed.run_one_session(lose_lease)).outcome == "lease_lost"
    # The release mark was deleted from the item's metadata before the handler started.
    assert seen == [{}]
    await item_testbed.run_one_session(return_at_once)
    assert item_testbed.attempt_numbers == [1, 1, 2]


async def test_drain_in_second_attempt_leaves_attempt_number_unchanged(
    item_testbed: ItemTestbed,
) -> None:
    item_testbed.run_item_and_crash()
    await item_testbed.drain_during_session(endless_handler)
    assert item_testbed.item_metadata == {"workpool.attempt": "2"} | DRAINED
    await item_testbed.run_one_session(return_at_once)
    assert item_testbed.attempt_numbers == [2, 2]
    assert item_testbed.item_metadata == {"workpool.attempt": "2"}


@pytest.mark.parametrize(("crashed", "number"), [(False, 1), (True, 2)])
@pytest.mark.parametrize("op", ["ack", "heartbeat"])
async def test_item_acknowledged_during_drain_is_not_counted_as_attempt(
    item_testbed: ItemTestbed, op: Any, number: int, *, crashed: bool
) -> None:
    if crashed:
        item_testbed.run_item_and_crash()
    hold = Hold()
    item_testbed.faults.add(hold, op, times=1)
    async with item_testbed.make_pool(endless_handler) as supervisor, asyncio.TaskGroup() as group:
        await hold.reached()
        group.create_task(supervisor.drain())
        await item_testbed.recorder.wait_for(DrainStarted)
        hold.release()
    assert item_testbed.attempt_numbers == []
    item_testbed.expire_lease()
    await item_testbed.run_one_session(return_at_once)
    assert item_testbed.attempt_numbers == [number]


async def test_waiting_item_starts_as_second_attempt_if_another_worker_ran_it_and_crashed(
    item_testbed: ItemTestbed, clock: Clock
) -> None:
    may_end = asyncio.Event()

    @handler
    async def wait_until_test_allows_end(_: Session) -> None:
        await may_end.wait()

    (second,) = item_testbed.plane.enqueue()
    async with item_testbed.make_pool(wait_until_test_allows_end, concurrency=1, prefetch=1):
        await item_testbed.recorder.wait_for(ItemReceived, count=2)
        await item_testbed.recorder.wait_for(SessionStarted)
        clock.advance(6)  # The reclaim window is over, so the next poll receives the item again.
        item_testbed.plane.operations.poll(item_testbed.plane.environments[0], Poll("another"))
        item_testbed.run_item_and_crash(second.id)
        may_end.set()
        await item_testbed.recorder.wait_for(SessionFinished, count=2)
    assert item_testbed.attempt_numbers == [1, 2]
    assert [event.session.redelivered for event in item_testbed.recorder.of(SessionStarted)] == [
        False,
        True,
    ]


async def test_metadata_about_release_is_written_as_soon_as_drain_is_requested(
    item_testbed: ItemTestbed,
) -> None:
    """The mark must exist even if the process is killed at the end of its grace period."""
    async with item_testbed.draining_pool(endless_handler):
        await item_testbed.faults.wait_for("update", answered=True)
        assert item_testbed.item_metadata == DRAINED
        assert not item_testbed.recorder.of(SessionFinished)
    assert len(item_testbed.faults.of("update")) == 1


@pytest.mark.parametrize(
    ("end", "outcome", "metadata"),
    [
        (lambda: None, "completed", {}),
        (lambda: {"rows": "7"}, "completed", {"rows": "7"}),
        (raise_value_error, "failed", {"workpool.error": "ValueError"}),
    ],
    ids=["completes", "completes_with_result", "fails"],
)
async def test_session_that_ends_during_drain_leaves_no_metadata_about_release(
    item_testbed: ItemTestbed, end: Any, outcome: str, metadata: Any
) -> None:
    await item_testbed.drain_during_session(handler_ended_by_drain(end), timeout=LONG)
    assert item_testbed.recorder.of(SessionFinished)[-1].outcome == outcome
    assert item_testbed.item_metadata == metadata
    assert item_testbed.faults.of("update")


async def test_no_metadata_about_release_remains_if_session_fails_while_drain_writes_it(
    item_testbed: ItemTestbed,
) -> None:
    mark = Hold()
    item_testbed.faults.add(mark, "update", times=1)
    async with (
        item_testbed.make_pool(handler_ended_by_drain(raise_value_error)) as supervisor,
        asyncio.TaskGroup() as group,
    ):
        await item_testbed.recorder.wait_for(SessionStarted)
        group.create_task(supervisor.drain(timeout=LONG))
        await mark.reached()
        mark.release()
    assert item_testbed.item_metadata == {"workpool.error": "ValueError"}


@pytest.mark.usefixtures("short_release_mark_timeout")
async def test_drain_releases_session_although_metadata_write_about_release_is_never_answered(
    item_testbed: ItemTestbed,
) -> None:
    item_testbed.faults.add(Hold(), "update")
    async with item_testbed.make_pool(endless_handler) as supervisor:
        await item_testbed.recorder.wait_for(SessionStarted)
        await supervisor.drain(timeout=0)
    assert supervisor.abandoned == 0
    assert item_testbed.recorder.of(SessionFinished)[0].outcome == "released"
    assert item_testbed.faults.of("heartbeat")[-1].query["desired_ttl_seconds"] == "10"
    assert item_testbed.item_metadata == {}


async def test_drain_abandons_uncancellable_session_if_metadata_write_about_release_has_no_answer(
    item_testbed: ItemTestbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workpool.pool.drain.AFTER_DEADLINE_SECONDS", 0.5)
    cancelled, may_end = asyncio.Event(), asyncio.Event()

    @handler(timeout=0.05)
    async def uncancellable_handler(_: Session) -> None:
        while not may_end.is_set():
            try:
                await may_end.wait()
            except asyncio.CancelledError:
                cancelled.set()

    item_testbed.faults.add(Hold(), "update")
    async with item_testbed.make_pool(uncancellable_handler) as supervisor:
        await cancelled.wait()
        async with asyncio.timeout(20):
            await supervisor.drain(timeout=0)
    metadata = item_testbed.item_metadata
    left = asyncio.all_tasks() - {asyncio.current_task()}
    may_end.set()
    await asyncio.wait(left, timeout=20)
    assert supervisor.abandoned == 1
    assert metadata == {}


@pytest.mark.usefixtures("short_release_mark_timeout")
async def test_release_by_drain_counts_as_attempt_if_metadata_about_release_cannot_be_written(
    item_testbed: ItemTestbed,
) -> None:
    item_testbed.faults.add(status(503), "update", where=lambda _: not recovered)
    recovered: list[bool] = []
    await item_testbed.drain_during_session(endless_handler)
    recovered.append(True)
    await item_testbed.run_one_session(return_at_once)
    assert item_testbed.attempt_numbers == [1, 2]


async def test_release_by_handler_replaces_reason_written_by_drain(
    item_testbed: ItemTestbed,
) -> None:
    may_end = asyncio.Event()

    @handler
    async def wait_and_release_session(_: Session) -> None:
        await may_end.wait()
        raise Release("page 7")

    async with item_testbed.draining_pool(wait_and_release_session):
        await item_testbed.faults.wait_for("update", answered=True)
        may_end.set()
        await item_testbed.recorder.wait_for(SessionFinished)
    assert item_testbed.item_metadata == {"workpool.released": "Release"}


@pytest.mark.usefixtures("frequent_heartbeats")
async def test_session_stopped_by_operator_during_drain_leaves_no_metadata_about_release(
    item_testbed: ItemTestbed,
) -> None:
    async with item_testbed.draining_pool(endless_handler, stop_grace=0):
        await item_testbed.faults.wait_for("update", answered=True)
        item_testbed.plane.operations.stop_item(item_testbed.plane.environments[0], item_testbed.id)
        await item_testbed.recorder.wait_for(SessionFinished)
    assert item_testbed.session_outcomes == ["stopped"]
    assert item_testbed.item_metadata == {}


@pytest.mark.usefixtures("short_release_mark_timeout")
async def test_item_of_completed_session_is_stopped_although_release_metadata_cannot_be_deleted(
    item_testbed: ItemTestbed,
) -> None:
    """An item that is not stopped would be delivered and run again."""
    may_end = asyncio.Event()

    @handler
    async def return_after_interruption(session: Session) -> None:
        await session.interrupted()
        await may_end.wait()

    item_testbed.faults.add(status(503), "update", skip=1)
    async with asyncio.TaskGroup() as group:
        group.create_task(
            item_testbed.drain_during_session(return_after_interruption, timeout=LONG)
        )
        await item_testbed.faults.wait_for("update", answered=True)
        may_end.set()
    assert item_testbed.recorder.of(SessionFinished)[0].outcome == "completed"
    assert item_testbed.item_metadata == DRAINED


async def test_attempt_is_counted_once_although_write_of_attempt_number_is_not_answered(
    item_testbed: ItemTestbed,
) -> None:
    item_testbed.run_item_and_crash()
    item_testbed.faults.add(lost(), "update", times=2)
    await item_testbed.run_one_session(return_at_once)
    assert item_testbed.attempt_numbers == [2]
    assert item_testbed.item_metadata == {"workpool.attempt": "2"}


@pytest.mark.parametrize(
    ("notes", "number"), [({}, 2), ({"released": "earlier", "attempt": "4"}, 4)],
    ids=["crashed", "released"],
)  # fmt: skip
@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.usefixtures("short_attempt_number_timeout")
async def test_failed_write_of_attempt_number_releases_item_and_does_not_count_as_attempt(
    item_testbed: ItemTestbed, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
    notes: Any, number: int, *, applied: bool,
) -> None:  # fmt: skip
    def is_attempt_number_write_retried(_: object) -> bool:
        return "attempt not counted" not in caplog.text

    item_testbed.run_item_and_crash()
    item_testbed.write_metadata(**notes)
    item_testbed.faults.add(
        status(503, applied=applied), "update", where=is_attempt_number_write_retried
    )
    assert (await item_testbed.run_one_session(endless_handler)).outcome == "released"
    assert item_testbed.attempt_numbers == []
    monkeypatch.setattr(session_runner, "ATTEMPT_SECONDS", 10.0)
    await item_testbed.run_one_session(return_at_once)
    assert item_testbed.attempt_numbers == [number]


@pytest.mark.usefixtures("short_attempt_number_timeout", "short_release_mark_timeout")
async def test_metadata_about_release_remains_if_attempt_number_cannot_be_written(
    item_testbed: ItemTestbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    item_testbed.run_item_and_crash()
    item_testbed.write_metadata(released="earlier")
    item_testbed.faults.add(status(503), "update", where=lambda _: not recovered)
    recovered: list[bool] = []
    assert (await item_testbed.run_one_session(endless_handler)).outcome == "released"
    assert item_testbed.item_metadata == {"workpool.released": "earlier"}
    recovered.append(True)
    monkeypatch.setattr(session_runner, "ATTEMPT_SECONDS", 10.0)
    await item_testbed.run_one_session(return_at_once)
    assert item_testbed.attempt_numbers == [1]


async def test_error_of_earlier_session_is_deleted_when_drain_writes_metadata_about_release(
    item_testbed: ItemTestbed,
) -> None:
    """An earlier run wrote its error to the metadata, but could not stop the item."""
    item_testbed.run_item_and_crash()
    item_testbed.write_metadata(error="ValueError")
    await item_testbed.drain_during_session(endless_handler)
    assert item_testbed.attempt_numbers == [2]
    assert item_testbed.item_metadata == {"workpool.attempt": "2"} | DRAINED


@pytest.mark.parametrize(
    ("settings", "outcome"),
    [({}, "failed"), ({"max_attempts": 11}, "completed"), ({"max_attempts": 0}, "completed")],
    ids=["default", "higher", "off"],
)
async def test_item_beyond_ten_attempts_fails_by_default(
    item_testbed: ItemTestbed, settings: Any, outcome: str
) -> None:
    item_testbed.run_item_and_crash()
    item_testbed.write_metadata(attempt="10")
    finished = await item_testbed.run_one_session(return_at_once, **settings)
    assert finished.outcome == outcome
    assert isinstance(finished.error, AttemptsExceeded) is (outcome == "failed")


async def test_session_beyond_max_attempts_fails_and_leaves_attempt_number_unchanged(
    item_testbed: ItemTestbed,
) -> None:
    item_testbed.run_item_and_crash()
    item_testbed.write_metadata(attempt="5", released="earlier")
    assert (await item_testbed.run_one_session(return_at_once, max_attempts=4)).outcome == "failed"
    assert item_testbed.item_metadata == {
        "workpool.attempt": "5",
        "workpool.error": "AttemptsExceeded",
    }
