"""Tests of a command's end: no process of its group remains, and the outcome is as documented."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

from plugins.command.tests.conftest import WAIT_SECONDS
from workpool import Session
from workpool.events import SessionFinished, SessionStarted
from workpool.testing import Kit, expire_lease

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from workpool_command import Command

    InstallCallback = Callable[[Callable[[int], object]], None]
    Shell = Callable[..., Command]

IGNORES_SIGTERM = "trap '' TERM; sh -c 'echo $$ >>$0; sleep 60' $0 & echo $$ >>$0; wait; sleep 60"
"""A script that ignores SIGTERM, as its child does, and writes both process ids to a file."""


async def test_running_command_finishes_and_writes_metadata_after_stop_request(
    kit: Kit, shell_command: Shell, procfs: Any, tmp_path: Path
) -> None:
    script = """trap 'echo "{\\"done\\": \\"half\\"}"; exit 0' TERM; echo $$ >$0; sleep 60 & wait"""
    [item] = kit.enqueue()
    async with kit.pool(shell_command(script, tmp_path / "pids", result=True)):
        await procfs.wait_for_file_lines(tmp_path / "pids")
        kit.stop(item)
        end = await kit.wait_for(SessionFinished)

    assert end.outcome == "stopped"
    done = kit.server.operations.get_item(item.environment_id, item.id)
    assert dict(done.metadata) == {"done": "half"}


async def test_command_that_ignores_stop_request_is_killed_with_its_children(
    kit: Kit, shell_command: Shell, procfs: Any, tmp_path: Path
) -> None:
    [item] = kit.enqueue()
    async with kit.pool(shell_command(IGNORES_SIGTERM, tmp_path / "pids", grace=0.3)):
        pids = await procfs.wait_for_file_lines(tmp_path / "pids", 2)
        kit.stop(item)
        end = await kit.wait_for(SessionFinished)

        assert (end.outcome, end.error) == ("stopped", None)
        await procfs.wait_for_process_end(pids)


@pytest.mark.parametrize(
    ("limit", "outcome"), [("timeout", "timed_out"), ("stall_timeout", "stalled")]
)
async def test_command_beyond_time_limit_is_killed_with_its_children(
    kit: Kit, shell_command: Shell, procfs: Any, tmp_path: Path, limit: str, outcome: str
) -> None:
    result = await kit.run_session(
        shell_command(IGNORES_SIGTERM, tmp_path / "pids", grace=0.2, **{limit: 0.5})
    )

    assert result.outcome == outcome
    await procfs.wait_for_process_end(await procfs.wait_for_file_lines(tmp_path / "pids", 0))


async def test_command_output_that_is_no_longer_logged_still_counts_as_progress(
    kit: Kit, shell_command: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report_progress, progress_reported = Session.progress, asyncio.Event()

    def record_progress_report(session: Session) -> None:
        report_progress(session)
        progress_reported.set()

    monkeypatch.setattr(Session, "progress", record_progress_report)
    script = """
        echo first; while [ ! -e $0/first ]; do sleep 0.05; done
        echo second; while [ ! -e $0/second ]; do sleep 0.05; done
    """
    kit.enqueue()
    async with kit.pool(shell_command(script, tmp_path, stall_timeout=600, log_lines=1)):
        async with asyncio.timeout(WAIT_SECONDS):
            for line in ("first", "second"):
                await progress_reported.wait()
                progress_reported.clear()
                (tmp_path / line).touch()
        end = await kit.wait_for(SessionFinished)

    assert end.outcome == "completed"


async def test_command_after_lost_lease_is_killed_with_its_children(
    kit: Kit, shell_command: Shell, procfs: Any, tmp_path: Path
) -> None:
    [item] = kit.enqueue()
    async with kit.pool(shell_command(IGNORES_SIGTERM, tmp_path / "pids")):
        pids = await procfs.wait_for_file_lines(tmp_path / "pids", 2)
        # Expire the lease, so that the control plane delivers the item again. The pool then detects
        # that it has lost the lease.
        expire_lease(kit.server, item.id)
        end = await kit.wait_for(SessionFinished)

        assert end.outcome == "lease_lost"
        await procfs.wait_for_process_end(pids)


@pytest.mark.parametrize(
    ("script", "outcome"),
    [
        ("echo $$ >$0; sleep 60", "released"),
        ("trap 'exit 75' TERM; echo $$ >$0; sleep 60 & wait", "released"),
        ("trap 'exit 0' TERM; echo $$ >$0; sleep 60 & wait", "completed"),
        (IGNORES_SIGTERM, "released"),
    ],
    ids=["killed", "releases", "finishes", "ignores_sigterm"],
)
async def test_session_outcome_matches_exit_status_of_command_that_ends_during_drain(
    kit: Kit,
    shell_command: Shell,
    procfs: Any,
    tmp_path: Path,
    script: str,
    outcome: str,
) -> None:
    kit.enqueue()
    # A command that ends after SIGTERM must not be killed before it has ended on a loaded machine.
    grace = 0.2 if script is IGNORES_SIGTERM else WAIT_SECONDS
    async with kit.pool(shell_command(script, tmp_path / "pids", grace=grace)):
        pids = await procfs.wait_for_file_lines(tmp_path / "pids")

    assert (await kit.wait_for(SessionFinished)).outcome == outcome
    await procfs.wait_for_process_end(pids)


async def test_background_process_is_killed_after_exit_of_command(
    kit: Kit, shell_command: Shell, procfs: Any, tmp_path: Path
) -> None:
    result = await kit.run_session(shell_command("sleep 60 & echo $! >$0", tmp_path / "pids"))

    assert result.outcome == "completed"
    await procfs.wait_for_process_end(await procfs.wait_for_file_lines(tmp_path / "pids"))


async def test_daemon_that_keeps_pipes_of_command_open_does_not_delay_session_end(
    kit: Kit,
    shell_command: Shell,
    procfs: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    script = (
        "setsid sh -c 'echo $$ >$0; exec sleep 600' $0 & while ! test -s $0; do :; done; echo ok"
    )
    result = await kit.run_session(shell_command(script, tmp_path / "pids"))

    assert result.outcome == "completed"
    assert "stdout: ok" in caplog.messages
    [daemon] = await procfs.wait_for_file_lines(tmp_path / "pids")
    # Kill the daemon here. The plugin cannot do this, because the daemon has left the process
    # group.
    os.kill(int(daemon), signal.SIGKILL)


async def test_session_fails_if_code_outside_plugin_reaped_its_command(
    kit: Kit, shell_command: Shell, procfs: Any, tmp_path: Path
) -> None:
    kit.enqueue()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    async with kit.pool(shell_command("echo $$ >$0/pids; read x <$0/fifo", tmp_path)):
        await procfs.wait_for_file_lines(tmp_path / "pids")
        # Ignore SIGCHLD. The kernel then reaps the command at its exit, and the exit status is
        # lost.
        before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        try:
            await asyncio.to_thread(fifo.write_text, "go\n")
            end = await kit.wait_for(SessionFinished)
        finally:
            signal.signal(signal.SIGCHLD, before)

    assert end.outcome == "failed"
    assert "its exit status was taken" in str(end.error)


async def test_session_fails_if_code_outside_plugin_reaps_command_right_after_spawn(
    kit: Kit,
    shell_command: Shell,
    procfs: Any,
    tmp_path: Path,
    install_spawn_callback: InstallCallback,
) -> None:
    install_spawn_callback(lambda pid: os.waitpid(pid, 0))
    result = await kit.run_session(shell_command("sleep 60 & echo $! >$0", tmp_path / "pids"))

    assert result.outcome == "failed"
    assert "its exit status was taken" in str(result.error)
    await procfs.wait_for_process_end(await procfs.wait_for_file_lines(tmp_path / "pids"))


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_hundred_command_sessions_leave_no_process_or_open_file_descriptor(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
    shell_command: Shell,
    procfs: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some commands exit, some are stopped, some are killed and some kill themselves."""
    script = """
        case $(cat) in
            *exits*) echo '{"done": "yes"}';;
            *sleeps*) sleep 60;;
            *ignores_sigterm*) trap '' TERM; sleep 60 & sleep 60;;
            *kills_itself*) sleep 60 & kill -KILL $$;;
        esac
    """
    outcomes = {
        "exits": "completed",
        "sleeps": "stopped",
        "ignores_sigterm": "stopped",
        "kills_itself": "failed",
    }
    monkeypatch.delenv("WORKPOOL_CONFIG", raising=False)

    async def run_sessions(kit: Kit, count: int) -> None:
        command = shell_command(script, grace=0.3)
        # Mix failing and successful sessions, because the pool slows down a handler that fails
        # several times in a row.
        enqueued = [kit.enqueue(1, {"kind": kind}) for _ in range(count) for kind in outcomes]
        items = {item.id: item for (item,) in enqueued}
        async with kit.pool(command, concurrency=25):
            for number in range(len(items)):
                started = await kit.wait_for(SessionStarted, count=number + 1)
                if started.session.item.metadata["kind"] in {"sleeps", "ignores_sigterm"}:
                    kit.stop(items[started.session.item.id])
            await kit.wait_for(SessionFinished, count=len(items))
        for end in kit.recorder.of(SessionFinished):
            assert end.outcome == outcomes[end.session.item.metadata["kind"]]

    async def check_that_sessions_leak_nothing() -> None:
        async with Kit() as first, Kit() as kit:
            # Run one session of each kind before counting. The event loop opens some descriptors at
            # their first use and keeps them open. The test would count these descriptors as a leak.
            await run_sessions(first, 1)
            # Delete the garbage of earlier tests now. If it were deleted later, the processes and
            # descriptors would differ although the sessions leak nothing.
            gc.collect()
            children, descriptors = (
                procfs.list_child_processes(),
                procfs.list_open_descriptors(),
            )
            await run_sessions(kit, 25)
            assert procfs.list_child_processes() == children
            assert procfs.list_open_descriptors() == descriptors
            assert kit.server.summary().overlapping == 0

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(check_that_sessions_leak_nothing())
