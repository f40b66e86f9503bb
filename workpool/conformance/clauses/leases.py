"""Clauses about leases: their duration, their end, and the next holder of the item.

See workpool/docs/protocol.md, "Leases".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from workpool.conformance.clause import clause
from workpool.conformance.clause_trial import is_conflict, is_precondition_failed
from workpool.conformance.verdict import (
    ClauseBrokenError,
    ClauseUntriedError,
    raise_clause_broken_unless,
    raise_clause_differs_unless,
)
from workpool.wire.protocol import ACK_LEASE_SECONDS, NO_HEARTBEAT, STOPPED, STOPPING

if TYPE_CHECKING:
    from workpool.conformance.clause_trial import ClauseTrial
    from workpool.conformance.shared_queue import ItemDelivery, SuiteItem

TTL: Final = 10
TTL_LONGEST: Final = 90
"""Longest granted TTL in seconds for which the suite waits; a grant may exceed the request."""
LATE_SECONDS: Final = 30.0
SLACK_SECONDS: Final = 4.0
"""Seconds by which a redelivery may be later than the end of the lease."""


@clause("ack-lease", "Without a heartbeat, the lease of an ack lapses after 60 s.")
async def check_lease_without_heartbeat_lapses_after_minute(trial: ClauseTrial) -> None:
    """Acknowledge an item and send nothing more, like a worker that crashes."""
    subject = await trial.claim_item()
    # The pause shows whether the lease begins at the ack, as it must. A lease that begins at the
    # poll ends 10 s too early.
    await trial.wait_while_other_clauses_run(10)
    await trial.acknowledge_item(subject)
    start = trial.now
    again = await trial.wait_for_delivery(subject, ACK_LEASE_SECONDS + LATE_SECONDS)
    if again is None:
        raise ClauseBrokenError(
            "never: an item is lost when its worker dies before the first heartbeat"
        )
    seconds = again.at - start
    early = seconds < ACK_LEASE_SECONDS - 2
    late = again.nothing_at - start > ACK_LEASE_SECONDS + SLACK_SECONDS
    raise_clause_differs_unless(not early and not late, f"after {seconds:.0f} s")


@clause("lease-held", "An item whose lease is renewed is not delivered.")
async def check_item_with_renewed_lease_is_not_delivered(trial: ClauseTrial) -> None:
    """Renew a short lease for longer than its TTL, and poll during that time."""
    subject = await trial.create_active_item(TTL)
    before = len(subject.deliveries)
    for _ in range(5):
        await trial.wait_while_other_clauses_run(4)
        answer = await trial.api.heartbeat(subject.id, subject.last_heartbeat, TTL)
        raise_clause_broken_unless(answer.ok, f"{answer}: the lease has lapsed too early")
        subject.last_heartbeat = str(answer.get("last_heartbeat"))
        await trial.poll()
        taken = len(subject.deliveries) > before
        raise_clause_broken_unless(not taken, "it was delivered to another worker")


@clause("lease-lapses", "An item whose lease has lapsed is delivered again, and not before.")
async def check_item_with_lapsed_lease_is_delivered_again(trial: ClauseTrial) -> None:
    """Send one heartbeat and nothing more, like a worker that crashes."""
    subject = await trial.create_acknowledged_item()
    start = trial.now
    ttl = (await trial.send_heartbeat(subject, TTL)).get("ttl_seconds")
    again = await _await_redelivery(trial, subject, ttl)
    seconds = again.at - start
    raise_clause_broken_unless(seconds > ttl - 1, f"after {seconds:.0f} s: the holder has {ttl} s")
    late = again.nothing_at - start > ttl + SLACK_SECONDS
    raise_clause_differs_unless(not late, f"after {seconds:.0f} s")


@clause("lease-shortened", "A heartbeat with a shorter TTL ends the lease earlier.")
async def check_shorter_ttl_ends_lease_earlier(trial: ClauseTrial) -> None:
    """Shorten a lease by a heartbeat, as a worker does when it releases its item."""
    subject = await trial.create_active_item(600)
    await trial.send_heartbeat(subject, TTL)
    again = await trial.wait_for_delivery(subject, TTL + LATE_SECONDS)
    raise_clause_differs_unless(
        again is not None, "the item comes back only when the longer lease ends"
    )


@clause("lease-first-heartbeat", "The next holder's first heartbeat is accepted.")
async def check_first_heartbeat_of_next_holder_is_accepted(trial: ClauseTrial) -> None:
    """Acknowledge an item whose lease has lapsed, and send the first heartbeat of a new lease."""
    subject, _ = await _create_redelivered_item(trial)
    await trial.acknowledge_item(subject)
    answer = await trial.api.heartbeat(subject.id, NO_HEARTBEAT, 60)
    raise_clause_broken_unless(answer.ok, f"{answer}: after a crash nobody can run the item")


@clause("lease-former-holder", "A heartbeat of the former holder is refused with 409 or 412.")
async def check_heartbeat_of_former_holder_is_refused(trial: ClauseTrial) -> None:
    """Send the former holder's heartbeat after another worker has taken the item over."""
    subject, former = await _create_redelivered_item(trial)
    expected, subject.last_heartbeat = subject.last_heartbeat, NO_HEARTBEAT
    await trial.acknowledge_item(subject)
    await trial.send_heartbeat(subject)
    answer = await trial.api.heartbeat(former, expected, 60)
    extended = answer.ok and answer.get("lease_extended") is not False
    raise_clause_broken_unless(not extended, "it extends the lease: two workers hold one item")
    raise_clause_differs_unless(is_conflict(answer) or is_precondition_failed(answer), str(answer))


