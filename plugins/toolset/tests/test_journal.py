"""The journal across a crash: a second opening stands for the worker after it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from workpool_toolset.journal import Journal
from workpool_toolset.results import Result

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


async def test_a_call_is_begun_once(path: Path) -> None:
    async with Journal(path) as journal:
        assert journal.new
        assert await journal.begin("a") == "new"
        assert await journal.begin("b") == "new"
        assert await journal.begin("a") == "begun"
        await journal.finish("b", Result.of([{"type": "image", "source": {"data": "é"}}]))
    async with Journal(path) as journal:
        assert not journal.new
        assert await journal.begin("a") == "begun"
        kept = Result([{"type": "image", "source": {"data": "é"}}])
        assert await journal.begin("b") == kept
        await journal.forget("b")
        assert await journal.begin("b") == "begun"
        assert await journal.begin("c") == "new"


async def test_two_workers_of_one_machine_cannot_begin_the_same_call(path: Path) -> None:
    async with Journal(path) as one, Journal(path) as other:
        both = await asyncio.gather(
            *(journal.begin(f"evt_{n}") for n in range(50) for journal in (one, other))
        )
        pairs = zip(both[::2], both[1::2], strict=True)
        assert {frozenset(map(str, pair)) for pair in pairs} == {frozenset({"new", "begun"})}


async def test_closed_it_says_so(path: Path) -> None:
    journal = Journal(path)
    with pytest.raises(RuntimeError, match="not open"):
        await journal.begin("a")
