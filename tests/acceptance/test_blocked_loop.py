"""`workpool run` reports a blocked event loop and ends, even if it cannot log or write files."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from datetime import datetime
from typing import TYPE_CHECKING

import aiohttp
import pytest

from tests.acceptance.conftest import ENVIRONMENT, SECONDS, TOKEN

if TYPE_CHECKING:
    from pathlib import Path

    from tests.acceptance.conftest import CommandStarter
    from workpool.server import ControlPlane

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]

READ_ONLY = """
mount --make-rprivate / || exit 77
while read -r _ target _; do
    case "$target" in /proc*|/sys*|/dev|/dev/pts) continue;; esac
    mount -o remount,bind,ro "$target" 2>/dev/null
done < /proc/self/mounts
for folder in / /tmp /var/tmp "$TMPDIR" .; do
    touch "$folder/.written" 2>/dev/null && { rm "$folder/.written"; exit 77; }
done
exec "$@"
"""
NO_TEMPORARY_DIRECTORY = """
import runpy, tempfile
tempfile._candidate_tempdir_list = lambda: []
runpy.run_module("workpool", run_name="__main__", alter_sys=True)
"""
RAISING_LOG = """
import logging
from handlers import block, linger

class Raising(logging.Handler):
    def emit(self, record):
        if record.getMessage().startswith("event loop is blocked"):
            raise {error}("raised by a log handler")

logging.getLogger().addHandler(Raising())
"""
RAISING_EXPORTER = """
from handlers import block, linger
from workpool.exporter import Exporter

async def crash(self, request):
    raise {error}("raised by the exporter")

Exporter._serve_healthz = crash
"""
CLEANUP = """
import asyncio
from workpool import handler

@handler
async def tidy(session):
    session.log.info("tidy runs")
    try:
        await asyncio.sleep(3600)
    finally:
        session.log.info("tidy cleans up")
"""
FLOOD = """
from workpool import handler

@handler
async def flood(session):
    while True:
        session.log.info("x" * 10_000)
"""


@pytest.fixture
def command_where_no_directory_is_writable(
    request: pytest.FixtureRequest, command_working_directory: Path
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the command and the variables that start `workpool` where no directory is writable."""
    if request.param == "no temporary directory":
        return (sys.executable, "-c", NO_TEMPORARY_DIRECTORY), {}
    wrapper = ("unshare", "--mount", "sh", "-c", READ_ONLY, "sh")
    try:
        subprocess.check_call((*wrapper, "true"), cwd=command_working_directory)  # noqa: S603 - fixed words
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine does not permit a read-only mount namespace")
    return (*wrapper, sys.executable, "-m", "workpool"), {"TMPDIR": "/proc"}


@pytest.fixture
def workpool_command_words(request: pytest.FixtureRequest) -> tuple[str, ...]:
    if "command_where_no_directory_is_writable" in request.fixturenames:
        found: tuple[str, ...] = request.getfixturevalue("command_where_no_directory_is_writable")[
            0
        ]
        return found
    return (sys.executable, "-m", "workpool")


def read_timestamp_of_log_line(line: str) -> float:
    return datetime.fromisoformat(line.split(" ", 1)[0]).timestamp()


@pytest.mark.parametrize(
    "command_where_no_directory_is_writable",
    ["read-only mounts", "no temporary directory"],
    indirect=True,
)
async def test_process_without_writable_directory_logs_blocked_loop_and_ends(
    start_command: CommandStarter,
    control_plane: ControlPlane,
    command_where_no_directory_is_writable: tuple[tuple[str, ...], dict[str, str]],
) -> None:
    control_plane.enqueue(metadata={"do": "block"})
    command = await start_command(
        "run", "handlers", WORKPOOL_MAX_BLOCK="1.5", **command_where_no_directory_is_writable[1]
    )
    assert await command.wait_for_exit() == 1
    assert "event loop blocked" in command.err
    assert "in block" in command.err, "the stack of the handler is printed"


