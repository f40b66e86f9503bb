"""Tests of how an item's containers end, are adopted and are removed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from plugins.container.tests.engines import WAIT_SECONDS
from workpool import Session
from workpool.pool.drain import AFTER_DEADLINE_SECONDS
from workpool.testing import expire_lease
from workpool_container.container_run import (
    CANCELLED_GRACE_SECONDS,
    CONTAINER_ID_KEY,
    REMOVAL_SECONDS,
)

if TYPE_CHECKING:
    from pathlib import Path

    from plugins.container.tests.conftest import ContainerTestbed
    from plugins.container.tests.engines import PodmanEngine

RECORD_START = "echo started >> /kept/starts; "
"""The beginning of scripts that write a line at each start of a container."""


def count_container_starts(directory: Path) -> int:
    """Return the number of container starts that the script recorded in `directory`."""
    return len((directory / "starts").read_text().splitlines())


@pytest.fixture
def mounted_directory(testbed: ContainerTestbed, tmp_path: Path) -> Path:
    """Return a directory that is mounted in the containers as /kept."""
    testbed.options["mounts"] = [f"{tmp_path}:/kept:rw"]
    return tmp_path


async def test_stop_request_ends_container_and_stores_exit_status(
    testbed: ContainerTestbed,
) -> None:
    (item,) = testbed.plane.enqueue()
    async with testbed.make_pool(testbed.endless_script):
        await testbed.wait_for_output("ready")
        testbed.request_item_stop(item.id)
        finished = await testbed.wait_for_session_end(item.id)
    assert finished.outcome == "stopped"
    assert testbed.stored_item(item.id).metadata["exit_status"] == "9"
    assert await testbed.item_containers(item.id) == []


async def test_container_that_ignores_sigterm_is_killed_after_grace(
    testbed: ContainerTestbed,
) -> None:
    (item,) = testbed.plane.enqueue()
    async with testbed.make_pool("trap '' TERM; echo ready; sleep 1000", grace=0.2):
        await testbed.wait_for_output("ready")
        testbed.request_item_stop(item.id)
        finished = await testbed.wait_for_session_end(item.id)
    assert finished.outcome == "stopped"
    assert testbed.stored_item(item.id).metadata["exit_status"] == "137"


async def test_container_beyond_its_timeout_is_stopped(testbed: ContainerTestbed) -> None:
    finished = await testbed.run_item(testbed.endless_script, timeout=3)
    assert finished.outcome == "timed_out"
    await testbed.wait_for_removal(finished.session.item.id)


async def test_container_without_output_is_removed_and_its_session_counts_as_stalled(
    testbed: ContainerTestbed,
) -> None:
    finished = await testbed.run_item("echo ready; sleep 1000", stall_timeout=3)
    assert finished.outcome == "stalled"
    await testbed.wait_for_removal(finished.session.item.id)


async def test_container_output_that_is_no_longer_logged_still_counts_as_progress(
    testbed: ContainerTestbed, mounted_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report_progress, progress_reported = Session.progress, asyncio.Event()

    def report_and_signal_progress(session: Session) -> None:
        report_progress(session)
        progress_reported.set()

    monkeypatch.setattr(Session, "progress", report_and_signal_progress)
    script = """
        echo first; while [ ! -e /kept/first ]; do sleep 0.05; done
        echo second; while [ ! -e /kept/second ]; do sleep 0.05; done
    """
    (item,) = testbed.plane.enqueue()
    async with testbed.make_pool(script, stall_timeout=600, log_lines=1):
        async with asyncio.timeout(WAIT_SECONDS):
            for line in ("first", "second"):
                await progress_reported.wait()
                progress_reported.clear()
                (mounted_directory / line).touch()
        assert (await testbed.wait_for_session_end(item.id)).outcome == "completed"
    assert [line for line in testbed.log.lines if line.startswith("stdout")] == ["stdout: first"]


@pytest.mark.parametrize("ignores_sigterm", [False, True])
async def test_container_of_lost_lease_is_removed_before_next_run_starts_another(
    testbed: ContainerTestbed, *, ignores_sigterm: bool
) -> None:
    (item,) = testbed.plane.enqueue()
    script = "echo ready; exec sleep 1000" if ignores_sigterm else testbed.endless_script
    async with testbed.make_pool(script, grace=600, sweep_seconds=600):
        await testbed.wait_for_output("ready")
        # Expire the lease, so that the control plane delivers the item again. The pool then detects
        # that it has lost the lease.
        expire_lease(testbed.plane, item.id)
        finished = await testbed.wait_for_session_end(item.id)
        assert finished.outcome == "lease_lost"
        # The pool runs the item a second time, and removes the first container before the new
        # start.
        second = await testbed.running_container(item.id)
        assert testbed.stored_item(item.id).metadata[CONTAINER_ID_KEY] == second
        assert len(await testbed.item_containers(item.id)) == 1


async def test_drain_at_its_deadline_releases_session_and_removes_container(
    testbed: ContainerTestbed,
) -> None:
    (item,) = testbed.plane.enqueue()
    async with testbed.make_pool(testbed.endless_script) as supervisor:
        await testbed.wait_for_output("ready")
        (found,) = await testbed.item_containers(item.id)
        assert testbed.stored_item(item.id).metadata[CONTAINER_ID_KEY] == found.id
        assert found["Labels"] == {
            "workpool.work_id": item.id,
            "workpool.session_id": item.session_id,
            "workpool.environment_id": item.environment_id,
        }
        await supervisor.drain(timeout=0)
        assert (await testbed.wait_for_session_end(item.id)).outcome == "released"
        await testbed.wait_for_removal(item.id)


def test_drain_waits_longer_than_grace_and_removal_of_container() -> None:
    """Otherwise a drain abandons the session of a container that ignores the stop signal."""
    # These values were imported before the fixture of this package's tests increased them.
    assert CANCELLED_GRACE_SECONDS + REMOVAL_SECONDS < AFTER_DEADLINE_SECONDS


@pytest.mark.parametrize(("status", "outcome"), [(0, "completed"), (9, "released")])
async def test_drain_sends_sigterm_to_container_and_uses_its_exit_status(
    testbed: ContainerTestbed, status: int, outcome: str
) -> None:
    (item,) = testbed.plane.enqueue()
    async with testbed.make_pool(
        testbed.endless_script.replace("exit 9", f"exit {status}")
    ) as supervisor:
        await testbed.wait_for_output("ready")
        await supervisor.drain(timeout=60)
        assert (await testbed.wait_for_session_end(item.id)).outcome == outcome
    assert "stdout: SIGTERM received" in testbed.log.lines
    assert await testbed.item_containers(item.id) == []


async def test_session_fails_if_another_program_removes_its_container(
    testbed: ContainerTestbed,
) -> None:
    (item,) = testbed.plane.enqueue()
    async with testbed.make_pool(testbed.endless_script):
        container = await testbed.running_container(item.id)
        await testbed.docker_client.containers.container(container).delete(force=True)
        finished = await testbed.wait_for_session_end(item.id)
    assert finished.outcome == "failed"
    assert "removed by another program" in str(finished.error)


async def test_next_run_adopts_container_that_drain_left_running(
    testbed: ContainerTestbed, mounted_directory: Path
) -> None:
    script = RECORD_START + "while [ ! -e /kept/end ]; do sleep 0.05; done"
    (item,) = testbed.plane.enqueue()
    async with testbed.make_pool(script, on_drain="leave") as supervisor:
        container = await testbed.running_container(item.id)
        await supervisor.drain(timeout=60)
        assert (await testbed.wait_for_session_end(item.id)).outcome == "released"
    assert await testbed.running_container(item.id) == container

    expire_lease(testbed.plane, item.id)
    async with testbed.make_pool(script):
        (mounted_directory / "end").touch()
        assert (await testbed.wait_for_session_end(item.id, count=2)).outcome == "completed"
    assert count_container_starts(mounted_directory) == 1
    assert await testbed.item_containers(item.id) == []


async def test_exit_status_of_container_that_ended_after_drain_is_reported_by_next_run(
    testbed: ContainerTestbed, mounted_directory: Path
) -> None:
    script = RECORD_START + "while [ ! -e /kept/end ]; do sleep 0.05; done; exit 4"
    (item,) = testbed.plane.enqueue()
    async with testbed.make_pool(script, on_drain="leave") as supervisor:
        container = await testbed.running_container(item.id)
        await supervisor.drain(timeout=60)
    (mounted_directory / "end").touch()
    await testbed.wait_for_exit(container)

    expire_lease(testbed.plane, item.id)
    async with testbed.make_pool(script):
        finished = await testbed.wait_for_session_end(item.id, count=2)
    assert finished.outcome == "failed"
    assert "exit status 4" in str(finished.error)
    assert count_container_starts(mounted_directory) == 1


async def test_new_worker_adopts_container_of_killed_worker(
    testbed: ContainerTestbed, mounted_directory: Path
) -> None:
    script = RECORD_START + "while [ ! -e /kept/end ]; do sleep 0.05; done"
    (item,) = testbed.plane.enqueue()
    async with testbed.running_worker(script) as worker:
        container = await testbed.running_container(item.id)
        name = (await testbed.item_containers(item.id))[0]["Names"]
        worker.kill()
        await worker.wait()

    async def container_was_adopted() -> bool:
        (found,) = await testbed.item_containers(item.id)
        return bool(found["Names"] != name)

    expire_lease(testbed.plane, item.id)
    async with testbed.make_pool(script):
        await testbed.wait_until_true(container_was_adopted)
        (mounted_directory / "end").touch()
        assert (await testbed.wait_for_session_end(item.id)).outcome == "completed"
    assert testbed.stored_item(item.id).metadata[CONTAINER_ID_KEY] == container
    assert count_container_starts(mounted_directory) == 1


async def test_output_and_exit_of_container_are_read_after_restart_of_engine(
    testbed: ContainerTestbed, podman: PodmanEngine, mounted_directory: Path
) -> None:
    script = "while [ ! -e /kept/end ]; do echo ready; sleep 0.05; done; echo bye"
    (item,) = testbed.plane.enqueue()
    async with testbed.make_pool(script):
        await testbed.wait_for_output("ready")
        podman.stop_engine_service()
        await testbed.log.wait_until(
            lambda: any("output interrupted" in line for line in testbed.log.lines)
        )
        testbed.log.lines.clear()
        podman.start_engine_service()
        await testbed.wait_for_output("ready")
        (mounted_directory / "end").touch()
        assert (await testbed.wait_for_session_end(item.id)).outcome == "completed"
    assert "stdout: bye" in testbed.log.lines
    assert await testbed.item_containers(item.id) == []
