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

    from tests.acceptance.conftest import Ask, Command, Ended, Start
    from workpool.server import ControlPlane

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.timeout(120),
    pytest.mark.usefixtures("runtime"),
]


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory of the workers' sockets; its path is short, as those of sockets must be."""
    with tempfile.TemporaryDirectory(prefix="wp-") as directory:
        for name in ("XDG_RUNTIME_DIR", "TMPDIR"):
            monkeypatch.setenv(name, directory)
        yield Path(directory) / "workpool"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def make(directory: Path, permissions: int) -> None:
    directory.mkdir(permissions)


def names(directory: Path) -> list[str] | None:
    """Return the names of the files in a directory; None if it does not exist."""
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else None


async def socket_of(worker: Command) -> Path:
    line = await worker.logs("control socket open")
    return Path(re.search(r"file=(\S+)", line)[1])  # type: ignore[index] # - it matches


async def readiness(worker: Command) -> tuple[int, str]:
    line = await worker.logs("metrics served")
    url = re.search(r"url=(\S+)/metrics", line)[1] + "/readyz"  # type: ignore[index] # - it matches
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return answer.status, await answer.text()


def send(path: Path, data: bytes) -> Any:
    """Send bytes to a worker's socket and return its answer; None if it gives none."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(path))
        connection.sendall(data)
        answer = connection.makefile("rb").readline()
    return json.loads(answer) if answer else None


async def test_worker_is_paused_and_resumed_by_command(
    start: Start, ask: Ask, plane: ControlPlane, runtime: Path
) -> None:
    worker = await start("run", "handlers")
    path = await socket_of(worker)
    assert path.parent == runtime
    assert mode(path) == 0o600
    assert mode(runtime) == 0o700
    await worker.logs("idle; waiting for work")
    paused = await ask("pause", "database is moved")
    assert (paused.status, paused.err) == (0, "")
    assert paused.out.startswith(f"paused pid={worker.pid} environment_id={ENVIRONMENT} running=0")
    assert "database is moved" in await worker.logs(" paused ")
    status, body = await readiness(worker)
    assert status == 503
    assert "paused: database is moved" in body
    plane.enqueue(metadata={"do": "finish"})
    assert (await ask("resume")).out.startswith(f"resumed pid={worker.pid} ")
    await worker.logs("resumed")
    await worker.logs("finish runs")
    assert (await ask("drain")).out.startswith(f"draining pid={worker.pid} ")
    assert await worker.ends() == 0
    assert "result=clean" in worker.err
    assert names(runtime) == []


async def test_drain_by_command_gives_sessions_the_time_of_its_flag(
    start: Start, ask: Ask, plane: ControlPlane
) -> None:
    plane.enqueue(metadata={"do": "linger"})
    worker = await start("run", "handlers", WORKPOOL_DRAIN_TIMEOUT="3600")
    await worker.logs("linger runs")
    assert (await ask("drain", "--timeout", "soon")).status == 2
    assert (await ask("drain", "--timeout", "unlimited")).status == 0
    await worker.logs("draining")
    assert (await ask("drain", "--timeout", "0")).status == 0
    assert await worker.ends() == 0
    assert "result=deadline" in worker.err


async def test_one_of_two_workers_is_chosen_by_its_process_id_or_environment(
    start: Start, ask: Ask
) -> None:
    workers = [await start("run", "handlers") for _ in range(2)]
    for worker in workers:
        await worker.logs("idle; waiting for work")
    unclear = await ask("pause")
    assert unclear.status == 2
    assert (
        "several workers listen; choose one with --pid, --environment-id or --socket" in unclear.err
    )
    for worker in workers:
        assert f"pid={worker.pid} environment_id={ENVIRONMENT}" in unclear.err
    first, second = workers
    assert (await ask("pause", "first", "--pid", str(first.pid))).status == 0
    assert (await ask("pause", "second", "--socket", str(await socket_of(second)))).status == 0
    assert "first" in await first.logs(" paused ")
    assert "second" in await second.logs(" paused ")
    other = await ask("pause", "--environment-id", "env_other")
    assert other.status == 1
    assert "no worker that the flags fit listens" in other.err


async def test_no_worker_is_an_error_that_names_the_places_looked_at(
    ask: Ask, runtime: Path
) -> None:
    ended: Ended = await ask("resume")
    assert ended.status == 1
    assert "no worker listens (looked at " in ended.err
    assert str(runtime) in ended.err
    missing = await ask("resume", "--socket", "nowhere.sock")
    assert (missing.status, missing.err) == (
        1,
        "workpool: nowhere.sock: No such file or directory\n",
    )


async def test_socket_of_a_killed_worker_is_removed_by_the_next_one(
    start: Start, ask: Ask, runtime: Path
) -> None:
    killed = await start("run", "handlers")
    left = await socket_of(killed)
    killed.send(signal.SIGKILL)
    await killed.ends()
    assert left.exists()
    assert (await ask("pause")).status == 1
    gone = await ask("pause", "--socket", str(left))
    assert (gone.status, gone.err) == (1, f"workpool: {left}: no worker listens there anymore\n")
    worker = await start("run", "handlers")
    path = await socket_of(worker)
    assert names(runtime) == [path.name] != [left.name]
    await worker.logs("idle; waiting for work")
    assert (await ask("pause")).status == 0


async def test_socket_at_a_given_path_is_taken_over_from_a_killed_worker_only(
    start: Start, ask: Ask, runtime: Path
) -> None:
    path = runtime.parent / "reports.sock"
    arguments = ("run", "handlers", "--control-socket", str(path))
    killed = await start(*arguments)
    await killed.logs("idle; waiting for work")
    second = await start(*arguments)
    assert await second.ends() == 2
    assert f"control_socket: {path}: another worker listens there" in second.err
    assert (await ask("pause", "--socket", str(path))).status == 0  # the first worker still listens
    killed.send(signal.SIGKILL)
    await killed.ends()
    third = await start(*arguments)
    await third.logs("idle; waiting for work")
    assert (await ask("pause", "third", "--socket", str(path))).status == 0
    assert "third" in await third.logs(" paused ")


async def test_file_in_the_place_of_the_socket_is_kept_and_an_error(
    start: Start, folder: Path
) -> None:
    (folder / "file").write_text("mine")
    worker = await start("run", "handlers", WORKPOOL_CONTROL_SOCKET="file")
    assert await worker.ends() == 2
    assert "control_socket: file: exists and is no socket" in worker.err
    assert (folder / "file").read_text() == "mine"


async def test_worker_without_a_socket_is_not_found(start: Start, ask: Ask, runtime: Path) -> None:
    worker = await start("run", "handlers", "--control-socket", "off")
    await worker.logs("idle; waiting for work")
    assert (await ask("pause")).status == 1
    assert names(runtime) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
async def test_socket_and_directory_of_another_user_are_not_trusted(
    start: Start, ask: Ask, runtime: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        make(runtime, 0o700)
        path = runtime / "other.sock"
        listener.bind(str(path))
        listener.listen()
        os.chown(path, 12345, 12345)
        found = await ask("pause")
        assert found.status == 1
        assert f"{path}: belongs to the user 12345: run the command as that user" in found.err
        os.chown(runtime, 12345, 12345)
        found = await ask("pause")
        assert found.status == 1
        assert f"{runtime}: not used, as others have access to it" in found.err
        listener.settimeout(0)
        with pytest.raises(BlockingIOError):
            listener.accept()  # no client has connected
    worker = await start("run", "handlers", "--control-socket", str(path))
    assert await worker.ends() == 2
    assert f"control_socket: {path}: is the socket of another user" in worker.err
    assert path.exists()


async def test_directory_that_others_may_read_is_not_used(start: Start, runtime: Path) -> None:
    make(runtime, 0o755)
    worker = await start("run", "handlers")
    path = await socket_of(worker)
    assert path.parent != runtime
    worker.send(signal.SIGTERM)
    assert await worker.ends() == 0
    assert not path.exists()


async def test_reason_is_limited_and_escaped(start: Start, ask: Ask) -> None:
    worker = await start("run", "handlers")
    await worker.logs("idle; waiting for work")
    assert (await ask("pause", "\x1b[31mred\nline" + "x" * 1000)).status == 0
    line = await worker.logs(" paused ")
    assert "\x1b" not in line
    assert "[31mred" in line
    assert line.count("x") < 250
    shown = (await ask("resume")).out
    assert "\x1b" not in shown
    long = await ask("pause", "x" * 10_000)
    assert (long.status, long.err) == (1, "workpool: the reason is too long\n")


async def test_request_that_cannot_be_read_is_answered_with_the_reason(
    start: Start, ask: Ask
) -> None:
    worker = await start("run", "handlers")
    path = await socket_of(worker)
    await worker.logs("idle; waiting for work")
    for data, problem in {
        b"x" * 4097: "the request is too long",
        b"pause\n": "the request is not JSON",
        b"\xff\n": "the request is not JSON",
        b"[]\n": "the request is unknown",
        b'{"command": "delete"}\n': "the request is unknown",
        b'{"command": "pause", "reason": 7}\n': "the request is unknown",
        b'{"command": "drain", "timeout": -1}\n': "must be a number, 0 or more, or unlimited",
    }.items():
        assert await asyncio.to_thread(send, path, data) == {"error": problem}
    assert (await ask("pause")).status == 0


async def test_silent_client_is_cut_off_and_the_next_one_served(start: Start, ask: Ask) -> None:
    worker = await start("run", "handlers")
    path = await socket_of(worker)
    await worker.logs("idle; waiting for work")
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(path))
        silent.sendall(b'{"command"')
        assert (await ask("pause", "after the silent one")).status == 0
    assert "after the silent one" in await worker.logs(" paused ")


async def test_worker_whose_event_loop_is_blocked_gives_no_answer(
    start: Start, ask: Ask, plane: ControlPlane, folder: Path
) -> None:
    plane.enqueue(metadata={"do": "block"})
    worker = await start("run", "handlers")
    path = await socket_of(worker)
    await worker.logs("block runs")
    ended = await ask("drain", "--socket", str(path))
    assert ended.status == 1
    assert "no answer in 5 s" in ended.err
    (folder / "free").touch()
    worker.send(signal.SIGTERM)
    assert await worker.ends() == 0
