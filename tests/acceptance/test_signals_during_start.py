"""Signals that arrive while a command imports its modules, and hangups of terminals."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

import pytest

from tests.acceptance.conftest import ENVIRONMENT, TOKEN, RunningCommand
from workpool import Settings, WorkClient
from workpool.wire.protocol import NO_HEARTBEAT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from tests.acceptance.conftest import CommandStarter
    from workpool.server import ControlPlane, Item

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]

# Before the import of `MODULE`, the process prints a line and waits until the test writes to a
# fifo. The process checks the fifo every 0.05 s: in a blocking read, it would not handle a signal
# that arrives just before the read.
BLOCKED_IMPORT = """
import os, select, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["MODULE"]:
            sys.meta_path.remove(self)
            print("importing", name, file=sys.stderr, flush=True)
            go = os.open("go", os.O_RDONLY | os.O_NONBLOCK)
            while not select.select([go], [], [], 0.05)[0]:
                pass

sys.meta_path.insert(0, Blocked())
"""


UnblockImport: TypeAlias = "Callable[[], object]"


class BlockedCommandStarter(Protocol):
    async def __call__(self, module: str, *arguments: str, **variables: str) -> RunningCommand: ...


@pytest.fixture
def unblock_import(command_working_directory: Path) -> Iterator[UnblockImport]:
    """Return a function that lets a command with a blocked import continue."""
    os.mkfifo(command_working_directory / "go")
    # O_RDWR avoids a wait: with O_WRONLY, `open` waits until a process opens the fifo for reading.
    fifo = os.open(command_working_directory / "go", os.O_RDWR)
    yield lambda: os.write(fifo, b"go\n")
    os.close(fifo)


@pytest.fixture
def start_command_with_blocked_import(
    start_command: CommandStarter, command_working_directory: Path, unblock_import: object
) -> BlockedCommandStarter:
    """Return a function that starts a command and waits until it is about to import a module."""
    del unblock_import
    site = command_working_directory / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(BLOCKED_IMPORT)

    async def start_process(module: str, *arguments: str, **variables: str) -> RunningCommand:
        blocking = {"PYTHONPATH": str(site), "MODULE": module}
        command = await start_command(*arguments, **blocking, **variables)
        await command.wait_for_log(f"importing {module}")
        return command

    return start_process


def read_history_kinds_of_item(plane: ControlPlane, item: Item) -> list[str]:
    return [record.kind for record in plane.history.records_of_item(item.id)]


ENDING = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


@ENDING
@pytest.mark.parametrize("module", ["typer", "aiohttp", "handlers"])
async def test_run_command_with_signal_during_start_ends_with_0_and_never_polls(
    start_command_with_blocked_import: BlockedCommandStarter,
    control_plane: ControlPlane,
    unblock_import: UnblockImport,
    module: str,
    number: signal.Signals,
) -> None:
    [item] = control_plane.enqueue(metadata={"do": "finish"})
    command = await start_command_with_blocked_import(module, "run", "handlers")
    command.send_signal(number)
    unblock_import()
    assert await command.wait_for_exit() == 0
    assert "drained result=clean" in command.err
    assert read_history_kinds_of_item(control_plane, item) == ["created"]


@ENDING
async def test_serve_command_with_signal_during_start_ends_with_0(
    start_command_with_blocked_import: BlockedCommandStarter,
    unblock_import: UnblockImport,
    number: signal.Signals,
) -> None:
    command = await start_command_with_blocked_import("aiohttp", "serve", "--port", "0")
    command.send_signal(number)
    unblock_import()
    assert await command.wait_for_exit() == 0
    assert f"serve ends signal={signal.Signals(number).name}" in command.err


async def test_demo_command_with_signal_during_start_ends_with_128_plus_signal_number(
    start_command_with_blocked_import: BlockedCommandStarter, unblock_import: UnblockImport
) -> None:
    command = await start_command_with_blocked_import("aiohttp", "demo", "--count", "4")
    command.send_signal(signal.SIGTERM)
    unblock_import()
    assert await command.wait_for_exit() == 128 + signal.SIGTERM
    assert "ended early: 0 of 4 sessions done" in command.out


async def test_hold_command_with_signal_during_start_ends_and_leaves_item_to_parent(
    start_command_with_blocked_import: BlockedCommandStarter,
    control_plane: ControlPlane,
    command_working_directory: Path,
    unblock_import: UnblockImport,
) -> None:
    settings = Settings(base_url=control_plane.base_url, token=TOKEN, environment_id=ENVIRONMENT)
    async with WorkClient(settings) as parent:
        [item] = control_plane.enqueue()
        await parent.poll()
        await parent.ack(item.id)
        heartbeat = await parent.heartbeat(item.id, NO_HEARTBEAT, 60)
    command = await start_command_with_blocked_import(
        *("aiohttp", "hold", "--work-id", item.id),
        *("--last-heartbeat", heartbeat.last_heartbeat, "--", "touch", "ran"),
    )
    command.send_signal(signal.SIGTERM)
    unblock_import()
    assert await command.wait_for_exit() == 0
    assert read_history_kinds_of_item(control_plane, item) == [
        "created",
        "delivered",
        "acked",
        "heartbeat",
    ]
    assert not (command_working_directory / "ran").exists()


@pytest.mark.parametrize("module", ["aiohttp", "handlers"])
async def test_run_command_with_two_signals_during_start_ends_at_once(
    start_command_with_blocked_import: BlockedCommandStarter, module: str
) -> None:
    command = await start_command_with_blocked_import(module, "run", "handlers")
    command.send_signal(signal.SIGTERM)
    command.send_signal(signal.SIGINT)
    # Two pending signals are delivered in either order, so either signal can decide the exit
    # status.
    assert await command.wait_for_exit() in {130, 143}


async def test_sighup_during_start_of_run_is_logged_once_and_ignored(
    start_command_with_blocked_import: BlockedCommandStarter,
    control_plane: ControlPlane,
    unblock_import: UnblockImport,
) -> None:
    [item] = control_plane.enqueue(metadata={"do": "finish"})
    command = await start_command_with_blocked_import("aiohttp", "run", "handlers", "--drain")
    command.send_signal(signal.SIGHUP)
    unblock_import()
    assert await command.wait_for_exit() == 0
    assert command.err.count("signal has no effect signal=SIGHUP") == 1
    assert read_history_kinds_of_item(control_plane, item)[-1] == "stopped"


async def test_run_command_with_sigusr1_during_start_begins_in_paused_state(
    start_command_with_blocked_import: BlockedCommandStarter,
    control_plane: ControlPlane,
    unblock_import: UnblockImport,
) -> None:
    [item] = control_plane.enqueue(metadata={"do": "finish"})
    command = await start_command_with_blocked_import("aiohttp", "run", "handlers", "--drain")
    command.send_signal(signal.SIGUSR1)
    unblock_import()
    await command.wait_for_log("paused reason=SIGUSR1")
    await command.wait_for_log("pool started")
    assert read_history_kinds_of_item(control_plane, item) == ["created"]
    command.send_signal(signal.SIGUSR2)
    assert await command.wait_for_exit() == 0
    assert read_history_kinds_of_item(control_plane, item)[-1] == "stopped"


@pytest.mark.parametrize("arguments", [("check",), ("work", "list"), ("-v", "check")])
async def test_ctrl_c_during_start_ends_command_that_runs_no_pool(
    start_command_with_blocked_import: BlockedCommandStarter, arguments: tuple[str, ...]
) -> None:
    command = await start_command_with_blocked_import("aiohttp", *arguments)
    command.send_signal(signal.SIGINT)
    assert await command.wait_for_exit() in {-signal.SIGINT, 130}


NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


@pytest.fixture
def pid_namespace_for_each_command(
    command_working_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run each command as process 1 of a PID namespace of its own."""
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed")
    if subprocess.run([*NAMESPACE, "true"], check=False, capture_output=True).returncode:  # noqa: S603 - our own words
        pytest.skip("unshare has no permission to make a process namespace")
    interpreter = command_working_directory / "python"
    interpreter.write_text(f'#!/bin/sh\nexec {" ".join(NAMESPACE)} {sys.executable} "$@"\n')
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))


