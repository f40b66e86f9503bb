"""`Session.interrupted` wakes its waiting tasks; no pool is needed."""

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
async def test_request_to_end_session_wakes_every_task_that_waits_for_interruption(
    request_kind: str,
) -> None:
    session = Session(parse_item(ITEM), cast("Any", None), redelivered=False)
    async with asyncio.timeout(WAIT_SECONDS), asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(session.interrupted())
        await asyncio.sleep(0)  # Let every task begin its wait for the interruption.
        session.interrupt(**{request_kind: True})
        await session.interrupted()


async def test_cancelled_wait_for_interruption_does_not_affect_another_wait() -> None:
    session = Session(parse_item(ITEM), cast("Any", None), redelivered=False)
    async with asyncio.timeout(WAIT_SECONDS), asyncio.TaskGroup() as group:
        cancelled, waiting = (group.create_task(session.interrupted()) for _ in range(2))
        await asyncio.sleep(0)  # Let both tasks begin their wait for the interruption.
        cancelled.cancel()
        session.interrupt(draining=True)
        await waiting
        session.interrupt(stopping=True)
    assert cancelled.cancelled()
    assert session.stopping
    assert session.draining
