"""`workpool hold` as a process that takes over a lease from its parent and runs a program."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import pytest

from tests.acceptance.conftest import ENVIRONMENT, SECONDS, TOKEN, RunningCommand, was_stopped
from workpool import Settings, WorkClient
from workpool.wire.protocol import NO_HEARTBEAT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.acceptance.conftest import CommandRunner, CommandStarter
    from workpool.server import ControlPlane

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(60)]

SLOW_TO_END = "trap 'echo asked; exit 3' TERM; echo begun; while :; do sleep 0.05; done"
IGNORES_SIGTERM = "trap '' TERM; echo begun; while :; do sleep 0.05; done"


class HandedOffItem(NamedTuple):
    """An item with a parent's lease, and the environment variables that hand the lease off."""

    work_id: str
    variables: dict[str, str]


class HandoffPreparer(Protocol):
    async def __call__(self, **variables: str) -> HandedOffItem: ...


@pytest.fixture
async def client(control_plane: ControlPlane) -> AsyncIterator[WorkClient]:
    settings = Settings(base_url=control_plane.base_url, token=TOKEN, environment_id=ENVIRONMENT)
    async with WorkClient(settings) as client:
        yield client


@pytest.fixture
def prepare_handoff(control_plane: ControlPlane, client: WorkClient) -> HandoffPreparer:
    """Return a function that claims an item and prepares its handoff, as a parent process does."""

    async def claim_item_and_prepare_handoff(**variables: str) -> HandedOffItem:
        (item,) = control_plane.enqueue(environment_id=ENVIRONMENT)
        await client.poll()
        await client.ack(item.id)
        heartbeat = await client.heartbeat(item.id, NO_HEARTBEAT, 60)
        return HandedOffItem(
            item.id,
            {
                "WORKPOOL_HOLD_WORK_ID": item.id,
                "WORKPOOL_HOLD_LAST_HEARTBEAT": heartbeat.last_heartbeat,
                "WORKPOOL_HOLD_TTL": "10",
                **variables,
            },
        )

    return claim_item_and_prepare_handoff


def read_history_kinds_after_handoff(plane: ControlPlane, work_id: str) -> list[str]:
    """Return the kinds of the item's history records after the last heartbeat of the parent."""
    return [str(record.kind) for record in plane.history.records_of_item(work_id)][4:]


def read_end_of_handed_off_run(plane: ControlPlane, work_id: str) -> str:
    """Return "stopped", "released", or "unchanged" if the child has sent no heartbeat."""
    if was_stopped(plane, work_id):
        return "stopped"
    kinds = read_history_kinds_after_handoff(plane, work_id)
    return "released" if "heartbeat" in kinds else "unchanged"


async def start_shell_script_with_hold_command(
    start: CommandStarter, handed: HandedOffItem, script: str
) -> RunningCommand:
    return await start("hold", "--", "sh", "-c", script, **handed.variables)


@pytest.mark.parametrize(
    ("status", "means"),
    [
        (0, (0, "stopped", {})),
        (75, (0, "released", {"workpool.released": "Release"})),
        (3, (1, "stopped", {"workpool.error": "ProgramFailed"})),
    ],
)
async def test_exit_status_of_program_started_by_hold_command_decides_state_of_item(
    control_plane: ControlPlane,
    client: WorkClient,
    start_command: CommandStarter,
    prepare_handoff: HandoffPreparer,
    status: int,
    means: object,
) -> None:
    handed = await prepare_handoff()
    command = await start_shell_script_with_hold_command(start_command, handed, f"exit {status}")
    exits = await command.wait_for_exit()
    item = await client.get(handed.work_id)
    end = read_end_of_handed_off_run(control_plane, handed.work_id)
    assert (exits, end, dict(item.metadata)) == means


