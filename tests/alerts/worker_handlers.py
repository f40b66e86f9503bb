"""Handlers for the workers of `tests.alerts`; the item's metadata `do` selects a behaviour."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from workpool import Session, handler, hookimpl
from workpool.events import SessionFinished  # noqa: TC001 - the pool reads the annotation

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


async def sleep_for_seconds(session: Session) -> None:
    await asyncio.sleep(float(session.item.metadata.get("seconds", "1")))


async def raise_error(session: Session) -> None:
    await asyncio.sleep(1)
    raise RuntimeError(f"{session.item.id} fails")


async def block_loop(session: Session) -> None:
    time.sleep(float(session.item.metadata["seconds"]))  # noqa: ASYNC251 - blocks the loop


async def block_loop_often(session: Session) -> None:
    while not session.draining:
        time.sleep(2)  # noqa: ASYNC251 - blocks the loop
        await asyncio.sleep(0.5)


async def ignore_cancellation(_: Session) -> None:
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            continue


BEHAVIOURS: dict[str, Callable[[Session], Awaitable[None]]] = {
    "sleep": sleep_for_seconds,
    "fail": raise_error,
    "block": block_loop,
    "block often": block_loop_often,
    "ignore cancellation": ignore_cancellation,
}


@handler(metadata={"kind": "wanted"})
async def run_requested_behaviour(session: Session) -> None:
    """Run the behaviour that the metadata `do` of the item names."""
    await BEHAVIOURS[session.item.metadata["do"]](session)


class FailingObserver:
    """A plugin whose event hook raises an error for each finished session."""

    @hookimpl
    def workpool_event(self, event: SessionFinished) -> None:
        raise ValueError(f"{event.outcome} was not expected")


class PluginThatCrashesPoller:
    """A plugin that makes a poller of the pool crash once, as a bug in the pool would."""

    def __init__(self) -> None:
        from workpool.pool.dispatcher import Dispatcher  # noqa: PLC0415 - in this worker only

        offer = Dispatcher.offer_item

        def crash_poller_once(*_: object) -> object:
            setattr(Dispatcher, "offer_item", offer)  # noqa: B010 - types forbid it
            raise KeyError("ordered by tests.alerts")

        setattr(Dispatcher, "offer_item", crash_poller_once)  # noqa: B010 - types forbid it

    @hookimpl
    def workpool_event(self, event: SessionFinished) -> None:
        """Ignore the event. The hook exists because a plugin without any hook is refused."""
