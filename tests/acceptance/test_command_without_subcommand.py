"""Tests of `workpool` with no or an unknown command, and without the extra `workpool[cli]`."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

import pytest

import workpool

if TYPE_CHECKING:
    from tests.acceptance.conftest import CommandStarter

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]


async def test_command_without_arguments_prints_help(
    start_command_without_settings: CommandStarter,
) -> None:
    command = await start_command_without_settings()
    assert await command.wait_for_exit() == 0
    for name in ("demo", "run", "serve", "check", "plugins", "new", "work"):
        assert name in command.out


async def test_version_flag_prints_version(start_command_without_settings: CommandStarter) -> None:
    command = await start_command_without_settings("--version")
    assert await command.wait_for_exit() == 0
    assert command.out == f"workpool {workpool.__version__}\n"


async def test_unknown_command_ends_with_status_2(
    start_command_without_settings: CommandStarter,
) -> None:
    command = await start_command_without_settings("rnu")
    assert await command.wait_for_exit() == 2
    assert command.out == ""


@pytest.mark.parametrize("module", ["typer", "rich"])
async def test_command_without_cli_extra_says_how_to_install_it(module: str) -> None:
    code = f"import sys; sys.modules[{module!r}] = None; from workpool.cli import main; main()"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(45):
        out, err = await process.communicate()
    assert process.returncode == 2
    assert out == b""
    assert err.decode().splitlines() == [
        "workpool: the command line needs its extra: pip install 'workpool[cli]'"
    ]
