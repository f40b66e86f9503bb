"""The state machine of a lease, without I/O: tables of transitions, and property tests."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from workpool.errors import (
    ConflictError,
    ControlPlaneError,
    LeaseLost,
    PreconditionError,
    RefusedError,
    SessionEnded,
    TransientError,
)
from workpool.pool.lease import RETRY_PARTS, HeartbeatDecision, Lease
from workpool.server import APIError, Operations, Poll
from workpool.server.http.server_dialects import QODER
from workpool.server.state_machine import heartbeat_answer
from workpool.wire.items import Heartbeat, WorkItem, parse_heartbeat, parse_item
from workpool.wire.protocol import WORK_HEARTBEAT

if TYPE_CHECKING:
    from collections.abc import Callable

    from workpool.pool.lease import HeartbeatAttempt

ACKED = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
TTL = 60
BEGUN_AT = 0.0
SENT, ANSWERED = 20.0, 22.0
"""Times at which the heartbeat of a table row is sent and answered; the lease ends at 60."""


def make_item(**changes: Any) -> WorkItem:
    fields: dict[str, Any] = {
        "id": "work_1",
        "type": "session",
        "session_id": "sesn_1",
        "environment_id": "env_1",
        "state": "starting",
        "metadata": MappingProxyType({}),
        "created_at": ACKED,
        "acknowledged_at": ACKED,
        "started_at": None,
        "latest_heartbeat_at": None,
        "last_heartbeat": None,
        "stop_requested_at": None,
        "stopped_at": None,
    }
    return WorkItem(**{**fields, **changes})


def make_lease(
    *,
    ttl: int = TTL,
    request_timeout: float = 10.0,
    state: str = "starting",
    polled_at: float | None = None,
    parents_heartbeat: str | None = None,
) -> Lease:
    return Lease(
        make_item(state=state),
        0.0,
        ttl=ttl,
        request_timeout=request_timeout,
        polled_at=polled_at,
        parents_heartbeat=parents_heartbeat,
    )


def make_heartbeat(number: int = 1, **changes: Any) -> Heartbeat:
    fields: dict[str, Any] = {
        "last_heartbeat": f"hb_{number}",
        "lease_extended": True,
        "state": "active",
        "ttl_seconds": TTL,
    }
    return Heartbeat(**{**fields, **changes})


def make_transient_error(
    reason: Any = "timeout", retry_after: float | None = None
) -> TransientError:
    return TransientError("heartbeat", None, "x", reason=reason, retry_after=retry_after)


def make_refused_error(status: int) -> RefusedError:
    return RefusedError("heartbeat", status, "x")


CONFLICT = ConflictError("heartbeat", 409, "x")
PRECONDITION = PreconditionError("heartbeat", 412, "x")
THROTTLED = make_transient_error("throttled")


def begin_heartbeat_and_apply_answer(
    lease: Lease, sent: float, answered: float, outcome: Heartbeat | ControlPlaneError
) -> HeartbeatDecision:
    return lease.apply_heartbeat_answer(answered, lease.begin_heartbeat(sent, sent), outcome)


def fresh_lease() -> Lease:
    """Return a lease without a heartbeat, whose ack was sent at time 0."""
    return make_lease()


def unsettled_lease() -> Lease:
    """Return a lease without a heartbeat; the ack was answered with the state `active`."""
    return make_lease(state="active")


def unsettled_lease_after_unanswered_heartbeat() -> Lease:
    """Return a lease whose ack was answered with `active`; its first heartbeat got no answer."""
    lease = unsettled_lease()
    begin_heartbeat_and_apply_answer(lease, 5.0, 6.0, make_transient_error())
    return lease


def lease_settled_by_heartbeat() -> Lease:
    """Return a lease whose ack was answered with `active`; its first heartbeat succeeded."""
    lease = unsettled_lease()
    begin_heartbeat_and_apply_answer(lease, BEGUN_AT, BEGUN_AT, make_heartbeat())
    return lease


def renewed_lease(**values: Any) -> Lease:
    """Return a lease whose first heartbeat was sent at time 0 and succeeded."""
    lease = make_lease(**values)
    begin_heartbeat_and_apply_answer(
        lease, BEGUN_AT, BEGUN_AT, make_heartbeat(ttl_seconds=values.get("ttl", TTL))
    )
    return lease


def lease_with_unanswered_heartbeat() -> Lease:
    """Return a lease whose second heartbeat was not answered, so it may have been applied."""
    lease = renewed_lease()
    begin_heartbeat_and_apply_answer(lease, 5.0, 6.0, make_transient_error())
    return lease


def lease_with_throttled_heartbeat() -> Lease:
    """Return a lease whose second heartbeat was answered with 429, so it was not applied."""
    lease = renewed_lease()
    begin_heartbeat_and_apply_answer(lease, 5.0, 6.0, THROTTLED)
    return lease


def lease_confirmed_by_reading_item() -> Lease:
    """Return a lease that a read of the item has confirmed after a heartbeat got a 409."""
    lease = renewed_lease()
    begin_heartbeat_and_apply_answer(lease, 5.0, 6.0, CONFLICT)
    lease.apply_item_read_outcome(7.0, "conflict", item_of_this_worker())
    return lease


def lease_in_handoff() -> Lease:
    """Return a lease that a child process may have taken over."""
    lease = renewed_lease()
    lease.suspend_heartbeats()
    lease.resume_heartbeats(SENT)
    return lease


def stopped_lease() -> Lease:
    """Return a lease of an item that this pool may have stopped."""
    lease = renewed_lease()
    lease.own_stop = True
    return lease


def releasing_lease() -> Lease:
    """Return a lease whose next heartbeat is the last one, because the pool releases the item."""
    lease = renewed_lease()
    lease.schedule_last_heartbeat(SENT, 12.0)
    return lease


def item_of_this_worker(**changes: Any) -> WorkItem:
    return make_item(**{"state": "active", "last_heartbeat": "hb_1", **changes})


def stopped_item() -> WorkItem:
    return item_of_this_worker(state="stopped")


def item_of_another_worker() -> WorkItem:
    return item_of_this_worker(acknowledged_at=ACKED + timedelta(seconds=90))


class ExpectedLease(NamedTuple):
    """The expected decision after an answer, and the lease after that decision.

    `due` is the next heartbeat's time in seconds after the answer; None is not checked.
    """

    then: str
    result: str | None
    status: str = "held"
    confirmed: bool = False
    deadline: float = 60.0
    due: float | None = None


FIRST_REPEAT, SECOND_REPEAT = TTL / RETRY_PARTS[0], TTL / RETRY_PARTS[1]
LOST = math.inf
HELD = ExpectedLease("held", "ok", deadline=SENT + TTL)
READ_CONFLICT = ExpectedLease("read", "conflict")
READ_PRECONDITION = ExpectedLease("read", "precondition")
NOT_OURS = ExpectedLease("over", "conflict", "lost", confirmed=True, due=LOST)
GONE = ExpectedLease("over", "precondition", "lost", confirmed=True, due=LOST)

ANSWERS: list[tuple[Callable[[], Lease], Heartbeat | ControlPlaneError, ExpectedLease]] = [
    # A successful heartbeat sets a new deadline.
    (fresh_lease, make_heartbeat(), HELD),
    (renewed_lease, make_heartbeat(2), HELD),
    (lease_with_unanswered_heartbeat, make_heartbeat(2), HELD),
    (lease_in_handoff, make_heartbeat(2), HELD),
    (renewed_lease, make_heartbeat(2, ttl_seconds=30),
     ExpectedLease("held", "ok", deadline=SENT + 30)),
    (renewed_lease, make_heartbeat(2, ttl_seconds=600),
     ExpectedLease("held", "ok", deadline=SENT + 600)),
    (renewed_lease, make_heartbeat(2, state="stopping"), HELD),
    (unsettled_lease, make_heartbeat(), HELD),
    (unsettled_lease_after_unanswered_heartbeat, make_heartbeat(), HELD),
    # The state `stopped` ends the lease at once, whether or not the answer extends the lease.
    (renewed_lease, make_heartbeat(2, state="stopped"),
     ExpectedLease("over", "ok", "stopped", due=LOST)),
    (stopped_lease, make_heartbeat(2, state="stopped"),
     ExpectedLease("over", "ok", "finished", due=LOST)),
    (renewed_lease, make_heartbeat(2, state="stopped", lease_extended=False),
     ExpectedLease("over", "ok", "stopped", due=LOST)),
    (stopped_lease, make_heartbeat(2, state="stopped", lease_extended=False),
     ExpectedLease("over", "ok", "finished", due=LOST)),
    (renewed_lease, make_heartbeat(2, state="stopped", lease_extended=False, last_heartbeat=""),
     ExpectedLease("over", "ok", "stopped", due=LOST)),
    (releasing_lease, make_heartbeat(2, ttl_seconds=12),
     ExpectedLease("over", "ok", "released", deadline=SENT + 12, due=LOST)),
    # An answer that does not extend the lease leaves its deadline unchanged.
    (renewed_lease, make_heartbeat(2, lease_extended=False, state="stopping"),
     ExpectedLease("held", "ok")),
    (renewed_lease, make_heartbeat(2, lease_extended=False), READ_CONFLICT),
    (stopped_lease, make_heartbeat(2, lease_extended=False), READ_CONFLICT),
    # An answer without extension and without a last heartbeat means that the lease is lost.
    (renewed_lease, make_heartbeat(2, lease_extended=False, last_heartbeat=""), NOT_OURS),
    (lease_with_unanswered_heartbeat, make_heartbeat(2, lease_extended=False, last_heartbeat=""),
     NOT_OURS),
    (renewed_lease, make_heartbeat(2, lease_extended=False, last_heartbeat="", state="stopping"),
     NOT_OURS),
    # If the item was `active` at its ack, only a heartbeat that extends the lease shows that this
    # worker holds the item. A read of the item cannot show it.
    (unsettled_lease, make_heartbeat(lease_extended=False), NOT_OURS),
    (unsettled_lease, make_heartbeat(state="stopping"),
     ExpectedLease("over", "conflict", "lost", due=LOST)),
    (unsettled_lease, CONFLICT, NOT_OURS),
    (unsettled_lease, PRECONDITION, GONE),
    (unsettled_lease_after_unanswered_heartbeat, PRECONDITION, GONE),
    (unsettled_lease_after_unanswered_heartbeat, CONFLICT, NOT_OURS),
    # After a transient error, another heartbeat is due after a short delay.
    (renewed_lease, make_transient_error("timeout"),
     ExpectedLease("again", "timeout", due=FIRST_REPEAT)),
    (renewed_lease, make_transient_error("network"),
     ExpectedLease("again", "transient", due=FIRST_REPEAT)),
    (renewed_lease, make_transient_error("server_error"),
     ExpectedLease("again", "transient", due=FIRST_REPEAT)),
    (renewed_lease, make_transient_error("bad_body"),
     ExpectedLease("again", "transient", due=FIRST_REPEAT)),
    (renewed_lease, THROTTLED, ExpectedLease("again", "transient", due=FIRST_REPEAT)),
    (lease_with_unanswered_heartbeat, make_transient_error("network"),
     ExpectedLease("again", "transient", due=SECOND_REPEAT)),
    (renewed_lease, make_transient_error("throttled", 7.0),
     ExpectedLease("again", "transient", due=7.0)),
    (renewed_lease, make_transient_error("server_error", 300.0),
     ExpectedLease("again", "transient", due=(54.0 - ANSWERED) / 2)),
    # After 412 the item is read only if an unanswered heartbeat of this process, or one of its
    # child process, may have been applied.
    (fresh_lease, PRECONDITION, GONE),
    (renewed_lease, PRECONDITION, GONE),
    (lease_with_throttled_heartbeat, PRECONDITION, GONE),
    (lease_confirmed_by_reading_item, PRECONDITION, GONE),
    (lease_with_unanswered_heartbeat, PRECONDITION, READ_PRECONDITION),
    (lease_in_handoff, PRECONDITION, READ_PRECONDITION),
    # After 409 the item is always read, because the answer does not show who holds it.
    (fresh_lease, CONFLICT, READ_CONFLICT),
    (renewed_lease, CONFLICT, READ_CONFLICT),
    (stopped_lease, CONFLICT, READ_CONFLICT),
    # After 401, 403 or 405 the heartbeat is repeated, because the credential may be replaced.
    # After 404 (the control plane has no such item) or 400 (the request is invalid) the lease is
    # lost.
    (renewed_lease, make_refused_error(401), ExpectedLease("again", "rejected", due=FIRST_REPEAT)),
    (renewed_lease, make_refused_error(403), ExpectedLease("again", "rejected", due=FIRST_REPEAT)),
    (renewed_lease, make_refused_error(405), ExpectedLease("again", "rejected", due=FIRST_REPEAT)),
    (renewed_lease, make_refused_error(404),
     ExpectedLease("over", "rejected", "lost", confirmed=True, due=LOST)),
    (renewed_lease, make_refused_error(400), ExpectedLease("over", "rejected", "lost", due=LOST)),
]  # fmt: skip


@pytest.mark.parametrize(("state", "outcome", "expected"), ANSWERS)
def test_heartbeat_answer_determines_next_step_and_status_and_deadline_of_lease(
    state: Callable[[], Lease],
    outcome: Heartbeat | ControlPlaneError,
    expected: ExpectedLease,
) -> None:
    lease = state()
    decision = begin_heartbeat_and_apply_answer(lease, SENT, ANSWERED, outcome)
    assert decision == (expected.then, expected.result)
    assert (lease.status, lease.is_loss_confirmed) == (expected.status, expected.confirmed)
    assert lease.deadline == expected.deadline
    assert lease.in_flight == (expected.then == "read")
    if expected.due is not None:
        assert lease.due_at == pytest.approx(ANSWERED + expected.due)


@pytest.mark.parametrize(("drawn", "part"), [(0.0, 1.0), (0.5, 0.95), (1.0, 0.9)])
@pytest.mark.parametrize("ttl", [10, 60, 600])
def test_next_heartbeat_is_due_with_jitter_shortly_before_third_of_ttl(
    monkeypatch: pytest.MonkeyPatch, ttl: int, drawn: float, part: float
) -> None:
    monkeypatch.setattr("random.random", lambda: drawn)
    assert renewed_lease(ttl=ttl).due_at == pytest.approx(ttl / 3 * part)


@pytest.mark.parametrize(("ttl", "margin"), [(10, 1), (60, 6), (600, 60)])
def test_give_up_time_is_one_tenth_of_ttl_before_lease_deadline(ttl: int, margin: float) -> None:
    lease = renewed_lease(ttl=ttl)
    assert (lease.deadline, lease.give_up_at) == (ttl, ttl - margin)


def test_lease_before_first_heartbeat_ends_sixty_seconds_after_ack() -> None:
    lease = make_lease(ttl=600)
    assert (lease.deadline, lease.give_up_at, lease.due_at) == (60, 54, 0)
    assert lease.is_held(59.9)
    assert not lease.begun


def test_lease_deadline_counts_from_poll_if_item_is_active_after_ack() -> None:
    lease = make_lease(ttl=30, state="active", polled_at=-9.0)
    assert (lease.deadline, lease.give_up_at) == (51, 45)
    assert lease.unsettled
    begin_heartbeat_and_apply_answer(lease, 1.0, 2.0, make_heartbeat(ttl_seconds=30))
    assert lease.deadline == 31
    assert not lease.unsettled


def test_deadline_of_lease_begun_by_ack_counts_from_ack_and_not_from_poll() -> None:
    assert make_lease(polled_at=-9.0).deadline == 60
    assert make_lease(polled_at=-9.0, state="active", parents_heartbeat="hb").deadline == 60


def test_granted_ttl_replaces_requested_ttl() -> None:
    lease = make_lease(ttl=600)
    begin_heartbeat_and_apply_answer(lease, 0.0, 1.0, make_heartbeat(ttl_seconds=30))
    assert lease.deadline == 30
    assert lease.due_at <= 10


@pytest.mark.parametrize(
    ("ttl", "request_timeout", "sent", "timeout"),
    [(60, 10.0, 20, 10), (30, 10.0, 10, 5), (60, 2.0, 20, 2), (60, 10.0, 51, 3), (10, 10.0, 9, 0)],
)
def test_heartbeat_timeout_is_limited_by_request_timeout_ttl_and_deadline(
    ttl: int, request_timeout: float, sent: float, timeout: float
) -> None:
    attempt = renewed_lease(ttl=ttl, request_timeout=request_timeout).begin_heartbeat(sent, sent)
    assert attempt.timeout == pytest.approx(timeout, abs=0.001)
    assert attempt.timeout > 0


@pytest.mark.parametrize("lease", [make_lease(ttl=10), releasing_lease()], ids=["first", "release"])
def test_timeout_of_first_or_last_heartbeat_leaves_time_for_another_attempt(
    lease: Lease,
) -> None:
    attempt = lease.begin_heartbeat(SENT, SENT)
    assert attempt.timeout <= attempt.ttl / 6
    assert SENT + attempt.timeout < lease.give_up_at


def test_heartbeat_sent_after_its_due_time_reports_lag_in_seconds() -> None:
    assert renewed_lease().begin_heartbeat(20.0, 18.5).lag == 1.5
    assert renewed_lease().begin_heartbeat(20.0, 21.0).lag == 0


def test_failed_heartbeats_are_repeated_with_growing_delay() -> None:
    lease, now, delays = renewed_lease(), 20.0, []
    for _ in range(5):
        begin_heartbeat_and_apply_answer(lease, now, now, THROTTLED)
        delays.append(lease.due_at - now)
        now = lease.due_at
    assert delays == [pytest.approx(seconds) for seconds in (1, 2, 4, 4, 4)]
    begin_heartbeat_and_apply_answer(lease, now, now, make_heartbeat(2))
    begin_heartbeat_and_apply_answer(lease, now + 20, now + 20, THROTTLED)
    assert lease.due_at - (now + 20) == pytest.approx(1)


def test_heartbeat_answer_after_deadline_does_not_extend_lease() -> None:
    lease = renewed_lease()
    assert begin_heartbeat_and_apply_answer(lease, 20.0, 59.9, make_heartbeat(2)).then == "held"
    lease = renewed_lease()
    assert begin_heartbeat_and_apply_answer(lease, 20.0, 60.0, make_heartbeat(2)) == (
        "over",
        "timeout",
    )
    assert (lease.status, lease.is_loss_confirmed, lease.deadline) == ("lost", False, 60)


def test_unanswered_heartbeat_shortens_lease_to_requested_ttl() -> None:
    lease = make_lease(ttl=10)
    begin_heartbeat_and_apply_answer(lease, 1.0, 2.0, make_transient_error())
    assert (lease.deadline, lease.give_up_at) == (11, 10)


@pytest.mark.parametrize(
    "outcome", [THROTTLED, make_refused_error(401), CONFLICT, PRECONDITION], ids=repr
)
def test_refused_heartbeat_does_not_shorten_lease(
    outcome: ControlPlaneError,
) -> None:
    lease = make_lease(ttl=10)
    begin_heartbeat_and_apply_answer(lease, 1.0, 2.0, outcome)
    assert lease.deadline == 60


def test_heartbeat_that_was_not_sent_does_not_shorten_lease() -> None:
    lease = make_lease(ttl=10)
    lease.record_unsent_heartbeat(lease.begin_heartbeat(1.0, 1.0))
    assert (lease.deadline, lease.in_flight) == (60, False)


def test_heartbeat_abandoned_in_flight_counts_as_unanswered_heartbeat() -> None:
    lease = renewed_lease()
    lease.begin_heartbeat(5.0, 5.0)
    lease.record_unanswered_heartbeat()
    assert not lease.in_flight
    assert (
        begin_heartbeat_and_apply_answer(lease, SENT, ANSWERED, PRECONDITION)
        == READ_PRECONDITION[:2]
    )


@pytest.mark.parametrize(
    "outcome",
    [make_heartbeat(2), make_transient_error(), PRECONDITION, make_refused_error(404)],
    ids=repr,
)
def test_heartbeat_answer_after_end_of_lease_changes_nothing(
    outcome: Heartbeat | ControlPlaneError,
) -> None:
    lease = renewed_lease()
    attempt = lease.begin_heartbeat(SENT, SENT)
    lease.end_lease("released")
    assert lease.apply_heartbeat_answer(ANSWERED, attempt, outcome) == ("over", None)
    assert (lease.status, lease.is_loss_confirmed, lease.deadline) == ("released", False, 60)
    assert (lease.due_at, lease.in_flight) == (math.inf, False)


def test_next_heartbeat_refers_to_latest_answered_heartbeat() -> None:
    lease = make_lease()
    assert lease.begin_heartbeat(0.0, 0.0).expected == "NO_HEARTBEAT"
    lease = renewed_lease()
    assert lease.expected == "hb_1"
    begin_heartbeat_and_apply_answer(lease, SENT, ANSWERED, make_transient_error())
    assert lease.expected == "hb_1"
    begin_heartbeat_and_apply_answer(lease, SENT + 5, SENT + 5, make_heartbeat(2))
    assert lease.expected == "hb_2"


def test_lease_in_child_process_refers_to_last_heartbeat_of_parent_process() -> None:
    assert make_lease(parents_heartbeat="hb_7").expected == "hb_7"


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (item_of_this_worker(last_heartbeat="hb_5"), "hb_5"),
        (item_of_this_worker(last_heartbeat=None), "NO_HEARTBEAT"),
        # An item that is `starting` still shows the last heartbeat of its former holder.
        (item_of_this_worker(state="starting", last_heartbeat="hb_5"), "NO_HEARTBEAT"),
    ],
)
def test_next_heartbeat_refers_to_last_heartbeat_in_item_that_was_read(
    item: WorkItem, expected: str
) -> None:
    lease = lease_with_unanswered_heartbeat()
    begin_heartbeat_and_apply_answer(lease, SENT, ANSWERED, PRECONDITION)
    lease.apply_item_read_outcome(23.0, "precondition", item)
    assert lease.expected == expected


READS: list[tuple[Callable[[], Lease], WorkItem | ControlPlaneError | None, ExpectedLease]] = [
    (lease_with_unanswered_heartbeat, item_of_this_worker(),
     ExpectedLease("again", "recovered", due=0)),
    (lease_with_unanswered_heartbeat, item_of_this_worker(last_heartbeat="hb_2"),
     ExpectedLease("again", "recovered", due=0)),
    (lease_with_unanswered_heartbeat, item_of_this_worker(state="stopping"),
     ExpectedLease("again", "recovered", due=0)),
    # The item is read because the answer to a heartbeat, such as 409, did not show who holds it. If
    # the first read shows that this worker holds it, the next heartbeat is due at once. After a
    # second such read without a successful heartbeat between the two, the next heartbeat is
    # delayed. Otherwise, heartbeats and reads could follow each other without a pause.
    (lease_confirmed_by_reading_item, item_of_this_worker(),
     ExpectedLease("again", "recovered", due=FIRST_REPEAT)),
    (renewed_lease, stopped_item(), ExpectedLease("over", "conflict", "stopped", due=LOST)),
    (stopped_lease, stopped_item(), ExpectedLease("over", "conflict", "finished", due=LOST)),
    (renewed_lease, item_of_this_worker(state="queued"),
     ExpectedLease("over", "conflict", "lost", confirmed=True, due=LOST)),
    (renewed_lease, item_of_this_worker(state="starting"),
     ExpectedLease("again", "recovered", due=0)),
    # The item was `active` at its ack. If it is `starting` now, it has been claimed again.
    (lease_settled_by_heartbeat, item_of_this_worker(state="starting"),
     ExpectedLease("over", "conflict", "lost", confirmed=True, due=LOST)),
    (renewed_lease, item_of_another_worker(),
     ExpectedLease("over", "conflict", "lost", confirmed=True, due=LOST)),
    (stopped_lease, item_of_another_worker(),
     ExpectedLease("over", "conflict", "lost", confirmed=True, due=LOST)),
    (renewed_lease, item_of_this_worker(acknowledged_at=None),
     ExpectedLease("over", "conflict", "lost", confirmed=True, due=LOST)),
    # The read found no item, or the credential may not read items.
    (renewed_lease, None, ExpectedLease("over", "conflict", "lost", due=LOST)),
    (lease_with_unanswered_heartbeat, None, ExpectedLease("over", "conflict", "lost", due=LOST)),
    (stopped_lease, None, ExpectedLease("over", "conflict", "finished", due=LOST)),
    # During a handoff, a heartbeat that this process did not send is from the child process.
    (lease_in_handoff, item_of_this_worker(), ExpectedLease("again", "recovered", due=0)),
    (lease_in_handoff, item_of_this_worker(last_heartbeat="hb_2"),
     ExpectedLease("over", "conflict", "handed_off", due=LOST)),
    (lease_in_handoff, item_of_this_worker(last_heartbeat="hb_2", state="stopped"),
     ExpectedLease("over", "conflict", "handed_off", due=LOST)),
    (lease_in_handoff, item_of_this_worker(state="starting"),
     ExpectedLease("over", "conflict", "lost", confirmed=True, due=LOST)),
    (lease_in_handoff, item_of_another_worker(),
     ExpectedLease("over", "conflict", "lost", confirmed=True, due=LOST)),
    # If the read of the item fails, its error determines the delay of the next heartbeat.
    (renewed_lease, make_transient_error("timeout"),
     ExpectedLease("again", "timeout", due=FIRST_REPEAT)),
    (renewed_lease, make_transient_error("server_error", 9.0),
     ExpectedLease("again", "transient", due=9.0)),
    (renewed_lease, make_refused_error(401), ExpectedLease("again", "rejected", due=FIRST_REPEAT)),
    (renewed_lease, make_refused_error(404),
     ExpectedLease("over", "rejected", "lost", confirmed=True, due=LOST)),
    (renewed_lease, CONFLICT, ExpectedLease("again", "rejected", due=FIRST_REPEAT)),
    (renewed_lease, PRECONDITION, ExpectedLease("again", "rejected", due=FIRST_REPEAT)),
]  # fmt: skip
READ_AT = ANSWERED + 1


@pytest.mark.parametrize(("state", "outcome", "expected"), READS)
def test_answer_to_get_request_determines_next_step_and_status_of_lease(
    state: Callable[[], Lease],
    outcome: WorkItem | ControlPlaneError | None,
    expected: ExpectedLease,
) -> None:
    lease = state()
    begin_heartbeat_and_apply_answer(lease, SENT, ANSWERED, CONFLICT)
    assert lease.in_flight
    decision = lease.apply_item_read_outcome(READ_AT, "conflict", outcome)
    assert decision == (expected.then, expected.result)
    assert (lease.status, lease.is_loss_confirmed) == (expected.status, expected.confirmed)
    assert (lease.deadline, lease.in_flight) == (60, False)  # A read never extends the lease.
    assert lease.due_at == pytest.approx(READ_AT + (expected.due or 0))


def test_heartbeat_answer_with_status_412_causes_get_request_if_item_holder_is_unknown() -> None:
    lease = renewed_lease()
    begin_heartbeat_and_apply_answer(lease, SENT, ANSWERED, CONFLICT)
    lease.apply_item_read_outcome(READ_AT, "conflict", make_transient_error())
    assert begin_heartbeat_and_apply_answer(lease, 25.0, 25.0, PRECONDITION).then == "read"
    lease.apply_item_read_outcome(26.0, "precondition", item_of_this_worker())
    assert begin_heartbeat_and_apply_answer(lease, 26.0, 26.0, PRECONDITION) == (
        "over",
        "precondition",
    )


def test_answer_to_get_request_that_arrives_after_lease_end_changes_nothing() -> None:
    lease = renewed_lease()
    begin_heartbeat_and_apply_answer(lease, SENT, ANSWERED, CONFLICT)
    lease.end_lease("released")
    assert lease.apply_item_read_outcome(READ_AT, "conflict", item_of_another_worker()) == (
        "over",
        None,
    )
    assert (lease.status, lease.is_loss_confirmed, lease.in_flight) == ("released", False, False)


@pytest.mark.parametrize(("state", "requested"), [(renewed_lease, True), (stopped_lease, False)])
def test_answer_that_item_is_stopping_counts_as_stop_request_unless_pool_stopped_it(
    state: Callable[[], Lease], *, requested: bool
) -> None:
    lease = state()
    begin_heartbeat_and_apply_answer(lease, SENT, ANSWERED, make_heartbeat(2, state="stopping"))
    assert lease.stop_requested == requested
    begin_heartbeat_and_apply_answer(lease, 40.0, 41.0, make_heartbeat(3))
    assert lease.stop_requested == requested  # A stop request is never withdrawn.


def test_first_heartbeat_answer_begins_lease_even_if_item_is_stopping() -> None:
    lease = fresh_lease()
    begin_heartbeat_and_apply_answer(lease, 0.0, 1.0, make_heartbeat(state="stopping"))
    assert lease.begun
    assert lease.stop_requested
    assert lease.is_held(1.0)


@pytest.mark.parametrize(
    ("delay", "ttl"), [(0, 10), (-1, 10), (9.9, 10), (12.4, 12), (1e9, 600), (math.inf, 600)]
)
def test_release_delay_is_limited_to_ttl_range_of_protocol(delay: float, ttl: int) -> None:
    lease = renewed_lease()
    lease.schedule_last_heartbeat(5.0, delay)
    assert lease.due_at == 5.0
    attempt = lease.begin_heartbeat(5.0, 5.0)
    assert (attempt.ttl, attempt.last) == (ttl, True)


def test_lease_released_during_heartbeat_ends_after_one_further_heartbeat() -> None:
    lease = renewed_lease()
    attempt = lease.begin_heartbeat(SENT, SENT)
    lease.schedule_last_heartbeat(SENT + 1, 10.0)
    assert lease.apply_heartbeat_answer(ANSWERED, attempt, make_heartbeat(2)).then == "held"
    assert (lease.status, lease.due_at) == ("held", SENT + 1)
    assert (
        begin_heartbeat_and_apply_answer(
            lease, ANSWERED, ANSWERED, make_heartbeat(3, ttl_seconds=10)
        ).then
        == "over"
    )
    assert lease.status == "released"


def test_unanswered_heartbeat_that_releases_lease_is_repeated_with_same_ttl() -> None:
    lease = releasing_lease()
    begin_heartbeat_and_apply_answer(lease, SENT, ANSWERED, make_transient_error())
    # If the unanswered heartbeat was applied, the lease ends after the requested ttl of 12 s.
    assert lease.deadline == SENT + 12
    attempt = lease.begin_heartbeat(23.0, 23.0)
    assert (attempt.ttl, attempt.last) == (12, True)
    assert lease.deadline == SENT + 12


def test_last_heartbeat_releases_lease_even_if_answer_says_that_item_is_stopping() -> None:
    lease = releasing_lease()
    begin_heartbeat_and_apply_answer(
        lease, SENT, ANSWERED, make_heartbeat(2, lease_extended=False, state="stopping")
    )
    assert lease.status == "released"


def test_request_to_check_lease_makes_heartbeat_due_at_once() -> None:
    lease = renewed_lease()
    lease.make_heartbeat_due(5.0)
    lease.make_heartbeat_due(6.0)
    assert lease.due_at == 5.0


def test_immediate_heartbeat_is_not_scheduled_while_heartbeats_are_suspended() -> None:
    lease = renewed_lease()
    lease.suspend_heartbeats()
    lease.make_heartbeat_due(5.0)
    assert lease.due_at == math.inf


def test_machine_pause_makes_heartbeat_of_lease_due_at_once() -> None:
    lease = renewed_lease()
    assert lease.request_verification_after_pause(5.0)
    assert lease.due_at == 5.0


def test_failed_heartbeat_after_machine_pause_is_repeated_after_delay() -> None:
    lease = renewed_lease()
    lease.request_verification_after_pause(5.0)
    begin_heartbeat_and_apply_answer(lease, 5.0, 5.1, THROTTLED)
    due_at = lease.due_at
    assert due_at > 5.1
    assert not lease.request_verification_after_pause(5.2)
    assert lease.due_at == due_at


def test_second_machine_pause_requires_lease_verification_again() -> None:
    lease = renewed_lease()
    lease.request_verification_after_pause(5.0)
    begin_heartbeat_and_apply_answer(lease, 5.0, 5.1, make_heartbeat(2))
    assert lease.request_verification_after_pause(7.0)


def test_successful_heartbeat_records_wall_clock_offset_of_its_send_time() -> None:
    lease = renewed_lease()
    attempt = lease.begin_heartbeat(SENT, SENT, 30.0)
    assert lease.clock_offset == 0.0
    lease.apply_heartbeat_answer(ANSWERED, attempt, make_heartbeat(2))
    assert lease.clock_offset == 30.0


@pytest.mark.parametrize("extended", [True, False])
def test_lease_is_lost_if_heartbeat_after_machine_pause_finds_item_stopping(
    *, extended: bool
) -> None:
    lease = renewed_lease()
    lease.request_verification_after_pause(SENT)
    attempt = lease.begin_heartbeat(SENT, SENT, 30.0)
    answer = make_heartbeat(2, lease_extended=extended, state="stopping")
    assert lease.apply_heartbeat_answer(ANSWERED, attempt, answer) == HeartbeatDecision(
        "over", "conflict"
    )
    assert (lease.status, lease.is_loss_confirmed) == ("lost", False)


def test_failed_heartbeat_records_no_clock_offset() -> None:
    lease = renewed_lease()
    lease.apply_heartbeat_answer(
        ANSWERED, lease.begin_heartbeat(SENT, SENT, 30.0), make_transient_error()
    )
    assert lease.clock_offset == 0.0


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda _: None, None),
        (lambda lease: lease.end_lease("lost"), LeaseLost),
        (lambda lease: lease.end_lease("released"), LeaseLost),
        (lambda lease: lease.end_lease("finished"), LeaseLost),
        (lambda lease: lease.end_lease("stopped"), SessionEnded),
        (lambda lease: lease.end_lease("handed_off"), SessionEnded),
        (lambda lease: setattr(lease, "closed", True), SessionEnded),
    ],
)
def test_lease_check_raises_error_if_lease_is_not_held(
    change: Callable[[Lease], None], error: type[Exception] | None
) -> None:
    lease = renewed_lease()
    change(lease)
    assert lease.is_held(1.0) == (error is None)
    assert (lease.remaining_seconds(1.0) == 59.0) == (error is None)
    if error is None:
        lease.check_held(59.9)
        with pytest.raises(LeaseLost):
            lease.check_held(60.0)
        assert lease.remaining_seconds(60.0) == 0
    else:
        with pytest.raises(error):
            lease.check_held(1.0)
        assert lease.remaining_seconds(1.0) == 0


def test_lease_ends_as_lost_at_give_up_time_before_deadline() -> None:
    lease = renewed_lease()
    assert not lease.end_if_expired(53.9)
    assert lease.end_if_expired(54.0)
    assert (lease.status, lease.is_loss_confirmed, lease.due_at) == ("lost", False, math.inf)


@pytest.mark.parametrize("first", ["finished", "released", "stopped", "lost", "handed_off"])
@pytest.mark.parametrize("second", ["finished", "released", "stopped", "lost", "handed_off"])
def test_status_of_ended_lease_never_changes(first: Any, second: Any) -> None:
    lease = renewed_lease()
    lease.end_lease(first, "taken")
    lease.end_lease(second, "taken")
    lease.end_if_expired(1000.0)
    assert (lease.status, lease.is_loss_confirmed) == (first, first == "lost")


ENVIRONMENT = "env_00000000000070008000000000000001"
START = 1_772_366_400.0
LATENCY = 0.001
seconds = st.floats(0.0, 40.0, allow_nan=False, allow_subnormal=False)
statuses = st.sampled_from([400, 401, 403, 404, 409, 412, 429, 500, 503])


class ControlPlaneWithManualClock:
    """The operations of the embedded control plane with a clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.operations = Operations([ENVIRONMENT], now=lambda: START + self.now)
        (item,) = self.operations.enqueue(ENVIRONMENT)
        self.work_id = item.id

    def poll_item(self, worker: str) -> bool:
        return self.operations.poll(ENVIRONMENT, Poll(worker, 0, 0)) is not None

    def ack_item(self, worker: str) -> WorkItem:
        return parse_item(
            QODER.item_json(self.operations.ack_item(ENVIRONMENT, self.work_id, worker))
        )

    def extend_lease(self, expected: str | None, ttl: int) -> Heartbeat | ControlPlaneError:
        try:
            item = self.operations.heartbeat(ENVIRONMENT, self.work_id, expected, ttl)
        except APIError as refusal:
            return make_error_for_status(refusal.status)
        return parse_heartbeat({"type": WORK_HEARTBEAT, **heartbeat_answer(item, extended=True)})

    def read_item(self) -> WorkItem:
        return parse_item(QODER.item_json(self.operations.get_item(ENVIRONMENT, self.work_id)))

    def get_item_state(self) -> str:
        self.operations.get_queue(ENVIRONMENT)
        return self.operations.get_item(ENVIRONMENT, self.work_id).state

    def stop_item(self, worker: str, *, force: bool) -> None:
        self.operations.stop_item(ENVIRONMENT, self.work_id, worker, force=force)


