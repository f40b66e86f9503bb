"""A lease's arithmetic: when it ends, when it is renewed, and what trouble does to it (design §1).

In virtual time, against the control plane's own operations.
"""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from workpool.testing.local import Trouble
from workpool.testing.virtual import in_virtual_time

if TYPE_CHECKING:
    from tests.unit.conftest import Bench

SILENCE = Trouble(answer="silence")
UNSENT = Trouble(answer="silence", applied=False)
START = 1_772_366_400.0
RESET = Trouble(answer="reset", applied=False)


def later(bench: Bench, seconds: float, target: object, **values: object) -> None:
    """Set attributes of `target` after so many seconds."""

    def write() -> None:
        for name, value in values.items():
            setattr(target, name, value)

    bench.loop.call_later(seconds, write)


def gaps(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(times)]


@in_virtual_time
async def test_before_the_first_beat_the_lease_runs_from_the_acks_send_time(
    bench: type[Bench],
) -> None:
    one = bench(ack=[Trouble(there=1, back=2)])
    lease = await one.claim()
    assert one.clock() == 3
    assert (lease.deadline, lease.give_up_at, lease.remaining) == (60, 54, 57)
    assert lease.held
    assert not lease.begun


@in_virtual_time
async def test_the_first_beat_goes_out_at_once_and_says_so(bench: type[Bench]) -> None:
    one = bench()
    lease = await one.claim()
    await one.keep(lease, 1)
    assert one.sent == [(0, "heartbeat")]
    assert lease.begun
    assert one.changes == [(0, "held")]
    assert one.history(lease, "heartbeat")[0].state == "active"


@in_virtual_time
async def test_the_deadline_counts_from_the_send_time_of_the_last_good_beat(
    bench: type[Bench],
) -> None:
    one = bench(heartbeat=[Trouble(there=2, back=3)])
    lease = await one.claim()
    await asyncio.sleep(7)
    await one.keep(lease, 6)
    assert one.clock() == 13
    assert lease.deadline == 7 + 60
    assert lease.give_up_at == 7 + 54


@in_virtual_time
async def test_the_granted_ttl_counts_not_the_one_asked_for(bench: type[Bench]) -> None:
    one = bench(heartbeat=[Trouble(rewrite=lambda beat: {**beat, "ttl_seconds": 30})])
    lease = await one.claim()
    await one.keep(lease, 10)
    assert lease.deadline == one.times("heartbeat")[1] + 60
    first, second = one.times("heartbeat")
    assert 9 <= second - first <= 10  # a third of what was granted


@pytest.mark.parametrize(("ttl", "margin"), [(10, 1), (60, 6), (600, 60)])
def test_the_margin_before_the_deadline(bench: type[Bench], ttl: int, margin: int) -> None:
    @in_virtual_time
    async def check() -> None:
        one = bench(ttl=ttl)
        lease = await one.claim()
        await one.keep(lease, 1)
        assert lease.deadline == ttl
        assert lease.deadline - lease.give_up_at == margin

    check()


@in_virtual_time
async def test_renewals_come_every_third_of_the_ttl_with_jitter_for_days(
    bench: type[Bench],
) -> None:
    one = bench()
    lease = await one.claim()
    await one.keep(lease, 2 * 86_400)
    between = gaps(one.times("heartbeat"))
    assert all(18 <= gap <= 20 for gap in between)
    assert max(between) - min(between) > 1.5
    assert len(between) > 2 * 86_400 / 20
    assert lease.held
    assert set(one.outcomes()) == {"ok"}
    assert max(event.lag_seconds for _, event in one.results) < 0.001


@pytest.mark.parametrize(
    ("ttl", "request_timeout", "bound"), [(60, 10.0, 10), (30, 10.0, 5), (60, 2.0, 2)]
)
def test_a_beat_waits_for_its_answer_within_bounds(
    bench: type[Bench], ttl: int, request_timeout: float, bound: float
) -> None:
    @in_virtual_time
    async def check() -> None:
        one = bench(ttl=ttl, request_timeout=request_timeout, heartbeat=[None, UNSENT])
        lease = await one.claim()
        await one.keep(lease, ttl / 2)
        settled, event = one.results[1]
        assert event.result == "timeout"
        assert settled - one.times("heartbeat")[1] == pytest.approx(bound)

    check()