@clause("lease-history", "A redelivered item shows its former ack or heartbeat.")
async def check_redelivered_item_shows_its_former_lease(trial: ClauseTrial) -> None:
    """Check that a redelivered item shows the time of its former ack or heartbeat."""
    subject, _ = await _create_redelivered_item(trial)
    item = subject.deliveries[-1].item
    known = item.get("acknowledged_at") or item.get("latest_heartbeat_at")
    raise_clause_differs_unless(known, "no trace of it: crashes are not counted as attempts")


@clause("lease-same-id", "A redelivered item has the id that it had.")
async def check_redelivered_item_keeps_its_id(trial: ClauseTrial) -> None:
    """Check that both deliveries of an item have the same id."""
    subject, former = await _create_redelivered_item(trial)
    raise_clause_differs_unless(subject.id == former, "it has a new id")


@clause("lease-stopping", "A `stopping` item whose lease lapses is `stopped`, and not delivered.")
async def check_stopping_item_is_stopped_when_lease_lapses(trial: ClauseTrial) -> None:
    """Stop an item gracefully, and let the lease lapse as if the worker had crashed."""
    subject = await trial.create_acknowledged_item()
    ttl = (await trial.send_heartbeat(subject, TTL)).get("ttl_seconds")
    await trial.stop_item(subject, force=False)
    if await trial.read_item_state(subject) != STOPPING:
        raise ClauseUntriedError("a graceful stop ends the item at once")
    again = await trial.wait_for_delivery(subject, _require_short_ttl(ttl) + 2 * SLACK_SECONDS)
    raise_clause_broken_unless(again is None, "it is delivered: the session runs again")
    state = await trial.read_item_state(subject)
    raise_clause_differs_unless(state == STOPPED, f"it is still {state}")


async def _create_redelivered_item(trial: ClauseTrial) -> tuple[SuiteItem, str]:
    """Return an item that was redelivered after its lease lapsed, and the item's former id."""
    subject = await trial.create_acknowledged_item()
    ttl = (await trial.send_heartbeat(subject, TTL)).get("ttl_seconds")
    former = subject.id
    try:
        await _await_redelivery(trial, subject, ttl)
    except ClauseBrokenError:
        raise ClauseUntriedError("the item is not delivered again") from None
    return subject, former


async def _await_redelivery(trial: ClauseTrial, subject: SuiteItem, ttl: object) -> ItemDelivery:
    again = await trial.wait_for_delivery(subject, _require_short_ttl(ttl) + LATE_SECONDS)
    if again is None:
        raise ClauseBrokenError("never: an item is lost when its worker dies")
    return again


def _require_short_ttl(ttl: object) -> float:
    if isinstance(ttl, int | float) and 0 < ttl <= TTL_LONGEST:
        return ttl
    raise ClauseUntriedError(f"the lease lasts longer than {TTL_LONGEST} s")
