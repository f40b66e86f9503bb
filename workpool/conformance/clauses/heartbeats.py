"""Heartbeats: their expected value, their TTL, and items in states that do not allow them.

See workpool/docs/protocol.md, "Heartbeat" and "Who holds an item".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from workpool.conformance.api import shown
from workpool.conformance.clause import clause
from workpool.conformance.trial import is_bad_request, is_conflict, is_mismatch
from workpool.conformance.verdict import Breaks, Differs, same_or_breaks, same_or_differs
from workpool.server.http.server_dialects import DIALECTS
from workpool.wire import protocol
from workpool.wire.items import parse_heartbeat
from workpool.wire.protocol import NO_HEARTBEAT, TTL_MAX_SECONDS, TTL_MIN_SECONDS

if TYPE_CHECKING:
    from workpool.conformance.api import Answer
    from workpool.conformance.trial import Trial

LONG_AGO: Final = "2020-01-01T00:00:00.000000Z"
TTLS: Final = (
    (30, 30),
    (TTL_MIN_SECONDS, TTL_MIN_SECONDS),
    (1, TTL_MIN_SECONDS),
    (100_000, TTL_MAX_SECONDS),
)
"""Requested and granted TTLs; every control plane must grant the first one."""


@clause("heartbeat-first", "The first one moves `starting` to `active` and extends the lease.")
async def first_heartbeat(trial: Trial) -> None:
    """Send a first heartbeat, and read the answer as a worker does."""
    subject = await trial.acknowledged()
    answer = await trial.api.heartbeat(subject.id, NO_HEARTBEAT, 60)
    same_or_breaks(answer.ok, str(answer))
    _check_readable(answer)
    state, extended = answer.get("state"), answer.get("lease_extended")
    same_or_breaks(extended is True, "the lease is not extended")
    same_or_breaks(state == protocol.ACTIVE, f"the item is {shown(state)}")


@clause("heartbeat-next", "The next one expects the last `last_heartbeat` and returns a new one.")
async def next_heartbeat(trial: Trial) -> None:
    """Send a second heartbeat."""
    subject = await trial.active()
    await trial.wait(0.1)
    answer = await trial.api.heartbeat(subject.id, subject.last_heartbeat, 60)
    same_or_breaks(answer.ok, str(answer))
    new = answer.get("last_heartbeat")
    same_or_breaks(new != subject.last_heartbeat, "two heartbeats have the same `last_heartbeat`")


@clause("heartbeat-read-back", "The item's `latest_heartbeat_at` can be the expected value.")
async def heartbeat_after_reading(trial: Trial) -> None:
    """Continue with the item's last heartbeat, as a worker does after a lost answer."""
    subject = await trial.active()
    read = (await trial.item(subject)).get("latest_heartbeat_at")
    same_or_breaks(isinstance(read, str), "the item shows no heartbeat")
    answer = await trial.api.heartbeat(subject.id, str(read), 60)
    same_or_breaks(answer.ok, f"{answer}: a lost answer costs the lease")


@clause("heartbeat-mismatch", "Another time is a 412.")
async def heartbeat_with_another_time(trial: Trial) -> None:
    """Send a heartbeat that expects the last heartbeat of another holder."""
    subject = await trial.active()
    _check_refused(
        await trial.api.heartbeat(subject.id, LONG_AGO, 60), "two workers can hold one item"
    )


@clause("heartbeat-first-again", "`NO_HEARTBEAT` after a heartbeat is a 412.")
async def first_heartbeat_of_another_worker(trial: Trial) -> None:
    """Send a first heartbeat for an item that another worker holds."""
    subject = await trial.active()
    _check_refused(
        await trial.other.heartbeat(subject.id, NO_HEARTBEAT, 60), "two workers can hold one item"
    )


@clause("heartbeat-malformed", "A value that is neither `NO_HEARTBEAT` nor a time is a 400.")
async def heartbeat_with_a_malformed_value(trial: Trial) -> None:
    """Send a heartbeat with a malformed expected value."""
    subject = await trial.active()
    answer = await trial.api.heartbeat(subject.id, "yesterday", 60)
    same_or_breaks(not answer.ok, f"{answer}: the expected value is not compared")
    same_or_differs(is_bad_request(answer), str(answer))


