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

from plugins.container.tests.engines import IMAGE, SECONDS, Docker, Podman, busybox_root
from workpool import Settings, Supervisor
from workpool.events import SessionFinished
from workpool.server import ControlPlane
from workpool.server.http.server_dialects import DIALECTS
from workpool.testing import Faults, Recorder, literal
from workpool.testing.bounded_wait import Changes
from workpool_container import Container
from workpool_container.engine import Engine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from workpool.server import Item

T = TypeVar("T")

FOREVER = "trap 'echo asked; exit 9' TERM; echo ready; sleep 1000 & wait"


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark every test that needs the container engine as a trial."""
    if "podman" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.trial)


@pytest.fixture(scope="session")
def podman() -> Iterator[Podman]:
    """Podman with a busybox image, in which the fixture has already run a container."""
    engine = Docker if os.environ.get("TEST_CONTAINER_ENGINE") == "docker" else Podman
    missing = [name for name in engine.programs if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if os.geteuid() != 0:
        pytest.skip("only root runs containers with limits everywhere")
    folder = Path(tempfile.mkdtemp(prefix="workpool-container-"))  # a socket's path must be short
    podman = engine(folder)
    try:
        podman.start()
        podman.run("import", "-", IMAGE, stdin=busybox_root(str(shutil.which("busybox"))))
        podman.run("run", "--rm", "--network=none", "--memory=64m", IMAGE, "/bin/true")
        yield podman
        if left := podman.run("ps", "--all", "--quiet").split():
            # The engine may carry out a create request late, after its caller was cancelled.
            podman.run("rm", "--force", *left)
    finally:
        podman.close()
        shutil.rmtree(folder, ignore_errors=True)


WORKER = """
import asyncio, json, sys
from workpool import Settings, Supervisor
from workpool_container import Container

