"""Tests that sessions are released on a machine without free memory, threads or descriptors."""

from __future__ import annotations

import errno
import os
import resource
import threading
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from workpool import hookimpl

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from contextlib import AbstractAsyncContextManager

    from workpool.testing import Kit
    from workpool_command import Command

    Shell = Callable[..., Command]


@contextmanager
def file_descriptor_limit(count: int) -> Iterator[None]:
    """Allow this process to open only `count` more descriptors during the `with` block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.dup(0)]
    try:
        highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        for _ in range(count - len(taken)):
            highest += 1
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
            taken.append(os.dup(0))
        for _ in range(count):
            os.close(taken.pop())
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class SessionContextPlugin:
    """A plugin whose hook `workpool_wrap_session` returns the given context manager."""

    def __init__(self, context: AbstractAsyncContextManager[None]) -> None:
        self._context = context

    @hookimpl
    def workpool_wrap_session(self) -> AbstractAsyncContextManager[None]:
        return self._context


@asynccontextmanager
async def async_file_descriptor_limit(left: int) -> AsyncIterator[None]:
    with file_descriptor_limit(left):
        yield


@pytest.mark.parametrize("left", range(13))
async def test_command_session_is_released_if_worker_has_no_free_file_descriptors(
    kit: Kit, shell_command: Shell, left: int
) -> None:
    """Depending on the number of free descriptors, a different step of the session fails.

    The steps are: open the pipes, create the directory, open stdin, spawn the command.
    """
    result = await kit.run_session(
        shell_command("echo ran"), SessionContextPlugin(async_file_descriptor_limit(left))
    )
    # With 1 to 11 free descriptors, the outcome depends on the versions of Python and the kernel.
    outcomes = {0: {"released"}, 12: {"completed"}}
    assert result.outcome in outcomes.get(left, {"released", "completed"}), repr(result.error)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENFILE, "x"),
        OSError(errno.EDQUOT, "x"),
        RuntimeError("can't start new thread"),
    ],
    ids=repr,
)
async def test_command_session_is_released_if_start_hits_resource_limit(
    kit: Kit, shell_command: Shell, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_error(*_: object) -> None:
        raise error

    monkeypatch.setattr("workpool_command.plugin.read_output_into_log", raise_error)
    assert (await kit.run_session(shell_command("echo ran"))).outcome == "released"


async def test_session_completes_although_thread_that_removes_its_directory_cannot_start(
    kit: Kit, shell_command: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse_thread_start(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    @asynccontextmanager
    async def failing_thread_starts() -> AsyncIterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse_thread_start)
            yield

    result = await kit.run_session(
        shell_command("echo ran"), SessionContextPlugin(failing_thread_starts())
    )
    assert result.outcome == "completed", repr(result.error)
