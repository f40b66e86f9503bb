"""A control plane and pools of the plugin on it; and what the machine knows of our processes."""

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


class Shell(Protocol):
    def __call__(self, script: str, *arguments: object, **settings: Any) -> Command: ...


class Machine:
    """What the kernel knows."""

    @staticmethod
    def _status(pid: str) -> list[str]:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return ["gone", "0"]

    def runs(self, pid: int | str) -> bool:
        """A zombie does not run."""
        return self._status(str(pid))[0] not in {"gone", "Z", "X"}

    def children(self) -> set[str]:
        """Our own, zombies included."""
        pids = [path.name for path in Path("/proc").glob("[0-9]*")]
        return {pid for pid in pids if self._status(pid)[1] == str(os.getpid())}

    def descriptors(self) -> list[str]:
        """What ours stand for, sockets aside: a control plane's may close a little later."""
        found = []
        for path in Path("/proc/self/fd").iterdir():
            with suppress(FileNotFoundError):  # the one that lists them
                found.append(str(path.readlink()).partition(":")[0])
        return sorted(kind for kind in found if kind != "socket")

    async def written(self, path: Path, lines: int = 1) -> list[str]:
        """The lines of a file, once it has as many: a command's way to say how far it is."""

        def read() -> list[str]:
            return path.read_text().splitlines() if path.exists() else []

        await until(lambda: len(read()) >= lines)
        return read()

    async def reached(self, condition: Callable[[], bool]) -> None:
        await until(condition)

    async def gone(self, pids: list[str]) -> None:
        await until(lambda: not any(map(self.runs, pids)))


async def until(reached: Callable[[], bool]) -> None:
    """Look again and again: the kernel tells nobody about processes that are not our children."""
    async with asyncio.timeout(25):
        while not reached():  # noqa: ASYNC110 - there is nothing else to wait for
            await asyncio.sleep(0.01)


@pytest.fixture
def shell() -> Shell:
    """A command that is a script; its `$0` is the first argument."""

    def make(script: str, *arguments: object, **settings: Any) -> Command:
        return Command(command=["sh", "-c", script, *map(str, arguments)], **settings)

    return make


@pytest.fixture
def machine() -> Machine:
    uvloop.new_event_loop().close()  # libuv's first loop opens a pipe for the process's lifetime
    return Machine()


@pytest.fixture
def before_the_watch(monkeypatch: pytest.MonkeyPatch) -> BeforeTheWatch:
    """Call a function with the leader's pid between the spawn and the real `pidfd_open`."""
    pidfd_open = os.pidfd_open

    def install(action: Callable[[int], object]) -> None:
        def act_and_open(pid: int, *flags: int) -> int:
            # Not for the guard, which asyncio watches in this way from Python 3.12 on.
            if sys._getframe(1).f_globals["__name__"] == "workpool_command.group":
                action(pid)
            return pidfd_open(pid, *flags)

        monkeypatch.setattr(os, "pidfd_open", act_and_open)

    return install


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
