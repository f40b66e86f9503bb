"""The image of the Containerfile, built with Podman, runs a worker that obeys signals.

The base image is made by debootstrap, unless `TEST_CONTAINER_BASE` names one to pull. The engine
has its own storage. If something is missing, the tests are skipped with the reason.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from workpool.server import ControlPlane

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from workpool.server import Item

pytestmark = [pytest.mark.trial, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
CONTAINERFILE = ROOT / "workpool/deploy/container/Containerfile"
PROGRAMS = ("podman", "runc", "debootstrap", "unshare")
IMAGE_SECONDS = 210.0
"""The limit for base image, wheels and build; the three tests take less than 30 s after that."""
BASE, IMAGE = "localhost/workpool-base:1", "localhost/workpool-trial:1"
CONFIGURATION = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
cgroup_manager = "cgroupfs"
runtime = "runc"
events_logger = "file"
"""
"""Limits that root may set without CAP_SYS_RESOURCE; no use of systemd."""
HANDLERS = """
import asyncio, os, subprocess
from pathlib import Path
from workpool import handler

@handler(metadata={"do": "look"})
async def look(session):
    subprocess.run(["sh", "-c", "sleep 0 & exec true"], check=True)  # an orphan for process 1
    try:
        Path("/opt/workpool/written").touch()
    except OSError as error:
        written = error.strerror
    first = Path("/proc/1/comm").read_text().strip()
    return {"user": str(os.getuid()), "written": written, "first": first}

@handler(metadata={"do": "wait"})
async def wait(session):
    session.log.info("wait runs")
    await session.interrupted()
    return {"done": "when asked"}

@handler(metadata={"do": "linger"})
async def linger(session):
    session.log.info("linger runs")
    await asyncio.sleep(3600)
"""
BLOCKED_IMPORT = """
import os, sys, time

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "handlers" and os.environ.get("BLOCKED"):
            sys.meta_path.remove(self)
            print("importing", name, file=sys.stderr, flush=True)
            while not os.path.exists("/handlers/go"):
                time.sleep(0.05)

sys.meta_path.insert(0, Blocked())
"""


class CommandFailed(Exception):
    """Raised when a program that makes the image fails."""


class TimeBudgetExceeded(CommandFailed):
    """Raised when making the image takes longer than `IMAGE_SECONDS`."""


