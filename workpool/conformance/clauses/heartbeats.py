"""Clauses about heartbeats: expected value, TTL, and states that do not allow heartbeats.

See workpool/docs/protocol.md, "Heartbeat" and "Who holds an item".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from workpool.conformance.api import shorten_value_for_terminal
from workpool.conformance.clause import clause
from workpool.conformance.clause_trial import is_bad_request, is_conflict, is_precondition_failed
from workpool.conformance.verdict import (
    ClauseBrokenError,
    ClauseDiffersError,
    raise_clause_broken_unless,
    raise_clause_differs_unless,
)
from workpool.server.http.server_dialects import DIALECTS
from workpool.wire import protocol
from workpool.wire.items import parse_heartbeat
from workpool.wire.protocol import NO_HEARTBEAT, TTL_MAX_SECONDS, TTL_MIN_SECONDS

if TYPE_CHECKING:
    from workpool.conformance.api import Answer
    from workpool.conformance.clause_trial import ClauseTrial

LONG_AGO: Final = "2020-01-01T00:00:00.000000Z"
TTLS: Final = (
    (30, 30),
    (TTL_MIN_SECONDS, TTL_MIN_SECONDS),
    (1, TTL_MIN_SECONDS),
    (100_000, TTL_MAX_SECONDS),
)
"""Requested and granted TTLs; every control plane must grant the first one."""


@clause("heartbeat-first", "The first one moves `starting` to `active` and extends the lease.")
async def check_first_heartbeat_activates_item(trial: ClauseTrial) -> None:
    """Send a first heartbeat, and parse the answer as a worker does."""
    subject = await trial.create_acknowledged_item()
    answer = await trial.api.heartbeat(subject.id, NO_HEARTBEAT, 60)
    raise_clause_broken_unless(answer.ok, str(answer))
    _require_readable_heartbeat_answer(answer)
    state, extended = answer.get("state"), answer.get("lease_extended")
    raise_clause_broken_unless(extended is True, "the lease is not extended")
    raise_clause_broken_unless(
        state == protocol.ACTIVE, f"the item is {shorten_value_for_terminal(state)}"
    )


@clause("heartbeat-next", "The next one expects the last `last_heartbeat` and returns a new one.")
async def check_next_heartbeat_returns_new_value(trial: ClauseTrial) -> None:
    """Send a second heartbeat, and compare the values that both answers return."""
    subject = await trial.create_active_item()
    await trial.wait_while_other_clauses_run(0.1)
    answer = await trial.api.heartbeat(subject.id, subject.last_heartbeat, 60)
    raise_clause_broken_unless(answer.ok, str(answer))
    new = answer.get("last_heartbeat")
    raise_clause_broken_unless(
        new != subject.last_heartbeat, "two heartbeats have the same `last_heartbeat`"
    )


@clause("heartbeat-read-back", "The item's `latest_heartbeat_at` can be the expected value.")
async def check_heartbeat_with_value_read_from_item(trial: ClauseTrial) -> None:
    """Send a heartbeat whose expected value was read from the item, as after a lost answer."""
    subject = await trial.create_active_item()
    read = (await trial.read_item(subject)).get("latest_heartbeat_at")
    raise_clause_broken_unless(isinstance(read, str), "the item shows no heartbeat")
    answer = await trial.api.heartbeat(subject.id, str(read), 60)
    raise_clause_broken_unless(answer.ok, f"{answer}: a lost answer costs the lease")


@clause("heartbeat-mismatch", "Another time is a 412.")
async def check_heartbeat_with_wrong_time_is_refused(trial: ClauseTrial) -> None:
    """Send a heartbeat whose expected value is not the time of the item's last heartbeat."""
    subject = await trial.create_active_item()
    _expect_precondition_failed(
        await trial.api.heartbeat(subject.id, LONG_AGO, 60), "two workers can hold one item"
    )


@clause("heartbeat-first-again", "`NO_HEARTBEAT` after a heartbeat is a 412.")
async def check_first_heartbeat_by_other_worker_is_refused(trial: ClauseTrial) -> None:
    """Send a first heartbeat for an item that another worker holds."""
    subject = await trial.create_active_item()
    _expect_precondition_failed(
        await trial.other.heartbeat(subject.id, NO_HEARTBEAT, 60), "two workers can hold one item"
    )


@clause("heartbeat-malformed", "A value that is neither `NO_HEARTBEAT` nor a time is a 400.")
async def check_heartbeat_with_malformed_value_is_refused(trial: ClauseTrial) -> None:
    """Send a heartbeat with a malformed expected value."""
    subject = await trial.create_active_item()
    answer = await trial.api.heartbeat(subject.id, "yesterday", 60)
    raise_clause_broken_unless(not answer.ok, f"{answer}: the expected value is not compared")
    raise_clause_differs_unless(is_bad_request(answer), str(answer))


@clause("heartbeat-unconditional", "Without an expected value the lease is extended.")
async def check_heartbeat_without_expected_value_extends_lease(trial: ClauseTrial) -> None:
    """Send a heartbeat without the expected time of the last heartbeat; check its acceptance."""
    subject = await trial.create_active_item()
    answer = await trial.api.heartbeat(subject.id, None, 60)
    raise_clause_differs_unless(answer.ok, str(answer))


