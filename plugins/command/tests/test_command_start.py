"""Tests of errors in settings, errors at a pool's start, and errors at a command's start."""

from __future__ import annotations

import errno
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

from workpool import PluginError, Release
from workpool.events import ItemDeclined, SessionFinished
from workpool_command import Command, CommandFailed
from workpool_command.command_result import release_or_fail_on_start_error

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from workpool.testing import Kit

    Shell = Callable[..., Command]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"command": "ls -l"}, "command: not a list of strings"),
        ({"command": []}, "command: names no program"),
        ({"command": [""]}, "command: names no program"),
        ({"command": ["ls", 1]}, "command: not a list of strings without NUL"),
        ({"command": ["l\0s"]}, "command: not a list of strings without NUL"),
        ({"command": ["./run"]}, "command: not an absolute path, nor a name"),
        ({"environment": ["PATH", "WORKPOOL_TOKEN"]}, "environment: WORKPOOL_TOKEN is never"),
        ({"environment": ["QODER_PAT"]}, "environment: QODER_PAT is never handed on"),
        ({"environment": ["ANTHROPIC_API_KEY"]}, "environment: ANTHROPIC_API_KEY is never"),
        ({"environment": "PATH"}, "environment: not a list of strings"),
        ({"grace": "10"}, "grace: not a number"),
        ({"grace": -1}, "grace: less than 0"),
        ({"grace": float("nan")}, "grace: less than 0, or no number"),
        ({"log_lines": 1.5}, "log_lines: not a number"),
        ({"keep": "yes"}, "keep: not true or false"),
        ({"keep": True}, "root: needed"),
        ({"detach": True}, "root: needed"),
        ({"detach": True, "root": "/tmp", "result": True}, "result: a command that was"),  # noqa: S108 - never used
        ({"timeout": 0}, "@handler: timeout of command must be more than 0"),
        ({"max_sessions": 0}, "@handler: max_sessions of command must be at least 1"),
        ({"metadata": {"n": 1}}, "@handler: metadata of command must map strings"),
        ({"comand": ["ls"]}, "unexpected keyword argument 'comand'"),
    ],
    ids=str,
)
def test_invalid_setting_is_refused_with_its_name(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        Command(**{"command": ["true"]} | settings)
    assert problem in str(caught.value)


@pytest.mark.parametrize("program", ["no-such-program", "{tmp}/absent", "{tmp}/plain", "{tmp}"])
async def test_pool_start_raises_plugin_error_if_program_is_not_executable(
    kit: Kit, tmp_path: Path, program: str
) -> None:
    (tmp_path / "plain").write_text("not executable")
    with pytest.raises(PluginError, match="is not an executable file on the PATH"):
        await kit.pool(Command(command=[program.format(tmp=tmp_path)])).run(until_empty=True)


async def test_program_is_looked_up_on_path_of_command_not_of_worker(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tool").write_text("#!/bin/sh\n")
    (tmp_path / "tool").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    assert (await kit.run_session(Command(command=["tool"]))).outcome == "completed"
    with pytest.raises(PluginError):
        await kit.run_session(Command(command=["tool"], environment=[]))


async def test_pool_start_raises_plugin_error_if_configured_root_is_regular_file(
    kit: Kit, shell_command: Shell, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PluginError, match="cannot be used here"):
        await kit.pool(shell_command("", root=tmp_path / "file")).run(until_empty=True)


async def test_pool_with_command_raises_plugin_error_if_worker_ignores_sigchld(
    kit: Kit, shell_command: Shell
) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with pytest.raises(PluginError, match="SIGCHLD is ignored"):
            await kit.pool(shell_command("")).run(until_empty=True)
    finally:
        signal.signal(signal.SIGCHLD, before)


async def test_second_pool_refuses_command_plugin_of_running_pool(
    kit: Kit, shell_command: Shell
) -> None:
    command = shell_command("")
    async with kit.pool(command):
        with pytest.raises(PluginError, match="one object serves one pool"):
            await kit.pool(command).run(until_empty=True)
    assert (await kit.run_session(command)).outcome == "completed"


async def test_error_names_program_that_vanished_after_start_of_pool(
    kit: Kit, tmp_path: Path
) -> None:
    program, root = tmp_path / "tool", tmp_path / "root"
    program.write_text("#!/nowhere/at/all\n")
    program.chmod(0o755)
    async with kit.pool(Command(command=[str(program), "hunter2"], root=root)):
        kit.enqueue()
        failed = await kit.wait_for(SessionFinished)
        root.rmdir()
        kit.enqueue()
        rootless = await kit.wait_for(SessionFinished, count=2)

    for end in (failed, rootless):
        assert end.outcome == "failed"
        assert isinstance(end.error, CommandFailed)
        assert str(end.error).startswith("tool: cannot be started: [Errno 2] No such file")
        assert "hunter2" not in str(end.error)


async def test_command_session_fails_if_its_directory_was_replaced_by_symlink(
    kit: Kit, shell_command: Shell, tmp_path: Path
) -> None:
    async with kit.pool(shell_command("touch owned", root=tmp_path / "root", keep=True)):
        [item] = kit.enqueue()
        await kit.wait_for(SessionFinished)
        directory = tmp_path / "root" / item.session_id
        directory.rename(tmp_path / "elsewhere")
        directory.symlink_to(tmp_path / "elsewhere")
        kit.enqueue(session_id=item.session_id)
        end = await kit.wait_for(SessionFinished, count=2)

    assert end.outcome == "failed"
    assert "File exists" in str(end.error)


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EMFILE, errno.ENOMEM])
def test_command_start_raises_release_exception_if_worker_resources_run_out(number: int) -> None:
    with pytest.raises(Release), release_or_fail_on_start_error("tool"):
        raise OSError(number, os.strerror(number))


async def test_command_with_metadata_setting_takes_only_matching_items(
    kit: Kit, shell_command: Shell
) -> None:
    kit.enqueue(metadata={"job": "other"})
    kit.enqueue(metadata={"job": "report"})
    async with kit.pool(shell_command("", metadata={"job": "report"}, max_sessions=1)):
        declined = await kit.wait_for(ItemDeclined)
        taken = await kit.wait_for(SessionFinished)

    assert declined.item.metadata["job"] == "other"
    assert (taken.session.item.metadata["job"], taken.handler) == ("report", "Command.run")