async def test_blocked_loop_report_states_seconds_since_last_answer_of_loop(
    start_command: CommandStarter, control_plane: ControlPlane
) -> None:
    control_plane.enqueue(metadata={"do": "block"})
    command = await start_command("run", "handlers", WORKPOOL_MAX_BLOCK="2.5")
    started = read_timestamp_of_log_line(await command.wait_for_log("pool started"))
    line = await command.wait_for_log("event loop blocked")
    assert await command.wait_for_exit() == 1
    stated = re.search(r"seconds=(\d+\.\d+) ", line)
    assert stated is not None
    # The loop has answered after the start of the pool, and then not for `max_block` seconds. The
    # monitor's clock is inexact by some milliseconds. A unit test of `LoopMonitor` checks the exact
    # value.
    assert 2.4 <= float(stated[1]) <= read_timestamp_of_log_line(line) - started


@pytest.mark.parametrize("error", ["RuntimeError", "SystemExit", "KeyboardInterrupt"])
async def test_process_ends_with_status_1_if_log_handler_raises_while_loop_is_blocked(
    start_command: CommandStarter,
    control_plane: ControlPlane,
    command_working_directory: Path,
    error: str,
) -> None:
    (command_working_directory / "raising.py").write_text(RAISING_LOG.format(error=error))
    control_plane.enqueue(metadata={"do": "block"})
    command = await start_command("run", "raising", WORKPOOL_MAX_BLOCK="3600")
    assert await command.wait_for_exit() == 1
    assert "raised by a log handler" in command.err


@pytest.mark.parametrize("do", ["block", "linger"])
async def test_exporter_that_raises_system_exit_ends_process_with_status_1(
    start_command: CommandStarter,
    control_plane: ControlPlane,
    command_working_directory: Path,
    do: str,
) -> None:
    """The exporter raises SystemExit while a handler runs.

    The handler `block` blocks the event loop, and the handler `linger` does not.
    """
    (command_working_directory / "raising.py").write_text(
        RAISING_EXPORTER.format(error="SystemExit")
    )
    control_plane.enqueue(metadata={"do": do})
    command = await start_command("run", "raising", WORKPOOL_MAX_BLOCK="3600")
    url = (await command.wait_for_log("metrics served url=")).partition("url=")[2].split()[0]
    await command.wait_for_log(f"{do} runs")
    async with aiohttp.ClientSession() as http:
        with pytest.raises(aiohttp.ClientError):
            await http.get(url.removesuffix("metrics") + "healthz")
    assert await command.wait_for_exit() == 1
    assert "raised by the exporter" in command.err


async def test_handlers_run_their_cleanup_after_renewer_thread_failed(
    start_command: CommandStarter, control_plane: ControlPlane, command_working_directory: Path
) -> None:
    (command_working_directory / "raising.py").write_text(
        RAISING_EXPORTER.format(error="SystemExit")
    )
    (command_working_directory / "tidy.py").write_text(CLEANUP)
    control_plane.enqueue()
    command = await start_command("run", "tidy", "raising")
    url = (await command.wait_for_log("metrics served url=")).partition("url=")[2].split()[0]
    await command.wait_for_log("tidy runs")
    async with aiohttp.ClientSession() as http:
        with pytest.raises(aiohttp.ClientError):
            await http.get(url.removesuffix("metrics") + "healthz")
    assert await command.wait_for_exit() == 1
    assert "tidy cleans up" in command.err
    assert "pool failed" in command.err


async def test_handler_blocked_on_full_stderr_does_not_keep_process_running(
    control_plane: ControlPlane, command_working_directory: Path
) -> None:
    """The handler blocks in a write to stderr and holds the log handler's lock: nobody can log."""
    (command_working_directory / "flood.py").write_text(FLOOD)
    control_plane.enqueue()
    process = subprocess.Popen(  # noqa: ASYNC220 - it must not be read, which asyncio would
        (sys.executable, "-m", "workpool", "run", "flood"),
        cwd=command_working_directory,
        env=os.environ
        | {
            "WORKPOOL_BASE_URL": control_plane.base_url,
            "WORKPOOL_ENVIRONMENT_ID": ENVIRONMENT,
            "WORKPOOL_TOKEN": TOKEN,
            "WORKPOOL_METRICS_LISTEN": "off",
            "WORKPOOL_MAX_BLOCK": "1.5",
        },
        stderr=subprocess.PIPE,
    )
    with process:
        try:
            assert await asyncio.to_thread(process.wait, SECONDS) == 1
        finally:
            process.send_signal(signal.SIGKILL)
