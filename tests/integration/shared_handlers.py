"""Handlers that several tests share: one returns at once, one waits until the test opens it."""

from __future__ import annotations

import asyncio

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
    async def wait_until_open(self, session: Session) -> None:
        await self.may_end.wait()
        self.interrupted.append(session.draining or session.stopping)
