"""Reads a credential again from its source after the control plane has refused the old one."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor
    from pathlib import Path


class CredentialSource:
    """The source of one credential: a setting in memory, or a file that may be replaced.

    Args:
        read: Reads the source; raises `SettingsError` if it holds no credential.
        path: The file that holds the credential; None: the source is in memory.
    """

    def __init__(self, read: Callable[[], str | None], path: Path | None) -> None:
        self._read = read
        self._path = path
        self._reading: asyncio.Future[str | None] | None = None

    async def read_current_credential(self, executor: Executor) -> str | None:
        """Read and return the credential; concurrent calls share one read of the file.

        A file may be on a disk that does not answer, so it is read on a thread of the executor, and
        once at a time.

        Raises:
            SettingsError: There is no credential, or it cannot be read.
        """
        if self._path is None:
            return self._read()
        if self._reading is None or self._reading.done():
            loop = asyncio.get_running_loop()
            self._reading = loop.run_in_executor(executor, self._read)
            self._reading.add_done_callback(_mark_error_as_retrieved)
        return await asyncio.shield(self._reading)


def _mark_error_as_retrieved(reading: asyncio.Future[str | None]) -> None:
    if not reading.cancelled():
        # Mark the error as retrieved: otherwise asyncio would log it if all callers were cancelled.
        reading.exception()
