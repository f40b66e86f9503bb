"""Handlers that several tests share: for instance one that waits until the test lets it end."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from workpool import Session, handler


@handler
async def return_at_once(_: Session) -> None:
    pass


class GatedHandler:
    """A handler that waits until the test lets it end, and records whether it was interrupted."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()
        self.interrupted: list[bool] = []

    @handler
    async def wait_until_test_allows_end(self, session: Session) -> None:
        await self.may_end.wait()
        self.interrupted.append(session.draining or session.stopping)


class UncancellableHandler:
    """A handler that ignores its cancellation until `may_end` is set."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()

    @handler
    async def ignore_cancellation(self, _: Session) -> None:
        while not self.may_end.is_set():
            with suppress(asyncio.CancelledError):
                await self.may_end.wait()