def make_error_for_status(status: int) -> ControlPlaneError:
    match status:
        case 409:
            return CONFLICT
        case 412:
            return PRECONDITION
        case 429:
            return THROTTLED
        case 500 | 503:
            return make_transient_error("server_error", 3.0)
        case _:
            return make_refused_error(status)


class LeaseStateMachine(RuleBasedStateMachine):
    """A lease with late, repeated and lost heartbeats, and another worker that claims its item."""

    def __init__(self) -> None:
        super().__init__()
        self.plane = ControlPlaneWithManualClock()
        self.rival_has_it = False
        self.attempt: HeartbeatAttempt | None = None
        self.reading = False
        self.answer: Heartbeat | ControlPlaneError | None = None
        self.item: WorkItem | None = None
        self.undelivered: list[HeartbeatAttempt] = []
        self.final: tuple[str, bool] | None = None
        self.last_decision = ""

    @property
    def current_time(self) -> float:
        return self.plane.now

    @initialize(ttl=st.sampled_from([10, 30, 60, 600]), latency=st.floats(LATENCY, 5.0))
    def acknowledge_item(self, ttl: int, latency: float) -> None:
        self.plane.poll_item("ours")
        acked_at = self.current_time
        self.plane.now += latency
        self.lease = Lease(self.plane.ack_item("ours"), acked_at, ttl=ttl, request_timeout=10.0)

    @rule(length=seconds)
    def advance_clock_at_most_forty_seconds(self, length: float) -> None:
        self.plane.now += length
        self.lease.end_if_expired(self.current_time)

    @rule(length=st.floats(0, 1.0))
    def advance_clock_at_most_one_second(self, length: float) -> None:
        self.advance_clock_at_most_forty_seconds(length)

    @rule()
    def advance_clock_to_next_heartbeat(self) -> None:
        assume(self.current_time < self.lease.due_at < math.inf)
        self.advance_clock_at_most_forty_seconds(self.lease.due_at - self.current_time)

    @precondition(lambda self: not self.rival_has_it)
    @rule(begins=st.booleans())
    def claim_item_as_other_worker(self, *, begins: bool) -> None:
        if self.plane.poll_item("rival"):
            self.plane.ack_item("rival")
            self.rival_has_it = True
            if begins:
                self.plane.extend_lease("NO_HEARTBEAT", 600)

    @rule(force=st.booleans())
    def stop_item_as_operator(self, *, force: bool) -> None:
        self.plane.stop_item("operator", force=force)

    @precondition(lambda self: self.lease.is_held(self.current_time))
    @rule(applied=st.booleans())
    def stop_item_as_pool(self, *, applied: bool) -> None:
        self.lease.own_stop = True
        if applied:
            self.plane.stop_item("ours", force=True)

    @precondition(lambda self: not self.lease.is_over)
    @rule(delay=st.floats(-5, 700))
    def release_item_as_pool(self, delay: float) -> None:
        self.lease.schedule_last_heartbeat(self.current_time, delay)

    @rule()
    def request_heartbeat_at_once(self) -> None:
        self.lease.make_heartbeat_due(self.current_time)

    @precondition(lambda self: not self.lease.in_flight and not self.lease.is_over)
    @rule()
    def send_heartbeat(self) -> None:
        if self.lease.due_at <= self.current_time:
            assert self.lease.is_held(self.current_time)
            self.attempt = self.lease.begin_heartbeat(self.current_time, self.lease.due_at)
            self.undelivered.append(self.attempt)
            self.plane.now += LATENCY

    @precondition(lambda self: self.undelivered)
    @rule(index=st.integers(0, 5))
    def deliver_heartbeat_request(self, index: int) -> None:
        """Deliver a sent heartbeat to the control plane.

        By now, the lease may have recorded that the heartbeat got no answer.
        """
        attempt = self.undelivered.pop(index % len(self.undelivered))
        answer = self.plane.extend_lease(attempt.expected, attempt.ttl)
        if attempt is self.attempt:
            self.answer = answer

    @precondition(lambda self: self.answer is not None and self.attempt is not None)
    @rule()
    def deliver_heartbeat_answer(self) -> None:
        assert self.answer is not None
        self._apply_heartbeat_answer(self.answer)

    @precondition(lambda self: self.attempt is not None)
    @rule(reason=st.sampled_from(["timeout", "network", "bad_body"]))
    def lose_heartbeat_answer(self, reason: str) -> None:
        self._apply_heartbeat_answer(make_transient_error(reason))

    @precondition(lambda self: self.attempt in self.undelivered)
    @rule(status=statuses)
    def refuse_heartbeat_in_proxy(self, status: int) -> None:
        """Let a proxy refuse the request, which then does not reach the control plane."""
        assert self.attempt is not None
        self.undelivered.remove(self.attempt)
        self._apply_heartbeat_answer(make_error_for_status(status))

    @precondition(lambda self: self.attempt in self.undelivered)
    @rule()
    def abort_unsent_heartbeat(self) -> None:
        assert self.attempt is not None
        self.undelivered.remove(self.attempt)
        self.lease.record_unsent_heartbeat(self.attempt)
        self.attempt = self.answer = None

    @precondition(lambda self: self.attempt is not None)
    @rule()
    def give_up_unanswered_heartbeat(self) -> None:
        self.lease.record_unanswered_heartbeat()
        self.attempt = self.answer = None

    def _apply_heartbeat_answer(self, outcome: Heartbeat | ControlPlaneError) -> None:
        assert self.attempt is not None
        decision = self.lease.apply_heartbeat_answer(self.current_time, self.attempt, outcome)
        self.reading = decision.then == "read"
        if decision.then == "held" and isinstance(outcome, Heartbeat) and outcome.lease_extended:
            assert self.lease.deadline == self.attempt.at + outcome.ttl_seconds
        self._assert_lease_matches_heartbeat_decision(decision)
        self.attempt = self.answer = None

    @precondition(lambda self: self.reading)
    @rule()
    def deliver_get_request(self) -> None:
        self.item = self.plane.read_item()

    @precondition(lambda self: self.reading and self.item is not None)
    @rule()
    def deliver_answer_to_get_request(self) -> None:
        assert self.item is not None
        self._apply_answer_to_get_request(self.item)

    @precondition(lambda self: self.reading)
    @rule(status=statuses | st.none())
    def fail_get_request(self, status: int | None) -> None:
        self._apply_answer_to_get_request(
            make_transient_error() if status is None else make_error_for_status(status)
        )

    def _apply_answer_to_get_request(self, outcome: WorkItem | ControlPlaneError) -> None:
        before = self.lease.deadline
        self._assert_lease_matches_heartbeat_decision(
            self.lease.apply_item_read_outcome(self.current_time, "conflict", outcome)
        )
        assert self.lease.deadline == before
        self.reading, self.item = False, None

    def _assert_lease_matches_heartbeat_decision(self, decision: HeartbeatDecision) -> None:
        """Assert the conditions that hold after the answer to a heartbeat or a read of the item."""
        assert self.lease.in_flight == (decision.then == "read")
        assert (decision.then == "over") == self.lease.is_over
        if decision.then == "again":
            assert self.current_time <= self.lease.due_at < math.inf
            # Until a heartbeat succeeds, only one decision may make the next one due at once.
            # Otherwise, heartbeats and reads of the item could follow each other without a pause.
            hurried = self.lease.due_at == self.current_time
            assert not (hurried and self.last_decision == "hurried")
            self.last_decision = "hurried" if hurried else self.last_decision
        elif decision.then == "held":
            self.last_decision = "held"

    @invariant()
    def assert_held_lease_has_no_other_holder(self) -> None:
        if self.lease.is_held(self.current_time):
            assert not self.rival_has_it
            assert self.plane.get_item_state() != "queued"

    @invariant()
    def assert_ended_lease_stays_ended(self) -> None:
        if self.final is not None:
            assert (self.lease.status, self.lease.is_loss_confirmed) == self.final
            assert self.lease.due_at == math.inf
            assert not self.lease.is_held(self.current_time)
        elif self.lease.is_over:
            self.final = self.lease.status, self.lease.is_loss_confirmed

    @invariant()
    def assert_give_up_time_precedes_deadline(self) -> None:
        assert self.lease.give_up_at <= self.lease.deadline - 1

    @invariant()
    def assert_confirmed_loss_means_status_lost(self) -> None:
        assert not self.lease.is_loss_confirmed or self.lease.status == "lost"


