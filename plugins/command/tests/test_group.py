"""Process groups: an error after the spawn leaves no process, no zombie and no descriptor."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import resource
import signal
import subprocess
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from plugins.command.tests.conftest import WAIT_SECONDS
from workpool_command.process_group import CommandStart, running_group, start_group

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    InstallCallback = Callable[[Callable[[int], object]], None]

NOBODY = 65_534


class RecordingGuard:
    """A fake guard that stores the numbers of the running groups, and can refuse new groups."""

    def __init__(self, refusal: Exception | None = None) -> None:
        self.running: set[int] = set()
        self.announced = ""
        self._refusal = refusal

    def announce_group(self, unique_entry: str) -> None:
        self.announced = unique_entry

    def add_group(self, number: int) -> None:
        if self._refusal is not None:
            raise self._refusal
        self.running.add(number)

    def remove_group(self, number: int) -> None:
        self.running.discard(number)


@pytest.fixture(autouse=True)
def _no_process_or_descriptor_left(process_view: Any) -> Iterator[None]:
    children, descriptors = process_view.child_processes(), process_view.open_descriptors()
    yield
    # Deleting a `Popen` that nobody waited for causes a ResourceWarning, which fails the test.
    gc.collect()
    assert process_view.child_processes() == children
    assert process_view.open_descriptors() == descriptors


@contextmanager
def no_free_descriptor() -> Iterator[None]:
    """Make every call that needs a new descriptor fail with EMFILE during the block."""
    free = os.open("/dev/null", os.O_RDONLY)
    os.close(free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def without_kill_permission() -> Iterator[None]:
    """Run the block as a user without permission to signal this process's children."""
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def shell_script(text: str, *arguments: object) -> CommandStart:
    return CommandStart(
        argv=["sh", "-c", text, *map(str, arguments)],
        cwd=Path("/"),
        env=dict(os.environ),
        stdin=b"",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


async def test_leader_reaped_before_watch_counts_as_exited_with_unknown_status(
    before_watch: InstallCallback, process_view: Any, tmp_path: Path
) -> None:
    before_watch(lambda pid: os.waitpid(pid, 0))
    guard = RecordingGuard()
    start = shell_script("sleep 60 & echo $! >$0", tmp_path / "pids")
    async with running_group(start, guard, lambda: 5.0) as group:
        assert group.exited.is_set()
        assert guard.running == {group.number}

    assert group.status is None
    assert guard.running == set()
    await process_view.wait_for_end(await process_view.wait_for_lines(tmp_path / "pids"))


async def test_group_whose_leader_was_reaped_before_watch_can_continue_to_run(
    before_watch: InstallCallback,
) -> None:
    before_watch(lambda pid: os.waitpid(pid, 0))
    group = start_group(shell_script("exit 3"))
    group.reap_on_exit()

    assert group.exited.is_set()
    assert group.status is None


async def test_start_without_free_descriptor_raises_emfile_and_kills_group(
    before_watch: InstallCallback, process_view: Any, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pids")
    pids: list[str] = []
    with ExitStack() as stack:

        def exhaust_descriptors(_pid: int) -> None:
            # `pids` is a FIFO: the read returns once the script has written both process ids.
            pids.extend((tmp_path / "pids").read_text().split())
            stack.enter_context(no_free_descriptor())

        before_watch(exhaust_descriptors)
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            start_group(shell_script("sleep 60 & echo $$ $! >$0; wait", tmp_path / "pids"))

    assert len(pids) == 2
    await process_view.wait_for_end(pids)


async def test_start_without_free_descriptor_for_reaped_leader_counts_as_exited(
    before_watch: InstallCallback,
) -> None:
    with ExitStack() as stack:

        def reap_and_exhaust(pid: int) -> None:
            os.waitpid(pid, 0)
            stack.enter_context(no_free_descriptor())

        before_watch(reap_and_exhaust)
        group = start_group(shell_script("exit 3"))
    group.reap_on_exit()

    assert group.exited.is_set()
    assert group.status is None


async def test_start_of_command_that_loop_cannot_watch_raises_error_and_closes_pidfd(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def raise_no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(asyncio.get_running_loop(), "add_reader", raise_no_space)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        start_group(shell_script("exec sleep 60"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change its user")
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
async def test_start_without_permission_to_kill_group_raises_first_error(
    before_watch: InstallCallback, caplog: pytest.LogCaptureFixture
) -> None:
    pids: list[int] = []
    with ExitStack() as stack:

        def exhaust_descriptors(pid: int) -> None:
            pids.append(pid)
            stack.enter_context(no_free_descriptor())
            stack.enter_context(without_kill_permission())

        before_watch(exhaust_descriptors)
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)) as caught:
            start_group(shell_script("exec sleep 60"))
    os.kill(pids[0], signal.SIGKILL)
    await asyncio.to_thread(os.waitpid, pids[0], 0)

    # The error keeps the `Popen` alive. Delete it now: the `Popen`'s ResourceWarning needs a free
    # descriptor.
    del caught
    [record] = [each for each in caplog.records if each.message == "command may still run"]
    assert vars(record)["pid"] == pids[0]


async def test_failed_start_of_missing_program_withdraws_group_announcement() -> None:
    guard = RecordingGuard()
    start = replace(shell_script(""), argv=["/no/such/program"], unique_entry="ENTRY=1")
    with pytest.raises(FileNotFoundError):
        async with running_group(start, guard, lambda: 0.0):
            pytest.fail("the block was entered")

    assert guard.announced == ""


async def test_group_that_guard_refuses_is_killed_and_reaped() -> None:
    with pytest.raises(RuntimeError, match="refused"):
        async with running_group(
            shell_script("exec sleep 60"), RecordingGuard(RuntimeError("refused")), lambda: 0.0
        ):
            pytest.fail("the block was entered")


async def test_command_cancelled_again_after_kill_is_reaped_when_leader_exits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guard, entered, removed = RecordingGuard(), asyncio.Event(), asyncio.Event()

    async def run_until_cancelled() -> None:
        async with running_group(shell_script("exec sleep 60"), guard, lambda: 0.0):
            entered.set()
            await asyncio.Event().wait()

    def record_removal(number: int) -> None:
        guard.running.remove(number)
        removed.set()

    monkeypatch.setattr(guard, "remove_group", record_removal)
    task = asyncio.get_running_loop().create_task(run_until_cancelled())
    await entered.wait()
    [number] = guard.running
    killpg = os.killpg

    def cancel_at_kill(_group: int, sent: int) -> None:
        # Send no SIGKILL: the leader survives, like a process that is blocked in the kernel.
        if sent == signal.SIGKILL:
            task.cancel()

    monkeypatch.setattr(os, "killpg", cancel_at_kill)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert guard.running == {number}
    killpg(number, signal.SIGKILL)
    async with asyncio.timeout(WAIT_SECONDS):
        await removed.wait()
