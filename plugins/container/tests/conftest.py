"""Fixtures: a control plane, a real container engine, and pools with the plugin.

The engine is Podman, or Docker if `TEST_CONTAINER_ENGINE=docker` is set. Where it cannot run, the
tests are skipped with the reason.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import shutil
import sys
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import aiodocker
import pytest

from plugins.container.tests.engines import (
    IMAGE,
    WAIT_SECONDS,
    DockerEngine,
    PodmanEngine,
    busybox_archive,
)
from workpool import Settings, Supervisor
from workpool.events import SessionFinished
from workpool.pool import drain
from workpool.server import ControlPlane
from workpool.server.http.server_dialects import DIALECTS
from workpool.testing import Faults, Recorder, literal
from workpool.testing.bounded_wait import BoundedCondition
from workpool_container import Container, container_run
from workpool_container.engine_client import EngineClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from workpool.server import Item

T = TypeVar("T")

ENDLESS_SCRIPT = "trap 'echo SIGTERM received; exit 9' TERM; echo ready; sleep 1000 & wait"


def pytest_itemcollected(item: pytest.Item) -> None:
    """Add the marker `trial` to every test that needs the container engine."""
    if "podman" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.trial)
        item.add_marker(pytest.mark.timeout(300))


@pytest.fixture(scope="session")
def podman() -> Iterator[PodmanEngine]:
    """A running container engine with a busybox image. Without an engine, the test is skipped."""
    engine = DockerEngine if os.environ.get("TEST_CONTAINER_ENGINE") == "docker" else PodmanEngine
    missing = [name for name in engine.programs if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if os.geteuid() != 0:
        pytest.skip("only root can limit containers on every machine")
    # A socket's path is limited to 107 bytes, and a path in `tmp_path` can be longer.
    folder = Path(tempfile.mkdtemp(prefix="workpool-container-"))
    podman = engine(folder)
    try:
        podman.start_engine_service()
        podman.run_command(
            "import", "-", IMAGE, stdin=busybox_archive(str(shutil.which("busybox")))
        )
        podman.run_command("run", "--rm", "--network=none", "--memory=64m", IMAGE, "/bin/true")
        yield podman
        if left := podman.run_command("ps", "--all", "--quiet").split():
            # Remove containers that the engine has created after a test cancelled the request.
            podman.run_command("rm", "--force", *left)
    finally:
        podman.close()
        shutil.rmtree(folder, ignore_errors=True)


WORKER_PROGRAM = """
import asyncio, json, sys
from workpool import Settings, Supervisor
from workpool_container import Container

