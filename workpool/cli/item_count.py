"""Counts the unfinished items of an environment by reading the list of items.

Needed for control planes whose statistics do not contain the number of running items.
Reads a bounded number of pages each time. See workpool/docs/operating.md, "`workpool scale`".
"""

from collections import Counter
from collections.abc import Awaitable, Sequence
from datetime import datetime
from itertools import pairwise
from typing import Final, NamedTuple

from workpool.errors import RefusedError
from workpool.wire.client import WorkClient
from workpool.wire.item_search import FoundItems, ItemSearch
from workpool.wire.items import WorkItem
from workpool.wire.protocol import LIST_LIMIT_MAX, QUEUED, STOPPED

LISTED_ITEMS_MAX: Final = 2000
"""Items that one count reads: 20 pages, in at least a second."""


class ItemCounts(NamedTuple):
    """The result of one count: the number of queued and of running items in the list.

    Attributes:
        queued: Queued items, delivered or not.
        running: Items that are starting, active or stopping.
        oldest_queued_at: When the oldest queued item was created; None without one.
        complete: Whether the list was read to its end. Otherwise the counts are lower bounds.
        before_unfinished: Whether only stopped items were read, in order of creation, and the list
            continues: the unfinished items come later in the list and are not counted yet.
    """

    queued: int
    running: int
    oldest_queued_at: datetime | None
    complete: bool
    before_unfinished: bool = False


class ItemCounter:
    """Counts the unfinished items of one environment repeatedly.

    A stopped item stays stopped. In a list that is in order of creation, later counts therefore
    skip the stopped items at its beginning. If one count cannot read all of a long history, later
    counts continue behind it, and are exact once they reach the end of the list.

    Args:
        client: An open client.
    """

    def __init__(self, client: WorkClient) -> None:
        self._client = client
        self._after: str | None = None
        """The id after which the next count begins; all items up to it are stopped."""

    async def count_items(self) -> ItemCounts:
        """Read the list of items, and count the unfinished ones.

        Raises:
            ControlPlaneError: The list cannot be read.
        """
        found = await self._list_items_to_count()
        self._skip_stopped_items_next_time(found.items)
        states = Counter(item.state for item in found.items)
        queued = [item.created_at for item in found.items if item.state == QUEUED]
        return ItemCounts(
            queued=len(queued),
            running=sum(states.values()) - states[QUEUED] - states[STOPPED],
            oldest_queued_at=min((time for time in queued if time is not None), default=None),
            complete=found.complete,
            before_unfinished=not found.complete and self._after == found.last_id is not None,
        )

    async def _list_items_to_count(self) -> FoundItems:
        """Read the items after the id `_after`, or from the first item if `_after` is None.

        If the control plane refuses `_after`, set it to None and read from the first item.
        """
        if self._after is not None:
            try:
                return await self._find_items(self._after)
            # The item with the id `_after` was deleted, or the control plane does not support
            # `after_id`, so read the whole list.
            except RefusedError:
                self._after = None
        return await self._find_items()

    def _find_items(self, after_id: str | None = None) -> Awaitable[FoundItems]:
        return self._client.find(ItemSearch(LISTED_ITEMS_MAX), after_id=after_id)

    def _skip_stopped_items_next_time(self, items: Sequence[WorkItem]) -> None:
        """Let the next count begin after the stopped items with which the list begins."""
        # Skip items only if the list is long enough to show that it is in order of creation. In a
        # list with another order, new items could be among the skipped items and never be counted.
        if len(items) >= LIST_LIMIT_MAX and _is_in_creation_order(items):
            stopped = next((n for n, item in enumerate(items) if item.state != STOPPED), len(items))
            if stopped:
                self._after = items[stopped - 1].id


def _is_in_creation_order(items: Sequence[WorkItem]) -> bool:
    """Return whether both the ids and the creation times of the items are in ascending order.

    In such a list, new items come at the end.
    """
    return all(
        first.id < second.id
        and first.created_at is not None
        and second.created_at is not None
        and first.created_at <= second.created_at
        for first, second in pairwise(items)
    )