def read_pid_of_only_child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())


@pytest.mark.usefixtures("pid_namespace_for_each_command")
async def test_run_command_as_process_1_ends_if_sigterm_arrives_during_start(
    start_command_with_blocked_import: BlockedCommandStarter,
    control_plane: ControlPlane,
    unblock_import: UnblockImport,
) -> None:
    """The kernel drops a signal for which process 1 of a PID namespace has no handler."""
    [item] = control_plane.enqueue(metadata={"do": "finish"})
    command = await start_command_with_blocked_import("aiohttp", "run", "handlers")
    os.kill(read_pid_of_only_child(command.pid), signal.SIGTERM)
    unblock_import()
    assert await command.wait_for_exit() == 0
    assert read_history_kinds_of_item(control_plane, item) == ["created"]


async def test_sighup_to_running_pool_without_terminal_is_logged_and_ignored(
    start_command: CommandStarter, control_plane: ControlPlane
) -> None:
    control_plane.enqueue(metadata={"do": "wait"})
    command = await start_command("run", "handlers")
    await command.wait_for_log("wait runs")
    command.send_signal(signal.SIGHUP)
    line = await command.wait_for_log("signal has no effect")
    assert "signal=SIGHUP" in line
    command.send_signal(signal.SIGTERM)
    assert await command.wait_for_exit() == 0
    assert "drained result=clean" in command.err


