"""Clauses about acks: the answer, repeated acks, and acks that must be refused.

See workpool/docs/protocol.md, "Acknowledge".
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

from workpool.conformance.api import shorten_value_for_terminal
from workpool.conformance.clause import clause
from workpool.conformance.clause_trial import is_conflict
from workpool.conformance.clauses.auth_and_errors import UNKNOWN
from workpool.conformance.clauses.delivery import require_readable_item
from workpool.conformance.verdict import (
    ClauseBrokenError,
    ClauseDiffersError,
    raise_clause_broken_unless,
    raise_clause_differs_unless,
)
from workpool.wire.protocol import ACTIVE, STARTING

if TYPE_CHECKING:
    from workpool.conformance.clause_trial import ClauseTrial


@clause("ack-starts", "The answer is the item, `starting`, with `acknowledged_at`.")
async def check_ack_starts_item(trial: ClauseTrial) -> None:
    """Acknowledge an item, and parse the answer as a worker does."""
    answer = await trial.api.ack((await trial.claim_item()).id)
    raise_clause_broken_unless(answer.ok, str(answer))
    require_readable_item(answer.body)
    state = answer.get("state")
    raise_clause_broken_unless(
        state in {STARTING, ACTIVE}, f"the item is {shorten_value_for_terminal(state)}"
    )
    raise_clause_differs_unless(state == STARTING, f"the item is {state}")
    raise_clause_differs_unless(
        isinstance(answer.get("acknowledged_at"), str), "without `acknowledged_at`"
    )


@clause("ack-repeat", "The holder may repeat it: `acknowledged_at` does not change.")
async def check_repeated_ack_keeps_its_time(trial: ClauseTrial) -> None:
    """Acknowledge an item twice, as a worker does after a lost answer."""
    subject = await trial.claim_item()
    first = await trial.acknowledge_item(subject)
    # Wait for more than 1 s, so that the times of two different acks differ even if the control
    # plane rounds times to seconds.
    await trial.wait_while_other_clauses_run(1.1)
    second = await trial.api.ack(subject.id)
    raise_clause_differs_unless(second.ok, f"{second}: a lost answer costs a redelivery")
    same = first.get("acknowledged_at") == second.get("acknowledged_at")
    raise_clause_differs_unless(same, "`acknowledged_at` is a new time")


@clause("ack-other-worker", "The ack of a worker with another name than the poll's is a 409.")
async def check_ack_by_another_worker_is_refused(trial: ClauseTrial) -> None:
    """Acknowledge an item that was delivered to another worker."""
    answer = await trial.other.ack((await trial.claim_item()).id)
    raise_clause_differs_unless(is_conflict(answer), f"{answer}: the first heartbeat decides")


@clause("ack-stopped", "An item that is `stopped` is a 409.")
async def check_ack_of_stopped_item_is_refused(trial: ClauseTrial) -> None:
    """Acknowledge an item that was stopped."""
    subject = await trial.claim_item()
    await trial.stop_item(subject, force=True)
    answer = await trial.api.ack(subject.id)
    state = answer.get("state")
    if answer.ok and state in {STARTING, ACTIVE}:
        raise ClauseBrokenError(f"the stopped item is {state} again")
    raise_clause_differs_unless(is_conflict(answer), str(answer))


@clause("ack-unknown", "An unknown item is a 404.")
async def check_ack_of_unknown_item_is_refused(trial: ClauseTrial) -> None:
    """Acknowledge an item that does not exist."""
    answer = await trial.api.ack(f"work_{UNKNOWN}")
    raise_clause_broken_unless(not answer.ok, f"{answer} for an item that does not exist")
    if answer.status != HTTPStatus.NOT_FOUND:
        raise ClauseDiffersError(str(answer))
