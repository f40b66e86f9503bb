"""`workpool run` under systemd: reports to the service manager, and the unit file."""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.acceptance.conftest import SECONDS
from workpool import Settings
from workpool.pool.lease import RENEW_PART
from workpool.settings import lease_margin

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.acceptance.conftest import Command, Start
    from workpool.server import ControlPlane

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]

UNIT = Path(__file__).parents[2] / "workpool/deploy/systemd/workpool@.service"
WATCHDOG_SECONDS = 0.3
EXPOSURE_TENTHS = 15
"""Largest accepted result of `systemd-analyze security` in tenths; 100 means unrestricted."""
BLOCKING = """
import asyncio, ctypes, gc, subprocess, time
from pathlib import Path
from workpool import handler
from workpool.pool.lease_renewer import LeaseRenewer

@handler(metadata={"do": "hold the interpreter"})
async def hold_the_interpreter(session):
    session.log.info("holds the interpreter")
    ctypes.PyDLL(None).sleep(3600)  # in C, without releasing the lock: no thread runs

@handler(metadata={"do": "block the renewer"})
async def block_the_renewer(session):
    [renewer] = [each for each in gc.get_objects() if isinstance(each, LeaseRenewer)]
    blocked = asyncio.Event()
    loop = asyncio.get_running_loop()
    def block():
        loop.call_soon_threadsafe(blocked.set)
        time.sleep(3600)
    renewer.call(block)
    await blocked.wait()
    session.log.info("the renewer is blocked")
    await asyncio.sleep(3600)

@handler(metadata={"do": "print variables"})
async def print_variables(session):
    Path("variables").write_text(subprocess.run("env", capture_output=True, text=True).stdout)
"""


class Manager:
    """The socket of a service manager and the lines that it has received."""

    def __init__(self, folder: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setblocking(False)  # noqa: FBT003 - the signature of the standard library
        self.address = str(folder / "notify")
        self.socket.bind(self.address)
        self.lines: list[str] = []

    async def receives(self, start: str) -> str:
        """Wait for an unread line that begins with `start`."""
        async with asyncio.timeout(SECONDS):
            while True:
                lines = await self._read()
                for line in lines:
                    if line.startswith(start):
                        return line

    async def is_silent(self, seconds: float) -> bool:
        """Read all lines that have arrived, then return whether none follows for `seconds`."""
        try:
            while True:
                self.lines += self.socket.recv(4096).decode().split("\n")
        except BlockingIOError:
            pass
        try:
            async with asyncio.timeout(seconds):
                await self._read()
        except TimeoutError:
            return True
        return False

    async def _read(self) -> list[str]:
        datagram = await asyncio.get_running_loop().sock_recv(self.socket, 4096)
        lines = datagram.decode().split("\n")
        self.lines += lines
        return lines


@pytest.fixture
async def manager() -> AsyncIterator[Manager]:
    # a short path, because socket paths have at most 108 bytes
    with tempfile.TemporaryDirectory(prefix="workpool-") as folder:
        manager = Manager(Path(folder))
        yield manager
        manager.socket.close()


@pytest.fixture
def supervised(start: Start, folder: Path, manager: Manager) -> Start:
    """Return a function that starts a command as systemd does, with a watchdog."""
    (folder / "blocking.py").write_text(BLOCKING)

    async def begin(*arguments: str, **variables: str) -> Command:
        given = {
            "NOTIFY_SOCKET": manager.address,
            "WATCHDOG_USEC": str(int(WATCHDOG_SECONDS * 1_000_000)),
        }
        return await start(*arguments, **given | variables)

    return begin


async def test_service_manager_receives_ready_then_watchdog_until_the_process_ends(
    supervised: Start, manager: Manager
) -> None:
    command = await supervised("run", "handlers")
    await manager.receives("READY=1")
    assert manager.lines[0] == "READY=1"
    for _ in range(5):
        await manager.receives("WATCHDOG=1")
    assert manager.lines.count("READY=1") == 1
    await manager.receives("STATUS=ready")
    command.send(signal.SIGTERM)
    await manager.receives("STOPPING=1")
    assert await command.ends() == 0
    assert manager.lines.count("STOPPING=1") == 1


async def test_stop_time_is_extended_while_a_drain_waits_for_its_session(
    supervised: Start, manager: Manager, plane: ControlPlane
) -> None:
    plane.enqueue(metadata={"do": "linger"})
    command = await supervised("run", "handlers", "--drain-timeout", "unlimited")
    await command.logs("linger runs")
    command.send(signal.SIGTERM)
    await manager.receives("STOPPING=1")
    for _ in range(3):
        line = await manager.receives("EXTEND_TIMEOUT_USEC=")
        assert int(line.partition("=")[2]) >= 10_000_000
    assert "WATCHDOG=1" in manager.lines
    command.send(signal.SIGTERM)
    assert await command.ends() == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("work", "line"),
    [
        ("hold the interpreter", "holds the interpreter"),
        ("block the renewer", "the renewer is blocked"),
    ],
)
async def test_watchdog_is_silent_once_the_thread_of_the_renewer_is_blocked(
    supervised: Start, manager: Manager, plane: ControlPlane, work: str, line: str
) -> None:
    command = await supervised("run", "blocking")
    await manager.receives("WATCHDOG=1")
    plane.enqueue(metadata={"do": work})
    await command.logs(line)
    assert await manager.is_silent(10 * WATCHDOG_SECONDS)
    await command.kill()


