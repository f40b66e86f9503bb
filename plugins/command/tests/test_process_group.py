"""Tests of `process_group`: an error after the spawn leaves no process, zombie or descriptor."""

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
from workpool_command.process_group import CommandArguments, running_process_group, start_group

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    InstallCallback = Callable[[Callable[[int], object]], None]

NOBODY = 65_534


class RecordingGroupRegistry:
    """A fake `ProcessGroupRegistry` that records process group ids and can refuse new groups."""

    def __init__(self, refusal: Exception | None = None) -> None:
        self.running: set[int] = set()
        self.announced = ""
        self._refusal = refusal

    def announce_group(self, unique_entry: str) -> None:
        self.announced = unique_entry

    def register_process_group(self, number: int) -> None:
        if self._refusal is not None:
            raise self._refusal
        self.running.add(number)

    def unregister_process_group(self, number: int) -> None:
        self.running.discard(number)


@pytest.fixture(autouse=True)
def _check_for_leaked_processes_and_descriptors(procfs: Any) -> Iterator[None]:
    # Delete the garbage of earlier tests now. If it were deleted later, the processes and
    # descriptors would differ although the test leaks nothing.
    gc.collect()
    children, descriptors = (
        procfs.list_child_processes(),
        procfs.list_open_descriptors(),
    )
    yield
    # Delete unreachable `Popen` objects now. A `Popen` object whose process was not reaped then
    # causes a ResourceWarning, which fails the test.
    gc.collect()
    assert procfs.list_child_processes() == children
    assert procfs.list_open_descriptors() == descriptors


