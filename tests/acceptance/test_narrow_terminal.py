"""Tables on narrow terminals: every id is shown in full."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import termios
from typing import TYPE_CHECKING

import pytest

from tests.acceptance.conftest import ENVIRONMENT, SECONDS, TOKEN
from tests.acceptance.test_demo_command import read_terminal_until_closed

if TYPE_CHECKING:
    from pathlib import Path

    from workpool.server import ControlPlane

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]

WIDTHS = pytest.mark.parametrize("width", [20, 40, 60, 80, 200])


async def run_command_and_read_terminal_lines(
    plane: ControlPlane, folder: Path, width: int, *arguments: str
) -> list[str]:
    """Return the lines that a command prints on a real terminal of this width."""
    master, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, width))
    unset = {"COLUMNS", "LINES", "WORKPOOL_PLUGINS"}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "workpool", *arguments),
        env={
            **{name: value for name, value in os.environ.items() if name not in unset},
            "TERM": "xterm",
            "WORKPOOL_BASE_URL": plane.base_url,
            "WORKPOOL_ENVIRONMENT_ID": ENVIRONMENT,
            "WORKPOOL_TOKEN": TOKEN,
        },
        cwd=folder,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    with os.fdopen(master, "rb", buffering=0) as screen:
        async with asyncio.timeout(SECONDS):
            printed = await asyncio.to_thread(read_terminal_until_closed, screen.fileno())
            assert await process.wait() == 0, printed
    return re.sub(r"\x1b\[[0-9;]*m", "", printed.decode()).splitlines()


@WIDTHS
async def test_work_list_command_on_narrow_terminal_shows_whole_ids(
    control_plane: ControlPlane, command_working_directory: Path, width: int
) -> None:
    items = control_plane.enqueue(count=3, metadata={"job": "a job with a long description" * 3})
    lines = await run_command_and_read_terminal_lines(
        control_plane, command_working_directory, width, "work", "list"
    )
    for item in items:
        assert sum(item.id in line for line in lines) == 1
    columns = lines[1].split()
    assert (
        columns
        == {
            20: ["id"],
            40: ["id"],
            60: ["id", "type", "state"],
            80: ["id", "type", "state", "metadata"],
            200: ["id", "type", "state", "created", "session", "metadata"],
        }[width]
    )
    if "session" in columns:
        assert all(item.session_id in "".join(lines) for item in items)


@WIDTHS
async def test_work_get_command_on_narrow_terminal_shows_whole_ids(
    control_plane: ControlPlane, command_working_directory: Path, width: int
) -> None:
    [item] = control_plane.enqueue(metadata={"job": "a job with a long description" * 3})
    lines = await run_command_and_read_terminal_lines(
        control_plane, command_working_directory, width, "work", "get", item.id
    )
    for text in (item.id, item.session_id, ENVIRONMENT):
        assert any(text in line for line in lines), text
    assert any("metadata" in line for line in lines)


async def test_plugins_command_on_narrow_terminal_shows_whole_names(
    control_plane: ControlPlane, command_working_directory: Path
) -> None:
    lines = await run_command_and_read_terminal_lines(
        control_plane, command_working_directory, 40, "plugins", "handlers"
    )
    assert any("handlers.finish" in line for line in lines)
