"""A bounded search of the item list by state and failure, newest first or in the list's order.

The control plane of this package applies the parameters itself. Others ignore or refuse them; then
all items are read, up to a bound, and selected here. See workpool/docs/protocol.md, "List items".
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from workpool.wire.protocol import OUR_ERROR, STOPPED

if TYPE_CHECKING:
    from workpool.wire.endpoints import ItemPage
    from workpool.wire.items import WorkItem
    from workpool.wire.protocol import State

FIND_PAGES_MAX: Final = 100
"""Pages that one search reads: 10,000 items, in some 5 s."""
_LONG_AGO: Final = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class ItemSearch:
    """The criteria of a search: state, failure, order and number of items.

    Attributes:
        limit: The number of items to find at most.
        state: Only items in this state; None: in any.
        failed: Only stopped items with a `workpool.error`.
        newest: The newest items first, not in the control plane's order.
    """

    limit: int
    state: State | None = None
    failed: bool = False
    newest: bool = False

    @property
    def query_parameters(self) -> str:
        """The query parameters for the control plane; empty if every item matches."""
        return "".join(
            (
                f"&state={self.state}" if self.state is not None else "",
                "&failed=true" if self.failed else "",
                "&order=desc" if self.newest else "",
            )
        )

    def matches_item(self, item: WorkItem) -> bool:
        """Return whether the item has the state and the failure that the search asks for."""
        failed = item.state == STOPPED and OUR_ERROR in item.metadata
        return (self.state is None or item.state == self.state) and (failed or not self.failed)


class FoundItems:
    """The result of a search: the items that were found, and how much of the list was read.

    Attributes:
        items: The items that were found.
        read: The number of items that were received, wanted or not.
        complete: Whether the list was read to its end, and nothing beyond `limit` was found.
        last_id: The id of the item at which the unread rest of the list begins; None: nothing was
            received.
    """

    def __init__(self, search: ItemSearch) -> None:
        self.items: list[WorkItem] = []
        self.read = 0
        self.complete = False
        self.last_id: str | None = None
        self._search = search
        self._ordered = not search.newest

    @property
    def has_enough_items(self) -> bool:
        """Whether enough items were found, so that no further page is needed.

        If the control plane does not sort, the newest items are known only at the end of the list.
        """
        return self._ordered and len(self.items) >= self._search.limit

    def add_page(self, page: ItemPage) -> None:
        """Add the items of a page that match the search."""
        self._ordered = self._ordered or page.selected
        self.read += len(page.items)
        self.items += filter(self._search.matches_item, page.items)
        self.complete = page.next_page is None
        if page.items:
            self.last_id = page.items[-1].id

    def sort_and_limit(self) -> None:
        """Sort the found items if necessary, and keep the first `limit` of them."""
        if not self._ordered:
            self.items.sort(key=lambda item: item.created_at or _LONG_AGO, reverse=True)
        if len(self.items) > self._search.limit:
            del self.items[self._search.limit :]
            self.complete = False
            if self._ordered:
                self.last_id = self.items[-1].id
