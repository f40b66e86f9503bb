"""Renewal of a credential: concurrent callers share one reading, which runs on a thread."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from workpool.wire.http.credential_renewal import CredentialSource

if TYPE_CHECKING:
    from collections.abc import Iterator

FILE = Path("token")


@pytest.fixture
def executor_with_four_threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


class SlowCredentialFile:
    """A credential file whose readings block until `may_end` is set."""

    def __init__(self) -> None:
        self.readings = 0
        self.may_end = threading.Event()

    def read_credential(self) -> str:
        self.readings += 1
        assert self.may_end.wait(10)
        return f"token {self.readings}"


async def test_concurrent_readers_of_a_file_share_one_reading(
    executor_with_four_threads: ThreadPoolExecutor,
) -> None:
    file = SlowCredentialFile()
    source = CredentialSource(file.read_credential, FILE)
    async with asyncio.TaskGroup() as group:
        readers = [
            group.create_task(source.read_current_credential(executor_with_four_threads))
            for _ in range(3)
        ]
        await asyncio.sleep(0)
        file.may_end.set()
    assert [reader.result() for reader in readers] == ["token 1"] * 3
    assert await source.read_current_credential(executor_with_four_threads) == "token 2"


async def test_credential_reading_shared_by_two_callers_continues_after_one_is_cancelled(
    executor_with_four_threads: ThreadPoolExecutor,
) -> None:
    file = SlowCredentialFile()
    source = CredentialSource(file.read_credential, FILE)
    async with asyncio.TaskGroup() as group:
        first, second = (
            group.create_task(source.read_current_credential(executor_with_four_threads))
            for _ in range(2)
        )
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait({first})
        file.may_end.set()
    assert (first.cancelled(), second.result(), file.readings) == (True, "token 1", 1)


async def test_credential_source_without_file_is_read_on_the_calling_thread(
    executor_with_four_threads: ThreadPoolExecutor,
) -> None:
    thread = threading.get_ident()
    source = CredentialSource(lambda: str(threading.get_ident() == thread), None)
    assert await source.read_current_credential(executor_with_four_threads) == "True"