@clause("heartbeat-unconditional", "Without an expected value the lease is extended.")
async def heartbeat_without_expected_value(trial: Trial) -> None:
    """Send a heartbeat without an expected value. A worker never does."""
    subject = await trial.active()
    answer = await trial.api.heartbeat(subject.id, None, 60)
    same_or_differs(answer.ok, str(answer))


@clause("heartbeat-ttl", "The TTL is clamped to 10–600 s, and the answer says it.")
async def ttl_is_clamped(trial: Trial) -> None:
    """Request TTLs inside and outside of the range."""
    subject = await trial.active()
    different: list[str] = []
    for asked, granted in TTLS:
        answer = await trial.api.heartbeat(subject.id, subject.last_heartbeat, asked)
        if not answer.ok:
            same_or_breaks(asked != granted, f"{asked} s: {answer}")
            different.append(f"{asked} s: {answer}")
            continue
        _check_readable(answer)
        subject.last_heartbeat = str(answer.get("last_heartbeat"))
        ttl = answer.get("ttl_seconds")
        if ttl != granted:
            different.append(f"{asked} s: {ttl} s instead of {granted} s")
    same_or_differs(not different, "; ".join(different))


@clause("heartbeat-ttl-zero", "A TTL that is not a positive integer is a 400.")
async def ttl_of_zero(trial: Trial) -> None:
    """Request a TTL of zero."""
    subject = await trial.active()
    answer = await trial.api.heartbeat(subject.id, subject.last_heartbeat, 0)
    same_or_differs(is_bad_request(answer), str(answer))


@clause("heartbeat-queued", "A `queued` item is a 409.")
async def heartbeat_without_ack(trial: Trial) -> None:
    """Send a heartbeat for an item that was delivered and not acknowledged."""
    answer = await trial.api.heartbeat((await trial.claim()).id, NO_HEARTBEAT, 60)
    same_or_differs(is_conflict(answer), _describe_answer(answer))


@clause("heartbeat-stopping", "A `stopping` item: 200, extended, `state` is `stopping`.")
async def heartbeat_on_a_stopping_item(trial: Trial) -> None:
    """Stop an item gracefully, and check the worker's next heartbeat."""
    subject = await trial.active()
    await trial.stop(subject, force=False)
    answer = await trial.api.heartbeat(subject.id, subject.last_heartbeat, 60)
    goes_on = answer.ok and answer.get("state") == protocol.ACTIVE
    same_or_breaks(not goes_on, "the item is active: no worker learns of the stop")
    as_documented = answer.ok and answer.get("state") == protocol.STOPPING
    same_or_differs(
        as_documented and answer.get("lease_extended") is True, _describe_answer(answer)
    )


@clause(
    "heartbeat-stopped",
    "A `stopped` item: 409 (`qoder`), or 200 with the state, whatever is expected (`anthropic`).",
)
async def heartbeat_on_a_stopped_item(trial: Trial) -> None:
    """Send a heartbeat for an item that was stopped."""
    subject = await trial.active()
    await trial.stop(subject, force=True)
    answer = await trial.api.heartbeat(subject.id, subject.last_heartbeat, 60)
    if answer.ok and answer.get("lease_extended") is True:
        raise Breaks("the lease of a stopped item is extended")
    if DIALECTS[trial.api.dialect].compare_on_stop:
        same_or_differs(is_conflict(answer), _describe_answer(answer))
        return
    stopped = answer.ok and answer.get("state") == protocol.STOPPED
    same_or_differs(stopped, _describe_answer(answer))
    compared = await trial.api.heartbeat(subject.id, LONG_AGO, 60)
    same_or_differs(compared.ok, f"the expected value is compared: {compared}")


def _check_readable(answer: Answer) -> None:
    """Raise `Breaks` if a worker could not read the answer."""
    try:
        parse_heartbeat(answer.body)
    except ValueError as error:
        raise Breaks(f"a worker cannot read the answer: {error}") from None


def _check_refused(answer: Answer, consequence: str) -> None:
    """Raise unless the answer is a 412."""
    same_or_breaks(not answer.ok or answer.get("lease_extended") is False, consequence)
    if not is_mismatch(answer):
        raise Differs(_describe_answer(answer))


def _describe_answer(answer: Answer) -> str:
    if not answer.ok:
        return str(answer)
    extended = "extended" if answer.get("lease_extended") is True else "not extended"
    return f"HTTP {answer.status}, {shown(answer.get('state'))}, {extended}"
