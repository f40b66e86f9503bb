"""Tests of `CallJournal`, which is reopened as a worker does after a crash."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING

import pytest

from workpool import DaemonThreads
from workpool_toolset.call_journal import CallJournal
from workpool_toolset.tool_result import ToolResult

if TYPE_CHECKING:
    from pathlib import Path


WAIT_SECONDS = 40.0
"""The time limit of journal operations, which a loaded machine does not exceed."""


@pytest.fixture
def journal_directory(tmp_path: Path) -> Path:
    return tmp_path / "journal"


async def open_journal(directory: Path) -> CallJournal:
    journal = CallJournal(directory, DaemonThreads("test", 2))
    await journal.open_directory()
    return journal


async def test_reopened_journal_still_contains_begun_calls_and_stored_results(
    journal_directory: Path,
) -> None:
    journal = await open_journal(journal_directory)
    assert journal.is_new
    assert await journal.begin_call("a") == "new"
    assert await journal.begin_call("b") == "new"
    assert await journal.begin_call("a") == "begun"
    kept = ToolResult([{"type": "image", "source": {"data": "é"}}], is_error=True)
    await journal.store_result("b", kept)
    journal = await open_journal(journal_directory)
    assert not journal.is_new
    assert await journal.begin_call("a") == "begun"
    assert await journal.begin_call("b") == kept
    await journal.delete_result("b")
    await journal.delete_result("unknown")
    assert await journal.begin_call("b") == "begun"
    assert await journal.begin_call("c") == "new"


async def test_journal_lets_one_of_two_workers_begin_a_call_as_new(
    journal_directory: Path,
) -> None:
    workers = [await open_journal(journal_directory), await open_journal(journal_directory)]
    both = await asyncio.gather(
        *(journal.begin_call(f"evt_{n}") for n in range(50) for journal in workers)
    )
    pairs = zip(both[::2], both[1::2], strict=True)
    assert {frozenset(map(str, pair)) for pair in pairs} == {frozenset({"new", "begun"})}


@pytest.mark.parametrize(
    "call", ["../../evil", "/etc/passwd", "", ".", "a\0b", "é" * 500, "\ud800"]
)
async def test_call_id_with_path_characters_is_recorded_inside_journal_directory(
    journal_directory: Path, call: str
) -> None:
    journal = await open_journal(journal_directory)
    assert await journal.begin_call(call) == "new"
    assert await journal.begin_call(call) == "begun"
    assert [path.parent for path in journal_directory.parent.rglob("*.begun")] == [
        journal_directory
    ]


WRITER_PROGRAM = """
import asyncio, itertools, sys
from pathlib import Path
from workpool import DaemonThreads
from workpool_toolset.call_journal import CallJournal
from workpool_toolset.tool_result import ToolResult

async def main():
    journal = CallJournal(Path(sys.argv[1]), DaemonThreads("test", 2))
    await journal.open_directory()
    await journal.begin_call("evt_0")
    print("up", flush=True)
    for number in itertools.count(1):
        await journal.begin_call(f"evt_{number}")
        await journal.store_result(f"evt_{number}", ToolResult.from_value("x"))

asyncio.run(main())
"""


async def test_worker_suspended_during_write_does_not_block_journals_of_other_workers(
    journal_directory: Path,
) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", WRITER_PROGRAM, str(journal_directory)),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout
    try:
        assert await process.stdout.readline() == b"up\n"
        for number in range(10):
            os.kill(process.pid, signal.SIGSTOP)
            async with asyncio.timeout(WAIT_SECONDS):
                journal = await open_journal(journal_directory)
                assert await journal.begin_call(f"mine_{number}") == "new"
                await journal.store_result(f"mine_{number}", ToolResult.from_value("x"))
                assert await journal.begin_call("evt_0") != "new"
            os.kill(process.pid, signal.SIGCONT)
    finally:
        process.kill()
        await process.wait()
