"""Parts of the error text of a failed wait: the events so far, and the progress of items."""

from __future__ import annotations

import asyncio
import linecache
from collections import Counter
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from workpool.events import Event
    from workpool.server import ControlPlane, Item


def count_event_names(events: Iterable[Event]) -> str:
    """Return the class names of the events, each with the number of events of this class."""
    counts = Counter(type(event).__name__ for event in events)
    return (
        ", ".join(_format_name_with_count(name, count) for name, count in counts.items())
        or "nothing"
    )


def describe_item_progress(item: Item, plane: ControlPlane) -> list[str]:
    """Describe an item's state and history, and the stack frames in which its handler waits."""
    kinds = groupby(record.kind for record in plane.history.records_of_item(item.id))
    progress = ", ".join(_format_name_with_count(kind, len(list(same))) for kind, same in kinds)
    return [f"the item is {item.state}; it was {progress}", *_find_handler_frames(item.id)]


def _format_name_with_count(name: str, count: int) -> str:
    return name if count == 1 else f"{name} ×{count}"


def _find_handler_frames(work_id: str) -> list[str]:
    """Return the stack frames of the handler that runs for the item, innermost `await` last."""
    lines: list[str] = []
    for task in asyncio.all_tasks():
        # The task of a handler has the name "HANDLER WORK_ID", set in `pool.handler_executor`.
        label, _, name = task.get_name().rpartition(" ")
        if label and name == work_id:
            lines.append(f"its handler {label} waits here:")
            awaited: Any = task.get_coro()
            while frame := getattr(awaited, "cr_frame", None):
                path, number = frame.f_code.co_filename, frame.f_lineno
                lines.append(f"  {path}:{number} in {frame.f_code.co_name}")
                lines.append(f"    {linecache.getline(path, number).strip()}")
                awaited = awaited.cr_await
    return lines