async def test_program_started_by_hold_command_gets_ids_but_no_credentials(
    control_plane: ControlPlane,
    client: WorkClient,
    start_command: CommandStarter,
    prepare_handoff: HandoffPreparer,
) -> None:
    handed = await prepare_handoff(KEPT="yes", QODER_PAT="other")
    command = await start_shell_script_with_hold_command(start_command, handed, "env")
    assert await command.wait_for_exit() == 0
    item = await client.get(handed.work_id)
    assert read_history_kinds_after_handoff(control_plane, handed.work_id) == [
        "heartbeat",
        "stopped",
    ]
    found = dict(line.split("=", 1) for line in command.out.splitlines() if "=" in line)
    assert {name: found[name] for name in found if name.startswith("WORKPOOL_")} == {
        "WORKPOOL_WORK_ID": handed.work_id,
        "WORKPOOL_SESSION_ID": item.session_id,
        "WORKPOOL_ENVIRONMENT_ID": ENVIRONMENT,
    }
    assert found["KEPT"] == "yes"
    assert "QODER_PAT" not in found


@pytest.mark.parametrize("script", [SLOW_TO_END, IGNORES_SIGTERM], ids=["obeys", "ignores_sigterm"])
async def test_stop_request_ends_program_started_by_hold_command_and_stops_item(
    control_plane: ControlPlane,
    client: WorkClient,
    start_command: CommandStarter,
    prepare_handoff: HandoffPreparer,
    script: str,
) -> None:
    """The program gets SIGTERM, and SIGKILL if it has not ended after a grace period."""
    # A program that ends after SIGTERM must not be killed before it has ended on a loaded machine.
    grace = "0.5" if script is IGNORES_SIGTERM else "40"
    handed = await prepare_handoff(WORKPOOL_STOP_GRACE=grace)
    command = await start_shell_script_with_hold_command(start_command, handed, script)
    await command.wait_for_output("begun")
    await client.stop(handed.work_id)
    assert await command.wait_for_exit() == 0
    assert ("asked" in command.out) is (script is SLOW_TO_END)
    assert (await client.get(handed.work_id)).state == "stopped"
    assert read_history_kinds_after_handoff(control_plane, handed.work_id)[-1] == "stopped"


async def test_hold_command_releases_item_after_sigterm(
    control_plane: ControlPlane,
    client: WorkClient,
    start_command: CommandStarter,
    prepare_handoff: HandoffPreparer,
) -> None:
    """`docker stop` and the end of a pod send SIGTERM; another worker should then run the item."""
    handed = await prepare_handoff()
    command = await start_shell_script_with_hold_command(start_command, handed, SLOW_TO_END)
    await command.wait_for_output("begun")
    command.send_signal(signal.SIGTERM)
    assert await command.wait_for_exit() == 0
    assert "asked" in command.out
    item = await client.get(handed.work_id)
    assert dict(item.metadata) == {"workpool.released": "Release"}
    assert read_end_of_handed_off_run(control_plane, handed.work_id) == "released"


async def test_hold_command_logs_that_exit_limit_settings_have_no_effect(
    start_command: CommandStarter, prepare_handoff: HandoffPreparer
) -> None:
    handed = await prepare_handoff(
        WORKPOOL_EXIT_AFTER_SESSIONS="1", WORKPOOL_EXIT_AFTER_UPTIME="0.1"
    )
    # The program runs for longer than `exit_after_uptime`, which would end it before its output.
    command = await start_shell_script_with_hold_command(
        start_command, handed, "sleep 0.3; echo done"
    )
    assert await command.wait_for_exit() == 0
    assert "settings without effect: exit_after_sessions, exit_after_uptime" in command.err
    assert "done" in command.out


async def test_hold_command_ends_program_and_sends_nothing_more_after_its_lease_is_lost(
    control_plane: ControlPlane,
    client: WorkClient,
    start_command: CommandStarter,
    prepare_handoff: HandoffPreparer,
) -> None:
    handed = await prepare_handoff()
    command = await start_shell_script_with_hold_command(start_command, handed, SLOW_TO_END)
    await command.wait_for_output("begun")
    queue = control_plane.operations.get_queue(ENVIRONMENT)
    queue.put_item(replace(queue.get_item(handed.work_id), lease_end=0))
    rival = await client.poll(reclaim_older_than_ms=0)
    assert rival is not None
    await client.ack(rival.id)
    assert await command.wait_for_exit() == 1
    assert "asked" in command.out
    assert read_history_kinds_after_handoff(control_plane, handed.work_id)[-2:] == [
        "acked",
        "conflict",
    ]
    assert (await client.get(handed.work_id)).state == "starting"


