"""Two owners are one too many: a lease against any network and a rival that takes what it may.

What must hold at every instant is checked from the control plane's side: the rival's
acknowledgement is the moment at which nothing of ours may go on.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from itertools import chain, repeat
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workpool.errors import ControlPlaneError
from workpool.testing.local import Script, Trouble
from workpool.testing.virtual import in_virtual_time

if TYPE_CHECKING:
    from tests.unit.conftest import Bench
    from workpool.pool.lease import Lease

ENVIRONMENT = "env_00000000000070008000000000000001"
HORIZON_SECONDS = 600.0
"""By then every lease has ended: after the answers that are drawn, silence reigns."""
LATENCY_SECONDS = 0.0001
"""No request arrives at once; the control plane's clock counts whole microseconds."""
FINAL = {"finished", "released", "stopped", "lost"}
SILENCE = Trouble(answer="silence", applied=False)

seconds = st.floats(0, 40, allow_subnormal=False)
delays = st.just(0.0) | seconds


def refusals(*statuses: int) -> st.SearchStrategy[Trouble]:
    return st.builds(
        Trouble,
        applied=st.just(value=False),
        answer=st.sampled_from(statuses),
        retry_after=st.none() | st.floats(0, 400),
    )


slow = st.builds(Trouble, there=delays, back=delays)
unanswered = st.builds(
    Trouble,
    there=delays,
    back=delays,
    applied=st.booleans(),
    answer=st.sampled_from(["silence", "reset", 500, b"{"]),
)
not_extended = st.just(Trouble(rewrite=lambda beat: {**beat, "lease_extended": False}))
beats_answers = st.lists(
    st.none() | slow | unanswered | not_extended | refusals(401, 403, 404, 409, 412, 429, 503),
    max_size=8,
)
reads_answers = st.lists(
    st.none() | slow | unanswered | refusals(401, 403, 404, 429, 503), max_size=4
)
deeds = st.sampled_from(
    ["stop", "force", "suspend", "release", "beat_now", "own_stop", "blocked", "running"]
)
plays = st.lists(st.tuples(st.floats(0, 150, allow_subnormal=False), deeds), max_size=4)


class Match:
    """One item, our lease on it, and a rival."""

    def __init__(self, one: Bench, lease: Lease) -> None:
        self.one = one
        self.lease = lease
        self.rival_has_it = False

    def note(self, op: str, work_id: str | None) -> Trouble | None:
        """Something of ours is being sent."""
        assert self.lease.held, f"{op} sent without the lease"
        assert not self.rival_has_it, f"{op} sent for the rival's item"
        trouble = self.one.script(op, work_id) or Trouble()
        return replace(trouble, there=trouble.there + LATENCY_SECONDS)

    async def be_the_rival(self) -> None:
        """Take the item at the first instant at which the control plane gives it, and hold it."""
        work_id = self.lease.item.id
        while await self.one.rival.poll(999, 0) is None:
            pass
        await self.one.rival.ack(work_id)
        self.rival_has_it = True
        assert not self.lease.held, "held by two"
        await self.one.rival.heartbeat(work_id, None, 600)

    async def act(self, deed: str) -> None:
        """What else happens to the item, the worker or its machine."""
        work_id = self.lease.item.id
        match deed:
            case "stop" | "force":
                self.one.operations.stop(ENVIRONMENT, work_id, "operator", force=deed == "force")
            case "suspend":
                self.one.loop.suspend(25)
            case "release" if self.lease.held:
                self.lease.release(10)
            case "beat_now":
                self.lease.beat_now()
            case "blocked" | "running":
                self.one.renewing = deed == "running"
            case "own_stop" if self.lease.held:
                self.lease.own_stop = True
                with suppress(ControlPlaneError):
                    await self.one.calls.stop(work_id, force=True)


@in_virtual_time
async def test_a_first_beat_that_cut_the_lease_and_was_not_answered_cuts_our_deadline(
    bench: type[Bench],
) -> None:
    """Asked for 10 s, the control plane may hold it for 10 s only, whatever the ack gave."""
    one = bench(ttl=10, heartbeat=[Trouble(answer="silence")])
    lease = await one.claim()
    keeping = asyncio.get_running_loop().create_task(lease.keep())
    await asyncio.sleep(0.5)
    assert lease.remaining == pytest.approx(9.5)
    await asyncio.sleep(3)
    assert one.outcomes() == ["timeout", "recovered", "ok"]
    keeping.cancel()


@in_virtual_time
async def test_a_released_lease_is_not_believed_in_after_its_delay(bench: type[Bench]) -> None:
    """Every answer to the last beat is lost: the first one that was applied began the delay."""
    one = bench(heartbeat=[None, *[Trouble(answer="silence")] * 99])
    lease = await one.claim()
    one.loop.call_later(5, lease.release, 10)
    await one.keep(lease, 600)
    assert one.lost_at <= 5 + 10
    assert not lease.confirmed


@in_virtual_time
async def test_a_beat_that_was_certainly_not_applied_cuts_nothing(bench: type[Bench]) -> None:
    refusals: list[Trouble | None] = [
        Trouble(answer=status, applied=False, retry_after=20) for status in (429, 401, 409)
    ]
    one = bench(ttl=10, heartbeat=refusals)
    lease = await one.claim()
    keeping = asyncio.get_running_loop().create_task(lease.keep())
    await asyncio.sleep(19)
    assert lease.deadline == 60
    await asyncio.sleep(10)
    assert one.outcomes()[:4] == ["transient", "rejected", "recovered", "ok"]
    assert lease.held
    keeping.cancel()


@pytest.mark.trial
@pytest.mark.parametrize("ttl", [10, 60])
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(beats=beats_answers, reads=reads_answers, play=plays)
def test_at_no_instant_do_two_workers_hold_one_item(
    bench: type[Bench],
    ttl: int,
    beats: list[Trouble | None],
    reads: list[Trouble | None],
    play: list[tuple[float, str]],
) -> None:
    @in_virtual_time
    async def check() -> None:
        one = bench(ttl=ttl, ack=[Trouble(there=LATENCY_SECONDS)])
        lease = await one.claim()
        one.script = Script(heartbeat=chain(beats, repeat(SILENCE)), get=reads)
        match = Match(one, lease)
        one.calls._troubles = match.note
        async with asyncio.TaskGroup() as group:
            rival = group.create_task(match.be_the_rival())
            keeping = group.create_task(lease.keep())
            for at, deed in sorted(play):
                await asyncio.sleep(max(0.0, at - one.loop.time()))
                group.create_task(match.act(deed))
            await asyncio.sleep(HORIZON_SECONDS - one.loop.time())
            assert keeping.done()
            rival.cancel()
        assert lease.fate in FINAL
        assert one.changes[-1][1] == lease.fate
        assert not lease.held
        state = one.operations.get(ENVIRONMENT, lease.item.id).state
        assert match.rival_has_it or state == "stopped"

    check()
