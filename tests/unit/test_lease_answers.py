"""What each answer to a heartbeat makes of a lease (design §1, §2; protocol §3.3, §4)."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from workpool.testing.local import Script, Trouble
from workpool.testing.virtual import in_virtual_time

if TYPE_CHECKING:
    from tests.unit.conftest import Bench

ENVIRONMENT = "env_00000000000070008000000000000001"
LOST = Trouble(answer="silence")
"""Applied, and its answer lost."""
UNSENT = Trouble(answer="silence", applied=False)


def answers(status: int) -> Trouble:
    return Trouble(answer=status, applied=False)


def says(**fields: Any) -> Trouble:
    return Trouble(rewrite=lambda beat: {**beat, **fields})


def refused_extension(**fields: Any) -> Trouble:
    return says(lease_extended=False, **fields)


# 412


@in_virtual_time
async def test_a_412_without_an_unanswered_beat_is_a_loss_and_nothing_is_read(
    bench: type[Bench],
) -> None:
    one = bench()
    lease = await one.claim()
    one.loop.call_later(1, one.operations.heartbeat, ENVIRONMENT, lease.item.id)  # another's beat
    await one.keep(lease, 60)
    assert [op for _, op in one.sent] == ["heartbeat", "heartbeat"]
    assert (lease.fate, lease.confirmed) == ("lost", True)
    assert one.outcomes() == ["ok", "precondition"]


@in_virtual_time
async def test_a_first_beat_whose_answer_was_lost_is_recovered(bench: type[Bench]) -> None:
    one = bench(heartbeat=[LOST])
    lease = await one.claim()
    await one.keep(lease, 12)
    assert one.outcomes() == ["timeout", "recovered", "ok"]
    assert one.sent == [(0, "heartbeat"), (11, "heartbeat"), (11, "get"), (11, "heartbeat")]
    assert lease.begun
    assert lease.deadline == 11 + 60


@in_virtual_time
async def test_a_read_ends_the_doubt_so_that_a_412_after_it_is_a_loss(bench: type[Bench]) -> None:
    one = bench(heartbeat=[None, UNSENT, answers(412), answers(412)])
    lease = await one.claim()
    await one.keep(lease, 60)
    assert [op for _, op in one.sent] == [*["heartbeat"] * 3, "get", "heartbeat"]
    assert one.outcomes() == ["ok", "timeout", "recovered", "precondition"]
    assert (lease.fate, lease.confirmed) == ("lost", True)


@in_virtual_time
async def test_a_later_beat_whose_answer_was_lost_is_recovered(bench: type[Bench]) -> None:
    one = bench(heartbeat=[None, LOST])
    lease = await one.claim()
    await one.keep(lease, 3_600)
    assert one.outcomes()[:4] == ["ok", "timeout", "recovered", "ok"]
    assert lease.held


@pytest.mark.parametrize("answer", [500, 502, b"{", b"null", "reset", 408])
def test_whatever_may_have_been_applied_counts_as_unanswered(
    bench: type[Bench], answer: Any
) -> None:
    @in_virtual_time
    async def check() -> None:
        one = bench(heartbeat=[None, Trouble(answer=answer)])
        lease = await one.claim()
        await one.keep(lease, 3_600)
        assert one.outcomes()[:4] == ["ok", "transient", "recovered", "ok"]
        assert lease.held

    check()


@in_virtual_time
async def test_a_429_was_not_applied_so_a_412_after_it_is_a_loss(bench: type[Bench]) -> None:
    one = bench(heartbeat=[None, answers(429)])
    lease = await one.claim()
    one.loop.call_later(1, one.operations.heartbeat, ENVIRONMENT, lease.item.id)
    await one.keep(lease, 60)
    assert one.outcomes() == ["ok", "transient", "precondition"]
    assert not one.times("get")


@in_virtual_time
async def test_the_beat_after_a_reading_goes_out_under_the_old_deadline(
    bench: type[Bench],
) -> None:
    one = bench(heartbeat=[None, LOST, None, *[UNSENT] * 99])
    lease = await one.claim()
    await one.keep(lease, 600)
    assert "recovered" in one.outcomes()
    assert one.lost_at == pytest.approx(54)  # the reading extended nothing


@in_virtual_time
async def test_what_starting_shows_is_a_former_holders_history(bench: type[Bench]) -> None:
    """An item held before, and a 412 that a gateway made up: NO_HEARTBEAT stays right."""
    one = bench()
    former = await one.claim()
    await one.calls.heartbeat(former.item.id, "NO_HEARTBEAT", 10)
    await asyncio.sleep(20)
    one.script = Script(heartbeat=[UNSENT, answers(412)])
    lease = await one.take()
    assert lease.item.last_heartbeat is not None
    await one.keep(lease, 15)
    assert one.outcomes() == ["timeout", "recovered", "ok"]
    assert lease.held


@in_virtual_time
async def test_a_412_after_a_loss_to_another_is_confirmed_by_reading(bench: type[Bench]) -> None:
    one = bench(heartbeat=[None, UNSENT])
    lease = await one.claim()

    async def lapse_early() -> None:
        one.ahead += 100
        await one.steal(lease.item.id)
        await one.rival.heartbeat(lease.item.id, "NO_HEARTBEAT", 60)

    await one.keep(lease, 1)
    await lapse_early()
    await one.keep(lease, 60)
    assert one.outcomes()[-1] == "precondition"
    assert one.times("get")
    assert (lease.fate, lease.confirmed) == ("lost", True)


@in_virtual_time
async def test_a_reading_that_fails_leaves_the_doubt_to_the_next_beat(bench: type[Bench]) -> None:
    one = bench(heartbeat=[None, LOST], get=[answers(503), answers(401), answers(409)])
    lease = await one.claim()
    await one.keep(lease, 3_600)
    assert one.outcomes()[:6] == [
        "ok",
        "timeout",
        "transient",
        "rejected",
        "rejected",
        "recovered",
    ]
    assert lease.held


@in_virtual_time
async def test_a_control_plane_that_contradicts_itself_is_not_asked_in_a_spin(
    bench: type[Bench],
) -> None:
    one = bench(heartbeat=[None, LOST, *[answers(412)] * 999])
    lease = await one.claim()
    await one.keep(lease, 600)
    assert len(one.sent) < 30
    assert not lease.held


# 409


@in_virtual_time
async def test_an_item_stopped_by_someone_else_is_ended(bench: type[Bench]) -> None:
    one = bench()
    lease = await one.claim()
    await one.keep(lease, 1)
    await one.rival.stop(lease.item.id, force=True)
    await one.keep(lease, 60)
    assert one.outcomes() == ["ok", "conflict"]
    assert lease.fate == "stopped"
    assert [op for _, op in one.sent][-2:] == ["heartbeat", "get"]


@in_virtual_time
async def test_an_item_back_in_the_queue_is_lost_although_nobody_took_it(
    bench: type[Bench],
) -> None:
    one = bench()
    lease = await one.claim()
    await one.keep(lease, 1)
    one.ahead += 100
    await one.keep(lease, 60)
    assert one.outcomes() == ["ok", "conflict"]
    assert (lease.fate, lease.confirmed) == ("lost", True)


@in_virtual_time
async def test_after_our_own_stop_a_409_is_its_success(bench: type[Bench]) -> None:
    one = bench()
    lease = await one.claim()
    await one.keep(lease, 1)
    lease.own_stop = True
    await one.calls.stop(lease.item.id, force=True)
    await one.keep(lease, 60)
    assert lease.fate == "finished"
    assert one.times("get")  # a 409 may also say that the item is queued again


@in_virtual_time
async def test_an_item_read_as_stopped_is_our_own_stops_success(bench: type[Bench]) -> None:
    one = bench(heartbeat=[None, UNSENT, answers(412)])
    lease = await one.claim()
    await one.keep(lease, 1)
    lease.own_stop = True
    await one.calls.stop(lease.item.id, force=True)
    await one.keep(lease, 60)
    assert lease.fate == "finished"


@in_virtual_time
async def test_a_beat_at_once_does_not_lag_by_what_the_answers_before_it_took(
    bench: type[Bench],
) -> None:
    slow = Trouble(answer=409, applied=False, back=3)
    one = bench(heartbeat=[None, slow], get=[Trouble(back=3)])
    lease = await one.claim()
    await one.keep(lease, 30)
    assert one.outcomes() == ["ok", "recovered", "ok"]
    assert one.times("heartbeat")[2] == one.times("heartbeat")[1] + 6
    assert max(event.lag_seconds for _, event in one.results) < 0.001


@in_virtual_time
async def test_a_409_for_an_item_that_is_ours_is_followed_by_a_beat_at_once(
    bench: type[Bench],
) -> None:
    one = bench(heartbeat=[None, answers(409)])
    lease = await one.claim()
    await one.keep(lease, 3_600)
    assert one.outcomes()[:3] == ["ok", "recovered", "ok"]
    _, second, third, *_ = one.times("heartbeat")
    assert second == third
    assert lease.held


# lease_extended, state


@in_virtual_time
async def test_not_extended_while_stopping_is_a_stop_request_and_moves_no_deadline(
    bench: type[Bench],
) -> None:
    one = bench(heartbeat=[None, *[refused_extension()] * 99])
    lease = await one.claim()
    await one.keep(lease, 1)
    await one.rival.stop(lease.item.id)
    await one.keep(lease, 600)
    assert lease.stop_requested
    assert lease.deadline == 60
    assert one.lost_at == pytest.approx(54)
    assert len(one.sent) < 10


@in_virtual_time
async def test_not_extended_while_active_is_read(bench: type[Bench]) -> None:
    one = bench(heartbeat=[None, refused_extension()])
    lease = await one.claim()
    await one.keep(lease, 25)
    assert one.outcomes()[:3] == ["ok", "recovered", "ok"]
    _, second, third, *_ = one.times("heartbeat")
    assert lease.deadline == third + 60
    assert second == third


@in_virtual_time
async def test_a_beat_that_is_not_extended_is_not_taken_for_our_own_stops_success(
    bench: type[Bench],
) -> None:
    """The stop is on its way and may never arrive: only a 409, or `stopped`, proves it."""
    one = bench(heartbeat=[None, refused_extension()])
    lease = await one.claim()
    await one.keep(lease, 1)
    lease.own_stop = True
    await one.keep(lease, 25)
    assert lease.fate == "held"


@in_virtual_time
async def test_a_first_beat_that_says_stopping_is_told_as_both(bench: type[Bench]) -> None:
    one = bench()
    lease = await one.claim()
    await one.rival.stop(lease.item.id)
    await one.keep(lease, 1)
    assert lease.begun
    assert lease.stop_requested
    assert lease.held
    assert one.changes == [(0, "held")]


@in_virtual_time
async def test_a_stop_request_is_told_once_and_the_lease_goes_on(bench: type[Bench]) -> None:
    one = bench()
    lease = await one.claim()
    await one.keep(lease, 1)
    await one.rival.stop(lease.item.id)
    await one.keep(lease, 600)
    assert lease.held
    assert [fate for _, fate in one.changes] == ["held", "held"]


@in_virtual_time
async def test_our_own_stop_is_not_taken_for_an_operators(bench: type[Bench]) -> None:
    one = bench()
    lease = await one.claim()
    await one.keep(lease, 1)
    lease.own_stop = True
    await one.rival.stop(lease.item.id)
    await one.keep(lease, 25)
    assert not lease.stop_requested


@pytest.mark.parametrize(("own_stop", "fate"), [(False, "stopped"), (True, "finished")])
def test_a_beat_that_answers_stopped_ends_the_lease(
    bench: type[Bench], fate: str, *, own_stop: bool
) -> None:
    @in_virtual_time
    async def check() -> None:
        one = bench(heartbeat=[None, says(state="stopped")])
        lease = await one.claim()
        await one.keep(lease, 1)
        lease.own_stop = own_stop
        await one.keep(lease, 60)
        assert lease.fate == fate

    check()


# Refusals


@pytest.mark.parametrize("status", [401, 403, 302])
def test_a_refused_credential_is_tried_again_within_the_lease(
    bench: type[Bench], status: int
) -> None:
    @in_virtual_time
    async def check() -> None:
        one = bench(heartbeat=[None, *[answers(status)] * 3])
        lease = await one.claim()
        await one.keep(lease, 3_600)
        assert one.outcomes()[:5] == ["ok", "rejected", "rejected", "rejected", "ok"]
        assert lease.held

    check()


@in_virtual_time
async def test_a_credential_refused_for_good_costs_the_lease_in_time(bench: type[Bench]) -> None:
    one = bench(heartbeat=[None, *[answers(401)] * 999])
    lease = await one.claim()
    await one.keep(lease, 600)
    assert one.lost_at == pytest.approx(54)
    assert not lease.confirmed


@pytest.mark.parametrize(("status", "confirmed"), [(404, True), (400, False)])
def test_a_refused_beat_is_a_loss_and_only_an_unknown_item_confirms_it(
    bench: type[Bench], status: int, *, confirmed: bool
) -> None:
    """A 400 says that our request is wrong, not that the item is not ours."""

    @in_virtual_time
    async def check() -> None:
        one = bench(heartbeat=[None, answers(status)])
        lease = await one.claim()
        await one.keep(lease, 60)
        assert one.outcomes() == ["ok", "rejected"]
        assert (lease.fate, lease.confirmed) == ("lost", confirmed)

    check()
