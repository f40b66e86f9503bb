"""One page of a list of items, events, sessions or environments, and its JSON.

See workpool/docs/protocol.md, "List items".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypeVar

from workpool.server.answer_limits import count_fitting_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from workpool.server.conversation import StoredEvent
    from workpool.server.environments import Environment
    from workpool.server.stored_item import Item
    from workpool.server.stored_session import SessionView

Row = TypeVar("Row", bound="Item | StoredEvent | SessionView | Environment")

AFTER: Final = "after"
BEFORE: Final = "before"
"""The prefix of a `next_page` token, which clients do not parse: the direction, then an id."""


class ListPage(NamedTuple, Generic[Row]):
    """One page of a list.

    Attributes:
        items: The rows of the page.
        has_more: Whether a next page exists.
        backwards: Whether the next page has older rows; if false, it has newer rows.
        looked_until: The id of the last row that a search has read, if the next page begins after
            this row.
    """

    items: Sequence[Row]
    has_more: bool
    backwards: bool
    looked_until: str | None = None


def make_page(
    rows: Sequence[Row], limit: int, *, backwards: bool, newest_first: bool = False
) -> ListPage[Row]:
    """Make a page of up to `limit` rows. `has_more` is true if `rows` has more than `limit`.

    `newest_first`: the rows are in descending order, and the next page has older ones.
    """
    more = len(rows) > limit
    if newest_first:
        return ListPage(rows[:limit], more, backwards=True)
    if backwards:
        return ListPage(rows[1:] if more else rows, more, backwards=True)
    return ListPage(rows[:limit], more, backwards=False)


def page_json(page: ListPage[Row], render: Callable[[Row], dict[str, Any]]) -> dict[str, Any]:
    """Return the JSON of a page, without the rows that do not fit into one answer."""
    items, rows = page.items, [render(row) for row in page.items]
    # If not all rows fit, the answer must keep the rows nearest to the id in the request, because
    # the next page continues there. On a backwards page in ascending order, these rows come last.
    from_end = page.backwards and len(items) > 1 and items[0].id < items[-1].id
    count = count_fitting_rows(rows[::-1] if from_end else rows)
    kept = slice(len(rows) - count, None) if from_end else slice(count)
    has_more = page.has_more or count < len(rows)
    items, rows = items[kept], rows[kept]
    first = items[0].id if items else None
    last = items[-1].id if items else None
    ends = (first or "", last or "")
    edge = min(ends) if page.backwards else max(ends)
    if page.looked_until is not None and count == len(page.items):
        edge = page.looked_until
    return {
        "data": rows,
        "first_id": first,
        "last_id": last,
        "has_more": has_more,
        "next_page": f"{BEFORE if page.backwards else AFTER}-{edge}" if has_more else None,
    }
