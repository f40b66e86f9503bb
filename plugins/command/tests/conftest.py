"""Fixtures: a control plane, shell commands, and a reader of process states in `/proc`."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest
import uvloop

from workpool.testing import Kit
from workpool_command import Command

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    InstallCallback = Callable[[Callable[[int], object]], None]


WAIT_SECONDS = 50.0
"""The time limit of a wait, which a loaded machine does not exceed."""


class ShellCommand(Protocol):
    """The type of the fixture `shell_command`."""

    def __call__(self, script: str, *arguments: object, **settings: Any) -> Command: ...


class ProcfsReader:
    """Reads the states of processes and descriptors from `/proc`."""

    @staticmethod
    def _read_proc_stat_fields(pid: str) -> list[str]:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return ["gone", "0"]

    def is_process_running(self, pid: int | str) -> bool:
        """Return whether a process exists and is no zombie."""
        return self._read_proc_stat_fields(str(pid))[0] not in {"gone", "Z", "X"}

    def list_child_processes(self) -> set[str]:
        """Return the child processes of this process, zombies included."""
        pids = [path.name for path in Path("/proc").glob("[0-9]*")]
        return {pid for pid in pids if self._read_proc_stat_fields(pid)[1] == str(os.getpid())}

    def list_open_descriptors(self) -> list[str]:
        """Return the targets of this process's descriptors except sockets, which may be closing."""
        targets = []
        for path in Path("/proc/self/fd").iterdir():
            # One of the entries is the descriptor of the listing itself, which is closed by now.
            with suppress(FileNotFoundError):
                targets.append(str(path.readlink()).partition(":")[0])
        return sorted(kind for kind in targets if kind != "socket")

    async def wait_for_file_lines(self, path: Path, lines: int = 1) -> list[str]:
        """Wait until a file has at least this many lines, and return all its lines."""

        def read_lines() -> list[str]:
            return path.read_text().splitlines() if path.exists() else []

        await self.wait_until(lambda: len(read_lines()) >= lines)
        return read_lines()

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Call `condition` repeatedly until it returns true, because `/proc` reports no events."""
        async with asyncio.timeout(WAIT_SECONDS):
            while not condition():  # noqa: ASYNC110 - the kernel reports no event
                await asyncio.sleep(0.01)

    async def wait_for_process_end(self, pids: list[str]) -> None:
        await self.wait_until(lambda: not any(map(self.is_process_running, pids)))


@pytest.fixture
def shell_command() -> ShellCommand:
    """Return a function that makes a `Command` from a shell script and its arguments.

    The first argument is `$0` in the script.
    """

    def make_command(script: str, *arguments: object, **settings: Any) -> Command:
        return Command(command=["sh", "-c", script, *map(str, arguments)], **settings)

    return make_command


@pytest.fixture
def procfs() -> ProcfsReader:
    """Return a reader of `/proc`, for tests that look for leaked processes and descriptors."""
    # The first uvloop loop of a process opens a pipe and never closes it. Create a loop now.
    # Otherwise a test that compares open descriptors would find this pipe as a leak.
    uvloop.new_event_loop().close()
    return ProcfsReader()


@pytest.fixture
def install_spawn_callback(monkeypatch: pytest.MonkeyPatch) -> InstallCallback:
    """Return a function that installs a callback to run after each spawn of a command.

    The callback gets the process id. It runs before the plugin watches the process with
    `pidfd_open`.
    """
    pidfd_open = os.pidfd_open

    def replace_pidfd_open(action: Callable[[int], object]) -> None:
        def run_callback_and_open_pidfd(pid: int, *flags: int) -> int:
            # Since Python 3.12, asyncio also calls `pidfd_open`. Do not run the callback for a
            # process that asyncio watches.
            if sys._getframe(1).f_globals["__name__"] == "workpool_command.process_group":
                action(pid)
            return pidfd_open(pid, *flags)

        monkeypatch.setattr(os, "pidfd_open", run_callback_and_open_pidfd)

    return replace_pidfd_open


@pytest.fixture
async def kit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> AsyncIterator[Kit]:
    """A `workpool.testing.Kit` with long timeouts, without WORKPOOL environment variables."""
    monkeypatch.setattr("workpool.testing.kit.WAIT_SECONDS", WAIT_SECONDS)
    caplog.set_level("INFO", "workpool")
    for name in os.environ:
        if name.startswith("WORKPOOL_"):
            monkeypatch.delenv(name)
    async with Kit() as kit:
        yield kit
