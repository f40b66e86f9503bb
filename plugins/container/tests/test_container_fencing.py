"""An item has at most one container, even if its worker is cancelled at any point."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

import pytest

from workpool import Release, Session, WorkItem
from workpool.errors import TransientError
from workpool_container import run
from workpool_container.engine import ENDED, Engine
from workpool_container.options import Options, specify
from workpool_container.run import CONTAINER, Run

if TYPE_CHECKING:
    from collections.abc import Callable

    from plugins.container.tests.conftest import Scene


class Lease:
    """A lease that the test controls, and the metadata that was written under it."""

    def __init__(self) -> None:
        self.remaining = 60.0
        self.metadata: dict[str, Any] = {}

    def check(self) -> None: ...

    def progress(self) -> None: ...

    async def update_metadata(self, patch: dict[str, Any]) -> None:
        self.metadata |= patch


class Worker:
    """The part of a worker that handles the one item's container."""

    def __init__(
        self, scene: Scene, engine: Engine, named: str = "", script: str | None = None
    ) -> None:
        now = datetime.now(UTC)
        item = WorkItem(
            id=scene.work_id,
            type="session",
            session_id="sess_1",
            environment_id="env_1",
            state="starting",
            metadata={CONTAINER: named} if named else {},
            created_at=now,
            acknowledged_at=now,
            started_at=None,
            latest_heartbeat_at=None,
            last_heartbeat=None,
            stop_requested_at=None,
            stopped_at=None,
        )
        self.lease = Lease()
        self.engine = engine
        self.session = Session(item, cast("Any", self.lease), redelivered=False)
        command = ["/bin/sh", "-c", script or scene.forever]
        self.options = Options.read(scene.options | {"command": command})

    async def run(self) -> dict[str, str]:
        return await Run(self.engine, self.options, self.session).complete()


async def containers(scene: Scene) -> dict[str, str]:
    """Return the states of the item's containers by id."""
    return {each.id: each["State"] for each in await scene.containers(scene.work_id)}


async def test_worker_without_lease_leaves_container_adopted_by_another_worker_running(
    scene: Scene, engine: Engine
) -> None:
    stale = Worker(scene, engine)
    async with asyncio.TaskGroup() as group:
        first = group.create_task(stale.run())
        await scene.prints("ready")
        (container,) = await containers(scene)
        second = group.create_task(Worker(scene, engine, named=container).run())
        await scene.log.until(lambda: any("adopted" in line for line in scene.log.lines))

        # Behave like a worker that was frozen for longer than its lease and then continues.
        stale.lease.remaining = 0.0
        first.cancel()
        await asyncio.wait({first})
        assert await containers(scene) == {container: "running"}

        second.cancel()
    assert await containers(scene) == {}


@pytest.mark.parametrize("turns", [1, 8])
@pytest.mark.parametrize("call", ["create", "start", "_status"])
async def test_cancellation_at_any_engine_call_leaves_no_running_container(
    scene: Scene,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    turns: int,
) -> None:
    original = getattr(engine, call)

    def cancel_after(left: int) -> None:
        if left:
            asyncio.get_running_loop().call_soon(cancel_after, left - 1)
        else:
            task.cancel()

    async def cut(*arguments: Any) -> Any:
        cancel_after(turns)  # the cancellation comes before, during or after the request
        return await original(*arguments)

    monkeypatch.setattr(engine, call, cut)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(Worker(scene, engine).run())
        await asyncio.wait({task})
    assert task.cancelled()
    # A container that was requested before the cancellation may exist, but is never started.
    assert set((await containers(scene)).values()) <= {"created"}


@pytest.mark.parametrize("turns", [0, 8])
@pytest.mark.parametrize("call", ["rename", "stop", "remove"])
async def test_second_cancellation_during_cleanup_leaves_no_container(
    scene: Scene,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    turns: int,
) -> None:
    monkeypatch.setattr(run, "KILL_SECONDS", 30.0)  # a loaded machine removes it slowly
    original = getattr(engine, call)

    async def cancelled_again(*arguments: Any) -> Any:
        loop = asyncio.get_running_loop()
        loop.call_soon(_call_after, turns, task.cancel)
        return await original(*arguments)

    async with asyncio.TaskGroup() as group:
        task = group.create_task(Worker(scene, engine).run())
        await scene.prints("ready")
        monkeypatch.setattr(engine, call, cancelled_again)
        task.cancel()
        await asyncio.wait({task})
    assert task.cancelled()
    assert await containers(scene) == {}


async def test_second_cancellation_during_grace_ends_container_at_once(
    scene: Scene, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "CANCELLED_SECONDS", 60.0)
    deaf = "trap '' TERM; echo ready; while :; do sleep 1; done"
    stop, stopping = engine.stop, asyncio.Event()

    async def noticed(*arguments: Any) -> None:
        stopping.set()
        await stop(*arguments)

    monkeypatch.setattr(engine, "stop", noticed)
    async with asyncio.timeout(40), asyncio.TaskGroup() as group:
        task = group.create_task(Worker(scene, engine, script=deaf).run())
        await scene.prints("ready")
        task.cancel()
        await stopping.wait()
        task.cancel()
        await asyncio.wait({task})
    assert await containers(scene) == {}


def _call_after(turns: int, call: Callable[[], object]) -> None:
    if turns:
        asyncio.get_running_loop().call_soon(_call_after, turns - 1, call)
    else:
        call()


async def test_container_is_not_started_after_lease_has_ended(
    scene: Scene, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(scene, engine)
    states = []

    async def freeze(patch: dict[str, str]) -> None:
        states.append((await containers(scene))[patch[CONTAINER]])
        worker.lease.remaining = 0.0

    monkeypatch.setattr(worker.lease, "update_metadata", freeze)
    with pytest.raises(Release):
        await worker.run()
    assert states == ["created"]  # the metadata names the container before it runs
    assert await containers(scene) == {}
    assert scene.log.lines == []


async def test_item_whose_metadata_cannot_name_container_is_released(
    scene: Scene, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(scene, engine)

    async def fail(_: object) -> None:
        raise TransientError("update", 503, "busy", reason="server_error")

    monkeypatch.setattr(worker.lease, "update_metadata", fail)
    with pytest.raises(Release):
        await worker.run()
    assert await containers(scene) == {}


async def test_container_of_worker_without_resources_is_not_left_running(
    scene: Scene, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(scene, engine)

    async def refuse(_: object) -> None:
        await scene.prints("ready")
        raise MemoryError

    monkeypatch.setattr(engine, "exit_of", refuse)
    with pytest.raises(MemoryError):
        await worker.run()
    assert "running" not in (await containers(scene)).values()


@pytest.mark.parametrize("kind", ["never named", "given up", "never started"])
async def test_superseded_container_is_removed_before_another_starts(
    scene: Scene, engine: Engine, kind: str
) -> None:
    old = Worker(scene, engine)
    name = f"workpool-{scene.work_id}-old{ENDED if kind == 'given up' else ''}"
    left = await engine.create(name, specify(old.options, old.session))
    if kind != "never started":
        await engine.start(left)
        await scene.until(lambda: _has_state(scene, left, "running"))
    worker = Worker(scene, engine, named="" if kind == "never named" else left)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(worker.run())
        await scene.prints("ready")
        (container,) = await containers(scene)
        assert container != left
        assert worker.lease.metadata == {CONTAINER: container}
        task.cancel()


async def _has_state(scene: Scene, container: str, state: str) -> bool:
    return (await containers(scene)).get(container) == state
