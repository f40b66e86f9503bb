"""The end, adoption and removal of containers: an item never has two running containers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from workpool.testing import expire_lease
from workpool_container.run import CONTAINER

if TYPE_CHECKING:
    from pathlib import Path

    from plugins.container.tests.conftest import Scene
    from plugins.container.tests.engines import Podman

COUNTED = "echo started >> /kept/starts; "
"""A prefix of scripts: each start of a container writes a line."""


def starts(folder: Path) -> int:
    """Return how many containers have started."""
    return len((folder / "starts").read_text().splitlines())


@pytest.fixture
def kept(scene: Scene, tmp_path: Path) -> Path:
    """A directory that the containers see as /kept."""
    scene.options["mounts"] = [f"{tmp_path}:/kept:rw"]
    return tmp_path


# Stop requests.


async def test_stop_request_ends_container(scene: Scene) -> None:
    (item,) = scene.plane.enqueue()
    async with scene.pool(scene.forever):
        await scene.prints("ready")
        scene.ask_to_stop(item.id)
        finished = await scene.finished(item.id)
    assert finished.outcome == "stopped"
    assert scene.item(item.id).metadata["exit_status"] == "9"
    assert await scene.containers(item.id) == []


async def test_container_that_ignores_sigterm_is_killed_after_grace(scene: Scene) -> None:
    (item,) = scene.plane.enqueue()
    async with scene.pool("trap '' TERM; echo ready; sleep 1000", grace=0.2):
        await scene.prints("ready")
        scene.ask_to_stop(item.id)
        finished = await scene.finished(item.id)
    assert finished.outcome == "stopped"
    assert scene.item(item.id).metadata["exit_status"] == "137"


async def test_container_beyond_its_timeout_is_stopped(scene: Scene) -> None:
    finished = await scene.run(scene.forever, timeout=0.5)
    assert finished.outcome == "timed_out"
    assert await scene.containers(finished.session.item.id) == []


async def test_container_without_output_is_stalled_and_removed(scene: Scene) -> None:
    finished = await scene.run("echo ready; sleep 1000", stall_timeout=1)
    assert finished.outcome == "stalled"
    assert await scene.containers(finished.session.item.id) == []


async def test_container_that_writes_lines_beyond_log_lines_is_not_stalled(scene: Scene) -> None:
    script = "for i in 1 2 3 4 5 6; do sleep 0.5; echo line $i; done"
    finished = await scene.run(script, stall_timeout=2, log_lines=1)
    assert finished.outcome == "completed"
    assert finished.seconds > 2.5


@pytest.mark.parametrize("deaf", [False, True])
async def test_lost_lease_ends_container_before_handler_ends(scene: Scene, *, deaf: bool) -> None:
    (item,) = scene.plane.enqueue()
    script = "echo ready; exec sleep 1000" if deaf else scene.forever
    async with scene.pool(script, sweep_seconds=600):
        await scene.prints("ready")
        # The pool notices by the redelivery of the item that it has lost the lease.
        expire_lease(scene.plane, item.id)
        finished = await scene.finished(item.id)
        assert finished.outcome == "lease_lost"
        assert finished.seconds < 10
        ours = finished.session.item.id
        # The running container was started by the second run after the container of the first was
        # gone.
        second = await scene.running(ours)
        assert scene.item(ours).metadata[CONTAINER] == second
        assert len(await scene.containers(ours)) == 1


async def test_container_at_drain_deadline_is_removed_and_session_released(scene: Scene) -> None:
    (item,) = scene.plane.enqueue()
    async with scene.pool(scene.forever) as supervisor:
        await scene.prints("ready")
        (found,) = await scene.containers(item.id)
        assert scene.item(item.id).metadata[CONTAINER] == found.id
        assert found["Labels"] == {
            "workpool.work_id": item.id,
            "workpool.session_id": item.session_id,
            "workpool.environment_id": item.environment_id,
        }
        await supervisor.drain(timeout=0)
        assert (await scene.finished(item.id)).outcome == "released"
        assert await scene.containers(item.id) == []


@pytest.mark.parametrize(("status", "outcome"), [(0, "completed"), (9, "released")])
async def test_drain_sends_sigterm_to_container_and_uses_its_exit_status(
    scene: Scene, status: int, outcome: str
) -> None:
    (item,) = scene.plane.enqueue()
    async with scene.pool(scene.forever.replace("exit 9", f"exit {status}")) as supervisor:
        await scene.prints("ready")
        await supervisor.drain(timeout=10)
        assert (await scene.finished(item.id)).outcome == outcome
    assert "stdout: asked" in scene.log.lines
    assert await scene.containers(item.id) == []


async def test_container_removed_by_another_program_fails_its_session(scene: Scene) -> None:
    (item,) = scene.plane.enqueue()
    async with scene.pool(scene.forever):
        container = await scene.running(item.id)
        await scene.docker.containers.container(container).delete(force=True)
        finished = await scene.finished(item.id)
    assert finished.outcome == "failed"
    assert "removed by another program" in str(finished.error)


# Adoption.


async def test_container_left_by_drain_is_adopted_by_next_run(scene: Scene, kept: Path) -> None:
    script = COUNTED + "while [ ! -e /kept/end ]; do sleep 0.05; done"
    (item,) = scene.plane.enqueue()
    async with scene.pool(script, on_drain="leave") as supervisor:
        container = await scene.running(item.id)
        await supervisor.drain(timeout=10)
        assert (await scene.finished(item.id)).outcome == "released"
    assert await scene.running(item.id) == container

    expire_lease(scene.plane, item.id)
    async with scene.pool(script):
        (kept / "end").touch()
        assert (await scene.finished(item.id, count=2)).outcome == "completed"
    assert starts(kept) == 1
    assert await scene.containers(item.id) == []


async def test_exit_status_of_container_that_ended_between_runs_is_reported(
    scene: Scene, kept: Path
) -> None:
    script = COUNTED + "while [ ! -e /kept/end ]; do sleep 0.05; done; exit 4"
    (item,) = scene.plane.enqueue()
    async with scene.pool(script, on_drain="leave") as supervisor:
        container = await scene.running(item.id)
        await supervisor.drain(timeout=10)
    (kept / "end").touch()
    await scene.exited(container)

    expire_lease(scene.plane, item.id)
    async with scene.pool(script):
        finished = await scene.finished(item.id, count=2)
    assert finished.outcome == "failed"
    assert "exit status 4" in str(finished.error)
    assert starts(kept) == 1


async def test_container_of_killed_worker_is_adopted(scene: Scene, kept: Path) -> None:
    script = COUNTED + "while [ ! -e /kept/end ]; do sleep 0.05; done"
    (item,) = scene.plane.enqueue()
    async with scene.worker(script) as worker:
        container = await scene.running(item.id)
        name = (await scene.containers(item.id))[0]["Names"]
        worker.kill()
        await worker.wait()

    async def adopted() -> bool:
        (found,) = await scene.containers(item.id)
        return bool(found["Names"] != name)

    expire_lease(scene.plane, item.id)
    async with scene.pool(script):
        await scene.until(adopted)
        (kept / "end").touch()
        assert (await scene.finished(item.id)).outcome == "completed"
    assert scene.item(item.id).metadata[CONTAINER] == container
    assert starts(kept) == 1


# Restarts of the engine.


async def test_container_is_followed_across_restart_of_engine(
    scene: Scene, podman: Podman, kept: Path
) -> None:
    script = "while [ ! -e /kept/end ]; do echo ready; sleep 0.05; done; echo bye"
    (item,) = scene.plane.enqueue()
    async with scene.pool(script):
        await scene.prints("ready")
        podman.stop()
        await scene.log.until(lambda: any("output interrupted" in line for line in scene.log.lines))
        scene.log.lines.clear()
        podman.start()
        await scene.prints("ready")
        (kept / "end").touch()
        assert (await scene.finished(item.id)).outcome == "completed"
    assert "stdout: bye" in scene.log.lines
    assert await scene.containers(item.id) == []
