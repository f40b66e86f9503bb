"""Create a session on SQLite and exit before its events are saved: `crashing_creation.py FILE`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, NoReturn

from tests.protocol.sqlite_server import ENV
from workpool.server import SqliteStore
from workpool.server.operations import Operations

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workpool.server.conversation import StoredEvent

WRITER_SECONDS = 0.5
"""Seconds that are more than enough for the writer's thread to commit."""


class CrashingStore(SqliteStore):
    """A store whose process ends after a session and its item are saved, but before any event."""

    def save_events(self, events: Sequence[StoredEvent]) -> NoReturn:
        """Give the writer time for the earlier changes, then exit."""
        time.sleep(WRITER_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError(events)


async def create_session(path: str) -> None:
    operations = Operations((ENV,), store=CrashingStore(path))
    await operations.open()
    operations.enqueue(ENV, script=[{"name": "bash", "input": {"command": "true"}}])


if __name__ == "__main__":
    asyncio.run(create_session(sys.argv[1]))
