"""Helpers for checking one clause: they create, claim, stop and read the clause's items.

Clauses run at the same time, and a poll may deliver the item of any clause. Therefore every
delivery is recorded with its item, and a clause that waits for a delivery joins the poll in
progress.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from workpool.conformance.verdict import ClauseUntriedError
from workpool.wire.protocol import STATES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from workpool.conformance.api import Answer, WorkerApi
    from workpool.conformance.shared_queue import ItemDelivery, SharedQueue, SuiteItem
    from workpool.conformance.work_sources import Script

CLAIM_SECONDS: Final = 15.0
"""Seconds to wait for the delivery of a new item, which may be created in the background."""
REDELIVERY_SECONDS: Final = 75.0
"""Seconds to wait for the redelivery of an item that was not acknowledged."""
POLL_SECONDS: Final = 1.0
POLLS_AT_ONCE: Final = 20
"""Number of polls in a row that may deliver items without a pause."""


class ClauseTrial:
    """The check of one clause, with methods that bring items into the states that it needs.

    Attributes:
        api: The worker that polls.
        other: A second worker.
        subjects: The items of this clause.
    """

    def __init__(self, queue: SharedQueue) -> None:
        self._queue = queue
        self.api: WorkerApi = queue.api
        self.other: WorkerApi = queue.other
        self.subjects: list[SuiteItem] = []
        self._starting = False

    async def wait_for_start_permit(self) -> None:
        """Wait for a start permit, which limits how many clauses run at the same time."""
        await self._queue.starts.acquire()
        self._starting = True

    def release_start_permit(self) -> None:
        """Release the start permit of this clause, so that another clause can start.

        Called when this clause has ended or waits for time to pass. Further calls have no effect.
        """
        if self._starting:
            self._starting = False
            self._queue.starts.release()

    @property
    def now(self) -> float:
        """The current time of a monotonic clock, in seconds."""
        return self._queue.now()

    async def wait_while_other_clauses_run(self, seconds: float) -> None:
        """Release the start permit, so that other clauses can start, and wait for `seconds`."""
        self.release_start_permit()
        await self._queue.sleep(seconds)

    async def poll(self, **options: Any) -> Answer:
        """Send one poll, and record a delivered item, even if another clause created the item."""
        return await self._queue.poll(**options)

    async def create_item(self, script: Script | None = None) -> SuiteItem:
        """Create an item. `script` lists the tool uses of the agent in the item's session."""
        subject = await self._queue.create_item(script)
        self.subjects.append(subject)
        return subject

    async def claim_item(self, script: Script | None = None) -> SuiteItem:
        """Create an item and receive it from a poll.

        Raises:
            ClauseUntriedError: No item can be created, or it is not delivered.
        """
        subject = await self.create_item(script)
        # If the item existed before the suite started, another clause may have received the item
        # already. Then this clause waits for a redelivery, which takes longer.
        came = bool(subject.deliveries)
        if (
            await self.wait_for_delivery(subject, REDELIVERY_SECONDS if came else CLAIM_SECONDS)
            is None
        ):
            raise ClauseUntriedError("the item that was created is not delivered")
        return subject

    async def create_acknowledged_item(self) -> SuiteItem:
        """Create, receive and acknowledge an item."""
        subject = await self.claim_item()
        await self.acknowledge_item(subject)
        return subject

    async def create_active_item(self, ttl: int = 60) -> SuiteItem:
        """Create, receive and acknowledge an item, and send the first heartbeat."""
        subject = await self.create_acknowledged_item()
        await self.send_heartbeat(subject, ttl)
        return subject

    async def acknowledge_item(self, subject: SuiteItem) -> Answer:
        """Acknowledge an item; raises `ClauseUntriedError` if the ack fails."""
        answer = await self.api.ack(subject.id)
        if not answer.ok:
            raise ClauseUntriedError(f"the ack was answered with {answer}")
        return answer

    async def send_heartbeat(self, subject: SuiteItem, ttl: int = 60) -> Answer:
        """Send the next heartbeat of an item; raises `ClauseUntriedError` if it fails."""
        answer = await self.api.heartbeat(subject.id, subject.last_heartbeat, ttl)
        heartbeat = answer.get("last_heartbeat")
        if not answer.ok or not isinstance(heartbeat, str):
            raise ClauseUntriedError(f"a heartbeat was answered with {answer}")
        subject.last_heartbeat = heartbeat
        return answer

    async def stop_item(self, subject: SuiteItem, *, force: bool) -> Answer:
        """Stop an item; raises `ClauseUntriedError` if the stop fails."""
        answer = await self.api.stop(subject.id, json={"force": force})
        if not answer.ok:
            raise ClauseUntriedError(f"the stop was answered with {answer}")
        return answer

    async def wait_for_delivery(self, subject: SuiteItem, seconds: float) -> ItemDelivery | None:
        """Poll until the item is delivered. Return None if `seconds` pass without a delivery."""
        before = len(subject.deliveries)
        until = self.now + seconds
        polls = 0
        while True:
            came = await self._queue.join_or_start_poll()
            polls += 1
            if len(subject.deliveries) > before:
                return subject.deliveries[before]
            if self.now >= until:
                return None
            if not came or polls % POLLS_AT_ONCE == 0:
                await self.wait_while_other_clauses_run(POLL_SECONDS)

    async def read_item(self, subject: SuiteItem) -> Mapping[str, Any]:
        """Read the item; if the credential may not read items, find the item in the list.

        Raises:
            ClauseUntriedError: The item cannot be read, and the list does not have it.
        """
        answer = await self.api.get(subject.id)
        if answer.ok and isinstance(answer.body, dict):
            return answer.body
        found = await self._queue.find_listed_item(subject.id) if answer.is_refused else None
        if found is None:
            raise ClauseUntriedError(f"the item cannot be read: {answer}")
        return found

    async def read_item_state(self, subject: SuiteItem) -> str:
        """Read the item, and return its state."""
        state = (await self.read_item(subject)).get("state")
        if state not in STATES:
            raise ClauseUntriedError("the item has no state of the protocol")
        return str(state)

    async def clean_up(self) -> None:
        """Stop the items of this clause, so that no later poll delivers them."""
        for subject in self.subjects:
            await self._queue.stop_item(subject)


def is_conflict(answer: Answer) -> bool:
    """Return whether the answer has the status 409."""
    return answer.status == HTTPStatus.CONFLICT


def is_bad_request(answer: Answer) -> bool:
    """Return whether the answer has the status 400."""
    return answer.status == HTTPStatus.BAD_REQUEST


def is_precondition_failed(answer: Answer) -> bool:
    """Return whether the answer has the status 412."""
    return answer.status == HTTPStatus.PRECONDITION_FAILED
