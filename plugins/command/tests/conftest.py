"""Fixtures: a control plane, pools with the plugin, and a view of this process's children."""

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

    BeforeTheWatch = Callable[[Callable[[int], object]], None]


class ShellCommand(Protocol):
    def __call__(self, script: str, *arguments: object, **settings: Any) -> Command: ...


class ProcessView:
    """A view of processes and descriptors in `/proc`."""

    @staticmethod
    def _status_fields(pid: str) -> list[str]:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return ["gone", "0"]

    def is_running(self, pid: int | str) -> bool:
        """Return whether a process runs; a zombie does not."""
        return self._status_fields(str(pid))[0] not in {"gone", "Z", "X"}

    def child_processes(self) -> set[str]:
        """Return the child processes of this process, zombies included."""
        pids = [path.name for path in Path("/proc").glob("[0-9]*")]
        return {pid for pid in pids if self._status_fields(pid)[1] == str(os.getpid())}

    def open_descriptors(self) -> list[str]:
        """Return the targets of this process's descriptors, except sockets, which close late."""
        found = []
        for path in Path("/proc/self/fd").iterdir():
            with suppress(FileNotFoundError):  # the descriptor that lists the directory is closed
                found.append(str(path.readlink()).partition(":")[0])
        return sorted(kind for kind in found if kind != "socket")

    async def wait_for_lines(self, path: Path, lines: int = 1) -> list[str]:
        """Wait until a file has this many lines and return them; commands report progress so."""

        def read_lines() -> list[str]:
            return path.read_text().splitlines() if path.exists() else []

        await wait_until(lambda: len(read_lines()) >= lines)
        return read_lines()

    async def wait_for_file(self, condition: Callable[[], bool]) -> None:
        await wait_until(condition)

    async def wait_for_end(self, pids: list[str]) -> None:
        await wait_until(lambda: not any(map(self.is_running, pids)))


async def wait_until(reached: Callable[[], bool]) -> None:
    """Poll a condition, because the kernel reports nothing about processes of other parents."""
    async with asyncio.timeout(25):
        while not reached():  # noqa: ASYNC110 - there is nothing else to wait for
            await asyncio.sleep(0.01)


@pytest.fixture
def shell_command() -> ShellCommand:
    """Return a function that makes a command from a script, whose `$0` is the first argument."""

    def make(script: str, *arguments: object, **settings: Any) -> Command:
        return Command(command=["sh", "-c", script, *map(str, arguments)], **settings)

    return make


@pytest.fixture
def process_view() -> ProcessView:
    # The first loop of libuv opens a pipe that stays open until the process ends.
    uvloop.new_event_loop().close()
    return ProcessView()


@pytest.fixture
def before_watch(monkeypatch: pytest.MonkeyPatch) -> BeforeTheWatch:
    """Return a function that sets a callback to run between the spawn and the real `pidfd_open`."""
    pidfd_open = os.pidfd_open

    def install_callback(action: Callable[[int], object]) -> None:
        def call_and_open(pid: int, *flags: int) -> int:
            # Not for the guard's process, which asyncio watches in this way from Python 3.12 on.
            if sys._getframe(1).f_globals["__name__"] == "workpool_command.group":
                action(pid)
            return pidfd_open(pid, *flags)

        monkeypatch.setattr(os, "pidfd_open", call_and_open)

    return install_callback


@pytest.fixture
async def kit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> AsyncIterator[Kit]:
    caplog.set_level("INFO", "workpool")
    for name in os.environ:
        if name.startswith("WORKPOOL_"):
            monkeypatch.delenv(name)
    async with Kit() as kit:
        yield kit
