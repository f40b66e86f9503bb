"""Uses of a session after its end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from workpool.errors import SessionEnded

if TYPE_CHECKING:
    from workpool import Session
    from workpool.testing import Faults


async def test_task_that_outlives_its_handler_sends_nothing(
    run_one_item: Any, faults: Faults
) -> None:
    over = asyncio.Event()

    async def outlive_handler(session: Session) -> float:
        await over.wait()
        with pytest.raises(SessionEnded):
            await session.update_metadata({"too": "late"})
        return session.lease_remaining

    async with asyncio.TaskGroup() as group:
        lingering: list[asyncio.Task[float]] = []

        async def work(session: Session) -> None:
            lingering.append(group.create_task(outlive_handler(session)))

        assert (await run_one_item(work)).outcome == "completed"
        over.set()
    assert lingering[0].result() == 0
    assert not faults.of("update")
