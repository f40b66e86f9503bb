"""Tests of a command's input and directory, and of the outcome of its session."""

from __future__ import annotations

import json
import signal
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from workpool.events import SessionFinished
from workpool_command import CommandFailed

if TYPE_CHECKING:
    from collections.abc import Callable

    from workpool.testing import Kit
    from workpool_command import Command

    Shell = Callable[..., Command]


async def test_command_receives_ids_and_item_but_no_credentials(
    kit: Kit, shell_command: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORKPOOL_TOKEN", "QODER_PAT", "ANTHROPIC_ENVIRONMENT_KEY", "AWS_SECRET"):
        monkeypatch.setenv(name, "hunter2")
    monkeypatch.setenv("GREETING", "hello")

    result = await kit.run_session(
        shell_command("cat >$0/item; env >$0/env", tmp_path, environment=["PATH", "GREETING"]),
        metadata={"job": "report"},
    )

    assert result.outcome == "completed"
    item = json.loads((tmp_path / "item").read_text())
    assert item["id"] == result.item.id
    assert item["data"] == {"type": "session", "id": result.item.session_id}
    assert item["metadata"] == {"job": "report"}
    assert item["acknowledged_at"].endswith("Z")
    lines = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines())
    assert lines["WORKPOOL_WORK_ID"] == result.item.id
    assert lines["WORKPOOL_SESSION_ID"] == result.item.session_id
    assert lines["WORKPOOL_ENVIRONMENT_ID"] == kit.server.environments[0]
    assert lines["WORKPOOL_REDELIVERED"] == "0"
    assert lines["GREETING"] == "hello"
    assert "hunter2" not in (tmp_path / "env").read_text()
    expected = {"PATH", "GREETING", "PWD", "OLDPWD", "SHLVL", "_"}
    assert {name for name in lines if not name.startswith("WORKPOOL_")} <= expected


async def test_command_has_own_directory_below_configured_root_until_session_ends(
    kit: Kit, shell_command: Shell, tmp_path: Path
) -> None:
    root, note = tmp_path / "sessions", tmp_path / "note"
    script = "pwd >$0; stat -c %a . >>$0; mkdir -p a/b; touch a/b/c; chmod 500 a/b a"

    result = await kit.run_session(shell_command(script, note, root=root))

    assert result.outcome == "completed"
    cwd, mode = note.read_text().splitlines()
    assert (Path(cwd).parent, mode) == (root, "700")
    assert Path(cwd).name.startswith(result.item.session_id)
    assert list(root.iterdir()) == []
    assert stat.S_IMODE(root.stat().st_mode) == 0o700


async def test_next_run_of_session_reuses_directory_if_keep_setting_is_true(
    kit: Kit, shell_command: Shell, tmp_path: Path
) -> None:
    command = shell_command("test -e here && exit 3; touch here", root=tmp_path, keep=True)
    [item] = kit.enqueue()
    async with kit.pool(command):
        await kit.wait_for(SessionFinished)
        kit.enqueue(session_id=item.session_id)
        last = await kit.wait_for(SessionFinished, count=2)

    assert str(last.error) == "sh: exit status 3"
    assert stat.S_IMODE((tmp_path / item.session_id).stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("script", "problem", "status"),
    [
        ("exit 3", "sh: exit status 3", 3),
        ("kill -SEGV $$", "sh: killed by SIGSEGV", -signal.SIGSEGV),
        ("kill -40 $$", "sh: killed by signal 40", -40),
    ],
)
async def test_error_of_failed_command_names_exit_status_or_signal(
    kit: Kit, shell_command: Shell, script: str, problem: str, status: int
) -> None:
    result = await kit.run_session(shell_command(script), report_errors="message")

    assert (result.outcome, result.item.state) == ("failed", "stopped")
    assert result.metadata["workpool.error"] == f"CommandFailed: {problem}"
    assert isinstance(result.error, CommandFailed)
    assert (result.error.program, result.error.status) == ("sh", status)


async def test_command_session_is_released_if_command_exits_with_ex_tempfail(
    kit: Kit, shell_command: Shell
) -> None:
    result = await kit.run_session(shell_command("exit 75"), report_errors="message")

    assert result.outcome == "released"
    assert result.metadata["workpool.released"] == "sh: exit status 75"
    assert result.item.state != "stopped"


async def test_last_output_line_becomes_metadata_only_if_result_setting_is_true(
    kit: Kit, shell_command: Shell
) -> None:
    script = """echo '{"rows": "1"}'; echo '{"rows": "42", "é": "ü"}'; echo; echo no >&2"""

    with_result = await kit.run_session(shell_command(script, result=True))
    assert (with_result.outcome, dict(with_result.metadata)) == (
        "completed",
        {"rows": "42", "é": "ü"},
    )

    without_result = await kit.run_session(shell_command(script))
    assert (without_result.outcome, dict(without_result.metadata)) == ("completed", {})


@pytest.mark.parametrize(
    "line",
    [
        "",
        "done",
        '["rows"]',
        '{"rows": 42}',
        '{"rows": "\\ud800"}',
        '{"rows": "\\377"}',
        "{",
        f'{{"rows": "{"x" * 66_000}"}}',
        "[" * 60_000,
    ],
    ids=["empty", "text", "list", "number", "surrogate", "bytes", "cut", "long", "deep"],
)
async def test_last_output_line_that_is_no_json_object_of_strings_fails_session(
    kit: Kit, shell_command: Shell, tmp_path: Path, line: str
) -> None:
    (tmp_path / "line").write_bytes(line.encode("latin-1", "replace"))

    result = await kit.run_session(shell_command("cat $0/line", tmp_path, result=True))

    assert result.outcome == "failed"
    assert isinstance(result.error, CommandFailed)
    assert str(result.error).startswith("sh: its last line ")
    assert "rows" not in str(result.error)
