"""Tests of the input, results and time limits of tools, and of errors at the plugin's start."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import pytest

from workpool import PluginError
from workpool_toolset import ToolCall, Toolset
from workpool_toolset.command_sandbox import Bubblewrap, ProcessLimits, find_sandbox_problem
from workpool_toolset.tool_result import ToolResult
from workpool_toolset.toolbox import CallLimits

if TYPE_CHECKING:
    from pathlib import Path

    from workpool.testing import Kit


@pytest.mark.parametrize(
    ("tool", "fields", "expected"),
    [
        ("bash", {}, "command is missing"),
        ("bash", {"command": "  "}, "command is missing"),
        ("bash", {"command": 1}, "command must be a string"),
        ("bash", {"command": "ls", "restart": "yes"}, "restart must be true or false"),
        ("bash", {"command": "ls", "timeout_ms": "1"}, "timeout_ms must be a number"),
        ("bash", {"command": "ls", "timeout": True}, "timeout_ms must be a number"),
        ("bash", {"command": "a\0b"}, "command holds a NUL"),
        ("read", {}, "file_path is missing"),
        ("read", {"file_path": None}, "file_path is missing"),
        ("read", {"file_path": ["a"]}, "file_path must be a string"),
        ("write", {"file_path": "a"}, "content is missing"),
        ("write", {"file_path": "a", "content": {"b": 1}}, "content must be a string"),
        ("edit", {"file_path": "a", "old_string": "b"}, "new_string is missing"),
        ("edit", {"file_path": "a", "new_string": "b"}, "old_string is missing"),
        ("glob", {}, "pattern is missing"),
        ("grep", {"path": "."}, "pattern is missing"),
        ("grep", {"pattern": "x", "include": 3}, "include must be a string"),
    ],
)
async def test_invalid_tool_input_is_answered_with_error_to_agent(
    agent_without_sandbox: Any, tool: str, fields: dict[str, Any], expected: str
) -> None:
    assert await agent_without_sandbox.expect_tool_error(tool, **fields) == expected


async def test_tool_ignores_unknown_fields_of_its_input(
    agent_without_sandbox: Any, workspace_directory: Path
) -> None:
    (workspace_directory / "a").write_text("x")
    assert (
        await agent_without_sandbox.expect_tool_success(
            "read", file_path="a", pages="1-2", limit=None
        )
        == "x"
    )


@pytest.mark.parametrize(
    ("value", "content"),
    [
        (None, ["(no output)"]),
        ("", ["(no output)"]),
        ([], ["(no output)"]),
        ("a\ud800b", ["a\ufffdb"]),
        ({"type": "text", "text": "a\udc00", "extra": 1}, ["a\ufffd"]),
        (["a", {"type": "text", "text": "b"}], ["a", "b"]),
        ([1, 2], ["[1, 2]"]),
        (0, ["0"]),
        (False, ["false"]),
        ({"type": "other"}, ['{"type": "other"}']),
        ({"a\ud800": 1}, ['{"a\ufffd": 1}']),
    ],
)
def test_return_value_of_tool_becomes_text_blocks(value: object, content: list[str]) -> None:
    result = ToolResult.from_value(value)
    assert [block["text"] for block in result.content] == content
    assert not result.is_error


def test_image_block_returned_by_tool_is_passed_on_unchanged() -> None:
    image = {"type": "image", "source": {"type": "base64", "data": "eA=="}}
    assert ToolResult.from_value([image, "text"]).content == [
        image,
        {"type": "text", "text": "text"},
    ]


def test_long_error_text_of_tool_result_is_cut_to_limit() -> None:
    [block] = ToolResult.from_error("x" * 10_000).content
    assert len(block["text"]) == 4_001


async def test_async_custom_tools_run_on_loop_and_sync_tools_in_threads(
    fake_agent_factory: Any,
) -> None:
    main = threading.current_thread()

    async def async_custom_tool(call: ToolCall) -> object:
        await asyncio.sleep(0)
        return [call.session, threading.current_thread() is main]

    def sync_custom_tool(call: ToolCall) -> object:
        return {"input": call.input, "thread": threading.current_thread() is main}

    def broken_tool(call: ToolCall) -> object:
        return {"a": object} if call.input else 1 / 0

    agent = fake_agent_factory(
        custom={"later": async_custom_tool, "plain": sync_custom_tool, "broken": broken_tool}
    )
    assert await agent.expect_tool_success("later", custom=True) == '["sess_1", true]'
    output = await agent.expect_tool_success("plain", custom=True, a=1)
    assert output == '{"input": {"a": 1}, "thread": false}'
    assert (
        await agent.expect_tool_error("broken", custom=True)
        == "broken: ZeroDivisionError: division by zero"
    )
    assert "class" in await agent.expect_tool_success("broken", custom=True, a=1)
    call = ToolCall(id="e", name="LATER", input={}, custom=True, session="s")
    assert not agent.toolbox.is_call_for_this_worker(call)


async def test_unexpected_tool_error_reveals_no_file_path_to_agent(
    agent_without_sandbox: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def raise_error(*_: object) -> None:
        raise LookupError("/secret/place")

    monkeypatch.setattr("workpool_toolset.file_tools.write_file", raise_error)
    assert (
        await agent_without_sandbox.expect_tool_error("write", file_path="a", content="b")
        == "write: LookupError"
    )
    assert "/secret/place" in caplog.text


async def test_custom_tool_beyond_time_limit_fails(fake_agent_factory: Any) -> None:
    async def never_return(_: ToolCall) -> None:
        await asyncio.sleep(600)

    agent = fake_agent_factory(
        custom={"sleep": never_return}, bounds=CallLimits(bash_seconds=20, tool_seconds=0.1)
    )
    assert await agent.expect_tool_error("sleep", custom=True) == "sleep: took more than 0.1 s"


async def test_command_timeout_above_limit_is_reduced_to_limit(fake_agent_factory: Any) -> None:
    agent = fake_agent_factory(bounds=CallLimits(bash_seconds=20, tool_seconds=10.2))
    output = await agent.expect_tool_error("bash", command="sleep 600", timeout_ms=3_600_000)
    assert output.startswith("killed after 0.2 s")


@pytest.mark.parametrize("timeout", [0, -1, -0.5, float("nan"), None])
async def test_command_with_timeout_of_zero_or_less_uses_default(
    fake_agent_factory: Any, timeout: object
) -> None:
    agent = fake_agent_factory(bounds=CallLimits(bash_seconds=0.3, tool_seconds=30))
    output = await agent.expect_tool_error("bash", command="sleep 600", timeout_ms=timeout)
    assert output.startswith("killed after 0.3 s")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"isolation": "docker"}, "isolation must be"),
        ({"state": "/dev/null/x"}, "state /dev/null/x: Not a directory"),
        ({"bash_timeout": 0}, "bash_timeout must be a number above 0"),
        ({"max_idle": "60"}, "max_idle must be a number above 0"),
        ({"max_idle": float("nan")}, "max_idle must be a number above 0"),
        ({"processes": 1.5}, "processes must be a whole number"),
        ({"memory_mb": True}, "memory_mb must be a number above 0"),
        ({"bash_timeout": 145.0}, "tool_timeout must exceed bash_timeout by 10"),
        ({"tools": {"a": "no.such:thing"}}, "tool 'a': no.such:thing cannot be loaded"),
        ({"tools": {"a": "json:nothing"}}, "cannot be loaded"),
        ({"tools": {"a": ""}}, "cannot be loaded"),
        ({"tools": {"a": 3}}, "neither a function nor"),
        ({"allowed_roots": ["/no/such"]}, "root /no/such: not a directory"),
        ({"state": "/usr/x", "isolation": "bubblewrap"}, "/usr/x: lies in /usr, which sessions"),
        ({"state": "/etc/ssl/certs/x", "isolation": "bubblewrap"}, "lies in /etc/ssl/certs"),
        ({"read_only_roots": ["/"], "isolation": "bubblewrap"}, "root /: shows "),
    ],
)
async def test_invalid_toolset_setting_is_error_at_start(
    workpool: Kit, tmp_path: Path, settings: dict[str, Any], problem: str
) -> None:
    toolset = Toolset(**{"isolation": "none", "state": str(tmp_path)} | settings)
    with pytest.raises(PluginError) as caught:
        async with workpool.pool(toolset):
            pass
    assert problem in str(caught.value)


async def test_token_file_in_directory_visible_to_sandbox_is_refused(
    workpool: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workpool_toolset.plugin.VISIBLE_PATHS", (str(tmp_path / "system"),))
    (tmp_path / "system").mkdir()
    (tmp_path / "system/token").write_text("a-token")
    (tmp_path / "link").symlink_to("system/token")
    toolset = Toolset(state=str(tmp_path / "state"))
    with pytest.raises(PluginError, match=r"link: lies in .*system, which sessions may read"):
        async with workpool.pool(toolset, token=None, token_file=tmp_path / "link"):
            pass


async def test_read_only_root_that_contains_token_file_is_refused_at_start(
    workpool: Kit, tmp_path: Path
) -> None:
    (tmp_path / "open/secrets").mkdir(parents=True)
    (tmp_path / "open/secrets/token").write_text("a-token")
    toolset = Toolset(state=str(tmp_path / "state"), read_only_roots=[str(tmp_path / "open")])
    pool = workpool.pool(toolset, token=None, token_file=tmp_path / "open/secrets/token")
    with pytest.raises(PluginError, match="shows"):
        async with pool:
            pass


async def test_read_only_root_is_refused_if_session_can_replace_directory_above_it(
    workpool: Kit, tmp_path: Path
) -> None:
    """With the roots `open` and `open/between/deep`, a session can replace `between` by a link."""
    deep = tmp_path / "open/between/deep"
    deep.mkdir(parents=True)
    roots = [str(tmp_path / "open"), str(tmp_path / "open/between")]

    def make_toolset(*allowed: str, isolation: str = "none", also: tuple[str, ...] = ()) -> Toolset:
        return Toolset(
            isolation=isolation,
            state=str(tmp_path / "state"),
            allowed_roots=allowed,
            read_only_roots=(*also, str(deep)),
        )

    with pytest.raises(PluginError, match=r"deep: .*between, in root .*open, must be a root, too"):
        async with workpool.pool(make_toolset(roots[0], isolation="bubblewrap")):
            pass
    for toolset in (make_toolset(*roots), make_toolset(also=(roots[0],))):
        async with workpool.pool(toolset):
            pass


async def test_broken_or_missing_bubblewrap_is_error_at_start(
    workpool: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: no permission' >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(PluginError, match=r"\(bwrap: no permission\); isolation = \"none\""):
        async with workpool.pool(Toolset(state=str(tmp_path / "state"))):
            pass
    broken.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PluginError, match="bwrap is not installed"):
        async with workpool.pool(Toolset(state=str(tmp_path / "state"))):
            pass


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize("isolation", ["none", "bubblewrap"])
async def test_pool_start_logs_isolation_of_toolset(
    workpool: Kit, tmp_path: Path, isolation: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with workpool.pool(Toolset(state=str(tmp_path / "state"), isolation=isolation)):
        assert f"toolset: isolation is {isolation}" in caplog.text
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700


async def test_sandbox_that_cannot_be_checked_is_error_at_start(
    workpool: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def raise_permission_error(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("workpool_toolset.plugin.find_sandbox_problem", raise_permission_error)
    with pytest.raises(PluginError, match=r"\(Operation not permitted\)"):
        async with workpool.pool(Toolset(state=str(tmp_path / "state"))):
            pass


async def test_sandbox_check_reports_problem_if_bubblewrap_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = tmp_path / "bwrap"
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    silent.chmod(0o755)
    monkeypatch.setattr("workpool_toolset.command_sandbox.PROBE_SECONDS", 0.2)
    sandbox = Bubblewrap(ProcessLimits(), as_root=False, program=str(silent))
    assert await find_sandbox_problem(sandbox, tmp_path) == "bwrap did not answer"


async def test_toolset_refuses_session_id_with_path_characters(tmp_path: Path) -> None:
    toolset = Toolset(state=str(tmp_path / "state"), isolation="none")
    for session in ("../x", "a/b", "", ".", "..", "a\0", "x" * 129):
        with pytest.raises(ValueError, match="name"):
            toolset._session_directory(session)