@in_virtual_time
async def test_a_failed_beat_is_tried_again_soon_then_less_soon(bench: type[Bench]) -> None:
    one = bench(heartbeat=[RESET] * 6)
    lease = await one.claim()
    await one.keep(lease, 20)
    assert gaps(one.times("heartbeat")) == pytest.approx([1, 2, 4, 4, 4, 4])
    assert one.outcomes() == ["transient"] * 6 + ["ok"]
    assert lease.begun


@in_virtual_time
async def test_the_next_beat_after_a_recovery_is_a_third_later_and_not_late(
    bench: type[Bench],
) -> None:
    one = bench(heartbeat=[None, *[RESET] * 6])
    lease = await one.claim()
    await one.keep(lease, 70)
    settled = [time for time, event in one.results if event.result == "ok"]
    assert gaps(settled)[1] >= 18
    assert max(event.lag_seconds for _, event in one.results) < 0.001


@in_virtual_time
async def test_retry_after_is_honoured(bench: type[Bench]) -> None:
    refusal = Trouble(answer=503, applied=False, retry_after=7)
    one = bench(heartbeat=[refusal])
    lease = await one.claim()
    await one.keep(lease, 10)
    assert gaps(one.times("heartbeat")) == pytest.approx([7])


@in_virtual_time
async def test_retry_after_never_delays_a_beat_past_the_deadline(bench: type[Bench]) -> None:
    one = bench(heartbeat=[Trouble(answer=429, applied=False, retry_after=300)])
    lease = await one.claim()
    await one.keep(lease, 100)
    assert one.times("heartbeat")[1] < 54
    assert lease.held
    assert lease.begun


@pytest.mark.parametrize(("ttl", "end"), [(60, 54), (10, 9)])
def test_a_lease_without_good_beats_is_given_up_before_it_can_be_anothers(
    bench: type[Bench], ttl: int, end: float
) -> None:
    @in_virtual_time
    async def check() -> None:
        one = bench(ttl=ttl, heartbeat=[None, *[UNSENT] * 999])
        lease = await one.claim()
        await one.keep(lease, 1000)
        assert one.lost_at == pytest.approx(end)
        assert not lease.confirmed
        assert not lease.held
        assert lease.remaining == 0
        assert max(one.times("heartbeat")) < end

    check()


@in_virtual_time
async def test_an_answer_after_its_deadline_extends_nothing(bench: type[Bench]) -> None:
    """The machine slept while the answer lay in the socket."""
    one = bench(heartbeat=[None, Trouble(back=5)])
    lease = await one.claim()
    one.loop.call_later(21, one.loop.suspend, 45)
    await one.keep(lease, 30)
    assert one.outcomes() == ["ok", "timeout"]
    assert lease.deadline == 60
    assert one.lost_at > 60
    assert len(one.sent) == 2


@in_virtual_time
async def test_looking_at_a_lease_after_the_machine_slept_gives_it_up(bench: type[Bench]) -> None:
    one = bench()
    lease = await one.claim()
    task = asyncio.get_running_loop().create_task(lease.keep())
    await asyncio.sleep(1)
    one.loop.suspend(52)
    lease.expire()
    assert lease.held
    one.loop.suspend(1)
    lease.expire()
    assert not lease.held
    assert lease.fate == "lost"
    await asyncio.wait({task})
    assert len(one.sent) == 1


@in_virtual_time
async def test_release_is_one_last_beat_and_then_silence(bench: type[Bench]) -> None:
    one = bench()
    lease = await one.claim()
    one.loop.call_later(5, lease.release, 12.4)
    await one.keep(lease, 300)
    assert one.times("heartbeat") == [0, 5]
    assert lease.fate == "released"
    assert not lease.held
    assert one.history(lease, "heartbeat")[1].lease_end == START + 5 + 12