TestLeaseMachine = pytest.mark.trial(LeaseStateMachine.TestCase)
TestLeaseMachine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


@given(
    granted=st.floats(1, 1000),
    ttl=st.integers(10, 600),
    sent=st.floats(0, 50),
    latency=st.floats(0, 10),
)
def test_lease_deadline_never_exceeds_send_time_plus_granted_ttl(
    granted: float, ttl: int, sent: float, latency: float
) -> None:
    lease = make_lease(ttl=ttl)
    attempt = lease.begin_heartbeat(sent, sent)
    assert lease.deadline <= sent + ttl
    assume(sent + latency < 60)
    lease.apply_heartbeat_answer(sent + latency, attempt, make_heartbeat(ttl_seconds=granted))
    assert lease.deadline == sent + granted
    assert lease.due_at <= sent + granted / 3


@given(
    order=st.permutations(["parent", "child", "parent", "child", "rival"]),
    lost=st.lists(st.booleans(), min_size=5, max_size=5),
    pauses=st.lists(st.floats(0.01, 15), min_size=5, max_size=5),
)
def test_parent_and_child_never_hold_lease_of_one_item_at_once(
    order: list[str], lost: list[bool], pauses: list[float]
) -> None:
    """Parent and child expect the same last heartbeat, so only one of them can extend the lease."""
    plane = ControlPlaneWithManualClock()
    plane.poll_item("ours")
    parent = Lease(plane.ack_item("ours"), 0.0, ttl=60, request_timeout=10.0)
    attempt = parent.begin_heartbeat(0.0, 0.0)
    plane.now += LATENCY
    parent.apply_heartbeat_answer(
        plane.now, attempt, plane.extend_lease(attempt.expected, attempt.ttl)
    )
    parent.suspend_heartbeats()
    child = Lease(
        plane.read_item(),
        plane.now,
        ttl=60,
        request_timeout=10.0,
        parents_heartbeat=parent.expected,
    )
    taken_back = rival = False
    for who, is_lost, pause in zip(order, lost, pauses, strict=True):
        plane.now += pause
        if who == "rival":
            rival = rival or (plane.poll_item("rival") and plane.ack_item("rival") is not None)
            continue
        lease = parent if who == "parent" else child
        if lease.end_if_expired(plane.now):
            continue
        decision = send_heartbeat_and_required_read(plane, lease, lost=is_lost)
        if who == "parent" and decision == "held":
            taken_back = True
        assert not (
            taken_back and parent.is_held(plane.now) and child.begun and child.is_held(plane.now)
        )
        assert not (rival and child.begun and child.is_held(plane.now))
    if child.begun:
        assert send_heartbeat_and_required_read(plane, parent) == "over" or parent.is_over
        assert parent.status in {"handed_off", "lost"}


def send_heartbeat_and_required_read(
    plane: ControlPlaneWithManualClock, lease: Lease, *, lost: bool = False
) -> str:
    """Send a heartbeat, read the item if the decision requires it, and return the last decision."""
    if lease.is_over:
        return "over"
    attempt = lease.begin_heartbeat(plane.now, plane.now)
    plane.now += LATENCY
    answer = plane.extend_lease(attempt.expected, attempt.ttl)
    decision = lease.apply_heartbeat_answer(
        plane.now, attempt, make_transient_error() if lost else answer
    )
    if decision.then == "read":
        decision = lease.apply_item_read_outcome(plane.now, decision.result, plane.read_item())
    return decision.then
