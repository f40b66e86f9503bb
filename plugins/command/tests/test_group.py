"""Process groups: after a failure that follows the spawn, no process and no zombie is left."""

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

from workpool_command.group import CommandStart, running_group, start_group

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    BeforeTheWatch = Callable[[Callable[[int], object]], None]

NOBODY = 65_534


class RecordingGuard:
    """A guard that records the numbers of the running groups and can refuse new groups."""

    def __init__(self, refusal: Exception | None = None) -> None:
        self.known: set[int] = set()
        self.expected = ""
        self._refusal = refusal

    def expect(self, mark: str) -> None:
        self.expected = mark

    def add(self, group: int) -> None:
        if self._refusal is not None:
            raise self._refusal
        self.known.add(group)

    def remove(self, group: int) -> None:
        self.known.discard(group)


@pytest.fixture(autouse=True)
def _nothing_is_left(process_view: Any) -> Iterator[None]:
    children, descriptors = process_view.child_processes(), process_view.open_descriptors()
    yield
    gc.collect()  # a `Popen` that was never waited for emits a warning, which fails the test
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


async def test_leader_reaped_before_the_watch_counts_as_exited_with_unknown_status(
    before_watch: BeforeTheWatch, process_view: Any, tmp_path: Path
) -> None:
    before_watch(lambda pid: os.waitpid(pid, 0))
    watch = RecordingGuard()
    start = shell_script("sleep 60 & echo $! >$0", tmp_path / "pids")
    async with running_group(start, watch, lambda: 5.0) as group:
        assert group.exited.is_set()
        assert watch.known == {group.number}

    assert group.status is None
    assert watch.known == set()
    await process_view.wait_for_end(await process_view.wait_for_lines(tmp_path / "pids"))


async def test_process_group_left_running_after_its_leader_was_reaped_is_closed(
    before_watch: BeforeTheWatch,
) -> None:
    before_watch(lambda pid: os.waitpid(pid, 0))
    group = start_group(shell_script("exit 3"))
    group.leave_running()

    assert group.exited.is_set()
    assert group.status is None


async def test_start_without_free_descriptor_raises_emfile_and_kills_group(
    before_watch: BeforeTheWatch, process_view: Any, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pids")
    pids: list[str] = []
    with ExitStack() as stack:

        def exhaust_descriptors(_pid: int) -> None:
            pids.extend((tmp_path / "pids").read_text().split())  # all processes of the group run
            stack.enter_context(no_free_descriptor())

        before_watch(exhaust_descriptors)
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            start_group(shell_script("sleep 60 & echo $$ $! >$0; wait", tmp_path / "pids"))

    assert len(pids) == 2
    await process_view.wait_for_end(pids)


async def test_start_without_free_descriptor_for_reaped_leader_counts_as_exited(
    before_watch: BeforeTheWatch,
) -> None:
    with ExitStack() as stack:

        def reap_and_exhaust(pid: int) -> None:
            os.waitpid(pid, 0)
            stack.enter_context(no_free_descriptor())

        before_watch(reap_and_exhaust)
        group = start_group(shell_script("exit 3"))
    group.leave_running()

    assert group.exited.is_set()
    assert group.status is None


async def test_start_that_loop_cannot_watch_raises_error_and_closes_pidfd(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def raise_full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(asyncio.get_running_loop(), "add_reader", raise_full)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        start_group(shell_script("exec sleep 60"))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs two users")
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
async def test_start_without_permission_to_signal_group_raises_first_error_in_bounded_time(
    before_watch: BeforeTheWatch, caplog: pytest.LogCaptureFixture
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

    del caught  # the exception refers to the `Popen`, whose warning needs a descriptor
    [record] = [each for each in caplog.records if each.message == "command may still run"]
    assert vars(record)["pid"] == pids[0]


async def test_missing_program_withdraws_its_announcement_to_guard() -> None:
    watch = RecordingGuard()
    start = replace(shell_script(""), argv=["/no/such/program"], mark="MARK=1")
    with pytest.raises(FileNotFoundError):
        async with running_group(start, watch, lambda: 0.0):
            pytest.fail("the block was entered")

    assert watch.expected == ""


async def test_guard_that_refuses_group_has_it_killed_and_reaped() -> None:
    with pytest.raises(RuntimeError, match="refused"):
        async with running_group(
            shell_script("exec sleep 60"), RecordingGuard(RuntimeError("refused")), lambda: 0.0
        ):
            pytest.fail("the block was entered")


async def test_command_cancelled_again_after_kill_is_reaped_when_leader_exits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch, entered, removed = RecordingGuard(), asyncio.Event(), asyncio.Event()

    async def run() -> None:
        async with running_group(shell_script("exec sleep 60"), watch, lambda: 0.0):
            entered.set()
            await asyncio.Event().wait()

    def note_signal(group: int) -> None:
        watch.known.remove(group)
        removed.set()

    monkeypatch.setattr(watch, "remove", note_signal)
    task = asyncio.get_running_loop().create_task(run())
    await entered.wait()
    [number] = watch.known
    killpg = os.killpg

    def cancel_at_kill(_group: int, sent: int) -> None:
        if sent == signal.SIGKILL:  # The leader keeps running for now, as if blocked in the kernel.
            task.cancel()

    monkeypatch.setattr(os, "killpg", cancel_at_kill)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert watch.known == {number}
    killpg(number, signal.SIGKILL)
    async with asyncio.timeout(10):
        await removed.wait()
