"""A real engine for the tests: Podman, with a store of its own, serving the Docker API.

Where the kernel, the user or the machine forbids it, the tests skip with the reason. With
`TEST_CONTAINER_ENGINE=docker` it is Docker, with a store of its own, too.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import aiodocker
import pytest

from workpool import Settings, Supervisor
from workpool.events import SessionFinished
from workpool.server import ControlPlane
from workpool.server.dialects import DIALECTS
from workpool.testing import Faults, Recorder, literal
from workpool.testing.changes import Changes
from workpool_container import Container
from workpool_container.engine import Engine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from workpool.server import Item

T = TypeVar("T")

IMAGE = "localhost/workpool-test:1"
APPLETS = ("cat", "echo", "env", "grep", "id", "ls", "sh", "sleep", "tail", "touch", "true")
CONFIGURATION = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
cgroup_manager = "cgroupfs"
runtime = "runc"
events_logger = "file"
"""
"""Limits that a root without CAP_SYS_RESOURCE may set; nothing of systemd's."""
SECONDS = 20.0
"""Bounds every wait."""
FOREVER = "trap 'echo asked; exit 9' TERM; echo ready; sleep 1000 & wait"


def busybox_root(program: str) -> bytes:
    """A root file system with one program, as an archive."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for folder, mode in (("bin", 0o755), ("tmp", 0o1777), ("proc", 0o755), ("etc", 0o755)):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, mode
            tar.addfile(entry)
        tar.add(program, "bin/busybox")
        for applet in APPLETS:
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
    return archive.getvalue()


class Podman:
    """A Podman of the tests' own in `folder`, and its service.

    Attributes:
        programs: What it needs of the machine.
        ending: The signal that ends its service, and leaves its containers.
        socket: Where it serves.
        image: An image that it has.
        registry: A port, bound and not served, from which it pulls without TLS.
    """

    programs = ("podman", "runc", "busybox")
    ending = signal.SIGKILL

    def __init__(self, folder: Path) -> None:
        self.socket = str(folder / "engine.sock")
        self.image = IMAGE
        self.registry = socket.create_server(("127.0.0.1", 0))
        self._folder = folder
        self._service: subprocess.Popen[bytes] | None = None
        (folder / "containers.conf").write_text(CONFIGURATION)
        port = self.registry.getsockname()[1]
        (folder / "registries.conf").write_text(
            f'[[registry]]\nlocation = "localhost:{port}"\ninsecure = true\n'
        )
        self._environment = os.environ | {
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "CONTAINERS_REGISTRIES_CONF": str(folder / "registries.conf"),
        }

    def run(self, *arguments: str, stdin: bytes = b"") -> str:
        """Run a command of Podman's; skip the test, saying why, if it fails."""
        done = subprocess.run(  # noqa: S603 - our own words
            [*self._command, *arguments],
            env=self._environment,
            input=stdin,
            capture_output=True,
            timeout=60,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"{self.programs[0]} {arguments[0]}: {done.stderr.decode().strip()[-500:]}")
        return done.stdout.decode().strip()

    def start(self) -> None:
        """Start the service and wait until it answers."""
        with (self._folder / "service.log").open("ab") as log:
            self._service = subprocess.Popen(  # noqa: S603 - our own words
                self._serving, cwd=self._folder, env=self._environment, stdout=log, stderr=log
            )
        until = time.monotonic() + SECONDS
        while not Path(self.socket).is_socket():
            if self._service.poll() is not None or time.monotonic() > until:
                pytest.skip(
                    f"{self.programs[0]}: {(self._folder / 'service.log').read_text()[-500:]}"
                )
            time.sleep(0.02)

    def stop(self) -> None:
        """End the service, by its id; containers run on."""
        if self._service is not None:
            self._service.send_signal(self.ending)
            self._service.wait()
            self._service = None
        Path(self.socket).unlink(missing_ok=True)

    def close(self) -> None:
        """End everything."""
        self.stop()
        self.registry.close()

    @property
    def _command(self) -> list[str]:
        places = [f"--{name}={self._folder / name}" for name in ("root", "runroot", "tmpdir")]
        return ["podman", *places, "--storage-driver=vfs"]

    @property
    def _serving(self) -> list[str]:
        # It ends by itself when nobody asks it anything: a killed test cannot end it.
        return [*self._command, "system", "service", "--time=3600", f"unix://{self.socket}"]


class Docker(Podman):
    """A Docker of the tests' own. Its containers, too, outlive its service."""

    programs = ("docker", "dockerd", "busybox")
    ending = signal.SIGTERM

    def close(self) -> None:
        """End everything; what may outlive the service also leaves its store mounted."""
        super().close()
        subprocess.run(["umount", str(self._folder / "data")], check=False)  # noqa: S603, S607 - our own words

    @property
    def _command(self) -> list[str]:
        return ["docker", "--host", f"unix://{self.socket}"]

    @property
    def _serving(self) -> list[str]:
        places = {"data-root": "data", "exec-root": "exec", "pidfile": "pid"}
        return [
            *("dockerd", "--host", f"unix://{self.socket}", "--live-restore"),
            *(f"--{name}={self._folder / place}" for name, place in places.items()),
            *("--iptables=false", "--ip6tables=false", "--ip-forward=false", "--bridge=none"),
            *("--storage-driver=vfs", "--default-ulimit=nofile=1024:1024"),
        ]


@pytest.fixture(scope="session")
def podman() -> Iterator[Podman]:
    """Podman with an image of busybox, shown to run a container."""
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
            podman.run("rm", "--force", *left)  # a create whose asker was cancelled comes late
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
    """A control plane, an engine and one observer; pools of the plugin between them.

    Attributes:
        options: The plugin's settings, unless a test says otherwise.
        work_id: The id of an item that the control plane does not have.
        forever: A script that says "ready" and runs until it is asked to end.
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
        """A pool whose containers run this script."""
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
        """Run one item's session to its end. `told`: its metadata."""
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
        """Request a stop, and make the pool beat, and so learn of it, at once."""
        self.plane.operations.stop(self.plane.environments[0], work_id, force=False)
        copy = json.dumps(DIALECTS["qoder"].item(self.item(work_id))).encode()
        self.faults.add(literal(copy), "poll", times=1)

    @asynccontextmanager
    async def worker(
        self, script: str, **options: Any
    ) -> AsyncIterator[asyncio.subprocess.Process]:
        """A worker in a process of its own, killed on leaving."""
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
        """The item's containers, as the engine lists them."""
        filters = json.dumps({"label": [f"workpool.work_id={work_id}"]})
        return await self.docker.containers.list(all=True, filters=filters)

    async def until(self, wanted: Callable[[], Awaitable[T]]) -> T:
        """Ask the engine until the answer is true: it tells nobody by itself."""
        async with asyncio.timeout(SECONDS):
            while not (found := await wanted()):  # noqa: ASYNC110 - another process brings it about
                await asyncio.sleep(0.05)
        return found

    async def running(self, work_id: str) -> str:
        """Wait until the item has a container that runs; its id."""

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

    async def says(self, text: str) -> None:
        """Wait until a container's output has this line."""
        await self.log.until(lambda: f"stdout: {text}" in self.log.lines)


class Log(logging.Handler):
    """What sessions log, to wait for."""

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
    """The engine as a bystander sees it; no container is left in it after the test."""
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
    """No task outlives a test."""
    before = asyncio.all_tasks()
    yield
    assert not asyncio.all_tasks() - before - {asyncio.current_task()}
