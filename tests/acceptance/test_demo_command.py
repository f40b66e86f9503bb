"""`workpool demo`, with and without a terminal."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from workpool.cli.demo import demo_runner
from workpool.cli.demo.demo_sessions import DemoSession
from workpool.cli.signals import SignalEvents

if TYPE_CHECKING:
    from tests.acceptance.conftest import CommandStarter

pytestmark = [pytest.mark.acceptance, pytest.mark.trial, pytest.mark.timeout(120)]

PROMISE = re.compile(
    r"(\d+) enqueued · (\d+) stopped · (\d+) reclaimed · (\d+) lost · (\d+) overlapping"
    r" · (\d+) failed"
)
LAST_FRAME = re.compile(r"queue (\d+)   running (\d+)   stopped (\d+) of (\d+)")


def is_process_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def test_demo_loses_no_session_although_a_worker_is_killed(
    start_command_without_settings: CommandStarter,
) -> None:
    command = await start_command_without_settings("demo")
    assert await command.wait_for_exit(100) == 0
    assert command.err == ""
    promise = PROMISE.search(command.out)
    assert promise is not None
    assert [promise[1], promise[2], promise[4], promise[5]] == ["40", "40", "0", "0"]
    assert (int(promise[3]) >= 1, promise[6]) == (True, "0")
    assert LAST_FRAME.findall(command.out)[-1] == ("0", "0", "40", "40")
    last = command.out[: promise.start()].splitlines()[-1]
    assert sum(map(int, re.findall(r"(\d+) completed", last))) == 40
    assert re.search(r"killed, leases lapse in \d+ s", command.out)
    assert "0/0" not in command.out
    assert re.search(r"worker-\d  sample: 'session 01' started", command.out)
    assert re.search(r"worker-\d  sample: 'session \d\d' redelivered", command.out)
    [victim] = re.findall(r"(worker-\d) is killed \(kill -9 \d+\) while it holds", command.out)
    takers = set(re.findall(r"session \d\d reclaimed by (worker-\d)", command.out))
    assert takers == {"worker-1", "worker-2"} - {victim}
    assert len(re.findall(r"metrics=http://127\.0\.0\.1:\d+/metrics", command.out)) == 2
    assert "Try next" in command.out.partition("overlapping")[2]


async def test_demo_command_with_handler_of_user_runs_that_handler(
    start_command_without_settings: CommandStarter, command_working_directory: Path
) -> None:
    (command_working_directory / "reports.py").write_text(
        "from workpool import Session, handler\n"
        '@handler(metadata={"job": "daily-report"})\n'
        "async def daily_report(session: Session) -> dict[str, str]:\n"
        '    session.log.info("the report of %s", session.id)\n'
        '    print("a printed line")\n'
        '    return {"rows": "42"}\n'
    )
    command = await start_command_without_settings("demo", "reports:daily_report")
    assert await command.wait_for_exit(100) == 0
    assert re.search(r"worker-\d  the report of sess_", command.out)
    assert re.search(r"worker-\d  a printed line", command.out)
    promise = PROMISE.search(command.out)
    assert promise is not None
    assert [promise[1], promise[2], promise[4], promise[5]] == ["40", "40", "0", "0"]


async def test_demo_command_with_unknown_handler_ends_with_status_2(
    start_command_without_settings: CommandStarter,
) -> None:
    command = await start_command_without_settings("demo", "nowhere:nothing")
    assert await command.wait_for_exit() == 2
    assert "no module named 'nowhere'" in command.err
    assert "Try next" not in command.out


async def test_demo_command_leaves_no_process_after_ctrl_c(
    start_command_without_settings: CommandStarter,
) -> None:
    command = await start_command_without_settings("demo")
    lines = [await command.wait_for_output("runs pid=") for _ in range(2)]
    pids = [int(line.partition("pid=")[2].split()[0]) for line in lines]
    command.send_signal(signal.SIGINT)
    assert await command.wait_for_exit() == 130
    assert not any(is_process_running(pid) for pid in pids)


async def test_demo_command_with_failing_handler_ends_with_status_1(
    start_command_without_settings: CommandStarter, command_working_directory: Path
) -> None:
    (command_working_directory / "broken.py").write_text(
        "from workpool import Session, handler\n"
        "@handler\n"
        "async def broken(session: Session) -> None:\n"
        '    raise ValueError("on purpose")\n'
    )
    command = await start_command_without_settings("demo", "broken", "--count", "4")
    assert await command.wait_for_exit(100) == 1
    assert "session 01 failed: ValueError" in command.out
    promise = PROMISE.search(command.out)
    assert promise is not None
    assert (promise[2], promise[6]) == ("4", "4")


async def test_demo_command_ends_early_with_a_message_if_every_session_fails(
    start_command_without_settings: CommandStarter, command_working_directory: Path
) -> None:
    """Workers claim items of a failing handler ever more slowly, so the demo would seem to hang."""
    (command_working_directory / "broken.py").write_text(
        "from workpool import Session, handler\n"
        "@handler\n"
        "async def broken(session: Session) -> None:\n"
        '    raise ValueError("on purpose")\n'
    )
    command = await start_command_without_settings("demo", "broken")
    assert await command.wait_for_exit() == 1
    assert re.search(r"^\d+ sessions failed, and none was completed: ", command.out, re.MULTILINE)
    assert "does --metadata match" not in command.out


async def test_demo_command_with_metadata_that_match_no_handler_ends_at_once(
    start_command_without_settings: CommandStarter,
) -> None:
    command = await start_command_without_settings(
        "demo", "handlers:finish", "--metadata", "do=nothing"
    )
    assert await command.wait_for_exit() == 2
    assert "takes type=session do=finish, not do=nothing: change --metadata" in command.err


async def test_demo_command_with_sessions_that_no_handler_takes_ends_with_status_1(
    command_working_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(command_working_directory)
    monkeypatch.setattr(demo_runner, "STALL_SECONDS", 4.0)
    runner = demo_runner.DemoRunner(
        "handlers:finish", [DemoSession("session", {"do": "nothing"})] * 4
    )
    with SignalEvents() as signals:
        async with runner.plane:
            assert await runner.run(signals) == 1
    assert "does --metadata match" in capsys.readouterr().out


async def test_demo_command_on_terminal_shows_live_view(command_working_directory: Path) -> None:
    master, slave = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "workpool", "demo", "--count", "4"),
        cwd=command_working_directory,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    with os.fdopen(master, "rb", buffering=0) as terminal:
        async with asyncio.timeout(100):
            shown = await asyncio.to_thread(read_terminal_until_closed, terminal.fileno())
            status = await process.wait()
    assert status == 0
    # Several processes write to the terminal, so the bytes of a character may be separated.
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode(errors="replace"))
    for words in ("slots", "sessions", "reclaimed", "queue 0", "stopped 4 of 4", "/metrics"):
        assert words in text
    assert PROMISE.search(text)


def read_terminal_until_closed(terminal: int) -> bytes:
    """Return all output of a terminal.

    The output ends with an OSError, when the last process that writes to the terminal closes it.
    """
    shown = b""
    try:
        while chunk := os.read(terminal, 65536):
            shown += chunk
    except OSError:
        pass
    return shown
