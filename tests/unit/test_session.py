"""`Session.interrupted` on a session without a pool."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from workpool import Session
from workpool.wire.items import parse_item

WAIT_SECONDS = 20
ITEM = {
    "id": "work_1",
    "data": {"type": "session", "id": "sess_1"},
    "environment_id": "env_1",
    "state": "active",
}


@pytest.mark.parametrize("request_kind", ["stopping", "draining"])
async def test_request_to_end_wakes_every_task_that_waits_for_it(request_kind: str) -> None:
    session = Session(parse_item(ITEM), cast("Any", None), redelivered=False)
    waiting = [asyncio.create_task(session.interrupted()) for _ in range(3)]
    await asyncio.sleep(0)  # each task waits
    waiting[0].cancel()
    session.interrupt(**{request_kind: True})
    async with asyncio.timeout(WAIT_SECONDS):
        results = await asyncio.gather(*waiting, return_exceptions=True)
        await session.interrupted()
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1:] == [None, None]


async def test_wait_for_interruption_that_was_cancelled_does_not_disturb_later_request() -> None:
    session = Session(parse_item(ITEM), cast("Any", None), redelivered=False)
    cancelled, waiting = (asyncio.create_task(session.interrupted()) for _ in range(2))
    await asyncio.sleep(0)  # both tasks wait
    cancelled.cancel()
    await asyncio.wait({cancelled}, timeout=WAIT_SECONDS)
    assert cancelled.cancelled()
    session.interrupt(draining=True)
    async with asyncio.timeout(WAIT_SECONDS):
        await waiting
    session.interrupt(stopping=True)
    assert session.stopping
    assert session.draining