class TerminalCommandStarter(Protocol):
    async def __call__(self, *command: str) -> tuple[RunningCommand, int]: ...


@pytest.fixture
async def start_command_on_terminal(
    control_plane: ControlPlane, command_working_directory: Path
) -> AsyncIterator[TerminalCommandStarter]:
    """Return a function that starts a command on a new terminal, and returns this terminal.

    Closing the terminal sends a hangup (SIGHUP) to the command.
    """
    commands: list[RunningCommand] = []

    async def start_process(*words: str) -> tuple[RunningCommand, int]:
        master, terminal = os.openpty()
        process = await asyncio.create_subprocess_exec(
            *("setsid", "--ctty", *words),
            env={
                **os.environ,
                "WORKPOOL_BASE_URL": control_plane.base_url,
                "WORKPOOL_ENVIRONMENT_ID": ENVIRONMENT,
                "WORKPOOL_TOKEN": TOKEN,
                "WORKPOOL_METRICS_LISTEN": "off",
            },
            cwd=command_working_directory,
            stdin=terminal,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        os.close(terminal)
        commands.append(RunningCommand(process))
        return commands[-1], master

    if shutil.which("setsid") is None:
        pytest.skip("setsid is not installed")
    yield start_process
    for command in commands:
        await command.kill()


WORKPOOL = (sys.executable, "-m", "workpool")


async def test_pool_drains_when_its_terminal_closes(
    start_command_on_terminal: TerminalCommandStarter, control_plane: ControlPlane
) -> None:
    [item] = control_plane.enqueue(metadata={"do": "wait"})
    command, terminal = await start_command_on_terminal(*WORKPOOL, "run", "handlers")
    await command.wait_for_log("wait runs")
    os.close(terminal)
    assert await command.wait_for_exit() == 0
    assert "drained result=clean" in command.err
    assert read_history_kinds_of_item(control_plane, item)[-1] == "stopped"


async def test_pool_drains_when_terminal_of_its_parent_shell_closes(
    start_command_on_terminal: TerminalCommandStarter, control_plane: ControlPlane
) -> None:
    [item] = control_plane.enqueue(metadata={"do": "wait"})
    # `; true` keeps bash as the parent process. Without it, bash would replace itself with
    # `workpool`.
    script = f"{' '.join(WORKPOOL)} run handlers; true"
    command, terminal = await start_command_on_terminal("bash", "-i", "-c", script)
    await command.wait_for_log("wait runs")
    os.close(terminal)
    await command.wait_for_log("drained result=clean")
    assert await command.wait_for_exit() == -signal.SIGHUP, "the exit status is that of the shell"
    assert read_history_kinds_of_item(control_plane, item)[-1] == "stopped"


async def test_serve_command_ends_when_its_terminal_closes(
    start_command_on_terminal: TerminalCommandStarter,
) -> None:
    command, terminal = await start_command_on_terminal(*WORKPOOL, "serve", "--port", "0")
    await command.wait_for_output("ready")
    os.close(terminal)
    assert await command.wait_for_exit() == 0


async def test_sighup_to_running_pool_with_open_terminal_is_logged_and_ignored(
    start_command_on_terminal: TerminalCommandStarter, control_plane: ControlPlane
) -> None:
    control_plane.enqueue(metadata={"do": "wait"})
    command, terminal = await start_command_on_terminal(*WORKPOOL, "run", "handlers")
    await command.wait_for_log("wait runs")
    command.send_signal(signal.SIGHUP)
    await command.wait_for_log("signal has no effect signal=SIGHUP")
    command.send_signal(signal.SIGTERM)
    assert await command.wait_for_exit() == 0
    os.close(terminal)


async def test_running_pool_under_nohup_continues_after_terminal_closes(
    start_command_on_terminal: TerminalCommandStarter, control_plane: ControlPlane
) -> None:
    control_plane.enqueue(metadata={"do": "wait"})
    command, terminal = await start_command_on_terminal("nohup", *WORKPOOL, "run", "handlers")
    await command.wait_for_log("wait runs")
    os.close(terminal)
    [item] = control_plane.enqueue(metadata={"do": "finish"})
    await command.wait_for_log("finish runs")
    command.send_signal(signal.SIGTERM)
    assert await command.wait_for_exit() == 0
    assert read_history_kinds_of_item(control_plane, item)[-1] == "stopped"
