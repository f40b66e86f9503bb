"""Tests of the tools `read`, `write` and `edit`, called as an agent calls them."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from workpool import DaemonThreads
from workpool_toolset import file_tools
from workpool_toolset.file_tools import FileSizeLimits
from workpool_toolset.toolbox import THREAD_COUNT, CallLimits, ToolThreads
from workpool_toolset.workspace import WorkspaceRoot


async def test_written_file_is_read_back_unchanged(
    agent_without_sandbox: Any, workspace_directory: Path
) -> None:
    content = "one\r\ntwo\n\n  é✓\n"
    output = await agent_without_sandbox.expect_tool_success(
        "Write", file_path="new/deep/a.txt", content=content
    )
    assert output == f"wrote {len(content.encode())} bytes to new/deep/a.txt"
    assert (workspace_directory / "new/deep/a.txt").read_bytes() == content.encode()
    assert (
        await agent_without_sandbox.expect_tool_success("Read", file_path="new/deep/a.txt")
        == content
    )
    assert (
        await agent_without_sandbox.expect_tool_success(
            "read", path=f"{workspace_directory}/./new/../new/deep/a.txt"
        )
        == content
    )
    assert [path.name for path in (workspace_directory / "new/deep").iterdir()] == ["a.txt"]


async def test_file_keeps_mode_but_loses_setuid_bit_when_it_is_overwritten(
    agent_without_sandbox: Any, workspace_directory: Path
) -> None:
    (workspace_directory / "run.sh").write_text("old")
    (workspace_directory / "run.sh").chmod(0o4750)
    await agent_without_sandbox.expect_tool_success("write", file_path="run.sh", content="new")
    assert stat.S_IMODE((workspace_directory / "run.sh").stat().st_mode) == 0o750


async def test_links_inside_workspace_are_followed(
    agent_without_sandbox: Any, workspace_directory: Path
) -> None:
    (workspace_directory / "real").mkdir()
    (workspace_directory / "link").symlink_to("real")
    (workspace_directory / "absolute").symlink_to(workspace_directory / "link")
    (workspace_directory / "dangling").symlink_to("absolute/later.txt")
    await agent_without_sandbox.expect_tool_success("write", file_path="dangling", content="here")
    assert (workspace_directory / "real/later.txt").read_text() == "here"
    assert (workspace_directory / "dangling").is_symlink()
    assert (
        await agent_without_sandbox.expect_tool_success("read", file_path="absolute/later.txt")
        == "here"
    )
    for number in range(40):
        (workspace_directory / f"hop{number}").symlink_to(f"hop{number + 1}")
    (workspace_directory / "hop40").write_text("end")
    assert await agent_without_sandbox.expect_tool_success("read", file_path="hop0") == "end"
    (workspace_directory / "hop").symlink_to("hop0")
    assert "too many levels" in await agent_without_sandbox.expect_tool_error(
        "read", file_path="hop"
    )


LINES = "one\ntwo\nthree\nfour"


@pytest.mark.parametrize(
    ("fields", "selected"),
    [
        ({"view_range": [1, 2]}, "one\ntwo\n"),
        ({"view_range": [2, 2]}, "two\n"),
        ({"view_range": [3, 0]}, "three\nfour"),
        ({"view_range": [4, -1]}, "four"),
        ({"view_range": [0, 1]}, "one\n"),
        ({"view_range": []}, LINES),
        ({"view_range": [0, 0]}, LINES),
        ({"view_range": [2.0, 3.0]}, "two\nthree\n"),
        ({"view_range": [1.5, 2.9]}, "one\ntwo\n"),
        ({"view_range": ["2", "3"]}, "two\nthree\n"),
        ({"view_range": ["2.0", 3]}, "two\nthree\n"),
        ({"offset": "2", "limit": 2.0}, "two\nthree\n"),
        ({"offset": 0, "limit": 1}, "one\n"),
        ({"view_range": [2, 99]}, "two\nthree\nfour"),
        ({"offset": 2, "limit": 2}, "two\nthree\n"),
        ({"offset": 3}, "three\nfour"),
        ({"limit": 1}, "one\n"),
    ],
)
async def test_read_with_range_returns_selected_lines(
    agent_without_sandbox: Any, workspace_directory: Path, fields: dict[str, Any], selected: str
) -> None:
    (workspace_directory / "lines").write_text(LINES)
    assert (
        await agent_without_sandbox.expect_tool_success("read", file_path="lines", **fields)
        == selected
    )


@pytest.mark.parametrize("fields", [{"offset": "x"}, {"limit": True}, {"limit": [1]}])
async def test_file_read_with_offset_or_limit_that_is_no_number_is_refused(
    agent_without_sandbox: Any, workspace_directory: Path, fields: dict[str, Any]
) -> None:
    (workspace_directory / "lines").write_text(LINES)
    [name] = fields
    assert (
        await agent_without_sandbox.expect_tool_error("read", file_path="lines", **fields)
        == f"{name} must be a number"
    )


@pytest.mark.parametrize(
    "view_range",
    [
        [3, 2],
        [5, 0],
        [1],
        "1-2",
        [1, "x"],
        [-1, 2],
        [True, 2],
        [1, 2, 3],
        ["nan", 2],
        [1e400, 2],
        {},
    ],
)
async def test_file_read_with_malformed_line_range_is_refused(
    agent_without_sandbox: Any, workspace_directory: Path, view_range: object
) -> None:
    (workspace_directory / "lines").write_text(LINES)
    await agent_without_sandbox.expect_tool_error("read", file_path="lines", view_range=view_range)


async def test_read_of_large_file_fails_unless_request_gives_a_line_range(
    agent_without_sandbox: Any, workspace_directory: Path
) -> None:
    line = "é" * 49 + "\n"
    (workspace_directory / "large").write_text(line * 10_000)
    assert "view_range" in await agent_without_sandbox.expect_tool_error("read", file_path="large")
    assert (
        await agent_without_sandbox.expect_tool_success(
            "read", file_path="large", view_range=[9_999, 0]
        )
        == line * 2
    )
    cut = await agent_without_sandbox.expect_tool_success(
        "read", file_path="large", view_range=[2, 0]
    )
    assert cut.endswith("[cut after 262144 bytes]")
    assert "\ufffd" not in cut
    assert "larger" in await agent_without_sandbox.expect_tool_error(
        "edit", file_path="large", old_string="é", new_string="e", replace_all=True
    )


async def test_slow_reads_of_huge_file_do_not_block_reads_of_other_sessions(
    fake_agent_factory: Any, workspace_directory: Path
) -> None:
    (workspace_directory / "small").write_text("here")
    with (workspace_directory / "large").open("wb") as file:
        file.truncate(1 << 40)
    threads = ToolThreads(DaemonThreads("test", 2), DaemonThreads("test", 2))
    hostile = fake_agent_factory(
        bounds=CallLimits(bash_seconds=20, tool_seconds=0.1), threads=threads
    )
    async with asyncio.TaskGroup() as group:
        for _ in range(6):
            group.create_task(hostile.call_tool("read", file_path="large", view_range=[9, 9]))
    assert (
        await fake_agent_factory(threads=threads).expect_tool_success("read", file_path="small")
        == "here"
    )
    await threads.files.close()


async def test_file_read_with_line_range_stops_at_byte_limit_and_time_limit(
    agent_without_sandbox: Any, workspace_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workspace_directory / "lines").write_text("line\n" * 100_000)
    output = "lines: the lines begin or end beyond the first 131072 bytes, which is as far"
    monkeypatch.setattr(file_tools, "MAX_SCANNED_BYTES", 100_000)
    far = await agent_without_sandbox.expect_tool_error(
        "read", file_path="lines", view_range=[90_000, 90_001]
    )
    assert far.startswith(output)
    assert far.endswith("use bash, for example tail -c or dd")
    assert (
        await agent_without_sandbox.expect_tool_success(
            "read", file_path="lines", view_range=[20_000, 20_001]
        )
        == "line\n" * 2
    )
    monkeypatch.undo()
    assert (
        await agent_without_sandbox.expect_tool_success(
            "read", file_path="lines", view_range=[90_000, 90_000]
        )
        == "line\n"
    )
    monkeypatch.setattr(file_tools, "SCAN_SECONDS", 0.0)
    await agent_without_sandbox.expect_tool_error(
        "read", file_path="lines", view_range=[90_000, 90_001]
    )


async def test_file_tools_still_run_while_custom_tools_block_their_threads(
    fake_agent_factory: Any, workspace_directory: Path
) -> None:
    release = threading.Event()
    (workspace_directory / "small").write_text("here")
    bounds = CallLimits(bash_seconds=20, tool_seconds=0.1)
    agent = fake_agent_factory(custom={"hang": lambda _: release.wait()}, bounds=bounds)
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(2 * THREAD_COUNT):
                group.create_task(agent.call_tool("hang", custom=True))
        assert await fake_agent_factory().expect_tool_success("read", file_path="small") == "here"
    finally:
        release.set()


async def test_configured_size_limits_apply_to_each_type_of_file(
    fake_agent_factory: Any, workspace_directory: Path
) -> None:
    bounds = CallLimits(
        bash_seconds=20, tool_seconds=30, sizes=FileSizeLimits(text=10, image=20, pdf=30)
    )
    agent = fake_agent_factory(bounds=bounds)
    for name, limit in (("a.txt", 10), ("b.png", 20), ("c.pdf", 30)):
        (workspace_directory / name).write_bytes(b"x" * limit)
        assert not (await agent.call_tool("read", file_path=name)).is_error
        (workspace_directory / name).write_bytes(b"x" * (limit + 1))
        assert (await agent.expect_tool_error("read", file_path=name)).startswith(
            f"{name}: larger than {limit} bytes"
        )


async def test_edit_of_file_above_size_limit_fails_with_error_that_suggests_bash(
    agent_without_sandbox: Any, workspace_directory: Path
) -> None:
    (workspace_directory / "large").write_text("a" * 300_000)
    fields = {"file_path": "large", "old_string": "a", "new_string": "b"}
    assert await agent_without_sandbox.expect_tool_error("edit", **fields) == (
        "large: larger than 262144 bytes; change it with bash, for example with sed"
    )


async def test_images_and_pdfs_are_returned_as_blocks(
    agent_without_sandbox: Any, workspace_directory: Path
) -> None:
    (workspace_directory / "a.PNG").write_bytes(b"\x89PNG")
    (workspace_directory / "b.pdf").write_bytes(b"%PDF")
    [image] = (await agent_without_sandbox.call_tool("read", file_path="a.PNG")).content
    assert (image["type"], image["source"]["media_type"]) == ("image", "image/png")
    assert base64.b64decode(image["source"]["data"]) == b"\x89PNG"
    [document] = (await agent_without_sandbox.call_tool("read", file_path="b.pdf")).content
    assert (document["type"], document["source"]["media_type"]) == ("document", "application/pdf")
    await agent_without_sandbox.expect_tool_error("read", file_path="a.PNG", view_range=[1, 2])
    (workspace_directory / "huge.jpg").write_bytes(b"x" * (4 * 1024 * 1024))
    assert "larger" in await agent_without_sandbox.expect_tool_error("read", file_path="huge.jpg")


async def test_read_or_write_of_non_text_file_is_refused(
    agent_without_sandbox: Any, workspace_directory: Path
) -> None:
    (workspace_directory / "binary").write_bytes(b"\xff\xfe\x00")
    (workspace_directory / "empty").touch()
    (workspace_directory / "directory").mkdir()
    os.mkfifo(workspace_directory / "pipe")
    assert "UTF-8" in await agent_without_sandbox.expect_tool_error("read", file_path="binary")
    assert "is a directory" in await agent_without_sandbox.expect_tool_error(
        "read", file_path="directory"
    )
    assert "is a directory" in await agent_without_sandbox.expect_tool_error(
        "write", file_path=".", content="x"
    )
    assert "is a directory" in await agent_without_sandbox.expect_tool_error(
        "write", file_path="directory", content="x"
    )
    assert "regular" in await agent_without_sandbox.expect_tool_error("read", file_path="pipe")
    assert "regular" in await agent_without_sandbox.expect_tool_error(
        "write", file_path="pipe", content="x"
    )
    assert "no such file" in await agent_without_sandbox.expect_tool_error(
        "read", file_path="missing"
    )
    assert "not a directory" in await agent_without_sandbox.expect_tool_error(
        "write", file_path="empty/x", content="x"
    )
    assert "surrogates" in await agent_without_sandbox.expect_tool_error(
        "write", file_path="x", content="\ud800"
    )
    assert (
        await agent_without_sandbox.expect_tool_success("read", file_path="empty") == "(no output)"
    )


async def test_edit_with_result_above_limit_is_refused(
    agent_without_sandbox: Any, workspace_directory: Path
) -> None:
    (workspace_directory / "small").write_text("a" * 250_000)
    fields = {"file_path": "small", "old_string": "a", "new_string": "b" * 4_000_000}
    failed = await agent_without_sandbox.expect_tool_error("edit", **fields, replace_all=True)
    assert failed == "small: would be larger than 33554432 characters"
    assert (workspace_directory / "small").stat().st_size == 250_000
    fields["new_string"] = "bb"
    assert "replaced 250000" in await agent_without_sandbox.expect_tool_success(
        "edit", **fields, replace_all=True
    )


async def test_edit_of_text_that_occurs_several_times_needs_replace_all_option(
    agent_without_sandbox: Any, workspace_directory: Path
) -> None:
    path = workspace_directory / "code.py"
    path.write_text("a = 1\nb = 1\n")
    assert await agent_without_sandbox.expect_tool_success(
        "edit", file_path="code.py", old_string="a = 1", new_string="a = 2"
    ) == ("replaced 1 occurrence in code.py")
    failed = await agent_without_sandbox.expect_tool_error(
        "edit", file_path="code.py", old_string=" = ", new_string=": "
    )
    assert "2 times" in failed
    assert "not found" in await agent_without_sandbox.expect_tool_error(
        "edit", file_path="code.py", old_string="c", new_string="d"
    )
    output = await agent_without_sandbox.expect_tool_success(
        "edit", file_path="code.py", old_string=" = ", new_string=": ", replace_all=True
    )
    assert output == "replaced 2 occurrences in code.py"
    assert path.read_text() == "a: 2\nb: 1\n"
    for old, new in [("", "x"), ("a", "a")]:
        await agent_without_sandbox.expect_tool_error(
            "edit", file_path="code.py", old_string=old, new_string=new
        )
    await agent_without_sandbox.expect_tool_error(
        "edit", file_path="gone/code.py", old_string="a", new_string="b"
    )
    assert not (workspace_directory / "gone").exists()


async def test_additional_roots_are_writable_or_read_only_as_configured(
    fake_agent_factory: Any, workspace_directory: Path, tmp_path: Path
) -> None:
    shared, frozen, nested = tmp_path / "shared", tmp_path / "frozen", tmp_path / "shared/frozen"
    nested.mkdir(parents=True)
    frozen.mkdir()
    (frozen / "a").write_text("kept")
    (workspace_directory / "to").symlink_to(shared)
    roots = [
        WorkspaceRoot(str(shared), shared),
        *(WorkspaceRoot(str(r), r, writable=False) for r in (frozen, nested)),
    ]
    agent = fake_agent_factory(roots=roots)
    await agent.expect_tool_success("write", file_path=f"{shared}/b", content="new")
    assert await agent.expect_tool_success("read", file_path="to/b") == "new"
    assert await agent.expect_tool_success("read", file_path=f"{frozen}/a") == "kept"
    for path in (f"{frozen}/a", f"{nested}/a", "to/frozen/a", f"{frozen}/made/a"):
        assert "read-only" in await agent.expect_tool_error("write", file_path=path, content="x")
    assert "read-only" in await agent.expect_tool_error(
        "edit", file_path=f"{frozen}/a", old_string="kept", new_string="x"
    )
    assert await agent.expect_tool_success("glob", pattern="*", path=str(frozen)) == f"{frozen}/a\n"
    assert (
        await agent.expect_tool_success("grep", pattern="new", path="to") == f"{shared}/b:1:new\n"
    )
    assert not (frozen / "made").exists()


async def test_file_tools_reach_every_path_if_slash_is_allowed_root(
    fake_agent_factory: Any, workspace_directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "outside").write_text("seen")
    (workspace_directory / "link").symlink_to("/")
    agent = fake_agent_factory(roots=[WorkspaceRoot("/", Path("/"))])
    for path in (f"{tmp_path}/outside", "../outside", f"link{tmp_path}/outside"):
        assert await agent.expect_tool_success("read", file_path=path) == "seen"


async def test_sandboxed_shell_writes_allowed_root_but_not_read_only_root(
    fake_agent_factory: Any, sandbox: Any, tmp_path: Path
) -> None:
    shared, frozen = tmp_path / "shared", tmp_path / "frozen"
    for path in (shared, frozen):
        path.mkdir()
        path.chmod(0o777)
        (path / "a").write_text("here\n")
    roots = (WorkspaceRoot(str(shared), shared), WorkspaceRoot(str(frozen), frozen, writable=False))
    agent = fake_agent_factory(isolation=dataclasses.replace(sandbox, roots=roots), roots=roots)
    assert (
        await agent.expect_tool_success("bash", command=f"cat {shared}/a {frozen}/a")
        == "here\nhere\n"
    )
    await agent.expect_tool_success("bash", command=f"echo b > {shared}/b")
    assert await agent.expect_tool_success("read", file_path=f"{shared}/b") == "b\n"
    failed = await agent.expect_tool_error("bash", command=f"echo b > {frozen}/b")
    assert "Read-only file system" in failed
    assert (
        await agent.expect_tool_success("grep", pattern="here", path=str(frozen))
        == f"{frozen}/a:1:here\n"
    )
    assert "No such file" in await agent.expect_tool_error(
        "bash", command=f"cat {tmp_path}/outside"
    )


async def test_file_tools_and_sandboxed_shell_see_same_files(
    agent_with_sandbox: Any, workspace_directory: Path
) -> None:
    await agent_with_sandbox.expect_tool_success(
        "write", file_path="/workspace/made/by-tool", content="one\n"
    )
    await agent_with_sandbox.expect_tool_success(
        "bash", command="echo two >> made/by-tool; mkdir sub; echo three > sub/by-bash"
    )
    assert (
        await agent_with_sandbox.expect_tool_success("read", file_path="made/by-tool")
        == "one\ntwo\n"
    )
    await agent_with_sandbox.expect_tool_success(
        "edit", file_path="sub/by-bash", old_string="three", new_string="four"
    )
    await agent_with_sandbox.expect_tool_success(
        "bash", command="rm -r made && echo five >> /workspace/sub/by-bash"
    )
    assert (workspace_directory / "sub/by-bash").read_text() == "four\nfive\n"