@in_virtual_time
async def test_release_before_the_first_beat_makes_it_the_last(bench: type[Bench]) -> None:
    one = bench()
    lease = await one.claim()
    lease.release(10)
    await one.keep(lease, 300)
    assert one.sent == [(0, "heartbeat")]
    (beat,) = one.history(lease, "heartbeat")
    assert beat.lease_end == beat.time + 10
    assert one.changes[-1] == (0, "released")


@pytest.mark.parametrize(("delay", "ttl"), [(0, 10), (-1, 10), (9.9, 10), (1e9, 600)])
def test_the_delay_of_a_release_is_clamped_to_what_the_protocol_allows(
    bench: type[Bench], delay: float, ttl: int
) -> None:
    @in_virtual_time
    async def check() -> None:
        one = bench()
        lease = await one.claim()
        lease.release(delay)
        await one.keep(lease, 1)
        (beat,) = one.history(lease, "heartbeat")
        assert beat.lease_end == beat.time + ttl

    check()


@in_virtual_time
async def test_release_during_a_beat_or_its_retries_still_ends_in_one_last_beat(
    bench: type[Bench],
) -> None:
    """The retry that succeeds is the last: a second, longer lease must not be taken first."""
    one = bench(heartbeat=[None, *[RESET] * 3])
    lease = await one.claim()
    one.loop.call_later(22, lease.release, 10)  # in the pause before the fourth or third try
    await one.keep(lease, 300)
    beats = one.history(lease, "heartbeat")
    assert [round((each.lease_end or 0) - each.time) for each in beats] == [60, 10]
    assert lease.fate == "released"


@in_virtual_time
async def test_a_release_that_cannot_be_sent_ends_when_it_would_have(bench: type[Bench]) -> None:
    one = bench(heartbeat=[None, *[UNSENT] * 99])
    lease = await one.claim()
    one.loop.call_later(5, lease.release, 10)
    await one.keep(lease, 300)
    assert one.lost_at == pytest.approx(5 + 9)
    assert not lease.confirmed


@in_virtual_time
async def test_a_doubted_lease_is_checked_at_once(bench: type[Bench]) -> None:
    one = bench()
    lease = await one.claim()
    one.loop.call_later(5, lease.beat_now)
    await one.keep(lease, 10)
    assert one.times("heartbeat") == [0, 5]


@in_virtual_time
async def test_nothing_is_sent_once_nobody_needs_the_lease(bench: type[Bench]) -> None:
    one = bench()
    lease = await one.claim()
    later(one, 5, lease, ended=True)
    await one.keep(lease, 300)
    assert one.sent == [(0, "heartbeat")]


@in_virtual_time
async def test_while_the_handlers_loop_is_blocked_for_too_long_nothing_is_renewed(
    bench: type[Bench],
) -> None:
    one = bench()
    lease = await one.claim()
    later(one, 10, one, renewing=False)
    await one.keep(lease, 300)
    assert one.times("heartbeat") == [0]
    assert one.lost_at == pytest.approx(54)


@in_virtual_time
async def test_a_loop_that_runs_again_in_time_keeps_its_leases(bench: type[Bench]) -> None:
    one = bench()
    lease = await one.claim()
    later(one, 10, one, renewing=False)
    later(one, 45, one, renewing=True)
    await one.keep(lease, 100)
    assert lease.held
    assert 45 <= one.times("heartbeat")[1] <= 49


@in_virtual_time
async def test_an_abandoned_lease_is_lost_unconfirmed(bench: type[Bench]) -> None:
    one = bench()
    lease = await one.claim()
    lease.abandon()
    await one.keep(lease, 10)
    assert one.changes == [(0, "lost")]
    assert not lease.confirmed
    assert not one.sent


@in_virtual_time
async def test_a_crash_of_the_beats_costs_the_lease_not_the_promise(
    bench: type[Bench], caplog: pytest.LogCaptureFixture
) -> None:
    one = bench()
    lease = await one.claim()
    await one.calls.__aexit__(None, None, None)  # a RuntimeError at every call from now on
    await one.keep(lease, 10)
    assert one.changes[-1] == (0, "lost")
    assert "lease crashed" in caplog.text