async def test_watchdog_is_fed_while_a_handler_blocks_its_event_loop(
    supervised: Start, manager: Manager, plane: ControlPlane, folder: Path
) -> None:
    """The lease renewer ends such a process after `max_block` and renews its leases until then."""
    plane.enqueue(metadata={"do": "block"})
    command = await supervised("run", "handlers")
    await command.logs("block runs")
    assert not await manager.is_silent(SECONDS)
    for _ in range(10):
        await manager.receives("WATCHDOG=1")
    (folder / "free").touch()
    command.send(signal.SIGTERM)
    assert await command.ends() == 0


async def test_watchdog_of_another_process_is_not_fed(supervised: Start, manager: Manager) -> None:
    command = await supervised("run", "handlers", WATCHDOG_PID="1")
    await manager.receives("STATUS=ready")
    command.send(signal.SIGTERM)
    assert await command.ends() == 0
    assert "READY=1" in manager.lines
    assert "WATCHDOG=1" not in manager.lines


async def test_children_do_not_inherit_the_socket_of_the_service_manager(
    supervised: Start, manager: Manager, plane: ControlPlane, folder: Path
) -> None:
    plane.enqueue(metadata={"do": "print variables"})
    command = await supervised("run", "blocking", "--drain", WATCHDOG_PID="1")
    assert await command.ends() == 0
    await manager.receives("READY=1")
    names = re.findall(r"^\w+(?==)", (folder / "variables").read_text(), re.MULTILINE)
    assert "PATH" in names
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & set(names)


async def test_service_manager_that_has_gone_costs_one_log_line(
    supervised: Start, manager: Manager, plane: ControlPlane
) -> None:
    command = await supervised("run", "handlers")
    await manager.receives("READY=1")
    manager.socket.close()
    await command.logs("service manager was not notified")
    [item] = plane.enqueue(metadata={"do": "finish"})
    await command.logs("finish runs")
    command.send(signal.SIGTERM)
    assert await command.ends() == 0
    assert command.err.count("service manager was not notified") == 1
    assert plane.history.of(item.id)[-1].kind == "stopped"


# The unit file.


@pytest.fixture
def analyze() -> str:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed (Debian: systemd)")
    return program


def run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)  # noqa: S603 - our own words
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_unit_file_has_no_problem_for_systemd(analyze: str, tmp_path: Path) -> None:
    """The unit is verified as an instance, with the command of this environment."""
    unit = tmp_path / UNIT.name
    program = Path(sys.executable).parent / "workpool"
    unit.write_text(UNIT.read_text().replace("/opt/workpool/bin/workpool", str(program)))
    assert run(analyze, "verify", "--man=no", "--recursive-errors=no", str(unit)) == ""
    assert run(analyze, "verify", "--man=no", str(tmp_path / "workpool@reports.service")) == ""


def test_unit_file_leaves_the_process_little_to_misuse(analyze: str) -> None:
    words = ("security", "--offline=true", "--no-pager", f"--threshold={EXPOSURE_TENTHS}")
    assert "Overall exposure level" in run(analyze, *words, str(UNIT))


def setting(name: str) -> str:
    [value] = re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)
    return str(value)


def seconds(name: str) -> int:
    """Return a setting of the unit file in seconds, which are systemd's default unit."""
    return int(setting(name))


def test_unit_file_gives_a_drain_its_time() -> None:
    timeout = Settings().drain_timeout
    assert timeout is not None
    assert seconds("TimeoutStopSec") >= timeout + 30
    # otherwise commands of sessions would get SIGTERM together with the worker
    assert setting("KillMode") == "mixed"


def test_unit_file_accepts_the_reports_of_the_worker() -> None:
    assert (setting("Type"), setting("NotifyAccess")) == ("notify", "main")
    assert seconds("WatchdogSec") >= 10  # ten reports may be late


def test_watchdog_ends_a_frozen_process_before_its_leases_lapse() -> None:
    ttl = Settings().lease_ttl
    left = ttl - ttl / RENEW_PART  # right before the next heartbeat is due
    assert seconds("WatchdogSec") < left - lease_margin(ttl)


def test_unit_file_restarts_the_worker_unless_its_settings_are_wrong() -> None:
    assert setting("Restart") == "always"  # exit limits end a worker with status 0
    assert setting("RestartPreventExitStatus") == "2"
    assert seconds("StartLimitIntervalSec") == 0