settings, options = json.loads(sys.argv[1])
asyncio.run(Supervisor(Settings(**settings), plugins=[Container(**options)]).run())
"""


class Scene:
    """A control plane, a container engine, a view of the engine, and pools with the plugin.

    Attributes:
        options: The default settings of the plugin; a test may replace them.
        work_id: The id of an item that the control plane does not have.
        forever: A script that prints "ready" and runs until it receives SIGTERM.
    """

    def __init__(
        self, plane: ControlPlane, faults: Faults, podman: Podman, docker: aiodocker.Docker
    ) -> None:
        self.plane = plane
        self.faults = faults
        self.log = Log()
        self.docker = docker
        self.work_id = f"work_{secrets.token_hex(16)}"
        self.forever = FOREVER
        self.recorder = Recorder()
        self.options: dict[str, Any] = {
            "image": IMAGE,
            "socket": podman.socket,
            "sweep_seconds": 1,
        }

    def pool(
        self, script: str, settings: dict[str, Any] | None = None, **options: Any
    ) -> Supervisor:
        """Run a pool whose containers run this script."""
        options = self.options | {"command": ["/bin/sh", "-c", script]} | options
        usual = {
            "reclaim_older_than_ms": 100,
            "stats_interval": 0,
            "pollers": 1,
            "drain_timeout": 0,
        }
        return Supervisor(
            self.settings(**usual | (settings or {})), plugins=[Container(**options), self.recorder]
        )

    def settings(self, **settings: Any) -> Settings:
        return Settings(
            base_url=self.plane.base_url,
            token=self.plane.token,
            environment_id=self.plane.environments[0],
            **settings,
        )

    async def run(
        self, script: str, told: dict[str, str] | None = None, **options: Any
    ) -> SessionFinished:
        """Run one item's session to its end; `told` is the item's metadata."""
        (item,) = self.plane.enqueue(metadata=told or {})
        async with self.pool(script, **options):
            return await self.finished(item.id)

    async def finished(self, work_id: str, count: int = 1) -> SessionFinished:
        return await self.recorder.wait_for(
            SessionFinished,
            lambda event: event.session.item.id == work_id,
            count=count,
            timeout=SECONDS,
        )

    def item(self, work_id: str) -> Item:
        return self.plane.operations.get(self.plane.environments[0], work_id)

    def ask_to_stop(self, work_id: str) -> None:
        """Request a stop, and let the pool notice it by a heartbeat now."""
        self.plane.operations.stop(self.plane.environments[0], work_id, force=False)
        copy = json.dumps(DIALECTS["qoder"].item(self.item(work_id))).encode()
        self.faults.add(literal(copy), "poll", times=1)

    @asynccontextmanager
    async def worker(
        self, script: str, **options: Any
    ) -> AsyncIterator[asyncio.subprocess.Process]:
        """Run a worker in its own process during the block, and kill it at the end."""
        options = self.options | {"command": ["/bin/sh", "-c", script]} | options
        settings = {
            "base_url": self.plane.base_url,
            "token": self.plane.token,
            "environment_id": self.plane.environments[0],
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", WORKER, json.dumps([settings, options])
        )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def containers(self, work_id: str) -> list[Any]:
        """Return the item's containers as the engine lists them."""
        filters = json.dumps({"label": [f"workpool.work_id={work_id}"]})
        return await self.docker.containers.list(all=True, filters=filters)

    async def until(self, wanted: Callable[[], Awaitable[T]]) -> T:
        """Poll the engine until `wanted` returns a true value; the engine reports no events."""
        async with asyncio.timeout(SECONDS):
            while not (found := await wanted()):  # noqa: ASYNC110 - another process brings it about
                await asyncio.sleep(0.05)
        return found

    async def running(self, work_id: str) -> str:
        """Wait until the item has a running container, and return the container's id."""

        async def look() -> str:
            states = {each["State"]: each.id for each in await self.containers(work_id)}
            return states.get("running", "")

        return await self.until(look)

    async def exited(self, container: str) -> None:
        """Wait until this container has ended."""

        async def look() -> bool:
            shown = await self.docker.containers.container(container).show()
            return bool(shown["State"]["Status"] == "exited")

        await self.until(look)

    async def prints(self, text: str) -> None:
        """Wait until a container has printed this line."""
        await self.log.until(lambda: f"stdout: {text}" in self.log.lines)


class Log(logging.Handler):
    """The log of the sessions, for tests that wait for a line."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._changes = Changes()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        self._changes.notify()

    async def until(self, wanted: Callable[[], bool]) -> None:
        await self._changes.until(wanted, lambda: "\n".join(self.lines), SECONDS)


@pytest.fixture
async def docker(podman: Podman, engine: Engine) -> AsyncIterator[aiodocker.Docker]:
    """A second client of the engine; at the end of the test all containers are removed."""
    async with aiodocker.Docker(f"unix://{podman.socket}", api_version="v1.41") as docker:
        yield docker
        for container in await docker.containers.list(all=True):
            await engine.remove(container.id)


@pytest.fixture
async def engine(podman: Podman) -> AsyncIterator[Engine]:
    async with Engine(podman.socket) as engine:
        await engine.greet()
        yield engine


@pytest.fixture
async def scene(
    podman: Podman, docker: aiodocker.Docker, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Scene]:
    for name in os.environ:
        if name.startswith("WORKPOOL_"):
            monkeypatch.delenv(name)
    faults = Faults()
    async with ControlPlane(middlewares=[faults.middleware]) as plane:
        scene = Scene(plane, faults, podman, docker)
        log = logging.getLogger("workpool.session")
        level = log.level
        log.setLevel(logging.INFO)
        log.addHandler(scene.log)
        yield scene
        log.removeHandler(scene.log)
        log.setLevel(level)


@pytest.fixture(autouse=True)
async def nothing_left() -> AsyncIterator[None]:
    """Check that no task outlives a test."""
    before = asyncio.all_tasks()
    yield
    assert not asyncio.all_tasks() - before - {asyncio.current_task()}
