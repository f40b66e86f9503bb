"""Clauses about polls: their answers, and the time and order of deliveries.

See workpool/docs/protocol.md, "Delivery" and "Poll".
"""

from __future__ import annotations

import asyncio
import re
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from workpool.conformance.api import shorten_value_for_terminal
from workpool.conformance.clause import clause
from workpool.conformance.clause_trial import CLAIM_SECONDS, is_bad_request
from workpool.conformance.verdict import (
    ClauseBrokenError,
    ClauseDiffersError,
    ClauseUntriedError,
    raise_clause_broken_unless,
    raise_clause_differs_unless,
)
from workpool.wire.items import parse_item
from workpool.wire.protocol import BLOCK_MS_MAX, QUEUED

if TYPE_CHECKING:
    from collections.abc import Mapping

    from workpool.conformance.api import Answer
    from workpool.conformance.clause_trial import ClauseTrial

FIELDS: Final = (
    "id",
    "type",
    "environment_id",
    "data",
    "state",
    "created_at",
    "acknowledged_at",
    "started_at",
    "latest_heartbeat_at",
    "stop_requested_at",
    "stopped_at",
    "metadata",
)
WINDOW_SECONDS: Final = 5.0
BLOCK_MS: Final = 300
SLACK_SECONDS: Final = 4.0
"""Seconds by which a poll's answer may be late."""
REDELIVERY_SECONDS: Final = 90.0
DRAINED_POLLS: Final = 50
_has_zone: Final = re.compile(r".*([zZ]|[+-]\d\d:\d\d)").fullmatch


@clause("poll-delivers", "A delivered item is still `queued`.")
async def check_delivered_item_is_still_queued(trial: ClauseTrial) -> None:
    """Check the state of an item that a poll has delivered."""
    state = (await trial.claim_item()).deliveries[0].item.get("state")
    raise_clause_differs_unless(state == QUEUED, f"the item is {shorten_value_for_terminal(state)}")


@clause("poll-once", "A second poll right after the first does not receive the item.")
async def check_item_is_delivered_once(trial: ClauseTrial) -> None:
    """Receive an item, and check that the next three polls do not receive it too."""
    subject = await trial.claim_item()
    for _ in range(3):
        await trial.poll()
    early = [
        each
        for each in subject.deliveries[1:]
        if each.at - subject.deliveries[0].at < WINDOW_SECONDS - 1
    ]
    raise_clause_broken_unless(not early, "the next poll received the item too")


@clause("poll-redelivers", "An item that is not acknowledged is delivered again after 5 s.")
async def check_unacknowledged_item_is_delivered_again(trial: ClauseTrial) -> None:
    """Receive an item, send no ack, and wait for the next delivery of the item."""
    subject = await trial.claim_item()
    again = await trial.wait_for_delivery(subject, REDELIVERY_SECONDS)
    if again is None:
        raise ClauseBrokenError(f"not within {REDELIVERY_SECONDS:.0f} s: the item is lost")
    start = subject.deliveries[-2].at
    seconds = again.at - start
    early, late = seconds < WINDOW_SECONDS - 1, again.nothing_at - start > WINDOW_SECONDS + 1
    raise_clause_differs_unless(not early and not late, f"after {seconds:.0f} s")


@clause("poll-reclaim", "`reclaim_older_than_ms` of the new poll sets that time.", when="last")
async def check_new_poll_sets_redelivery_time(trial: ClauseTrial) -> None:
    """Receive an item, and poll again with a shorter redelivery time."""
    subject = await trial.claim_item()
    before = len(subject.deliveries)
    await trial.wait_while_other_clauses_run(1.5)
    answer = await trial.poll(params={"reclaim_older_than_ms": "1000"})
    raise_clause_broken_unless(answer.ok, f"refused: {answer}")
    raise_clause_differs_unless(len(subject.deliveries) > before, "the item did not come sooner")


@clause("poll-reclaim-lease", "`reclaim_older_than_ms` does not touch a lease.", when="last")
async def check_poll_with_redelivery_time_ends_no_lease(trial: ClauseTrial) -> None:
    """Poll with a redelivery time that is shorter than the age of the holder's last heartbeat."""
    subject = await trial.create_active_item()
    before = len(subject.deliveries)
    await trial.wait_while_other_clauses_run(1.5)
    await trial.poll(params={"reclaim_older_than_ms": "1000"})
    taken = len(subject.deliveries) > before
    raise_clause_broken_unless(
        not taken, "an item under a lease was delivered: leave the setting unset"
    )


