"""The text of a failed wait: what happened instead of the expected event."""

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


def names_of(events: Iterable[Event]) -> str:
    """Return the names of the events, each once with its count."""
    counts = Counter(type(event).__name__ for event in events)
    return ", ".join(_name_with_count(name, count) for name, count in counts.items()) or "nothing"


def progress_of(item: Item, plane: ControlPlane) -> list[str]:
    """Return the state and history of an item, and the frames in which its handler waits."""
    kinds = groupby(record.kind for record in plane.history.records_of_item(item.id))
    progress = ", ".join(_name_with_count(kind, len(list(same))) for kind, same in kinds)
    return [f"the item is {item.state}; it was {progress}", *_handler_frames(item.id)]


def _name_with_count(name: str, count: int) -> str:
    return name if count == 1 else f"{name} ×{count}"


def _handler_frames(work_id: str) -> list[str]:
    """Return all frames of the item's handler, down to its last `await`."""
    lines: list[str] = []
    for task in asyncio.all_tasks():
        label, _, name = task.get_name().rpartition(" ")  # see `pool.handler_executor`
        if label and name == work_id:
            lines.append(f"its handler {label} waits here:")
            awaited: Any = task.get_coro()
            while frame := getattr(awaited, "cr_frame", None):
                path, number = frame.f_code.co_filename, frame.f_lineno
                lines.append(f"  {path}:{number} in {frame.f_code.co_name}")
                lines.append(f"    {linecache.getline(path, number).strip()}")
                awaited = awaited.cr_await
    return lines