class TimeBudget:
    """The time limit for the whole build of the image, which runs several programs."""

    def __init__(self) -> None:
        self._until = time.monotonic() + IMAGE_SECONDS

    def run_program(self, *words: str, **given: Any) -> str:
        """Run a program within the time limit, and return its output.

        Raises:
            CommandFailed: The program failed, or the time is over.
        """
        process = subprocess.Popen(  # noqa: S603 - our own words
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            **given,
        )
        try:
            output, _ = process.communicate(timeout=max(0.0, self._until - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise TimeBudgetExceeded(
                f"{words[0]}: the image took more than {IMAGE_SECONDS:.0f} s"
            ) from None
        if process.returncode:
            raise CommandFailed(f"{words[0]}: {str(output).strip()[-1500:]}")
        return str(output).strip()


def unmount_file_systems_below(folder: Path) -> None:
    """Unmount all file systems that a killed container engine has left below a folder."""
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for mount in reversed(mounts):
        if Path(mount).is_relative_to(folder):
            subprocess.run(["umount", "--lazy", mount], check=False)  # noqa: S603, S607 - our own words


class PodmanEngine:
    """A Podman installation with its own storage in `folder`, apart from the machine's Podman."""

    def __init__(self, folder: Path) -> None:
        self.budget = TimeBudget()
        (folder / "containers.conf").write_text(CONFIGURATION)
        self.environment = os.environ | {"CONTAINERS_CONF": str(folder / "containers.conf")}
        places = [f"--{name}={folder / name}" for name in ("root", "runroot", "tmpdir")]
        self.command = ["podman", *places, "--storage-driver=overlay"]

    def run_build_command(self, *arguments: str, cwd: Path | None = None) -> str:
        """Run a Podman command that makes the image.

        Raises:
            CommandFailed: The program failed, or the time is over.
        """
        return self.budget.run_program(*self.command, *arguments, env=self.environment, cwd=cwd)

    def run_command(self, *arguments: str) -> None:
        """Run a Podman command on a container."""
        subprocess.run(  # noqa: S603 - our own words
            [*self.command, *arguments],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            timeout=60,
            check=True,
        )


def make_base_image(engine: PodmanEngine, folder: Path) -> None:
    """Pull the image that `TEST_CONTAINER_BASE` names, or build one from Debian's packages."""
    if name := os.environ.get("TEST_CONTAINER_BASE"):
        engine.run_build_command("pull", name)
        engine.run_build_command("tag", name, BASE)
        return
    packages = "--include=python3,python3-venv,tini,ca-certificates"
    base, archive = str(folder / "base"), str(folder / "base.tar")
    # Run debootstrap in new namespaces, so that it leaves no process or mount when killed.
    apart = ("unshare", "--mount", "--pid", "--fork", "--kill-child")
    engine.budget.run_program(
        *apart, "debootstrap", "--variant=minbase", packages, "bookworm", base
    )
    engine.budget.run_program("tar", "-C", base, "-cf", archive, ".")
    engine.run_build_command("import", archive, BASE)
    engine.run_build_command("run", "--rm", "--network=none", BASE, "python3", "--version")


def build_wheels(engine: PodmanEngine, folder: Path) -> None:
    """Build wheels of this checkout and of all its dependencies."""
    words = ("-m", "pip", "wheel", "--quiet", "--wheel-dir", str(folder / "dist"))
    engine.budget.run_program(sys.executable, *words, f"{ROOT}[cli]", str(ROOT / "plugins/command"))


def build_image(engine: PodmanEngine, folder: Path) -> None:
    engine.run_build_command(
        *("build", "--layers=false", "--network=host", "--isolation=chroot"),
        *("--build-arg", f"BASE={BASE}", "--build-arg", "PIP_NO_INDEX=1"),
        *("--build-arg", "PLUGINS=workpool-command"),
        *("--file", str(CONTAINERFILE), "--tag", IMAGE, "."),
        cwd=folder,
    )


@pytest.fixture(scope="module")
def podman_engine() -> Iterator[PodmanEngine]:
    """Return a Podman engine whose storage contains the worker's image."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if os.geteuid() != 0:
        pytest.skip("only root can make a base image")
    folder = Path(tempfile.mkdtemp(prefix="workpool-image-"))
    engine = PodmanEngine(folder)
    try:
        try:
            with ThreadPoolExecutor() as both:
                for each in [
                    both.submit(make, engine, folder) for make in (make_base_image, build_wheels)
                ]:
                    each.result()
        except CommandFailed as error:
            pytest.skip(f"the base image or the wheels cannot be made here: {error}")
        try:
            build_image(engine, folder)
        except TimeBudgetExceeded as error:
            pytest.skip(str(error))
        yield engine
        engine.run_command("rm", "--all", "--force", "--time=1")
    finally:
        unmount_file_systems_below(folder)
        shutil.rmtree(folder, ignore_errors=True)


class WorkerContainer:
    """A worker that runs in a container of its own."""

    def __init__(
        self, engine: PodmanEngine, name: str, process: asyncio.subprocess.Process
    ) -> None:
        assert process.stderr is not None
        self._engine, self._name, self._process = engine, name, process
        self._stderr = process.stderr
        self.err = ""

    async def wait_for_log(self, text: str) -> None:
        """Wait for a line of the container's log that contains `text`."""
        async with asyncio.timeout(120):
            while text not in self.err:
                line = (await self._stderr.readline()).decode()
                assert line, self.err
                self.err += line

    async def send_signal(self, name: str) -> None:
        await asyncio.to_thread(self._engine.run_command, "kill", f"--signal={name}", self._name)

    async def wait_for_container_end(self) -> int:
        async with asyncio.timeout(120):
            self.err += (await self._stderr.read()).decode()
            status = await self._process.wait()
        sys.stderr.write(self.err)  # If the test fails, pytest shows this log of the worker.
        return status


class WorkerStarter:
    """Starts workers in containers, with the options that the documentation recommends."""

    def __init__(self, engine: PodmanEngine, plane: ControlPlane, folder: Path) -> None:
        self._engine = engine
        self.plane = plane
        self.folder = folder
        (folder / "handlers.py").write_text(HANDLERS)
        (folder / "sitecustomize.py").write_text(BLOCKED_IMPORT)
        (folder / "token").write_text(plane.token)

    async def start_worker(self, *arguments: str, **variables: str) -> WorkerContainer:
        given = {
            "WORKPOOL_BASE_URL": self.plane.base_url,
            "WORKPOOL_ENVIRONMENT_ID": self.plane.environments[0],
            "WORKPOOL_TOKEN_FILE": "/handlers/token",
            "WORKPOOL_METRICS_LISTEN": "127.0.0.1:0",
            "PYTHONPATH": "/handlers",
        }
        name = self.folder.name
        process = await asyncio.create_subprocess_exec(
            *(*self._engine.command, "run", "--rm", f"--name={name}", "--network=host"),
            *("--read-only", "--tmpfs=/tmp", "--cap-drop=all", "--security-opt=no-new-privileges"),
            *(f"--volume={self.folder}:/handlers:ro",),
            *(f"--env={key}={value}" for key, value in (given | variables).items()),
            *(IMAGE, "run", *arguments),
            env=self._engine.environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        return WorkerContainer(self._engine, name, process)

    def list_record_kinds_of_item(self, item: Item) -> list[str]:
        return [record.kind for record in self.plane.history.records_of_item(item.id)]


@pytest.fixture
def shared_directory() -> Iterator[Path]:
    """Return a folder whose files the user inside the container can read."""
    with tempfile.TemporaryDirectory(prefix="workpool-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
async def worker_starter(
    podman_engine: PodmanEngine, shared_directory: Path
) -> AsyncIterator[WorkerStarter]:
    async with ControlPlane() as plane:
        yield WorkerStarter(podman_engine, plane, shared_directory)


async def test_ten_sessions_run_without_privileges_under_an_init_process(
    worker_starter: WorkerStarter,
) -> None:
    items = worker_starter.plane.enqueue(count=10, metadata={"do": "look"})
    worker = await worker_starter.start_worker("handlers", "--drain")
    assert await worker.wait_for_container_end() == 0
    for item in items:
        found = worker_starter.plane.operations.get_item(
            worker_starter.plane.environments[0], item.id
        )
        assert found.state == "stopped"
        assert found.metadata["user"] == "10001"
        assert found.metadata["written"] == "Read-only file system"
        assert found.metadata["first"] == "tini"


async def test_sigterm_during_start_ends_the_container_with_status_0(
    worker_starter: WorkerStarter,
) -> None:
    [item] = worker_starter.plane.enqueue(metadata={"do": "look"})
    worker = await worker_starter.start_worker("handlers", BLOCKED="1")
    await worker.wait_for_log("importing handlers")
    await worker.send_signal("TERM")
    (worker_starter.folder / "go").touch()
    assert await worker.wait_for_container_end() == 0
    assert "drained result=clean" in worker.err
    assert worker_starter.list_record_kinds_of_item(item) == ["created"]


async def test_sigterm_lets_one_session_complete_and_releases_the_endless_session(
    worker_starter: WorkerStarter,
) -> None:
    [waiting] = worker_starter.plane.enqueue(metadata={"do": "wait"})
    [lingering] = worker_starter.plane.enqueue(metadata={"do": "linger"})
    # The timeout is long enough for the first session to complete on a loaded machine.
    worker = await worker_starter.start_worker("handlers", "--drain-timeout", "20")
    await worker.wait_for_log("wait runs")
    await worker.wait_for_log("linger runs")
    await worker.send_signal("TERM")
    assert await worker.wait_for_container_end() == 0
    assert "drained result=deadline" in worker.err
    assert worker_starter.list_record_kinds_of_item(waiting)[-1] == "stopped"
    found = worker_starter.plane.operations.get_item(
        worker_starter.plane.environments[0], lingering.id
    )
    assert "workpool.released" in found.metadata
    assert found.state != "stopped"