@clause(
    "poll-empty", "Without an item the answer is 200 with the JSON literal `null`.", when="last"
)
async def check_poll_of_empty_queue_returns_null(trial: ClauseTrial) -> None:
    """Poll an empty queue, and check that the answer has the status 200 and the body `null`."""
    answer = await _poll_until_empty(trial)
    raise_clause_broken_unless(answer.ok, str(answer))
    nothing = answer.content.strip()
    if (answer.status, nothing) == (HTTPStatus.OK, b"null"):
        return
    readable = answer.status == HTTPStatus.NO_CONTENT or answer.body == {}
    raise_clause_broken_unless(
        readable,
        f"HTTP {answer.status} with {shorten_value_for_terminal(nothing.decode(errors='replace'))}",
    )
    raise ClauseDiffersError(f"HTTP {answer.status} with {nothing.decode() or 'no body'}")


@clause(
    "poll-blocks",
    "With `block_ms` the answer waits for an item, at most that long.",
    when="last",
)
async def check_poll_waits_for_block_ms(trial: ClauseTrial) -> None:
    """Measure the duration of a poll of an empty queue."""
    await _poll_until_empty(trial)
    clock = asyncio.get_running_loop().time
    start = clock()
    answer = await trial.poll(params={"block_ms": str(BLOCK_MS)})
    seconds = clock() - start
    raise_clause_broken_unless(answer.ok, f"`block_ms` is refused: {answer}")
    expected = BLOCK_MS / 1000
    waited = expected * 0.8 <= seconds <= expected + SLACK_SECONDS
    raise_clause_differs_unless(waited, f"{seconds:.1f} s instead of {expected:.1f} s")


@clause("poll-block-range", f"`block_ms` outside of 1–{BLOCK_MS_MAX} is a 400.")
async def check_poll_with_invalid_block_time_is_refused(trial: ClauseTrial) -> None:
    """Poll with a `block_ms` below and above the allowed range."""
    for value in ("0", str(BLOCK_MS_MAX + 1)):
        answer = await trial.poll(params={"block_ms": value})
        raise_clause_differs_unless(is_bad_request(answer), f"{value}: {answer}")


@clause("poll-item", "The item has all fields of a work item.")
async def check_item_has_all_fields(trial: ClauseTrial) -> None:
    """Parse an item as a worker does, then check that no field is missing."""
    item = (await trial.claim_item()).deliveries[0].item
    require_readable_item(item)
    missing = [name for name in FIELDS if name not in item]
    raise_clause_differs_unless(not missing, f"without {', '.join(missing)}")
    times = [name for name in FIELDS if name.endswith("_at") and isinstance(item[name], str)]
    local = [name for name in times if not _has_zone(item[name])]
    raise_clause_differs_unless(not local, f"a time without a zone: {', '.join(local)}")


@clause("poll-oldest-first", "Items are delivered in the order of their creation.")
async def check_oldest_item_is_delivered_first(trial: ClauseTrial) -> None:
    """Create two items and check the order of their deliveries."""
    older, younger = await trial.create_item(), await trial.create_item()
    for subject in (older, younger):
        if not subject.deliveries and await trial.wait_for_delivery(subject, CLAIM_SECONDS) is None:
            raise ClauseUntriedError("the item that was created is not delivered")
    in_order = older.deliveries[0].number < younger.deliveries[0].number
    raise_clause_differs_unless(in_order, "the younger item came first")


def require_readable_item(item: Mapping[str, Any] | Any) -> None:
    """Raise `ClauseBrokenError` if a worker could not parse the item."""
    try:
        parse_item(item)
    except ValueError as error:
        raise ClauseBrokenError(f"a worker cannot read the item: {error}") from None


async def _poll_until_empty(trial: ClauseTrial) -> Answer:
    """Poll until the queue is empty, and return the first answer without an item."""
    for _ in range(DRAINED_POLLS):
        answer = await trial.poll()
        if not isinstance(answer.body, dict) or "id" not in answer.body:
            return answer
    raise ClauseUntriedError("the queue does not become empty")
