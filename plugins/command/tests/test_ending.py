"""The end of a command: no process of its group is left, and no wait is without a limit."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

from workpool.events import SessionFinished, SessionStarted
from workpool.testing import Kit, expire_lease

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from workpool_command import Command

    BeforeTheWatch = Callable[[Callable[[int], object]], None]
    Shell = Callable[..., Command]

IGNORES_SIGTERM = "trap '' TERM; sh -c 'echo $$ >>$0; sleep 60' $0 & echo $$ >>$0; wait; sleep 60"
"""The script and its child ignore SIGTERM; the file has the process ids of both."""


async def test_command_after_stop_request_finishes_and_writes_metadata(
    kit: Kit, shell_command: Shell, process_view: Any, tmp_path: Path
) -> None:
    script = """trap 'echo "{\\"done\\": \\"half\\"}"; exit 0' TERM; echo $$ >$0; sleep 60 & wait"""
    [item] = kit.enqueue()
    async with kit.pool(shell_command(script, tmp_path / "pids", result=True)):
        await process_view.wait_for_lines(tmp_path / "pids")
        kit.stop(item)
        end = await kit.wait_for(SessionFinished)

    assert end.outcome == "stopped"
    done = kit.server.operations.get(item.environment_id, item.id)
    assert dict(done.metadata) == {"done": "half"}


async def test_command_that_ignores_stop_request_is_killed_with_its_children(
    kit: Kit, shell_command: Shell, process_view: Any, tmp_path: Path
) -> None:
    [item] = kit.enqueue()
    async with kit.pool(shell_command(IGNORES_SIGTERM, tmp_path / "pids", grace=0.3)):
        pids = await process_view.wait_for_lines(tmp_path / "pids", 2)
        kit.stop(item)
        end = await kit.wait_for(SessionFinished)

        assert (end.outcome, end.error) == ("stopped", None)
        await process_view.wait_for_end(pids)


async def test_command_at_timeout_is_killed_with_its_children(
    kit: Kit, shell_command: Shell, process_view: Any, tmp_path: Path
) -> None:
    result = await kit.run_session(
        shell_command(IGNORES_SIGTERM, tmp_path / "pids", grace=0.2, timeout=0.5)
    )

    assert result.outcome == "timed_out"
    # the command may have written no line or some lines
    await process_view.wait_for_end(await process_view.wait_for_lines(tmp_path / "pids", 0))


async def test_command_without_output_is_stalled_and_killed_with_its_children(
    kit: Kit, shell_command: Shell, process_view: Any, tmp_path: Path
) -> None:
    result = await kit.run_session(
        shell_command(IGNORES_SIGTERM, tmp_path / "pids", grace=0.2, stall_timeout=0.5)
    )

    assert result.outcome == "stalled"
    assert dict(result.metadata) == {"workpool.error": "SessionStalled"}
    await process_view.wait_for_end(await process_view.wait_for_lines(tmp_path / "pids", 0))


async def test_command_that_writes_lines_is_not_stalled(kit: Kit, shell_command: Shell) -> None:
    script = "for i in 1 2 3 4 5 6 7 8; do sleep 0.3; echo line $i; done"
    result = await kit.run_session(shell_command(script, stall_timeout=1.5, log_lines=2))

    assert result.outcome == "completed"
    assert result.seconds > 2


async def test_command_after_lost_lease_is_killed_with_its_children(
    kit: Kit, shell_command: Shell, process_view: Any, tmp_path: Path
) -> None:
    [item] = kit.enqueue()
    async with kit.pool(shell_command(IGNORES_SIGTERM, tmp_path / "pids")):
        pids = await process_view.wait_for_lines(tmp_path / "pids", 2)
        # the redelivered item shows the pool that its lease is lost
        expire_lease(kit.server, item.id)
        end = await kit.wait_for(SessionFinished)

        assert end.outcome == "lease_lost"
        await process_view.wait_for_end(pids)


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
async def test_command_during_drain_ends_with_outcome_of_its_exit_status(
    kit: Kit, shell_command: Shell, process_view: Any, tmp_path: Path, script: str, outcome: str
) -> None:
    kit.enqueue()
    async with kit.pool(shell_command(script, tmp_path / "pids", grace=0.2)):
        pids = await process_view.wait_for_lines(tmp_path / "pids")

    assert (await kit.wait_for(SessionFinished)).outcome == outcome
    await process_view.wait_for_end(pids)


async def test_background_process_after_exit_of_command_is_killed(
    kit: Kit, shell_command: Shell, process_view: Any, tmp_path: Path
) -> None:
    result = await kit.run_session(shell_command("sleep 60 & echo $! >$0", tmp_path / "pids"))

    assert result.outcome == "completed"
    await process_view.wait_for_end(await process_view.wait_for_lines(tmp_path / "pids"))


async def test_daemon_that_keeps_pipes_open_does_not_delay_session(
    kit: Kit,
    shell_command: Shell,
    process_view: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    script = (
        "setsid sh -c 'echo $$ >$0; exec sleep 60' $0 & while ! test -s $0; do :; done; echo ok"
    )
    result = await kit.run_session(shell_command(script, tmp_path / "pids"))

    assert (result.outcome, result.seconds < 30) == ("completed", True)
    assert "stdout: ok" in caplog.messages
    [daemon] = await process_view.wait_for_lines(tmp_path / "pids")
    os.kill(int(daemon), signal.SIGKILL)  # the plugin cannot find this process, as its readme says


async def test_exit_status_reaped_by_other_code_fails_session(
    kit: Kit, shell_command: Shell, process_view: Any, tmp_path: Path
) -> None:
    kit.enqueue()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    async with kit.pool(shell_command("echo $$ >$0/pids; read x <$0/fifo", tmp_path)):
        await process_view.wait_for_lines(tmp_path / "pids")  # now the plugin watches the command
        # From now on the kernel reaps all children.
        before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        try:
            await asyncio.to_thread(fifo.write_text, "go\n")
            end = await kit.wait_for(SessionFinished)
        finally:
            signal.signal(signal.SIGCHLD, before)

    assert end.outcome == "failed"
    assert "its exit status was taken" in str(end.error)


async def test_exit_status_reaped_before_watch_fails_session(
    kit: Kit, shell_command: Shell, process_view: Any, tmp_path: Path, before_watch: BeforeTheWatch
) -> None:
    before_watch(lambda pid: os.waitpid(pid, 0))
    result = await kit.run_session(shell_command("sleep 60 & echo $! >$0", tmp_path / "pids"))

    assert result.outcome == "failed"
    assert "its exit status was taken" in str(result.error)
    await process_view.wait_for_end(await process_view.wait_for_lines(tmp_path / "pids"))


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_hundred_sessions_of_all_outcomes_leave_no_process_or_descriptor(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
    shell_command: Shell,
    process_view: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some commands exit, some are stopped, some must be killed and some kill themselves."""
    script = """
        case $(cat) in
            *quick*) echo '{"done": "yes"}';;
            *slow*) sleep 60;;
            *deaf*) trap '' TERM; sleep 60 & sleep 60;;
            *dies*) sleep 60 & kill -KILL $$;;
        esac
    """
    kinds = {"quick": "completed", "slow": "stopped", "deaf": "stopped", "dies": "failed"}
    monkeypatch.delenv("WORKPOOL_CONFIG", raising=False)

    async def run_kind(kit: Kit, count: int) -> None:
        command = shell_command(script, grace=0.3)
        # The kinds alternate: the pool pauses a handler whose sessions fail in succession.
        given = [kit.enqueue(1, {"kind": kind}) for _ in range(count) for kind in kinds]
        items = {item.id: item for (item,) in given}
        async with kit.pool(command, concurrency=25):
            for number in range(len(items)):
                started = await kit.wait_for(SessionStarted, count=number + 1)
                if started.session.item.metadata["kind"] in {"slow", "deaf"}:
                    kit.stop(items[started.session.item.id])
            await kit.wait_for(SessionFinished, count=len(items))
        for end in kit.recorder.of(SessionFinished):
            assert end.outcome == kinds[end.session.item.metadata["kind"]]

    async def run_hundred() -> None:
        async with Kit() as first, Kit() as kit:
            await run_kind(first, 1)  # The first run opens all descriptors that a loop opens once.
            children, descriptors = process_view.child_processes(), process_view.open_descriptors()
            await run_kind(kit, 25)
            assert process_view.child_processes() == children
            assert process_view.open_descriptors() == descriptors
            assert kit.server.summary().overlapping == 0

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(run_hundred())
