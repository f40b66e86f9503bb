"""Decides whether a handler has a free slot; a handler without one gets no item.

Lives on the handlers' loop. See workpool/docs/routing.md, "Limits of handlers".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from workpool.errors import PluginError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workpool.handlers import Handler
    from workpool.pool.pool_item import OwnedItems


class HandlerSlots:
    """Decides whether a handler has a free slot, by `max_sessions` and `reserved_sessions`.

    Reads the items that the pool owns, and changes nothing.

    Args:
        items: The items that the pool owns.
        handlers: The handlers that are known before the first item.
        concurrency: The number of slots of the pool.

    Raises:
        PluginError: More slots are reserved than there are, or a handler would never have one.
    """

    def __init__(self, items: OwnedItems, handlers: Sequence[Handler], concurrency: int) -> None:
        self._items = items
        self._concurrency = concurrency
        self._reserving = [each for each in handlers if each.reserved_sessions]
        reserved = sum(each.reserved_sessions for each in self._reserving)
        if reserved > concurrency:
            names = ", ".join(f"{each.name} {each.reserved_sessions}" for each in self._reserving)
            raise PluginError(
                self._reserving[0].plugin,
                f"reserved_sessions are {reserved} in all ({names}), and concurrency is "
                f"{concurrency}: reserve less, or raise concurrency",
            )
        for each in handlers:
            if reserved == concurrency and not each.reserved_sessions:
                raise PluginError(
                    each.plugin,
                    f"{each.name} would never run: all {concurrency} slots are reserved for other "
                    "handlers; reserve less, or raise concurrency",
                )

    def has_free_slot(self, handler: Handler) -> bool:
        """Return whether one more session of this handler may run."""
        limit = handler.max_sessions
        if limit is not None and self._items.count_items(handler) >= limit:
            return False
        if not self._reserving:
            return True
        kept_free = sum(
            max(0, other.reserved_sessions - self._items.count_items(other))
            for other in self._reserving
            if other.name != handler.name
        )
        return len(self._items) + kept_free < self._concurrency
