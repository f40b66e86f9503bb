"""Pause, resume and drain of a real worker through its Unix socket.

See workpool/docs/operating.md, "Pause and drain".
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from tests.acceptance.conftest import ENVIRONMENT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.acceptance.conftest import (
        CommandResult,
        CommandRunner,
        CommandStarter,
        RunningCommand,
    )
    from workpool.server import ControlPlane

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.timeout(120),
    pytest.mark.usefixtures("socket_directory"),
]


@pytest.fixture
def socket_directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Create a directory with a short path, because the path of a socket has at most 108 bytes."""
    with tempfile.TemporaryDirectory(prefix="wp-") as directory:
        for name in ("XDG_RUNTIME_DIR", "TMPDIR"):
            monkeypatch.setenv(name, directory)
        yield Path(directory) / "workpool"


def file_permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def make_directory(directory: Path, permissions: int) -> None:
    directory.mkdir(permissions)


def list_file_names(directory: Path) -> list[str] | None:
    """Return the names of the files in a directory, or None if there is no such directory."""
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else None


async def socket_path(worker: RunningCommand) -> Path:
    line = await worker.wait_for_log("control socket open")
    return Path(re.search(r"file=(\S+)", line)[1])  # type: ignore[index] # - it matches


async def readiness_status(worker: RunningCommand) -> tuple[int, str]:
    line = await worker.wait_for_log("metrics served")
    url = re.search(r"url=(\S+)/metrics", line)[1] + "/readyz"  # type: ignore[index] # - it matches
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return answer.status, await answer.text()


