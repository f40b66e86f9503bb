"""Leases: their duration, their end, and the holder of the item afterwards.

See workpool/docs/protocol.md, "Leases".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from workpool.conformance.clause import clause
from workpool.conformance.trial import is_conflict, is_mismatch
from workpool.conformance.verdict import Breaks, Untried, same_or_breaks, same_or_differs
from workpool.wire.protocol import ACK_LEASE_SECONDS, NO_HEARTBEAT, STOPPED, STOPPING

if TYPE_CHECKING:
    from workpool.conformance.shared_queue import Delivery, Subject
    from workpool.conformance.trial import Trial

TTL: Final = 10
TTL_LONGEST: Final = 90
"""Longest granted TTL in seconds for which the suite waits; a grant may exceed the request."""
LATE_SECONDS: Final = 30.0
SLACK_SECONDS: Final = 4.0
"""Seconds by which a redelivery may be later than the end of the lease."""


@clause("ack-lease", "Without a heartbeat, the lease of an ack lapses after 60 s.")
async def lease_of_an_ack(trial: Trial) -> None:
    """Acknowledge an item and send nothing more, like a worker that crashes."""
    subject = await trial.claim()
    await trial.wait(10)  # so that a lease that began at the poll would end visibly earlier
    await trial.acknowledge(subject)
    start = trial.now
    again = await trial.delivery(subject, ACK_LEASE_SECONDS + LATE_SECONDS)
    if again is None:
        raise Breaks("never: an item is lost when its worker dies before the first heartbeat")
    seconds = again.at - start
    early = seconds < ACK_LEASE_SECONDS - 2
    late = again.nothing_at - start > ACK_LEASE_SECONDS + SLACK_SECONDS
    same_or_differs(not early and not late, f"after {seconds:.0f} s")


@clause("lease-held", "An item whose lease is renewed is not delivered.")
async def renewed_lease(trial: Trial) -> None:
    """Renew a short lease for longer than its TTL, and poll during that time."""
    subject = await trial.active(TTL)
    before = len(subject.deliveries)
    for _ in range(5):
        await trial.wait(4)
        answer = await trial.api.heartbeat(subject.id, subject.last_heartbeat, TTL)
        same_or_breaks(answer.ok, f"{answer}: the lease has lapsed too early")
        subject.last_heartbeat = str(answer.get("last_heartbeat"))
        await trial.poll()
        taken = len(subject.deliveries) > before
        same_or_breaks(not taken, "it was delivered to another worker")


@clause("lease-lapses", "An item whose lease has lapsed is delivered again, and not before.")
async def lapsed_lease(trial: Trial) -> None:
    """Send one heartbeat and nothing more, like a worker that crashes."""
    subject = await trial.acknowledged()
    start = trial.now
    ttl = (await trial.heartbeat(subject, TTL)).get("ttl_seconds")
    again = await _await_redelivery(trial, subject, ttl)
    seconds = again.at - start
    same_or_breaks(seconds > ttl - 1, f"after {seconds:.0f} s: the holder has {ttl} s")
    late = again.nothing_at - start > ttl + SLACK_SECONDS
    same_or_differs(not late, f"after {seconds:.0f} s")


@clause("lease-shortened", "A heartbeat with a shorter TTL ends the lease earlier.")
async def shortened_lease(trial: Trial) -> None:
    """Release an item as a worker does."""
    subject = await trial.active(600)
    await trial.heartbeat(subject, TTL)
    again = await trial.delivery(subject, TTL + LATE_SECONDS)
    same_or_differs(again is not None, "the item comes back only when the longer lease ends")


@clause("lease-first-heartbeat", "The next holder's first heartbeat is accepted.")
async def first_heartbeat_of_the_next_holder(trial: Trial) -> None:
    """Take an item over after its lease has lapsed."""
    subject, _ = await _redelivered_item(trial)
    await trial.acknowledge(subject)
    answer = await trial.api.heartbeat(subject.id, NO_HEARTBEAT, 60)
    same_or_breaks(answer.ok, f"{answer}: after a crash nobody can run the item")


@clause("lease-former-holder", "A heartbeat of the former holder is refused with 409 or 412.")
async def heartbeat_of_the_former_holder(trial: Trial) -> None:
    """Send the former holder's heartbeat after another worker has taken the item over."""
    subject, former = await _redelivered_item(trial)
    expected, subject.last_heartbeat = subject.last_heartbeat, NO_HEARTBEAT
    await trial.acknowledge(subject)
    await trial.heartbeat(subject)
    answer = await trial.api.heartbeat(former, expected, 60)
    extended = answer.ok and answer.get("lease_extended") is not False
    same_or_breaks(not extended, "it extends the lease: two workers hold one item")
    same_or_differs(is_conflict(answer) or is_mismatch(answer), str(answer))


@clause("lease-history", "A redelivered item shows its former ack or heartbeat.")
async def history_of_a_redelivered_item(trial: Trial) -> None:
    """Check the fields of an item that was delivered again."""
    subject, _ = await _redelivered_item(trial)
    item = subject.deliveries[-1].item
    known = item.get("acknowledged_at") or item.get("latest_heartbeat_at")
    same_or_differs(known, "no trace of it: crashes are not counted as attempts")


@clause("lease-same-id", "A redelivered item has the id that it had.")
async def id_of_a_redelivered_item(trial: Trial) -> None:
    """Check that both deliveries of an item have the same id."""
    subject, former = await _redelivered_item(trial)
    same_or_differs(subject.id == former, "it has a new id")


@clause("lease-stopping", "A `stopping` item whose lease lapses is `stopped`, and not delivered.")
async def lapsed_lease_of_a_stopping_item(trial: Trial) -> None:
    """Stop the item of a crashed worker gracefully."""
    subject = await trial.acknowledged()
    ttl = (await trial.heartbeat(subject, TTL)).get("ttl_seconds")
    await trial.stop(subject, force=False)
    if await trial.state(subject) != STOPPING:
        raise Untried("a graceful stop ends the item at once")
    again = await trial.delivery(subject, _check_ttl(ttl) + 2 * SLACK_SECONDS)
    same_or_breaks(again is None, "it is delivered: the session runs again")
    state = await trial.state(subject)
    same_or_differs(state == STOPPED, f"it is still {state}")


async def _redelivered_item(trial: Trial) -> tuple[Subject, str]:
    """Return an item that was delivered again after its lease lapsed, and its former id."""
    subject = await trial.acknowledged()
    ttl = (await trial.heartbeat(subject, TTL)).get("ttl_seconds")
    former = subject.id
    try:
        await _await_redelivery(trial, subject, ttl)
    except Breaks:
        raise Untried("the item is not delivered again") from None
    return subject, former


async def _await_redelivery(trial: Trial, subject: Subject, ttl: object) -> Delivery:
    again = await trial.delivery(subject, _check_ttl(ttl) + LATE_SECONDS)
    if again is None:
        raise Breaks("never: an item is lost when its worker dies")
    return again


def _check_ttl(ttl: object) -> float:
    if isinstance(ttl, int | float) and 0 < ttl <= TTL_LONGEST:
        return ttl
    raise Untried(f"the lease lasts longer than {TTL_LONGEST} s")
