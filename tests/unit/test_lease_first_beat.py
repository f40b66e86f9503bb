"""Who writes what came of the first beat: whoever takes the lock, never both (README, D15)."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from workpool.testing.local import Trouble
from workpool.testing.virtual import in_virtual_time

if TYPE_CHECKING:
    from tests.unit.conftest import Bench


@in_virtual_time
async def test_an_answer_that_comes_after_the_keeper_took_over_writes_nothing(
    bench: type[Bench],
) -> None:
    """A blocked loop reads it late, while the keeper's own beat is under way."""
    one = bench(heartbeat=[Trouble(back=4)])
    lease = await one.claim()
    deadline = lease.deadline
    beginning = one.loop.create_task(lease.begin(one.calls))
    await asyncio.sleep(2)
    assert lease.take_over()
    assert not await beginning
    assert (lease.begun, lease.deadline) == (False, deadline)
    await one.keep(lease, 1)
    assert [op for _, op in one.sent] == ["heartbeat", "heartbeat", "get", "heartbeat"]
    assert one.outcomes() == ["recovered", "ok"]
    assert lease.begun


@in_virtual_time
async def test_what_the_handlers_loop_has_settled_is_not_taken_over(bench: type[Bench]) -> None:
    one = bench()
    lease = await one.claim()
    assert await lease.begin(one.calls)
    assert not lease.take_over()
    await one.keep(lease, 1)
    assert one.outcomes() == ["ok"]
    assert lease.begun
