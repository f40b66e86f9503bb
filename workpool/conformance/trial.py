"""The tools of one clause: its own items, two workers, and the clock.

Clauses run at the same time. A poll may deliver any clause's item, so every delivery is recorded
with its item, and a clause that waits for a delivery joins the poll in progress.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from workpool.conformance.verdict import Untried
from workpool.wire.protocol import STATES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from workpool.conformance.api import Answer, Api
    from workpool.conformance.shared_queue import Delivery, SharedQueue, Subject
    from workpool.conformance.work_sources import Script

CLAIM_SECONDS: Final = 15.0
"""Seconds to wait for the delivery of a new item, which may be created in the background."""
REDELIVERY_SECONDS: Final = 75.0
"""Seconds to wait for the redelivery of an item that was not acknowledged."""
POLL_SECONDS: Final = 1.0
POLLS_AT_ONCE: Final = 20
"""Number of polls in a row that may deliver items without a pause."""


class Trial:
    """The run of one clause.

    Attributes:
        api: The worker that polls.
        other: A second worker.
        subjects: The items of this clause.
    """

    def __init__(self, queue: SharedQueue) -> None:
        self._queue = queue
        self.api: Api = queue.api
        self.other: Api = queue.other
        self.subjects: list[Subject] = []
        self._starting = False

    async def start(self) -> None:
        """Wait until only a few other clauses are between their start and their first wait."""
        await self._queue.starts.acquire()
        self._starting = True

    def begun(self) -> None:
        """Let another clause start, because this one has ended or waits."""
        if self._starting:
            self._starting = False
            self._queue.starts.release()

    @property
    def now(self) -> float:
        """Return the seconds of a monotonic clock."""
        return self._queue.now()

    async def wait(self, seconds: float) -> None:
        """Wait while other clauses run."""
        self.begun()
        await self._queue.sleep(seconds)

    async def poll(self, **options: Any) -> Answer:
        """Poll, and record the delivery of the item, which may belong to another clause."""
        return await self._queue.poll(**options)

    async def create(self, script: Script | None = None) -> Subject:
        """Create an item, and a session with the tool uses of the script."""
        subject = await self._queue.create(script)
        self.subjects.append(subject)
        return subject

    async def claim(self, script: Script | None = None) -> Subject:
        """Create an item and receive it from a poll.

        Raises:
            Untried: No item can be created, or it is not delivered.
        """
        subject = await self.create(script)
        came = bool(subject.deliveries)  # a given item may come early
        if await self.delivery(subject, REDELIVERY_SECONDS if came else CLAIM_SECONDS) is None:
            raise Untried("the item that was created is not delivered")
        return subject

    async def acknowledged(self) -> Subject:
        """Create, receive and acknowledge an item."""
        subject = await self.claim()
        await self.acknowledge(subject)
        return subject

    async def active(self, ttl: int = 60) -> Subject:
        """Create, receive and acknowledge an item, and send the first heartbeat."""
        subject = await self.acknowledged()
        await self.heartbeat(subject, ttl)
        return subject

    async def acknowledge(self, subject: Subject) -> Answer:
        """Acknowledge an item as a precondition of a clause."""
        answer = await self.api.ack(subject.id)
        if not answer.ok:
            raise Untried(f"the ack was answered with {answer}")
        return answer

    async def heartbeat(self, subject: Subject, ttl: int = 60) -> Answer:
        """Send the next heartbeat as a precondition of a clause."""
        answer = await self.api.heartbeat(subject.id, subject.last_heartbeat, ttl)
        heartbeat = answer.get("last_heartbeat")
        if not answer.ok or not isinstance(heartbeat, str):
            raise Untried(f"a heartbeat was answered with {answer}")
        subject.last_heartbeat = heartbeat
        return answer

    async def stop(self, subject: Subject, *, force: bool) -> Answer:
        """Stop an item as a precondition of a clause."""
        answer = await self.api.stop(subject.id, json={"force": force})
        if not answer.ok:
            raise Untried(f"the stop was answered with {answer}")
        return answer

    async def delivery(self, subject: Subject, seconds: float) -> Delivery | None:
        """Poll for up to `seconds` until the item is delivered; return None without a delivery."""
        before = len(subject.deliveries)
        until = self.now + seconds
        polls = 0
        while True:
            came = await self._queue.join_poll()
            polls += 1
            if len(subject.deliveries) > before:
                return subject.deliveries[before]
            if self.now >= until:
                return None
            if not came or polls % POLLS_AT_ONCE == 0:
                await self.wait(POLL_SECONDS)

    async def item(self, subject: Subject) -> Mapping[str, Any]:
        """Return the item of the control plane, from a read or from the list.

        Raises:
            Untried: The item cannot be read, and the list does not have it.
        """
        answer = await self.api.get(subject.id)
        if answer.ok and isinstance(answer.body, dict):
            return answer.body
        found = await self._queue.look_up(subject.id) if answer.refused else None
        if found is None:
            raise Untried(f"the item cannot be read: {answer}")
        return found

    async def state(self, subject: Subject) -> str:
        """Return the item's state at the control plane."""
        state = (await self.item(subject)).get("state")
        if state not in STATES:
            raise Untried("the item has no state of the protocol")
        return str(state)

    async def clean_up(self) -> None:
        """Stop the items of this clause, so that no further poll delivers them."""
        for subject in self.subjects:
            await self._queue.end(subject)


def is_conflict(answer: Answer) -> bool:
    """Whether the answer is a 409."""
    return answer.status == HTTPStatus.CONFLICT


def is_bad_request(answer: Answer) -> bool:
    """Whether the answer is a 400."""
    return answer.status == HTTPStatus.BAD_REQUEST


def is_mismatch(answer: Answer) -> bool:
    """Whether the answer is a 412."""
    return answer.status == HTTPStatus.PRECONDITION_FAILED
