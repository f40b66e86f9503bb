"""Tests of tools and sessions on a machine without free memory, threads or descriptors."""

from __future__ import annotations

import errno
import os
import resource
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from workpool.errors import exhausted
from workpool_toolset import Toolset
from workpool_toolset.call_journal import CallJournal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workpool.testing import Kit


SPARE_DESCRIPTORS = 256


@contextmanager
def file_descriptor_limit(count: int) -> Iterator[None]:
    """Allow this process to open only `count` more descriptors during the `with` block.

    Child processes inherit the limit, so it stays above the highest descriptor that a shell uses.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.dup(0)]
    try:
        highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + SPARE_DESCRIPTORS, hard))
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        for _ in range(count):
            os.close(taken.pop())
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("left", range(13))
async def test_tool_call_reports_exhaustion_if_no_file_descriptors_are_free(
    agent_without_sandbox: Any, workspace_directory: Path, left: int
) -> None:
    """Depending on the number of free descriptors, a different step of the tool fails."""
    (workspace_directory / "a").write_text("b\n")
    calls: list[tuple[str, dict[str, Any], str]] = [
        ("read", {"file_path": "a"}, "b\n"),
        ("write", {"file_path": "a", "content": "b\n"}, "wrote 2 bytes to a"),
        ("grep", {"pattern": "b"}, "a:1:b\n"),
        ("bash", {"command": "echo out"}, "out\n"),
    ]
    outcomes = set()
    for tool, fields, expected in calls:
        with file_descriptor_limit(left):
            result = await agent_without_sandbox.call_tool(tool, **fields)
        output = result.content[0]["text"]
        assert output == expected or output.endswith(": the worker has run out of resources"), (
            output
        )
        outcomes.add(result.is_error)
    if left in {0, 12}:
        assert outcomes == {left == 0}
    # If the shell could not start, the next command starts the shell without `restart`.
    assert (
        await agent_without_sandbox.expect_tool_success("bash", command="echo later") == "later\n"
    )


@pytest.mark.parametrize("left", range(3))
async def test_journal_reports_call_as_new_again_if_record_of_its_begin_could_not_be_written(
    tmp_path: Path, tool_threads: Any, left: int
) -> None:
    journal = CallJournal(tmp_path / "journal", tool_threads.files)
    await journal.open_directory()
    with file_descriptor_limit(left):
        try:
            record: object = await journal.begin_call("evt_1")
        except OSError:
            record = None
    assert record in {"new", None}
    assert await journal.begin_call("evt_1") == ("begun" if record else "new")


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "x"), MemoryError()], ids=repr)
@pytest.mark.parametrize("step", ["_make_journal_directory", "_write_begin_record"])
async def test_toolset_session_is_released_if_its_call_journal_cannot_be_written(
    workpool: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: Exception
) -> None:
    def raise_error(*_: object) -> None:
        raise error

    monkeypatch.setattr(CallJournal, step, raise_error)
    toolset = Toolset(isolation="none", state=str(tmp_path / "state"), max_idle=0.05)
    script = [{"name": "Bash", "input": {"command": "echo out"}}]
    result = await workpool.run_session(toolset, script=script, timeout=50)
    assert result.outcome == "released"
    assert exhausted(result.error)
