"""Acknowledging an item.

See workpool/docs/protocol.md, "Acknowledge".
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

from workpool.conformance.api import shown
from workpool.conformance.clause import clause
from workpool.conformance.clauses.auth_and_errors import UNKNOWN
from workpool.conformance.clauses.delivery import readable
from workpool.conformance.trial import is_conflict
from workpool.conformance.verdict import Breaks, Differs, same_or_breaks, same_or_differs
from workpool.wire.protocol import ACTIVE, STARTING

if TYPE_CHECKING:
    from workpool.conformance.trial import Trial


@clause("ack-starts", "The answer is the item, `starting`, with `acknowledged_at`.")
async def ack_starts_the_item(trial: Trial) -> None:
    """Acknowledge an item, and read the answer as a worker does."""
    answer = await trial.api.ack((await trial.claim()).id)
    same_or_breaks(answer.ok, str(answer))
    readable(answer.body)
    state = answer.get("state")
    same_or_breaks(state in {STARTING, ACTIVE}, f"the item is {shown(state)}")
    same_or_differs(state == STARTING, f"the item is {state}")
    same_or_differs(isinstance(answer.get("acknowledged_at"), str), "without `acknowledged_at`")


@clause("ack-repeat", "The holder may repeat it: `acknowledged_at` does not change.")
async def repeated_ack(trial: Trial) -> None:
    """Acknowledge an item twice, as a worker does after a lost answer."""
    subject = await trial.claim()
    first = await trial.acknowledge(subject)
    await trial.wait(1.1)  # times may be rounded to seconds
    second = await trial.api.ack(subject.id)
    same_or_differs(second.ok, f"{second}: a lost answer costs a redelivery")
    same = first.get("acknowledged_at") == second.get("acknowledged_at")
    same_or_differs(same, "`acknowledged_at` is a new time")


@clause("ack-other-worker", "The ack of a worker with another name than the poll's is a 409.")
async def ack_of_another_worker(trial: Trial) -> None:
    """Acknowledge an item that was delivered to another worker."""
    answer = await trial.other.ack((await trial.claim()).id)
    same_or_differs(is_conflict(answer), f"{answer}: the first heartbeat decides")


@clause("ack-stopped", "An item that is `stopped` is a 409.")
async def ack_of_a_stopped_item(trial: Trial) -> None:
    """Acknowledge an item that was stopped."""
    subject = await trial.claim()
    await trial.stop(subject, force=True)
    answer = await trial.api.ack(subject.id)
    state = answer.get("state")
    if answer.ok and state in {STARTING, ACTIVE}:
        raise Breaks(f"the stopped item is {state} again")
    same_or_differs(is_conflict(answer), str(answer))


@clause("ack-unknown", "An unknown item is a 404.")
async def ack_of_an_unknown_item(trial: Trial) -> None:
    """Acknowledge an item that does not exist."""
    answer = await trial.api.ack(f"work_{UNKNOWN}")
    same_or_breaks(not answer.ok, f"{answer} for an item that does not exist")
    if answer.status != HTTPStatus.NOT_FOUND:
        raise Differs(str(answer))
