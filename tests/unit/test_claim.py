"""What may be sent for an item, at the very moment when its lease ends (design §1, Finish)."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from workpool.errors import LeaseLost
from workpool.pool.claim import Claim
from workpool.testing.virtual import in_virtual_time

if TYPE_CHECKING:
    from tests.unit.conftest import Bench
    from workpool.pool.lease import Lease


def claim_of(lease: Lease) -> Claim:
    """Without a pool: what is sent is the test's own."""
    parts: Any = None
    claim = Claim(lease.item, None, parts, 0)
    claim.lease = lease
    return claim


async def silence() -> None:
    await asyncio.Event().wait()


@in_virtual_time
async def test_a_lease_that_ends_as_a_call_times_out_is_told_all_the_same(
    bench: type[Bench],
) -> None:
    """Both in one turn of the loop, as after a handler that blocked it: the handler must end."""
    one = bench()
    lease = await one.claim()
    claim = claim_of(lease)
    told: list[str] = []

    def lose() -> None:
        lease.fate = "lost"
        claim.lease_changed()
        told.append("lost")

    one.loop.call_at(30 + 1e-7, lose)  # so short after the timeout that it is one turn
    with pytest.raises(LeaseLost):
        await claim.send(silence, 30, claim.check_lease)
    assert one.loop.time() < 31
    assert told == ["lost"]


@in_virtual_time
async def test_a_call_is_cut_when_the_lease_ends_and_not_made_after_it(bench: type[Bench]) -> None:
    one = bench()
    lease = await one.claim()
    claim = claim_of(lease)
    calls: list[float] = []

    async def call() -> None:
        calls.append(one.loop.time())
        await silence()

    with pytest.raises(LeaseLost):
        await claim.send(call, 3600, claim.check_lease)
    assert one.loop.time() == lease.deadline
    with pytest.raises(LeaseLost):
        await claim.send(call, 3600, claim.check_lease)
    assert calls == [0]