@contextmanager
def file_descriptor_exhaustion() -> Iterator[None]:
    """Make every call that needs a new descriptor fail with EMFILE during the `with` block."""
    free = os.open("/dev/null", os.O_RDONLY)
    os.close(free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def user_without_kill_permission() -> Iterator[None]:
    """Run the `with` block as a user who may not send signals to this process's children."""
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def sh_arguments(text: str, *arguments: object) -> CommandArguments:
    return CommandArguments(
        argv=["sh", "-c", text, *map(str, arguments)],
        cwd=Path("/"),
        env=dict(os.environ),
        stdin=b"",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


async def test_exit_status_of_group_leader_is_unknown_if_code_outside_plugin_reaped_it(
    install_spawn_callback: InstallCallback, procfs: Any, tmp_path: Path
) -> None:
    install_spawn_callback(lambda pid: os.waitpid(pid, 0))
    guard = RecordingGroupRegistry()
    start = sh_arguments("sleep 60 & echo $! >$0", tmp_path / "pids")
    async with running_process_group(start, guard, lambda: 5.0) as group:
        assert group.exited.is_set()
        assert guard.running == {group.number}

    assert group.status is None
    assert guard.running == set()
    await procfs.wait_for_process_end(await procfs.wait_for_file_lines(tmp_path / "pids"))


async def test_watch_of_leader_that_was_reaped_elsewhere_ends_with_unknown_status(
    install_spawn_callback: InstallCallback,
) -> None:
    install_spawn_callback(lambda pid: os.waitpid(pid, 0))
    group = start_group(sh_arguments("exit 3"))
    group.reap_leader_on_exit()

    assert group.exited.is_set()
    assert group.status is None


async def test_process_group_start_without_free_descriptor_raises_emfile_and_kills_group(
    install_spawn_callback: InstallCallback, procfs: Any, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pids")
    pids: list[str] = []
    with ExitStack() as stack:

        def exhaust_descriptors(_pid: int) -> None:
            # `pids` is a FIFO: the read returns once the script has written both process ids.
            pids.extend((tmp_path / "pids").read_text().split())
            stack.enter_context(file_descriptor_exhaustion())

        install_spawn_callback(exhaust_descriptors)
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            start_group(sh_arguments("sleep 60 & echo $$ $! >$0; wait", tmp_path / "pids"))

    assert len(pids) == 2
    await procfs.wait_for_process_end(pids)


async def test_watch_of_leader_that_was_reaped_elsewhere_ends_although_descriptors_ran_out(
    install_spawn_callback: InstallCallback,
) -> None:
    with ExitStack() as stack:

        def reap_leader_and_exhaust_descriptors(pid: int) -> None:
            os.waitpid(pid, 0)
            stack.enter_context(file_descriptor_exhaustion())

        install_spawn_callback(reap_leader_and_exhaust_descriptors)
        group = start_group(sh_arguments("exit 3"))
    group.reap_leader_on_exit()

    assert group.exited.is_set()
    assert group.status is None


async def test_process_group_start_closes_pidfd_if_event_loop_cannot_watch_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def raise_enospc(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(asyncio.get_running_loop(), "add_reader", raise_enospc)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        start_group(sh_arguments("exec sleep 60"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change its user")
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
async def test_process_group_start_raises_start_error_even_if_kill_is_forbidden(
    install_spawn_callback: InstallCallback, caplog: pytest.LogCaptureFixture
) -> None:
    pids: list[int] = []
    with ExitStack() as stack:

        def exhaust_descriptors(pid: int) -> None:
            pids.append(pid)
            stack.enter_context(file_descriptor_exhaustion())
            stack.enter_context(user_without_kill_permission())

        install_spawn_callback(exhaust_descriptors)
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)) as caught:
            start_group(sh_arguments("exec sleep 60"))
    os.kill(pids[0], signal.SIGKILL)
    await asyncio.to_thread(os.waitpid, pids[0], 0)

    # `caught` holds the error, which keeps the `Popen` of the child process alive. Delete `caught`
    # now, when descriptors are free again: the end of the `Popen` issues a ResourceWarning, and
    # Python needs a free descriptor to report it.
    del caught
    [record] = [each for each in caplog.records if each.message == "command may still run"]
    assert vars(record)["pid"] == pids[0]


async def test_start_of_missing_program_leaves_no_announcement_at_guard_process() -> None:
    guard = RecordingGroupRegistry()
    start = replace(sh_arguments(""), argv=["/no/such/program"], unique_entry="ENTRY=1")
    with pytest.raises(FileNotFoundError):
        async with running_process_group(start, guard, lambda: 0.0):
            pytest.fail("the block was entered")

    assert guard.announced == ""


async def test_process_group_is_killed_and_reaped_if_registration_at_guard_fails() -> None:
    with pytest.raises(RuntimeError, match="refused"):
        async with running_process_group(
            sh_arguments("exec sleep 60"),
            RecordingGroupRegistry(RuntimeError("refused")),
            lambda: 0.0,
        ):
            pytest.fail("the block was entered")


async def test_group_leader_that_outlives_second_cancellation_is_reaped_when_it_exits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guard, entered, removed = RecordingGroupRegistry(), asyncio.Event(), asyncio.Event()

    async def run_group_until_cancelled() -> None:
        async with running_process_group(sh_arguments("exec sleep 60"), guard, lambda: 0.0):
            entered.set()
            await asyncio.Event().wait()

    def record_group_removal(number: int) -> None:
        guard.running.remove(number)
        removed.set()

    monkeypatch.setattr(guard, "unregister_process_group", record_group_removal)
    task = asyncio.get_running_loop().create_task(run_group_until_cancelled())
    await entered.wait()
    [number] = guard.running
    killpg = os.killpg

    def cancel_instead_of_kill(_group: int, sent: int) -> None:
        # Cancel the task instead of sending SIGKILL. The leader survives, like a process that is
        # blocked in the kernel.
        if sent == signal.SIGKILL:
            task.cancel()

    monkeypatch.setattr(os, "killpg", cancel_instead_of_kill)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert guard.running == {number}
    killpg(number, signal.SIGKILL)
    async with asyncio.timeout(WAIT_SECONDS):
        await removed.wait()
