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


class ProcessView:
    """Reads the states of processes and descriptors from `/proc`."""

    @staticmethod
    def _status_fields(pid: str) -> list[str]:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return ["gone", "0"]

    def is_running(self, pid: int | str) -> bool:
        """Return whether a process exists and is no zombie."""
        return self._status_fields(str(pid))[0] not in {"gone", "Z", "X"}

    def child_processes(self) -> set[str]:
        """Return the child processes of this process, zombies included."""
        pids = [path.name for path in Path("/proc").glob("[0-9]*")]
        return {pid for pid in pids if self._status_fields(pid)[1] == str(os.getpid())}

    def open_descriptors(self) -> list[str]:
        """Return the targets of open descriptors, without sockets, which may still be closing."""
        targets = []
        for path in Path("/proc/self/fd").iterdir():
            # The descriptor that lists the directory is closed before its link is read.
            with suppress(FileNotFoundError):
                targets.append(str(path.readlink()).partition(":")[0])
        return sorted(kind for kind in targets if kind != "socket")

    async def wait_for_lines(self, path: Path, lines: int = 1) -> list[str]:
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

    async def wait_for_end(self, pids: list[str]) -> None:
        await self.wait_until(lambda: not any(map(self.is_running, pids)))


@pytest.fixture
def shell_command() -> ShellCommand:
    """Return a function that creates a command from a script and its arguments, `$0` first."""

    def make_command(script: str, *arguments: object, **settings: Any) -> Command:
        return Command(command=["sh", "-c", script, *map(str, arguments)], **settings)

    return make_command


@pytest.fixture
def process_view() -> ProcessView:
    """A reader of the processes and descriptors in `/proc`."""
    # The first uvloop loop of a process opens a pipe that is never closed. Open this pipe now, or a
    # test that compares descriptors would find one more at its end.
    uvloop.new_event_loop().close()
    return ProcessView()


@pytest.fixture
def before_watch(monkeypatch: pytest.MonkeyPatch) -> InstallCallback:
    """Return a function that sets a callback, which runs after the spawn, before `pidfd_open`."""
    pidfd_open = os.pidfd_open

    def install_callback(action: Callable[[int], object]) -> None:
        def call_back_and_open(pid: int, *flags: int) -> int:
            # Ignore calls of asyncio, which also opens a pidfd for the guard since Python 3.12.
            if sys._getframe(1).f_globals["__name__"] == "workpool_command.process_group":
                action(pid)
            return pidfd_open(pid, *flags)

        monkeypatch.setattr(os, "pidfd_open", call_back_and_open)

    return install_callback


@pytest.fixture
async def kit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> AsyncIterator[Kit]:
    """A control plane and pools, with long timeouts and without WORKPOOL variables."""
    monkeypatch.setattr("workpool.testing.kit.WAIT_SECONDS", WAIT_SECONDS)
    caplog.set_level("INFO", "workpool")
    for name in os.environ:
        if name.startswith("WORKPOOL_"):
            monkeypatch.delenv(name)
    async with Kit() as kit:
        yield kit
