"""The queue that all clauses of a run share, with a record of its items and deliveries."""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from workpool.conformance.api import NoAnswerError, shorten_value_for_terminal
from workpool.conformance.work_sources import MARK
from workpool.wire.protocol import NO_HEARTBEAT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping

    from workpool.conformance.api import Answer, WorkerApi
    from workpool.conformance.work_sources import ItemSource, Script

STARTS: Final = 4
"""Largest number of clauses between their start and their first wait."""
PAGES_MAX: Final = 100
OTHER_WORKER: Final = "workpool-conform-other"


class ForeignItemsError(Exception):
    """The environment contains, or may contain, items that the suite has not created."""


class ItemListRefusedError(ForeignItemsError):
    """The control plane refuses to list the items, so items of others cannot be ruled out."""


class ItemDelivery(NamedTuple):
    """One delivery of an item by a poll.

    Attributes:
        number: The number of this delivery, counted over all items.
        nothing_at: The time when the suite sent the last poll that returned no item: the item was
            not available then. It shows whether the control plane delivered the item late, or the
            suite polled late.
        at: The time when the suite sent the poll that delivered the item.
        item: The item as JSON.
    """

    number: int
    nothing_at: float
    at: float
    item: Mapping[str, Any]


@dataclass(slots=True, eq=False)
class SuiteItem:
    """An item that the suite created, or whose id the user passed to the suite.

    Attributes:
        id: The id, which a control plane may change with each delivery.
        session_id: The id of the session; empty until the first delivery.
        last_heartbeat: The value that the next heartbeat must expect.
    """

    id: str
    session_id: str = ""
    last_heartbeat: str = NO_HEARTBEAT
    deliveries: list[ItemDelivery] = field(default_factory=list)


class SharedQueue:
    """Creates items and polls for them, on behalf of clauses that run at the same time."""

    def __init__(  # noqa: PLR0913 - one keyword for each option of `workpool conform`
        self,
        api: WorkerApi,
        source: ItemSource,
        *,
        creator: WorkerApi | None = None,
        given: Iterable[str] = (),
        test_environment: bool = False,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.api = api
        self.other = api.copy_as_worker(OTHER_WORKER, api.token)
        self.now = now
        self._source = source
        self._creator = creator or api
        self._given = frozenset(given)
        self._test_environment = test_environment
        self.sleep = sleep
        self.starts = asyncio.Semaphore(STARTS)
        # The keys are the ids of the items and the ids of the items' sessions.
        self._subjects = {name: SuiteItem(name) for name in self._given}
        self._foreign: set[str] = set()
        self._deliveries = 0
        self._nothing_at = -math.inf
        # The lock prevents a poll from delivering an item before `create_item` has recorded it.
        self._queue = asyncio.Lock()
        self._polling: asyncio.Future[bool] | None = None

    async def create_item(self, script: Script | None = None) -> SuiteItem:
        """Create an item, and record that it belongs to the suite."""
        async with self._queue:
            name = await self._source.create_item(self._creator, script)
            return self._subjects.setdefault(name, SuiteItem(name))

    async def poll(self, **options: Any) -> Answer:
        """Send a poll. Record the delivery of an item of the suite; stop any other delivered item.

        Raises:
            ForeignItemsError: The suite has not created the item, and may not stop it.
        """
        answer, _ = await self._poll_once(options)
        return answer

    async def _poll_once(self, options: dict[str, Any]) -> tuple[Answer, bool]:
        """Send a poll; return the answer, and whether the poll delivered an item.

        For an item that is not the suite's, only the first delivery counts as a delivery.
        """
        async with self._queue:
            at = self.now()
            answer = await self.api.poll(**options)
            item = answer.body
            if not answer.ok or not isinstance(item, dict) or not isinstance(item.get("id"), str):
                self._nothing_at = at
                return answer, False
            subject = self._find_and_update_suite_item(item)
            if subject is not None:
                self._deliveries += 1
                delivery = ItemDelivery(self._deliveries, self._nothing_at, at, item)
                subject.deliveries.append(delivery)
                return answer, True
        if not self._test_environment:
            raise ForeignItemsError(
                f"item {shorten_value_for_terminal(item['id'])}, not created by the suite, came"
            )
        new = item["id"] not in self._foreign
        self._foreign.add(item["id"])
        await self.stop_item(SuiteItem(item["id"]))
        return answer, new

    async def join_or_start_poll(self) -> bool:
        """Send a poll, or join the poll in progress; return whether the poll delivered an item."""
        if self._polling is not None:
            return await asyncio.shield(self._polling)
        polling = self._polling = asyncio.get_running_loop().create_future()
        came = False
        try:
            _, came = await self._poll_once({})
        finally:
            self._polling = None
            polling.set_result(came)
        return came

    def _find_and_update_suite_item(self, item: Mapping[str, Any]) -> SuiteItem | None:
        """Update and return the record of a delivered item; None if the suite has no such item."""
        payload = item.get("data")
        session_id = payload.get("id") if isinstance(payload, dict) else None
        subject = self._subjects.get(item["id"]) or self._subjects.get(session_id or "")
        if subject is not None:
            subject.id = item["id"]
            self._subjects[subject.id] = subject
            if isinstance(session_id, str) and session_id:
                subject.session_id = session_id
                self._subjects[session_id] = subject
        return subject

    async def find_listed_item(self, work_id: str) -> Mapping[str, Any] | None:
        """Return an item's entry in the list; None if the list cannot be read or lacks the item."""
        async for row in self._list_rows():
            if row.get("id") == work_id:
                return row
        return None

    async def stop_item(self, subject: SuiteItem) -> None:
        """Stop an item with force; an item that has ended stays unchanged."""
        with suppress(NoAnswerError):
            await self.api.stop(subject.id, json={"force": True})

    async def check_that_items_are_of_suite(self) -> None:
        """Check that all items of the environment were created by the suite or passed to it.

        Raises:
            ForeignItemsError: There are other items, or the list cannot be read.
        """
        if self._test_environment:
            return
        async for row in self._list_rows(strict=True):
            metadata = row.get("metadata")
            own = isinstance(metadata, dict) and MARK in metadata
            if not own and row.get("id") not in self._given:
                raise ForeignItemsError(
                    f"item {shorten_value_for_terminal(row.get('id'))} was not created by the suite"
                )

    async def _list_rows(self, *, strict: bool = False) -> AsyncIterator[Mapping[str, Any]]:
        """Yield the items of the list. `strict`: raise an error if the list is incomplete."""
        page: str | None = None
        for _ in range(PAGES_MAX):
            query = {"limit": "100"} if page is None else {"limit": "100", "page": page}
            answer = await self.api("GET", self.api.work_url(), params=query)
            rows = answer.get("data")
            if not answer.ok or not isinstance(rows, list):
                if strict:
                    raise ItemListRefusedError(f"the items cannot be listed: {answer}")
                return
            for row in rows:
                if isinstance(row, dict):
                    yield row
            page = None if answer.get("has_more") is False else answer.get("next_page")
            if not page:
                return
        if strict:
            raise ForeignItemsError(f"there are more than {PAGES_MAX} pages of items")
