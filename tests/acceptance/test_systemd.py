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

    from tests.acceptance.conftest import CommandStarter, RunningCommand
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
    renewer.call_on_renewer_loop(block)
    await blocked.wait()
    session.log.info("the renewer is blocked")
    await asyncio.sleep(3600)

@handler(metadata={"do": "print variables"})
async def print_variables(session):
    Path("variables").write_text(subprocess.run("env", capture_output=True, text=True).stdout)
"""


class ServiceManagerSocket:
    """A replacement for systemd: a datagram socket, and the lines that arrived at the socket."""

    def __init__(self, folder: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setblocking(False)  # noqa: FBT003 - the signature of the standard library
        self.address = str(folder / "notify")
        self.socket.bind(self.address)
        self.lines: list[str] = []

    async def wait_for_line(self, start: str) -> str:
        """Wait for an unread line that begins with `start`."""
        async with asyncio.timeout(SECONDS):
            while True:
                lines = await self._receive_lines()
                for line in lines:
                    if line.startswith(start):
                        return line

    async def receives_no_line_within(self, seconds: float) -> bool:
        """Read all waiting lines, then return whether no other line arrives within `seconds`."""
        try:
            while True:
                self.lines += self.socket.recv(4096).decode().split("\n")
        except BlockingIOError:
            pass
        try:
            async with asyncio.timeout(seconds):
                await self._receive_lines()
        except TimeoutError:
            return True
        return False

    async def _receive_lines(self) -> list[str]:
        datagram = await asyncio.get_running_loop().sock_recv(self.socket, 4096)
        lines = datagram.decode().split("\n")
        self.lines += lines
        return lines


@pytest.fixture
async def service_manager() -> AsyncIterator[ServiceManagerSocket]:
    # The path of a socket has at most 108 bytes, and a path in `tmp_path` may be longer.
    with tempfile.TemporaryDirectory(prefix="workpool-") as folder:
        manager = ServiceManagerSocket(Path(folder))
        yield manager
        manager.socket.close()


@pytest.fixture
def start_command_under_systemd(
    start_command: CommandStarter,
    command_working_directory: Path,
    service_manager: ServiceManagerSocket,
) -> CommandStarter:
    """Return a function that starts a command with the variables that systemd sets.

    The command reports to `service_manager`, and has a watchdog.
    """
    (command_working_directory / "blocking.py").write_text(BLOCKING)

    async def start_process(*arguments: str, **variables: str) -> RunningCommand:
        given = {
            "NOTIFY_SOCKET": service_manager.address,
            "WATCHDOG_USEC": str(int(WATCHDOG_SECONDS * 1_000_000)),
        }
        return await start_command(*arguments, **given | variables)

    return start_process


async def test_systemd_receives_ready_then_watchdog_messages_until_process_ends(
    start_command_under_systemd: CommandStarter, service_manager: ServiceManagerSocket
) -> None:
    command = await start_command_under_systemd("run", "handlers")
    await service_manager.wait_for_line("READY=1")
    assert service_manager.lines[0] == "READY=1"
    for _ in range(5):
        await service_manager.wait_for_line("WATCHDOG=1")
    assert service_manager.lines.count("READY=1") == 1
    await service_manager.wait_for_line("STATUS=ready")
    command.send_signal(signal.SIGTERM)
    await service_manager.wait_for_line("STOPPING=1")
    assert await command.wait_for_exit() == 0
    assert service_manager.lines.count("STOPPING=1") == 1


async def test_stop_time_is_extended_while_a_drain_waits_for_its_session(
    start_command_under_systemd: CommandStarter,
    service_manager: ServiceManagerSocket,
    control_plane: ControlPlane,
) -> None:
    control_plane.enqueue(metadata={"do": "linger"})
    command = await start_command_under_systemd("run", "handlers", "--drain-timeout", "unlimited")
    await command.wait_for_log("linger runs")
    command.send_signal(signal.SIGTERM)
    await service_manager.wait_for_line("STOPPING=1")
    for _ in range(3):
        line = await service_manager.wait_for_line("EXTEND_TIMEOUT_USEC=")
        assert int(line.partition("=")[2]) >= 10_000_000
    assert "WATCHDOG=1" in service_manager.lines
    command.send_signal(signal.SIGTERM)
    assert await command.wait_for_exit() == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("work", "line"),
    [
        ("hold the interpreter", "holds the interpreter"),
        ("block the renewer", "the renewer is blocked"),
    ],
)
async def test_watchdog_messages_stop_while_renewer_thread_is_blocked(
    start_command_under_systemd: CommandStarter,
    service_manager: ServiceManagerSocket,
    control_plane: ControlPlane,
    work: str,
    line: str,
) -> None:
    command = await start_command_under_systemd("run", "blocking")
    await service_manager.wait_for_line("WATCHDOG=1")
    control_plane.enqueue(metadata={"do": work})
    await command.wait_for_log(line)
    # The handler logs its line before it holds the interpreter. The renewer thread may still send
    # messages between the two.
    async with asyncio.timeout(SECONDS):
        while not await service_manager.receives_no_line_within(10 * WATCHDOG_SECONDS):
            pass
    await command.kill()


async def test_watchdog_messages_continue_while_handler_blocks_event_loop(
    start_command_under_systemd: CommandStarter,
    service_manager: ServiceManagerSocket,
    control_plane: ControlPlane,
    command_working_directory: Path,
) -> None:
    """The watchdog must not end a worker with a blocked loop, which still renews its leases.

    The setting `max_block` limits the time of the block.
    """
    control_plane.enqueue(metadata={"do": "block"})
    command = await start_command_under_systemd("run", "handlers")
    await command.wait_for_log("block runs")
    assert not await service_manager.receives_no_line_within(SECONDS)
    for _ in range(10):
        await service_manager.wait_for_line("WATCHDOG=1")
    (command_working_directory / "free").touch()
    command.send_signal(signal.SIGTERM)
    assert await command.wait_for_exit() == 0


async def test_worker_sends_no_watchdog_message_if_watchdog_pid_is_of_another_process(
    start_command_under_systemd: CommandStarter, service_manager: ServiceManagerSocket
) -> None:
    command = await start_command_under_systemd("run", "handlers", WATCHDOG_PID="1")
    await service_manager.wait_for_line("STATUS=ready")
    command.send_signal(signal.SIGTERM)
    assert await command.wait_for_exit() == 0
    assert "READY=1" in service_manager.lines
    assert "WATCHDOG=1" not in service_manager.lines


async def test_children_do_not_inherit_the_socket_of_the_service_manager(
    start_command_under_systemd: CommandStarter,
    service_manager: ServiceManagerSocket,
    control_plane: ControlPlane,
    command_working_directory: Path,
) -> None:
    control_plane.enqueue(metadata={"do": "print variables"})
    command = await start_command_under_systemd("run", "blocking", "--drain", WATCHDOG_PID="1")
    assert await command.wait_for_exit() == 0
    await service_manager.wait_for_line("READY=1")
    names = re.findall(
        r"^\w+(?==)", (command_working_directory / "variables").read_text(), re.MULTILINE
    )
    assert "PATH" in names
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & set(names)


async def test_failed_message_to_service_manager_is_logged_only_once(
    start_command_under_systemd: CommandStarter,
    service_manager: ServiceManagerSocket,
    control_plane: ControlPlane,
) -> None:
    command = await start_command_under_systemd("run", "handlers")
    await service_manager.wait_for_line("READY=1")
    service_manager.socket.close()
    await command.wait_for_log("service manager was not notified")
    [item] = control_plane.enqueue(metadata={"do": "finish"})
    await command.wait_for_log("finish runs")
    command.send_signal(signal.SIGTERM)
    assert await command.wait_for_exit() == 0
    assert command.err.count("service manager was not notified") == 1
    assert control_plane.history.records_of_item(item.id)[-1].kind == "stopped"


@pytest.fixture
def systemd_analyze_program() -> str:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed (Debian: systemd)")
    return program


def run_command(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)  # noqa: S603 - our own words
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_unit_file_passes_systemd_analyze_verify_without_message(
    systemd_analyze_program: str, tmp_path: Path
) -> None:
    """The template unit is verified as an instance, with `workpool` of this virtual environment."""
    unit = tmp_path / UNIT.name
    program = Path(sys.executable).parent / "workpool"
    unit.write_text(UNIT.read_text().replace("/opt/workpool/bin/workpool", str(program)))
    assert (
        run_command(
            systemd_analyze_program, "verify", "--man=no", "--recursive-errors=no", str(unit)
        )
        == ""
    )
    assert (
        run_command(
            systemd_analyze_program,
            "verify",
            "--man=no",
            str(tmp_path / "workpool@reports.service"),
        )
        == ""
    )


def test_unit_file_passes_exposure_threshold_of_systemd_analyze_security(
    systemd_analyze_program: str,
) -> None:
    words = ("security", "--offline=true", "--no-pager", f"--threshold={EXPOSURE_TENTHS}")
    assert "Overall exposure level" in run_command(systemd_analyze_program, *words, str(UNIT))


def read_setting_of_unit_file(name: str) -> str:
    [value] = re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)
    return str(value)


def read_unit_file_setting_in_seconds(name: str) -> int:
    """Return the value of a setting in the unit file, as a number of seconds."""
    return int(read_setting_of_unit_file(name))


def test_unit_file_stops_only_main_process_and_allows_drain_timeout() -> None:
    timeout = Settings().drain_timeout
    assert timeout is not None
    assert read_unit_file_setting_in_seconds("TimeoutStopSec") >= timeout + 30
    # With the default `KillMode=control-group`, systemd would also send SIGTERM to the child
    # processes of running sessions.
    assert read_setting_of_unit_file("KillMode") == "mixed"


def test_unit_file_accepts_notifications_only_of_main_process() -> None:
    assert (read_setting_of_unit_file("Type"), read_setting_of_unit_file("NotifyAccess")) == (
        "notify",
        "main",
    )
    assert read_unit_file_setting_in_seconds("WatchdogSec") >= 10, (
        "reports are sent every second and may be late"
    )


def test_watchdog_timeout_is_shorter_than_time_left_when_heartbeat_becomes_due() -> None:
    ttl = Settings().lease_ttl
    # The seconds from the time at which a heartbeat is due until the lease ends.
    left = ttl - ttl / RENEW_PART
    assert read_unit_file_setting_in_seconds("WatchdogSec") < left - lease_margin(ttl)


def test_unit_file_always_restarts_worker_except_after_wrong_settings() -> None:
    # A worker that an exit limit has ended has the status 0. With `Restart=on-failure`, systemd
    # would not restart this worker.
    assert read_setting_of_unit_file("Restart") == "always"
    assert read_setting_of_unit_file("RestartPreventExitStatus") == "2"
    assert read_unit_file_setting_in_seconds("StartLimitIntervalSec") == 0
