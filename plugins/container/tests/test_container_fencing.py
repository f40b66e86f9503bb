"""Tests that an item never has two running containers, after cancellations and lost leases."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

import pytest

from workpool import Release, Session, WorkItem
from workpool.errors import TransientError
from workpool_container import container_run
from workpool_container.container_run import CONTAINER_ID_KEY, ContainerRun
from workpool_container.engine_client import GIVEN_UP_SUFFIX, EngineClient
from workpool_container.options import ContainerOptions, container_specification

if TYPE_CHECKING:
    from collections.abc import Callable

    from plugins.container.tests.conftest import ContainerTestbed


class ControlledLease:
    """A fake lease whose remaining time the test sets. The lease records the written metadata."""

    def __init__(self) -> None:
        self.lease_remaining = 60.0
        self.metadata: dict[str, Any] = {}

    def check(self) -> None: ...

    def progress(self) -> None: ...

    async def update_metadata(self, patch: dict[str, Any]) -> None:
        self.metadata |= patch


class ControlledSessionRun:
    """Runs one session in a container as a worker does, but with a `ControlledLease`."""

    def __init__(
        self,
        testbed: ContainerTestbed,
        engine: EngineClient,
        container_id: str = "",
        script: str | None = None,
    ) -> None:
        now = datetime.now(UTC)
        item = WorkItem(
            id=testbed.work_id,
            type="session",
            session_id="sess_1",
            environment_id="env_1",
            state="starting",
            metadata={CONTAINER_ID_KEY: container_id} if container_id else {},
            created_at=now,
            acknowledged_at=now,
            started_at=None,
            latest_heartbeat_at=None,
            last_heartbeat=None,
            stop_requested_at=None,
            stopped_at=None,
        )
        self.lease = ControlledLease()
        self.engine = engine
        self.session = Session(item, cast("Any", self.lease), redelivered=False)
        command = ["/bin/sh", "-c", script or testbed.endless_script]
        self.options = ContainerOptions.from_settings(testbed.options | {"command": command})

    async def run_session(self) -> dict[str, str]:
        return await ContainerRun(self.engine, self.options, self.session).run_container()


async def container_states(testbed: ContainerTestbed) -> dict[str, str]:
    """Return the state of each container of the item, by container id."""
    return {each.id: each["State"] for each in await testbed.item_containers(testbed.work_id)}


async def test_worker_without_lease_does_not_stop_container_that_another_worker_adopted(
    testbed: ContainerTestbed, engine: EngineClient
) -> None:
    stale = ControlledSessionRun(testbed, engine)
    async with asyncio.TaskGroup() as group:
        first = group.create_task(stale.run_session())
        await testbed.wait_for_output("ready")
        (container,) = await container_states(testbed)
        second = group.create_task(
            ControlledSessionRun(testbed, engine, container_id=container).run_session()
        )
        await testbed.log.wait_until(lambda: any("adopted" in line for line in testbed.log.lines))

        # End the first worker's lease, as if that worker had been suspended for too long.
        stale.lease.lease_remaining = 0.0
        first.cancel()
        await asyncio.wait({first})
        assert await container_states(testbed) == {container: "running"}

        second.cancel()
    assert await container_states(testbed) == {}


@pytest.mark.parametrize("turns", [1, 8])
@pytest.mark.parametrize("call", ["create_container", "start_container", "_exit_status"])
async def test_cancellation_at_any_engine_call_leaves_no_running_container(
    testbed: ContainerTestbed,
    engine: EngineClient,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    turns: int,
) -> None:
    original = getattr(engine, call)

    async def cancel_task_soon_and_call_engine(*arguments: Any) -> Any:
        _call_after_loop_iterations(turns, task.cancel)
        return await original(*arguments)

    monkeypatch.setattr(engine, call, cancel_task_soon_and_call_engine)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(ControlledSessionRun(testbed, engine).run_session())
        await asyncio.wait({task})
    assert task.cancelled()
    # A container in the state "created" may remain, because the engine may create a container after
    # the request for it was cancelled.
    assert set((await container_states(testbed)).values()) <= {"created"}


@pytest.mark.parametrize("turns", [0, 8])
@pytest.mark.parametrize("call", ["rename_container", "stop_container", "remove_container"])
async def test_second_cancellation_during_cleanup_leaves_no_container(
    testbed: ContainerTestbed,
    engine: EngineClient,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    turns: int,
) -> None:
    original = getattr(engine, call)

    async def cancel_task_again_and_call_engine(*arguments: Any) -> Any:
        loop = asyncio.get_running_loop()
        loop.call_soon(_call_after_loop_iterations, turns, task.cancel)
        return await original(*arguments)

    async with asyncio.TaskGroup() as group:
        task = group.create_task(ControlledSessionRun(testbed, engine).run_session())
        await testbed.wait_for_output("ready")
        monkeypatch.setattr(engine, call, cancel_task_again_and_call_engine)
        task.cancel()
        await asyncio.wait({task})
    assert task.cancelled()
    assert await container_states(testbed) == {}


async def test_second_cancellation_after_stop_signal_kills_container_at_once(
    testbed: ContainerTestbed, engine: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container_run, "CANCELLED_GRACE_SECONDS", 600.0)
    script = "trap '' TERM; echo ready; while :; do sleep 1; done"
    stop_container, stop_begun = engine.stop_container, asyncio.Event()

    async def record_start_of_stop(*arguments: Any) -> None:
        stop_begun.set()
        await stop_container(*arguments)

    monkeypatch.setattr(engine, "stop_container", record_start_of_stop)
    async with asyncio.timeout(240), asyncio.TaskGroup() as group:
        task = group.create_task(ControlledSessionRun(testbed, engine, script=script).run_session())
        await testbed.wait_for_output("ready")
        task.cancel()
        await stop_begun.wait()
        task.cancel()
        await asyncio.wait({task})
    assert await container_states(testbed) == {}


def _call_after_loop_iterations(turns: int, call: Callable[[], object]) -> None:
    if turns:
        asyncio.get_running_loop().call_soon(_call_after_loop_iterations, turns - 1, call)
    else:
        call()


async def test_container_is_not_started_if_lease_of_item_ends_before_start(
    testbed: ContainerTestbed, engine: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = ControlledSessionRun(testbed, engine)
    states = []

    async def end_lease_after_container_creation(patch: dict[str, str]) -> None:
        states.append((await container_states(testbed))[patch[CONTAINER_ID_KEY]])
        worker.lease.lease_remaining = 0.0

    monkeypatch.setattr(worker.lease, "update_metadata", end_lease_after_container_creation)
    with pytest.raises(Release):
        await worker.run_session()
    assert states == ["created"]
    assert await container_states(testbed) == {}
    assert testbed.log.lines == []


async def test_session_is_released_before_container_starts_if_metadata_cannot_be_written(
    testbed: ContainerTestbed, engine: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = ControlledSessionRun(testbed, engine)

    async def raise_server_error(_: object) -> None:
        raise TransientError("update", 503, "busy", reason="server_error")

    monkeypatch.setattr(worker.lease, "update_metadata", raise_server_error)
    with pytest.raises(Release):
        await worker.run_session()
    assert await container_states(testbed) == {}


async def test_container_is_stopped_if_worker_runs_out_of_memory(
    testbed: ContainerTestbed, engine: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = ControlledSessionRun(testbed, engine)

    async def raise_memory_error(_: object) -> None:
        await testbed.wait_for_output("ready")
        raise MemoryError

    monkeypatch.setattr(engine, "wait_for_exit_status", raise_memory_error)
    with pytest.raises(MemoryError):
        await worker.run_session()
    assert "running" not in (await container_states(testbed)).values()


@pytest.mark.parametrize("kind", ["not named by the item", "given up", "never started"])
async def test_worker_removes_unadoptable_container_before_it_starts_new_one(
    testbed: ContainerTestbed, engine: EngineClient, kind: str
) -> None:
    old = ControlledSessionRun(testbed, engine)
    name = f"workpool-{testbed.work_id}-old{GIVEN_UP_SUFFIX if kind == 'given up' else ''}"
    left = await engine.create_container(name, container_specification(old.options, old.session))
    if kind != "never started":
        await engine.start_container(left)
        await testbed.wait_until_true(lambda: container_has_state(testbed, left, "running"))
    worker = ControlledSessionRun(
        testbed, engine, container_id="" if kind == "not named by the item" else left
    )
    async with asyncio.TaskGroup() as group:
        task = group.create_task(worker.run_session())
        await testbed.wait_for_output("ready")
        (container,) = await container_states(testbed)
        assert container != left
        assert worker.lease.metadata == {CONTAINER_ID_KEY: container}
        task.cancel()


async def container_has_state(testbed: ContainerTestbed, container: str, state: str) -> bool:
    return (await container_states(testbed)).get(container) == state