async def test_hold_command_runs_no_program_if_parent_took_item_back(
    client: WorkClient, start_command: CommandStarter, prepare_handoff: HandoffPreparer
) -> None:
    handed = await prepare_handoff()
    last = handed.variables["WORKPOOL_HOLD_LAST_HEARTBEAT"]
    back = await client.heartbeat(handed.work_id, last, 60)
    command = await start_shell_script_with_hold_command(start_command, handed, "echo begun")
    assert await command.wait_for_exit() == 1
    assert command.out == ""
    item = await client.get(handed.work_id)
    assert (item.state, item.last_heartbeat) == ("active", back.last_heartbeat)


async def test_sigkill_to_hold_command_also_kills_its_program_with_all_children(
    start_command: CommandStarter, prepare_handoff: HandoffPreparer
) -> None:
    """A surviving program would run at the same time as the next worker that claims the item."""
    handed = await prepare_handoff()
    command = await start_shell_script_with_hold_command(
        start_command, handed, f"({IGNORES_SIGTERM}) & {IGNORES_SIGTERM}"
    )
    await command.wait_for_output("begun")
    await command.wait_for_output("begun")
    command.send_signal(signal.SIGKILL)
    # `wait_for_exit` reads the output to its end. A surviving child process would keep the output
    # open, so that the wait would fail.
    assert await command.wait_for_exit() == -signal.SIGKILL


PARENT = """
import fcntl, subprocess, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
subprocess.run([sys.executable, "-m", "workpool", "hold", "--", "sh", "-c", sys.argv[1]])
"""


async def test_program_started_by_hold_command_survives_end_of_parent_and_terminal(
    control_plane: ControlPlane, client: WorkClient, prepare_handoff: HandoffPreparer, tmp_path: Any
) -> None:
    """Neither the program nor `workpool hold` ends early. The end of the program stops the item."""
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    handed = await prepare_handoff()
    connection = {
        "WORKPOOL_BASE_URL": control_plane.base_url,
        "WORKPOOL_ENVIRONMENT_ID": ENVIRONMENT,
        "WORKPOOL_TOKEN": TOKEN,
    }
    master, terminal = os.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PARENT, f"echo begun; read _ < {fifo}; echo ended"),
        env={**os.environ, **connection, **handed.variables},
        stdin=terminal,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    os.close(terminal)
    pidfd = os.pidfd_open(process.pid)
    command = RunningCommand(process)
    try:
        await command.wait_for_output("begun")
        gone = asyncio.Event()
        asyncio.get_running_loop().add_reader(pidfd, gone.set)
        # When the terminal closes, the kernel sends SIGHUP to the processes of the terminal.
        os.close(master)
        async with asyncio.timeout(SECONDS):
            await gone.wait()
        asyncio.get_running_loop().remove_reader(pidfd)
        fifo.write_text("go\n")
        await command.wait_for_output("ended")
        assert await command.wait_for_exit() == -signal.SIGHUP
    finally:
        os.close(pidfd)
        await command.kill()
    assert (await client.get(handed.work_id)).state == "stopped"


async def test_hold_command_with_invalid_arguments_sends_no_heartbeat(
    client: WorkClient, run_in_process: CommandRunner, prepare_handoff: HandoffPreparer
) -> None:
    handed = await prepare_handoff()
    # The command gets the item's id neither from a flag nor from a variable.
    assert (await run_in_process("hold", "true")).status == 2
    assert (await run_in_process("hold", "no-such-program", **handed.variables)).status == 2
    assert (await run_in_process("hold", "--ttl", "5", "true", **handed.variables)).status == 2
    item = await client.get(handed.work_id)
    assert item.last_heartbeat == handed.variables["WORKPOOL_HOLD_LAST_HEARTBEAT"]


async def test_hold_command_for_unknown_item_ends_with_status_3(
    start_command: CommandStarter,
) -> None:
    command = await start_command(
        *("hold", "--work-id", "work_unknown", "--last-heartbeat", NO_HEARTBEAT, "true")
    )
    assert await command.wait_for_exit() == 3
