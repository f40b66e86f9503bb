"""The journal after a crash: a second `open` stands for the worker that starts afterwards."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING

import pytest

from workpool import DaemonThreads
from workpool_toolset.journal import CallJournal
from workpool_toolset.results import Result

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def journal_directory(tmp_path: Path) -> Path:
    return tmp_path / "journal"


async def open_journal(folder: Path) -> CallJournal:
    journal = CallJournal(folder, DaemonThreads("test", 2))
    await journal.open()
    return journal


async def test_journal_begins_each_call_once_and_keeps_its_result(journal_directory: Path) -> None:
    journal = await open_journal(journal_directory)
    assert journal.new
    assert await journal.begin("a") == "new"
    assert await journal.begin("b") == "new"
    assert await journal.begin("a") == "begun"
    kept = Result([{"type": "image", "source": {"data": "é"}}], is_error=True)
    await journal.finish("b", kept)
    journal = await open_journal(journal_directory)
    assert not journal.new
    assert await journal.begin("a") == "begun"
    assert await journal.begin("b") == kept
    await journal.forget("b")
    await journal.forget("unknown")
    assert await journal.begin("b") == "begun"
    assert await journal.begin("c") == "new"


async def test_journal_of_two_workers_begins_each_call_once(journal_directory: Path) -> None:
    workers = [await open_journal(journal_directory), await open_journal(journal_directory)]
    both = await asyncio.gather(
        *(journal.begin(f"evt_{n}") for n in range(50) for journal in workers)
    )
    pairs = zip(both[::2], both[1::2], strict=True)
    assert {frozenset(map(str, pair)) for pair in pairs} == {frozenset({"new", "begun"})}


@pytest.mark.parametrize(
    "call", ["../../evil", "/etc/passwd", "", ".", "a\0b", "é" * 500, "\ud800"]
)
async def test_call_id_with_path_characters_stays_inside_journal(
    journal_directory: Path, call: str
) -> None:
    journal = await open_journal(journal_directory)
    assert await journal.begin(call) == "new"
    assert await journal.begin(call) == "begun"
    assert [path.parent for path in journal_directory.parent.rglob("*.begun")] == [
        journal_directory
    ]


STOPPED = """
import asyncio, sys
from pathlib import Path
from workpool import DaemonThreads
from workpool_toolset.journal import CallJournal
from workpool_toolset.results import Result

async def main():
    journal = CallJournal(Path(sys.argv[1]), DaemonThreads("test", 2))
    await journal.open()
    await journal.begin("evt_0")
    print("up", flush=True)
    for number in range(1, 10_000):
        await journal.begin(f"evt_{number}")
        await journal.finish(f"evt_{number}", Result.of("x"))

asyncio.run(main())
"""


async def test_worker_suspended_during_write_does_not_block_journal_of_others(
    journal_directory: Path,
) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", STOPPED, str(journal_directory)), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout
    try:
        assert await process.stdout.readline() == b"up\n"
        for number in range(10):
            os.kill(process.pid, signal.SIGSTOP)
            async with asyncio.timeout(5):
                journal = await open_journal(journal_directory)
                assert await journal.begin(f"mine_{number}") == "new"
                await journal.finish(f"mine_{number}", Result.of("x"))
                assert await journal.begin("evt_0") != "new"
            os.kill(process.pid, signal.SIGCONT)
    finally:
        process.kill()
        await process.wait()