@clause("heartbeat-ttl", "The TTL is clamped to 10–600 s, and the answer says it.")
async def check_ttl_is_clamped_to_range(trial: ClauseTrial) -> None:
    """Request TTLs inside and outside of the allowed range, and check the granted TTLs."""
    subject = await trial.create_active_item()
    different: list[str] = []
    for asked, granted in TTLS:
        answer = await trial.api.heartbeat(subject.id, subject.last_heartbeat, asked)
        if not answer.ok:
            raise_clause_broken_unless(asked != granted, f"{asked} s: {answer}")
            different.append(f"{asked} s: {answer}")
            continue
        _require_readable_heartbeat_answer(answer)
        subject.last_heartbeat = str(answer.get("last_heartbeat"))
        ttl = answer.get("ttl_seconds")
        if ttl != granted:
            different.append(f"{asked} s: {ttl} s instead of {granted} s")
    raise_clause_differs_unless(not different, "; ".join(different))


@clause("heartbeat-ttl-zero", "A TTL that is not a positive integer is a 400.")
async def check_ttl_of_zero_is_refused(trial: ClauseTrial) -> None:
    """Send a heartbeat that requests a TTL of zero."""
    subject = await trial.create_active_item()
    answer = await trial.api.heartbeat(subject.id, subject.last_heartbeat, 0)
    raise_clause_differs_unless(is_bad_request(answer), str(answer))


@clause("heartbeat-queued", "A `queued` item is a 409.")
async def check_heartbeat_of_queued_item_is_refused(trial: ClauseTrial) -> None:
    """Send a heartbeat for an item that was delivered and not acknowledged."""
    answer = await trial.api.heartbeat((await trial.claim_item()).id, NO_HEARTBEAT, 60)
    raise_clause_differs_unless(is_conflict(answer), _describe_heartbeat_answer(answer))


@clause("heartbeat-stopping", "A `stopping` item: 200, extended, `state` is `stopping`.")
async def check_heartbeat_of_stopping_item_reports_stop(trial: ClauseTrial) -> None:
    """Stop an item gracefully, and check the worker's next heartbeat."""
    subject = await trial.create_active_item()
    await trial.stop_item(subject, force=False)
    answer = await trial.api.heartbeat(subject.id, subject.last_heartbeat, 60)
    goes_on = answer.ok and answer.get("state") == protocol.ACTIVE
    raise_clause_broken_unless(not goes_on, "the item is active: no worker learns of the stop")
    as_documented = answer.ok and answer.get("state") == protocol.STOPPING
    raise_clause_differs_unless(
        as_documented and answer.get("lease_extended") is True, _describe_heartbeat_answer(answer)
    )


@clause(
    "heartbeat-stopped",
    "A `stopped` item: 409 (`qoder`), or 200 with the state, whatever is expected (`anthropic`).",
)
async def check_heartbeat_of_stopped_item_extends_no_lease(trial: ClauseTrial) -> None:
    """Send a heartbeat for an item that was stopped."""
    subject = await trial.create_active_item()
    await trial.stop_item(subject, force=True)
    answer = await trial.api.heartbeat(subject.id, subject.last_heartbeat, 60)
    if answer.ok and answer.get("lease_extended") is True:
        raise ClauseBrokenError("the lease of a stopped item is extended")
    if DIALECTS[trial.api.dialect].compare_on_stop:
        raise_clause_differs_unless(is_conflict(answer), _describe_heartbeat_answer(answer))
        return
    stopped = answer.ok and answer.get("state") == protocol.STOPPED
    raise_clause_differs_unless(stopped, _describe_heartbeat_answer(answer))
    compared = await trial.api.heartbeat(subject.id, LONG_AGO, 60)
    raise_clause_differs_unless(compared.ok, f"the expected value is compared: {compared}")


def _require_readable_heartbeat_answer(answer: Answer) -> None:
    """Raise `ClauseBrokenError` if a worker could not parse the answer to a heartbeat."""
    try:
        parse_heartbeat(answer.body)
    except ValueError as error:
        raise ClauseBrokenError(f"a worker cannot read the answer: {error}") from None


def _expect_precondition_failed(answer: Answer, consequence: str) -> None:
    """Check that a heartbeat was answered with 412.

    Raises:
        ClauseBrokenError: The lease was extended.
        ClauseDiffersError: The status is not 412.
    """
    raise_clause_broken_unless(not answer.ok or answer.get("lease_extended") is False, consequence)
    if not is_precondition_failed(answer):
        raise ClauseDiffersError(_describe_heartbeat_answer(answer))


def _describe_heartbeat_answer(answer: Answer) -> str:
    if not answer.ok:
        return str(answer)
    extended = "extended" if answer.get("lease_extended") is True else "not extended"
    return f"HTTP {answer.status}, {shorten_value_for_terminal(answer.get('state'))}, {extended}"