settings, options = json.loads(sys.argv[1])
asyncio.run(Supervisor(Settings(**settings), plugins=[Container(**options)]).run())
"""


class ContainerTestbed:
    """A control plane, a container engine and its client, and pools with the plugin.

    Attributes:
        options: The default settings of the plugin; a test may replace them.
        work_id: The id of an item that the control plane does not have.
        endless_script: A script that prints "ready" and runs until it receives SIGTERM.
    """

    def __init__(
        self,
        plane: ControlPlane,
        faults: Faults,
        podman: PodmanEngine,
        docker_client: aiodocker.Docker,
    ) -> None:
        self.plane = plane
        self.faults = faults
        self.log = SessionLog()
        self.docker_client = docker_client
        self.work_id = f"work_{secrets.token_hex(16)}"
        self.endless_script = ENDLESS_SCRIPT
        self.recorder = Recorder()
        self.options: dict[str, Any] = {
            "image": IMAGE,
            "socket": podman.socket,
            "sweep_seconds": 1,
        }

    def make_pool(
        self, script: str, settings: dict[str, Any] | None = None, **options: Any
    ) -> Supervisor:
        """Return a pool whose containers run this script."""
        options = self.options | {"command": ["/bin/sh", "-c", script]} | options
        defaults = {
            "reclaim_older_than_ms": 100,
            "stats_interval": 0,
            "pollers": 1,
            "drain_timeout": 0,
        }
        return Supervisor(
            self.pool_settings(**defaults | (settings or {})),
            plugins=[Container(**options), self.recorder],
        )

    def pool_settings(self, **settings: Any) -> Settings:
        return Settings(
            base_url=self.plane.base_url,
            token=self.plane.token,
            environment_id=self.plane.environments[0],
            **settings,
        )

    async def run_item(
        self, script: str, metadata: dict[str, str] | None = None, **options: Any
    ) -> SessionFinished:
        """Enqueue an item with this metadata, and run its session to the end."""
        (item,) = self.plane.enqueue(metadata=metadata or {})
        async with self.make_pool(script, **options):
            return await self.wait_for_session_end(item.id)

    async def wait_for_session_end(self, work_id: str, count: int = 1) -> SessionFinished:
        return await self.recorder.wait_for(
            SessionFinished,
            lambda event: event.session.item.id == work_id,
            count=count,
            timeout=WAIT_SECONDS,
        )

    def stored_item(self, work_id: str) -> Item:
        return self.plane.operations.get_item(self.plane.environments[0], work_id)

    def request_item_stop(self, work_id: str) -> None:
        """Request an item's stop. Deliver the item again, so that the pool sends a heartbeat."""
        self.plane.operations.stop_item(self.plane.environments[0], work_id, force=False)
        delivery = json.dumps(DIALECTS["qoder"].item_json(self.stored_item(work_id))).encode()
        self.faults.add(literal(delivery), "poll", times=1)

    @asynccontextmanager
    async def running_worker(
        self, script: str, **options: Any
    ) -> AsyncIterator[asyncio.subprocess.Process]:
        """Run a worker in its own process during the `with` block, and kill it at the end."""
        options = self.options | {"command": ["/bin/sh", "-c", script]} | options
        settings = {
            "base_url": self.plane.base_url,
            "token": self.plane.token,
            "environment_id": self.plane.environments[0],
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", WORKER_PROGRAM, json.dumps([settings, options])
        )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def item_containers(self, work_id: str) -> list[Any]:
        """Return the item's containers as the engine lists them."""
        filters = json.dumps({"label": [f"workpool.work_id={work_id}"]})
        return await self.docker_client.containers.list(all=True, filters=filters)

    async def wait_until_true(self, condition: Callable[[], Awaitable[T]]) -> T:
        """Call `condition` repeatedly until it returns a true value, and return that value."""
        async with asyncio.timeout(WAIT_SECONDS):
            while not (found := await condition()):  # noqa: ASYNC110 - state of another process
                await asyncio.sleep(0.05)
        return found

    async def running_container(self, work_id: str) -> str:
        """Wait until the item has a running container, and return the container's id."""

        async def find_running_container_id() -> str:
            states = {each["State"]: each.id for each in await self.item_containers(work_id)}
            return str(states.get("running", ""))

        return await self.wait_until_true(find_running_container_id)

    async def wait_for_exit(self, container: str) -> None:
        """Wait until this container has exited."""

        async def container_has_exited() -> bool:
            shown = await self.docker_client.containers.container(container).show()
            return bool(shown["State"]["Status"] == "exited")

        await self.wait_until_true(container_has_exited)

    async def wait_for_removal(self, work_id: str) -> None:
        """Wait until the item has no containers, except containers that were never started.

        The engine may create a container after its request was cancelled, but never starts it.
        """

        async def has_no_started_container() -> bool:
            states = {each["State"] for each in await self.item_containers(work_id)}
            return states <= {"created"}

        await self.wait_until_true(has_no_started_container)

    async def wait_for_output(self, line: str) -> None:
        """Wait until this line of a container's standard output is logged."""
        await self.log.wait_until(lambda: f"stdout: {line}" in self.log.lines)


class SessionLog(logging.Handler):
    """A logging handler that stores log messages of sessions. Tests wait for such a message."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._changes = BoundedCondition()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        self._changes.notify_all()

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        await self._changes.wait_until(condition, lambda: "\n".join(self.lines), WAIT_SECONDS)


@pytest.fixture
async def docker_client(
    podman: PodmanEngine, engine: EngineClient
) -> AsyncIterator[aiodocker.Docker]:
    """A Docker client of the test's own, independent of the plugin.

    After the test, this fixture removes all containers of the Podman engine.
    """
    async with aiodocker.Docker(f"unix://{podman.socket}", api_version="v1.41") as client:
        yield client
        for container in await client.containers.list(all=True):
            await engine.remove_container(container.id)


@pytest.fixture
async def engine(podman: PodmanEngine) -> AsyncIterator[EngineClient]:
    async with EngineClient(podman.socket) as engine:
        await engine.negotiate_api_version()
        yield engine


@pytest.fixture
async def testbed(
    podman: PodmanEngine, docker_client: aiodocker.Docker, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[ContainerTestbed]:
    for name in os.environ:
        if name.startswith("WORKPOOL_"):
            monkeypatch.delenv(name)
    faults = Faults()
    async with ControlPlane(middlewares=[faults.middleware]) as plane:
        testbed = ContainerTestbed(plane, faults, podman, docker_client)
        log = logging.getLogger("workpool.session")
        level = log.level
        log.setLevel(logging.INFO)
        log.addHandler(testbed.log)
        yield testbed
        log.removeHandler(testbed.log)
        log.setLevel(level)


@pytest.fixture(autouse=True)
def _increase_removal_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow more time for the removal of a container, which is slow on a loaded machine."""
    monkeypatch.setattr(container_run, "REMOVAL_SECONDS", 60.0)
    # A drain abandons a session whose container is not removed within this time.
    monkeypatch.setattr(drain, "AFTER_DEADLINE_SECONDS", 70.0)


@pytest.fixture(autouse=True)
async def _check_for_leaked_tasks() -> AsyncIterator[None]:
    """Check after each test that no asyncio task of the test is left."""
    before = asyncio.all_tasks()
    yield
    assert not asyncio.all_tasks() - before - {asyncio.current_task()}