def send_to_socket(path: Path, data: bytes) -> Any:
    """Send bytes to a control socket. Return the answer, or None if there is no answer."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(path))
        connection.sendall(data)
        answer = connection.makefile("rb").readline()
    return json.loads(answer) if answer else None


async def test_pause_command_stops_claiming_and_resume_command_restarts_it(
    start_command: CommandStarter,
    run_in_process: CommandRunner,
    control_plane: ControlPlane,
    socket_directory: Path,
) -> None:
    worker = await start_command("run", "handlers")
    path = await socket_path(worker)
    assert path.parent == socket_directory
    assert file_permissions(path) == 0o600
    assert file_permissions(socket_directory) == 0o700
    await worker.wait_for_log("idle; waiting for work")
    paused = await run_in_process("pause", "database is moved")
    assert (paused.status, paused.err) == (0, "")
    assert paused.out.startswith(f"paused pid={worker.pid} environment_id={ENVIRONMENT} running=0")
    assert "database is moved" in await worker.wait_for_log(" paused ")
    status, body = await readiness_status(worker)
    assert status == 503
    assert "paused: database is moved" in body
    control_plane.enqueue(metadata={"do": "finish"})
    assert (await run_in_process("resume")).out.startswith(f"resumed pid={worker.pid} ")
    await worker.wait_for_log("resumed")
    await worker.wait_for_log("finish runs")
    assert (await run_in_process("drain")).out.startswith(f"draining pid={worker.pid} ")
    assert await worker.wait_for_exit() == 0
    assert "result=clean" in worker.err
    assert list_file_names(socket_directory) == []


async def test_pause_command_without_reason_keeps_reason_of_current_pause(
    start_command: CommandStarter, run_in_process: CommandRunner
) -> None:
    worker = await start_command("run", "handlers")
    await worker.wait_for_log("idle; waiting for work")
    for arguments in (("database is moved",), ()):
        assert (await run_in_process("pause", *arguments)).status == 0
        _, body = await readiness_status(worker)
        assert json.loads(body)["reasons"] == ["paused: database is moved"]
    assert (await run_in_process("resume")).status == 0
    assert (await run_in_process("pause")).status == 0
    _, body = await readiness_status(worker)
    assert json.loads(body)["reasons"] == ["paused: workpool pause"]


async def test_drain_command_with_timeout_flag_ends_sessions_after_that_time(
    start_command: CommandStarter, run_in_process: CommandRunner, control_plane: ControlPlane
) -> None:
    control_plane.enqueue(metadata={"do": "linger"})
    worker = await start_command("run", "handlers", WORKPOOL_DRAIN_TIMEOUT="3600")
    await worker.wait_for_log("linger runs")
    assert (await run_in_process("drain", "--timeout", "soon")).status == 2
    assert (await run_in_process("drain", "--timeout", "unlimited")).status == 0
    await worker.wait_for_log("draining")
    assert (await run_in_process("drain", "--timeout", "0")).status == 0
    assert await worker.wait_for_exit() == 0
    assert "result=deadline" in worker.err


async def test_pause_command_with_two_workers_needs_process_id_or_environment(
    start_command: CommandStarter, run_in_process: CommandRunner
) -> None:
    workers = [await start_command("run", "handlers") for _ in range(2)]
    for worker in workers:
        await worker.wait_for_log("idle; waiting for work")
    unclear = await run_in_process("pause")
    assert unclear.status == 2
    assert (
        "several workers listen; choose one with --pid, --environment-id or --socket" in unclear.err
    )
    for worker in workers:
        assert f"pid={worker.pid} environment_id={ENVIRONMENT}" in unclear.err
    first, second = workers
    assert (await run_in_process("pause", "first", "--pid", str(first.pid))).status == 0
    assert (
        await run_in_process("pause", "second", "--socket", str(await socket_path(second)))
    ).status == 0
    assert "first" in await first.wait_for_log(" paused ")
    assert "second" in await second.wait_for_log(" paused ")
    other = await run_in_process("pause", "--environment-id", "env_other")
    assert other.status == 1
    assert "no worker that the flags fit listens" in other.err


async def test_pause_command_without_running_worker_names_searched_directories(
    run_in_process: CommandRunner, socket_directory: Path
) -> None:
    ended: CommandResult = await run_in_process("resume")
    assert ended.status == 1
    assert "no worker listens (looked at " in ended.err
    assert str(socket_directory) in ended.err
    missing = await run_in_process("resume", "--socket", "nowhere.sock")
    assert (missing.status, missing.err) == (
        1,
        "workpool: nowhere.sock: No such file or directory\n",
    )


async def test_control_socket_of_killed_worker_is_removed_by_next_worker(
    start_command: CommandStarter, run_in_process: CommandRunner, socket_directory: Path
) -> None:
    killed = await start_command("run", "handlers")
    left = await socket_path(killed)
    killed.send_signal(signal.SIGKILL)
    await killed.wait_for_exit()
    assert left.exists()
    assert (await run_in_process("pause")).status == 1
    gone = await run_in_process("pause", "--socket", str(left))
    assert (gone.status, gone.err) == (1, f"workpool: {left}: no worker listens there anymore\n")
    worker = await start_command("run", "handlers")
    path = await socket_path(worker)
    assert list_file_names(socket_directory) == [path.name] != [left.name]
    await worker.wait_for_log("idle; waiting for work")
    assert (await run_in_process("pause")).status == 0


async def test_new_worker_replaces_control_socket_at_given_path_only_after_old_worker_ended(
    start_command: CommandStarter, run_in_process: CommandRunner, socket_directory: Path
) -> None:
    path = socket_directory.parent / "reports.sock"
    arguments = ("run", "handlers", "--control-socket", str(path))
    killed = await start_command(*arguments)
    await killed.wait_for_log("idle; waiting for work")
    second = await start_command(*arguments)
    assert await second.wait_for_exit() == 2
    assert f"control_socket: {path}: another worker listens there" in second.err
    first_pause = await run_in_process("pause", "--socket", str(path))
    assert first_pause.status == 0, "the first worker still listens"
    killed.send_signal(signal.SIGKILL)
    await killed.wait_for_exit()
    third = await start_command(*arguments)
    await third.wait_for_log("idle; waiting for work")
    assert (await run_in_process("pause", "third", "--socket", str(path))).status == 0
    assert "third" in await third.wait_for_log(" paused ")


async def test_run_command_with_other_file_at_control_socket_path_fails_and_keeps_file(
    start_command: CommandStarter, command_working_directory: Path
) -> None:
    (command_working_directory / "file").write_text("mine")
    worker = await start_command("run", "handlers", WORKPOOL_CONTROL_SOCKET="file")
    assert await worker.wait_for_exit() == 2
    assert "control_socket: file: exists and is no socket" in worker.err
    assert (command_working_directory / "file").read_text() == "mine"


async def test_pause_command_finds_no_worker_whose_control_socket_is_disabled(
    start_command: CommandStarter, run_in_process: CommandRunner, socket_directory: Path
) -> None:
    worker = await start_command("run", "handlers", "--control-socket", "off")
    await worker.wait_for_log("idle; waiting for work")
    assert (await run_in_process("pause")).status == 1
    assert list_file_names(socket_directory) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
async def test_control_socket_and_directory_of_another_user_are_refused(
    start_command: CommandStarter, run_in_process: CommandRunner, socket_directory: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        make_directory(socket_directory, 0o700)
        path = socket_directory / "other.sock"
        listener.bind(str(path))
        listener.listen()
        os.chown(path, 12345, 12345)
        found = await run_in_process("pause")
        assert found.status == 1
        assert f"{path}: belongs to the user 12345: run the command as that user" in found.err
        os.chown(socket_directory, 12345, 12345)
        found = await run_in_process("pause")
        assert found.status == 1
        assert f"{socket_directory}: not used, as others have access to it" in found.err
        # No connection is waiting: the commands have not connected to the other user's socket.
        listener.settimeout(0)
        with pytest.raises(BlockingIOError):
            listener.accept()
    worker = await start_command("run", "handlers", "--control-socket", str(path))
    assert await worker.wait_for_exit() == 2
    assert f"control_socket: {path}: is the socket of another user" in worker.err
    assert path.exists()


async def test_worker_creates_no_control_socket_in_directory_that_others_may_read(
    start_command: CommandStarter, socket_directory: Path
) -> None:
    make_directory(socket_directory, 0o755)
    worker = await start_command("run", "handlers")
    path = await socket_path(worker)
    assert path.parent != socket_directory
    worker.send_signal(signal.SIGTERM)
    assert await worker.wait_for_exit() == 0
    assert not path.exists()


async def test_pause_command_refuses_long_reason_and_escapes_control_characters(
    start_command: CommandStarter, run_in_process: CommandRunner
) -> None:
    worker = await start_command("run", "handlers")
    await worker.wait_for_log("idle; waiting for work")
    assert (await run_in_process("pause", "\x1b[31mred\nline" + "x" * 1000)).status == 0
    line = await worker.wait_for_log(" paused ")
    assert "\x1b" not in line
    assert "[31mred" in line
    assert line.count("x") < 250
    shown = (await run_in_process("resume")).out
    assert "\x1b" not in shown
    long = await run_in_process("pause", "x" * 10_000)
    assert (long.status, long.err) == (1, "workpool: the reason is too long\n")


async def test_malformed_control_request_is_answered_with_the_reason(
    start_command: CommandStarter, run_in_process: CommandRunner
) -> None:
    worker = await start_command("run", "handlers")
    path = await socket_path(worker)
    await worker.wait_for_log("idle; waiting for work")
    for data, problem in {
        b"x" * 4097: "the request is too long",
        b"pause\n": "the request is not JSON",
        b"\xff\n": "the request is not JSON",
        b"[]\n": "the request is unknown",
        b'{"command": "delete"}\n': "the request is unknown",
        b'{"command": "pause", "reason": 7}\n': "the request is unknown",
        b'{"command": "drain", "timeout": -1}\n': "must be a number, 0 or more, or unlimited",
    }.items():
        assert await asyncio.to_thread(send_to_socket, path, data) == {"error": problem}
    assert (await run_in_process("pause")).status == 0


async def test_silent_client_of_control_socket_does_not_block_next_client(
    start_command: CommandStarter, run_in_process: CommandRunner
) -> None:
    worker = await start_command("run", "handlers")
    path = await socket_path(worker)
    await worker.wait_for_log("idle; waiting for work")
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(path))
        silent.sendall(b'{"command"')
        assert (await run_in_process("pause", "after the silent one")).status == 0
    assert "after the silent one" in await worker.wait_for_log(" paused ")


async def test_drain_command_to_worker_with_blocked_loop_ends_with_timeout_error(
    start_command: CommandStarter,
    run_in_process: CommandRunner,
    control_plane: ControlPlane,
    command_working_directory: Path,
) -> None:
    control_plane.enqueue(metadata={"do": "block"})
    worker = await start_command("run", "handlers")
    path = await socket_path(worker)
    await worker.wait_for_log("block runs")
    ended = await run_in_process("drain", "--socket", str(path))
    assert ended.status == 1
    assert "no answer in 5 s" in ended.err
    (command_working_directory / "free").touch()
    worker.send_signal(signal.SIGTERM)
    assert await worker.wait_for_exit() == 0
